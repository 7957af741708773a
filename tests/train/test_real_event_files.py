"""Event files that torch's own SummaryWriter wrote, read without TensorBoard. See test_real_trainer.py."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

from launcher.results.tensorboard import scalars
from tests.train.test_real_trainer import answer, python

__all__ = ["python"]  # a fixture

WRITE = """
import json, sys
from torch.utils.tensorboard import SummaryWriter
folder, values = json.load(sys.stdin)
writer = SummaryWriter(folder, max_queue=1000)
for tag, step, value in values:
    writer.add_scalar(tag, value, step)
writer.close()
"""


def test_what_torch_wrote_is_read(python: str, tmp_path: Path) -> None:
    chance = random.Random(7)
    tags = ["mfu(%)", "time_metrics/data_loading(%)", "größe/模型", "x" * 127]
    odd = [0.0, -0.0, 1e-40, 3.4e38, math.inf, -math.inf, math.nan]
    values = [
        (tag, chance.choice([step, step * 10**9]), chance.choice([*odd, chance.uniform(-1e6, 1e6)]))
        for step in range(200)
        for tag in tags
    ]
    answer(python, WRITE, given=[str(tmp_path), values])
    expected: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    for tag, step, value in values:
        expected[tag][step] = struct.unpack("<f", struct.pack("<f", value))[0]
    assert repr(scalars(tmp_path, tags)) == repr(expected)  # repr: NaN differs from itself
