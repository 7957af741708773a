"""Preflight and the words for a waiting job against a real Slurm: what it says is what Slurm does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, Launch
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, slurm_run

pytestmark = [AS_ROOT, pytest.mark.usefixtures("own_cluster")]
BARE = ("--gpu", "cpu", "--config", "cpu.toml", "--runtime", "bare", "--recipe", "debug")
DRAINED = "GPU 3 [fell off] the bus"


def queued(slurm: Cluster) -> list[str]:
    return slurm_run(slurm, ["squeue", "-h", "-o", "%j"]).stdout.split()


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--nodes", "9"), "partition batch has 4: the job would wait for ever", ExitStatus.INVALID),
        (("--partition", "small", "--nodes", "2", "--time", "4"), "partition small has 1", ExitStatus.INVALID),
        (("--partition", "small", "--time", "10"), "the limit of partition small, 00:05:00", ExitStatus.INVALID),
        (("--gpus-per-node", "5"), "4 with 4 of gpu", ExitStatus.INVALID),
        (("--segment", "1"), "Slurm places no segments here", ExitStatus.INVALID),
        (("--nodelist", "no-such-node"), "no node no-such-node", ExitStatus.NOT_FOUND),
        (("--partition", "nonsense"), "it has batch, small", ExitStatus.NOT_FOUND),
    ],
)
def test_refused_before_queueing(
    arguments: tuple[str, ...], said: str, code: ExitStatus, launch: Launch, slurm: Cluster, user_dir: Path
) -> None:
    done = launch("submit", *BARE, "--yes", "--name", "refused", *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (user_dir / "runs").exists()
    assert not [name for name in queued(slurm) if name.startswith("refused")]


@pytest.mark.parametrize(
    ("arguments", "reason", "said"),
    [
        (("--nodes", "9"), "PartitionNodeLimit", "9 nodes requested; partition batch has 4: 4 free"),
        (("--partition", "small", "--time", "10"), "PartitionTimeLimit", "above the partition's limit"),
    ],
)
def test_forced_it_waits_and_status_says_why(
    arguments: tuple[str, ...], reason: str, said: str, launch: Launch
) -> None:
    done = launch("submit", *BARE, "--force", "--name", "forced", *arguments)
    assert done.returncode == 0 and "warning: " in done.stderr, done.stderr
    wait_for(lambda: launch.status("forced")["reason"] == reason, reason)
    status = launch("status", "forced").stdout
    assert "never starts as it is" in status and said in status, status


def test_a_run_that_fits(launch: Launch) -> None:
    done = launch("preflight", *BARE, "--nodes", "4", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks(done)
    assert {check["status"] for check in found.values()} == {"ok"}, found
    assert found["GPUs"]["what"] == "gpu:2 on 4 nodes of partition batch"
    in_image = launch("preflight", *BARE[:4], "--recipe", "debug", "--image", "none.sqsh", "--json")
    assert (checks(in_image)["Pyxis"]["status"], checks(in_image)["image"]["status"]) == ("ok", "error")


def test_drained_nodes_and_an_estimate(launch: Launch, slurm: Cluster, user_dir: Path) -> None:
    nodes = ",".join(slurm.nodes[2:])
    drain = ["scontrol", "update", f"NodeName={nodes}", "State=DRAIN", f"Reason={DRAINED}"]
    assert slurm_run(slurm, drain).returncode == 0
    try:
        done = launch("submit", *BARE, "--yes", "--name", "three", "--nodes", "3")
        assert done.returncode == 0 and "3 nodes requested, 2 in service" in done.stderr, done.stderr
        assert f"{slurm.nodes[2]} is drained ({DRAINED}" in done.stderr
        wait_for(lambda: "2 free, 2 out of service" in launch("status", "three").stdout, "the reason")
        status = launch("status", "three").stdout
        assert DRAINED in status and "sooner: --nodes 2: 2 nodes free now" in status, status
    finally:
        slurm_run(slurm, ["scontrol", "update", f"NodeName={nodes}", "State=RESUME"])
    launch("cancel", "three")
    holding = ["sbatch", "--parsable", "--nodes=4", "--exclusive", "--time=30", "--output=/dev/null"]
    job = slurm_run(slurm, [*holding, "--wrap=sleep 100"], cwd=user_dir).stdout.strip()
    wait_for(
        lambda: job in slurm_run(slurm, ["squeue", "-h", "-t", "R", "-o", "%i"]).stdout.split(),
        "the first job",
    )
    assert "waits for others to end" in checks(launch("preflight", *BARE, "--json"))["nodes"]["what"]
    assert launch("submit", *BARE, "--yes", "--name", "next", "--nodes", "2").returncode == 0
    wait_for(lambda: "estimated start: " in launch("status", "next").stdout, "Slurm's estimate", 60)
    status = launch("status", "next").stdout
    assert "4 in use" in status and " min" in status and "sooner" not in status, status
