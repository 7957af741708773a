"""Runs on this machine: started, watched, listed, cancelled, and told apart when they die.

A shell script stands in for the trainer's Python, so that these tests take no minutes; tests/train/ has the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.conftest import Launch

STEP = (
    "[rank0]:[titan] 2026-11-22 07:10:{s:02d},413 - root - INFO - step: {n:2d}  loss:  5.53478  grad_norm:  "
    "2.5933  memory:  0.70GiB(2.98%)  tps: 137  tflops: 0.01  mfu: 0.00%"
)
STEPS = "\n".join(f"echo '{STEP.format(s=n, n=n)}'" for n in (1, *range(2, 21, 2)))


@pytest.fixture
def start(launch: Launch, workplace: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Submits a local debug run whose trainer is the given shell script."""

    def submit(script: str, *arguments: str, name: str = "r") -> subprocess.CompletedProcess[str]:
        trainer = workplace / f"trainer-{name}"
        trainer.write_text(f"#!/bin/bash\n{script}\n")
        trainer.chmod(0o755)
        return launch(
            "submit",
            "--local",
            "--gpu",
            "cpu",
            "--recipe",
            "debug",
            "--name",
            name,
            "--python",
            str(trainer),
            *arguments,
        )

    return submit


def state(launch: Launch, name: str = "r") -> tuple[str, int]:
    done = launch("status", name, "--json")
    return json.loads(done.stdout)["state"], done.returncode


def wait_until(launch: Launch, wanted: str, name: str = "r") -> None:
    end = time.monotonic() + 60
    while (found := state(launch, name)[0]) != wanted:
        assert time.monotonic() < end, f"still {found}"
        time.sleep(0.1)


def test_a_run_from_start_to_row(start, launch: Launch, workplace: Path) -> None:
    done = start(STEPS, "--follow")
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stdout and "r: COMPLETED" in done.stdout
    assert "|CPU     |1 (2 ranks)                  |4         |step: 20  loss:  5.5348" in done.stdout
    row = json.loads(launch("results", "r", "--json").stdout)
    assert (row["state"], row["median_tps"], row["incomplete"], row["gpus"]) == ("COMPLETED", 137, False, 2)
    run = workplace / "runs" / "r"
    assert sorted(p.name for p in (run / "logs").iterdir()) == [f"0000-{os.uname().nodename}.log", "job.log"]
    assert (run / "sample" / "c4" / "README.md").is_file() and (
        run / "sample" / "tokenizer" / "tokenizer.json"
    ).is_file()
    assert launch("watch", "r").stdout.count("step ") >= 10
    assert "loss:  5.53478" in launch("logs", "r").stdout
    objects = [json.loads(line) for line in launch("watch", "r", "--json").stdout.splitlines()]
    assert objects[0]["step"] == 1 and objects[-1]["state"] == "COMPLETED"


def test_status_says_how_far_it_is(start, launch: Launch) -> None:
    start("\n".join([*STEPS.splitlines()[:4], "sleep 300 & wait"]))
    wait_until(launch, "RUNNING")
    end = time.monotonic() + 60
    while not (progress := json.loads(launch("status", "r", "--json").stdout)["progress"]) or progress["step"] < 6:
        assert time.monotonic() < end, progress
        time.sleep(0.1)
    assert "  step 6/20  loss 5.53  tps 137" in launch("status", "r").stdout
    launch("cancel", "r")
    assert json.loads(launch("status", "r", "--json").stdout)["progress"] is None


@pytest.mark.parametrize(
    ("arguments", "said", "fix"),
    [
        (
            ("--gpu", "h200", "--recipe", "debug"),
            "--gpu h200: this machine has no NVIDIA driver",
            "--gpu cpu --recipe debug",
        ),
        (("--gpu", "cpu"), "/data/tokenizers/Llama-3.1-8B is not on this machine", "launcher stage tokenizer"),
        (("--gpu", "cpu", "--tokenizer", "sample"), "/data/c4: not on this machine", "--data sample"),
    ],
    ids=["GPU", "tokenizer", "data"],
)
def test_what_this_machine_lacks_the_run_lacks(launch: Launch, arguments: tuple[str, ...], said: str, fix: str) -> None:
    for command in ("preflight", "submit"):
        done = launch(command, "--local", *arguments, PATH="/usr/bin:/bin")
        assert done.returncode in (ExitStatus.INVALID, ExitStatus.NOT_FOUND), done.stderr
        assert said in done.stdout + done.stderr and fix in done.stdout + done.stderr
    assert not list(Path().glob("runs/*"))


def test_a_python_without_torch_is_told_before_it_starts(launch: Launch, workplace: Path) -> None:
    """As after the README's installation on a login node, which brings none."""
    (workplace / "sitecustomize.py").write_text(
        "import importlib.util as u\nask = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'torch' else ask(name, *more)\n"
    )
    path = os.pathsep.join([str(workplace), os.environ["PYTHONPATH"]])
    done = launch("submit", "--local", "--gpu", "cpu", "--recipe", "debug", PYTHONPATH=path)
    assert done.returncode == ExitStatus.INVALID and "torch: not installed for" in done.stderr
    assert "-m pip install 'titan-launcher[train]'" in done.stderr and not list(Path().glob("runs/*"))


def test_it_survives_its_terminal_and_is_cancelled(start, launch: Launch, workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr("launcher.scheduler.local.GRACE_S", 60.0)  # on a busy machine, looking for its ranks takes long
    start(f"echo $$ >{workplace}/pid; trap 'echo gone; exit 3' TERM; sleep 300 & wait")
    wait_until(launch, "RUNNING")
    while not (workplace / "pid").exists():  # before, the script has no trap yet that writes an end
        time.sleep(0.05)
    job = json.loads((workplace / "runs" / "r" / "job.json").read_text())
    assert os.getsid(int(job["job_id"])) == int(job["job_id"]) != os.getsid(0)
    assert [row["state"] for row in json.loads(launch("list", "--json").stdout)] == ["RUNNING"]
    head, row = launch("list").stdout.splitlines()
    assert head.split() == ["run", "state", "job", "size", "recipe", "age"]
    assert row.split()[:2] == ["r", "RUNNING"] and row.index("1 x 2 CPU") == head.index("size")
    assert "cancelled (was RUNNING)" in launch("cancel", "r").stdout
    assert state(launch) == ("CANCELLED", ExitStatus.JOB_FAILED)
    assert "already ended: CANCELLED" in launch("cancel", "r").stdout
    end = json.loads((workplace / "runs" / "r" / "end.json").read_text())
    assert (end["signal"], end["exit_code"]) == ("TERM", 143)


def test_a_trainer_that_ignores_sigterm_is_killed(start, launch: Launch, workplace: Path, monkeypatch) -> None:
    from launcher.scheduler import local

    start(f"trap '' TERM; echo $$ >{workplace}/pid; while :; do sleep 0.1; done")
    while not (workplace / "pid").exists() or not (workplace / "pid").read_text():
        time.sleep(0.05)
    trainer = local.identity(int((workplace / "pid").read_text()))
    monkeypatch.setattr(local, "GRACE_S", 0.4)
    local.cancel(json.loads((workplace / "runs" / "r" / "job.json").read_text()), workplace / "runs" / "r")
    end = time.monotonic() + 10
    while local.is_alive(trainer):
        assert time.monotonic() < end, "it was not killed"
        time.sleep(0.05)


def test_failure_shows_the_first_error(start, launch: Launch) -> None:
    start("echo 'Traceback (most recent call last):'; echo 'RuntimeError: the cause'; exit 42")
    wait_until(launch, "FAILED")
    done = launch("status", "r")
    assert done.returncode == ExitStatus.JOB_FAILED and "RuntimeError: the cause" in done.stderr
    assert json.loads(launch("status", "r", "--json").stdout)["exit_code"] == 42
    no_data = launch("results", "r")
    assert (no_data.returncode, "no step" in no_data.stderr) == (ExitStatus.NO_DATA, True)


def test_killed_without_a_word_is_unknown(start, launch: Launch, workplace: Path) -> None:
    start("exec sleep 300")
    wait_until(launch, "RUNNING")
    pid = int(json.loads((workplace / "runs" / "r" / "job.json").read_text())["job_id"])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for victim in (pid, *map(int, children)):
        os.kill(victim, signal.SIGKILL)
    wait_until(launch, "UNKNOWN")
    assert state(launch) == ("UNKNOWN", ExitStatus.JOB_UNKNOWN)


RANK = "setsid bash -c 'echo $BASHPID >rank; exec sleep 300' & wait"


@pytest.mark.parametrize("killed", ["script", "trainer"])
def test_ranks_that_outlive_what_started_them(killed: str, start, launch: Launch, workplace: Path) -> None:
    """A rank is a session of its own: a kill -9 of the script or of torchrun leaves it behind."""
    start(f"echo $$ >{workplace}/trainer; cd {workplace}; {RANK}")
    wait_until(launch, "RUNNING")
    rank = workplace / "rank"
    while not rank.exists() or not rank.read_text():
        time.sleep(0.05)
    there = Path(f"/proc/{int(rank.read_text())}")
    if killed == "trainer":
        os.kill(int((workplace / "trainer").read_text()), signal.SIGKILL)
        wait_until(launch, "FAILED")  # by the script, which ends the others first
    else:
        script = int(json.loads((workplace / "runs" / "r" / "job.json").read_text())["job_id"])
        os.kill(script, signal.SIGKILL)
        time.sleep(0.2)
        assert state(launch)[0] == "RUNNING" and there.exists()
        assert launch("cancel", "r").returncode == 0
        wait_until(launch, "CANCELLED")
    assert not there.exists() or " Z " in (there / "stat").read_text()


def test_an_incomplete_run_never_looks_complete(start, launch: Launch) -> None:
    start("\n".join(STEPS.splitlines()[:6]) + "\nexit 1")
    wait_until(launch, "FAILED")
    shown = launch("results", "r").stdout
    assert "step 10 of 20" in shown and "step: 10" not in shown
    assert json.loads(launch("results", "r", "--json").stdout)["incomplete"] is True


def test_the_same_script_by_hand_does_not_run_twice(start, launch: Launch, workplace: Path) -> None:
    start("echo once")
    wait_until(launch, "COMPLETED")
    again = subprocess.run(["bash", "runs/r/job.sbatch"], capture_output=True, text=True)
    assert again.returncode == 75 and "nothing is run twice" in again.stderr
    assert state(launch)[0] == "COMPLETED"


def test_a_lost_job_file_is_found_again(start, launch: Launch, workplace: Path) -> None:
    """As if the launcher had been killed between starting the process and writing job.json."""
    start("sleep 300")
    wait_until(launch, "RUNNING")
    job = workplace / "runs" / "r" / "job.json"
    before = json.loads(job.read_text())
    while not (workplace / "runs" / "r" / "claim" / "job_id").exists():
        time.sleep(0.05)
    job.unlink()
    assert state(launch)[0] == "RUNNING"
    assert json.loads(job.read_text()) == before
    launch("cancel", "r")


def test_ctrl_c_detaches(start, launch: Launch, workplace: Path) -> None:
    start(f"{STEPS.splitlines()[0]}; sleep 300")
    watching = subprocess.Popen(
        [sys.executable, "-m", "launcher", "watch", "r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout and "step 1/20" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=30)
    assert watching.returncode == ExitStatus.INTERRUPTED
    assert "detached; r goes on: launcher watch r" in said
    assert state(launch)[0] == "RUNNING"
    launch("cancel", "r")


def test_another_machines_run_is_not_guessed(start, launch: Launch, workplace: Path) -> None:
    start("sleep 5")
    job = workplace / "runs" / "r" / "job.json"
    job.write_text(job.read_text().replace(os.uname().nodename, "elsewhere"))
    shown = launch("status", "r")
    assert "UNKNOWN" in shown.stdout and "elsewhere" in shown.stdout


def test_the_ranks_of_a_run_that_is_named_through_a_link(start, launch: Launch, workplace: Path) -> None:
    (workplace / "real").mkdir()
    (workplace / "link").symlink_to("real")
    start(f"cd {workplace}; {RANK}", "--runs-dir", "link/runs")
    rank = workplace / "rank"
    while not rank.exists() or not rank.read_text():
        time.sleep(0.05)
    run = workplace / "real" / "runs" / "r"
    os.kill(int(json.loads((run / "job.json").read_text())["job_id"]), signal.SIGKILL)
    time.sleep(0.2)
    assert "RUNNING" in launch("status", "link/runs/r").stdout
    assert launch("cancel", "link/runs/r").returncode == 0
    there = Path(f"/proc/{int(rank.read_text())}/stat")
    assert not there.exists() or " Z " in there.read_text()


def test_a_run_that_was_moved_keeps_its_job(start, launch: Launch, workplace: Path) -> None:
    start(f"echo $$ >{workplace}/pid; sleep 300")
    while not (workplace / "pid").exists() or not (workplace / "pid").read_text():  # the script has opened its files
        time.sleep(0.05)
    (workplace / "runs" / "r").rename(workplace / "runs" / "moved")
    assert json.loads(launch("status", "moved", "--json").stdout)["state"] == "RUNNING"
    assert "cancelled (was RUNNING)" in launch("cancel", "moved").stdout
    assert json.loads(launch("status", "moved", "--json").stdout)["state"] == "CANCELLED"
