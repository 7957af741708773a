"""Run directories that somebody edited or copied half, and a Slurm that falls silent while a run is watched."""

from __future__ import annotations

import json
import math
import os
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.results.read import outcome_of
from launcher.runs import attach, control
from launcher.runs.directory import Run, all_runs
from launcher.scheduler.state import JobState
from tests.unit.node_place import FAILED, Place
from tests.unit.test_read import Made
from tests.unit.test_titan_command import debug_node
from tests.unit.titan_log import step

LOGGED = ("local_batch_size", "steps", "log_freq")
RUNNING = JobState("RUNNING")
ODD: list[Any] = [None, "x", "2", [], {}, True, 1.5, math.nan, -1, 10**4000]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A run that is known by its node.json alone, with a recipe that is needed whole."""
    made = Made(tmp_path / "r")
    made.remove("run.toml")
    made.change("job/node.json", recipe={"local_batch_size": 5, "steps": 100, "log_freq": 10})
    return made


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    "key", ["recipe", "job", "job.nodes", "profile.gpus_per_node", *(f"recipe.{key}" for key in LOGGED)]
)
def test_a_damaged_node_json_gives_no_row(made: Made, key: str, value: Any) -> None:
    table, _, inner = key.partition(".")
    node = json.loads((made.path / "job" / "node.json").read_text())
    made.change("job/node.json", **{table: {**node[table], inner: value} if inner else value or []})
    assert outcome_of(made.run, RUNNING) is None
    assert [progress.step for progress in attach.progress_of(made.run)][-1] == 100
    assert made.run.steps == (0 if key in ("recipe", "recipe.steps") else 100)


@pytest.mark.parametrize("value", ODD)
def test_a_damaged_gpu_name_and_a_whole_file_of_nonsense(made: Made, value: Any) -> None:
    made.change("job/node.json", profile={"gpu": value, "gpus_per_node": 4})
    row = outcome_of(made.run, RUNNING)
    assert row is not None and row.gpu == (value if isinstance(value, str) else "?")
    made.write("job/node.json", json.dumps(value))
    assert outcome_of(made.run, RUNNING) is None and list(attach.progress_of(made.run))


def test_one_bad_entry_hides_no_run(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "intent.json")  # nobody ever writes to it
    Made(tmp_path / "good")
    assert [run.name for run in all_runs(tmp_path)] == ["good"]


def test_a_run_of_no_steps(made: Made) -> None:
    made.change("job/node.json", recipe={"local_batch_size": 5, "steps": 0, "log_freq": 0})
    row = outcome_of(made.run, RUNNING)
    assert row is not None and row.steps == 0


def test_a_snapshot_is_json(made: Made) -> None:
    made.logs(step(10).replace(" 6.42770", "     nan").replace("17,581", "inf").replace("1,018.20", "inf"))
    (snapshot,) = attach.progress_of(made.run)
    assert math.isnan(snapshot.loss) and math.isinf(snapshot.tps)
    values = json.loads(json.dumps(attach.as_dict(snapshot), allow_nan=False))
    assert (values["loss"], values["tps"], values["tflops"], values["step"]) == (None, None, None, 10)
    assert values["records"] == {"a": 1, "b": 1}


def test_memory_does_not_grow_with_the_logs(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    noise = b"gpu001:4711:4750 [0] NCCL INFO Channel 03/0 : 0[0] -> 1[1] via P2P/CUMEM/read\n" * 10_000
    with (made.path / "logs" / "0000-a.log").open("ab") as handle:
        for _ in range(24):
            handle.write(noise)
    tracemalloc.start()
    try:
        assert made.outcome().complete
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


class Clock:
    """time.monotonic and time.sleep, without time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds
        assert len(self.naps) < 9000, "waits for ever"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def silent(*_: object) -> JobState:
    raise LauncherError("slurm-silent", "squeue did not answer within 20 s", status=ExitStatus.CLUSTER)


def wait(run: Run) -> None:
    list(attach.standings(run))


def read_logs(run: Run) -> None:
    list(attach.log_lines(run, until_end=True))


@pytest.mark.parametrize("use", [wait, read_logs])
def test_a_controller_that_stays_silent_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, use: Callable[[Run], None]
) -> None:
    monkeypatch.setattr(control, "state", silent)
    with pytest.raises(LauncherError, match="did not answer"):
        use(Run(tmp_path))
    assert 600 < clock.now - 1000 < 620


def test_a_controller_that_restarts_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def state(_: Run) -> JobState:
        if clock.now >= 3000:
            return RUNNING
        return JobState("PENDING") if clock.now % 500 < 10 else silent()

    monkeypatch.setattr(control, "state", state)
    monkeypatch.setattr(control, "state", lambda run: state(run) if clock.now < 3010 else JobState("COMPLETED"))
    seen = [standing.state for standing in attach.standings(Run(tmp_path))]
    changes = [new for old, new in pairwise([*seen[:1], *seen]) if new != old]
    assert seen[0] == JobState("PENDING") and changes[:2] == [None, JobState("PENDING")]
    assert changes[-2:] == [RUNNING, JobState("COMPLETED")] and set(clock.naps) == {attach.LOOK_EVERY_S}


@pytest.mark.parametrize("use", [wait, read_logs])
def test_without_slurm_there_is_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, use: Callable[[Run], None]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "intent.json").write_text('{"scheduler": "slurm", "job_name": "x", "at": 1}')
    (tmp_path / "job.json").write_text('{"job_id": "7"}')
    with pytest.raises(LauncherError, match="squeue is not installed here"):
        use(Run(tmp_path))
    assert clock.naps == []


# --- on the node ------------------------------------------------------------------------------------------


def test_what_nobody_foresaw_is_a_failed_check_with_its_traceback(tmp_path: Path) -> None:
    cpu = Place(tmp_path, debug_node())
    done = cpu.start_unchecked(FAKE_TORCH="2.13.0+cpu", SLURM_NODEID="9" * 5000)
    lines = done.stdout.splitlines()
    assert done.returncode == FAILED and done.stderr == ""
    assert lines[0].startswith("titan-node: FAIL node=0 host=") and 'why="unexpected: ValueError: Exceeds' in lines[0]
    assert lines[1] == "Traceback (most recent call last):" and "in main" in done.stdout
    (cpu.site / "torchtitan-0.3.0.dist-info" / "METADATA").write_text("Name: torchtitan\n")
    done = cpu.start_unchecked(FAKE_TORCH="2.13.0+cpu")
    assert done.returncode == FAILED and 'why="unexpected: ' in done.stdout.splitlines()[0]
    assert cpu.record()["ok"] is False and cpu.record()["why"].startswith("unexpected: ")


def test_a_name_that_no_terminal_can_show(tmp_path: Path) -> None:
    cpu = Place(tmp_path, debug_node())
    cpu.change(data="/data/\udc80")
    assert "/data/\\udc80 is not a directory" in cpu.refused()
