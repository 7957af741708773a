"""Real checkpoints of the real trainer: it goes on from the last whole one as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.titan.checkpoints import ASIDE, RECORD, look
from launcher.titan.weights import SHAPES
from tests.train.test_init_from import record
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


def descendants(pid: int) -> list[int]:
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for child in below for one in descendants(child))]


@pytest.fixture(scope="module")
def cuts() -> dict[str, Cut]:
    return {}


@pytest.fixture
def cut(python: str, cuts: dict[str, Cut], tmp_path_factory: pytest.TempPathFactory, started: Started) -> Cut:
    """Every interpreter makes its own once."""
    if python in cuts:
        return cuts[python]
    folder = tmp_path_factory.mktemp("checkpoints")
    output = started.alone(python, make_run(folder / "whole", node()))
    saved = folder / "whole" / "titan" / "checkpoint"
    assert look(saved) == ([4, 8, 12], []), "the last is whole, too; with it, none is deleted"
    size = sum(file.stat().st_size for file in (saved / "step-8").iterdir())
    assert 1 < size / SHAPES["debugmodel"].checkpoint_bytes < 1.1
    started.processes.clear()
    run = make_run(folder / "cut", node()).parent.parent
    started.start(python, run / "job" / "node.json", TITAN_JOB_ID=f"k{os.getpid()}", TITAN_HEAD_PORT="0")
    ends = time.monotonic() + 300
    while not (run / "titan" / "checkpoint" / "step-8" / ".metadata").exists():
        assert started.processes[0].poll() is None and time.monotonic() < ends
        time.sleep(0.02)
    for pid in descendants(started.processes[0].pid):
        os.kill(pid, signal.SIGKILL)
    started.processes[0].communicate()
    for late in (run / "titan" / "checkpoint").glob("step-12"):
        shutil.rmtree(late)  # on a machine that was slow to kill it
    return cuts.setdefault(python, Cut(run, losses(output)))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(cut: Cut, python: str, started: Started) -> None:
    """The same model, optimizer, learning rate and data: the same digits of every loss."""
    saved = cut.run / "titan" / "checkpoint"
    assert look(saved) == ([4, 8], [])
    again = cut.run.with_name("again")  # a run's files name its directory, checkpoints do not
    node_json = make_run(again, node())
    shutil.copytree(saved, again / "titan" / "checkpoint")
    (again / "titan" / "checkpoint" / RECORD).unlink()
    output = started.alone(python, node_json)
    assert losses(output) == {step: loss for step, loss in cut.uninterrupted.items() if step > 8}
    assert record(again)["checkpoint_step"] == 8
    assert look(again / "titan" / "checkpoint") == ([4, 8, 12], [])


def corrupt(path: Path) -> None:
    path.write_bytes(bytes(reversed(path.read_bytes())))


HARMS: dict[str, Callable[[Path], object]] = {
    "cut file": lambda step: os.truncate(next(step.glob("*.distcp")), 12),
    "missing file": lambda step: next(step.glob("*.distcp")).unlink(),
    "corrupted metadata": lambda step: corrupt(step / ".metadata"),
    "cut metadata": lambda step: os.truncate(step / ".metadata", (step / ".metadata").stat().st_size - 9),
    "no metadata": lambda step: (step / ".metadata").unlink(),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_one_is_not_whole(cut: Cut, tmp_path: Path, harm: Callable[[Path], object]) -> None:
    shutil.copytree(cut.run / "titan" / "checkpoint", tmp_path / "checkpoint")
    harm(tmp_path / "checkpoint" / "step-8")
    whole, damaged = look(tmp_path / "checkpoint")
    assert whole == [4] and [one.step for one in damaged] == [8]


def test_training_goes_on_from_the_one_before_a_damaged_one(cut: Cut, python: str, started: Started) -> None:
    saved = cut.run / "titan" / "checkpoint"
    HARMS["cut file"](saved / "step-8")
    output = started.alone(python, cut.run / "job" / "node.json")
    assert losses(output) == {step: loss for step, loss in cut.uninterrupted.items() if step > 4}
    assert "is cut: 12 of " in output and "training goes on from step 4" in output
    assert (saved / ASIDE / "step-8").is_dir() and look(saved) == ([4, 8, 12], [])
