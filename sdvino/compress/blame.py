"""Which component spoils a compressed folder, and how much better it must become."""

from __future__ import annotations

from sdvino.compress.compare import Comparison
from sdvino.compress.thresholds import Thresholds
from sdvino.compress.verdict import median, severities


def to_blame(comparison: Comparison, thresholds: Thresholds) -> str:
    """Return the component to mend: the one furthest over its limit, or that spoils pictures."""
    shares = severities(comparison, thresholds)
    worst = next(iter(shares), "unet")
    if shares and not shares[worst] <= 1.0:
        return worst
    decoded, whole = median(comparison.decoder_psnr), median(comparison.psnr)
    # Squared errors add up: within 3 dB of the whole, the decoder makes half of it or more.
    if decoded is not None and whole is not None and decoded <= whole + 3.0:
        return "vae_decoder"
    drawing = {n: s for n, s in shares.items() if n == "unet" or n.startswith("text_encoder")}
    return max(drawing, key=lambda name: drawing[name], default="unet")


def share_to_reach(comparison: Comparison, thresholds: Thresholds, component: str) -> float:
    """Return the share of the component's present error that would just pass."""
    goal = 1.0
    limit, error = thresholds.components.get(component), comparison.components.get(component)
    if limit is not None and error is not None and error > limit:
        goal = min(goal, limit / error)
    decibels = median(comparison.psnr)
    if thresholds.psnr is not None and decibels is not None and decibels < thresholds.psnr:
        goal = min(goal, 10 ** ((decibels - thresholds.psnr) / 20))
    return goal if goal < 1.0 else 0.7  # SSIM alone
