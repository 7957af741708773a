"""The commands about a run that was submitted: its state, progress, logs, end and result."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_json
from launcher.base.output import (
    age,
    as_json,
    clock,
    columns,
    counted,
    echo,
    plain,
    print_json,
    some,
    style,
    terminal_width,
    warn,
)
from launcher.commands.watching import about, plain_line, watch_all, why_it_waits
from launcher.commands.watching import watch as show_run
from launcher.config.options import run_argument, runs_dir_option
from launcher.logs.first_error import find_errors
from launcher.logs.follow import Progress, folded, logs_of, ranks_of
from launcher.logs.known_errors import SMALLER, Failure, explain, how_it_ended
from launcher.nodes import hardware, unfit
from launcher.nodes.bad_nodes import BadNode, remember
from launcher.results.columns import as_dict
from launcher.results.formats import attempt_text
from launcher.results.outcome import Lack
from launcher.results.read import outcome_of, results_of
from launcher.results.rows import markdown_row, summary_line
from launcher.runs import attach, control
from launcher.runs import directory as runs
from launcher.runs.attempts import WHY_NOT, attempts_of
from launcher.runs.directory import Run
from launcher.scheduler.state import GOING, JobState

_STATE_COLOURS = {"COMPLETED": "green", "RUNNING": "cyan", "FAILED": "red", "UNKNOWN": "yellow", "TIMEOUT": "red"}


@click.command("list")
@runs_dir_option
@as_json
def list_(runs_dir: Path, as_json: bool) -> None:
    """List the runs, newest first."""
    runs.remove_left_over(runs_dir)
    found = runs.all_runs(runs_dir)
    states = control.states(found)
    rows = [_summary(run, states[run.name]) | {"reason": states[run.name].reason} for run in found]
    if as_json:
        print_json(rows)
    elif not rows:
        echo(f"No runs yet in {runs_dir}. Start one: launcher submit --local --recipe debug", err=True)
    else:
        head = ("run", "state", "job", "size", "recipe", "age")
        table = [
            (
                row["run"],
                row["state"],
                row["job_id"],
                f"{row['nodes']} x {row['gpus_per_node']} {row['gpu']}{' ranks' if run.on_cpu else ''}",
                row["recipe"],
                age(row["age_s"]),
            )
            for run, row in zip(found, rows, strict=True)
        ]
        first, *lines = columns([head, *table], width=terminal_width())
        echo(style(first, dim=True))
        for row, line in zip(rows, lines, strict=True):
            echo(style(line, fg=_STATE_COLOURS.get(row["state"])))
        for reason in sorted({row["reason"] for row in rows if row["state"] == "UNKNOWN" and row["reason"]}):
            echo(f"UNKNOWN: {reason}", err=True)


@click.command()
@run_argument(required=False, several=True)
@runs_dir_option
@as_json
def status(names: tuple[str, ...], runs_dir: Path, as_json: bool) -> None:
    """Show the state of runs (default: the newest), and why.

    Exit code 0: waiting, running or completed; 8: failed; 9: unknown; 11: a node failed its check before training. With
    several runs, the first code that is not 0 counts.
    """
    found = [runs.open_run(name, runs_dir) for name in names or ("",)]
    states = [control.state(run) for run in found]
    said = [_tell_status(run, state, as_json) for run, state in zip(found, states, strict=True)]
    if as_json:
        print_json(said if len(said) > 1 else said[0])
    for state in states:
        exit_for(state)


def _tell_status(run: Run, state: JobState, as_json: bool) -> dict[str, Any]:
    """What --json prints of a run; without it, prints the same for people."""
    row = _summary(run, state)
    waiting, progress = why_it_waits(run, state), _progress(run, state)
    failure, left_out = failure_of(run, state), remembered(run, state)
    hang, faults = run.hang, hardware.of_run(run) if failure else []
    # Its progress line says what a run that goes on has reached, without all of its logs being read.
    outcome = None if state.active else outcome_of(run, state, with_data_share=False)
    completed, problems = state.name == "COMPLETED", outcome.problems if outcome else ()
    problems = tuple(problem for problem in problems if completed or problem.kind is Lack.NON_FINITE)
    tries = outcome.attempts if outcome else results_of(attempts_of(run))
    if as_json:
        return row | {
            "attempts": [asdict(one) for one in tries],
            "problems": [problem.text for problem in problems],
            "source": state.source,
            "reason": state.reason,
            "exit_code": state.exit_code,
            "waiting": waiting,
            "progress": attach.as_dict(progress) if progress else None,
            "failure": failure.as_json() if failure else None,
            "left_out": [node.host for node in left_out],
            "hang": {key: hang.get(key) for key in ("why", "culprit", "step", "silence_s")} if hang else None,
            "hardware": [vars(one) | {"drain": one.drain} for one in faults],
        }
    detail = "; ".join(text for text in (state.reason, state.source and f"from {state.source}") if text)
    echo(f"{run.name}: {state.name}" + (f" ({detail})" if detail else ""))
    echo(f"  job {row['job_id'] or 'none'}, submitted {age(row['age_s'])} ago, {run.path}")
    for line in waiting:
        echo(f"  {line}")
    if len(tries) > 1:
        unit = about(run).unit
        echo(*(f"  attempt {one.number}: {attempt_text(one, unit)}" for one in tries))
    if why := tries[-1].why_not:
        echo(f"  no further attempt: {WHY_NOT.get(why, why)}")
        if step := tries[-1].step:
            echo(f"  to go on from step {step:,}: {quoted('launcher', 'resume', run.reference)}")
    if progress:
        echo(f"  {plain_line(progress, about(run).unit)}")
    if hang and state.active:
        echo(f"  hang: {plain(str(hang.get('why')))}")
    again = quoted("launcher", "submit", run.path / "run.toml")
    for problem in problems:
        echo(f"  problem: {problem.text}")
        if problem.kind is Lack.NON_FINITE and not failure:
            echo(f"  try: {again} --set recipe.lr=1e-4   (a smaller learning rate)")
    if completed and outcome and outcome.series:
        echo(f"  {markdown_row(outcome)}", f"  {summary_line(outcome)}")
    if failure:
        _print_failure(run, failure, left_out)
    elif not state.known:
        echo(f"  look: {quoted('launcher', 'logs', run.reference)}")
        first = "" if run.is_anothers else f"{quoted('launcher', 'cancel', run.reference)} && "
        echo(f"  again: {first}{again}")
    return {}


@click.command()
@run_argument(required=False)
@runs_dir_option
@click.option("--all", "-a", "every", is_flag=True, help="Show all active runs in one table.")
@as_json
def watch(run: str, runs_dir: Path, every: bool, as_json: bool) -> None:
    """Follow a run (default: the newest) to its end. Ctrl-C detaches; the run goes on.

    --json prints one object per logged step.
    """
    if every and run:
        raise click.UsageError("either RUN or --all")
    if not every:
        return follow_run(runs.open_run(run, runs_dir), as_json)
    try:
        watch_all(runs_dir, as_json)
    except KeyboardInterrupt:
        echo("", "detached; the runs go on", err=True)
        sys.exit(ExitStatus.INTERRUPTED)


@click.command()
@run_argument(required=False)
@runs_dir_option
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the run ends; Ctrl-C stops.")
@click.option("--node", default="", metavar="NODE", help="Only the log of this node; 'job' for that of the job script.")
@click.option("--rank", type=click.IntRange(0), metavar="N", help="Only the output of this rank.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="The logs of an earlier attempt.")
@click.option("--errors", is_flag=True, help="The first error of each log, with what was printed with it.")
@click.option("--lines", "-n", "count", type=click.IntRange(1, 10**9), metavar="N", help="Only the last N lines.")
@as_json
def logs(
    run: str,
    runs_dir: Path,
    follow: bool,
    node: str,
    rank: int | None,
    attempt: int | None,
    errors: bool,
    count: int | None,
    as_json: bool,
) -> None:
    """Print the logs of all nodes as one, each line with its node.

    A step that several nodes logged is printed once; --node and --json print every line. The files themselves are
    RUN/logs/NNNN-<node>.log and RUN/logs/job.log, and those of the ranks are below RUN/logs/ranks.

    \b
    launcher logs my-run --errors
    launcher logs my-run --node gpu003 -n 50
    """
    if follow and (errors or count or attempt):
        raise click.UsageError("--follow cannot be combined with --errors, --lines or --attempt")
    if node and rank is not None:
        raise click.UsageError("use either --node or --rank: a rank runs on one node")
    found = runs.open_run(run, runs_dir)
    tries = {one.number: one.logs for one in attempts_of(found)}
    if (log_dir := tries.get(attempt or max(tries))) is None:
        raise click.UsageError(f"{found.name} has {counted(len(tries), 'attempt')}")
    known = logs_of(log_dir, node, rank, found.ranks_per_node)
    if (node or rank is not None) and not known and not follow:
        by_rank = [f"rank {one}" for one in ranks_of(log_dir, found.ranks_per_node)]
        names = some(list(dict(logs_of(log_dir))) if node else by_rank) or "none"
        raise click.UsageError(f"{found.name} has no log of {node or f'rank {rank}'}; it has: {names}")
    lines: Iterable[tuple[str, str]]
    if errors:
        # A node's log shows one of its ranks; what the others wrote is in the files that torchrun keeps per rank.
        ranks = f"ranks/????-{escape(node) or '*'}/*/*/*/stderr.log"
        hidden = [] if rank is not None else sorted(log_dir.glob(ranks))
        known += [(f"{path.parts[-5][5:]}, local rank {path.parts[-2]}", path) for path in hidden]
        lines = ((name, line) for name, path in known for line in find_errors([path]).lines)
    else:
        lines = attach.log_lines(found, follow, node, rank, log_dir)
        lines = lines if as_json or node else folded(lines)
    shown = 0
    for node, line in deque(lines, maxlen=count) if count else lines:
        shown += 1
        if as_json:
            print_json({"node": node, "line": line}, indent=None)
        else:
            echo(f"{style(node, fg='cyan')}: {line}")
    if errors and not shown:
        echo(f"no errors in {counted(len(known), 'log')}", err=True)


@click.command()
@run_argument(required=True)
@runs_dir_option
@as_json
def cancel(run: str, runs_dir: Path, as_json: bool) -> None:
    """Cancel a run. If it has not started, it never will, even if Slurm does not show its job now.

    Exit code 9: the run has started, but Slurm does not know its job, so it may still be running.
    """
    found = runs.open_run(run, runs_dir)
    before, cancelled = control.cancel(found)
    if as_json:
        print_json({"run": found.name, "was": before.name, "cancelled": cancelled})
    elif cancelled:
        echo(f"{found.name}: cancelled (was {before.name})")
    elif before.known:
        echo(f"{found.name}: already ended: {before.name}")
    else:
        echo(f"{found.name}: not cancelled: {before.reason}")
    if not cancelled and not before.known:
        sys.exit(ExitStatus.JOB_UNKNOWN)


def follow_run(run: Run, as_json: bool) -> None:
    """Shows the run's progress until it ends, then its results row. Exits with the run's own status.

    Ctrl-C ends the program, not the run.
    """
    try:
        if as_json:
            for snapshot in attach.progress_of(run):
                print_json(attach.as_dict(snapshot), indent=None)
        else:
            show_run(run, sys.stdout)
    except KeyboardInterrupt:
        echo("", f"detached; {run.name} goes on: {quoted('launcher', 'watch', run.reference)}", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    state = control.state(run)
    outcome, failure, left_out = outcome_of(run, state), failure_of(run, state), remembered(run, state)
    if as_json:
        result = as_dict(outcome) if outcome and outcome.series else None
        ended = {"run": run.name, "state": state.name, "result": result}
        ended["failure"] = failure.as_json() if failure else None
        print_json(ended | {"left_out": [node.host for node in left_out]}, indent=None)
    else:
        echo(f"{run.name}: {state.name}" + (f" ({state.reason})" if state.reason else ""))
        if outcome and outcome.series:
            echo("", markdown_row(outcome), summary_line(outcome))
        if failure:
            _print_failure(run, failure, left_out)
    exit_for(state)


def _progress(run: Run, state: JobState) -> Progress | None:
    """How far a run is that goes on; None for others, and where its logs cannot be read."""
    try:
        return attach.progress_now(run) if state.name in GOING else None
    except LauncherError:
        return None


def failure_of(run: Run, state: JobState) -> Failure | None:
    """Why a run failed, as far as that is known; None for others."""
    if not state.failed:
        return None

    if state.unfit and (said := unfit.explain(run, run.reference)):
        return said
    ended = how_it_ended(state.name, state.reason, state.exit_code, run.logs)
    return explain(run.logs, ended, run.reference, run.path, _smaller(run), run.is_local)


def _smaller(run: Run) -> str:
    """The options with which the run would need less of a GPU's memory: the batch that fits, where its plan knows."""
    batch = (read_json(run.path / "plan.json") or {}).get("fitting_batch")
    if type(batch) is int and batch > 0:
        return f"--batch-size {batch}"
    alone = run.asked["recipe"].get("local_batch_size") == 1
    return "--set recipe.activation_checkpoint=full   (or more --nodes)" if alone else SMALLER


def remembered(run: Run, state: JobState) -> list[BadNode]:
    """The nodes that are left out from now on, because they failed their check in this run. Warns, and never raises."""
    try:
        return remember(run, state, time.time())
    except LauncherError as error:
        warn(f"could not remember the nodes that failed their check: {error.what}; {error.fix}")
        return []


def _print_failure(run: Run, failure: Failure, left_out: list[BadNode]) -> None:
    for line in failure.as_text():
        echo(f"  {line}", err=True)
    for node in left_out:
        until = f"{node.host}, until {clock(node.until)}: launcher cluster nodes"
        echo(f"  left out of new runs: {until}", err=True)
    for line in (line for fault in hardware.of_run(run) for line in fault.lines()):
        echo(f"  {plain(line)}", err=True)
    echo(f"  everything: {quoted('launcher', 'logs', run.reference)}", err=True)


def _summary(run: Run, state: JobState) -> dict[str, Any]:
    job, profile = run.asked["job"], run.asked["profile"]
    return {
        "run": run.name,
        "state": state.name,
        "job_id": str((run.job or {}).get("job_id", "")),
        "gpu": str(profile.get("gpu", "?")),
        "nodes": job.get("nodes", 0),
        "gpus_per_node": profile.get("gpus_per_node", 0),
        "recipe": str(job.get("recipe", "?")),
        "run_dir": str(run.path),
        "age_s": round(runs.age_s(run)),
    }


def exit_for(state: JobState) -> None:
    """Ends the program with the status of a run's end, unless it completed or goes on."""
    if state.unfit:
        sys.exit(ExitStatus.NODES_UNFIT)
    if state.failed:
        sys.exit(ExitStatus.JOB_FAILED)
    if not state.known:
        sys.exit(ExitStatus.JOB_UNKNOWN)
