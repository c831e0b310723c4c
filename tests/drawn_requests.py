"""Requests drawn at random over every option there is, a new one included."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sdvino.inputs.fields import Choice, Interval, Kind, Number, Switch, Whole
from sdvino.request import OPTIONS, Request

LINES = st.sampled_from(
    ["Negative prompt: x", "Negative prompt:", "Steps: 1, Sampler: DDIM, Seed: 2", "Steps: 3", ""]
)
PROMPTS = st.one_of(
    st.text(max_size=80),
    st.text(st.sampled_from(list('aé:,"\\\n\r\t\0\x85\u2028\ud800 漢🦊')), max_size=30),
    st.lists(st.one_of(LINES, st.text(max_size=10)), max_size=5).map("\n".join),
)


def values_of(kind: Kind) -> st.SearchStrategy[Any]:
    """Draw what a field takes."""
    if isinstance(kind, Whole):
        return st.integers(kind.low, kind.high)
    if isinstance(kind, Number):
        whole = st.integers(int(kind.low), int(kind.high)).map(float)
        return st.one_of(st.floats(kind.low, kind.high), whole)
    if isinstance(kind, Choice):
        return st.sampled_from(kind.names)
    if isinstance(kind, Interval):
        fractions = st.floats(0.0, 1.0)
        return st.tuples(fractions, fractions).map(sorted).filter(lambda both: both[0] < both[1])
    assert isinstance(kind, Switch)
    return st.sampled_from([True, False, None])


OPTIONAL = {name: values_of(one.kind) for name, one in OPTIONS.items()}


@st.composite
def requests(draw: st.DrawFn, *, of_a_picture: bool = False) -> Request:
    """Draw a request; ``of_a_picture``: as a picture carries it, of one prompt and one picture."""
    given = draw(st.fixed_dictionaries({}, optional=OPTIONAL))
    if of_a_picture:
        given.pop("num_images_per_prompt", None)
        if ("width" in given) != ("height" in given):
            given |= {"width": 64, "height": 16_384}
    count = 1 if of_a_picture else draw(st.integers(1, 3))
    texts = st.lists(PROMPTS, min_size=count, max_size=count)
    negatives = st.lists(st.one_of(st.none(), PROMPTS), min_size=count, max_size=count)
    return Request.of(prompts=draw(texts), negative_prompts=draw(negatives), **given)
