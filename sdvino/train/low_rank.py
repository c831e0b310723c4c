"""The pass `low_rank`: linear layers and convolutions as two thin ones, where two are cheaper.

The rank-r layer whose output is nearest to the whole layer's, over the inputs that the pipeline
feeds it, is the projection of the output on its r strongest directions: W becomes U (U^T W), with
U the first left singular vectors of W L, where L L^T is the second moment of the inputs
(whitening; SVD-LLM, arXiv:2403.07378). U are also the eigenvectors of the outputs' second moment,
W L L^T W^T, which is small where a convolution's unfolded inputs are not, and needs no L: layers
with more inputs than outputs go that way, the others take a root of the inputs' second moment.
Where the layer has a bias, moments are central and what the projection loses of the mean goes into
the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.passes import (
    Context,
    Outcome,
    Pass,
    Share,
    SourcePass,
    check_share,
    chosen,
    compile_patterns,
)
from sdvino.errors import RequestError
from sdvino.train.calls import Inputs, call

if TYPE_CHECKING:
    from sdvino.nets.structure import Structure

Array = NDArray[np.float64]

# Rows of activations taken from one call of a layer: an autoencoder has 262,144.
_MOST_ROWS = 8192
# Added to the second moment's diagonal, of its mean: inputs that are always zero.
_RIDGE = 1e-6
# Halvings of the interval in which a budget's threshold lies.
_HALVINGS = 200
_MOST_RANK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(SourcePass):
    """Make layers of low rank. Give one of energy, budget and rank."""

    kind: ClassVar[str] = "low_rank"

    #: Share of each layer's output energy that stays (of its weights', without whiten).
    energy: float | None = None
    #: Share of the component's weights that is left, ranks shared out over its layers.
    budget: float | None = None
    #: The same rank for every layer.
    rank: int | None = None
    #: Keep the output on the pipeline's own inputs, rather than the weights.
    whiten: bool = True
    #: Regular expressions, searched in the names of layers: what matches is left alone.
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        SourcePass.__post_init__(self)
        if sum(value is not None for value in (self.energy, self.budget, self.rank)) != 1:
            raise RequestError("low_rank takes one of energy, budget and rank; give one of them.")
        if self.energy is not None:
            check_share("energy", self.energy, open_end=False)
        if self.budget is not None:
            check_share("budget", self.budget, open_end=False)
        if self.rank is not None and not 1 <= self.rank <= _MOST_RANK:
            raise RequestError(f"rank is {self.rank}; give a whole number of at least 1.")
        compile_patterns("keep", self.keep)

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        for name in ("energy", "budget"):
            if getattr(self, name) is not None:
                return f"{self.kind} {name} {getattr(self, name):.1%}"
        return f"{self.kind} rank {self.rank}"

    @property
    def needs_inputs(self) -> bool:
        """Tell whether it measures activations on the pipeline's own inputs."""
        return self.whiten

    def refusal(self, earlier: Pass) -> str | None:
        """Refuse what would undo an earlier pass."""
        if isinstance(earlier, SourcePass) and earlier.component == self.component:
            if earlier.kind == self.kind:
                return f"the layers of {self.component} are of low rank already; write one low_rank"
            if getattr(earlier, "method", "") == "magnitude":
                return (
                    "the factors of low_rank have no zeros where magnitude pruning put them; move"
                    " prune behind low_rank"
                )
        return SourcePass.refusal(self, earlier)

    def run(self, module: Any, structure: Structure, around: Context, progress: Share) -> Outcome:
        """Make the layers of ``module`` thin, in place; see `SourcePass.run`."""
        return make_low_rank(module, structure, self, around.inputs, progress)


@dataclass(slots=True)
class Spectrum:
    """How much of a layer's output each direction of it carries."""

    #: Squared singular values, falling: float64 [n].
    energies: Array
    #: The directions, float32 [outputs, n], orthonormal columns.
    basis: Any
    #: Weights of the layer, and of its two factors for each unit of rank.
    dense: int
    per_rank: int

    @property
    def most_useful(self) -> int:
        """Return the largest rank with which two factors are cheaper than one; 0: none."""
        return min(len(self.energies), (self.dense - 1) // self.per_rank)


def make_low_rank(
    module: Any,
    structure: Structure,
    settings: LowRank,
    inputs: Sequence[Inputs] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> Outcome:
    """Put two layers in the place of one wherever ``settings`` makes that cheaper, in place.

    ``inputs``: calls of ``module``, needed to whiten. Raises RequestError for a budget that nothing
    can meet, and expressions that match no layer.
    """
    from sdvino.train.lean_modules import can_be_low_rank, put

    layers = {name: layer for name, layer in module.named_modules() if can_be_low_rank(layer)}
    layers = {name: layers[name] for name in chosen(list(layers), settings.keep)}
    layers = {name: layer for name, layer in layers.items() if not _is_factor(name)}
    moments = _moments(module, layers, inputs, progress) if settings.whiten else {}
    spectra: dict[str, Spectrum] = {}
    means: dict[str, Any] = {}
    for done, (name, layer) in enumerate(layers.items(), 1):
        moment = moments.pop(name, None)
        if moment is not None:
            means[name] = moment.mean_response(layer)
        spectra[name] = spectrum_of(layer, moment)
        progress(0.5 + 0.4 * done / len(layers))
    total = sum(parameter.numel() for parameter in module.parameters())
    ranks = choose_ranks(spectra, settings, total)
    for name, rank in ranks.items():
        put(module, name, factors(layers[name], spectra.pop(name).basis[:, :rank], means.get(name)))
    progress(1.0)
    full = {name: min(layers[name].weight.flatten(1).shape) for name in ranks}
    figures = {
        "layers": len(ranks),
        "of": len(layers),
        "whitened": settings.whiten,
        "ranks_by_layer": {name: [rank, full[name]] for name, rank in ranks.items()},
    }
    return Outcome(module, replace(structure, ranks={**structure.ranks, **ranks}), figures)


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in ("down", "up")


# --- choosing ranks


def choose_ranks(spectra: Mapping[str, Spectrum], settings: LowRank, total: int) -> dict[str, int]:
    """Return layer -> rank for the layers that get cheaper; ``total``: weights of the component."""
    if settings.budget is not None:
        return _within_budget(spectra, settings.budget * total, total)
    ranks = {}
    for name, spectrum in spectra.items():
        if settings.rank is not None:
            rank = settings.rank
        else:
            assert settings.energy is not None
            rank = rank_for_energy(spectrum.energies, settings.energy)
        if rank <= spectrum.most_useful:
            ranks[name] = rank
    return ranks


def rank_for_energy(energies: Array, share: float) -> int:
    """Return the least rank that keeps ``share`` of the energy; all of it is the full rank."""
    if share >= 1.0:
        return len(energies)
    sums = np.cumsum(energies)
    return int(np.searchsorted(sums, share * sums[-1])) + 1


def _within_budget(spectra: Mapping[str, Spectrum], budget: float, total: int) -> dict[str, int]:
    """Share ``budget`` weights out: each direction is worth its part of its layer's energy.

    Directions below a worth for each weight are left out, everywhere the same; the lowest such
    worth that meets the budget is found by halving.
    """
    rest = total - sum(spectrum.dense for spectrum in spectra.values())
    worth = {
        name: spectrum.energies / max(float(spectrum.energies.sum()), 1e-30) / spectrum.per_rank
        for name, spectrum in spectra.items()
    }

    def ranks_at(threshold: float) -> dict[str, int]:
        return {name: max(1, int((values > threshold).sum())) for name, values in worth.items()}

    def size(ranks: Mapping[str, int]) -> int:
        return rest + sum(
            min(spectra[name].dense, rank * spectra[name].per_rank) for name, rank in ranks.items()
        )

    low, high = 0.0, max((float(values.max()) for values in worth.values()), default=0.0)
    if size(ranks_at(high)) > budget:
        raise RequestError(
            f"budget is {budget / total:.1%} of the weights, and rank 1 everywhere still leaves"
            f" {size(ranks_at(high)) / total:.1%}; give more, or keep less."
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if size(ranks_at(middle)) <= budget:
            high = middle
        else:
            low = middle
    found = ranks_at(high)
    return {name: rank for name, rank in found.items() if rank <= spectra[name].most_useful}


# --- linear algebra


def spectrum_of(layer: Any, moment: Moment | None) -> Spectrum:
    """Return the directions of ``layer``'s output; ``moment`` None: of its weights alone."""
    import torch

    weight = layer.weight.detach().flatten(1)
    outputs, inputs = weight.shape
    if moment is not None and moment.of_outputs:
        gram = moment.central()
    elif outputs <= inputs:
        gram = weight.double() @ weight.double().T
    else:
        mixed = weight.double()
        if moment is not None:
            mixed = mixed @ _root(moment.central())
        values, vectors = torch.linalg.eigh(mixed.T @ mixed)
        basis, _ = torch.linalg.qr(mixed @ vectors.flip(1))
        return _spectrum(values.flip(0), basis, weight)
    values, vectors = torch.linalg.eigh(gram)
    return _spectrum(values.flip(0), vectors.flip(1), weight)


def _root(second: Any) -> Any:
    """Return L with L L^T = ``second``, which rounding may have left with negative eigenvalues.

    Any such L serves: another one, as Cholesky's, is this one turned. A ridge keeps what the
    inputs never did in the result.
    """
    import torch

    values, vectors = torch.linalg.eigh(second)
    ridge = _RIDGE * float(values.mean().clamp_min(1e-30))
    return vectors * values.clamp_min(0.0).add(ridge).sqrt()


def _spectrum(values: Any, basis: Any, weight: Any) -> Spectrum:
    outputs, inputs = weight.shape
    return Spectrum(
        energies=values.clamp_min(0.0).numpy(),
        basis=basis.float(),
        dense=outputs * inputs,
        per_rank=outputs + inputs,
    )


def factors(layer: Any, basis: Any, mean: Any | None = None) -> Any:
    """Return the two layers that project ``layer``'s output on ``basis`` [outputs, rank].

    ``mean``: what its weights make of the mean input, [outputs]; what the projection loses of it is
    added to the bias.
    """
    import torch

    from sdvino.train.lean_modules import low_rank_like

    pair = low_rank_like(layer, basis.shape[1])
    with torch.no_grad():
        weight = layer.weight.detach()
        pair.down.weight.copy_((basis.T @ weight.flatten(1)).reshape(pair.down.weight.shape))
        pair.up.weight.copy_(basis.reshape(pair.up.weight.shape))
        if layer.bias is not None:
            lost = 0.0 if mean is None else mean - basis @ (basis.T @ mean)
            pair.up.bias.copy_(layer.bias + lost)
    return pair.eval().requires_grad_(False)


@dataclass(slots=True)
class Moment:
    """Sums over what a layer was fed, or gave: for its mean and second moment."""

    #: Outputs, where there are at least as many inputs; else inputs.
    of_outputs: bool
    #: The layer has a bias to put a lost mean into: the second moment is the central one.
    centred: bool
    #: float32 [n, n] and [n].
    products: Any
    sums: Any
    rows: int = 0

    def add(self, rows: Any) -> None:
        """Take in activations, float32 [rows, n]."""
        self.products.addmm_(rows.T, rows)
        self.sums += rows.sum(0)
        self.rows += rows.shape[0]

    def central(self) -> Any:
        """Return the second moment, float64 [n, n], central where `centred` says so."""
        count = max(self.rows, 1)
        second = self.products.double() / count
        if self.centred:
            mean = self.sums.double() / count
            second -= mean[:, None] * mean
        return second

    def mean_response(self, layer: Any) -> Any | None:
        """Return what the weights make of the mean input, float32 [outputs]; None without bias."""
        if not self.centred:
            return None
        mean = self.sums / max(self.rows, 1)
        return mean - layer.bias if self.of_outputs else layer.weight.detach().flatten(1) @ mean


def _moments(
    module: Any,
    layers: Mapping[str, Any],
    inputs: Sequence[Inputs],
    progress: Callable[[float], None],
) -> dict[str, Moment]:
    if not inputs:
        raise RequestError("low_rank has no inputs to whiten by; write whiten = false.")
    moments = {name: _empty(layer) for name, layer in layers.items()}
    with _watching(layers, moments):
        for done, sample in enumerate(inputs, 1):
            call(module, sample)
            progress(0.5 * done / len(inputs))
    # A layer that fewer inputs reached than it is wide (what the timestep goes through) is judged
    # by its weights: it would seem to be of as low a rank as there were timesteps.
    return {name: one for name, one in moments.items() if one.rows >= len(one.sums)}


def _empty(layer: Any) -> Moment:
    import torch

    outputs, inputs = layer.weight.flatten(1).shape
    of_outputs = layer.weight.ndim == 4 or outputs <= inputs
    width = outputs if of_outputs else inputs
    return Moment(
        of_outputs=of_outputs,
        centred=layer.bias is not None,
        products=torch.zeros(width, width),
        sums=torch.zeros(width),
    )


@contextmanager
def _watching(layers: Mapping[str, Any], moments: Mapping[str, Moment]) -> Iterator[None]:
    def watch(moment: Moment) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            seen = output if moment.of_outputs else args[0]
            rows = seen.detach()
            rows = rows.permute(0, 2, 3, 1) if layer.weight.ndim == 4 else rows
            rows = rows.reshape(-1, rows.shape[-1])
            moment.add(rows[:: math.ceil(rows.shape[0] / _MOST_ROWS)])

        return hook

    handles = [layer.register_forward_hook(watch(moments[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
