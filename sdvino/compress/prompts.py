"""Prompts that quantization is calibrated on, and those that pictures are compared on.

They spread over what people draw (people, animals, places, objects, food, abstractions) and how
(photographs, paintings, line art, renders), short and long, so that the ranges measured hold for
prompts that are not here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sdvino.errors import RequestError
from sdvino.inputs.files import read_prompts

_Item = TypeVar("_Item")
#: Texts in a prompt file and characters in a prompt beyond these are refused.
MAX_PROMPTS = 10_000
MAX_CHARACTERS = 2_000

#: Where a source keeps prompts of its own, beside model_index.json.
PROMPTS_FILE = "calibration_prompts.txt"

GENERAL_PROMPTS: tuple[str, ...] = (
    "a lighthouse on a cliff at dusk, long exposure photograph",
    "portrait of an old fisherman with a white beard, oil painting",
    "a bowl of ramen with a soft-boiled egg, studio lighting",
    "a red fox sleeping in fresh snow",
    "isometric drawing of a small bookshop, pastel colours",
    "a spaceship landing in a wheat field, matte painting",
    "black and white photograph of an empty train station",
    "a child flying a kite on a windy beach, watercolour",
    "macro photograph of a dragonfly on a reed",
    "a medieval castle above the clouds, epic fantasy art, highly detailed",
    "still life with lemons and a blue jug, impressionism",
    "a robot reading a newspaper on a park bench",
    "an aerial view of rice terraces at sunrise",
    "logo of a mountain inside a circle, flat vector design",
    "a city street in the rain at night, neon signs, reflections",
    "a bride and groom dancing, soft light, film grain",
    "pencil sketch of a pair of hands",
    "a tropical coral reef with clownfish, underwater photograph",
    "a wooden cabin by a frozen lake, northern lights",
    "an astronaut riding a horse, digital art",
    "a close-up of a cat's green eyes",
    "a plate of sushi, top view, minimal",
    "a stained glass window of a peacock",
    "a vintage red car in front of a diner, 1950s",
    "an elephant and its calf at a waterhole, golden hour",
    "abstract composition of triangles in orange and teal",
    "a knight in shining armour standing in the fog, cinematic",
    "a cosy living room with a fireplace and bookshelves, interior design",
    "a ballerina on stage, dramatic spotlight",
    "a bouquet of wild flowers in a glass vase",
    "a dragon curled around a tower, ink drawing",
    "snow-covered mountains above a pine forest, landscape photograph, sharp focus",
    "a chef tossing a pizza, motion blur",
    "a marble statue of a woman with a laurel wreath",
    "a hot air balloon over a lavender field",
    "an anime girl with silver hair under cherry blossoms",
    "a desert road under a starry sky, milky way",
    "a macaw with open wings, isolated on a white background",
    "a cyberpunk market crowded with people, volumetric light",
    "a cup of coffee beside an open notebook, morning light",
    "a wolf howling at the full moon, low poly",
    "a grand piano in an abandoned theatre overgrown with ivy",
    "three pumpkins on a porch, autumn",
    "a surfer inside a breaking wave",
    "a map of an imaginary island, old parchment",
    "an owl made of gears and brass, steampunk",
    "a woman in a yellow raincoat walking a dog, seen from behind",
    "a pagoda beside a pond with koi, ukiyo-e woodblock print",
)


def prompts_of(source: Path) -> tuple[str, ...]:
    """Return the prompts that the folder ``source`` brings, or the general ones."""
    own = source / PROMPTS_FILE
    return check_prompts(read_prompts(own)) if os.path.lexists(own) else GENERAL_PROMPTS


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return ``prompts`` as a tuple; raises RequestError when there are none, or absurd ones."""
    if isinstance(prompts, str) or not prompts:
        raise RequestError("There are no prompts; give at least one.")
    if len(prompts) > MAX_PROMPTS or any(len(prompt) > MAX_CHARACTERS for prompt in prompts):
        raise RequestError(
            f"There may be up to {MAX_PROMPTS:,} prompts of up to {MAX_CHARACTERS:,}"
            " characters; leave some out."
        )
    return tuple(prompts)


GATE_PROMPTS: tuple[str, ...] = (
    "a stone bridge over a mountain river in autumn, landscape photograph",
    "portrait of a young woman with freckles and red hair, natural light",
    "a slice of chocolate cake on a white plate, food photography",
    "two sparrows on a fence in the rain, watercolour",
    "a narrow street in an old Mediterranean town, oil painting",
    "a robot watering flowers on a balcony, illustration",
    "a brown horse galloping across a meadow",
    "a bowl of cherries on a checkered tablecloth, still life",
    "a futuristic train crossing a desert at sunset, concept art",
    "a bearded man in a blue sweater reading in a library",
    "a sailing boat on a calm lake, minimalist poster",
    "a tabby cat looking out of a window, soft focus",
    "a snowy village at night with lights in the windows",
    "an old typewriter on a wooden desk, close-up",
    "a field of sunflowers under storm clouds",
    "a child's drawing of a house with a smoking chimney",
)
#: As many as are ever compared.
_MOST = 16


def evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """Return up to ``most`` of ``items``, evenly from the whole list."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def held_back(available: Sequence[str], seen: Sequence[str]) -> tuple[str, ...]:
    """Return up to 16 prompts that are not in ``seen``: ``available`` ones, then general ones.

    Evenly from the list, which may be sorted.
    """
    known = {text.strip() for text in seen}
    rest = [text for text in dict.fromkeys(available) if text.strip() not in known]
    chosen = evenly(rest, _MOST)
    if len(chosen) >= 4:  # a model with a language of its own is asked in that alone
        return tuple(chosen)
    general = [text for text in GATE_PROMPTS if text not in known]
    return tuple(dict.fromkeys([*chosen, *general]))[:_MOST]
