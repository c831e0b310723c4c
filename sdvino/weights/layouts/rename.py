"""Tensors under other names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdvino.weights.safetensors import Tensor, Tensors

_LISTED = 3


class LayoutError(Exception):
    """The names or shapes are not those of the architecture; says which."""


def under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


def rename(tensors: Tensors, name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return ``tensors`` under the names that ``name_of`` gives them.

    Raises LayoutError where it gives None, or a name twice.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name_of(name)
        if new is None or new in result:
            raise LayoutError(f"it has a {name[:80]}")
        result[new] = tensor
    return result


def numbered(names: set[int]) -> int:
    """Return how many there are of ``names``; raises LayoutError unless they count from 0."""
    if not names or names != set(range(len(names))):
        raise LayoutError("some of its layers are missing")
    return len(names)


def listed(names: Sequence[str]) -> str:
    """Return the first few of ``names`` and how many more there are."""
    more = len(names) - _LISTED
    first = ", ".join(name[:120] for name in names[:_LISTED])
    return f"{first} and {more} more" if more > 0 else first
