"""Real checkpoints of the real trainer: it goes on from the last whole one as if nothing had happened."""

from __future__ import annotations

import os
import shutil
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
class Whole:
    """A run that was never interrupted: its checkpoints of the steps 4, 8 and 12, and its losses."""

    checkpoints: Path
    losses: dict[int, float]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Whole]:
    return {}


@pytest.fixture
def whole(python: str, wholes: dict[str, Whole], tmp_path_factory: pytest.TempPathFactory, started: Started) -> Whole:
    """Every interpreter makes its own once."""
    if python not in wholes:
        run = tmp_path_factory.mktemp("checkpoints") / "whole"
        output = started.alone(python, make_run(run, node()))
        saved = run / "titan" / "checkpoint"
        assert look(saved) == ([4, 8, 12], []), "the last is whole, too; with it, none is deleted"
        size = sum(file.stat().st_size for file in (saved / "step-8").iterdir())
        assert 1 < size / SHAPES["debugmodel"].checkpoint_bytes < 1.1
        wholes[python] = Whole(saved, losses(output))
    return wholes[python]


def cut_off(whole: Whole, folder: Path) -> Path:
    """What there is of the checkpoints if the run is killed after step 8 (tests/cluster/test_faults.py kills some)."""
    shutil.copytree(whole.checkpoints, folder)
    shutil.rmtree(folder / "step-12")
    return folder


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
def test_a_damaged_one_is_not_whole(whole: Whole, tmp_path: Path, harm: Callable[[Path], object]) -> None:
    saved = cut_off(whole, tmp_path / "checkpoint")
    assert look(saved) == ([4, 8], [])
    harm(saved / "step-8")
    found, damaged = look(saved)
    assert found == [4] and [one.step for one in damaged] == [8]


def test_training_goes_on_from_the_one_before_a_damaged_one_as_if_nothing_had_happened(
    whole: Whole, python: str, tmp_path: Path, started: Started
) -> None:
    """Model, optimizer, learning rate and data are the same, so every loss is, to its last digit."""
    node_json = make_run(tmp_path / "again", node())
    saved = cut_off(whole, tmp_path / "again" / "titan" / "checkpoint")
    (saved / RECORD).unlink()
    HARMS["cut file"](saved / "step-8")
    output = started.alone(python, node_json)
    assert losses(output) == {step: loss for step, loss in whole.losses.items() if step > 4}
    assert "is cut: 12 of " in output and "training goes on from step 4" in output
    assert record(tmp_path / "again")["checkpoint_step"] == 4
    assert (saved / ASIDE / "step-8").is_dir() and look(saved) == ([4, 8, 12], [])
