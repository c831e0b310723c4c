"""Weights in 8 bits, arithmetic in float: NNCF's weight compression."""

from __future__ import annotations

import openvino as ov

from sdvino.compress.quiet import quiet


def compress_weights(model: ov.Model) -> ov.Model:
    """Return ``model`` with the weights of its linears, convolutions and embeddings in 8 bits.

    One scale and zero point for each output channel, chosen from the weights alone: no data is
    needed and the same model always gives the same result. ``model`` is consumed.
    Source: NNCF, "Weight Compression", mode INT8_ASYM.
    """
    with quiet():
        import nncf

        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
