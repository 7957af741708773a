"""The command that prints and writes results."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, write_text
from launcher.base.output import as_json, echo, echo_file, print_json, some, terminal_width, warn
from launcher.base.values import by
from launcher.config.options import gone, run_argument, runs_dir_option
from launcher.results import formats
from launcher.results.columns import as_dict
from launcher.results.outcome import Outcome
from launcher.results.read import outcome_of
from launcher.results.sides import nothing_logged
from launcher.results.submission import submissions
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState


@click.command()
@run_argument(required=False, several=True)
@runs_dir_option
@click.option("--all", "every", is_flag=True, help="All runs in the runs directory.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json", "torchtitan"]),
    default="text",
    show_default=True,
    help="Output format. torchtitan writes a file for the benchmarks/ folder of torchtitan's repository.",
)
@gone("--update", "launcher results --format markdown > FILE")
@click.option("--entity", default="", metavar="NAME", help="Your name or your team's, for --format torchtitan.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Directory to write the torchtitan file to.",
)
@as_json
def results(
    names: tuple[str, ...], runs_dir: Path, every: bool, form: str, entity: str, output: Path | None, as_json: bool
) -> None:
    """Print results in the form of the published table.

    RUN is a name, a path, or a pattern such as 'gb200-*'; the default is the newest run. --json prints one run as an
    object, and several as a list.

    \b
    launcher results
    launcher results my-run --json
    launcher results --all --format csv > results.csv
    launcher results my-run --format torchtitan --entity my-team -o .
    """
    if output and (as_json or form != "torchtitan"):
        raise click.UsageError("--output works only with --format torchtitan; save the other formats with > FILE")
    if every and names:
        raise click.UsageError("either RUN or --all")
    several = every or len(names) > 1 or any(map(_is_pattern, names))
    form = "json" if as_json else form
    is_table = form == "markdown" or (form == "text" and several)
    outcomes = _outcomes(named_runs(names, runs_dir, every), several, with_data_share=not is_table)
    if form == "json":
        values = [as_dict(outcome) for outcome in outcomes]
        print_json(values if several else values[0])
    elif form == "csv":
        echo_file(formats.csv_text(outcomes))
    elif form == "markdown":
        echo(*formats.markdown(outcomes).split("\n"))
    elif form == "torchtitan":
        _submit(outcomes, entity, output)
    else:
        echo(*(formats.table(outcomes, terminal_width()) if several else formats.one_run(outcomes[0])).split("\n"))


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def named_runs(names: Sequence[str], runs_dir: Path, every: bool) -> list[tuple[Run, JobState]]:
    """The runs that are named, by patterns, too, else all or the newest, each once and with its state: one question to
    Slurm per directory of runs, as names are unique within one. Never none.
    """
    known = runs.all_runs(runs_dir) if every or any(map(_is_pattern, names)) else []
    found = known if every else []
    for name in names:
        matching = [run for run in known if _is_pattern(name) and fnmatchcase(run.name, name)]
        found += matching or [runs.open_run(name, runs_dir)]
    by_path = {run.path: run for run in found or [runs.open_run("", runs_dir)]}
    by_place = by(lambda run: run.path.parent, by_path.values())
    states = {place: control.states(members) for place, members in by_place.items()}
    return [(run, states[run.path.parent][run.name]) for run in by_path.values()]


def _outcomes(found: Sequence[tuple[Run, JobState]], several: bool, with_data_share: bool) -> list[Outcome]:
    """What there is to tell of the runs. Raises LauncherError where that is nothing; of several, warns."""
    outcomes, silent = [], []
    for run, state in found:
        outcome = outcome_of(run, state, with_data_share)
        if outcome is None or (not several and not outcome.series):
            silent.append((run, state))
        else:
            outcomes.append(outcome)
    if not outcomes:
        raise nothing_logged(*silent[0])
    if silent:
        warn(f"nothing logged yet, or state unknown: {some([f'{run.name} ({state.name})' for run, state in silent])}")
    return outcomes


def _submit(outcomes: Sequence[Outcome], entity: str, output: Path | None) -> None:
    for name, text in submissions(outcomes, entity).items():
        if output is None:
            echo(f"{name}:", err=True)
            echo_file(text)
            continue
        path = output / name
        try:
            output.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
                raise LauncherError(
                    "file-exists",
                    f"{path} exists with other content",
                    quoted("mv", path, f"{path}.old"),
                    status=ExitStatus.EXISTS,
                )
        except OSError as error:
            raise filesystem_error(path, error) from error
        write_text(path, text)
        echo(str(path))
