"""The lines that torchtitan prints, for every test that needs a log."""

from __future__ import annotations

import time

T0 = 1795331400.0  # 2026-11-22 07:10:00 UTC
STEPS = (1, *range(10, 101, 10))


def step(number: int, tps: int = 17581, *, at: float | None = None, loss: float = 6.4277) -> str:
    """Of rank 0 on GB200; each step a second after the one before, unless `at` says when."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(T0 + number if at is None else at))
    return (
        f"[rank0]:[titan] {clock},000 - root - INFO - step: {number:2}  loss: {loss:8.5f}  grad_norm:  2.9062  "
        f"memory: 158.61GiB(86.20%)  tps: {tps:,}  tflops: 1,018.20  mfu: 45.25%\n"
    )
