"""`launcher resume`: the next attempt of a run that has ended, in its directory, or a refusal that changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.commands import submit
from launcher.commands.asked import looked_at
from launcher.results.read import outcome_of
from launcher.runs.directory import Run
from launcher.runs.phases import Phase, Watcher
from launcher.scheduler.state import JobState
from tests.conftest import Launch
from tests.unit.test_submission import SBATCH, Fake, slurm
from tests.unit.test_sweep import recorded

__all__ = ["recorded", "slurm"]  # fixtures

SUBMIT = ("submit", "--gpu", "gb200", "--image", "titan.sqsh", "--data", "sample", "--name", "r", "--yes")


def ended(run: Path, code: int = 1) -> None:
    """What a job leaves that trained and failed; Slurm has forgotten it."""
    (run / "secret.env").unlink()
    (run / "claim").mkdir()
    (run / "claim/job_id").write_text("100\n")
    (run / "nodes").mkdir()
    (run / "nodes/0000-n0.json").write_text('{"host": "n0", "ok": true}')
    (run / "logs/0000-n0.log").write_text("[rank0]: killed\n")
    (run / "end.json").write_text(json.dumps({"exit_code": code, "signal": "", "job_id": "100"}))
    (run.parent.parent / "jobs.txt").write_text("100 another COMPLETED\n")


@pytest.fixture
def run(launch: Launch, recorded: Fake, image: Path) -> Path:
    done = launch(*SUBMIT, "--max-restarts", "1", "--env", "API_TOKEN=hidden")
    assert done.returncode == 0, done.stderr
    folder = image.parent / "runs/r"
    ended(folder)
    return folder


def files(folder: Path) -> dict[str, Any]:
    """Every file of a run, but what may come and go."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_next_attempt(launch: Launch, run: Path, image: Path) -> None:
    done = launch("resume", "r", "--steps", "200", "--time", "02:00:00", API_TOKEN="hidden")
    assert done.returncode == 0, done.stderr
    assert "r: Slurm job 101" in done.stdout and "from the beginning" in done.stdout
    assert sorted(path.name for path in (run / "attempts/1").iterdir()) == [
        *("claim", "end.json", "intent.json", "job", "job.json", "job.sbatch", "logs", "nodes", "run.toml"),
    ]
    assert not (run / "claim").exists() and not (run / "end.json").exists()
    assert json.loads((run / "job.json").read_text())["job_id"] == "101"
    script = (run / "job.sbatch").read_text()
    assert "#SBATCH --time=02:00:00" in script and "--job-name=r." in script
    assert json.loads((run / "job/node.json").read_text())["recipe"]["steps"] == 200
    assert (run / "secret.env").stat().st_mode & 0o777 == 0o600
    assert json.loads(launch("status", "r", "--json").stdout)["state"] == "PENDING"


def test_not_while_it_goes_on(launch: Launch, run: Path) -> None:
    assert launch("resume", "r", API_TOKEN="hidden").returncode == 0
    before = files(run)
    done = launch("resume", "r", API_TOKEN="hidden")
    assert done.returncode == ExitStatus.INVALID and "[run-active]" in done.stderr
    assert files(run) == before


def test_what_sbatch_refuses_stays_as_it_was(launch: Launch, run: Path, slurm: Fake) -> None:
    slurm("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    before = files(run)
    done = launch("resume", "r", "--steps", "200", API_TOKEN="hidden")
    assert done.returncode == ExitStatus.CLUSTER and "[sbatch-refused]" in done.stderr
    assert files(run) == before
    assert json.loads(launch("status", "r", "--json").stdout)["state"] == "FAILED"


def test_a_job_of_before_is_not_taken_for_the_new_one(launch: Launch, run: Path, slurm: Fake, image: Path) -> None:
    """Slurm remembers the first job, and does not say whether it has the second."""
    slurm("sbatch", "echo 'timed out' >&2; exit 1")
    name = json.loads((run / "intent.json").read_text())["job_name"]
    (image.parent / "jobs.txt").write_text(f"100 {name} FAILED\n")
    assert "[in-doubt]" in launch("resume", "r", API_TOKEN="hidden").stderr
    assert not (run / "job.json").exists()
    assert launch("cancel", "r").returncode == 0  # with its claim
    slurm("sbatch", SBATCH)
    assert "[in-doubt]" in launch("resume", "r", API_TOKEN="hidden").stderr, "it would take the claim away"
    intent = json.loads((run / "intent.json").read_text())
    (run / "intent.json").write_text(json.dumps(intent | {"at": intent["at"] - 3600}))
    assert launch("resume", "r", API_TOKEN="hidden").returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        ("local_batch_size = 5", "local_batch_size = 4"),
        ("nodes = 1", "nodes = 2"),
        ('flavor = "8B"', 'flavor = "70B"'),
    ],
)
def test_another_run_is_not_this_one(change: tuple[str, str], launch: Launch, run: Path) -> None:
    text = (run / "run.toml").read_text()
    assert change[0] in text
    (run / "run.toml").write_text(text.replace(*change))
    before = files(run)
    done = launch("resume", "r", API_TOKEN="hidden")
    assert "[resume-changed]" in done.stderr and files(run) == before


def test_a_run_that_has_done_everything(launch: Launch, run: Path) -> None:
    (run / "end.json").write_text('{"exit_code": 0, "signal": ""}')
    done = launch("resume", "r", API_TOKEN="hidden")
    assert "[resume-complete]" in done.stderr and "--steps 200" in done.stderr
    assert launch("resume", "r", "--steps", "200", API_TOKEN="hidden").returncode == 0


def test_a_copy_is_not_resumed(launch: Launch, run: Path) -> None:
    shutil.copytree(run, run.with_name("copy"))
    done = launch("resume", "copy", API_TOKEN="hidden")
    assert "[run-copied]" in done.stderr
    os.rename(run, run.with_name("moved"))
    assert "[run-copied]" in launch("resume", "moved", API_TOKEN="hidden").stderr


def test_two_at_once(launch: Launch, run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has looked at the run before the first has submitted it."""

    def meanwhile(*asked: Any) -> Any:
        monkeypatch.setattr(submit, "looked_at", looked_at)
        assert launch("resume", "r", alone=True, API_TOKEN="hidden").returncode == 0
        return looked_at(*asked)

    monkeypatch.setattr(submit, "looked_at", meanwhile)
    done = launch("resume", "r", API_TOKEN="hidden")
    assert done.returncode == ExitStatus.INVALID and "[run-active]" in done.stderr
    assert len((image.parent / "jobs.txt").read_text().splitlines()) == 2  # another's, and one of the run


def test_times_are_those_of_the_first_submission(launch: Launch, run: Path) -> None:
    """But the wait for the next job begins with the next submission."""
    intent = json.loads((run / "intent.json").read_text())
    (run / "intent.json").write_text(json.dumps(intent | {"at": 1_790_000_000}))
    assert launch("resume", "r", API_TOKEN="hidden").returncode == 0
    outcome = outcome_of(Run(run), JobState("FAILED", ""))
    assert outcome and outcome.date == "2026-09-21T14:13:20Z"
    standing = Watcher(Run(run)).look(JobState("PENDING", ""))[-1]
    assert standing.began[Phase.QUEUED] == json.loads((run / "intent.json").read_text())["at"]
