"""What a converted folder suggests: steps, guidance and sampler for a good first picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdvino.convert.metadata import is_distilled, is_historic
from sdvino.convert.open_source import Source
from sdvino.diffusion.scheduler_config import sampler_from_config
from sdvino.errors import RequestError
from sdvino.folder.manifest import MANIFEST_FILE
from sdvino.inputs.files import read_json
from sdvino.settings import SAMPLERS, check_choice

# Spellings of `--suggest`, and of a source's own sdvino.json -> our field.
_FIELDS = {
    "steps": "num_inference_steps",
    "num_inference_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
}
#: In the sdvino.json of a source that knows only the timesteps of so many steps.
TRAINED_STEPS = "trained_steps"
_MOST_STEPS = 100
_DISTILLED_STEPS = 4
_DISTILLED_GUIDANCE = 1.0

Suggested = dict[str, Any]


def suggestions(source: Source, given: Mapping[str, Any]) -> Suggested:
    """Return num_inference_steps, guidance_scale and scheduler for ``source``.

    What is ``given`` goes first, then the ``suggested`` object of a sdvino.json beside the
    source's model_index.json, then the sampler its scheduler names, then the family's defaults.
    """
    family = source.family
    config = source.configs["scheduler"]
    found: Suggested = {
        "num_inference_steps": family.num_inference_steps,
        "guidance_scale": family.guidance_scale,
        "scheduler": family.scheduler,
    }
    if not is_historic(config):
        found["scheduler"] = sampler_from_config(config)[0]
    if is_distilled(config) and not family.distilled:  # a family that is knows its own numbers
        found["num_inference_steps"] = _DISTILLED_STEPS
        found["guidance_scale"] = _DISTILLED_GUIDANCE
    own = source.path / MANIFEST_FILE
    if own.is_file():
        told = read_json(own, MANIFEST_FILE).get("suggested", {})
        if not isinstance(told, dict):
            raise RequestError(f"{own} has a `suggested` that is no object; mend or remove it.")
        found |= check_suggestions({key: told[key] for key in told if key in _FIELDS})
    return found | check_suggestions(given)


def trained_steps(source: Source) -> int | None:
    """Return the steps that `sdvino distill` has trained ``source`` for; None: for any number."""
    own = source.path / MANIFEST_FILE
    steps = read_json(own, MANIFEST_FILE).get(TRAINED_STEPS) if own.is_file() else None
    return steps if isinstance(steps, int) and 1 <= steps <= _MOST_STEPS else None


def parse_suggestions(text: str) -> Suggested:
    """Return the suggestions in ``steps=20,guidance=4,scheduler=dpmpp_2m`` (any of the three).

    Raises RequestError for anything else.
    """
    words: dict[str, Any] = {}
    for pair in text.split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        field = _FIELDS.get(key)
        if field is None or not value:
            raise RequestError(
                f"{pair.strip()!r} is no suggestion; write steps=20,guidance=4,scheduler=dpmpp_2m."
            )
        try:
            words[field] = _NUMBERS[field](value) if field in _NUMBERS else value
        except ValueError as error:
            raise RequestError(f"{key} is {value!r}; give a number.") from error
    return check_suggestions(words)


_NUMBERS: Mapping[str, Any] = {"num_inference_steps": int, "guidance_scale": float}


def check_suggestions(given: Mapping[str, Any]) -> Suggested:
    """Return ``given`` under our field names; raises RequestError for a value that cannot be."""
    result: Suggested = {}
    for key, value in given.items():
        field = _FIELDS.get(key)
        if field is None:
            raise RequestError(
                f"Unknown suggestion {key!r}; choose from: steps, guidance, scheduler."
            )
        if field == "scheduler":
            check_choice(field, str(value), SAMPLERS)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(f"The suggested {key} is {value!r}; give a number.")
        elif not math.isfinite(value) or not 0 <= value <= 1000:
            raise RequestError(f"The suggested {key} is {value}; give a number from 0 to 1000.")
        if field == "num_inference_steps" and (not isinstance(value, int) or value < 1):
            raise RequestError(f"The suggested {key} is {value}; give a whole number from 1 up.")
        result[field] = value
    return result
