"""A sweep: runs of several sizes and recipes, planned as a matrix and read as one table. Pure; no state of its own.

Its cells are ordinary runs named SWEEP-RECIPE-NODESn-bBATCH, and -2, -3 ... behind it where a cell was tried again.
Whoever types the same command again finds them by these names: launcher/commands/sweep.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import columns
from launcher.base.secret import looks_secret
from launcher.config.spec import NAME, RunSpec
from launcher.results.outcome import Outcome
from launcher.scheduler.parse import seconds
from launcher.scheduler.state import FAILED, SUCCEEDED, UNKNOWN, JobState

MAX_CELLS = 100  # a slip of the keyboard otherwise fills Slurm's queue; docs/sweep.md says so
MAX_ATTEMPTS = 99
LONGEST_NAME = 60  # of the 63 characters of a run's name: "-99" still fits behind it
# Where and for how long a run waits and goes on, not what it measures: another choice makes no other cell.
WHERE = (
    "job.name",
    "job.runs_dir",
    "job.slurm_bin",
    "job.time",
    "job.account",
    "job.qos",
    "job.reservation",
    "job.nodelist",
    "job.exclude",
    "job.segment",
    "job.check",
)
AXES = ("job.nodes", "job.recipe", "recipe.local_batch_size")


@dataclass(frozen=True)
class Shape:
    """One combination of the lists; None where there was no list, and the recipe or a file decides."""

    recipe: str | None
    nodes: int | None
    batch: int | None

    def __str__(self) -> str:
        words = (self.recipe, self.nodes and f"{self.nodes} nodes", self.batch and f"batch {self.batch}")
        return ", ".join(word for word in words if word) or "the run"


def matrix(recipes: Sequence[str], nodes: Sequence[int], batches: Sequence[int]) -> list[Shape]:
    """Every combination; nodes change fastest, so that a scaling curve is complete early. Refuses too many."""
    count = max(len(recipes), 1) * max(len(nodes), 1) * max(len(batches), 1)
    if count > MAX_CELLS:
        raise LauncherError(
            f"{count:,} combinations: a sweep has at most {MAX_CELLS}", "shorter lists, or several sweeps"
        )
    axes = product(recipes or (None,), batches or (None,), nodes or (None,))
    return [Shape(recipe, number, batch) for recipe, batch, number in axes]


def default_name(specs: Sequence[RunSpec]) -> str:
    """The same for the same matrix and settings, whatever the order of the lists."""
    text = json.dumps(sorted(json.dumps(comparable(spec), sort_keys=True) for spec in specs))
    return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def cell_name(sweep: str, spec: RunSpec) -> str:
    """The run's name. Raises LauncherError where it would be too long, or the sweep's name is none."""
    if not NAME.fullmatch(sweep):
        raise LauncherError(
            f"--name {sweep[:80]!r}: letters, digits, '.', '_' and '-', beginning with a letter or digit",
            "--name scaling",
        )
    recipe = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec.job.recipe).stem)
    name = f"{sweep}-{recipe}-{spec.job.nodes}n-b{spec.recipe.local_batch_size}"
    if len(name) > LONGEST_NAME:
        raise LauncherError(
            f"{name[:100]}: a name of {len(name)} characters; a cell's has at most {LONGEST_NAME}",
            f"a --name that is {len(name) - LONGEST_NAME} characters shorter, or a shorter file name of the recipe",
        )
    return name


def attempt_name(cell: str, attempt: int) -> str:
    return cell if attempt == 1 else f"{cell}-{attempt}"


def comparable(spec: RunSpec) -> dict[str, Any]:
    """What decides a cell's figures: every setting but where and how long it runs."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in spec.values().items() if key not in WHERE}


def differences(before: RunSpec, now: RunSpec) -> list[str]:
    """Settings in which a cell's earlier run is another one, in words."""
    old, new = comparable(before), comparable(now)
    return [
        f"{key} is another secret now"
        if looks_secret(key, old.get(key)) or looks_secret(key, new.get(key))
        else f"{key} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def has_next(state: JobState | None, cut_off: bool, retry: bool, complete: bool) -> bool:
    """Whether a cell is to be submitted: never tried, cut off before Slurm had it, or without a result and to be tried
    again.

    `state`: of its last run, None where there is none; `complete`: that run's figures are a whole result. What goes on
    or is complete is left alone.
    """
    if state is None or cut_off:
        return True
    return retry and not state.active and not complete


def limit_node_hours(spec: RunSpec) -> float | None:
    """Node-hours up to the time limit; None without one."""
    limit_s = seconds(spec.job.time)
    return spec.job.nodes * limit_s / 3600 if limit_s else None


def refused_together(problems: Mapping[str, LauncherError], cells: int) -> LauncherError:
    """One error of all cells that cannot run, by their names; equal ones once."""
    first = next(iter(problems.values()))
    lines = []
    for what, fix in dict.fromkeys((error.what, error.fix) for error in problems.values()):
        names = [name for name, error in problems.items() if (error.what, error.fix) == (what, fix)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{'; '.join(names[:3])}{more}: {what}" + (f"; {fix}" if fix else ""))
    count = f"{len(problems)} of {cells} cells"
    if len(problems) == cells:
        count = f"all {cells} cells" if cells > 1 else "the one cell"
    return LauncherError(
        f"{count} cannot run, so nothing was submitted: {first.what}{', and more' if len(lines) > 1 else ''}",
        first.fix,
        status=first.status,
        original="\n".join(lines) if len(lines) > 1 else first.original,
    )


@dataclass(frozen=True)
class Result:
    """One cell as it stands: its last run (None: not submitted), and the node-hours of all its runs."""

    spec: RunSpec
    run: str
    state: str
    outcome: Outcome | None
    node_hours: float | None  # None: not known


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows as JSON values: figures of complete cells, with the scaling against the fewest nodes of their kind.

    `scaling` is the median tokens/s per GPU over that of the smallest complete cell with the same recipe and batch.
    """
    complete = [result for result in results if result.outcome and result.outcome.complete]
    rows = []
    for result in results:
        outcome = result.outcome
        tps = outcome.tps if outcome else None
        base = _base(result, complete) if result in complete else None
        against = base.outcome.tps if base and base.outcome else None
        rows.append(
            {
                "run": result.run,
                "state": result.state,
                "recipe": result.spec.job.recipe,
                "nodes": result.spec.job.nodes,
                "gpus": result.spec.gpus,
                "local_batch_size": result.spec.recipe.local_batch_size,
                "complete": bool(outcome and outcome.complete),
                "problems": [problem.text for problem in outcome.problems] if outcome else _nothing(result.state),
                "tps": tps.median if tps else None,
                "tps_q1": tps.q1 if tps else None,
                "tps_q3": tps.q3 if tps else None,
                "scaling": tps.median / against.median if tps and against and against.median else None,
                "scaling_base_nodes": base.spec.job.nodes if base else None,
                "node_hours": result.node_hours,
            }
        )
    return rows


def _nothing(state: str) -> list[str]:
    """What is wrong with a cell without an outcome: nothing, as long as it has not ended."""
    return ["no step was logged"] if state in SUCCEEDED else []


def _base(result: Result, complete: Sequence[Result]) -> Result | None:
    """What a cell's scaling is measured by; None where only one size of its kind is complete."""
    kind = (result.spec.job.recipe, result.spec.recipe.local_batch_size)
    same = [r for r in complete if (r.spec.job.recipe, r.spec.recipe.local_batch_size) == kind]
    several = len({r.spec.job.nodes for r in same}) > 1
    return min(same, key=lambda r: r.spec.job.nodes) if several else None


def used(rows: Sequence[Mapping[str, Any]]) -> tuple[float, bool]:
    """Node-hours of all cells, and whether that is all of them."""
    known = [row["node_hours"] for row in rows if row["node_hours"] is not None]
    return sum(known), len(known) == len(rows)


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table for people, and below it what was used."""
    cells = [("run", "state", "GPUs", "tokens/s/GPU", "quartiles", "scaling", "node-hours", "")]
    for row in rows:
        tps = row["tps"]
        cells.append(
            (
                row["run"],
                row["state"],
                str(row["gpus"]),
                f"{tps:,.0f}" if tps is not None else "-",
                f"{row['tps_q1']:,.0f}..{row['tps_q3']:,.0f}" if tps is not None else "-",
                _scaling(row),
                f"{row['node_hours']:.2f}" if row["node_hours"] is not None else "?",
                "" if row["complete"] or not row["problems"] else f"INCOMPLETE: {'; '.join(row['problems'])}",
            )
        )
    hours, all_known = used(rows)
    return [*columns(cells, left=2), f"{'' if all_known else 'at least '}{hours:.2f} node-hours used"]


def _scaling(row: Mapping[str, Any]) -> str:
    if not row["scaling"]:
        return "-"
    return f"{row['scaling']:.1%} of {row['scaling_base_nodes']}n".replace("100.0%", "100%")


def plan_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a sweep is about to do, one line a cell."""
    cells = [("run", "now", "nodes", "GPUs", "batch", "node-hours", "at most", "")]
    for row in rows:
        new = "again" if row["state"] else "new"
        cells.append(
            (
                row["run"],
                new if row["submit"] else row["state"],
                str(row["nodes"]),
                str(row["gpus"]),
                str(row["local_batch_size"]),
                _hours(row["expected_node_hours"]) if row["submit"] else "",
                _hours(row["limit_node_hours"]) if row["submit"] else "",
                f"memory: {row['memory']}" if row["memory"] in ("tight", "does not fit") else "",
            )
        )
    return columns(cells, left=2)


def plan_summary(rows: Sequence[Mapping[str, Any]], order: str) -> str:
    """How many runs, in which order, with how many node-hours: expected, and by the time limits."""
    new = [row for row in rows if row["submit"]]
    limits = [row["limit_node_hours"] for row in new]
    most = "without a limit" if None in limits else f"at most {sum(limits):.2f} by --time"
    expected = [row["expected_node_hours"] for row in new]
    known = [hours for hours in expected if hours is not None]
    if not new:
        return "nothing to submit"
    said = f"{sum(known):.2f} node-hours expected" if len(known) == len(new) else "node-hours not known before"
    return f"{len(new)} of {len(rows)} to submit, {order}: {said}, {most}"


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def exit_status(rows: Sequence[Mapping[str, Any]]) -> ExitStatus:
    """Of the whole sweep, when nothing more is to be submitted: what `table` says of it."""
    without = [str(row["state"]) for row in rows if not row["complete"]]
    if any(word in FAILED | SUCCEEDED for word in without):  # ended, and no result
        return ExitStatus.JOB_FAILED
    return ExitStatus.JOB_UNKNOWN if UNKNOWN in without else ExitStatus.OK
