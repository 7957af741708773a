"""Detection, placement, waiting, exclusion and restarts on Slurm 24.11 of Debian 13, with blocks of NVLink domains.

Its Slurm lives in a root directory of its own. Jobs there are shell scripts: no Python, no image, no Pyxis.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, Launch, debian_13
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, Release, running_cluster, slurm_run
from tests.conftest import say_it_trains, squashfs_head

NODES = tuple(f"gpu-compute-node-{number:03d}" for number in range(1, 5))
BARE = ("--gpu", "gb200", "--runtime", "bare", "--recipe", "debug", "--config", "own.toml")
pytestmark = AS_ROOT


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    topology = (
        f"BlockName=rack1 Nodes={NODES[0]},{NODES[1]}\nBlockName=rack2 Nodes={NODES[2]},{NODES[3]}\nBlockSizes=2\n"
    )
    release = Release(debian_13(), "TopologyPlugin=topology/block\n", topology)
    with (
        tempfile.TemporaryDirectory(prefix="launcher-slurm-", dir="/tmp", ignore_cleanup_errors=True) as name,
        running_cluster(Path(name), release=release) as cluster,
    ):
        yield cluster


@pytest.fixture
def user_dir(slurm: Cluster) -> Iterator[Path]:
    """That the other release sees, too; its jobs have ended before the next test."""
    here = Path(tempfile.mkdtemp(dir=slurm.directory))
    (here / "own.toml").write_text(f'[profile]\narch = "{os.uname().machine}"\n')
    yield here
    wait_for(lambda: not slurm_run(slurm, ["squeue", "-h"]).stdout.strip(), "an empty queue")


def submit(launch: Launch, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    program = str(launch.script("sleeper", "#!/bin/sh\necho started; exec sleep 300\n"))
    return launch("submit", *BARE, "--python", program, "--yes", "--name", name, *more)


def nodes_of(slurm: Cluster, name: str) -> list[str]:
    shown = slurm_run(slurm, ["squeue", "-h", "-o", "%j|%T|%N"]).stdout.splitlines()
    jobs = [line.split("|") for line in shown]
    held = next((nodes for job, state, nodes in jobs if job.startswith(f"{name}.") and state == "RUNNING"), "")
    return slurm_run(slurm, ["scontrol", "show", "hostnames", held]).stdout.split() if held else []


def test_what_the_cluster_is(launch: Launch) -> None:
    shown: dict[str, Any] = json.loads(launch("cluster", "show", "--json").stdout)
    assert (shown["slurm"], shown["topology"], shown["segment"]) == ([24, 11], "block", True)
    assert [(block["name"], block["nodes"]) for block in shown["blocks"]] == [
        ("rack1", list(NODES[:2])),
        ("rack2", list(NODES[2:])),
    ]
    assert shown["pyxis"] is None and shown["accounting"] is False and shown["notes"] == []
    assert {node["gpus"] for node in shown["nodes"]} == {4}


def test_a_job_stays_in_one_block(launch: Launch, slurm: Cluster) -> None:
    held = submit(launch, "one", "--nodelist", NODES[0])
    assert held.returncode == 0, held.stderr
    wait_for(lambda: nodes_of(slurm, "one") == [NODES[0]], "the first job")
    two = submit(launch, "two", "--nodes", "2")
    assert two.returncode == 0, two.stderr
    script = (launch.run("two") / "job.sbatch").read_text()
    assert "#SBATCH --segment=2\n" in script
    wait_for(lambda: nodes_of(slurm, "two") == list(NODES[2:]), "the second job, in the block that is free")


def test_a_job_that_must_straddle_blocks_is_warned_of_and_runs(launch: Launch, slurm: Cluster) -> None:
    done = submit(launch, "three", "--nodes", "3")
    assert done.returncode == 0 and "NVLink domains" in done.stderr and "--nodes" in done.stderr, done.stderr
    wait_for(lambda: len(nodes_of(slurm, "three")) == 3, "three nodes of two blocks")


def test_a_segment_that_no_block_has(launch: Launch, slurm: Cluster) -> None:
    refused = submit(launch, "far", "--nodes", "4", "--segment", "4")
    assert refused.returncode == 3 and "the largest block has 2 nodes" in refused.stderr, refused.stderr


LOSES_A_NODE = """#!/bin/sh
# Stands in for again.py and for a step: each attempt fails, and the node of the job's script is left out.
case "$*" in
*" begin "*) for word; do hosts=$word; done; echo "1 $hosts" ;;
*" end "*) echo "requeue $SLURMD_NODENAME" ;;
*" refused "*) echo "$*" >HERE/refused ;;
*) exit 1 ;;
esac
"""


def test_a_run_that_lost_a_node_of_each_block_ends(launch: Launch, slurm: Cluster) -> None:
    """Slurm would keep it with BadConstraints: it cannot change the --segment of a job."""
    program = launch.script("python", LOSES_A_NODE.replace("HERE", str(launch.directory)))
    words = ("submit", *BARE, "--python", program, "--yes", "--name", "loses", "--nodes", "2", "--max-restarts", "5")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    wait_for((launch.run("loses") / "end.json").exists, "the run's end", 60)
    assert "--why too-few-in-blocks" in (launch.directory / "refused").read_text()
    log = (launch.run("loses") / "logs/job.log").read_text()
    assert all(f"on gpu-compute-node-[{nodes}]," in log for nodes in ("001-002", "003-004")), log


def test_excluded_nodes_and_why_a_job_waits(launch: Launch, slurm: Cluster) -> None:
    assert submit(launch, "else", "--nodes", "2", "--exclude", NODES[0]).returncode == 0
    wait_for(lambda: nodes_of(slurm, "else") == list(NODES[2:]), "the block without the excluded node")
    assert submit(launch, "next", "--nodes", "2").returncode == 0
    wait_for(lambda: nodes_of(slurm, "next") == list(NODES[:2]), "the other block")
    assert submit(launch, "waits", "--nodes", "2").returncode == 0
    wait_for(lambda: "4 in use" in launch("status", "waits").stdout, "the reason")


def test_a_cluster_without_pyxis(launch: Launch) -> None:
    image = launch.directory / "titan.sqsh"
    image.write_bytes(squashfs_head(4096).ljust(4096, b"\0"))
    say_it_trains(image)
    words = ("submit", *BARE[:2], *BARE[4:], "--image", str(image), "--yes", "--name", "contained")
    refused = launch(*words)
    assert refused.returncode == ExitStatus.INVALID and "Pyxis is not installed here" in refused.stderr, refused.stderr
    assert launch(*words, "--force").returncode == 0
    wait_for((launch.run("contained") / "end.json").exists, "the job's end")
    status = launch("status", "contained")
    assert "cause: this cluster's srun does not know Pyxis's options" in status.stderr, status.stderr
    assert "unrecognized option '--container-image=" in status.stderr and "--runtime apptainer" in status.stderr


@pytest.fixture
def stale_blocks(slurm: Cluster) -> Iterator[None]:
    """A topology.conf that nobody has changed since two nodes were added: those are in no block.

    Slurm 24.11 does not even start with a block that has no nodes, or fewer than BlockSizes.
    """
    file = slurm.directory / "topology.conf"
    whole = file.read_text()

    def reread(text: str, blocks: int) -> None:
        file.write_text(text)
        slurm_run(slurm, ["scontrol", "reconfigure"])
        shown = ["scontrol", "show", "topology"]
        wait_for(lambda: slurm_run(slurm, shown).stdout.count("BlockName=") == blocks, f"{blocks} blocks")

    reread("".join(line + "\n" for line in whole.splitlines() if "rack2" not in line), 1)
    yield
    reread(whole, 2)


@pytest.mark.usefixtures("stale_blocks")
def test_nodes_that_are_in_no_block_are_idle_and_get_no_job(launch: Launch, slurm: Cluster) -> None:
    done = submit(launch, "four", "--nodes", "4")
    assert done.returncode == ExitStatus.INVALID, done.stderr
    assert "are in no block of the topology: " + ", ".join(NODES[2:]) in done.stderr, done.stderr
    assert "scontrol reconfigure" in done.stderr
    forced = submit(launch, "outside", "--nodes", "2", "--nodelist", ",".join(NODES[2:]), "--force")
    assert forced.returncode == ExitStatus.CLUSTER, forced.stderr
    assert "Requested topology configuration is not available" in forced.stderr, forced.stderr
