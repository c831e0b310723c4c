"""What is different in a component from what its config describes, by the names of modules.

Pruning takes blocks, heads and channels out of a UNet; a low-rank pass puts two layers in the place
of one. `structure.json`, beside config.json and the weights, says so. That file was written by
somebody else: whoever builds the component checks its names and counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdvino.errors import RequestError
from sdvino.inputs.files import read_json

STRUCTURE_FILE = "structure.json"
_FORMAT = 1
#: A UNet of Stable Diffusion XL has about 2,500 modules.
_MOST_NAMES = 20_000
_MOST = 2**20


@dataclass(frozen=True, slots=True)
class Structure:
    """What is different from the config, by the names of modules. Empty: nothing."""

    #: Residual blocks (ResnetBlock2D) and attention blocks (Transformer2DModel) that are gone.
    removed: tuple[str, ...] = ()
    #: Attention -> heads left.
    heads: Mapping[str, int] = field(default_factory=dict)
    #: Feed-forward -> channels left between its two layers.
    channels: Mapping[str, int] = field(default_factory=dict)
    #: Linear layer or convolution -> rank of the two in its place.
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Structure | None:
        """Return the structure of the component in ``folder``, None without a file.

        Raises RequestError for a file that is none.
        """
        path = folder / STRUCTURE_FILE
        if not path.exists():
            return None
        value = read_json(path, STRUCTURE_FILE)
        if value.get("format_version") != _FORMAT:
            raise wrong(f"has the format {str(value.get('format_version'))[:20]}")
        removed = value.get("removed", [])
        if not isinstance(removed, list) or not all(isinstance(name, str) for name in removed):
            raise wrong("has no list of names under `removed`")
        if len(set(removed)) != len(removed) or len(removed) > _MOST_NAMES:
            raise wrong("removes something twice, or too much")
        tables = {key: _counts(key, value.get(key, {})) for key in ("heads", "channels", "ranks")}
        return cls(tuple(removed), **tables)

    def without(self, block: str) -> Structure:
        """Return the structure with ``block`` gone, and what was said of the parts of it."""

        def others(table: Mapping[str, int]) -> dict[str, int]:
            return {
                name: count for name, count in table.items() if not name.startswith(f"{block}.")
            }

        return Structure(
            (*self.removed, block), others(self.heads), others(self.channels), others(self.ranks)
        )

    def within(self, prefixes: tuple[str, ...]) -> Structure:
        """Return what is said of the parts whose names begin with one of ``prefixes``."""

        def own(table: Mapping[str, int]) -> dict[str, int]:
            return {name: count for name, count in table.items() if name.startswith(prefixes)}

        removed = tuple(name for name in self.removed if name.startswith(prefixes))
        return Structure(removed, own(self.heads), own(self.channels), own(self.ranks))

    def write(self, folder: Path) -> None:
        """Write what `read` reads."""
        value = {
            "format_version": _FORMAT,
            "removed": list(self.removed),
            "heads": dict(self.heads),
            "channels": dict(self.channels),
            "ranks": dict(self.ranks),
        }
        text = json.dumps(value, indent=1) + "\n"
        (folder / STRUCTURE_FILE).write_text(text, encoding="utf-8")


def within(name: str, count: int, most: int) -> int:
    """Return ``count``; raises RequestError unless it is 1 to ``most``."""
    if not 1 <= count <= most:
        raise wrong(f"leaves {count} of {name[:120]!r}, which has {most}")
    return count


def wrong(what: str) -> RequestError:
    """Return what is raised for a structure that says ``what``."""
    return RequestError(f"{STRUCTURE_FILE} {what}; make the component's folder again.")


def _counts(key: str, value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > _MOST_NAMES:
        raise wrong(f"has no table under `{key}`")
    for count in value.values():
        if type(count) is not int or not 1 <= count <= _MOST:
            raise wrong(f"has something else than a count under `{key}`")
    return value
