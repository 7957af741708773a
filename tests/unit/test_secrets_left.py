"""What a launcher or a job that was killed leaves behind: no secret that no job needs, and no half of a run."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.cli import main
from launcher.runs.directory import remove_left_over
from tests.conftest import THOROUGH, Forked, Launch, forked
from tests.unit.test_submission import SBATCH, SUBMIT, Fake, jobs, slurm, wait_for

__all__ = ["slurm"]  # a fixture

SECRET = ("--env", "A_TOKEN=hunter2")
SAMPLE = ("--recipe", "debug", "--data", "sample", "--tokenizer", "sample")  # takes a while to write


def holding(runs: Path) -> set[str]:
    """The directories below `runs` in which some file holds the secret."""
    files = [path for path in runs.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    return {path.relative_to(runs).parts[0] for path in files}


def change(event: str, arguments: tuple[Any, ...], runs: Path) -> str:
    """What Python is about to change below `runs`, as one word for all files that are written alike; else ""."""
    if event == "subprocess.Popen":
        return "sbatch" if str(arguments[0]).endswith("/sbatch") else ""
    if event not in ("os.mkdir", "os.rename", "os.symlink", "os.remove", "open"):
        return ""
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return ""
    path = str(arguments[1 if event in ("os.rename", "os.symlink") else 0])
    if not path.startswith(f"{runs}/"):
        return ""
    inside = Path(path).relative_to(runs).parts[1:2]
    return f"{event} " + (re.sub(r"^[.](.*)[.][0-9a-f]{8}[.]tmp$", r"\1", inside[0]) if inside else "the run")


def watched(arguments: Sequence[str], at: Callable[[str, tuple[Any, ...]], object]) -> subprocess.CompletedProcess[str]:
    """What comes of `launcher ...` that calls `at` before each of Python's events."""

    def program() -> None:
        sys.addaudithook(at)
        main()

    return Forked(program, ["launcher", *arguments], os.environ).end()


def test_killed_before_each_change_it_doubles_loses_and_leaves_nothing(
    launch: Launch, slurm: Fake, image: Path
) -> None:
    """One kill before each kind of change; with the thorough profile before every single one."""
    runs, seen = image.parent / "runs", image.parent / "changes"
    runs.mkdir()
    submit = (*SUBMIT[:-1], "whole", *SECRET, *SAMPLE)
    with seen.open("a", buffering=1) as file:

        def noted(event: str, arguments: tuple[Any, ...]) -> None:
            if what := change(event, arguments, runs):
                file.write(f"{what}\n")

        done = watched(submit, noted)
    assert done.returncode == 0, done.stderr
    changes = seen.read_text().splitlines()
    moments = [n for n, what in enumerate(changes) if THOROUGH or what not in changes[:n]]
    assert {"os.mkdir the run", "open secret.env", "os.rename the run", "sbatch", "os.rename job.json"} < set(changes)
    for moment in moments:
        name, before, what = f"k{moment}", changes[:moment], changes[moment]
        passed = itertools.count()

        def killed(event: str, arguments: tuple[Any, ...]) -> None:
            if change(event, arguments, runs) == what and next(passed) == before.count(what):  # noqa: B023
                os.kill(os.getpid(), signal.SIGKILL)

        assert watched((*SUBMIT[:-1], name, *SECRET, *SAMPLE), killed).returncode == -signal.SIGKILL
        submitted = [line for line in jobs(image) if f" {name}." in line]
        assert len(submitted) == ("sbatch" in before)
        status = launch("status", name, "--json")
        if submitted:
            assert json.loads(status.stdout)["job_id"] == submitted[0].split()[0]
        elif "os.rename the run" in before:
            assert json.loads(status.stdout)["state"] == "UNKNOWN"
        else:
            assert status.returncode == ExitStatus.NOT_FOUND
    for path in runs.glob(".k*"):
        os.utime(path, (0, 0))  # a younger one without secrets may have a maker that is about to lock it
    listed = {row["run"]: row["job_id"] for row in json.loads(launch("list", "--json").stdout)}
    in_slurm = {line.split()[1].rpartition(".")[0]: line.split()[0] for line in jobs(image)}
    assert len(in_slurm) == len(jobs(image)), "doubled"
    assert in_slurm.items() <= listed.items(), "lost"
    assert holding(runs) == set(in_slurm)
    assert [path.name for path in runs.iterdir() if path.name.startswith(".")] == []
    assert launch(*SUBMIT[:-1], f"k{moments[0]}").returncode == 0


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
        (".thesis.0.tmp", "free", False),
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
    process = forked(*SUBMIT, *SECRET)
    wait_for(here.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.end()
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
