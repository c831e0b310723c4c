"""One request: what is asked for is the same in Python, as plain values and on the command line."""

from __future__ import annotations

import inspect
import json
from typing import Any

import click
import pytest
from hypothesis import given, settings

from sdvino import RequestError, SpeedSettings, StableDiffusionPipeline
from sdvino.cli.generate import generate_command
from sdvino.request import DEFAULTS, OPTIONS, Request
from tests.drawn_requests import requests


@settings(max_examples=200, deadline=None)
@given(requests())
def test_plain_values_bring_it_back(request: Request) -> None:
    plain = json.loads(json.dumps(request.to_plain()))
    assert Request.from_plain(plain) == request
    assert Request.of(**request.flat()) == request


def test_what_is_not_said_is_left_out() -> None:
    assert Request(prompts=("a",)).to_plain() == {"prompts": ["a"]}
    asked = Request.of(prompts=["a"], cache_interval=2, eta=0.5, guidance_interval=[0, 0.5])
    assert asked.speed == SpeedSettings(cache_interval=2, guidance_interval=(0.0, 0.5))
    assert asked.to_plain() == {
        "prompts": ["a"],
        "cache_interval": 2,
        "eta": 0.5,
        "guidance_interval": [0.0, 0.5],
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no prompt"),
        ({"prompts": "a red circle"}, "list of texts"),
        ({"prompts": [None]}, "give text"),
        ({"prompts": ["a"], "negative_prompts": [1]}, "negative prompt is a int"),
        ({"prompts": ["a"], "step": 4}, "no 'step'; it has prompts, .*num_inference_steps"),
        ({"prompts": ["a"], "eta": "much"}, "eta is 'much'; give a number from 0 to 1"),
        ({"prompts": ["a"], "eta": None}, "eta is None"),
        ({"prompts": ["a"], "eta": float("nan")}, "eta is nan"),
        ({"prompts": ["a"], "seed": True}, "whole number"),
        ({"prompts": ["a"], "seed": 2**63}, "seed"),
        ({"prompts": ["a"], "seed": 10**5000}, "seed"),
        ({"prompts": ["a"], "guidance_scale": 10**400}, "guidance_scale"),
        ({"prompts": ["a"], "scheduler": ["euler"]}, "Unknown scheduler"),
        ({"prompts": ["a"], "token_downsampling": 3}, "choose one of: 1, 2, 4"),
        ({"prompts": ["a"], "guidance_interval": [0.5]}, "two fractions"),
        ({"prompts": ["a"], "guidance_interval": [0.8, "x"]}, "smaller first"),
        ({"prompts": ["a"], "tiny_vae": "yes"}, "true or false"),
        ({"prompts": ["a"], "num_inference_steps": "x" * 10_000}, "whole number"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        Request.from_plain(values)
    assert len(str(caught.value)) < 500


def test_every_option_is_an_argument_and_on_the_command_line() -> None:
    arguments = inspect.signature(StableDiffusionPipeline.__call__).parameters
    speed = set(SpeedSettings.__slots__)
    assert set(OPTIONS) - speed <= set(arguments)
    for name in set(OPTIONS) & set(arguments):
        default = arguments[name].default
        assert default is None or default == DEFAULTS[name], name
    command = {one.name: one for one in generate_command.params}
    assert set(OPTIONS) <= set(command)
    for name in OPTIONS:
        one = command[name]
        assert isinstance(one, click.Option)
        assert one.help
    assert set(DEFAULTS) == {*OPTIONS, "negative_prompts"}
