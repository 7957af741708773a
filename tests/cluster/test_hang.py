"""Hangs of the real trainer on the real Slurm, over gloo: who is named, and who is not accused.

LAUNCHER_TEST_HANGS=1 runs the whole campaign of docs/hangs.md; without it the first case alone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.slurm_cluster import Cluster, User
from tests.cluster.test_launcher_on_slurm import CPU_ON_GPU_NODES, DEBUG, Launch, install

CAMPAIGN = pytest.mark.skipif(os.environ.get("LAUNCHER_TEST_HANGS") != "1", reason="LAUNCHER_TEST_HANGS=1 runs it")
SMALL = ("--set", "recipe.log_freq=1", "--set", "recipe.seq_len=256", "--set", "recipe.local_batch_size=1")


class Hung:
    """A run on several nodes with two ranks each, that can be disturbed."""

    def __init__(self, launch: Launch, image: Path) -> None:
        self.launch, self.image = launch, image
        self.run = launch.directory / "runs" / "hang"

    def start(self, *more: str, nodes: int = 2, steps: int = 2000, least_s: int = 15) -> None:
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
        said = json.loads(self.launch("status", "hang", "--json").stdout)
        return said["progress"]["step"] if said["progress"] else 0

    def logs(self) -> str:
        return self.launch("logs", "hang").stdout

    def pids(self, rank: int) -> list[int]:
        """The processes of this rank, as the machine numbers them: the nodes' own numbers are others."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                env = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in env and any(f"{self.run}/".encode() in item for item in env):
                found.append(int(path.parent.name))
        return sorted(found)

    def verdict(self, seconds: float = 150) -> dict[str, object]:
        end = time.monotonic() + seconds
        while not (self.run / "nodes" / "hang.json").exists():
            assert time.monotonic() < end, self.logs()[-3000:]
            time.sleep(0.5)
        value = json.loads((self.run / "nodes" / "hang.json").read_text())
        assert isinstance(value, dict)
        return value


@pytest.fixture
def hung(slurm: Cluster, app: Path, user_dir: Path, train_image: Path) -> Iterator[Hung]:
    if slurm.record is None or os.geteuid() != 0:
        pytest.skip("disturbs processes of a node: only on a cluster of the tests' own")
    user: User | None = None
    launch = Launch(slurm, user, user_dir, (install(user_dir / "app", app, user), "-m", "launcher"))
    (user_dir / "cpu.toml").write_text(CPU_ON_GPU_NODES)
    yield Hung(launch, train_image)
    launch("cancel", "hang")


def test_a_stopped_rank_is_named_and_the_run_ended(hung: Hung) -> None:
    hung.start()
    hung.wait_for_step(5)
    began = time.monotonic()
    for pid in hung.pids(3):
        os.kill(pid, signal.SIGSTOP)
    verdict = hung.verdict()
    took = time.monotonic() - began
    culprit = verdict["culprit"]
    assert isinstance(culprit, dict), verdict
    host = hung.launch.slurm.nodes[1]
    assert (culprit["kind"], culprit["rank"], culprit["host"], culprit["local_rank"]) == ("stopped", 3, host, 1)
    assert culprit["waiting"] == 3 and culprit["number"] > 0, verdict
    assert hung.launch.wait_for("hang", "FAILED", "COMPLETED") == "FAILED"
    said = hung.launch("status", "hang")
    assert said.returncode == ExitStatus.JOB_FAILED and f"rank 3 ({host}, local rank 1) is stopped" in said.stderr
    assert f"--exclude {host}" in said.stderr
    assert not hung.pids(3), "the stopped rank has not ended"
    print(f"named after {took:.0f} s: {verdict['why']}")
