"""An edit of a graph, which says what it does: compiled models are known by it.

Two edits do the same when they are of one name, of the same arguments, of files of the same
content, and of the same code: that of the function and of all that its module imports of sdvino.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import openvino as ov

#: Arguments that say all that they are. A path is a file that the edit reads.
Plain: TypeAlias = (
    bool | int | float | str | Path | Sequence["Plain"] | Mapping[str, "Plain"] | None
)
_ROOT = Path(__file__).resolve().parent.parent.parent
_IMPORTED = re.compile(rb"^\s*(?:from|import)\s+(sdvino[\w.]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes a graph in place before it is compiled: ``change(model, **arguments)``.

    ``change`` is a function at the top of one of sdvino's modules. Raises TypeError for another,
    and for arguments that are not plain.
    """

    change: Callable[..., object]
    arguments: Mapping[str, Plain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.startswith("sdvino.") or "<" in self.name:
            raise TypeError(f"{self.name} is no function at the top of a module of sdvino.")
        _said(self.arguments, str)

    @classmethod
    def of(cls, change: Callable[..., object], /, **arguments: Plain) -> Edit:
        """Return the edit by ``change`` with ``arguments``."""
        return cls(change, arguments)

    def __call__(self, model: ov.Model) -> None:
        """Change ``model``, in place; raises what ``change`` raises."""
        self.change(model, **self.arguments)

    @property
    def name(self) -> str:
        """What does it, with its module."""
        return f"{self.change.__module__}.{self.change.__qualname__}"

    def key(self, digest: Callable[[Path], str]) -> str:
        """Return what tells this edit from every other, with ``digest`` of a file's content."""
        code = code_digest(self.change.__module__)
        return repr((self.name, code, _said(self.arguments, digest)))


def sources(module: str, root: Path = _ROOT) -> dict[str, bytes]:
    """Return the source of ``module``, and of what of sdvino it imports, directly or not, by name.

    ``root`` is the folder that sdvino is in.
    """
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            path = root.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            found[name] = file.read_bytes()
            waiting += [imported.decode() for imported in _IMPORTED.findall(found[name])]
    return found


@functools.cache
def code_digest(module: str, root: Path = _ROOT) -> str:
    """Return a digest of `sources`: an edit of the same name may do other things in other code."""
    digest = hashlib.sha256()
    for name, content in sorted(sources(module, root).items()):
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _said(value: Plain, digest: Callable[[Path], str]) -> object:
    """Return ``value`` so that its repr says all of it, a file by its ``digest``."""
    if isinstance(value, Path):
        return "file", digest(value)
    if isinstance(value, Mapping):
        return tuple((key, _said(value[key], digest)) for key in sorted(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_said(item, digest) for item in value)
    raise TypeError(f"{type(value).__name__} is not plain: an edit cannot be known by it.")
