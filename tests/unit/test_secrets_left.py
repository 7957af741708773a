"""What a launcher or a job that was killed leaves behind: no secret that no job needs, and no half of a run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from launcher.runs.directory import remove_left_over
from tests.conftest import Launch
from tests.unit.test_submission import SBATCH, SUBMIT, Fake, jobs, slurm, start, wait_for

__all__ = ["slurm"]  # a fixture

SECRET = ("--env", "A_TOKEN=hunter2")
SAMPLE = ("--recipe", "debug", "--data", "sample", "--tokenizer", "sample")  # takes a while to write
KILLS = int(os.environ.get("LAUNCHER_TEST_KILLS", "20"))


def holding(runs: Path) -> set[str]:
    """The directories below `runs` in which some file holds the secret."""
    files = [path for path in runs.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    return {path.relative_to(runs).parts[0] for path in files}


def test_many_kills_double_lose_and_leave_nothing(launch: Launch, slurm: Fake, image: Path) -> None:
    """LAUNCHER_TEST_KILLS=200 kills that many, spread over the whole start of a submission."""
    runs, moments = image.parent / "runs", random.Random(7)
    began = time.monotonic()
    # In a process of its own, as those that are killed.
    assert launch(*SUBMIT[:-1], "whole", *SECRET, *SAMPLE, alone=True).returncode == 0
    whole_s = time.monotonic() - began
    left: set[str] = set()
    for number in range(KILLS):
        process = start(*SUBMIT[:-1], f"k{number}", *SECRET, *SAMPLE)
        time.sleep((1.4 - 1.2 * moments.random() ** 2) * whole_s)  # more of them where files are written
        process.kill()
        process.communicate()
        time.sleep(0.1)  # an sbatch that was started goes on by itself
        submitted = {line.split()[1].rpartition(".")[0] for line in jobs(image)}
        left |= holding(runs) - submitted
    time.sleep(0.5)
    for path in runs.glob(".k*"):
        os.utime(path, (0, 0))  # a younger one without secrets may have a maker that is about to lock it
    listed = {row["run"]: row["job_id"] for row in json.loads(launch("list", "--json").stdout)}
    in_slurm = [(line.split()[1].rpartition(".")[0], line.split()[0]) for line in jobs(image)]
    print(f"{KILLS} kills in {whole_s:.2f} s: {len(in_slurm) - 1} submitted, {len(left)} left a secret for a while")
    assert len({name for name, _ in in_slurm}) == len(in_slurm), "doubled"
    assert [(name, job_id) for name, job_id in in_slurm if listed.get(name) != job_id] == [], "lost"
    assert holding(runs) == {name for name, _ in in_slurm}
    assert [path.name for path in runs.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "lock", "goes"),
    [
        (".r.123.tmp", "free", True),
        (".r.123.refused", "free", True),
        (".r.123.tmp", "none, and empty", True),
        (".r.123.tmp", "none", False),
        (".r.123.tmp", "held", False),
        (".r.123.tmp", "link", False),
        (".r.tmp", "free", False),
        ("r", "free", False),
        (".a-link.1.tmp", "directory is a link", False),
        (".theirs.1.tmp", "directory is somebody else's", False),
    ],
)
def test_only_what_a_dead_launcher_made_is_removed(name: str, lock: str, goes: bool, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / name
    real = tmp_path / "elsewhere" if lock == "directory is a link" else directory
    real.mkdir(parents=True)
    if lock == "none, and empty":
        os.utime(real, (0, 0))
    else:
        (real / "secret.env").touch()
    directory.parent.mkdir(exist_ok=True)
    if real != directory:
        directory.symlink_to(real)
    if lock == "link":
        (real / "submit.lock").symlink_to(tmp_path / "their.lock")
    elif not lock.startswith("none"):
        (real / "submit.lock").touch()
    if lock.endswith("else's"):
        if os.getuid() != 0:
            pytest.skip("needs root")
        os.chown(directory, 65534, 65534)
    with open(tmp_path / "other" if lock != "held" else real / "submit.lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_left_over(tmp_path / "runs")
    assert os.path.lexists(directory) is not goes and (goes or (real / "secret.env").exists())


def cut_off(launch: Launch, slurm: Fake, image: Path) -> Path:
    """A run whose launcher and sbatch were killed before Slurm had it."""
    here = image.parent / "here"
    slurm("sbatch", f"echo $$ >{here}.new; mv {here}.new {here}; exec sleep 600")
    process = start(*SUBMIT, *SECRET)
    wait_for(here.exists)
    process.kill()
    process.communicate()
    os.kill(int(here.read_text()), 9)
    slurm("sbatch", SBATCH)
    time.sleep(0.1)
    return image.parent / "runs" / "r"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


COMMANDS = {"list": ("list",), "status": ("status", "r"), "submit": (*SUBMIT[:-1], "other")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_was_cut_off_loses_its_secret(command: str, launch: Launch, slurm: Fake, image: Path) -> None:
    run = cut_off(launch, slurm, image)
    assert (run / "secret.env").exists()
    launch(*COMMANDS[command])
    assert not (run / "secret.env").exists()
    late = subprocess.run(
        ["bash", str(run / "job.sbatch")], env=os.environ | {"SLURM_JOB_ID": "9"}, capture_output=True
    )
    assert late.returncode == 75  # should Slurm have it after all
    assert "UNKNOWN" in launch("status", "r").stdout
    assert launch("cancel", "r").returncode == 0 and "CANCELLED" in launch("status", "r").stdout


@pytest.mark.parametrize("case", ["another host", "squeue silent", "in doubt", "somebody else's"])
def test_where_a_job_may_still_come_its_secret_stays(case: str, launch: Launch, slurm: Fake, image: Path) -> None:
    if case == "in doubt":
        slurm("sbatch", "echo nonsense")
        launch(*SUBMIT, *SECRET)
        run = image.parent / "runs" / "r"
    else:
        run = cut_off(launch, slurm, image)
    if case == "another host":
        edit(run / "intent.json", host="login7")
    elif case == "squeue silent":
        slurm("squeue", "exit 1")
    elif case == "somebody else's":
        if os.getuid() != 0:
            pytest.skip("needs root")
        os.chown(run / "secret.env", 65534, 65534)
    launch("list")
    launch("status", "r")
    assert (run / "secret.env").exists() and not (run / "claim").exists()
    if case == "in doubt":
        edit(run / "intent.json", at=time.time() - 4000)
        launch("list")
        assert not (run / "secret.env").exists()


def test_a_job_that_slurm_forgot_and_a_copy_lose_theirs(launch: Launch, slurm: Fake, image: Path) -> None:
    launch(*SUBMIT, *SECRET)
    runs = image.parent / "runs"
    shutil.copytree(runs / "r", runs / "copy")
    launch("list")
    assert holding(runs) == {"r"}  # it is queued
    (runs / "r").rename(runs / "moved")
    launch("list")
    assert holding(runs) == {"moved"}  # it may be moved back, or be mounted elsewhere under its own name
    (runs / "moved").rename(runs / "r")
    (image.parent / "jobs.txt").write_text("")
    launch("list")
    assert holding(runs) == set()


def test_a_job_removes_its_secret_once_it_has_read_it(launch: Launch, workplace: Path) -> None:
    (workplace / "t").write_text('#!/bin/bash\necho "got $A_TOKEN"\nkill -9 $PPID\nexec sleep 60\n')
    (workplace / "t").chmod(0o755)
    launch("submit", "--local", "--gpu", "cpu", "--recipe", "debug", "--name", "k", "--python", "./t", *SECRET)
    log = workplace / "runs" / "k" / "logs"
    wait_for(lambda: any("got hunter2" in path.read_text() for path in log.glob("0*.log")))
    assert not (workplace / "runs" / "k" / "secret.env").exists()


@pytest.mark.parametrize("size", ["16k", "64k", "160k"])
def test_a_full_file_system(
    size: str, launch: Launch, slurm: Fake, image: Path, request: pytest.FixtureRequest
) -> None:
    runs = image.parent / "runs"
    runs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(runs)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    umount: Callable[[], object] = lambda: subprocess.run(["umount", "-l", str(runs)])  # noqa: E731
    request.addfinalizer(umount)
    done = launch(*SUBMIT, *SECRET)
    assert done.returncode == ExitStatus.FILESYSTEM and "[(" not in done.stderr
    assert f"cannot write {runs}/r: No space left on device" in done.stderr and "--runs-dir DIR" in done.stderr
    assert os.listdir(runs) == []
