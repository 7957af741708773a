"""`launcher report`: which runs it takes, what it says, and what it never overwrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.base.errors import ExitStatus, LauncherError
from launcher.cli import launcher
from tests.unit.outcomes import write_run


@pytest.fixture
def runs_dir(workplace: Path) -> Path:
    write_run(workplace / "runs" / "first", at=1000.0)
    write_run(workplace / "runs" / "second", at=2000.0, steps_logged=10)
    return workplace / "runs"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(launcher, ["report", *arguments])


def refused(*arguments: str) -> LauncherError:
    error = call(*arguments).exception
    assert isinstance(error, LauncherError), error
    return error


def test_all_runs_newest_first_and_again_over_its_own_page(runs_dir: Path) -> None:
    done = call("-o", "page.html")
    assert (done.exit_code, done.stdout) == (0, "page.html: 2 runs, 1 incomplete\n"), done.output
    text = Path("page.html").read_text()
    assert text.index('"run">second<') < text.index('"run">first<') and "step 10 of 100" in text
    assert call("-o", "page.html").exit_code == 0
    assert sorted(path.name for path in runs_dir.parent.iterdir()) == ["home", "page.html", "runs"]


def test_named_runs_once_each_and_as_json(runs_dir: Path) -> None:
    done = call("first", str(runs_dir / "first"), "--json")
    assert json.loads(done.stdout) == {"page": "report.html", "runs": 1, "incomplete": [], "left_out": [], "plots": []}


def test_the_page_on_stdout_is_nothing_but_the_page(runs_dir: Path) -> None:
    done = call("-o", "-")
    assert done.stdout.startswith("<!doctype html>") and done.stdout.endswith("</html>\n")
    assert done.stderr.startswith("page: 2 runs") and not Path("-").exists()
    assert call("-o", "-", "--json").exit_code == ExitStatus.USAGE


def test_other_files_are_left_as_they_are(runs_dir: Path) -> None:
    Path("notes.html").write_text("<p>mine</p>")
    assert refused("-o", "notes.html").status == ExitStatus.EXISTS
    assert Path("notes.html").read_text() == "<p>mine</p>"
    assert refused("-o", "runs").status == ExitStatus.EXISTS
    assert refused("-o", "no/such/page.html").fix == "mkdir -p no/such"


def test_runs_without_a_step_are_named(runs_dir: Path) -> None:
    write_run(runs_dir / "silent", at=3000.0, steps_logged=0)
    done = call()
    assert "report.html: 2 runs" in done.stdout and "left out: silent: " in done.stderr
    assert "silent" in Path("report.html").read_text()
    assert refused("silent").status == ExitStatus.NO_DATA
    assert refused("nobody").status == ExitStatus.NOT_FOUND
    Path("empty").mkdir()
    assert refused("--runs-dir", "empty").status == ExitStatus.NOT_FOUND


def test_a_run_that_needs_more_memory_than_a_gpu_has_is_not_held_against_the_cluster(runs_dir: Path) -> None:
    run = write_run(runs_dir / "large", steps_logged=0, end='{"exit_code": 1}')
    error = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    (run / "logs" / "0000-gb200-001.log").write_text(f"Traceback (most recent call last):\n{error}\n")
    call("large")
    text = Path("report.html").read_text()
    assert "Not measured. Runs that failed: large." in text
    assert "large: a GPU&#39;s memory is too small for this run" in text


def test_plots_are_named(runs_dir: Path) -> None:
    done = call("--plots", "plots")
    names = [Path(line).name for line in done.stdout.splitlines()[1:]]
    assert names == sorted(names, key=lambda name: ("trend", "throughput", "loss", "scaling").index(name.split("-")[0]))
    assert names and all((Path("plots") / name).is_file() and name.endswith(".svg") for name in names)
