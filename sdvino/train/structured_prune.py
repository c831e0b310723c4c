"""Structured pruning: heads, feed-forward channels and blocks that are gone, so that less runs.

A head, or a channel of a feed-forward layer, matters as much as it adds to the output of the layer
that reads it: the norm of its weights times how large its activations are on the pipeline's own
inputs. A block matters as much as the UNet's output changes without it, measured (the cut of
BK-SDM, arXiv:2305.15798, which found the blocks that way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.passes import Outcome, chosen
from sdvino.compress.prompts import evenly
from sdvino.errors import RequestError
from sdvino.nets.structure import Structure
from sdvino.train.calls import Inputs, call, operations, outputs_of, relative_error
from sdvino.train.magnitude import Scope
from sdvino.train.modules import can_pass, gap_for

Progress = Callable[[float], None]
Widths = Literal["heads", "channels"]

# Channels are left in numbers that vector units like; narrow layers are tests' and the demo's.
_MULTIPLE, _NARROW = 16, 64
# Inputs that the damage of a block is measured on: each costs one evaluation a block.
_DAMAGE_SAMPLES = 4


def prune_widths(
    module: Any,
    structure: Structure,
    what: Widths,
    share: float,
    inputs: Sequence[Inputs],
    *,
    scope: Scope = "local",
    keep: Sequence[str] = (),
    progress: Progress = lambda share: None,
) -> Outcome:
    """Take the share of attention heads, or of feed-forward channels, that adds least, out.

    ``module``: diffusers' UNet2DConditionModel, changed in place; ``inputs``: its calls. local: so
    much of each layer; global: over all layers, each scaled by what its heads add together. At
    least one is left everywhere. Raises RequestError for layers that are two already (low_rank).
    """
    from sdvino.train import lean_modules as lean

    blocks = _blocks(module, "Attention" if what == "heads" else "FeedForward", keep)
    readers = {name: _reader(block) for name, block in blocks.items()}
    _check_whole(readers)
    energy = _energies(module, readers, inputs, progress)
    importance = {
        name: energy[name].reshape(_count(what, block), -1).sum(1) for name, block in blocks.items()
    }
    kept = choose_widths(importance, share, scope, multiple=_MULTIPLE if what != "heads" else 1)
    table = dict(structure.heads if what == "heads" else structure.channels)
    by_layer = {}
    for name, block in blocks.items():
        by_layer[name] = [len(kept[name]), len(importance[name])]
        if len(kept[name]) == len(importance[name]):
            continue
        (lean.keep_heads if what == "heads" else lean.keep_channels)(block, kept[name])
        table[name] = len(kept[name])
    if what == "heads":
        found = replace(structure, heads=table)
    else:
        found = replace(structure, channels=table)
    left = sum(one for one, _ in by_layer.values())
    whole = sum(all_ for _, all_ in by_layer.values())
    figures = {"removed": whole - left, "of": whole, f"{what}_by_layer": by_layer}
    return Outcome(module, found, figures)


def choose_widths(
    importance: Mapping[str, NDArray[np.float64]], share: float, scope: Scope, *, multiple: int = 1
) -> dict[str, list[int]]:
    """Return layer -> indices that stay, in order, where ``share`` of all go, the least first."""
    if scope == "local":
        goes = {name: round(share * len(values)) for name, values in importance.items()}
    else:
        scaled = [
            (value / max(float(values.sum()), 1e-30), name)
            for name, values in importance.items()
            for value in values
        ]
        least = sorted(scaled)[: round(share * len(scaled))]
        goes = {name: sum(one == name for _, one in least) for name in importance}
    kept = {}
    for name, values in importance.items():
        stays = max(1, len(values) - goes[name])
        if multiple > 1 and len(values) >= _NARROW:
            stays = min(len(values), math.ceil(stays / multiple) * multiple)
        order = np.argsort(-values, kind="stable")[:stays]
        kept[name] = sorted(int(index) for index in order)
    return kept


def prune_blocks(
    module: Any,
    structure: Structure,
    share: float,
    inputs: Sequence[Inputs],
    *,
    keep: Sequence[str] = (),
    progress: Progress = lambda share: None,
) -> Outcome:
    """Take out the blocks without which the output changes least, until ``share`` of operations go.

    Blocks are residual ones whose input can go on in their place, and those of transformers. Each
    is measured alone. Raises RequestError when all of them together are less than ``share``.
    """
    from sdvino.train import lean_modules as lean

    counts = operations("unet", dict(module.config), structure)
    candidates = _candidates(module, keep)
    saved = {name: _below(name, counts) for name in candidates}
    samples = evenly(inputs, _DAMAGE_SAMPLES)
    references = outputs_of(module, samples)
    damage: dict[str, float] = {}
    for name, block in candidates.items():
        lean.put(module, name, gap_for(block))
        damage[name] = relative_error(outputs_of(module, samples), references)
        lean.put(module, name, block)
        progress(len(damage) / len(candidates))
    total = sum(counts.values())
    gone = choose_blocks(damage, saved, share * total)
    for name in gone:
        lean.put(module, name, gap_for(candidates[name]))
        structure = structure.without(name)
    figures = {
        "removed": list(gone),
        "operations_removed": round(sum(saved[name] for name in gone) / total, 4),
        "damage_by_block": {name: round(value, 5) for name, value in damage.items()},
    }
    return Outcome(module, structure, figures)


def choose_blocks(
    damage: Mapping[str, float], saved: Mapping[str, int], wanted: float
) -> tuple[str, ...]:
    """Return the blocks to take out: least damage for an operation first, until ``wanted`` go.

    Damages add up as squares, so that a few small ones together are less than a large one. What
    turns out not to be needed is put back, the most damaging first. Raises RequestError when all
    are not enough.
    """
    reachable = sum(saved.values())
    if reachable < wanted:
        raise RequestError(
            f"All blocks that can be left out are {reachable:,} of the {wanted:,.0f} operations"
            " that the share asks for; choose a smaller share."
        )
    gone: list[str] = []
    for name in sorted(damage, key=lambda name: damage[name] ** 2 / max(saved[name], 1)):
        if sum(saved[one] for one in gone) >= wanted:
            break
        gone.append(name)
    for name in sorted(gone, key=lambda name: -damage[name]):
        if sum(saved[one] for one in gone) - saved[name] >= wanted:
            gone.remove(name)
    return tuple(name for name in damage if name in gone)


def _candidates(module: Any, keep: Sequence[str]) -> dict[str, Any]:
    found = {
        name: block
        for name, block in module.named_modules()
        if type(block).__name__ == "Transformer2DModel"
        or (type(block).__name__ == "ResnetBlock2D" and can_pass(block))
    }
    return {name: found[name] for name in chosen(list(found), keep)}


def _blocks(module: Any, kind: str, keep: Sequence[str]) -> dict[str, Any]:
    found = {name: block for name, block in module.named_modules() if type(block).__name__ == kind}
    return {name: found[name] for name in chosen(list(found), keep)}


def _reader(block: Any) -> Any:
    """Return the linear layer that reads the heads, or the channels, of ``block``."""
    return block.to_out[0] if hasattr(block, "to_out") else block.net[2]


def _check_whole(readers: Mapping[str, Any]) -> None:
    from torch import nn

    for name, reader in readers.items():
        if not isinstance(reader, nn.Linear):
            raise RequestError(f"{name} has been made low-rank; prune its width before that.")


def _count(what: Widths, block: Any) -> int:
    return int(block.heads if what == "heads" else block.net[2].in_features)


def _energies(
    module: Any, readers: Mapping[str, Any], inputs: Sequence[Inputs], progress: Progress
) -> dict[str, NDArray[np.float64]]:
    """Return, by layer, how much each input of its reader adds to the output, squared.

    Of input j: the mean of its square times the squared norm of its weights.
    """
    squares = {name: np.zeros(reader.in_features) for name, reader in readers.items()}
    with _watching(readers, squares):
        for done, sample in enumerate(inputs, 1):
            call(module, sample)
            progress(done / len(inputs))
    norms = {
        name: reader.weight.detach().double().square().sum(0).numpy()
        for name, reader in readers.items()
    }
    return {name: squares[name] * norms[name] for name in readers}


@contextmanager
def _watching(
    readers: Mapping[str, Any], squares: dict[str, NDArray[np.float64]]
) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            squares[name] += rows.square().mean(0).double().numpy()

        return hook

    handles = [reader.register_forward_pre_hook(watch(name)) for name, reader in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _below(name: str, counts: Mapping[str, int]) -> int:
    return sum(count for layer, count in counts.items() if layer.startswith(f"{name}."))
