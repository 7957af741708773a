"""Faults in the middle of training: a run goes on after them with the losses of one that was never interrupted.

Slurm, its nodes, the job script and the trainer are real; the trainer waits at a step while it is broken (orders.py).
Three cases run always; `make faults` runs all and writes their table into docs/fault-campaign.md.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.titan import checkpoints
from tests.cluster.campaign import (
    AT,
    EVERY,
    PROGRAM,
    SETTINGS,
    STEPS,
    Case,
    Scene,
    judge,
)
from tests.cluster.conftest import _need_packages, _need_root
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, missing_packages, running_cluster
from tests.conftest import ROOT

ALL = os.environ.get("LAUNCHER_TEST_FAULTS") == "1"
TABLE = os.environ.get("LAUNCHER_TEST_FAULTS_TABLE", "")
KEPT = ("--checkpoint-every", str(EVERY), "--check", "off")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four nodes that Slurm gives up after 15 s; beside them two small file systems that all of them see."""
    _need_root()
    _need_packages(missing_packages())
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("this Python has no torchtitan")
    with tempfile.TemporaryDirectory(prefix="launcher-faults-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        for folder in ("site", "orders", "small", "tiny", "munge"):
            (directory / folder).mkdir()
        (directory / "site/sitecustomize.py").write_text(Path(__file__).with_name("orders.py").read_text())
        program = directory / "python"
        program.write_text(PROGRAM.format(directory=directory, python=sys.executable))
        program.chmod(0o755)
        # A job that is queued again waits as long as credentials last, two minutes by default.
        auth = {"AuthInfo": f"socket={directory}/munge/socket,cred_expire=5"}
        mounts = {"small": "256M", "tiny": "4M"}
        try:
            for folder, size in mounts.items():
                command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory / folder)]
                subprocess.run(command, check=True)
            with running_cluster(directory, settings=SETTINGS | auth) as made:
                yield made
        finally:
            for folder in mounts:
                subprocess.run(["umount", "--lazy", str(directory / folder)], check=False)


Baseline = Callable[[int], dict[int, float]]


@pytest.fixture(scope="module")
def baseline(cluster: Cluster) -> Baseline:
    """The loss of each step of a run on so many nodes that nothing interrupts."""
    known: dict[int, dict[int, float]] = {}

    def losses(nodes: int) -> dict[int, float]:
        if nodes not in known:
            scene = Scene(cluster, cluster.directory, f"baseline-{nodes}", nodes)
            scene.submit("--check", "off")
            scene.finished()
            known[nodes] = dict(scene.seen().kept)
            assert sorted(known[nodes]) == list(range(1, STEPS + 1)), scene.story()
            scene.mend()
        return known[nodes]

    return losses


# --- faults ------------------------------------------------------------------------------------------------------


def signal_a_rank(number: signal.Signals, place: int = -1) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.held()
        scene.kill("rank", scene.hosts()[place], number)
        scene.release()

    return fault


def kill_torchrun(place: int) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.held()
        scene.kill("torchrun", scene.hosts()[place])
        scene.release()

    return fault


def lose_nodes(count: int) -> Callable[[Scene], None]:
    """Never the first one, on which the job's script runs."""

    def fault(scene: Scene) -> None:
        scene.held()
        scene.lose(*scene.hosts()[-count:])
        scene.release()

    return fault


def requeue(scene: Scene) -> None:
    scene.held()
    scene.release()
    scene.slurm("scontrol", "requeue", scene.job)


# --- cases -------------------------------------------------------------------------------------------------------

CASES = [
    Case(
        name="rank-sigkill",
        what="a rank is killed (SIGKILL)",
        fault=signal_a_rank(signal.SIGKILL),
        causes=("killed", ""),
        options=KEPT,
        nodes=2,
        always=True,
    ),
    Case(
        name="node-lost-spare",
        what="a whole node is lost; the job has a spare one",
        fault=lose_nodes(1),
        causes=("node-failure", ""),
        options=KEPT,
        nodes=2,
        spares=1,
        leaves_out=True,
        always=True,
    ),
    Case(
        name="requeue-administrator",
        what="an administrator queues the job again (`scontrol requeue`)",
        fault=requeue,
        causes=("requeued", ""),
        options=KEPT,
        always=True,
    ),
]


@pytest.mark.parametrize("case", [case for case in CASES if ALL or case.always], ids=lambda case: case.name)
def test_a_fault(case: Case, cluster: Cluster, baseline: Baseline) -> None:
    losses = baseline(case.nodes)
    scene = Scene(cluster, cluster.directory, case.name, case.nodes)
    scene.order(*case.orders)
    try:
        scene.submit(*case.options, *(("--spares", str(case.spares)) if case.spares else ()))
        case.fault(scene)
        scene.finished()
        seen = scene.seen()
        wrong = judge(case, scene, seen, losses)
        assert not wrong, "\n".join([*wrong, scene.story()])
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{scene.story()}") from error
    finally:
        scene.mend()
