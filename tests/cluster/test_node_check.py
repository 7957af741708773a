"""The node check on a real Slurm: what is wrong on one node stops the job before torchrun starts anywhere.

A program in the place of Python makes one node differ from the others: the product itself has no hook for that. A
healthy job's check is looked at where one trains anyway (test_launcher_on_slurm.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.slurm_cluster import Cluster, User
from tests.cluster.test_launcher_on_slurm import CPU_ON_GPU_NODES, DEBUG, Launch, install, stand_in
from tests.unit.node_place import FAKE_RUN, FAKE_TORCH

NODE_UNFIT = 20


@pytest.fixture
def as_user(slurm: Cluster, app: Path, user_dir: Path) -> Iterator[Launch]:
    """`launcher ...` as root, who may mount something over a directory on one node."""
    if slurm.record is None or os.geteuid() != 0:
        pytest.skip("breaks a node: only on a cluster of the tests' own")
    user: User | None = None
    made = Launch(slurm, user, user_dir, (install(user_dir / "app", app, user), "-m", "launcher"))
    (user_dir / "cpu.toml").write_text(CPU_ON_GPU_NODES)
    yield made


class Sick:
    """A job on two nodes, the second of which runs `shell` before Python starts."""

    def __init__(self, launch: Launch, shell: str) -> None:
        self.launch, self.hosts = launch, launch.slurm.nodes[:2]
        self.program = launch.directory / "python-of-the-node"
        self.program.write_text(
            f'#!/bin/sh\nif [ "$SLURMD_NODENAME" = {self.hosts[1]} ]; then\n{shell}\nfi\nexec python3 "$@"\n'
        )
        self.program.chmod(0o755)

    def submit(self, *arguments: str | Path) -> None:
        folder = self.launch.directory
        done = self.launch(
            *arguments,
            "--name",
            "sick",
            "--nodes",
            "2",
            "--nodelist",
            ",".join(self.hosts),
            "--python",
            str(self.program),
            "--mount",
            f"{folder}:{folder}",
        )
        assert done.returncode == 0, done.stderr
        self.launch.wait_for("sick", "FAILED", seconds=240)
        self.run = folder / "runs" / "sick"

    def verdict(self) -> dict[str, Any]:
        """nodes/check.json of a job that stopped with its own exit code and started torchrun nowhere."""
        logs = self.launch("logs", "sick").stdout
        assert json.loads((self.run / "end.json").read_text())["exit_code"] == NODE_UNFIT, logs[-4000:]
        assert "titan-command" not in logs and "STARTED" not in logs and not (self.run / "logs" / "ranks").exists()
        value = json.loads((self.run / "nodes" / "check.json").read_text())
        assert isinstance(value, dict) and not value["ok"]
        return value

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.run / "nodes").glob("0*.json"))]


def test_data_that_one_node_cannot_read_and_a_slow_rank(as_user: Launch, train_image: Path) -> None:
    """First the mount: it is found at once. Then, with the data back, the product that is slow on the same node."""
    data = as_user.directory / "runs" / "sick" / "sample"
    sick = Sick(as_user, f"mount -t tmpfs none {data}/c4")
    sick.submit(*DEBUG, "--image", train_image)
    verdict = sick.verdict()
    (one,) = verdict["unfit"]
    assert (one["host"], one["fault"], one["name"]) == (sick.hosts[1], "node", "data"), verdict
    assert [record["ok"] for record in sick.records()] == [True, False]
    done = as_user("status", "sick")
    assert done.returncode != ExitStatus.OK and sick.hosts[1] in done.stderr, done.stderr

    slow = as_user.directory / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    os.rename(sick.run, sick.run.with_name("earlier"))
    sick = Sick(as_user, f"export PYTHONPATH={slow}")
    sick.submit(*DEBUG, "--image", train_image)
    verdict = sick.verdict()
    assert {(one["host"], one["metric"]) for one in verdict["outliers"]} == {(sick.hosts[1], "product_tflops")}
    assert {(one["host"], one["fault"]) for one in verdict["unfit"]} == {(sick.hosts[1], "node")}
    assert all(gpu["product_tflops"] > 0 for record in sick.records() for gpu in record["speed"])


SLOW = """
import sys
if any(word.endswith("check.speed") for word in sys.orig_argv):
    import torch
    product = torch.mm
    torch.mm = lambda *arguments, **named: [product(*arguments, **named) for _ in range(12)][0]
"""


def test_a_node_that_has_lost_a_gpu(as_user: Launch, small_image: Path) -> None:
    """torch and nvidia-smi are stand-ins here: no machine of the tests has a GPU. The job and its nodes are real."""
    folder = as_user.directory
    site = folder / "site"
    (site / "torch" / "distributed").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text(FAKE_TORCH)
    (site / "torch" / "distributed" / "__init__.py").touch()
    (site / "torch" / "distributed" / "run.py").write_text(FAKE_RUN)
    (site / "torchtitan").mkdir()
    (site / "torchtitan" / "__init__.py").touch()
    (site / "torchtitan-0.3.0.dist-info").mkdir()
    (site / "torchtitan-0.3.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchtitan\nVersion: 0.3.0\n"
    )
    image = folder / "gpu.sqsh"
    stand_in(small_image, image)
    sick = Sick(as_user, "export FAKE_GPUS=3")
    sick.submit(
        "submit",
        "--gpu",
        "h100",
        "--image",
        image,
        "--recipe",
        "debug",
        "--check",
        "quick",
        "--yes",
        "--force",
        "--gpus-per-node",
        "4",
        "--set",
        f"profile.arch={os.uname().machine}",
        "--set",
        "profile.mounts=[]",
        "--env",
        f"PYTHONPATH={site}",
        "--env",
        "NCCL_IB_HCA=^none",
    )
    (one,) = sick.verdict()["unfit"]
    assert (one["host"], one["fault"]) == (sick.hosts[1], "node")
    assert one["why"] == "3 GPUs are visible, the profile says 4"
    assert "nvidia-smi is not in the image" in (sick.run / "nodes" / "check.json").read_text()
