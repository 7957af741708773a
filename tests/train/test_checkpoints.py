"""Real checkpoints of the real trainer: it goes on from the last whole one as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.titan.checkpoints import look
from launcher.titan.weights import SHAPES
from tests.train.test_real_trainer import Started, losses, make_run, python, started
from tests.unit.test_titan_command import changed, debug_node

__all__ = ["python", "started"]  # fixtures


def node(**recipe: Any) -> dict[str, Any]:
    made = debug_node(gpus_per_node=2)
    asked = {"steps": 12, "log_freq": 1, "checkpoint_interval": 4, "seed": 7, "tensorboard": False, **recipe}
    return changed(made, recipe=made["recipe"] | {"checkpoint_keep": 2} | asked)


@dataclass(frozen=True)
class Cut:
    """A run that was killed once its checkpoint of step 8 was whole, and what an uninterrupted one lost."""

    run: Path
    uninterrupted: dict[int, float]


def train(python: str, node_json: Path, started: Started) -> str:
    started.processes.clear()
    started.start(python, node_json, TITAN_JOB_ID=f"k{os.getpid()}", TITAN_HEAD_PORT="0")
    return started.finish()[0]


def descendants(pid: int) -> list[int]:
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for child in below for one in descendants(child))]


@pytest.fixture(scope="module")
def cuts() -> dict[str, Cut]:
    return {}


@pytest.fixture
def cut(
    python: str, cuts: dict[str, Cut], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, started: Started
) -> Iterator[Cut]:
    """A copy of it: both eras make theirs once."""
    if python not in cuts:
        folder = tmp_path_factory.mktemp("checkpoints")
        output = train(python, make_run(folder / "whole", node()), started)
        whole = folder / "whole" / "titan" / "checkpoint"
        assert look(whole) == ([4, 8, 12], []), "the last is whole, too, and then none is deleted"
        size = sum(file.stat().st_size for file in (whole / "step-8").iterdir())
        assert 1 < size / SHAPES["debugmodel"].checkpoint_bytes < 1.1
        started.processes.clear()
        started.start(python, make_run(folder / "cut", node()), TITAN_JOB_ID=f"k{os.getpid()}", TITAN_HEAD_PORT="0")
        ends = time.monotonic() + 300
        while not (folder / "cut" / "titan" / "checkpoint" / "step-8" / ".metadata").exists():
            assert started.processes[0].poll() is None and time.monotonic() < ends
            time.sleep(0.02)
        for pid in descendants(started.processes[0].pid):
            os.kill(pid, signal.SIGKILL)
        started.processes[0].communicate()
        cuts[python] = Cut(folder / "cut", losses(output))
    made = cuts[python]
    yield Cut(made.run, made.uninterrupted)


def test_experiment(cut: Cut, python: str, started: Started) -> None:
    before = look(cut.run / "titan" / "checkpoint")
    print(before)
    output = train(python, cut.run / "job" / "node.json", started)
    print(losses(output), cut.uninterrupted)
    print([line for line in output.splitlines() if "titan-" in line or "heckpoint" in line])
