"""What is in memory when: chosen from sizes, so that the peak stays under a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sdvino.errors import RequestError
from sdvino.folder.index import ModelFolder
from sdvino.inputs.shown import gigabytes
from sdvino.runtime.memory import (
    PROCESS_BYTES,
    decoder_bytes,
    held_bytes,
    picture_bytes,
    unet_bytes,
)

#: Sides of the decoder's tiles, in latents, from the fewest tiles to the least memory.
TILES = (64, 32)
#: Into how many pieces the UNet may be cut, and how many for ``--low-memory``.
PIECES = (2, 3, 4, 6, 8, 12, 16)
LOW_MEMORY_PIECES = 8
#: A piece may be so much larger than its share: cuts lie where little crosses them.
_UNEVEN = 1.3
#: Activations while the UNet runs in pieces, to those of the whole: what one piece gives the others
#: is held for both predictions, where it was computed and between the pieces.
_PIECES_MAPS = 2.5
#: Text encoders smaller than this share of the peak stay: loading them again is not worth it.
_WORTH_RELEASING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSizes:
    """Bytes that the parts of a pipeline take, for one size of picture."""

    #: Without any model, the picture included.
    process: int
    #: While loaded: text encoders, UNet, decoder.
    text: int
    unet: int
    decoder: int
    #: Activations.
    unet_maps: int
    #: Activations of the decoder by the side of its tiles in latents, None being the whole picture;
    #: from the largest on.
    decoder_maps: Sequence[tuple[int | None, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What to release, and what to cut."""

    #: The text encoders, before the UNet is loaded.
    release_text: bool = False
    #: The UNet while a picture is decoded, and the decoder while one is denoised.
    release_models: bool = False
    #: Side of the decoder's tiles in latents; None: the whole picture at once.
    tile: int | None = None
    #: Segments of the UNet, of which one at a time is in memory; 1: the whole of it.
    pieces: int = 1
    #: Bytes at the peak, estimated.
    peak: int = 0
    #: The UNet is loaded while the text encoders read: they are no more than the peak together.
    load_ahead: bool = False


def measure_parts(folder: ModelFolder, height: int, width: int, *, tiny: bool = False) -> PartSizes:
    """Measure the files of ``folder`` and estimate activations for a picture of this size.

    With ``tiny`` pictures are decoded by the tiny decoder.
    """
    factor = folder.vae_scale_factor
    sides: list[int | None] = [None]
    if not tiny:
        sides += [side for side in TILES if side * factor < max(height, width)]
    return PartSizes(
        process=PROCESS_BYTES + picture_bytes(height, width),
        text=held_bytes(folder, *folder.kind.text_encoders),
        unet=held_bytes(folder, "unet"),
        decoder=held_bytes(folder, "tiny_vae" if tiny else "vae_decoder"),
        unet_maps=unet_bytes(folder, height, width),
        decoder_maps=[
            (side, decoder_bytes(folder, height, width, None if side is None else side * factor))
            for side in sides
        ],
    )


def plan_memory(
    sizes: PartSizes,
    limit: int | None,
    *,
    tiling: bool | None = None,
    low_memory: bool = False,
    once: bool = False,
    strict: bool = True,
) -> MemoryPlan:
    """Return the plan of least cost in time whose peak is at most ``limit`` bytes.

    In the order of what they cost: text encoders are released, UNet and decoder take turns, the
    decoder works in tiles, the UNet runs in pieces. ``tiling`` demands tiles, or forbids them;
    ``low_memory`` starts with all of it. With ``once`` a single picture is drawn and no other after
    it, so that releasing what is done with costs nothing. When nothing fits, RequestError is
    raised, or if not ``strict`` the leanest plan with a whole UNet is returned.
    """
    leanest: MemoryPlan | None = None
    for plan in _candidates(sizes, tiling, low_memory, once):
        plan = _completed(sizes, plan)
        if limit is None or plan.peak <= limit:
            return plan
        if not strict and not low_memory and plan.pieces > 1:
            break
        if leanest is None or plan.peak < leanest.peak:
            leanest = plan
    assert leanest is not None  # there is always a first candidate
    if strict:
        raise RequestError(
            f"This picture takes at least {gigabytes(leanest.peak)} of memory, however it is made,"
            f" and --max-memory is {gigabytes(0 if limit is None else limit)}; raise that, or ask"
            " for a smaller picture."
        )
    return leanest


def _candidates(
    sizes: PartSizes, tiling: bool | None, low_memory: bool, once: bool
) -> Iterator[MemoryPlan]:
    """Yield every plan, the cheapest first."""
    tiles = [side for side, _ in sizes.decoder_maps if side is not None and tiling is not False]
    whole: list[int | None] = [tiles[0] if tiling and tiles else None]
    last = tiles[-1] if tiles else None
    if low_memory:
        for pieces in (number for number in PIECES if number >= LOW_MEMORY_PIECES):
            yield MemoryPlan(release_text=True, release_models=True, tile=last, pieces=pieces)
        return
    everything = MemoryPlan(tile=whole[0])
    if not once:
        worth = sizes.text > _WORTH_RELEASING * _peak(sizes, everything)
        yield replace(everything, release_text=worth)
        yield replace(everything, release_text=True)
    for tile in [*whole, *(side for side in tiles if side not in whole)]:
        yield MemoryPlan(release_text=True, release_models=True, tile=tile)
    for pieces in PIECES:
        yield MemoryPlan(release_text=True, release_models=True, tile=last, pieces=pieces)


def _completed(sizes: PartSizes, plan: MemoryPlan) -> MemoryPlan:
    """Return ``plan`` with what follows from it."""
    peak = _peak(sizes, plan)
    kept = 0 if plan.release_models else sizes.decoder
    loading = sizes.process + sizes.text + sizes.unet + kept
    return replace(plan, peak=peak, load_ahead=plan.pieces == 1 and loading <= peak)


def _peak(sizes: PartSizes, plan: MemoryPlan) -> int:
    text = 0 if plan.release_text else sizes.text
    unet, unet_maps = sizes.unet, sizes.unet_maps
    if plan.pieces > 1:
        unet, unet_maps = int(unet * _UNEVEN / plan.pieces), int(unet_maps * _PIECES_MAPS)
    maps = dict(sizes.decoder_maps)[plan.tile]
    if plan.release_models:
        denoising, decoding = unet + unet_maps, sizes.decoder + maps
    else:
        both = unet + sizes.decoder
        denoising, decoding = both + unet_maps, both + maps
    return sizes.process + max(sizes.text, text + denoising, text + decoding)
