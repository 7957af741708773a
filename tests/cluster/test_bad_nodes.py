"""A node that fails its check on a real Slurm: the job is queued again without it, and goes well.

Slurm, its nodes, the job and the full check are real; torch is a stand-in, whose product is slow on one node.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, Launch
from tests.cluster.slurm_cluster import Cluster
from tests.cluster.test_preflight_on_slurm import BARE
from tests.unit.node_place import fake_site
from tests.unit.test_node_check import FAKE_DISTRIBUTED, FAKE_TENSORS

pytestmark = [AS_ROOT, pytest.mark.usefixtures("own_cluster")]

# In the place of Python: Python with the stand-ins. The nodes are one machine, and each has its own place for caches.
PROGRAM = """\
#!/bin/sh
export PYTHONPATH=SITE FAKE_TORCH=2.13.0+cpu TITAN_SCRATCH="${1%/job/node.py}/scratch-$SLURMD_NODENAME"
[ "$SLURMD_NODENAME" = BAD ] && export FAKE_SLOW=1
exec python3 "$@"
"""
TORCHRUN = """\
import os
with open("ran-on", "a") as file:
    file.write(os.environ["SLURMD_NODENAME"] + "\\n")
"""
WHY = "rank 0: matrix product at "


@pytest.fixture
def submit(launch: Launch, slurm: Cluster) -> tuple[str, ...]:
    """Arguments of a run on two nodes that Slurm starts on its first ones, of which the first is not fit."""
    site = fake_site(launch.directory / "site", FAKE_TENSORS, FAKE_DISTRIBUTED, TORCHRUN)
    program = launch.script("program", PROGRAM.replace("BAD", slurm.nodes[0]).replace("SITE", str(site)))
    check = ("--python", str(program), "--check", "full")
    return ("submit", *BARE, "--nodes", "2", *check, "--yes", "--retry-bad-nodes", "2")


def test_left_out_and_retried(launch: Launch, submit: tuple[str, ...], slurm: Cluster) -> None:
    bad = slurm.nodes[0]
    done = launch(*submit, "--name", "r")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "r: COMPLETED" in done.stdout
    first = json.loads((launch.run("r") / "attempts/1/attempt.json").read_text())
    assert (first["cause"], first["culprits"], first["again"]) == ("node-unfit", [bad], True)
    assert sorted((launch.run("r") / "ran-on").read_text().split()) == list(slurm.nodes[1:3])  # torchrun, once
    assert launch.status("r")["left_out"] == [bad]
    nodes = json.loads(launch("cluster", "nodes", "--json").stdout)
    assert (nodes["cluster"], [node["host"] for node in nodes["nodes"]]) == ("launchertest", [bad])
    assert f"excluded: {bad} ({WHY}" in launch("preflight", *submit[1:-3]).stdout
    assert launch("cluster", "nodes", "release", bad).returncode == 0
    assert "excluded" not in launch("preflight", *submit[1:-3]).stdout


def test_not_queued_again_where_too_few_nodes_are_left(
    launch: Launch, submit: tuple[str, ...], slurm: Cluster, user_dir: Path
) -> None:
    done = launch(*submit, "--name", "all", "--nodes", "4")
    assert done.returncode == ExitStatus.NODES_UNFIT, done.stdout + done.stderr
    record = json.loads((launch.run("all") / "attempt.json").read_text())
    assert (record["culprits"], record["why_not"]) == ([slurm.nodes[0]], "too-few-nodes")
