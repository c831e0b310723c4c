from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdvino import __version__
from sdvino.errors import RequestError
from sdvino.image.parameters import MAX_TEXT, parse_parameters, parse_sampler, to_text
from sdvino.request import PictureRecord, Request
from sdvino.settings import FAST, MAX_SEED, SAMPLER_TITLES, SAMPLERS, SpeedSettings
from tests.drawn_requests import PROMPTS, requests


def made(model: str | None = None, recipe: str | None = None, **values: Any) -> PictureRecord:
    return PictureRecord(request=Request.of(**values), model=model, recipe=recipe)


FULL = made(
    prompts=["a red circle"],
    negative_prompts=["blurry, dark"],
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
    assert to_text(FULL) == (
        "a red circle\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 42,"
        " Size: 512x768, Model: dreamshaper, Clip skip: 2, RNG: CPU, Eta: 0.25,"
        " Timestep spacing: leading, Guidance rescale: 0.7, Recipe: int8,"
        f" Version: sdvino {__version__}"
    )
    assert parse_parameters(to_text(FULL)) == FULL


def test_what_is_not_said_stays_unsaid() -> None:
    bare = made(prompts=["a red circle"])
    # Whose random numbers is said always: other programs have another default.
    assert to_text(bare) == f"a red circle\nRNG: CPU, Version: sdvino {__version__}"
    assert parse_parameters(to_text(bare)) == bare


def test_no_negative_prompt_is_another_than_an_empty_one() -> None:
    empty = made(prompts=["a red circle"], negative_prompts=[""])
    assert "\nNegative prompt: \n" in to_text(empty)
    assert parse_parameters(to_text(empty)) == empty
    for prompt in ("a\nNegative prompt: b", "a\nNegative prompt: null"):
        for negative in (None, "", "null"):
            record = made(prompts=[prompt], negative_prompts=[negative])
            assert parse_parameters(to_text(record)) == record


def test_prompts_as_they_were_once_repeated() -> None:
    line = (
        'Exact prompt: "a\\nNegative prompt: b", Exact negative prompt: {}, Version: sdvino 0.1.0'
    )
    for repeated, negative in (('""', None), ('"dark"', "dark")):
        found = parse_parameters(f"a\nNegative prompt: b\n{line.format(repeated)}")
        assert found.prompt == "a\nNegative prompt: b"
        assert found.request.negative_prompts == (negative,)


NAMES = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=20))
OTHERS = st.sampled_from([(), (("Lora hashes", 'a: 1, b: "2"'), ("Denoising strength", "0.5"))])


@settings(max_examples=200, deadline=None)
@given(
    record=st.builds(
        PictureRecord,
        request=requests(of_a_picture=True),
        model=NAMES,
        recipe=NAMES,
        other=OTHERS,
    )
)
def test_every_option_survives(record: PictureRecord) -> None:
    text = to_text(record)
    assert parse_parameters(text) == record
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
    assert found == PictureRecord(
        request=Request.of(
            prompts=["masterpiece, <lora:add_detail:1> a lighthouse, (dusk:1.2)\nsecond line"],
            negative_prompts=["lowres, bad hands\nsignature"],
            num_inference_steps=28,
            scheduler="dpmpp_2m",
            sigma_schedule="karras",
            guidance_scale=6.5,
            seed=1234567890,
            noise="cuda",  # its default, which it does not write
            width=512,
            height=768,
            clip_skip=1,
        ),
        model="v1-5-pruned-emaonly",
        version="v1.7.0",
        other=(
            ("Model hash", "6ce0161689"),
            ("Denoising strength", "0.4"),
            ("Hires upscale", "2"),
            ("Lora hashes", "add_detail: 7c6bad76eb54, b: c"),
        ),
    )
    assert parse_parameters(to_text(found)) == found


def test_newer_a1111_names_the_schedule_apart() -> None:
    line = "a\nSteps: 4, Sampler: {}, Schedule type: {}, CFG scale: 1, RNG: CPU, Version: v1.10.1"
    asked = parse_parameters(line.format("Euler a", "Exponential")).request
    assert (asked.sampler.scheduler, asked.sampler.sigma_schedule) == (
        "euler_ancestral",
        "exponential",
    )
    assert asked.noise == "torch"
    automatic = parse_parameters(line.format("DPM++ 2M SDE", "Automatic"))
    sampler = automatic.request.sampler
    assert (sampler.scheduler, sampler.sigma_schedule) == ("dpmpp_2m_sde", None)
    assert ("Schedule type", "Automatic") in automatic.other


def test_a_sampler_that_is_not_here_is_kept_by_name() -> None:
    found = parse_parameters("a\nSteps: 4, Sampler: DPM++ 3M SDE, CFG scale: 1, Seed: 2")
    assert found.request.sampler.scheduler is None
    assert found.other == (("Sampler", "DPM++ 3M SDE"),)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_names_are_read_in_every_spelling(name: Any) -> None:
    title = SAMPLER_TITLES[name]
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
        with pytest.raises(RequestError, match=r"prompt has [0-9,]+ characters"):
            parse_parameters(hostile)


@pytest.mark.parametrize(
    "model", ["/home/ann/models/dream", "C:\\Users\\Ann\\dream", "ann/dream", "dream/", "../dream"]
)
def test_no_path_gets_into_the_text(model: str) -> None:
    assert made(prompts=[""], model=model).model == "dream"


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
    record = PictureRecord(request=Request(prompts=("a red circle",), seed=1, speed=speed))
    assert "Exact" not in to_text(record)
    assert parse_parameters(to_text(record)) == record


@pytest.mark.parametrize("value", ["Token downsampling: 3", "Tiny VAE: maybe", "Cache interval: x"])
def test_other_programs_values_under_these_keys(value: str) -> None:
    read = parse_parameters(f"a red circle\nSteps: 20, {value}, Seed: 1")
    assert read.request.speed == SpeedSettings()
    assert ": ".join(read.other[0]) == value
