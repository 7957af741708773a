"""The command that prints results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from launcher.base.output import as_json, echo, echo_file, print_json, some, warn
from launcher.config.options import gone, run_argument, runs_dir_option
from launcher.results import formats
from launcher.results.columns import as_dict
from launcher.results.outcome import Outcome
from launcher.results.read import outcome_of
from launcher.results.sides import nothing_logged
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState


@click.command()
@run_argument(required=False, several=True)
@runs_dir_option
@click.option("--all", "every", is_flag=True, help="Every run in the runs directory.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
    help="How.",
)
@gone("--update", "launcher results --format markdown > FILE")
@gone("--entity", "launcher results RUN --format markdown > FILE")
@gone("--output", "launcher results RUN --format markdown > FILE")
@as_json
def results(names: tuple[str, ...], runs_dir: Path, every: bool, form: str, as_json: bool) -> None:
    """Print results as the published table has them.

    Without a RUN, the newest run's. RUN is a name or a path. With --json, one run is an object, and several are a
    list.

    \b
    launcher results
    launcher results my-run --json
    launcher results --all --format csv > results.csv
    """
    if every and names:
        raise click.UsageError("either RUN or --all")
    several = every or len(names) > 1
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
    else:
        echo(*(formats.table(outcomes) if several else formats.one_run(outcomes[0])).split("\n"))


def named_runs(names: Sequence[str], runs_dir: Path, every: bool) -> list[tuple[Run, JobState]]:
    """The runs that are named, else all or the newest, each once and with its state: one question to Slurm per
    directory of runs, as names are unique within one. Never none.
    """
    found = runs.all_runs(runs_dir) if every else [runs.open_run(name, runs_dir) for name in names]
    by_path = {run.path: run for run in found or [runs.open_run("", runs_dir)]}
    by_place: dict[Path, list[Run]] = {}
    for run in by_path.values():
        by_place.setdefault(run.path.parent, []).append(run)
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
        warn(f"nothing logged yet, or nothing known: {some([f'{run.name} ({state.name})' for run, state in silent])}")
    return outcomes
