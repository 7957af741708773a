"""Hangs of the real trainer on the real Slurm, over gloo: who is named, and who is not accused.

LAUNCHER_TEST_HANGS=1 runs the whole campaign of docs/hangs.md; without it the first case alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, Launch
from tests.cluster.daemons import processes
from tests.cluster.test_launcher_on_slurm import DEBUG

pytestmark = [AS_ROOT, pytest.mark.usefixtures("own_cluster")]
CAMPAIGN = pytest.mark.skipif(os.environ.get("LAUNCHER_TEST_HANGS") != "1", reason="LAUNCHER_TEST_HANGS=1 runs it")
SMALL = ("--set", "recipe.log_freq=1", "--set", "recipe.seq_len=256", "--set", "recipe.local_batch_size=1")


class Hung:
    """A run on several nodes with two ranks each, that can be disturbed."""

    def __init__(self, launch: Launch, image: Path) -> None:
        self.launch, self.image = launch, image
        self.run = launch.run("hang")

    def start(self, *more: str, nodes: int = 2, steps: int = 2000, least_s: int = 15, program: str = "") -> None:
        """`program` runs in each rank, before the trainer; a file beside it sets it off."""
        folder = self.launch.directory
        if program:
            (folder / "sitecustomize.py").write_text(program.replace("FOLDER", str(folder)))
            text = f'#!/bin/sh\nexport PYTHONPATH={folder}\nexec python3 "$@"\n'
            python = self.launch.script("python-of-the-node", text)
            more = (*more, "--python", str(python), "--mount", f"{folder}:{folder}")
        size = ("--nodes", str(nodes), "--gpus-per-node", "2", "--steps", str(steps), "--check", "quick")
        what = (*DEBUG, "--image", self.image, *size, *SMALL, "--env", f"LAUNCHER_HANG_S={least_s}", "--name", "hang")
        done = self.launch(*what, *more)
        assert done.returncode == 0, done.stderr

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while self.step() < step:
            assert time.monotonic() < end and not (self.run / "end.json").exists(), self.logs()[-3000:]
            time.sleep(0.5)

    def step(self) -> int:
        progress = self.launch.status("hang")["progress"]
        return int(progress["step"]) if progress else 0

    def host(self, rank: int) -> str:
        (record,) = (self.run / "nodes").glob(f"{rank // 2:04d}-*.json")
        return record.stem.partition("-")[2]

    def logs(self) -> str:
        return self.launch("logs", "hang").stdout

    def pids(self, rank: int) -> list[int]:
        """The processes of this rank, as the machine numbers them: the nodes' own numbers are others."""
        return sorted(
            pid
            for pid, _, variables in processes()
            if f"RANK={rank}" in variables and any(f"{self.run}/" in one for one in variables)
        )

    def verdict(self, seconds: float = 150) -> dict[str, object]:
        end = time.monotonic() + seconds
        while not (self.run / "nodes" / "hang.json").exists():
            assert time.monotonic() < end, self.logs()[-3000:]
            time.sleep(0.5)
        value = json.loads((self.run / "nodes" / "hang.json").read_text())
        assert isinstance(value, dict)
        return value

    def culprit(self, seconds: float = 150) -> tuple[str, int | None, str]:
        began = time.monotonic()
        verdict = self.verdict(seconds)
        print(f"after {time.monotonic() - began:.0f} s: {verdict['why']}")
        found = verdict["culprit"]
        assert isinstance(found, dict), verdict
        return found["kind"], found["rank"], found["host"]

    def is_not_accused(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (self.run / "end.json").exists():
            assert not (self.run / "nodes" / "hang.json").exists(), self.logs()[-3000:]
            time.sleep(1)


@pytest.fixture
def hung(launch: Launch, train_image: Path) -> Hung:
    return Hung(launch, train_image)


@pytest.mark.parametrize("least_s", [15, pytest.param(45, marks=CAMPAIGN)])
def test_a_stopped_rank_is_named_and_the_run_ended(hung: Hung, least_s: int) -> None:
    hung.start(least_s=least_s)
    hung.wait_for_step(5)
    watching = subprocess.Popen(
        [*hung.launch.command, "watch", "hang"],
        env=os.environ | hung.launch.slurm.env | hung.launch.variables(),
        cwd=hung.launch.directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for pid in hung.pids(3):
        os.kill(pid, signal.SIGSTOP)
    host = hung.host(3)
    assert hung.culprit() == ("stopped", 3, host)
    verdict = hung.verdict()
    assert isinstance(verdict["culprit"], dict) and verdict["culprit"]["waiting"] >= 2
    assert hung.launch.wait_for("hang", "FAILED", "COMPLETED") == "FAILED"
    why = f"rank 3 ({host}, local rank 1) is stopped by a signal or a debugger; 3 others wait in "
    said = hung.launch("status", "hang")
    assert said.returncode == ExitStatus.JOB_FAILED
    assert f"cause: the run hung: {why}" in said.stderr, said.stderr + hung.logs()[-6000:]
    assert f"--exclude {host}" in said.stderr and f"scontrol update NodeName={host} State=DRAIN" in said.stderr
    assert not hung.pids(3), "the stopped rank has not ended"
    assert f"hang: hang: {why}" in watching.communicate(timeout=60)[1]
    logs = [path.read_text() for path in (hung.run / "logs").rglob("stderr.log")]
    assert any("Fatal Python error: Aborted" in text for text in logs), "the others' stacks are not logged"


STUCK = """
import os, sys, threading, time
def look():
    while "torchtitan.components.tokenizer" not in sys.modules:
        time.sleep(0.2)
    time.sleep(1)
    tokenizer = sys.modules["torchtitan.components.tokenizer"].HuggingFaceTokenizer
    encode = tokenizer.encode
    def stuck(*arguments, **named):
        while os.path.exists("FOLDER/now"):
            DOING
        return encode(*arguments, **named)
    tokenizer.encode = stuck
if os.environ.get("RANK") == "1":
    threading.Thread(target=look, daemon=True).start()
"""


@CAMPAIGN
@pytest.mark.parametrize("doing", ["time.sleep(1)", "pass"], ids=["waits", "computes"])
def test_a_rank_that_is_stuck_in_its_loader(hung: Hung, doing: str) -> None:
    hung.start(program=STUCK.replace("DOING", doing))
    hung.wait_for_step(5)
    (hung.launch.directory / "now").touch()
    assert hung.culprit() == ("behind", 1, hung.host(1))


@CAMPAIGN
def test_a_node_whose_network_is_cut(hung: Hung) -> None:
    hung.start(nodes=3)
    hung.wait_for_step(5)
    host = hung.host(4)
    (pid, *_) = hung.pids(4)
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", "link", "set", "eth0", "down"], check=True)
    try:
        assert hung.culprit() == ("unreachable", None, host)
    finally:
        subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", "link", "set", "eth0", "up"], check=False)


@CAMPAIGN
def test_a_rank_that_is_slowed_is_not_accused(hung: Hung) -> None:
    """Stopped for most of the time, as cpulimit does it."""
    hung.start()
    hung.wait_for_step(5)
    pids, before = hung.pids(3), hung.step()
    for _ in range(80):
        for number, seconds in ((signal.SIGSTOP, 0.8), (signal.SIGCONT, 0.2)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(seconds)
    hung.is_not_accused(30)
    assert hung.step() > before


SLOW_SAVE = """
import os, sys, threading, time
def look():
    while "torchtitan.components.checkpointer.dcp" not in sys.modules:
        time.sleep(0.2)
    time.sleep(1)
    manager = sys.modules["torchtitan.components.checkpointer.dcp"].CheckpointManager
    save = manager.dcp_save
    def slow(*arguments, **named):
        time.sleep(60)
        return save(*arguments, **named)
    manager.dcp_save = slow
if "RANK" in os.environ:
    threading.Thread(target=look, daemon=True).start()
"""


@CAMPAIGN
def test_a_checkpoint_that_takes_longer_than_the_bound_is_no_hang(hung: Hung) -> None:
    hung.start("--set", "recipe.checkpoint_interval=8", steps=12, program=SLOW_SAVE)
    hung.is_not_accused(400)
    assert hung.launch.wait_for("hang", "FAILED", "COMPLETED") == "COMPLETED"
    assert "the checkpoint in 6" in hung.logs()


@CAMPAIGN
@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("log_freq", [1, 5])
def test_a_healthy_run_is_not_accused(hung: Hung, nodes: int, log_freq: int) -> None:
    hung.start("--set", f"recipe.log_freq={log_freq}", nodes=nodes, steps=30, least_s=8)
    hung.is_not_accused(400)
    assert hung.launch.wait_for("hang", "FAILED", "COMPLETED") == "COMPLETED"
