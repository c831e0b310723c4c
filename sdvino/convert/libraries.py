"""Which libraries a conversion takes, beside those that run a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from sdvino.compress.recipes import Recipe
from sdvino.convert.export import Exporter
from sdvino.errors import RequestError

_COMPRESSING = ("nncf",)
_DRAWING = ("matplotlib",)
_TRAINING = ("torch", "diffusers", "transformers")
_TRACING = (*_TRAINING, "optimum")


def require_libraries(recipe: Recipe, exporter: Exporter, *, gated: bool) -> None:
    """Raise RequestError unless the libraries that this conversion takes are installed.

    They are looked for, not imported: the worker processes do that, and only what they need.
    """
    compresses = any(entry.mode != "fp16" for entry in recipe.components.values())
    convert = [*_COMPRESSING, *(_DRAWING if gated else ())] if compresses else []
    train = _TRACING if exporter != "sdvino" else _TRAINING if recipe.passes else ()
    wanted: Mapping[str, Sequence[str]] = {"train": train, "convert": convert}
    for extra, names in wanted.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise RequestError(
                f"This conversion needs libraries that are not here ({', '.join(missing)});"
                f' install them with: pip install "sdvino[{extra}]"'
                f"{', or choose --recipe fp16' if extra == 'convert' else ''}."
            )
