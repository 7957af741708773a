"""Faults in the middle of training: a run goes on after them with the losses of one that was never interrupted.

Slurm, its nodes, the job script and the trainer are real; the trainer waits at a step while it is broken (orders.py).
Two cases run always; `make faults` runs all and writes their table into docs/fault-campaign.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.campaign import (
    AT,
    EVERY,
    PROGRAM,
    SETTINGS,
    STEPS,
    Case,
    Scene,
    Seen,
    judge,
    note,
)
from tests.cluster.conftest import _need_packages, _need_root, debian_13
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, Release, missing_packages, running_cluster

ALL = os.environ.get("LAUNCHER_TEST_FAULTS", "")  # the Slurm on which all cases run: "1" this machine's, or NEWER
NEWER = "24.11"


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
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
        release = Release(debian_13(), "", "") if request.param == NEWER else None
        # Jobs of the other release see its files; process 1 of a node sees this machine's, and so the tests' Python.
        python = f"chroot /proc/1/root {sys.executable}" if release else sys.executable
        program = directory / "python"
        program.write_text(PROGRAM.format(directory=directory, python=python))
        program.chmod(0o755)
        # A job that is queued again waits as long as credentials last, two minutes by default.
        auth = {"AuthInfo": f"socket={directory}/munge/socket,cred_expire=5"}
        mounts = {"small": "256M", "tiny": "4M"}
        try:
            for folder, size in mounts.items():
                command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory / folder)]
                subprocess.run(command, check=True)
            with running_cluster(directory, release=release, settings=SETTINGS | auth) as made:
                yield made
        finally:
            for folder in mounts:
                subprocess.run(["umount", "--lazy", str(directory / folder)], check=False)


Fault = Callable[[Scene], None]
Baseline = Callable[[Cluster, int], Seen]
LATE = 10  # another step to break at: two checkpoints lie before it


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    """A run on so many nodes that nothing interrupts. Its losses are the same with any Slurm."""
    known: dict[int, Seen] = {}

    def whole(cluster: Cluster, nodes: int) -> Seen:
        if nodes not in known:
            scene = Scene(cluster, cluster.directory, f"baseline-{nodes}", nodes)
            scene.submit("--check", "off")
            scene.finished()
            known[nodes] = scene.seen()
            assert [step for step, _ in known[nodes].kept] == list(range(1, STEPS + 1)), scene.story()
            scene.mend()
        return known[nodes]

    return whole


# --- faults ------------------------------------------------------------------------------------------------------


def held(act: Callable[[Scene], object], step: int | str = AT) -> Fault:
    """Done while all ranks wait at the step."""

    def fault(scene: Scene) -> None:
        scene.held(step)
        act(scene)
        scene.release()

    return fault


def kill(kind: str = "rank", number: signal.Signals = signal.SIGKILL, step: int | str = AT) -> Fault:
    return held(lambda scene: scene.kill(kind, scene.other(), number), step)


def kill_slurmd_for_a_moment(scene: Scene) -> None:
    scene.kill_slurmd(scene.other())
    time.sleep(3)
    scene.start_slurmd(scene.other())


def kill_slurmd(scene: Scene) -> None:
    scene.victims.append(scene.other())
    scene.kill_slurmd(scene.other())
    scene.until(lambda: scene.said("Node failure"), "Slurm to give the node up")


def lose_a_node(scene: Scene) -> None:
    scene.lose(scene.other())


def lose_a_node_of_too_few(scene: Scene) -> None:
    others = [node for node in scene.cluster.nodes if node not in scene.hosts()]
    scene.slurm("scontrol", "update", f"NodeName={','.join(others)}", "State=DRAIN", "Reason=test")
    scene.lose(scene.other())


def lose_two_nodes(scene: Scene) -> None:
    """One that trains, and a spare one."""
    spare = next(node for node in scene.cluster.nodes if node not in (*scene.hosts(), scene.of_job("BatchHost")))
    scene.lose(scene.other(), spare)


def lose_a_node_and_requeue(scene: Scene) -> None:
    """First a spare node trains, then the first node is no more fit to."""
    scene.held()
    scene.order(f"{LATE} hold")
    lose_a_node(scene)
    scene.held(LATE)
    sicken(scene, scene.of_job("BatchHost"))
    scene.slurm("scontrol", "requeue", scene.job)
    scene.release()


def kill_a_rank_and_lose_its_node(scene: Scene) -> None:
    scene.kill("rank", scene.other())
    scene.lose(scene.other())


def fill_the_disk(scene: Scene) -> None:
    with contextlib.suppress(OSError), open(scene.directory / "small/filler", "wb") as filler:
        while True:
            filler.write(bytes(1 << 20))


def damage(how: Callable[[Path], None], *steps: int) -> Fault:
    """The checkpoints of these steps, before a rank is killed."""

    def act(scene: Scene) -> None:
        for step in steps:
            how(scene.checkpoints / f"step-{step}")
        scene.kill("rank", scene.other())

    return held(act, LATE)


def cut_a_file(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)


def spoil_the_metadata(checkpoint: Path) -> None:
    with open(checkpoint / ".metadata", "r+b") as file:
        file.write(b"nothing that can be read")


def remove_the_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def sicken(scene: Scene, host: str) -> None:
    Path(f"{scene.orders}.sick.{host}").touch()


def kill_a_rank_and_sicken_its_node(scene: Scene) -> None:
    host = scene.other()
    scene.victims.append(host)
    sicken(scene, host)
    scene.kill("rank", host)


def sick_from_the_first(scene: Scene) -> None:
    """Which node Slurm chooses is known: the first ones. Orders are read before the job begins."""
    scene.victims.append(scene.cluster.nodes[1])


def break_the_first_gpu(scene: Scene) -> None:
    """An imitation: the words are CUDA's, and there is no GPU. The job's script goes on where no rank does."""
    host = scene.of_job("BatchHost")
    scene.victims.append(host)
    with open(next(scene.path.glob(f"logs/*-{host}.log")), "a") as log:
        log.write("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n")
    scene.kill("rank", host)


def run_out_of_memory(scene: Scene) -> None:
    """An imitation: nothing limits memory here. The words are those of slurmstepd."""
    with open(scene.path / "logs/job.log", "a") as log:
        log.write(f"slurmstepd: error: Detected 1 oom_kill event in StepId={scene.job}.0. Some of the step tasks have ")
        log.write("been OOM Killed.\n")
    scene.kill("rank", scene.other())


def reach_the_time_limit(scene: Scene) -> None:
    """The limit comes to the job: Slurm counts in minutes, and looks twice in each. After step 8 no more are done."""
    scene.held()
    scene.set_time_limit(near=True)
    scene.until(lambda: scene.said("the time limit is near"), "the job to be told of its time limit")
    scene.order(f"{LATE} hold")
    if "--continue" in CASES[scene.run].options:
        scene.until(lambda: scene.of_job("Restarts") == "1", "the job to be queued again")
        scene.set_time_limit(near=False)
        scene.release()


def preempt(scene: Scene) -> None:
    scene.slurm("sbatch", "-p", "urgent", "-N", str(len(scene.cluster.nodes)), "--exclusive", "--wrap", "sleep 1")


def requeue_with_secrets(scene: Scene) -> None:
    scene.held()
    scene.order(f"{LATE} hold")
    scene.slurm("scontrol", "requeue", scene.job)
    scene.held(LATE)
    variables = Path(f"/proc/{scene.processes('rank')[0]}/environ").read_bytes().split(b"\0")
    assert b"SECRET_WORD=hidden" in variables
    scene.release()


def resume(scene: Scene) -> None:
    scene.release()
    done = scene.launch("resume", scene.run)
    assert done.returncode == 0, done.stdout + done.stderr


def cancel_and_resume(scene: Scene) -> None:
    scene.held()
    scene.slurm("scancel", scene.job)
    scene.finished()
    assert scene.state() == "CANCELLED"
    resume(scene)


def fail_and_resume(scene: Scene) -> None:
    scene.finished()
    assert scene.state() == "FAILED"
    resume(scene)


def resume_twice_at_once(scene: Scene) -> None:
    scene.finished()
    scene.release()
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda _: scene.launch("resume", scene.run), range(2))]
    assert sorted(one.returncode == 0 for one in done) == [False, True], "\n".join(map(str, done))


def kill_the_batch_script(scene: Scene) -> None:
    scene.held()
    os.kill(scene.batch_script(), signal.SIGKILL)
    wait_for(lambda: scene.of_job("JobState") not in ("RUNNING", "COMPLETING"), "the end of the job", 60)
    assert scene.state() == "FAILED"
    resume(scene)


def stop_the_controller(scene: Scene) -> None:
    scene.held()
    scene.stop_controller()
    scene.release()
    time.sleep(10)
    scene.start_controller()


def nothing(scene: Scene) -> None:
    """The orders are enough."""


# --- cases -------------------------------------------------------------------------------------------------------


def _kept(*more: str, every: int = EVERY, check: str = "off") -> tuple[str, ...]:
    return ("--checkpoint-every", str(every), "--check", check, *more)


QUICK = _kept(check="quick")
LIMITED = _kept("--time", "00:04:00")
FULL = _kept("--checkpoint-dir", "{directory}/small")
BURNS = _kept("--set", "optimizer.param_groups.0.optimizer_kwargs.lr=1e30")
AGAIN = (f"{AT} kill 9",)
BEFORE_LATE = (f"{LATE} hold",)
FAILS = "FAILED"
SPARE: dict[str, Any] = {"nodes": 2, "spares": 1, "leaves_out": True}
_CASES = {
    ("rank-sigkill", "a rank is killed (SIGKILL)"): Case(kill(), "killed", nodes=2, always=True),
    ("rank-sigsegv", "a rank crashes (SIGSEGV)"): Case(kill(number=signal.SIGSEGV), "crashed"),
    ("rank-sigterm", "a rank is ended (SIGTERM)"): Case(kill(number=signal.SIGTERM), "terminated"),
    ("rank-sigabrt", "a rank aborts (SIGABRT)"): Case(kill(number=signal.SIGABRT), "aborted"),
    ("torchrun-first", "torchrun of the first node is killed"): Case(
        held(lambda scene: scene.kill("torchrun", scene.hosts()[0])), "killed", nodes=2
    ),
    ("torchrun-second", "torchrun of the second node is killed"): Case(
        held(lambda scene: scene.kill("torchrun", scene.hosts()[1])), "killed", nodes=2
    ),
    ("slurmd-restarted", "slurmd of a node is killed, and back after 3 s"): Case(
        held(kill_slurmd_for_a_moment), nodes=2
    ),
    ("slurmd-killed", "slurmd of a node is killed and stays away; the job has a spare node"): Case(
        held(kill_slurmd), "node-failure", **SPARE
    ),
    ("node-lost-spare", "a node is lost; the job has a spare one"): Case(held(lose_a_node), "node-failure", **SPARE),
    (
        "node-lost-requeued",
        "a node is lost; the job has a spare one, is then queued again, and its first node fails the check",
    ): Case(lose_a_node_and_requeue, "node-failure requeued", **SPARE, options=QUICK, always=True),
    ("node-lost-queue", "a node is lost; the partition has another one"): Case(
        held(lose_a_node), "node-failure", nodes=2, leaves_out=True
    ),
    ("node-lost-none", "a node is lost, and there is no other one"): Case(
        held(lose_a_node_of_too_few), "node-failure", FAILS, "too-few-nodes", nodes=2, leaves_out=True, reaches=AT
    ),
    ("first-node-lost", "the node of the job's script is lost"): Case(
        held(lambda scene: scene.lose(scene.of_job("BatchHost"))), "requeued", nodes=2
    ),
    ("first-gpu-broken", "a rank of the first node is killed, with CUDA's words; the job has a spare node"): Case(
        held(break_the_first_gpu), "gpu-broken", **SPARE
    ),
    ("network-cut", "the network of a node is cut; the job has a spare node"): Case(
        held(lambda scene: scene.cut(scene.other())), "node-failure", **SPARE
    ),
    ("disk-full", "the disk is full while a checkpoint is written"): Case(
        held(fill_the_disk), "disk-full", FAILS, "cause", options=FULL, reaches=AT
    ),
    ("quota", "the quota is reached (an error of that number, raised in the trainer)"): Case(
        nothing, "quota", FAILS, "cause", orders=(f"{AT} quota",), reaches=AT
    ),
    ("checkpoint-cut", "a file of the last checkpoint is cut, and a rank killed"): Case(
        damage(cut_a_file, 8), "killed", orders=BEFORE_LATE, repeats=LATE - 4
    ),
    ("metadata-spoiled", ".metadata of the last checkpoint is overwritten, and a rank killed"): Case(
        damage(spoil_the_metadata, 8), "killed", orders=BEFORE_LATE, repeats=LATE - 4
    ),
    ("metadata-missing", ".metadata of the last checkpoint is missing, and a rank killed"): Case(
        damage(remove_the_metadata, 8), "killed", orders=BEFORE_LATE, repeats=LATE - 4
    ),
    ("all-damaged", "every checkpoint is damaged, and a rank killed"): Case(
        damage(cut_a_file, 4, 8), "killed", orders=BEFORE_LATE, repeats=LATE
    ),
    ("unfit-later-spare", "a rank is killed, and its node fails the next check; the job has a spare node"): Case(
        held(kill_a_rank_and_sicken_its_node), "killed", nodes=2, spares=1, options=QUICK
    ),
    ("unfit-later-queue", "a rank is killed, and its node fails the next check; the partition has another one"): Case(
        held(kill_a_rank_and_sicken_its_node), "killed node-unfit", nodes=2, options=QUICK, leaves_out=True
    ),
    ("unfit-first-spare", "a node fails the first check; the job has a spare node"): Case(
        sick_from_the_first, nodes=2, spares=1, options=QUICK, orders=()
    ),
    ("unfit-first-queue", "a node fails the first check; the partition has another one"): Case(
        sick_from_the_first, "node-unfit", nodes=2, options=QUICK, orders=(), leaves_out=True
    ),
    ("nan", "the loss becomes NaN (a learning rate of 1e30)"): Case(
        nothing, "loss-not-finite", FAILS, "cause", options=BURNS, orders=(), reaches=1, other_losses=True
    ),
    ("oom-kill", "main memory runs out (a rank killed, and Slurm's words for it)"): Case(
        held(run_out_of_memory), "oom-kill", FAILS, "cause", reaches=AT
    ),
    ("exception", "the trainer raises an error of Python's; after it, resumed by hand"): Case(
        fail_and_resume, "?|", orders=(f"{AT} raise",)
    ),
    ("time-limit", "the time limit comes"): Case(
        reach_the_time_limit, "time-limit", "TIMEOUT", "cause", options=LIMITED, reaches=LATE
    ),
    ("time-limit-continue", "the time limit comes, with --continue 1"): Case(
        reach_the_time_limit, "time-limit", options=(*LIMITED, "--continue", "1")
    ),
    ("preempted", "another job of a higher tier takes the nodes"): Case(held(preempt), "requeued|preempted"),
    ("requeued", "an administrator queues the job again"): Case(
        held(lambda scene: scene.slurm("scontrol", "requeue", scene.job)), "requeued"
    ),
    ("secrets", "the job is queued again, and has secrets (--env NAME)"): Case(
        requeue_with_secrets, "requeued", options=_kept("--env", "SECRET_WORD")
    ),
    ("cancelled", "scancel; after it, resumed by hand"): Case(cancel_and_resume, "?"),
    ("controller", "slurmctld is killed, and back after 10 s"): Case(stop_the_controller),
    ("rank-and-node", "a rank is killed and its node lost at once; the job has a spare node"): Case(
        held(kill_a_rank_and_lose_its_node), "killed|node-failure", **SPARE
    ),
    ("two-nodes", "two nodes are lost at once; the job has two spare nodes"): Case(
        held(lose_two_nodes), "node-failure", **SPARE | {"spares": 2}
    ),
    ("start-rank", "a rank is killed before its first step"): Case(
        kill(step="start"), "killed", orders=("start hold",)
    ),
    ("start-node", "node.py is killed while it checks the node"): Case(
        kill("node.py", step="check"), "killed", orders=("check hold",)
    ),
    ("crash-loop", "a rank dies at the same step of each attempt, before a checkpoint"): Case(
        nothing,
        "killed killed killed",
        FAILS,
        "no-progress",
        options=_kept(every=10),
        orders=AGAIN,
        repeats=AT,
        reaches=AT,
    ),
    ("max-restarts", "a rank dies at the same step of each attempt, with --max-restarts 1"): Case(
        nothing, "killed killed", FAILS, "max-restarts", options=_kept("--max-restarts", "1"), orders=AGAIN, reaches=AT
    ),
    ("two-resumes", "two `launcher resume` at once, of a run that failed"): Case(
        resume_twice_at_once, "?|quota", orders=(f"{AT} quota",)
    ),
    ("batch-script", "the job's script is killed (SIGKILL); after it, resumed by hand"): Case(
        kill_the_batch_script, "?"
    ),
}
CASES = {name: replace(case, what=what) for (name, what), case in _CASES.items()}


USUAL = [("1", name) for name, case in CASES.items() if case.always] + [(NEWER, "node-lost-requeued")]


@pytest.mark.parametrize(
    ("cluster", "name"), [(ALL, name) for name in CASES] if ALL else USUAL, indirect=["cluster"], scope="module"
)
def test_a_fault(name: str, cluster: Cluster, baseline: Baseline) -> None:
    case = CASES[name]
    whole = baseline(cluster, case.nodes)
    scene = Scene(cluster, cluster.directory, name, case.nodes)
    scene.order(*case.orders)
    if case.fault is sick_from_the_first:
        sicken(scene, cluster.nodes[1])
    try:
        options = [option.format(directory=cluster.directory) for option in case.options or _kept()]
        scene.submit(*options, "--spares", str(case.spares))
        case.fault(scene)
        scene.finished()
        seen = scene.seen()
        wrong = judge(case, scene, seen, whole)
        note(name, case, seen, whole, wrong)
        assert not wrong, "\n".join([*wrong, scene.story()])
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{scene.story()}") from error
    finally:
        scene.mend()
