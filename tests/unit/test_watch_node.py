"""The watcher beside torchrun: once with processes in the places of torchrun and its ranks, else on a clock of its own.

On that clock a sleep takes no time, and what happens during it is the test's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.titan import checkpoints
from tests.unit.checkpoint_files import write_checkpoint
from tests.unit.node_place import as_in_a_run, lay_out
from tests.unit.test_submission import wait_for
from tests.unit.test_titan_command import changed, debug_node

TORCHRUN = """
import os, subprocess, sys, time
job, log = sys.argv[1:3]
words = [job + "/check/watch.py", job + "/node.json", "0", "n0", str(os.getpid())]
watcher = subprocess.Popen([sys.executable, *words])
ranks = [
    subprocess.Popen(
        [sys.executable, "-S", "-c", "from titan import recorder; import time; recorder.listen(); time.sleep(600)"],
        env=os.environ | {"RANK": str(number), "LOCAL_RANK": str(number), "PYTHONPATH": job},
    )
    for number in range(2)
]
print(watcher.pid, *(rank.pid for rank in ranks), flush=True)
for number in range(1, 9):
    with open(log, "a") as stream:
        stream.write(f"[rank0]:[titan] - root - INFO - step: {number}  loss:  5.5\\n")
    time.sleep(0.1)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run_directory(folder: Path, **recipe: int) -> Path:
    """That of a run on one node; its log's path."""
    node = debug_node()
    lay_out(folder, changed(node, recipe=node["recipe"] | recipe))
    for name in ("logs", "nodes"):
        (folder / name).mkdir()
    (folder / "nodes" / "0000-n0.json").write_text('{"ok": true, "node": 0, "host": "n0"}')
    return folder / "logs" / "0000-n0.log"


def test_a_stopped_rank_is_named_and_dies_with_the_rest(tmp_path: Path) -> None:
    log, job = run_directory(tmp_path), tmp_path / "job"
    watch = job / "check" / "watch.py"
    watch.write_text(watch.read_text().replace("LOOK_S = 2 ", "LOOK_S = 0.6 "))
    env = os.environ | {"LAUNCHER_HANG_S": "1", "TITAN_JOB_ID": "7"}
    env["TITAN_HANG_DIR"] = str(tmp_path / "nodes" / "hang" / "0000-n0")
    with open(tmp_path / "out", "w") as out:
        torchrun = subprocess.Popen([sys.executable, "-c", TORCHRUN, str(job), str(log)], stdout=out, env=env)
    pids = [torchrun.pid]
    try:
        wait_for(lambda: (tmp_path / "out").read_text())
        pids += map(int, (tmp_path / "out").read_text().split()[:3])
        os.kill(pids[-1], signal.SIGSTOP)
        assert torchrun.wait(90) == -signal.SIGKILL
        wait_for(lambda: not any(map(is_alive, pids)))
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
        torchrun.wait()
    verdict = json.loads((tmp_path / "nodes" / "hang.json").read_text())
    assert (verdict["culprit"]["kind"], verdict["culprit"]["rank"]) == ("stopped", 1)
    assert verdict["why"] == "rank 1 (n0, local rank 1) is stopped by a signal or a debugger"
    first, second = verdict["nodes"][0]["ranks"]
    assert first["stack"] and first["state"] == "S" and second["state"] == "T"
    assert f'titan-hang: rank=1 gpu=1 why="{verdict["why"]}"' in (tmp_path / "out").read_text()


class Watched:
    """A watcher whose torchrun ends after `lasts_s`; `meanwhile` is called as each sleep ends."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, hang_s: str = "5") -> None:
        self.run, self.log, self.now, self.lasts_s = folder, run_directory(folder, checkpoint_interval=4), 100.0, 900.0
        self.meanwhile: Callable[[], object] = lambda: None
        self.killed: list[int] = []
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("LAUNCHER_HANG_S", hang_s)
        monkeypatch.setenv("TITAN_JOB_ID", "7")
        self.module = as_in_a_run(monkeypatch, "check.watch")
        clock = SimpleNamespace(monotonic=lambda: self.now, time=time.time, sleep=self.sleep)
        monkeypatch.setattr(self.module, "time", clock)
        monkeypatch.setattr(self.module, "ranks_of", lambda torchrun: iter([]))
        monkeypatch.setattr(os, "getppid", lambda: 4711 if self.now < self.lasts_s else 1)
        monkeypatch.setattr(os, "kill", lambda pid, number: self.killed.append(number))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def trains(self) -> None:
        """A step a second."""
        with open(self.log, "a") as stream:
            stream.write(f"[rank0]:[titan] - root - INFO - step: {int(self.now)}  loss:  5.5\n")

    def watch(self) -> None:
        self.module.main(str(self.run / "job" / "node.json"), "0", "n0", "4711")

    @property
    def verdict(self) -> Any:
        file = self.run / "nodes" / "hang.json"
        return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_where_nothing_tells_who_it_is_nobody_is_named(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    watched.meanwhile = lambda: watched.trains() if watched.now < 130 else None
    watched.watch()
    assert watched.verdict["culprit"] is None and signal.SIGKILL in watched.killed
    said = capsys.readouterr().out
    assert said.startswith("titan-hang: why=") and "no rank can be blamed" in said and len(said.splitlines()) == 1


def test_a_run_that_slurm_suspends_or_that_asks_nothing_is_left_alone(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    """On its board may be what another attempt was asked, or no question. It ends with its torchrun."""
    board = watched.run / "nodes" / "hang" / "board.json"
    texts = iter(('{"ask": "7.1/1", "end": true}', '{"ask": 3, "end": true}', "{", "[]"))

    def meanwhile() -> None:
        if 200 < watched.now < 300:  # with all others, and wakes up first
            watched.now += 400
        else:
            watched.trains()
        if text := next(texts, ""):
            board.write_text(text)

    watched.meanwhile = meanwhile
    watched.watch()
    assert watched.verdict is None and not watched.killed and capsys.readouterr().out == ""
    assert next(texts, None) is None and watched.now >= 900


def no_board(watched: Watched) -> None:
    (watched.run / "nodes" / "hang" / "board.json").mkdir(parents=True)


def no_logs(watched: Watched) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    watched.monkeypatch.setattr(watched.module.Watch, "logs", lambda _: full())


@pytest.mark.parametrize(
    ("hang_s", "fails"),
    [("5", None), ("0", None), ("5", no_board), ("5", no_logs)],
    ids=["both", "checkpoints alone", "no board", "no logs"],
)
def test_after_each_checkpoint_it_says_when_the_next_does_not_fit(
    hang_s: str,
    fails: Callable[[Watched], None] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it can watch for a hang no more, and says so; the run is left alone."""
    watched = Watched(tmp_path, monkeypatch, hang_s)
    watched.lasts_s = 330.0
    if fails:
        fails(watched)
    free = {4: 1000, 8: 50}
    folder = tmp_path / "titan" / "checkpoint"
    (folder / "step-best").mkdir(parents=True)  # somebody's own copy
    (folder / "step-best/.metadata").touch()
    write_checkpoint(folder, 3)  # of an earlier job
    steps = iter(free)
    monkeypatch.setattr(watched.module.checkpoints, "free_bytes", lambda folder: free[checkpoints.newest(folder)])

    def meanwhile() -> None:
        watched.trains()
        if watched.now % 100 < 2 and (step := next(steps, 0)):
            write_checkpoint(folder, step)

    watched.meanwhile = meanwhile
    watched.watch()
    *gave_up, line = capsys.readouterr().out.splitlines()
    assert line.startswith("titan-checkpoint: warn step=8 ") and "does not fit" in line
    assert [one.partition(":")[0] for one in gave_up] == ["titan-watch"] * bool(fails) and not watched.killed
    assert (tmp_path / "nodes" / "hang").exists() == (hang_s != "0") and watched.verdict is None
