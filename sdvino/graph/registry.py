"""The graph rewrites by name, for those who choose and those who print: what is here, what is not.

A name stands for a function of this package that may be of another version of sdvino: whoever asks
for one that is not here gets None, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A rewrite of the UNet's graph that makes it faster."""

    name: str
    #: For people: one line.
    summary: str
    #: Where it lives: module and function, below `sdvino.graph`.
    home: str
    #: Whether the result is the same but for rounding.
    exact: bool = True

    def function(self) -> Callable[..., Any] | None:
        """Return the rewrite, or None where this sdvino has it not."""
        module, _, name = self.home.partition(":")
        try:
            found = getattr(import_module(f"sdvino.graph.{module}"), name, None)
        except ModuleNotFoundError:
            return None
        return found if callable(found) else None


REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        rewrite.name: rewrite
        for rewrite in (
            Rewrite(
                name="split-projections",
                summary="a projection that is cut in halves becomes two: no copy of the features",
                home="geglu:split_projections",
            ),
            Rewrite(
                name="fold-scales",
                summary="SmoothQuant's scales go into what comes before them",
                home="scales:fold_scales",
            ),
            Rewrite(
                name="text-keys",
                summary="keys and values of the text are computed once for a prompt",
                home="text_keys:take_text_keys",
            ),
            Rewrite(
                name="thin-keys",
                summary="large self-attentions read every other key and value",
                home="tokens:thin_keys",
                exact=False,
            ),
        )
    }
)


def available(name: str) -> bool:
    """Tell whether this sdvino has the rewrite ``name``."""
    rewrite = REWRITES.get(name)
    return rewrite is not None and rewrite.function() is not None
