"""Tensors on disk: safetensors written whole or not at all, and folders of them by key."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdvino.errors import SdvinoError

Tensors = dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write ``tensors``, of any type, to ``path``; it appears complete."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def load_tensors(path: Path) -> Tensors:
    """Return what `save_tensors` wrote; raises SdvinoError for a damaged file."""
    with reading(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open safetensors; raises SdvinoError for a damaged file, or one of other tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SdvinoError(
            f"{path} is damaged, or of something else ({error}); delete it and run again."
        ) from error


def stage_folder(work: Path, stage: str, *parts: Any) -> Path:
    """Return the folder of a stage made from ``parts`` (what JSON holds): another for others.

    What was done under other settings stays, and is found again under them.
    """
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return work / f"{stage}-{digest[:16]}"


def in_chunks(
    folder: Path,
    count: int,
    size: int,
    make: Callable[[range], Tensors],
    progress: Callable[[float], None],
) -> Tensors:
    """Return what ``make`` makes of range(count), made and kept in chunks of ``size``.

    Chunks that are there from an earlier run are not made again. Tensors are put together along
    their first axis.
    """
    import torch

    chunks: list[Tensors] = []
    for index, part in enumerate(_parts(count, size)):
        path = folder / f"{index:05}.safetensors"
        if not path.is_file():
            save_tensors(path, make(part))
        chunks.append(load_tensors(path))
        progress(part.stop / count)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _parts(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
