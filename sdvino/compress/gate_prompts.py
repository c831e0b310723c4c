"""Prompts that pictures are compared on: none of them is among those that calibration sees."""

from __future__ import annotations

from collections.abc import Sequence

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


def held_back(available: Sequence[str], seen: Sequence[str]) -> tuple[str, ...]:
    """Return up to 16 prompts that are not in ``seen``: ``available`` ones, then general ones.

    Evenly from the list, which may be sorted.
    """
    known = {text.strip() for text in seen}
    rest = [text for text in dict.fromkeys(available) if text.strip() not in known]
    count = min(_MOST, len(rest))
    chosen = [rest[i * len(rest) // count] for i in range(count)]
    if len(chosen) >= 4:  # a model with a language of its own is asked in that alone
        return tuple(chosen)
    general = [text for text in GATE_PROMPTS if text not in known]
    return tuple(dict.fromkeys([*chosen, *general]))[:_MOST]
