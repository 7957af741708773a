"""The launcher against a real Slurm: the unmodified job script, in a real squashfs, as root and as an ordinary user.

Only Pyxis is a stand-in (spank_container.c), and the GPUs are made up. With LAUNCHER_TEST_SLURM=1 the same tests run
on the cluster that is there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster.conftest import AS_ROOT, AS_USER, Launch, stand_in
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import slurm_run

OWN = pytest.mark.usefixtures("own_cluster")
DEBUG = ("submit", "--gpu", "cpu", "--config", "cpu.toml", "--recipe", "debug", "--yes")


@pytest.fixture
def idle_job(small_image: Path, launch: Launch) -> tuple[str | Path, ...]:
    """Arguments of a job that holds its nodes and does nothing: another program in the place of Python."""
    return in_place_of_python(small_image, launch.script("sleeper", "#!/bin/sh\necho started\nexec sleep 300\n"))


def in_place_of_python(image: Path, program: Path) -> tuple[str | Path, ...]:
    folder = program.parent
    return (*DEBUG, "--image", image, "--mount", f"{folder}:{folder}", "--python", program)


def began(run: Path) -> None:
    wait_for(lambda: any("started" in path.read_text() for path in (run / "logs").glob("0000-*.log")), "its step")


@AS_USER  # what root's jobs may is seen below
def test_debug_trains_in_a_squashfs_on_two_nodes(launch: Launch, train_image: Path) -> None:
    size = ("--nodes", "2", "--gpus-per-node", "2", "--steps", "8")
    words = ("--image", train_image, "--name", "train", "--follow", "--env", "API_TOKEN=hidden")
    done = launch(*DEBUG, *size, *words, timeout=900)
    logs = launch("logs", "train").stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs[-6000:]
    assert "train: COMPLETED" in done.stdout and "step 8/8" in done.stdout
    phases = re.findall(r"^train: (\w+)", done.stderr, re.M)
    assert phases[-2:] == ["training", "ending"] and {"checking", "loading"} & {*phases}, done.stderr
    assert "|CPU     |2 (4 ranks)                  |4         |step: 8  loss:" in done.stdout
    result = json.loads(launch("results", "train", "--json").stdout)
    assert (result["state"], result["gpus"], result["nodes_logged"], result["step"]) == ("COMPLETED", 4, 2, 8)
    assert (result["incomplete"], result["non_finite"]) == (False, False)
    run = launch.run("train")
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
    script = (launch.run("same") / "job.sbatch").read_text()
    assert shown.stdout.startswith(script)


def test_cancelled_while_running(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "long")
    run = launch.run("long")
    began(run)
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
    run, job_id = launch.run("short"), launch.status("short")["job_id"]
    if not (run / "end.json").exists():
        for name in ("job.json", "cancelled"):  # as if Slurm had forgotten the job
            (run / name).write_text((run / name).read_text().replace(job_id, "999999"))
    assert launch.state("short") == "CANCELLED"


@OWN
def test_waiting_for_nodes_and_cancelled_while_waiting(launch: Launch, idle_job: tuple[str, ...]) -> None:
    nodes = str(len(launch.slurm.nodes))
    launch(*idle_job, "--name", "first", "--nodes", nodes)
    launch.wait_for("first", "RUNNING")
    launch(*idle_job, "--name", "second", "--nodes", nodes, "--env", "A_TOKEN=x")
    status = launch.status("second")
    assert (status["state"], status["source"]) == ("PENDING", "squeue") and status["reason"]
    secret = launch.run("second") / "secret.env"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert [run["state"] for run in json.loads(launch("list", "--json").stdout)] == ["PENDING", "RUNNING"]
    assert "was PENDING" in launch("cancel", "second").stdout
    launch.wait_for("second", "CANCELLED")
    assert not secret.exists()


@OWN
@AS_ROOT
def test_a_time_limit(launch: Launch, idle_job: tuple[str, ...]) -> None:
    """An operator shortens it, to spare the test a minute."""
    launch(*idle_job, "--name", "late", "--time", "10")
    launch.wait_for("late", "RUNNING")
    run, job = launch.run("late"), launch.status("late")["job_id"]
    began(run)
    slurm_run(launch.slurm, ["scontrol", "update", f"JobId={job}", "EndTime=now+2seconds"])
    launch.wait_for("late", "TIMEOUT", seconds=180)
    wait_for((run / "end.json").exists, "end.json")
    (run / "job.json").write_text('{"job_id": "999999"}')
    assert launch.state("late") == "TIMEOUT"  # known from end.json alone


@OWN
@AS_ROOT
def test_a_node_that_fails(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "lost", "--nodelist", launch.slurm.nodes[1])
    launch.wait_for("lost", "RUNNING")
    node = f"NodeName={launch.slurm.nodes[1]}"
    slurm_run(launch.slurm, ["scontrol", "update", node, "State=DOWN", "Reason=test"])
    try:
        launch.wait_for("lost", "NODE_FAIL")
        assert launch("status", "lost").returncode == ExitStatus.JOB_FAILED
    finally:
        slurm_run(launch.slurm, ["scontrol", "update", node, "State=RESUME"])


@OWN
def test_refusals_of_slurm_are_shown(launch: Launch, idle_job: tuple[str, ...]) -> None:
    for arguments, said in (
        (("--partition", "nonsense", "--force"), "invalid partition"),
        (("--nodelist", "no-such-node", "--force"), "invalid node name"),
        (("--reservation", "none"), "reservation is invalid"),
    ):
        done = launch(*idle_job, "--name", "refused", *arguments)
        assert (done.returncode, said in done.stderr.lower()) == (ExitStatus.CLUSTER, True), (arguments, done.stderr)
        assert "sbatch: error" in done.stderr
        assert not launch.run("refused").exists()


def test_a_container_that_cannot_start_shows_why(launch: Launch, idle_job: tuple[str, ...]) -> None:
    launch(*idle_job, "--name", "mount", "--mount", "/nowhere/at/all:/x")
    launch.wait_for("mount", "FAILED")
    done = launch("status", "mount")
    assert done.returncode == ExitStatus.JOB_FAILED
    assert "source path does not exist: /nowhere/at/all" in done.stderr


def test_an_image_for_cpus_is_refused_on_gpu_nodes(launch: Launch, train_image: Path) -> None:
    done = launch("submit", "--gpu", "b200", "--image", train_image, "--recipe", "debug", "--yes")
    assert done.returncode == ExitStatus.INVALID and "is built without CUDA" in done.stderr, done.stderr


@OWN
def test_a_node_that_is_not_fit_shows_why(launch: Launch, train_image: Path) -> None:
    """The published recipe on nodes without GPUs: it stops at the check and never trains on a CPU."""
    image = stand_in(train_image, launch.directory / "lies.sqsh")
    here = ("--set", f"profile.arch={os.uname().machine}")
    launch("submit", "--gpu", "gb200", "--image", image, "--name", "unfit", "--recipe", "debug", "--yes", *here)
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
    """And nothing else of the submitter's environment."""
    strange = launch.directory / "my 'data' $(id) é"
    strange.mkdir()
    probe = launch.script(f"{strange.name}/probe", PROBE)
    image = stand_in(small_image, launch.directory / 'my "titan\'s" $image.sqsh')
    if launch.user and launch.user.uid != os.getuid():
        (launch.user.home / ".profile").write_text("export FROM_LOGIN_FILE=1\n")
    values = {"NASTY": NASTY, "NASTY_TOKEN": NASTY, "TEST_IMAGE": "mine"}
    asked = [word for name, value in values.items() for word in ("--env", f"{name}={value}")]
    shell = {"LD_PRELOAD": "", "CONDA_PREFIX": "/opt/conda", "HF_TOKEN": "secret", "SBATCH_EXPORT": "ALL"}
    done = launch(*in_place_of_python(image, probe), "--name", "values", *asked, timeout=300, **shell)
    assert done.returncode == 0, done.stderr
    launch.wait_for("values", "COMPLETED")
    run = launch.run("values")
    argv, environ, cwd, root = json.loads((run / "job" / "seen.json").read_text())
    assert argv == [str(probe), f"{run}/job/node.py", f"{run}/job/node.json"]
    assert environ.items() >= values.items()
    assert not {"CONDA_PREFIX", "HF_TOKEN", "PYTHONPATH", "FROM_LOGIN_FILE"} & set(environ)
    assert (cwd, environ["ENROOT_LOGIN_SHELL"]) == (str(run), "no")
    assert "work" not in root  # the container's root, not the host's


def test_killed_while_submitting(launch: Launch, idle_job: tuple[str, ...]) -> None:
    """As soon as sbatch may be at work. Whatever Slurm has, the run directory finds it again, and there is one job.

    Every other moment: tests/unit/test_secrets_left.py.
    """
    run = launch.run("killed")
    process = subprocess.Popen(
        [*launch.command, *map(str, idle_job), "--name", "killed", "--env", "A_TOKEN=hunter2"],
        cwd=launch.directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=launch.slurm.env | launch.variables(),
        **launch.account(),
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


@OWN
def test_the_profile_is_detected_or_asked_for(launch: Launch, small_image: Path) -> None:
    """gpu:gb200:4 on x86-64 contradicts the profile: it is not guessed."""
    done = launch("submit", "--image", small_image, "--yes")
    assert (done.returncode, "--gpu" in done.stderr) == (ExitStatus.NOT_FOUND, True)
    assert "gpu:gb200:4" in done.stderr and "x86_64" in done.stderr
