"""The watcher beside torchrun, with stand-ins for torchrun and its ranks: processes that log steps and sleep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.node_place import lay_out
from tests.unit.test_titan_command import changed, debug_node

TORCHRUN = """
import os, signal, subprocess, sys, time
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
for number in range(1, 600):
    if os.path.exists(log + ".quiet"):
        time.sleep(600)
    if os.path.exists(log + ".over"):
        for rank in ranks:
            rank.kill()
        sys.exit()
    with open(log, "a") as stream:
        stream.write(f"[rank0]:[titan] - root - INFO - step: {number}  loss:  5.5\\n")
    time.sleep(0.1)
"""


class Node:
    """A node whose run logs a step every tenth of a second."""

    def __init__(self, folder: Path) -> None:
        self.run = folder
        lay_out(folder, changed(debug_node(), nodes=1))
        for name in ("logs", "nodes"):
            (folder / name).mkdir()
        (folder / "nodes" / "0000-n0.json").write_text('{"ok": true, "node": 0, "host": "n0"}')
        self.log = folder / "logs" / "0000-n0.log"
        self.out = (folder / "out").open("w+")
        env = os.environ | {
            "LAUNCHER_HANG_S": "1",
            "TITAN_JOB_ID": "7",
            "TITAN_HANG_DIR": str(folder / "nodes" / "hang" / "0000-n0"),
        }
        command = [sys.executable, "-c", TORCHRUN, str(folder / "job"), str(self.log)]
        self.torchrun = subprocess.Popen(command, stdout=self.out, env=env)
        board = folder / "nodes" / "hang" / "board.json"
        self.until(lambda: self.said() and board.exists() and self.log.exists() and self.log.stat().st_size > 300)
        self.watcher, *self.ranks = map(int, self.said().split()[:3])

    def said(self) -> str:
        return Path(self.out.name).read_text()

    def until(self, holds: Any) -> None:
        end = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def tell(self, what: str) -> None:
        Path(f"{self.log}.{what}").touch()

    def verdict(self) -> dict[str, Any]:
        self.until((self.run / "nodes" / "hang.json").exists)
        value = json.loads((self.run / "nodes" / "hang.json").read_text())
        assert isinstance(value, dict)
        return value


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for pid in (made.torchrun.pid, made.watcher, *made.ranks):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    made.torchrun.wait()
    made.out.close()


def test_a_stopped_rank_is_named_and_dies_with_the_rest(node: Node) -> None:
    os.kill(node.ranks[1], signal.SIGSTOP)
    node.tell("quiet")
    verdict = node.verdict()
    assert (verdict["culprit"]["kind"], verdict["culprit"]["rank"]) == ("stopped", 1)
    assert verdict["why"] == "rank 1 (n0, local rank 1) is stopped by a signal or a debugger"
    first, second = verdict["nodes"][0]["ranks"]
    assert first["stack"] and first["state"] == "S" and second["state"] == "T"
    assert node.torchrun.wait(60) == -signal.SIGKILL
    node.until(lambda: not any(map(is_alive, (node.watcher, *node.ranks))))
    assert f'titan-hang: rank=1 gpu=1 why="{verdict["why"]}"' in node.said()


def test_where_nothing_tells_who_it_is_nobody_is_named(node: Node) -> None:
    node.tell("quiet")
    assert node.verdict()["culprit"] is None
    node.until(lambda: not any(map(is_alive, (node.watcher, *node.ranks))))
    assert "titan-hang: why=" in node.said() and "no rank can be blamed" in node.said()


def test_a_watcher_ends_with_its_torchrun_and_says_nothing(node: Node) -> None:
    node.tell("over")
    node.torchrun.wait(30)
    node.until(lambda: not is_alive(node.watcher))
    assert len(node.said().splitlines()) == 1 and not (node.run / "nodes" / "hang.json").exists()


def test_a_job_that_slurm_suspends_is_not_accused(node: Node) -> None:
    everybody = (node.torchrun.pid, node.watcher, *node.ranks)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(8)
    assert all(map(is_alive, everybody)) and not (node.run / "nodes" / "hang.json").exists()


def test_what_another_attempt_was_asked_is_none_of_this_ones_business(node: Node) -> None:
    board = node.run / "nodes" / "hang" / "board.json"
    for text in ('{"ask": "7.1/1", "end": true}', '{"ask": 3, "end": true}', "{", "[]"):
        board.write_text(text)
        time.sleep(0.5)
    assert all(map(is_alive, (node.watcher, *node.ranks))) and len(node.said().splitlines()) == 1


def test_a_watcher_that_fails_leaves_the_run_alone(node: Node) -> None:
    (node.run / "nodes" / "hang" / "board.json").unlink()
    (node.run / "nodes" / "hang" / "board.json").mkdir()
    node.tell("quiet")
    node.until(lambda: not is_alive(node.watcher))
    assert "nobody watches for a hang any more" in node.said() and "Traceback" not in node.said()
    assert all(map(is_alive, node.ranks))
