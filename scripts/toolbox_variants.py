"""What scripts/measure_toolbox.py compares, as data: recipes, finished sources, steps, goals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluate_demo import GUIDANCE_SCALE

from sdvino.errors import RequestError

STEPS = 20
#: The float model: half-precision weights, run in f32.
REFERENCE = "f32"
#: What the UNet's times are compared with.
INT8 = "int8"
#: Pairs at the same bytes: weights alone, and with activations in 8 bits.
GLOBAL, LOCAL = "global-weights", "local-weights"
GLOBAL_W8A8, LOCAL_W8A8 = "global-int8", "local-int8"
PAIRS: Mapping[str, str] = {LOCAL: GLOBAL, LOCAL_W8A8: GLOBAL_W8A8}
STACK = "stack"
FEW_STEPS = "f32-4-steps"
#: What the stack has to be faster than, and how many times.
DUELS: Mapping[str, float] = {REFERENCE: 8.0, FEW_STEPS: 1.5}
LEAN = Path(__file__).resolve().parent.parent / "docs" / "lean.toml"

#: The names that --student takes of itself, and what each is.
STUDENTS: Mapping[str, str] = {
    "pruned": "pruned as docs/lean.toml says, recovered by distillation",
    "steps": "distilled to 4 steps, guidance folded in",
    "stack": "pruned, and distilled to 4 steps",
}

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make the demo model smaller or faster, and how it is drawn with."""

    #: Of its folders and records; the same for two variants with another ``model``.
    name: str
    #: For people.
    title: str
    #: Of plots and tables: reference, quantization, pruning, low rank, steps, stack.
    group: str
    #: A built-in recipe, a TOML file, or the rows of one.
    recipe: str
    #: The source that is converted: None for the demo model's own, or a name of --student.
    student: str | None = None
    steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE
    #: Points of adherence that it may lose, at the far end of the interval; None: no goal.
    points: float | None = None
    #: Its pictures are on the contact sheet.
    shown: bool = False
    #: Another variant that it is compared with too, by pairs.
    versus: str | None = None
    #: Drawn for the curve alone: --curve-prompts of them.
    curve: bool = False

    @property
    def model(self) -> str:
        """The name of the converted folder: what has the same source and recipe shares one."""
        if self.recipe in ("fp16", "int8", "int8-weights") and self.student is None:
            return self.recipe  # as scripts/measure_compression.py calls them
        return self.name


def row(kind: str, **keys: str | float | bool) -> str:
    """Return a row of a recipe, as TOML has it."""
    words = {True: "true", False: "false"}
    values = ((key, words[v] if isinstance(v, bool) else repr(v)) for key, v in keys.items())
    return "\n".join(["[[passes]]", f"kind = {kind!r}", *(f"{k} = {v}" for k, v in values), ""])


def _magnitude(percent: int) -> Variant:
    return Variant(
        f"magnitude-{percent}",
        f"magnitude pruning, {percent} % zeros",
        "pruning",
        row("prune", method="magnitude", share=percent / 100, scope="global"),
    )


def _cut(method: str, percent: int, words: str) -> Variant:
    rows = row("prune", method=method, share=percent / 100)
    return Variant(f"{method}-{percent}", f"{words}, no training", "pruning", rows)


def _low_rank(percent: int) -> Variant:
    return Variant(
        f"low-rank-{percent}",
        f"low rank, {percent} % of the weights",
        "low rank",
        row("low_rank", budget=percent / 100),
        curve=True,
    )


#: Shares of the UNet's weights that the curve of low rank is measured at, in percent.
BUDGETS = (90, 80, 70, 60, 50, 40, 30)

VARIANTS: tuple[Variant, ...] = (
    Variant(REFERENCE, "f32, 20 steps, guidance 3", "reference", "fp16", shown=True),
    Variant(
        "f32-4-steps-guided",
        "f32, 4 steps, guidance 3",
        "reference",
        "fp16",
        steps=4,
        shown=True,
    ),
    Variant(
        FEW_STEPS,
        "f32, 4 steps, guidance 1",
        "reference",
        "fp16",
        steps=4,
        guidance_scale=1.0,
        shown=True,
    ),
    Variant(INT8, "int8", "quantization", "int8", shown=True),
    Variant("int8-weights", "int8-weights", "quantization", "int8-weights"),
    Variant(
        GLOBAL,
        "UNet's weights in 8 bits, one scheme",
        "quantization",
        row("quantize", scheme="global", component="unet", activations=False),
    ),
    # The budget is what the one before takes; see toolbox_models.
    Variant(
        LOCAL,
        "UNet's weights by layer, same bytes",
        "quantization",
        row("quantize", scheme="local", component="unet", budget=0.5),
        versus=GLOBAL,
    ),
    Variant(
        GLOBAL_W8A8,
        "UNet in 8 bits with activations, one scheme",
        "quantization",
        row("quantize", scheme="global", component="unet"),
    ),
    Variant(
        LOCAL_W8A8,
        "UNet by layer with activations, same bytes",
        "quantization",
        row("quantize", scheme="local", component="unet", budget=0.5, activations=True),
        versus=GLOBAL_W8A8,
    ),
    Variant("local-int4", "4-bit local", "quantization", "local", points=3.0, shown=True),
    _magnitude(30),
    _magnitude(50),
    _cut("heads", 34, "a head of each attention pruned"),
    _cut("channels", 50, "half the feed-forward channels pruned"),
    _cut("blocks", 30, "blocks pruned, 30 % of the operations"),
    Variant("lean", "pruned as docs/lean.toml says, no training", "pruning", str(LEAN), shown=True),
    Variant(
        "lean-recovered",
        "the same, recovered by distillation",
        "pruning",
        "fp16",
        student="pruned",
        points=3.0,
        versus="lean",
        shown=True,
    ),
    Variant(
        "lean-recovered-int8",
        "the same, recovered, int8",
        "pruning",
        "int8",
        student="pruned",
    ),
    *map(_low_rank, BUDGETS),
    Variant(
        "low-rank-70-int8",
        "low rank, 70 % of the weights, int8",
        "low rank",
        row("low_rank", budget=0.7) + row("quantize", scheme="int8"),
        curve=True,
    ),
    Variant(
        "steps",
        "distilled to 4 steps, guidance folded in",
        "steps",
        "fp16",
        student="steps",
        steps=4,
        guidance_scale=1.0,
        points=4.0,
        versus=FEW_STEPS,
        shown=True,
    ),
    Variant(
        "steps-int8",
        "distilled to 4 steps, int8",
        "steps",
        "int8",
        student="steps",
        steps=4,
        guidance_scale=1.0,
    ),
    Variant(
        STACK,
        "the stack: pruned, distilled to 4 steps, int8",
        "stack",
        "int8",
        student="stack",
        steps=4,
        guidance_scale=1.0,
        points=5.0,
        shown=True,
    ),
)


def with_students(names: Sequence[str]) -> tuple[Variant, ...]:
    """Return `VARIANTS`, and for each of ``names`` that none of them takes two more."""
    known = {variant.student for variant in VARIANTS}
    more = [
        Variant(
            f"{name}-{recipe}" if recipe != "fp16" else f"student-{name}",
            f"the source {name}, {recipe}",
            "students",
            recipe,
            student=name,
        )
        for name in names
        if name not in known
        for recipe in ("fp16", "int8")
    ]
    return (*VARIANTS, *more)


def parse_students(given: Sequence[str]) -> dict[str, Path]:
    """Return NAME=FOLDER, one or more times, as a table; raises RequestError for other words."""
    found: dict[str, Path] = {}
    for words in given:
        name, _, folder = words.partition("=")
        if not NAME.fullmatch(name) or not folder:
            raise RequestError(
                f"{words!r} is no student; write a short name and its folder, such as"
                " --student steps=build/students/steps."
            )
        if not (Path(folder) / "model_index.json").is_file():
            raise RequestError(
                f"{folder} is no source (it has no model_index.json); give the folder that"
                " sdvino distill wrote."
            )
        found[name] = Path(folder)
    return found
