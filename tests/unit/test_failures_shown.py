"""What a user sees of a failed run, and that the commands and the page of the known errors are true."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from docs.tables import MARKED
from launcher.cli import launcher as program
from launcher.logs.known_errors import Known
from tests.conftest import ROOT, Launch
from tests.unit.test_known_errors import GOODBYE, KNOWN, MY_BUG, OUT_OF_MEMORY, SRUN, STEP

# --- what a user sees ---------------------------------------------------------------------------------------


@pytest.fixture
def make_run(workplace: Path) -> Callable[..., Path]:
    """A run directory that has ended, as the job's script leaves it."""

    def make(name: str, exit_code: int = 1, **logs: str) -> Path:
        run = workplace / "runs" / name
        (run / "logs").mkdir(parents=True)
        (run / "intent.json").write_text('{"scheduler": "slurm", "job_name": "x", "at": 1}')
        (run / "job.json").write_text('{"job_id": "12"}')
        (run / "end.json").write_text(json.dumps({"exit_code": exit_code, "signal": "", "slurm": ""}))
        for log, text in logs.items():
            (run / "logs" / ("job.log" if log == "job" else f"0000-{log}.log")).write_text(text)
        return run

    return make


def test_status_prints_the_cause_then_the_fix_then_the_lines(make_run: Callable[..., Path], launch: Launch) -> None:
    run = make_run("r", gpu001=STEP + OUT_OF_MEMORY, job=SRUN)
    done = launch("status", "r")
    assert done.returncode == 8
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert lines[0] == "cause: a GPU's memory is too small for this run"
    assert lines[1] == f"try: launcher submit {run}/run.toml --batch-size N   (smaller)"
    assert lines[2] == f"from {run}/logs/0000-gpu001.log:"
    assert lines[3] == "| torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert lines[-1] == "everything: launcher logs r"
    told = json.loads(launch("status", "r", "--json").stdout)["failure"]
    assert told["known_error"] == "gpu-memory" and told["cause"] == lines[0].removeprefix("cause: ")
    assert told["fix"] == lines[1].removeprefix("try: ") and told["lines"][0] == lines[3].removeprefix("| ")
    assert told["log"] == f"{run}/logs/0000-gpu001.log"
    watched = launch("watch", "r")
    assert watched.returncode == 8 and "cause: a GPU's memory" in watched.stderr
    last = json.loads(launch("watch", "r", "--json").stdout.splitlines()[-1])
    assert last["failure"] == told


def test_the_batch_that_fits_is_named_where_the_plan_of_the_run_knows_it(
    make_run: Callable[..., Path], launch: Launch
) -> None:
    run = make_run("r", gpu001=STEP + OUT_OF_MEMORY)
    plan = ("plan", "--gpu", "gb200", "--nodes", "9", "--batch-size", "8", "--json")
    (run / "plan.json").write_text(launch(*plan).stdout)
    assert f"try: launcher submit {run}/run.toml --batch-size 5\n" in launch("status", "r").stderr
    (run / "plan.json").write_text('{"fitting_batch": "5; rm -rf ~"}')
    assert "--batch-size N   (smaller)\n" in launch("status", "r").stderr
    (run / "job").mkdir()
    (run / "job" / "node.json").write_text('{"placed": {}, "recipe": {"local_batch_size": 1}}')
    assert "--batch-size" not in launch("status", "r").stderr


def test_status_of_an_unknown_error_shows_it_and_claims_nothing(make_run: Callable[..., Path], launch: Launch) -> None:
    run = make_run("r", gpu001=STEP + MY_BUG + GOODBYE, job=SRUN)
    done = launch("status", "r")
    assert "cause:" not in done.stderr and "try:" not in done.stderr
    assert f"first error, in {run}/logs/0000-gpu001.log:\n  | ValueError: my own bug" in done.stderr
    told = json.loads(launch("status", "r", "--json").stdout)["failure"]
    assert told["known_error"] is told["cause"] is told["fix"] is None
    assert told["lines"][0].startswith("ValueError")


def test_an_exit_code_alone_is_explained(make_run: Callable[..., Path], launch: Launch) -> None:
    make_run("r", exit_code=76)
    done = launch("status", "r")
    assert "cause: the first node resolves to a loopback address" in done.stderr


def test_a_good_run_has_no_failure_whatever_its_last_words(make_run: Callable[..., Path], launch: Launch) -> None:
    make_run("r", exit_code=0, gpu001=STEP + GOODBYE)
    done = launch("status", "r")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(launch("status", "r", "--json").stdout)["failure"] is None


def test_a_run_that_completed_with_nan_does_not_look_like_a_good_one(workplace: Path, launch: Launch) -> None:
    run = workplace / "runs" / "completed"
    shutil.copytree(ROOT / "tests" / "compat" / "v0.1" / "runs" / "completed", run)
    for log in run.glob("logs/0*.log"):
        log.write_bytes(re.sub(rb"loss: +[0-9.]+", b"loss:  nan", log.read_bytes()))
    done = launch("status", "completed")
    assert done.returncode == 0 and "  problem: " in done.stdout and "NaN" in done.stdout
    assert any("NaN" in problem for problem in json.loads(launch("status", "completed", "--json").stdout)["problems"])


# --- what is promised elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.code)
def test_the_commands_that_are_proposed_exist(row: Known) -> None:
    fixes = "; ".join((row.fix, *(case.get("fix", "") for case in row.cases)))
    texts = re.findall(r"launcher ((?:[a-z0-9]+ )*[^;|]*)", re.sub(r"   \(.*?\)", "", fixes))
    for text in texts:
        command: click.Command = program
        words = text.split()
        context = click.Context(command)
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None, text
            command = found
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= options, text
        assert not ("{again}" in words and given & {"--gpu", "--recipe"}), f"submit refuses it: {text}"


def test_the_page_of_known_errors_has_every_family() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert {marked[3] for marked in MARKED.finditer(text)} == {row.family for row in KNOWN}
