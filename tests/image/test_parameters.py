from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdvino import __version__
from sdvino.errors import RequestError
from sdvino.image.parameters import MAX_TEXT, PictureSettings, parse_parameters
from sdvino.image.sampler_names import parse_sampler, sampler_title
from sdvino.settings import (
    FAST,
    MAX_SEED,
    MIN_SEED,
    NOISES,
    SAMPLERS,
    SIGMA_SCHEDULES,
    TIMESTEP_SPACINGS,
    SpeedSettings,
)

FULL = PictureSettings(
    prompt="a red circle",
    negative_prompt="blurry, dark",
    num_inference_steps=20,
    scheduler="euler_ancestral",
    sigma_schedule="karras",
    timestep_spacing="leading",
    guidance_scale=7.5,
    guidance_rescale=0.7,
    eta=0.25,
    seed=42,
    noise="torch",
    width=512,
    height=768,
    clip_skip=1,
    model="dreamshaper",
    recipe="int8",
)


def test_the_text_is_in_the_form_of_a1111() -> None:
    assert FULL.to_text() == (
        "a red circle\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 42,"
        " Size: 512x768, Model: dreamshaper, Clip skip: 2, RNG: CPU, Eta: 0.25,"
        " Timestep spacing: leading, Guidance rescale: 0.7, Recipe: int8,"
        f" Version: sdvino {__version__}"
    )
    assert parse_parameters(FULL.to_text()) == FULL


def test_what_is_not_said_stays_unsaid() -> None:
    bare = PictureSettings(prompt="a red circle")
    assert bare.to_text() == f"a red circle\nVersion: sdvino {__version__}"
    assert parse_parameters(bare.to_text()) == bare


LINES = st.sampled_from(
    ["Negative prompt: x", "Negative prompt:", "Steps: 1, Sampler: DDIM, Seed: 2", "Steps: 3", ""]
)
PROMPTS = st.one_of(
    st.text(max_size=80),
    st.text(st.sampled_from(list('aé:,"\\\n\r\t\0\x85\u2028\ud800 漢🦊')), max_size=30),
    st.lists(st.one_of(LINES, st.text(max_size=10)), max_size=5).map("\n".join),
)
NUMBERS = st.one_of(
    st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 50).map(float)
)
NAMES = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=20))


def maybe(values: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.sampled_from(values))


@settings(max_examples=200, deadline=None)
@given(
    made=st.builds(
        PictureSettings,
        prompt=PROMPTS,
        negative_prompt=PROMPTS,
        num_inference_steps=st.one_of(st.none(), st.integers(1, 1000)),
        scheduler=maybe(SAMPLERS),
        sigma_schedule=maybe(SIGMA_SCHEDULES),
        timestep_spacing=maybe(TIMESTEP_SPACINGS),
        guidance_scale=NUMBERS,
        guidance_rescale=NUMBERS,
        eta=NUMBERS,
        seed=st.one_of(st.none(), st.integers(MIN_SEED, MAX_SEED)),
        noise=maybe(NOISES),
        width=st.just(64),
        height=st.just(16_384),
        clip_skip=st.one_of(st.none(), st.integers(0, 20)),
        model=NAMES,
        recipe=NAMES,
        other=maybe([(), (("Lora hashes", 'a: 1, b: "2"'), ("Denoising strength", "0.5"))]).map(
            lambda other: other or ()
        ),
    )
)
def test_every_setting_survives(made: PictureSettings) -> None:
    text = made.to_text()
    assert parse_parameters(text) == made
    text.encode("utf-8")  # what a file cannot hold is not left in the text
    assert "\0" not in text
    assert "\r" not in text


@settings(max_examples=200, deadline=None)
@given(st.one_of(PROMPTS, st.text(max_size=200).map(lambda text: f"a\nSteps: 2, {text}")))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    refusal, prompt = "", ""
    try:
        prompt = parse_parameters(text).prompt
    except RequestError as error:
        refusal = str(error)
    assert "\n" not in refusal
    # A prompt is what the text begins with, or nothing at all.
    assert text.startswith(prompt)


A1111 = """masterpiece, <lora:add_detail:1> a lighthouse, (dusk:1.2)
second line
Negative prompt: lowres, bad hands
signature
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768,\
 Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.4, Clip skip: 2,\
 Hires upscale: 2, Lora hashes: "add_detail: 7c6bad76eb54, b: c", Version: v1.7.0"""


def test_a_picture_of_a1111() -> None:
    found = parse_parameters(A1111)
    assert found == PictureSettings(
        prompt="masterpiece, <lora:add_detail:1> a lighthouse, (dusk:1.2)\nsecond line",
        negative_prompt="lowres, bad hands\nsignature",
        num_inference_steps=28,
        scheduler="dpmpp_2m",
        sigma_schedule="karras",
        guidance_scale=6.5,
        seed=1234567890,
        noise="cuda",  # its default, which it does not write
        width=512,
        height=768,
        clip_skip=1,
        model="v1-5-pruned-emaonly",
        version="v1.7.0",
        other=(
            ("Model hash", "6ce0161689"),
            ("Denoising strength", "0.4"),
            ("Hires upscale", "2"),
            ("Lora hashes", "add_detail: 7c6bad76eb54, b: c"),
        ),
    )
    assert parse_parameters(found.to_text()) == found


def test_newer_a1111_names_the_schedule_apart() -> None:
    line = "a\nSteps: 4, Sampler: {}, Schedule type: {}, CFG scale: 1, RNG: CPU, Version: v1.10.1"
    found = parse_parameters(line.format("Euler a", "Exponential"))
    assert (found.scheduler, found.sigma_schedule) == ("euler_ancestral", "exponential")
    assert found.noise == "torch"
    automatic = parse_parameters(line.format("DPM++ 2M SDE", "Automatic"))
    assert (automatic.scheduler, automatic.sigma_schedule) == ("dpmpp_2m_sde", None)
    assert ("Schedule type", "Automatic") in automatic.other


def test_a_sampler_that_is_not_here_is_kept_by_name() -> None:
    found = parse_parameters("a\nSteps: 4, Sampler: DPM++ 3M SDE, CFG scale: 1, Seed: 2")
    assert found.scheduler is None
    assert found.other == (("Sampler", "DPM++ 3M SDE"),)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_names_are_read_in_every_spelling(name: Any) -> None:
    title = sampler_title(name)
    for spelling in (name, title, title.upper(), f"k_{name}" if "euler" in name else name):
        assert parse_sampler(spelling) == {"scheduler": name}
        for schedule in ("karras", "exponential"):
            both = {"scheduler": name, "sigma_schedule": schedule}
            assert parse_sampler(f"{spelling} {schedule.title()}") == both


def test_spellings_of_other_programs() -> None:
    spellings = {
        "EulerAncestralDiscreteScheduler": "euler_ancestral",
        "euler_a": "euler_ancestral",
        "dpm++2m": "dpmpp_2m",
        "PNDM": "pndm",
        "plms": "pndm",
        "UniPCMultistepScheduler": "unipc",
    }
    for spelling, name in spellings.items():
        assert parse_sampler(spelling) == {"scheduler": name}
    for unknown in ("", "Euler b", "DPM++ SDE", "x" * 1000, "karras"):
        assert parse_sampler(unknown) is None


BROKEN = [
    ("Steps", "many"),
    ("Steps", "-1"),
    ("Steps", "9" * 5000),
    ("Steps", "1e3"),
    ("Steps", "٢"),
    ("Seed", str(MAX_SEED + 1)),
    ("Seed", ""),
    ("CFG scale", "nan"),
    ("CFG scale", "1e999"),
    ("CFG scale", "seven"),
    ("Eta", "-inf"),
    ("Clip skip", "0"),
    ("Size", "512"),
    ("Size", "512x"),
    ("Size", "-8x8"),
    ("Size", "9999999x8"),
]


@pytest.mark.parametrize(("key", "value"), BROKEN)
def test_broken_numbers_are_named(key: str, value: str) -> None:
    text = f"a\n{key}: {value}, Model: b, Version: sdvino 1"
    with pytest.raises(RequestError, match=key) as caught:
        parse_parameters(text)
    assert len(str(caught.value)) < 200


def test_too_much_text_is_refused_and_much_is_quick() -> None:
    with pytest.raises(RequestError, match="characters"):
        parse_parameters("a" * (MAX_TEXT + 1))
    for hostile in ("a:" * 500_000, "a " * 500_000, 'a: "' * 250_000, "\n" * MAX_TEXT):
        assert parse_parameters(hostile).num_inference_steps is None


@pytest.mark.parametrize(
    "model", ["/home/ann/models/dream", "C:\\Users\\Ann\\dream", "ann/dream", "dream/", "../dream"]
)
def test_no_path_gets_into_the_text(model: str) -> None:
    assert PictureSettings(prompt="", model=model).model == "dream"


@pytest.mark.parametrize(
    "speed",
    [
        FAST,
        SpeedSettings(guidance_interval=(0.15, 0.1 + 0.2), guidance_mode="streams"),
        SpeedSettings(guidance_interval=(1e-5, 1.0), token_downsampling=4),
        SpeedSettings(cache_interval=5, cache_branch=2, tiny_vae=True),
    ],
)
def test_what_made_a_picture_sooner(speed: SpeedSettings) -> None:
    speed = replace(speed, tiny_vae=bool(speed.tiny_vae))
    made = PictureSettings(prompt="a red circle", seed=1, speed=speed)
    assert "Exact" not in made.to_text()
    assert parse_parameters(made.to_text()) == made


@pytest.mark.parametrize("value", ["Token downsampling: 3", "Tiny VAE: maybe", "Cache interval: x"])
def test_other_programs_values_under_these_keys(value: str) -> None:
    read = parse_parameters(f"a red circle\nSteps: 20, {value}, Seed: 1")
    assert read.speed == SpeedSettings()
    assert ": ".join(read.other[0]) == value
