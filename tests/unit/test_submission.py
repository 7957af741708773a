"""Nothing is submitted twice and nothing is lost, whatever sbatch does and whenever the launcher dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.commands.runs import exit_for
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.slurm import HINTS
from launcher.scheduler.state import from_slurm
from tests.conftest import Launch, forked

Fake = Callable[[str, str], Path]
SUBMIT = ("submit", "--gpu", "b200", "--image", "titan.sqsh", "--data", "sample", "--name", "r")

# A Slurm of two files: sbatch appends "ID NAME STATE", squeue prints it in the format that the launcher asks for.
SBATCH = """
script=${@: -1}
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
echo "$(( $(cat jobs.txt "$JOBS" 2>/dev/null | wc -l) + 100 )) $name PENDING" >>"$JOBS"
tail -n1 "$JOBS" | cut -d' ' -f1
"""
SQUEUE = """while read -r id name state; do echo "$id|$state|$name|Priority"; done <"$JOBS" 2>/dev/null; exit 0"""


@pytest.fixture
def slurm(fake_slurm: Fake, image: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("JOBS", str(image.parent / "jobs.txt"))
    (image.parent / "jobs.txt").touch()
    fake_slurm("sbatch", SBATCH)
    fake_slurm("squeue", SQUEUE)
    fake_slurm("scancel", 'sed -i "s/^$1 \\(.*\\) .*/$1 \\1 CANCELLED/" "$JOBS"')
    return fake_slurm


@pytest.fixture
def run(launch: Launch, slurm: Fake, image: Path) -> Path:
    """A run that Slurm has as job 100."""
    assert launch(*SUBMIT).returncode == 0
    return image.parent / "runs" / "r"


def status(launch: Launch, run: str = "r") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(launch("status", run, "--json").stdout)
    return found


def jobs(image: Path) -> list[str]:
    return (image.parent / "jobs.txt").read_text().splitlines()


def test_submitted_once(launch: Launch, slurm: Fake, image: Path) -> None:
    done = launch(*SUBMIT, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job_id"] == "100"
    assert len(jobs(image)) == 1
    found = status(launch)
    assert (found["state"], found["job_id"], found["reason"]) == ("PENDING", "100", "Priority")


def test_the_submitters_shell_does_not_overrule_the_script(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", f"env >{image.parent}/env.txt; echo 7")
    launch(*SUBMIT, SBATCH_EXPORT="ALL", SBATCH_NODES="99", SLURM_CONF="/etc/x", SLURM_JOB_ID="1")
    seen = (image.parent / "env.txt").read_text()
    assert "SBATCH_" not in seen and "SLURM_JOB_ID" not in seen and "SLURM_CONF=/etc/x" in seen


def test_submitting_and_asking_see_the_same_cluster_and_all_of_it(launch: Launch, slurm: Fake, image: Path) -> None:
    for command in ("sbatch", "squeue"):
        slurm(command, f"env >>{image.parent}/{command}.txt; {SBATCH if command == 'sbatch' else SQUEUE}")
    own = {"SQUEUE_PARTITION": "x", "SINFO_ALL": "1", "SACCT_FORMAT": "x", "SLURM_TIME_FORMAT": "%s"}
    launch(*SUBMIT, SBATCH_CLUSTERS="b", SLURM_JWT="j", **own)
    assert launch("status", "r", SLURM_CLUSTERS="b", SLURM_JWT="j", **own).returncode == 0
    for command in ("sbatch", "squeue"):
        seen = (image.parent / f"{command}.txt").read_text()
        assert not [name for name in own if f"{name}=" in seen]
        assert "SLURM_CLUSTERS=b\n" in seen and "SLURM_JWT=j\n" in seen


@pytest.mark.parametrize(
    ("words", "code"), [("sbatch: error: invalid partition: x", 1), ("something new", 77), ("", 1)]
)
def test_a_refusal_is_shown_in_slurms_words_and_leaves_nothing(
    words: str, code: int, launch: Launch, slurm: Fake, image: Path
) -> None:
    slurm("sbatch", f"echo '{words}' >&2; exit {code}")
    done = launch(*SUBMIT)
    assert done.returncode == ExitStatus.CLUSTER and "[sbatch-refused]" in done.stderr
    assert f"exit code {code}" in done.stderr and words in done.stderr
    assert os.listdir(image.parent / "runs") == []


def test_sbatch_missing(launch: Launch, slurm: Fake, image: Path) -> None:
    (image.parent / "slurm-bin" / "sbatch").unlink()
    for command in (SUBMIT, (*SUBMIT, "--force"), ("preflight", *SUBMIT[1:])):
        done = launch(*command, PATH=f"{image.parent}/slurm-bin:/bin-without-slurm")
        assert done.returncode == ExitStatus.CLUSTER
        assert "sbatch is not installed here, or not in PATH [slurm-missing]" in done.stdout + done.stderr
    assert not (image.parent / "runs").exists()


@pytest.mark.parametrize(
    "script",
    [
        "echo nonsense",
        "echo",
        "echo 123; exit 1",
        "head -c 100000 /dev/zero",
        "printf '\\xff\\xfe 12'",
        "echo 'slurm_load: Unable to contact slurm controller' >&2; exit 1",
        "kill -9 $$",
        "echo 123x; kill $$",
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
    ],
)
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not-taken"])
def test_an_answer_that_says_nothing(script: str, taken: bool, launch: Launch, slurm: Fake, image: Path) -> None:
    """The job may be there: it is looked for by name, and otherwise the run stays, marked as unknown."""
    slurm("sbatch", f"({SBATCH}) >/dev/null\n{script}" if taken else script)
    done = launch(*SUBMIT)
    if taken:
        assert done.returncode == 0, done.stderr
        assert (status(launch)["state"], status(launch)["job_id"]) == ("PENDING", "100")
        return
    assert done.returncode == ExitStatus.CLUSTER and "launcher cancel r" in done.stderr
    said = launch("status", "r")
    assert (said.returncode, "UNKNOWN" in said.stdout) == (ExitStatus.JOB_UNKNOWN, True)
    assert launch("cancel", "r").returncode == 0
    assert "CANCELLED" in launch("status", "r").stdout
    late = subprocess.run(["bash", "runs/r/job.sbatch"], env=os.environ | {"SLURM_JOB_ID": "9"}, capture_output=True)
    assert late.returncode == 75  # should Slurm have it after all, it stops at the claim


def test_a_hanging_sbatch_is_bounded(launch: Launch, slurm: Fake, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.scheduler import slurm as module

    slurm("sbatch", "sleep 600")
    monkeypatch.setattr(module, "SUBMIT_S", 0.3)
    with open(image.parent / "lock", "w") as lock, pytest.raises(module.Unsure, match="did not answer"):
        module.submit(image.parent / "job.sbatch", lock.fileno())


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_killed_while_sbatch_is_at_work(launch: Launch, slurm: Fake, image: Path) -> None:
    """Before and after it: tests/unit/test_secrets_left.py."""
    here, go = image.parent / "here", image.parent / "go"
    slurm("sbatch", f"touch {here}; until [ -e {go} ]; do sleep 0.02; done\n{SBATCH}")
    process = forked(*SUBMIT)
    wait_for(here.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.end()
    assert "SUBMITTING" in launch("status", "r").stdout  # sbatch lives on and holds the lock
    assert launch(*SUBMIT).returncode == ExitStatus.EXISTS
    go.touch()
    wait_for(lambda: "SUBMITTING" not in launch("status", "r").stdout)
    assert (status(launch)["state"], status(launch)["job_id"]) == ("PENDING", "100")
    assert len(jobs(image)) == 1
    assert launch("cancel", "r").returncode == 0
    assert jobs(image)[0].endswith("CANCELLED")


def test_ctrl_c_waits_until_the_job_id_is_safe(launch: Launch, slurm: Fake, image: Path) -> None:
    here, go = image.parent / "here", image.parent / "go"
    slurm("sbatch", f"touch {here}; until [ -e {go} ]; do sleep 0.02; done\n{SBATCH}")
    process = forked(*SUBMIT)
    wait_for(here.exists)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.running()
    go.touch()
    done = process.end()
    assert done.returncode == ExitStatus.INTERRUPTED and "r: Slurm job 100" in done.stdout
    assert json.loads((image.parent / "runs" / "r" / "job.json").read_text()) == {"job_id": "100"}


WORDS: dict[int, str] = {0: "RUNNING COMPLETING COMPLETED", ExitStatus.JOB_UNKNOWN: "SOMETHING_NEW"}
WORDS[8] = "NODE_FAIL PREEMPTED OUT_OF_MEMORY BOOT_FAIL DEADLINE TIMEOUT FAILED CANCELLED"


def test_slurms_states() -> None:
    for code, words in WORDS.items():
        for word in words.split():
            state = from_slurm(word, "squeue")
            assert state.name == (word if code != ExitStatus.JOB_UNKNOWN else "UNKNOWN")
            with pytest.raises(SystemExit) if code else nullcontext() as ended:
                exit_for(state)
            assert not ended or ended.value.code == code


def test_a_job_that_slurm_forgot_is_unknown_and_its_own_word_wins(
    launch: Launch, slurm: Fake, run: Path, image: Path
) -> None:
    (image.parent / "jobs.txt").write_text("")
    slurm("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert status(launch)["state"] == "UNKNOWN"
    name = json.loads((run / "intent.json").read_text())["job_name"]
    slurm("sacct", f"echo '100|CANCELLED by 0|0:15|{name}'")
    assert status(launch)["state"] == "CANCELLED"
    (run / "end.json").write_text('{"exit_code": 0}')
    assert status(launch)["state"] == "COMPLETED"


DAMAGED: tuple[object, ...] = (False, True, None, "0", 0.0, [])


@pytest.mark.parametrize(
    ("slurm_said", "code", "state"),
    [
        ("JobState=NODE_FAIL Reason=NodeDown", 0, "NODE_FAIL"),  # srun answered 0
        ("JobState=COMPLETING Reason=NodeDown", 1, "NODE_FAIL"),  # srun was faster than the signal
        ("JobState=COMPLETING Reason=None", 0, "CANCELLED"),
        ("JobState=COMPLETING Reason=TimeLimit", 143, "TIMEOUT"),
        ("JobState=RUNNING Reason=None", 0, "COMPLETED"),
        ("JobState=RUNNING Reason=None", 1, "FAILED"),
        ("", 0, "COMPLETED"),
        *(("", damaged, "UNKNOWN") for damaged in DAMAGED),
    ],
)
def test_what_slurm_says_at_the_end_wins_over_the_exit_code_of_srun(
    slurm_said: str, code: object, state: str, tmp_path: Path
) -> None:
    (tmp_path / "end.json").write_text(json.dumps({"exit_code": code, "signal": "", "slurm": slurm_said}))
    assert control.state(Run(tmp_path)).name == state


def test_the_controller_is_down(launch: Launch, slurm: Fake, run: Path) -> None:
    slurm("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    done = launch("status", "r")
    assert (done.returncode, "Unable to contact" in done.stderr) == (ExitStatus.CLUSTER, True)
    assert json.loads(launch("list", "--json").stdout)[0]["state"] == "UNKNOWN"
    slurm("squeue", "echo welcome to the cluster")
    done = launch("status", "r")
    assert (done.returncode, "squeue's answer cannot be read" in done.stderr) == (ExitStatus.CLUSTER, True)


REFUSALS = {
    "Invalid partition name specified": "sinfo -s",
    "Invalid account or account/partition combination specified": "--account",
    "Invalid qos specification": "--qos",
    "Access denied to requested reservation": "--reservation",
    "Invalid node name specified": "sinfo -N",
    "Requested topology configuration is not available": "--segment",
    "Invalid generic resource (gres) specification": "%G",
    "Requested node configuration is not available": "%c",
    "Requested time limit is invalid (missing or exceeds some limit)": "--time",
    "Invalid feature specification": "--constraint",
    "unrecognized option '--cons'": "--sbatch",
    "Access/permission denied": "--partition",
    "something new": "launcher preflight",
}


@pytest.mark.parametrize(("said", "fix"), REFUSALS.items())
def test_what_to_type_when_sbatch_refuses(said: str, fix: str) -> None:
    assert fix in next(hint for words, hint in HINTS if re.search(words, f"failed: {said}", re.I))
