"""The launcher against a real Slurm: the unmodified job script, in a real squashfs, as root and as an ordinary user.

Only Pyxis is a stand-in (spank_container.c), and the GPUs are made up. With LAUNCHER_TEST_SLURM=1 the same tests run
on the cluster that is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, User, slurm_run
from tests.conftest import say_it_trains

CPU_ON_GPU_NODES = '[profile]\ngres = "gpu"\n'  # CPU ranks, but the made-up GPUs are asked for


class Launch:
    """`launcher ...` on the cluster, as one user, in a directory that all nodes see."""

    def __init__(self, slurm: Cluster, user: User | None, directory: Path, command: tuple[str, ...]) -> None:
        self.slurm, self.user, self.directory, self.command = slurm, user, directory, command

    def __call__(self, *arguments: str | Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *map(str, arguments)]
        done = slurm_run(self.slurm, command, self.user, self.directory, timeout, self.variables() | env)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr + done.stdout
        return done

    def variables(self) -> dict[str, str]:
        # Nodes that a test makes unfit are remembered for that test alone.
        return {"PYTHONPATH": f"{self.directory}/app", "XDG_CONFIG_HOME": f"{self.directory}/config"}

    def state(self, run: str) -> str:
        return str(json.loads(self("status", run, "--json").stdout)["state"])

    def job_id(self, run: str) -> str:
        return str(json.loads(self("status", run, "--json").stdout)["job_id"])

    def wait_for(self, run: str, *states: str, seconds: float = 120) -> str:
        end = time.monotonic() + seconds
        while (found := self.state(run)) not in states:
            assert time.monotonic() < end, f"{run} is still {found}: {self('logs', run).stdout[-3000:]}"
            time.sleep(0.3)
        return found


@pytest.fixture(params=["root", "ordinary user"])
def launch(
    request: pytest.FixtureRequest, slurm: Cluster, ordinary_user: User, app: Path, user_dir: Path
) -> Iterator[Launch]:
    user = None if request.param == "root" else ordinary_user
    if user is None and os.geteuid() != 0:
        pytest.skip("not root")
    python = install(user_dir / "app", app, user)
    made = Launch(slurm, user, user_dir, (python, "-m", "launcher"))
    (user_dir / "cpu.toml").write_text(CPU_ON_GPU_NODES if slurm.gpus_per_node else "")
    yield made
    for run in json.loads(made("list", "--json").stdout):
        if run["state"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            made("cancel", run["run"])


def install(folder: Path, app: Path, user: User | None) -> str:
    """The launcher that was copied for all tests, at this path; a Python for it."""
    folder.symlink_to(app)
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        account = {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}
        try:
            probe = subprocess.run(
                [python, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, **account
            )  # type: ignore[call-overload]
        except OSError:
            continue
        if probe.returncode == 0 and int(probe.stdout) >= 11:
            return python
    pytest.skip("no Python 3.11 that the ordinary user can run: apt install python3")


DEBUG = ("submit", "--gpu", "cpu", "--config", "cpu.toml", "--recipe", "debug", "--yes")


@pytest.fixture
def idle_job(small_image: Path, user_dir: Path) -> tuple[str | Path, ...]:
    """Arguments of a job that holds its nodes and does nothing: another program in the place of Python."""
    program = user_dir / "sleeper"
    program.write_text("#!/bin/sh\necho started\nexec sleep 300\n")
    program.chmod(0o755)
    return (*DEBUG, "--image", small_image, "--mount", f"{user_dir}:{user_dir}", "--python", str(program))


@pytest.mark.parametrize("launch", ["ordinary user"], indirect=True)  # what root's jobs may is seen below
def test_debug_trains_in_a_squashfs_on_two_nodes(launch: Launch, train_image: Path) -> None:
    done = launch(
        *DEBUG,
        "--image",
        train_image,
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--steps",
        "8",
        "--name",
        "train",
        "--follow",
        "--env",
        "API_TOKEN=hidden",
        timeout=900,
    )
    logs = launch("logs", "train").stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs[-6000:]
    assert "train: COMPLETED" in done.stdout and "step 8/8" in done.stdout
    phases = re.findall(r"^train: (\w+)", done.stderr, re.M)
    assert phases[-2:] == ["training", "ending"] and {"checking", "loading"} & {*phases}, done.stderr
    assert "|CPU     |2 (4 ranks)                  |4         |step: 8  loss:" in done.stdout
    result = json.loads(launch("results", "train", "--json").stdout)
    assert (result["state"], result["gpus"], result["nodes_logged"], result["step"]) == ("COMPLETED", 4, 2, 8)
    assert (result["incomplete"], result["non_finite"]) == (False, False)
    run = launch.directory / "runs" / "train"
    assert len([p for p in (run / "logs").glob("000*-*.log")]) == 2
    facts = [json.loads(path.read_text()) for path in sorted((run / "nodes").glob("0*.json"))]
    assert len(facts) == 2 and all(fact["allreduce_job_gbs"] > 0 and len(fact["speed"]) == 2 for fact in facts)
    check = json.loads((run / "nodes" / "check.json").read_text())
    assert check["ok"] and check["figures"]["product_tflops"]["min"] > 0 and "titan-check: 2 nodes, fit" in logs
    assert len({fact["host"] for fact in facts}) == 2 and all(fact["ok"] for fact in facts)
    assert logs.count("titan-node: ok") == 2
    end = json.loads((run / "end.json").read_text())
    assert (end["exit_code"], end["signal"]) == (0, "")
    assert not (run / "secret.env").exists()
    assert "hidden" not in logs + "".join(p.read_text() for p in run.rglob("*.json"))


def test_the_script_on_disk_is_the_rendered_one(launch: Launch, idle_job: tuple[str, ...]) -> None:
    shown = launch(*idle_job, "--name", "same", "--dry-run")
    assert launch(*idle_job, "--name", "same").returncode == 0
    script = (launch.directory / "runs" / "same" / "job.sbatch").read_text()
    assert shown.stdout.startswith(script)


def test_cancelled_while_running(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "long")
    run = launch.directory / "runs" / "long"
    wait_for(lambda: any("started" in path.read_text() for path in (run / "logs").glob("0000-*.log")), "its step")
    assert launch("cancel", "long").returncode == 0
    launch.wait_for("long", "CANCELLED")
    wait_for((run / "end.json").exists, "end.json")  # Slurm may say CANCELLED before the script has written it
    end = json.loads((run / "end.json").read_text())
    # Slurm signals step and script at once. Where srun is the first to end, Slurm's own word tells of the cancelling.
    assert end["signal"] == "TERM" or "CANCELLED" in end["slurm"] or "COMPLETING" in end["slurm"], end
    (run / "job.json").write_text('{"job_id": "999999"}')
    (run / "cancelled").unlink()
    assert launch.state("long") == "CANCELLED"  # known from end.json alone


def test_cancelled_before_its_script_began(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "short")
    launch("cancel", "short")
    launch.wait_for("short", "CANCELLED")
    run, job_id = launch.directory / "runs" / "short", launch.job_id("short")
    if not (run / "end.json").exists():
        for name in ("job.json", "cancelled"):  # as if Slurm had forgotten the job
            (run / name).write_text((run / name).read_text().replace(job_id, "999999"))
    assert launch.state("short") == "CANCELLED"


def test_waiting_for_nodes_and_cancelled_while_waiting(launch: Launch, idle_job: tuple[str, ...]) -> None:
    nodes = str(len(launch.slurm.nodes))
    if launch.slurm.record is None:
        pytest.skip("takes every node of the cluster")
    launch(*idle_job, "--name", "first", "--nodes", nodes)
    launch.wait_for("first", "RUNNING")
    launch(*idle_job, "--name", "second", "--nodes", nodes, "--env", "A_TOKEN=x")
    status = json.loads(launch("status", "second", "--json").stdout)
    assert (status["state"], status["source"]) == ("PENDING", "squeue") and status["reason"]
    assert (launch.directory / "runs" / "second" / "secret.env").stat().st_mode & 0o777 == 0o600
    assert [run["state"] for run in json.loads(launch("list", "--json").stdout)] == ["PENDING", "RUNNING"]
    assert "was PENDING" in launch("cancel", "second").stdout
    launch.wait_for("second", "CANCELLED")
    assert not (launch.directory / "runs" / "second" / "secret.env").exists()


def test_a_time_limit(launch: Launch, idle_job: tuple[str, ...]) -> None:
    if launch.slurm.record is None or launch.user is not None:
        pytest.skip("an operator shortens the limit, to spare the test a minute")
    launch(*idle_job, "--name", "late", "--time", "10")
    launch.wait_for("late", "RUNNING")
    logs = launch.directory / "runs" / "late" / "logs"
    wait_for(lambda: any("started" in path.read_text() for path in logs.glob("0000-*.log")), "its step")
    job = json.loads(launch("status", "late", "--json").stdout)["job_id"]
    slurm_run(launch.slurm, ["scontrol", "update", f"JobId={job}", "EndTime=now+2seconds"])
    launch.wait_for("late", "TIMEOUT", seconds=180)
    wait_for((logs.parent / "end.json").exists, "end.json")
    (logs.parent / "job.json").write_text('{"job_id": "999999"}')
    assert launch.state("late") == "TIMEOUT"  # known from end.json alone


def test_a_node_that_fails(launch: Launch, idle_job: tuple[str, ...]) -> None:
    if launch.slurm.record is None or launch.user is not None:
        pytest.skip("takes a node down")
    launch(*idle_job, "--name", "lost", "--nodelist", launch.slurm.nodes[1])
    launch.wait_for("lost", "RUNNING")
    node = f"NodeName={launch.slurm.nodes[1]}"
    slurm_run(launch.slurm, ["scontrol", "update", node, "State=DOWN", "Reason=test"])
    try:
        launch.wait_for("lost", "NODE_FAIL")
        assert launch("status", "lost").returncode == ExitStatus.JOB_FAILED
    finally:
        slurm_run(launch.slurm, ["scontrol", "update", node, "State=RESUME"])


def test_refusals_of_slurm_are_shown(launch: Launch, idle_job: tuple[str, ...]) -> None:
    if launch.slurm.record is None:
        pytest.skip("another cluster has other limits")
    for arguments, said in (
        (("--partition", "nonsense", "--force"), "invalid partition"),
        (("--nodelist", "no-such-node", "--force"), "invalid node name"),
        (("--reservation", "none"), "reservation is invalid"),
    ):
        done = launch(*idle_job, "--name", "refused", *arguments)
        assert (done.returncode, said in done.stderr.lower()) == (ExitStatus.CLUSTER, True), (arguments, done.stderr)
        assert "sbatch: error" in done.stderr
        assert not (launch.directory / "runs" / "refused").exists()


def test_a_container_that_cannot_start_shows_why(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "mount", "--mount", "/nowhere/at/all:/x")
    launch.wait_for("mount", "FAILED")
    done = launch("status", "mount")
    assert done.returncode == ExitStatus.JOB_FAILED
    assert "source path does not exist: /nowhere/at/all" in done.stderr


def stand_in(image: Path, path: Path) -> None:
    """The image under another name, with a sidecar that says that it can train on any node."""
    if image.stat().st_dev == path.parent.stat().st_dev:
        os.link(image, path)
    else:
        shutil.copy(image, path)
    path.chmod(0o644)
    say_it_trains(path)


def test_an_image_for_cpus_is_refused_on_gpu_nodes(launch: Launch, train_image: Path) -> None:
    done = launch("submit", "--gpu", "b200", "--image", train_image, "--recipe", "debug", "--yes")
    assert done.returncode == ExitStatus.INVALID and "is built without CUDA" in done.stderr, done.stderr


def test_a_node_that_is_not_fit_shows_why(launch: Launch, train_image: Path) -> None:
    """The published recipe on nodes without GPUs: it stops at the check and never trains on a CPU."""
    image = launch.directory / "lies.sqsh"
    stand_in(train_image, image)
    launch(
        "submit",
        "--gpu",
        "gb200",
        "--image",
        image,
        "--name",
        "unfit",
        "--recipe",
        "debug",
        "--yes",
        "--set",
        f"profile.arch={os.uname().machine}",
    )
    if launch.slurm.record is None:
        pytest.skip("the nodes of this cluster may have GPUs")
    launch.wait_for("unfit", "FAILED")
    done = launch("status", "unfit")
    assert done.returncode == ExitStatus.NODES_UNFIT
    assert "is not fit to train: " in done.stderr and "built without CUDA" in done.stderr, done.stderr


PROBE = """#!/usr/bin/python3
import json, os, sys
folder = os.path.dirname(sys.argv[1])
open(folder + "/seen.json", "w").write(json.dumps([sys.argv, dict(os.environ), os.getcwd(), os.listdir("/")]))
"""
NASTY = "a b'c\"d$(id)`id`\\ ;&|<>*?[x]{y}~#!%é漢=,:"


def test_values_reach_the_container_unchanged(launch: Launch, small_image: Path) -> None:
    strange = launch.directory / "my 'data' $(id) é"
    (strange / "in").mkdir(parents=True)
    probe = strange / "probe"
    probe.write_text(PROBE)
    probe.chmod(0o755)
    image = launch.directory / 'my "titan\'s" $image.sqsh'
    stand_in(small_image, image)
    done = launch(
        *DEBUG,
        "--image",
        image,
        "--name",
        "values",
        "--mount",
        f"{strange}:{strange}",
        "--python",
        str(probe),
        "--env",
        f"NASTY={NASTY}",
        "--env",
        f"NASTY_TOKEN={NASTY}",
        "--env",
        "TEST_IMAGE=mine",
    )
    assert done.returncode == 0, done.stderr
    launch.wait_for("values", "COMPLETED")
    argv, environ, cwd, root = json.loads((launch.directory / "runs" / "values" / "job" / "seen.json").read_text())
    run = str(launch.directory / "runs" / "values")
    assert argv == [str(probe), f"{run}/job/node.py", f"{run}/job/node.json"]
    assert (environ["NASTY"], environ["NASTY_TOKEN"], environ["TEST_IMAGE"]) == (NASTY, NASTY, "mine")
    assert (cwd, environ["ENROOT_LOGIN_SHELL"]) == (run, "no")
    assert "work" not in root  # the container's root, not the host's


def test_the_submitters_environment_stays_at_home(launch: Launch, small_image: Path) -> None:
    probe = launch.directory / "probe"
    probe.write_text(PROBE)
    probe.chmod(0o755)
    if launch.user and launch.user.uid != os.getuid():
        (launch.user.home / ".profile").write_text("export FROM_LOGIN_FILE=1\n")
    launch(
        *DEBUG,
        "--image",
        small_image,
        "--name",
        "clean",
        "--mount",
        f"{launch.directory}:{launch.directory}",
        "--python",
        str(probe),
        LD_PRELOAD="",
        CONDA_PREFIX="/opt/conda",
        HF_TOKEN="secret",
        SBATCH_EXPORT="ALL",
    )
    launch.wait_for("clean", "COMPLETED")
    _, environ, _, _ = json.loads((launch.directory / "runs" / "clean" / "job" / "seen.json").read_text())
    assert not {"CONDA_PREFIX", "HF_TOKEN", "PYTHONPATH", "FROM_LOGIN_FILE"} & set(environ)


def test_killed_while_submitting(launch: Launch, idle_job: tuple[str, ...]) -> None:
    """As soon as sbatch may be at work. Whatever Slurm has, the run directory finds it again, and there is one job.

    Every other moment: tests/unit/test_secrets_left.py.
    """
    run = launch.directory / "runs" / "killed"
    account = {"user": launch.user.uid, "group": launch.user.gid, "extra_groups": []} if launch.user else {}
    process = subprocess.Popen(  # type: ignore[call-overload]
        [*launch.command, *map(str, idle_job), "--name", "killed", "--env", "A_TOKEN=hunter2"],
        cwd=launch.directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=launch.slurm.env | launch.variables(),
        **account,
    )
    wait_for(run.exists, "the run directory")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: launch.state("killed") != "SUBMITTING", "the end of sbatch")
    listed = slurm_run(launch.slurm, ["squeue", "-h", "-o", "%i|%j"]).stdout.split()
    jobs = [line.split("|")[0] for line in listed if "|killed." in line]
    status = launch("status", "killed", "--json")
    if jobs:
        assert json.loads(status.stdout)["job_id"] == jobs[0]
        assert launch("cancel", "killed").returncode == 0
        assert launch.wait_for("killed", "CANCELLED") == "CANCELLED"
    else:
        assert status.returncode == ExitStatus.JOB_UNKNOWN
    assert len(jobs) <= 1
    launch("list")
    files = [path for path in (launch.directory / "runs").rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


def test_the_profile_is_detected_or_asked_for(launch: Launch, small_image: Path) -> None:
    """gpu:gb200:4 on x86-64 contradicts the profile: it is not guessed."""
    if launch.slurm.record is None:
        pytest.skip("another cluster has other GPUs")
    done = launch("submit", "--image", small_image, "--yes")
    assert (done.returncode, "--gpu" in done.stderr) == (ExitStatus.NOT_FOUND, True)
    assert "gpu:gb200:4" in done.stderr and "x86_64" in done.stderr
