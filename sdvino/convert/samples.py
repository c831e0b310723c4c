"""Calibration inputs on disk: a component's, in one .npz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sample = Mapping[str, NDArray[Any]]


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write ``samples``, arrays by tensor name, to the file ``path``."""
    arrays: dict[str, Any] = {
        f"{index}/{name}": array
        for index, sample in enumerate(samples)
        for name, array in sample.items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_samples(path: Path) -> list[dict[str, NDArray[Any]]]:
    """Return what `save_samples` wrote, in its order."""
    samples: dict[int, dict[str, NDArray[Any]]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            index, _, name = key.partition("/")
            samples.setdefault(int(index), {})[name] = arrays[key]
    return [samples[index] for index in sorted(samples)]
