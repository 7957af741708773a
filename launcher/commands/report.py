"""The command `launcher report`: what it takes and what it prints."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click

from launcher import version
from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, unreadable, write_text
from launcher.base.output import as_json, counted, echo, echo_file, print_json, some
from launcher.commands.results import named_runs
from launcher.commands.runs import failure_of
from launcher.config.options import FilePath, runs_dir_option
from launcher.logs.known_errors import Failure
from launcher.report.page import GENERATOR, page
from launcher.report.plots import write_plots
from launcher.results.accept import OWN_FAULT
from launcher.results.outcome import Outcome
from launcher.results.published import published
from launcher.results.read import outcome_of
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@runs_dir_option
@click.option(
    "--output",
    "-o",
    type=FilePath(path_type=Path, allow_dash=True),
    default="report.html",
    metavar="FILE",
    show_default=True,
    help="The page to write; - prints it.",
)
@click.option(
    "--plots", type=FilePath(path_type=Path), metavar="DIR", help="Also write each chart there as an SVG file."
)
@as_json
def report(names: tuple[str, ...], runs_dir: Path, output: Path, plots: Path | None, as_json: bool) -> None:
    """Write runs as one HTML page with charts.

    The page is one file that needs no other. Without a RUN, it shows all runs that logged something.

    \b
    launcher report -o page.html
    launcher report my-run my-run-again -o page.html --plots plots
    ssh login launcher report -o - > page.html
    """
    to_stdout = str(output) == "-"
    if to_stdout and as_json:
        raise click.UsageError("-o - and --json cannot be combined, as both print to standard output")
    if not to_stdout:
        refuse_to_overwrite(output)
    outcomes, left_out = _outcomes(names, runs_dir)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    text = page(outcomes, published(), made=made, version=version(), left_out=left_out)
    if to_stdout:
        echo_file(text)
    else:
        write_text(Path(os.path.realpath(output)), text)  # a link to the newest page stays one
    files = write_plots(outcomes, published(), plots) if plots else []
    if as_json:
        print_json(
            {
                "page": str(output),
                "runs": len(outcomes),
                "incomplete": [outcome.run for outcome in outcomes if not outcome.complete],
                "left_out": [{"run": name, "why": why} for name, why in left_out],
                "plots": [str(path) for path in files],
            }
        )
        return
    incomplete = sum(not outcome.complete for outcome in outcomes)
    echo(f"{'page' if to_stdout else output}: {counted(len(outcomes), 'run')}, {incomplete} incomplete", err=to_stdout)
    for path in files:
        echo(str(path), err=to_stdout)
    if left_out:  # the page names all
        echo(f"left out: {some([f'{name}: {why}' for name, why in left_out])}", err=True)


def _outcomes(names: Sequence[str], runs_dir: Path) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """The runs' results, newest first, and (run, why) of those that have none."""
    outcomes: list[Outcome] = []
    left_out: list[tuple[str, str]] = []
    for run, state in named_runs(names, runs_dir, every=not names):
        outcome = outcome_of(run, state)
        if outcome is None or (outcome.step is None and state.name not in OWN_FAULT):
            left_out.append((run.name, f"{state.name}, has logged no step"))
            continue
        if failure := cause_of(run, state):
            own = failure.cause if failure.fault == "run" else ""
            outcome = replace(outcome, notes=(*outcome.notes, failure.cause), own_fault=own)
        outcomes.append(outcome)
    if not outcomes:
        raise LauncherError(
            "nothing-to-show",
            f"there is nothing to show: {some([f'{name} ({why})' for name, why in left_out])}",
            quoted("launcher", "list", "--runs-dir", runs_dir),
            status=ExitStatus.NO_DATA,
        )
    return outcomes, left_out


def cause_of(run: Run, state: JobState) -> Failure | None:
    """Why the job failed by its own doing; None where that is not known or its logs cannot be read."""
    if state.name not in OWN_FAULT:
        return None
    try:
        failure = failure_of(run, state)
    except LauncherError:
        return None
    return failure if failure and failure.cause else None


def refuse_to_overwrite(path: Path, generator: str = GENERATOR, option: str = "-o FILE") -> None:
    """A page is made again and again; any other file of that name is somebody's."""
    try:
        if not path.parent.is_dir():
            raise LauncherError(
                "directory-missing",
                f"cannot write {path}: there is no folder {path.parent}",
                quoted("mkdir", "-p", path.parent),
                status=ExitStatus.FILESYSTEM,
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise filesystem_error(path, PermissionError(errno.EACCES, "Permission denied"), option)
        is_page = not path.exists()
        if path.is_file():
            with path.open("rb") as stream:
                is_page = f'content="{generator}"'.encode() in stream.read(400)
    except OSError as error:
        raise unreadable(path, error, f"choose another: {option}") from error
    if not is_page:
        raise LauncherError(
            "file-exists",
            f"{path} exists and was not written by this command, so it is kept",
            f"choose another: {option}",
            status=ExitStatus.EXISTS,
        )
