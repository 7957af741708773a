"""`launcher sweep`: submits a matrix of runs, and shows them as one table. The edge of launcher/sweep/table.py."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import as_json, echo, is_terminal, print_json
from launcher.config import resolve
from launcher.config.options import RunOptions, run_options
from launcher.config.spec import RunSpec
from launcher.plan.plan import prediction, write_beside
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState
from launcher.sweep import table as matrix
from launcher.sweep.cells import Cell, ready_to_submit, specs_of, standings

ASK_EVERY_S = 5.0  # of Slurm, with --follow
LOCAL_EVERY_S = 0.5  # whether a run on this machine has ended
SILENCE_S = 600.0  # a controller that restarts is back by then


def _names(_context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`llama3-8b,debug` as its items: none empty, none twice."""
    if value is None:
        return ()
    items = [text.strip() for text in value.split(",")]
    for at, text in enumerate(items):
        if not text:
            raise click.BadParameter(f"{value[:80]!r}: an empty item", param=parameter)
        if text in items[:at]:
            raise click.BadParameter(f"{text[:80]} stands there twice", param=parameter)
    return tuple(items)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`3,9,17` as numbers from 1 on, none twice."""
    items = _names(context, parameter, value)
    for text in items:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise click.BadParameter(f"{text[:80]!r} is not a number from 1 on", param=parameter)
    return tuple(map(int, items))


@click.command()
@run_options
@click.option("--dry-run", is_flag=True, help="Print the matrix with its node-hours; write and submit nothing.")
@click.option("--parallel", is_flag=True, help="Let Slurm run cells side by side, as nodes are free.")
@click.option("--retry", is_flag=True, help="Submit cells without a result again, under the same name with -2, -3 ...")
@click.option("--follow", "-f", is_flag=True, help="Wait for all of them, then print the table; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit although a check says that a cell will wait for ever.")
@as_json
def sweep(
    options: RunOptions,
    dry_run: bool,
    parallel: bool,
    retry: bool,
    follow: bool,
    yes: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Submit a matrix of nodes, batch sizes and recipes.

    Every combination, one after another. Slurm keeps the order: each job waits for the end of the one before it,
    however that ended. The same command again goes on where it was cut off, leaves alone what goes on or is complete,
    and prints the table with the scaling.

    \b
    launcher sweep --image titan.sqsh --nodes 3,9,17 --dry-run
    launcher sweep --image titan.sqsh --nodes 3,9,17 --batch-size 4,5 --recipe llama3-8b,llama3-8b-fast
    launcher sweep --local --recipe debug --batch-size 2,4,8
    """
    is_local = options.values.get("job.scheduler") == "local"
    if parallel and is_local:
        raise click.UsageError("--parallel is for Slurm: with --local, runs would share this machine")
    name, specs = specs_of(options)
    cells = standings(specs)
    wanted = [cell for cell in cells if cell.has_next(retry)]
    ready = ready_to_submit(wanted, force, dry_run, len(cells))
    if (wanted or dry_run) and not as_json:
        _show_plan(name, cells, ready, parallel)
    if dry_run:
        return print_json({"sweep": name, "cells": _plan_rows(cells, ready)}) if as_json else None
    if ready:
        quiet = yes or force or as_json or is_local
        asking = not quiet and is_terminal(sys.stdin) and is_terminal(sys.stdout)
        if asking and not click.confirm(f"Submit {_runs(len(ready))}?", default=True):
            raise click.Abort
        _submit(ready, cells, options, parallel, as_json)
        cells = standings(specs)
    if follow:
        cells = _wait(specs)
    if as_json or not ready or follow or is_local:
        status = matrix.exit_status(_show_results(name, cells, as_json))
        if status:
            echo("try: the same command with --retry submits again what has no result", err=True)
        sys.exit(status)
    echo(f"  the same command shows the table; one of them: launcher watch {ready[0][1].job.name}")


# The options of `submit` that are lists here, and one that means another name.
_OTHERS: dict[str, tuple[str, str, Any]] = {
    "nodes": ("N,N,...", "Numbers of nodes.  [default: 1]", _numbers),
    "batch_size": ("N,N,...", "Local batch sizes.  [default: the recipe's]", _numbers),
    "recipe": ("NAME,NAME,...", "Recipes.  [default: llama3-8b]", _names),
    "name": ("NAME", "Name of the sweep, with which those of its runs begin.  [default: from its settings]", None),
}
for _option in sweep.params:
    if isinstance(_option, click.Option) and _option.name in _OTHERS:
        _option.metavar, _option.help, _option.callback = _OTHERS[_option.name]
        _option.type = click.STRING


def _submit(
    wanted: Sequence[tuple[Cell, RunSpec]],
    cells: Sequence[Cell],
    options: RunOptions,
    parallel: bool,
    as_json: bool,
) -> None:
    """All of them, in order; each behind the last that goes on. On this machine the next starts when one has ended."""
    secrets = resolve.secrets_of(wanted[0][1], options.secrets, os.environ)
    going = [cell.runs[-1] for cell in cells if cell.state and cell.state.active]
    is_local = wanted[0][1].job.scheduler == "local"
    ids = [int(job["job_id"]) for run in going if (job := run.job)]
    last = str(max(ids)) if ids and not parallel and not is_local else ""
    count = 0
    try:
        for run in going if is_local else ():
            _until_ended(run)
        for cell, spec in wanted:
            if cell.is_cut_off:
                control.cancel(cell.runs[-1])  # takes its claim: should Slurm have it, it stops at once
            after = last

            def submitted(run: Run, job_id: str, after: str = after) -> None:
                nonlocal last, count
                count += 1
                last = "" if parallel or is_local else job_id
                kind = "process" if is_local else "Slurm job"
                text = f"{run.name}: {kind} {job_id}" + (f", after job {after}" if after else "")
                echo(text, err=as_json)

            run = control.submit(spec, secrets, submitted, after, partial(write_beside, spec))
            if is_local:
                _until_ended(run)
    except KeyboardInterrupt:
        left = len(wanted) - count
        rest = f"{_runs(left)} not submitted: the same command goes on" if left else "all submitted"
        echo("", f"interrupted; what was submitted goes on, {rest}", err=True)
        sys.exit(ExitStatus.INTERRUPTED)


def _until_ended(run: Run) -> None:
    while (state := control.state(run)).active:
        time.sleep(LOCAL_EVERY_S)
    echo(f"{run.name}: {state.name}", err=True)


def _wait(specs: Sequence[RunSpec]) -> list[Cell]:
    """The cells when none goes on any more; tells each change. Slurm may be silent for a while."""
    said: dict[str, str] = {}
    answered = time.monotonic()
    try:
        while True:
            try:
                cells = standings(specs)
            except LauncherError as error:
                if error.status is not ExitStatus.CLUSTER or time.monotonic() - answered > SILENCE_S:
                    raise
            else:
                answered = time.monotonic()
                for run, state in ((cell.runs[-1], cell.state) for cell in cells if cell.runs):
                    if state and said.get(run.name) != state.name:
                        said[run.name] = state.name
                        echo(f"{run.name}: {state.name}", err=True)
                if not any(cell.state and cell.state.active for cell in cells):
                    return cells
            time.sleep(ASK_EVERY_S)
    except KeyboardInterrupt:
        echo("", "detached; the runs go on: the same command shows how they stand", err=True)
        sys.exit(ExitStatus.INTERRUPTED)


def _runs(count: int) -> str:
    return f"{count} run" + ("" if count == 1 else "s")


def _plan_rows(cells: Sequence[Cell], ready: Sequence[tuple[Cell, RunSpec]]) -> list[dict[str, Any]]:
    """Every cell: how it stands, or what it will take."""
    next_specs = {cell.spec.job.name: spec for cell, spec in ready}
    rows = []
    for cell in cells:
        spec = next_specs.get(cell.spec.job.name)
        said = prediction(spec) if spec else {}
        rows.append(
            {
                "run": spec.job.name if spec else cell.runs[-1].name,
                "state": cell.state.name if cell.state else None,
                "submit": spec is not None,
                "nodes": cell.spec.job.nodes,
                "gpus": cell.spec.gpus,
                "recipe": cell.spec.job.recipe,
                "local_batch_size": cell.spec.recipe.local_batch_size,
                "limit_node_hours": matrix.limit_node_hours(spec) if spec else None,
                "expected_node_hours": said.get("node_hours"),
                "memory": said.get("verdict", ""),
            }
        )
    return rows


def _show_plan(name: str, cells: Sequence[Cell], ready: Sequence[tuple[Cell, RunSpec]], parallel: bool) -> None:
    rows = _plan_rows(cells, ready)
    echo(*matrix.plan_lines(rows))
    order = "side by side" if parallel else "one after another"
    echo(f"{name}: {matrix.plan_summary(rows, order)}")


def _show_results(name: str, cells: Sequence[Cell], as_json: bool) -> list[dict[str, Any]]:
    """Prints the table, and returns its rows."""
    now_s = time.time()
    results = []
    for cell in cells:
        state = cell.state or JobState("NOT SUBMITTED")
        hours = [
            _node_hours(run, cell.spec.job.nodes, now_s, state.active and run is cell.runs[-1]) for run in cell.runs
        ]
        results.append(
            matrix.Result(
                cell.spec,
                cell.runs[-1].name if cell.runs else cell.spec.job.name,
                state.name,
                cell.outcome,
                None if None in hours else sum(hour for hour in hours if hour is not None),
            )
        )
    rows = matrix.table(results)
    if as_json:
        hours_used, all_known = matrix.used(rows)
        print_json({"sweep": name, "cells": rows, "node_hours": hours_used, "node_hours_complete": all_known})
        return rows
    echo(*matrix.table_lines(rows))
    return rows


def _node_hours(run: Run, nodes: int, now_s: float, is_going: bool) -> float | None:
    """Of one run, from its script's own times; None where it began and nothing says when it ended."""
    end = run.end or {}
    began, ended = end.get("began_at"), end.get("ended_at")
    if type(began) is int and type(ended) is int:
        return nodes * (ended - began) / 3600
    try:
        claimed = (run.path / "claim" / "job_id").stat().st_mtime
    except OSError:
        return 0.0
    return nodes * max(now_s - claimed, 0.0) / 3600 if is_going else None
