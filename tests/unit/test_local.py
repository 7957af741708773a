"""Runs on this machine: started, watched, listed, cancelled, and told apart when they die.

A shell script stands in for the trainer's Python, so that these tests take no minutes; tests/train/ has the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.scheduler import local
from tests.conftest import Launch, forked
from tests.unit.test_submission import wait_for

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
        run = ("submit", "--local", "--gpu", "cpu", "--recipe", "debug", "--name", name)
        return launch(*run, "--python", str(trainer), *arguments)

    return submit


def state(launch: Launch, name: str = "r") -> tuple[str, int]:
    done = launch("status", name, "--json")
    return json.loads(done.stdout)["state"], done.returncode


def wait_until(launch: Launch, wanted: str, name: str = "r") -> None:
    wait_for(lambda: state(launch, name)[0] == wanted, 60)


def number_in(path: Path) -> int:
    """What a process has written, once it has."""
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def job(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return found


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or " Z " in status.read_text()


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
    def progress() -> dict[str, Any] | None:
        found: dict[str, Any] | None = json.loads(launch("status", "r", "--json").stdout)["progress"]
        return found

    start("\n".join([*STEPS.splitlines()[:4], "sleep 300 & wait"]))
    wait_for(lambda: (seen := progress()) and seen["step"] == 6, 60)
    assert "  step 6/20  loss 5.53  tps 137" in launch("status", "r").stdout
    launch("cancel", "r")
    assert progress() is None


def test_data_that_cannot_be_read_is_not_said_to_be_missing(launch: Launch, workplace: Path) -> None:
    data = workplace / "data"
    data.symlink_to(data)
    done = launch("submit", "--local", "--gpu", "cpu", "--recipe", "debug", "--data", str(data))
    assert done.returncode == ExitStatus.FILESYSTEM and "[unreadable]" in done.stderr
    assert done.stderr.endswith(f"try: ls -ld {data}\n")


def test_a_dry_run_prints_how_ranks_meet_on_this_machine(launch: Launch) -> None:
    done = launch("submit", "--local", "--gpu", "cpu", "--recipe", "debug", "--dry-run")
    assert "# On this machine, if the Python has torchtitan 0.3" in done.stdout
    assert "--rdzv-endpoint=127.0.0.1:0 " in done.stdout and "HEAD_ADDR" not in done.stdout.split("# Data:")[1]


@pytest.mark.parametrize(
    ("arguments", "said", "fix"),
    [
        ("--gpu h200 --recipe debug", "--gpu h200: this machine has no NVIDIA driver", "--gpu cpu --recipe debug"),
        ("--gpu cpu", "/data/tokenizers/Llama-3.1-8B is not on this machine", "launcher stage tokenizer"),
        ("--gpu cpu --tokenizer sample", "/data/c4: not on this machine", "--data sample"),
    ],
    ids=["GPU", "tokenizer", "data"],
)
def test_what_this_machine_lacks_the_run_lacks(launch: Launch, arguments: str, said: str, fix: str) -> None:
    for command in ("preflight", "submit"):
        done = launch(command, "--local", *arguments.split(), PATH="/usr/bin:/bin")
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
    number_in(workplace / "pid")  # before, the script has no trap yet that writes an end
    script = int(job(workplace / "runs" / "r")["job_id"])
    assert os.getsid(script) == script != os.getsid(0)
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
    start(f"trap '' TERM; echo $$ >{workplace}/pid; while :; do sleep 0.1; done")
    trainer = number_in(workplace / "pid")
    monkeypatch.setattr(local, "GRACE_S", 0.4)
    local.cancel(job(workplace / "runs" / "r"), workplace / "runs" / "r")
    wait_for(lambda: is_gone(trainer), 10)


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
    pid = int(job(workplace / "runs" / "r")["job_id"])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for victim in (pid, *map(int, children)):
        os.kill(victim, signal.SIGKILL)
    wait_until(launch, "UNKNOWN")
    assert state(launch) == ("UNKNOWN", ExitStatus.JOB_UNKNOWN)


@pytest.mark.parametrize("killed", ["script", "script, of a run named through a link", "trainer"])
def test_ranks_that_outlive_what_started_them(killed: str, start, launch: Launch, workplace: Path) -> None:
    """A rank is a session of its own: a kill -9 of the script or of torchrun leaves it behind."""
    (workplace / "real").mkdir()
    (workplace / "link").symlink_to("real")
    folder = "link/runs" if "link" in killed else "runs"
    rank = "setsid bash -c 'echo $BASHPID >rank; exec sleep 300' & wait"
    start(f"echo $$ >{workplace}/trainer; cd {workplace}; {rank}", "--runs-dir", folder)
    there = number_in(workplace / "rank")
    if killed == "trainer":
        os.kill(number_in(workplace / "trainer"), signal.SIGKILL)
        wait_until(launch, "FAILED")  # by the script, which ends the others first
    else:
        script = int(job(workplace / folder / "r")["job_id"])
        os.kill(script, signal.SIGKILL)
        wait_for(lambda: is_gone(script))
        assert state(launch, f"{folder}/r")[0] == "RUNNING" and not is_gone(there)
        assert launch("cancel", f"{folder}/r").returncode == 0
        wait_until(launch, "CANCELLED", f"{folder}/r")
    assert is_gone(there)


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
    run = workplace / "runs" / "r"
    before = job(run)
    wait_for((run / "claim" / "job_id").exists)
    (run / "job.json").unlink()
    assert state(launch)[0] == "RUNNING" and job(run) == before
    launch("cancel", "r")


def test_ctrl_c_detaches(start, launch: Launch, workplace: Path) -> None:
    start(f"{STEPS.splitlines()[0]}; sleep 300")
    watching = forked("watch", "r")
    wait_for(lambda: "step 1/20" in watching.said())
    os.kill(watching.pid, signal.SIGINT)
    done = watching.end()
    assert done.returncode == ExitStatus.INTERRUPTED
    assert "detached; r goes on: launcher watch r" in done.stderr
    assert state(launch)[0] == "RUNNING"
    launch("cancel", "r")


def test_another_machines_run_is_not_guessed(start, launch: Launch, workplace: Path) -> None:
    start("sleep 5")
    job = workplace / "runs" / "r" / "job.json"
    job.write_text(job.read_text().replace(os.uname().nodename, "elsewhere"))
    shown = launch("status", "r")
    assert "UNKNOWN" in shown.stdout and "elsewhere" in shown.stdout


def test_a_run_that_was_moved_keeps_its_job(start, launch: Launch, workplace: Path) -> None:
    start(f"echo $$ >{workplace}/pid; sleep 300")
    number_in(workplace / "pid")  # the script has opened its files
    (workplace / "runs" / "r").rename(workplace / "runs" / "moved")
    assert state(launch, "moved")[0] == "RUNNING"
    assert "cancelled (was RUNNING)" in launch("cancel", "moved").stdout
    assert state(launch, "moved")[0] == "CANCELLED"
