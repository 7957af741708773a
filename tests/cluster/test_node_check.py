"""The node check on a real Slurm: what is wrong on one node stops the job before torchrun starts anywhere.

A program in the place of Python makes one node differ from the others: the product itself has no hook for that. A
healthy job's check is looked at where one trains anyway (test_launcher_on_slurm.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, Launch, stand_in
from tests.cluster.test_launcher_on_slurm import DEBUG
from tests.unit.node_place import fake_site

pytestmark = [AS_ROOT, pytest.mark.usefixtures("own_cluster")]  # who may mount something over a directory on one node
NODE_UNFIT = 20


class Sick:
    """A job on two nodes, the second of which runs `shell` before Python starts."""

    def __init__(self, launch: Launch, shell: str) -> None:
        self.launch, self.hosts = launch, launch.slurm.nodes[:2]
        text = f'#!/bin/sh\nif [ "$SLURMD_NODENAME" = {self.hosts[1]} ]; then\n{shell}\nfi\nexec python3 "$@"\n'
        self.program, self.run = launch.script("python-of-the-node", text), launch.run("sick")

    def submit(self, *arguments: str | Path) -> None:
        folder, where = self.launch.directory, ("--nodes", "2", "--nodelist", ",".join(self.hosts))
        what = ("--name", "sick", "--python", self.program, "--mount", f"{folder}:{folder}")
        done = self.launch(*arguments, *where, *what)
        assert done.returncode == 0, done.stderr
        self.launch.wait_for("sick", "FAILED", seconds=240)

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


def test_data_that_one_node_cannot_read_and_a_slow_rank(launch: Launch, train_image: Path) -> None:
    """First the mount: it is found at once. Then, with the data back, the product that is slow on the same node."""
    sick = Sick(launch, f"mount -t tmpfs none {launch.run('sick')}/sample/c4")
    sick.submit(*DEBUG, "--image", train_image)
    verdict = sick.verdict()
    (one,) = verdict["unfit"]
    assert (one["host"], one["fault"], one["name"]) == (sick.hosts[1], "node", "data"), verdict
    assert [record["ok"] for record in sick.records()] == [True, False]
    done = launch("status", "sick")
    assert done.returncode != ExitStatus.OK and sick.hosts[1] in done.stderr, done.stderr

    slow = launch.directory / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    os.rename(sick.run, sick.run.with_name("earlier"))
    sick = Sick(launch, f"export PYTHONPATH={slow}")
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


def test_a_node_that_has_lost_a_gpu(launch: Launch, small_image: Path) -> None:
    """torch and nvidia-smi are stand-ins here: no machine of the tests has a GPU. The job and its nodes are real."""
    site = fake_site(launch.directory / "site")
    image = stand_in(small_image, launch.directory / "gpu.sqsh")
    sick = Sick(launch, "export FAKE_GPUS=3")
    what = ("--image", image, "--gpu", "h100", "--gpus-per-node", "4", "--recipe", "debug", "--check", "quick")
    settings = ("--set", f"profile.arch={os.uname().machine}", "--set", "profile.mounts=[]")
    sick.submit(
        "submit", *what, "--yes", "--force", *settings, "--env", f"PYTHONPATH={site}", "--env", "NCCL_IB_HCA=^none"
    )
    (one,) = sick.verdict()["unfit"]
    assert (one["host"], one["fault"]) == (sick.hosts[1], "node")
    assert one["why"] == "3 GPUs are visible, the profile says 4"
    assert "nvidia-smi is not in the image" in (sick.run / "nodes" / "check.json").read_text()
