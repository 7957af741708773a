"""A node that fails its check on a real Slurm: the job stops, the node is left out, and a retry goes well without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ExitStatus
from tests.cluster.slurm_cluster import Cluster
from tests.cluster.test_preflight_on_slurm import BARE, Command, command

__all__ = ["command"]

# In the place of Python: the node's check itself on the node that has no room for caches; on the others a program that
# waits for Slurm to end it, and in a retry a training that is over at once.
PROGRAM = """\
#!/bin/sh
run=${1%/job/node.py}
[ "$SLURMD_NODENAME" = BAD ] && TITAN_SCRATCH=/proc/none exec python3 "$@"
echo "$SLURMD_NODENAME" >>"$run/ran-on"
case $run in *-retry1) ;; *) exec sleep 60 ;; esac
"""
WHY = "/proc/none: No such file or directory"


@pytest.fixture
def submit(user_dir: Path, slurm: Cluster) -> tuple[str, ...]:
    """Arguments of a run on two nodes that Slurm starts on its first ones, of which the first is not fit."""
    program = user_dir / "program"
    program.write_text(PROGRAM.replace("BAD", slurm.nodes[0]))
    program.chmod(0o755)
    check = ("--python", str(program), "--check", "off")
    return ("submit", *BARE, "--nodes", "2", *check, "--yes", "--retry-bad-nodes", "2")


def test_left_out_and_retried(
    command: Command, submit: tuple[str, ...], slurm: Cluster, user_dir: Path
) -> None:
    bad = slurm.nodes[0]
    done = command(*submit, "--name", "r")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cause: node {bad} is not fit to train: {WHY}" in done.stderr
    assert f"r: retry 1 of 2 without {bad}: r-retry1" in done.stderr and "r-retry1: COMPLETED" in done.stdout
    assert sorted((user_dir / "runs/r-retry1/ran-on").read_text().split()) == list(slurm.nodes[1:3])
    status = command("status", "r", "--json")
    assert (status.returncode, json.loads(status.stdout)["left_out"]) == (ExitStatus.NODES_UNFIT, [bad])
    nodes = json.loads(command("cluster", "nodes", "--json").stdout)
    assert (nodes["cluster"], [node["host"] for node in nodes["nodes"]]) == ("launchertest", [bad])
    assert f"excluded: {bad} ({WHY}" in command("preflight", *submit[1:-3]).stdout
    assert command("cluster", "nodes", "release", bad).returncode == 0
    assert "excluded" not in command("preflight", *submit[1:-3]).stdout


def test_not_retried_on_a_node_that_is_asked_for(
    command: Command, submit: tuple[str, ...], slurm: Cluster
) -> None:
    bad = slurm.nodes[0]
    done = command(*submit, "--name", "named", "--nodelist", bad)
    assert done.returncode == ExitStatus.NODES_UNFIT, done.stdout + done.stderr
    assert f"warning: --nodelist: {bad} failed its check lately" in done.stderr
    assert f"named: not retried: {bad} stays in the run" in done.stderr
