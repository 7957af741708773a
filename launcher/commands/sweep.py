"""`launcher sweep`: submits a matrix of runs one by one, and shows them as one table."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.finding import Finding
from launcher.base.output import as_json, counted, echo, print_json, terminal_width
from launcher.commands.asked import looked_at, secrets_of, tell
from launcher.commands.start import ask_first, resumed, submitted
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_options
from launcher.config.sbatch import split
from launcher.config.spec import PlacedRun, RunSpec
from launcher.preflight.text import refusal
from launcher.runs import attach, control
from launcher.sweep import table
from launcher.sweep.cells import Cell, refused, specs_of, standings

LOCAL_EVERY_S = 0.5  # whether a run on this machine has ended


def _items(_context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str | int, ...]:
    """`3,9,17` as its items, none empty, none twice: names of recipes, else numbers from 1 on."""
    items = [text.strip() for text in value.split(",")] if value is not None else []
    are_numbers = parameter.name != "recipe"
    for at, text in enumerate(items):
        if not text:
            raise click.BadParameter(f"{value!r:.80}: an empty item", param=parameter)
        if are_numbers and not re.fullmatch(r"[1-9][0-9]{0,8}", text):
            raise click.BadParameter(f"{text[:80]!r} is not a number of at least 1", param=parameter)
        if text in items[:at]:
            raise click.BadParameter(f"{text[:80]} is listed twice", param=parameter)
    return tuple(map(int, items)) if are_numbers else tuple(items)


@click.command(cls=RunCommand)
@run_options
@click.option("--dry-run", is_flag=True, help="Print the matrix with its node-hours; write and submit nothing.")
@click.option("--parallel", is_flag=True, help="Let Slurm run cells at the same time when nodes are free.")
@click.option("--retry", is_flag=True, help="Go on with cells that ended without a result, as `launcher resume` does.")
@click.option("--follow", "-f", is_flag=True, help="Wait for all of them, then print the table; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit even if a check says that a cell would never start.")
@as_json
def sweep(
    options: RunOptions, dry_run: bool, parallel: bool, retry: bool, follow: bool, yes: bool, force: bool, as_json: bool
) -> None:
    """Submit a matrix of nodes, batch sizes and recipes.

    Submits every combination. Slurm runs them in order: each job waits until the one before it has ended, even if that
    failed. Type the same command again to submit what is missing and to print the table with the scaling; cells that
    run or are complete are left alone.

    \b
    launcher sweep --image titan.sqsh --nodes 3,9,17 --dry-run
    launcher sweep --image titan.sqsh --nodes 3,9,17 --batch-size 4,5 --recipe llama3-8b,llama3-8b-fast
    launcher sweep --local --recipe debug --batch-size 2,4,8
    """
    is_local = options.values.get("job.scheduler") == "local"
    if parallel and is_local:
        raise click.UsageError("--parallel is for Slurm: with --local, runs would share this machine")
    name, specs = specs_of(options)
    if not (parallel or is_local) and any(split(item)[0] == "dependency" for item in specs[0].job.sbatch):
        raise click.UsageError(
            "--sbatch dependency=... needs --parallel: without it, each job already waits for the one before it"
        )
    cells = standings(specs)
    wanted = [cell for cell in cells if cell.has_next(retry)]
    ready = _ready(wanted, force, dry_run)
    if dry_run or (wanted and not as_json):
        _show_plan(name, cells, ready, parallel, as_json)
    if dry_run:
        return
    if ready:
        ask_first(lambda: f"Submit {counted(len(ready), 'run')}?", quiet=yes or force or as_json or is_local)
        _submit(ready, cells, options, parallel, as_json)
        cells = standings(specs)
    if follow:
        try:
            cells = _until_ended(specs, attach.ASK_EVERY_S)
        except KeyboardInterrupt:
            echo("", "detached; the runs go on. To see how they stand, type the same command again", err=True)
            sys.exit(ExitStatus.INTERRUPTED)
    if not (as_json or not ready or follow or is_local):
        return echo(f"  for the table: the same command again; for one run: launcher watch {ready[0][1].job.name}")
    now_s = time.time()
    rows = table.scaled([table.result_row(cell, now_s) for cell in cells])
    if as_json:
        hours, all_known = table.used(rows)
        print_json({"sweep": name, "cells": rows, "node_hours": hours, "node_hours_complete": all_known})
    else:
        echo(*table.table_lines(rows, terminal_width()))
    if status := table.exit_status(rows):
        echo("try: the same command with --retry, which submits cells without a result again", err=True)
    sys.exit(status)


# The options of `submit` that are lists here, and one that means another name.
_OTHERS: dict[str, tuple[str, str, Any]] = {
    "nodes": ("N,N,...", "Numbers of nodes.  [default: 1]", _items),
    "batch_size": ("N,N,...", "Local batch sizes.  [default: the recipe's]", _items),
    "recipe": ("NAME,NAME,...", "Recipes.  [default: llama3-8b]", _items),
    "name": ("NAME", "Name of the sweep; the names of its runs begin with it.  [default: from its settings]", None),
}
for _option in sweep.params:
    if isinstance(_option, click.Option) and _option.name in _OTHERS:
        _option.metavar, _option.help, _option.callback = _OTHERS[_option.name]
        _option.type = click.STRING


def _ready(wanted: Sequence[Cell], force: bool, dry_run: bool) -> list[tuple[Cell, PlacedRun]]:
    """What is to be submitted, each as the cluster can place it. Raises LauncherError for the first that cannot run."""
    ready: list[tuple[Cell, PlacedRun]] = []
    found: list[Finding] = []
    for cell in wanted:
        asked = cell.next_spec
        try:
            spec, findings = looked_at(asked, force, ask_slurm=not dry_run)  # Slurm is asked once, for all cells
            if stopped := refusal(findings, force):
                raise stopped
        except LauncherError as error:
            raise refused(asked.job.name, error) from error
        found += findings
        ready.append((cell, spec))
    tell(found, force)
    return ready


def _submit(
    ready: Sequence[tuple[Cell, PlacedRun]], cells: Sequence[Cell], options: RunOptions, parallel: bool, as_json: bool
) -> None:
    """All of them, in order; each behind the last that goes on. On this machine the next starts when one has ended."""
    secrets = secrets_of(ready[0][1], options)
    is_local = ready[0][1].job.scheduler == "local"
    in_order = not parallel and not is_local
    going = [cell for cell in cells if cell.is_going]
    ids = [int(job["job_id"]) for cell in going if (job := cell.runs[-1].job)]
    last = str(max(ids)) if ids and in_order else ""
    left = len(ready)

    kind = "process" if is_local else "Slurm job"
    try:
        if is_local:
            _until_ended([cell.spec for cell in going], LOCAL_EVERY_S)
        for cell, spec in ready:
            if cell.is_cut_off:
                control.cancel(cell.runs[-1])  # takes its claim: should Slurm have it, it stops at once
            starts = submitted(spec, secrets, last)
            if cell.resumes:
                starts = resumed(cell.resumes, spec, secrets, last)
            with starts as (run, job_id):
                echo(f"{run.name}: {kind} {job_id}" + (f", after job {last}" if last else ""), err=as_json)
                last, left = job_id if in_order else "", left - 1
            if is_local:
                _until_ended([cell.spec], LOCAL_EVERY_S)
    except KeyboardInterrupt:
        rest = f"{counted(left, 'run')} not submitted: to go on, the same command again" if left else "all submitted"
        echo("", f"interrupted; what was submitted goes on, {rest}", err=True)
        sys.exit(ExitStatus.INTERRUPTED)


def _until_ended(specs: Sequence[RunSpec], every_s: float) -> list[Cell]:
    """The cells when none goes on any more; tells each change. Slurm may be silent for a while."""
    said: dict[str, str] = {}
    ask = attach.patient(lambda: standings(specs))
    while True:
        cells = ask()
        for run, state in ((cell.runs[-1], cell.state) for cell in cells or () if cell.runs):
            if state and said.get(run.name) != state.name:
                said[run.name] = state.name
                echo(f"{run.name}: {state.name}", err=True)
        if cells is not None and not any(cell.is_going for cell in cells):
            return cells
        time.sleep(every_s)


def _show_plan(
    name: str, cells: Sequence[Cell], ready: Sequence[tuple[Cell, PlacedRun]], parallel: bool, as_json: bool
) -> None:
    """Every cell: how it stands, or what it will take."""
    next_specs = {cell.spec.job.name: spec for cell, spec in ready}
    rows = [table.plan_row(cell, next_specs.get(cell.spec.job.name)) for cell in cells]
    if as_json:
        return print_json({"sweep": name, "cells": rows})
    echo(*table.plan_lines(rows, terminal_width()))
    echo(f"{name}: {table.plan_summary(rows, 'side by side' if parallel else 'one after another')}")
