"""How a conversion tells whoever watches how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with what is being done and the share of the whole conversion done, 0 to 1.
Progress = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Show nothing."""
