"""`launcher cluster show` on a real Slurm: what it says is what Slurm's own commands say."""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Iterator

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import Launch
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, slurm_run

REASON = "NVLink [GPU 2] down, see #7: State=IDLE"


@pytest.fixture
def drained_node(slurm: Cluster, own_cluster: None) -> Iterator[str]:
    """The last node, drained with a reason that looks like Slurm's own fields; put back afterwards."""
    name = slurm.nodes[-1]
    done = slurm_run(slurm, ["scontrol", "update", f"nodename={name}", "state=drain", f"reason={REASON}"])
    assert done.returncode == 0, done.stderr
    show = ["scontrol", "-o", "show", "node", name]  # on a busy machine one may not have answered Slurm's last question
    wait_for(lambda: "State=IDLE+DRAIN " in slurm_run(slurm, show).stdout, f"{name} to be drained and to answer", 120)
    yield name
    slurm_run(slurm, ["scontrol", "update", f"nodename={name}", "state=resume"])


def test_show_agrees_with_slurm(slurm: Cluster, launch: Launch, drained_node: str) -> None:
    done = launch("cluster", "show", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    said = slurm_run(slurm, ["scontrol", "show", "config"]).stdout
    version = next(line.split("=")[1].strip() for line in said.splitlines() if line.startswith("SLURM_VERSION"))
    assert shown["name"] == "launchertest"
    assert shown["slurm"] == [int(part) for part in version.split(".")[:2]]
    assert shown["accounting"] is False
    assert shown["pyxis"] == "" and "--container-image" in shown["pyxis_options"]
    assert shown["notes"] == []
    assert [(p["name"], p["default"], p["max_time_s"], p["nodes"]) for p in shown["partitions"]] == [
        ("batch", True, None, list(slurm.nodes)),
        ("small", False, 300, list(slurm.nodes[:1])),
    ]
    nodes = {node["name"]: node for node in shown["nodes"]}
    assert sorted(nodes) == sorted(slurm.nodes)
    first = nodes[slurm.nodes[0]]
    assert (first["gpus"], first["gpu_type"], first["cpus"], first["memory_mib"]) == (4, "gb200", 16, 16000)
    assert first["arch"] == platform.machine()
    drained = nodes[drained_node]
    assert (drained["state"], drained["free"]) == ("drained", False)
    assert drained["reason"].startswith(f"{REASON} [root@")


@pytest.mark.usefixtures("own_cluster")
def test_made_up_gpus_are_not_believed(launch: Launch) -> None:
    """16 GB of memory and, on x86-64, the architecture contradict the GRES gpu:gb200:4."""
    shown = launch("cluster", "show")
    text = " ".join(shown.stdout.split())
    assert shown.returncode == 0, shown.stderr
    assert "GRES gpu:gb200:4" in text and "against gb200" in text
    if platform.machine() == "x86_64":
        assert "against gb200 does not fit x86_64" in text
        done = launch("init", "--yes", "--config", "mine.toml")
        assert done.returncode == ExitStatus.NOT_FOUND and not (launch.directory / "mine.toml").exists()
    done = launch("init", "--gpu", "gb200", "--partition", "batch", "--config", "mine.toml", "--yes")
    assert done.returncode == 0 and "warning: gb200" in done.stderr
    saved = tomllib.loads((launch.directory / "mine.toml").read_text())["job"]
    assert (saved["gpu"], saved["partition"]) == ("gb200", "batch")
