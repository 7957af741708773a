"""The commands that hold results against each other: `compare` shows two side by side, `accept` gives a verdict."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from launcher import version
from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import write_json, write_text
from launcher.base.output import as_json, echo, print_json, style, warn
from launcher.commands.asked import describe_run, looked_at, secrets_of, spec_of, tell
from launcher.commands.report import cause_of, refuse_to_overwrite
from launcher.commands.runs import remembered
from launcher.commands.start import ask_first, node_hours, say_where, submitted
from launcher.commands.watching import watch
from launcher.config.help import RunCommand
from launcher.config.options import FilePath, RunOptions, run_options, run_or_file, runs_dir_option
from launcher.config.user_file import runs_dir as saved_runs_dir
from launcher.nodes import unfit
from launcher.report.acceptance import GENERATOR, acceptance
from launcher.results import accept as judging
from launcher.results import compare as comparison
from launcher.results.accept import Verdict
from launcher.results.outcome import Outcome
from launcher.results.published import nearest, published, same_gpu
from launcher.results.read import node_checks, outcome_of
from launcher.results.sides import results_in
from launcher.runs import control
from launcher.runs.directory import Run, open_run
from launcher.scheduler.state import JobState

FILE = "accept.json"
_COLOURS = {"PASS": "green", "FAIL": "red", "CANNOT SAY": "yellow"}


def _share(_context: click.Context, parameter: click.Parameter, value: str) -> float:
    """Reads `0.95` or `95%`; nothing is above 0% of the baseline, and every node may be as slow as it likes."""
    text = value.strip()
    least, most = (0.0, 1.0) if parameter.name == "max_spread" else (1e-9, 2.0)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not least <= share <= most:
        raise click.BadParameter(f"{text[:40]!r} is no share up to {100 * most:g}%; write 0.95 or 95%")
    return share


@click.command()
@click.argument("a", metavar="A", shell_complete=run_or_file)
@click.argument("b", metavar="B", shell_complete=run_or_file)
@runs_dir_option
@click.option("--exit-code", is_flag=True, help="Exit with 12 if B is slower, and with 13 if that cannot be said.")
@as_json
def compare(a: str, b: str, runs_dir: Path, exit_code: bool, as_json: bool) -> None:
    """Compare two results and show which differences exceed noise.

    A and B are each a run (a name or a path), a file (from `launcher results --format json`, or a CSV like
    slurm/reference-results.csv), or the word published: the published row that matches the other side best.

    \b
    launcher compare before-driver-update after-driver-update
    launcher compare my-run published
    launcher compare my-run accepted-in-june.json
    """
    first, second = _two(a, b, runs_dir)
    found = comparison.compare(first, second)
    if as_json:
        print_json(comparison.as_dict(found))
    else:
        echo(*comparison.as_text(found, lambda text: style(text, fg="yellow")))
    if exit_code:
        sys.exit(_COMPARED.get(found.verdict, ExitStatus.OK))


_COMPARED = {comparison.Verdict.SLOWER: ExitStatus.BELOW, comparison.Verdict.CANNOT_SAY: ExitStatus.CANNOT_SAY}


def _two(a: str, b: str, runs_dir: Path) -> tuple[Outcome, Outcome]:
    """One result of each side; where one holds several, the one that is nearest to the other."""
    first, second = results_in(a, runs_dir), results_in(b, runs_dir)
    if len(first) > 1 and len(second) > 1:
        raise LauncherError(
            "several-results", f"{a} and {b} each hold several results", quoted("launcher", "compare", "RUN", b)
        )
    if len(first) > 1:
        return _nearest(second[0], first, a), second[0]
    return first[0], _nearest(first[0], second, b)


def _nearest(one: Outcome, many: Sequence[Outcome], where: str) -> Outcome:
    row = many[0] if len(many) == 1 else nearest(one, many)
    if row is None:
        raise LauncherError(
            "gpu-without-result",
            f"{where} has no result for {one.gpu}, only for {', '.join(sorted({result.gpu for result in many}))}",
            "launcher compare A B with a run or a file of your own",
            status=ExitStatus.NOT_FOUND,
        )
    return row


@click.command(cls=RunCommand)
@run_options
@click.option(
    "--threshold",
    callback=_share,
    default="95%",
    show_default=True,
    metavar="SHARE",
    help="Share of the baseline's tokens/s that the run must reach, such as 0.95 or 95%.",
)
@click.option(
    "--max-spread",
    callback=_share,
    default="5%",
    show_default=True,
    metavar="SHARE",
    help="How much slower than the other nodes a node may be.",
)
@click.option(
    "--baseline",
    default="published",
    show_default=True,
    metavar="published|FILE|RUN",
    help="What to compare with: the published rows, or a result of your own.",
)
@click.option(
    "--report",
    type=FilePath(path_type=Path),
    metavar="FILE.html",
    help="Also write a report to hand over: verdict, conditions, nodes and figures.",
)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Wait for the run to end, if it is still running. A run that this command submits is always followed.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit even if a check says that the job would never start. Does not ask.")
@as_json
def accept(
    options: RunOptions,
    threshold: float,
    max_spread: float,
    baseline: str,
    report: Path | None,
    follow: bool,
    yes: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Judge a run: PASS, FAIL or CANNOT SAY, with reasons.

    Judges speed, nodes, loss, and whether all numbers are finite. Name a run to judge it, or give the options of
    `submit` to submit a run, follow it and judge it. The verdict is saved in RUN/accept.json. Exit code 0: PASS; 12:
    FAIL; 13: CANNOT SAY.

    \b
    launcher accept --image titan.sqsh --nodes 9            after every change of the cluster
    launcher accept my-run                                  judge an existing run
    launcher accept my-run --baseline accepted-in-june.json
    launcher accept my-run --report acceptance.html         one page to hand over
    """
    runs_dir = Path(str(options.values.get("job.runs_dir") or saved_runs_dir()))
    asked = [key for key in options.values if key != "job.runs_dir"] or options.secret_env
    if not asked and options.run_file is None:
        raise click.UsageError(
            "name a run to judge, or submit one with the options of submit:  launcher accept --image FILE --nodes N"
        )
    if asked and options.run_file is not None and not options.run_file.is_file():
        raise click.UsageError(
            f"{options.run_file}: options of submit need a RUN.toml to repeat; to judge this run, leave them out"
        )
    # Before hours are spent on a run that nothing could be compared with, or whose report could not be written.
    if report:
        refuse_to_overwrite(report, GENERATOR, "--report FILE.html")
    rows = results_in(baseline, runs_dir)
    run = _submit(options, rows, yes or as_json, force) if asked else open_run(str(options.run_file), runs_dir)
    state = _end_of(run) if asked or follow else control.states([run])[run.name]
    _tell(run, state, rows, {"threshold": threshold, "max_spread": max_spread, "baseline": baseline}, report, as_json)


def _submit(options: RunOptions, rows: Sequence[Outcome], yes: bool, force: bool) -> Run:
    """As `launcher submit` does; what it says goes to stderr, since the verdict is this command's output."""
    asked = spec_of(options)
    secrets = secrets_of(asked, options)
    spec, findings = looked_at(asked, force)
    tell(findings, force)
    say_where(findings)
    gpu = spec.profile.gpu
    if not any(same_gpu(gpu, row.gpu) for row in rows):
        warn(
            f"no result for {gpu} to compare with, so the verdict can only be FAIL or CANNOT SAY; "
            "--baseline FILE or RUN takes one of yours"
        )
    size = describe_run(spec)
    quiet = yes or force or spec.job.scheduler == "local"
    ask_first(lambda: f"Submit {size} ({node_hours(spec)}) and judge it?", quiet, err=True)
    with submitted(spec, secrets) as (run, job_id):
        echo(f"{run.name}: job {job_id}, {size}", err=True)
    return run


def _end_of(run: Run) -> JobState:
    """Shows the run's progress on stderr until it has ended. Ctrl-C ends this program, not the run."""
    try:
        watch(run, sys.stderr)
    except KeyboardInterrupt:
        echo("", f"detached; {run.name} goes on: {quoted('launcher', 'accept', run.reference, '--follow')}", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    state = control.state(run)
    remembered(run, state)
    return state


def _tell(
    run: Run, state: JobState, rows: Sequence[Outcome], inputs: dict[str, Any], report: Path | None, as_json: bool
) -> None:
    """Judges, keeps the verdict in the run directory, prints it, and exits with its code."""
    outcome = outcome_of(run, state)
    verdict = judging.judge(
        outcome,
        rows,
        threshold=inputs["threshold"],
        max_spread=inputs["max_spread"],
        losses=published(),
        faults=_faults(run, state),
        state=state.name,
    )
    inputs |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "launcher": version()}
    kept = judging.as_dict(run.name, outcome, verdict, inputs) | {
        "next": (steps := _next_steps(run, state, verdict, inputs["baseline"]))
    }
    try:
        write_json(run.path / FILE, kept)
    except LauncherError as error:
        warn(f"the verdict could not be saved: {error.what}")
    if as_json:
        print_json(kept | ({"report": str(report)} if report else {}))
    else:
        _print(judging.headline(run.name, outcome, verdict), verdict)
        for step in steps:
            echo(f"  {'try':<10}  {step}")
    if report:
        text = acceptance(run.name, run.reference, outcome, verdict, inputs, node_checks(run), steps)
        write_text(Path(os.path.realpath(report)), text, option="--report FILE.html")
        echo(f"report: {report}", err=True)
    sys.exit(verdict.exit)


def _next_steps(run: Run, state: JobState, verdict: Verdict, baseline: str) -> list[str]:
    """What to type: after a FAIL, leave the slow nodes out, or see what differs; then the run again. A run that goes on
    is waited for, and one that nothing published is like needs a baseline.
    """
    if verdict.word != "FAIL" and state.active:
        return [quoted("launcher", "accept", run.reference, "--follow")]
    if verdict.word == "CANNOT SAY" and state.name == "COMPLETED" and not verdict.baseline and baseline == "published":
        return [f"{quoted('launcher', 'accept', run.reference, '--baseline')} RUN (or FILE)"]
    if verdict.word != "FAIL":
        return []
    slow = [host for reason in verdict.reasons for host in reason.nodes]
    steps = []
    if slow:
        steps = [quoted("launcher", "cluster", "nodes", "add", *slow, "--reason", f"slow in {run.name}")]
    elif state.name != "COMPLETED":
        steps = [quoted("launcher", "status", run.reference)]
    elif verdict.baseline:
        steps = [quoted("launcher", "compare", run.reference, baseline)]
    file = run.path / "run.toml"
    file = file.relative_to(here) if file.is_relative_to(here := Path.cwd()) else file
    return [*steps, quoted("launcher", "accept", file, "--name", f"{run.name[:58]}-again")]


def _faults(run: Run, state: JobState) -> list[str]:
    """Which nodes failed their check, or why the job failed as far as that is known."""
    if state.unfit:
        unfits = unfit.of_run(run)
        return [f"node {one.host} is not fit to train: {one.why}" for one in unfits] or [control.UNFIT]
    failure = cause_of(run, state)
    return [failure.cause] if failure else []


def _print(headline: str, verdict: Verdict) -> None:
    word = str(verdict.word)
    echo(f"{style(word, fg=_COLOURS[word], bold=True)}  {headline}")
    for reason in verdict.reasons:
        mark = "ok" if reason.word == "PASS" else str(reason.word)
        styled = style(f"{mark:<10}", fg=_COLOURS[str(reason.word)])
        echo(f"  {styled}  {reason.what}")
    for note in verdict.notes:
        echo(f"  {'note':<10}  {note}")


for _argument in accept.params:  # the same place on the command line as submit's file
    if _argument.name == "run_file":
        _argument.metavar = "[RUN]"
