"""The pass `prune`: weights set to zero, or heads, channels and blocks taken out.

Magnitude pruning sets the smallest weights to zero, L1: a share of each layer (local), or one
threshold over the layers, each scaled by its norm (global), as NNCF does. It saves neither time nor
memory on a CPU, whose kernels multiply zeros too; it says what a model could do without. What
makes a model smaller and faster is structured pruning: see `sdvino.train.structured_prune`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

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
from sdvino.settings import check_choice
from sdvino.train.magnitude import (
    Masks,
    Scope,
    histogram_masks,
    layers_with_weights,
    nncf_masks,
    nncf_needs,
)

if TYPE_CHECKING:
    from typing import Literal

    from sdvino.nets.structure import Structure

    Method = Literal["magnitude", "heads", "channels", "blocks"]

METHODS: tuple[Method, ...] = ("magnitude", "heads", "channels", "blocks")
#: What the report says beside the sparsity that magnitude pruning reached.
ZEROS_ARE_FREE_OF_NOTHING = (
    "Zeros among the weights save neither time nor memory on a CPU: its kernels store and multiply"
    " them like any number. To get a smaller, faster model prune heads, channels or blocks."
)
#: More than this for NNCF's masks, and our own threshold is taken.
_NNCF_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune(SourcePass):
    """Set the least of a component to zero, or take it out."""

    kind: ClassVar[str] = "prune"

    #: magnitude: weights to zero. heads: attention heads, channels: of feed-forward layers, blocks:
    #: residual and attention blocks; all three shrink what runs, and are the UNet's.
    method: Method = "magnitude"
    #: What goes: of the weights, heads, channels; of the operations for blocks.
    share: float
    #: local: so much of each layer; global: one threshold over all. Blocks are always global.
    scope: Scope = "local"
    #: Regular expressions, searched in the names of layers: what matches is left alone.
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        SourcePass.__post_init__(self)
        check_choice("method", self.method, METHODS)
        check_choice("scope", self.scope, get_args(Scope))
        check_share("share", self.share)
        compile_patterns("keep", self.keep)
        if self.method != "magnitude" and self.component != "unet":
            raise RequestError(
                f"prune takes {self.method} out of the unet alone; for {self.component} choose"
                " method = 'magnitude', or low_rank."
            )

    @property
    def what(self) -> str:
        """Return what it does, in a few words, for tables."""
        return f"{self.kind} {self.method} {self.share:.0%}"

    @property
    def needs_inputs(self) -> bool:
        """Tell whether it measures activations on the pipeline's own inputs."""
        return self.method != "magnitude"

    def refusal(self, earlier: Pass) -> str | None:
        """Refuse to cut layers that are two already."""
        cut = self.method in ("heads", "channels")
        if cut and earlier.kind == "low_rank" and _same(self, earlier):
            return (
                f"prune chooses {self.method} by whole layers, and low_rank has made two of each;"
                " move it before low_rank"
            )
        return SourcePass.refusal(self, earlier)

    def run(self, module: Any, structure: Structure, around: Context, progress: Share) -> Outcome:
        """Prune ``module`` in place; see `SourcePass.run`."""
        if self.method == "magnitude":
            figures = prune_magnitude(
                module, self.component, self.share, self.scope, self.keep, progress=progress
            )
            return Outcome(module, structure, figures)
        from sdvino.train import structured_prune as structured

        if self.method == "blocks":
            found = structured.prune_blocks(
                module, structure, self.share, around.inputs, keep=self.keep, progress=progress
            )
        else:
            found = structured.prune_widths(
                module,
                structure,
                self.method,
                self.share,
                around.inputs,
                scope=self.scope,
                keep=self.keep,
                progress=progress,
            )
        return found


def _same(one: SourcePass, other: Pass) -> bool:
    return isinstance(other, SourcePass) and other.component == one.component


def prune_magnitude(
    module: Any,
    component: str,
    share: float,
    scope: Scope = "local",
    keep: Sequence[str] = (),
    *,
    engine: Literal["auto", "nncf", "histogram"] = "auto",
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Set the share of ``module``'s weights that is smallest in L1 to zero, in place.

    Weights are those of linear layers, convolutions and embeddings whose names match nothing in
    ``keep``. engine: NNCF's own pruning, or a histogram that finds the same threshold in a few
    megabytes; auto takes NNCF while its masks fit into 2 GB. Returns the figures: engine, sparsity
    of all weights and by layer, and what that is worth. Raises RequestError for expressions that
    match nothing.
    """
    import torch

    layers = layers_with_weights(module)
    names = chosen([name.removesuffix(".weight") for name in layers], keep)
    layers = {f"{name}.weight": layers[f"{name}.weight"] for name in names}
    total = sum(weight.numel() for weight in layers.values())
    fits = nncf_needs(total) <= _NNCF_BYTES
    by_nncf = engine == "nncf" or (engine == "auto" and fits)
    masks: Masks
    if share == 0.0:
        masks = iter(())
    elif by_nncf:
        masks = nncf_masks(module, component, layers, share, scope)
    else:
        masks = histogram_masks(layers, share, scope)
    sparsity: dict[str, float] = {}
    zeros = 0
    with torch.no_grad():
        for done, (name, mask) in enumerate(masks, 1):
            layers[name].mul_(mask)
            gone = mask.numel() - int(mask.sum())
            zeros += gone
            sparsity[name] = round(gone / mask.numel(), 4)
            progress(done / len(layers))
    return {
        "engine": "nncf" if by_nncf else "histogram",
        "sparsity": round(zeros / max(total, 1), 4),
        "sparsity_by_layer": sparsity,
        "note": ZEROS_ARE_FREE_OF_NOTHING,
    }
