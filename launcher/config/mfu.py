"""MFU, and the peak that it was divided by: torchtitan prints the one, and its releases changed the other."""

from __future__ import annotations

import math
from functools import cache

from launcher.config.hardware import hardware

# bf16 peaks in TFLOP/s by which torchtitan 0.2 and 0.3 divide for GPUs that no profile describes.
OTHER_PEAKS = (148.0, 154.85, 191.5, 362.0, 756.0, 835.0, 1300.0)


@cache
def known_peaks() -> frozenset[float]:
    return frozenset(OTHER_PEAKS).union(*(one.peaks for one in hardware().values()))


def peak_of(tflops: float | None, mfu_pct: float | None) -> float | None:
    """The peak in TFLOP/s that an MFU was divided by, or None where the two figures are too coarse to tell.

    Both are printed with two decimals. If exactly one known peak fits within that rounding, that is it.
    """
    if not tflops or not mfu_pct or not math.isfinite(tflops) or not math.isfinite(mfu_pct):
        return None
    derived = 100 * tflops / mfu_pct
    error = derived * (0.005 / abs(mfu_pct) + 0.005 / abs(tflops))
    if derived <= 0 or error > 0.05 * derived:
        return None
    fitting = [peak for peak in known_peaks() if abs(peak - derived) <= error]
    return fitting[0] if len(fitting) == 1 else derived


def mfu_text(mfu_pct: float | None, peak_tflops: float | None, unit: str = " TFLOP/s") -> str:
    """MFU for people: `45.25% of 2250 TFLOP/s`, `12.00% of about 417 TFLOP/s`, `n/a`."""
    if mfu_pct is None:
        return "n/a"
    return f"{mfu_pct:.2f}% of {peak_text(peak_tflops, unit)}"


def peak_text(peak_tflops: float | None, unit: str = "") -> str:
    """A peak in TFLOP/s: `2250`, `about 417`, `an unknown peak`."""
    if peak_tflops is None:
        return "an unknown peak"
    return (f"{peak_tflops:g}" if peak_tflops in known_peaks() else f"about {peak_tflops:.0f}") + unit
