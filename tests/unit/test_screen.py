"""What is said of runs that are there: several at once, on narrow terminals, on CPUs; and their logs in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from launcher.base.output import columns
from launcher.commands.watching import watch_all
from launcher.results.formats import table
from launcher.scheduler.state import JobState
from tests.conftest import Launch
from tests.unit.outcomes import outcome, write_run

FIX = "--set recipe.lr=1e-4"


@pytest.fixture
def three(workplace: Path) -> Path:
    """A good run, one whose loss is not finite, and one that failed."""
    runs = workplace / "runs"
    write_run(runs / "good")
    write_run(runs / "nan", loss=float("nan"))
    failed = write_run(runs / "failed", end='{"exit_code": 1}', steps_logged=40)
    ranks = failed / "logs/ranks/0001-gb200-002/7_x/attempt_0/3"
    ranks.mkdir(parents=True)
    (ranks / "stderr.log").write_text("one\nRuntimeError: CUDA error: an illegal memory access\n")
    return runs


def test_status_of_several_runs(launch: Launch, three: Path) -> None:
    done = launch("status", "good", "nan", "failed")
    assert done.returncode == ExitStatus.JOB_FAILED
    good, nan = (part.splitlines() for part in done.stdout.split("COMPLETED")[1:])
    assert any(line.startswith("  |GB200   |2 (8 GPU)") for line in good) and "median 17,940" in good[3]
    assert nan[2:4] == [
        "  problem: NaN or infinity in loss, grad_norm or tokens/s",
        f"  try: launcher submit {three}/nan/run.toml {FIX}   (a smaller learning rate)",
    ]
    assert "  try: " in done.stderr and "  cause: " in done.stderr
    assert [row["run"] for row in json.loads(launch("status", "good", "nan", "--json").stdout)] == ["good", "nan"]
    assert json.loads(launch("status", "nan", "--json").stdout)["run"] == "nan"


def test_a_fail_ends_with_what_to_type(launch: Launch, three: Path) -> None:
    steps = {name: json.loads(launch("accept", name, "--json").stdout)["next"] for name in ("good", "failed")}
    again = "launcher accept runs/failed/run.toml --name failed-again"
    assert steps == {"good": [], "failed": ["launcher status failed", again]}
    slow = write_run(three / "slow", (17000.0, 17010.0, 17005.0))
    assert json.loads(launch("accept", str(slow), "--json").stdout)["next"][0] == "launcher compare slow published"


def test_a_step_of_many_nodes_is_one_line_and_parts_can_be_asked_for(launch: Launch, three: Path) -> None:
    def lines(*options: str) -> list[str]:
        return launch("logs", *options).stdout.splitlines()

    assert len(lines("good")) == 11 and len(lines("good", "--json")) == 22
    assert all(line.startswith("gb200-002: ") for line in lines("good", "--node", "gb200-002"))
    assert [line.split("step: ")[1].split()[0] for line in lines("good", "-n", "2")] == ["90", "100"]
    assert lines("failed", "--rank", "7") == ["rank7: one", "rank7: RuntimeError: CUDA error: an illegal memory access"]
    assert lines("failed", "--rank", "7", "--errors") == ["rank7: RuntimeError: CUDA error: an illegal memory access"]
    hidden = ["gb200-002, local rank 3: RuntimeError: CUDA error: an illegal memory access"]
    assert lines("failed", "--errors") == lines("failed", "--errors", "--node", "gb200-002") == hidden
    assert "no errors in 2 logs" in launch("logs", "good", "--errors").stderr
    assert "no active runs in runs" in launch("watch", "--all").stderr
    for odd in (("-n", "9" * 20), ("--rank", "0", "--node", "gb200-001")):
        assert launch("logs", "good", *odd).returncode == ExitStatus.USAGE
    done = launch("logs", "good", "--node", "gb9")
    assert done.returncode == ExitStatus.USAGE and "good has no log of gb9; it has: gb200-001, gb200-002" in done.stderr
    assert "failed has no log of rank 8; it has: rank 7" in launch("logs", "failed", "--rank", "8").stderr


def test_tables_fit_the_terminal() -> None:
    name = "llama3-8b-fast-gb200-128n-20261129-154436"
    runs = [outcome(run=name), outcome(run="short", problems=("restarted",))]
    for width in (80, 120):
        *lines, lacking = table(runs, width).split("\n")
        assert max(map(len, lines)) <= width and lacking == "short: restarted"
        assert lines[1].startswith("llama") and "4436" in lines[1]
    assert columns([("a" * 30, "b")], width=20)[0] == "aaaaaaa…aaaaaaaaa  b"
    assert columns([("a" * 30, "b")]) == ["a" * 30 + "  b"]


def test_cpu_runs_have_ranks(launch: Launch, workplace: Path) -> None:
    run = write_run(workplace / "runs" / "cpu", gpu="CPU")
    node = json.loads((run / "job" / "node.json").read_text())
    node["profile"]["device"] = "cpu"
    (run / "job" / "node.json").write_text(json.dumps(node))
    for command in ("results cpu", "accept cpu", "list", "compare cpu cpu", "status cpu"):
        said = launch(*command.split()).stdout
        assert "per GPU" not in said and "8 GPU" not in said and "mfu 45" not in said, command
    assert "(8 ranks)" in launch("results", "cpu").stdout and "MFU n/a" in launch("results", "cpu").stdout
    assert "2 x 4 CPU ranks" in launch("list").stdout and "tokens/s per rank" in launch("compare", "cpu", "cpu").stdout


def test_all_runs_at_once(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trains and ends, beside one that had ended before and is no news."""
    write_run(workplace / "runs" / "old")
    run = write_run(workplace / "runs" / "new", end="", steps_logged=40)
    (run / "submit.lock").touch()

    def end(_: float) -> None:
        (run / "end.json").write_text('{"exit_code": 0}')

    monkeypatch.setattr("time.sleep", end)
    monkeypatch.setattr("launcher.scheduler.local.find", lambda *_: {"job_id": "1"})
    monkeypatch.setattr("launcher.scheduler.local.state", lambda *_: JobState("RUNNING"))
    watch_all(workplace / "runs", as_json=False)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [["new:", "training"], ["new:", "COMPLETED"]]
    assert "step 40/100" in said[0] and "tokens/s 17,9" in said[0]
