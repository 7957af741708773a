"""The two tables of a sweep, each as JSON values and as lines for people: what it will do, and what came out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.base.errors import ExitStatus
from launcher.base.output import columns
from launcher.config.spec import RunSpec
from launcher.plan.plan import prediction
from launcher.scheduler.parse import seconds
from launcher.scheduler.state import FAILED, SUCCEEDED, UNKNOWN
from launcher.sweep.cells import Cell

Row = dict[str, Any]


def _row(cell: Cell, run: str, state: str | None) -> Row:
    """What both tables have of a cell. `run`: the name of its last run, or of the one that is to be submitted."""
    spec = cell.spec
    return {
        "run": run,
        "state": state,
        "recipe": spec.job.recipe,
        "nodes": spec.job.nodes,
        "gpus": spec.gpus,
        "local_batch_size": spec.recipe.local_batch_size,
    }


def plan_row(cell: Cell, spec: RunSpec | None) -> Row:
    """A cell before anything is submitted. `spec`: of its next run, None where it is left alone."""
    limit_s = seconds(spec.job.time) if spec else None
    expected = prediction(spec) if spec else {}
    return _row(cell, spec.job.name if spec else cell.runs[-1].name, cell.state.name if cell.state else None) | {
        "submit": spec is not None,
        "limit_node_hours": cell.spec.allocated * limit_s / 3600 if limit_s else None,
        "expected_node_hours": expected.get("node_hours"),
        "memory": expected.get("verdict", ""),
    }


def plan_lines(rows: Sequence[Row], width: int = 0) -> list[str]:
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
    return columns(cells, 2, width)


def plan_summary(rows: Sequence[Row], order: str) -> str:
    """How many runs, in which order, with how many node-hours: expected, and by the time limits."""
    new = [row for row in rows if row["submit"]]
    if not new:
        return "nothing to submit"
    limits, expected = ([row[key] for row in new] for key in ("limit_node_hours", "expected_node_hours"))
    most = "without a limit" if None in limits else f"at most {sum(limits):.2f} by --time"
    said = "node-hours not known before" if None in expected else f"{sum(expected):.2f} node-hours expected"
    return f"{len(new)} of {len(rows)} to submit, {order}: {said}, {most}"


def result_row(cell: Cell, now_s: float) -> Row:
    """A cell as it stands, without its scaling; `node_hours` are those of all its runs."""
    outcome, state = cell.outcome, cell.state.name if cell.state else "NOT SUBMITTED"
    tps = outcome.tps if outcome else None
    nothing = ["no step was logged"] if state in SUCCEEDED else []  # nothing is wrong before the end
    return _row(cell, cell.runs[-1].name if cell.runs else cell.spec.job.name, state) | {
        "complete": bool(outcome and outcome.complete),
        "problems": [problem.text for problem in outcome.problems] if outcome else nothing,
        "tps": tps.median if tps else None,
        "tps_q1": tps.q1 if tps else None,
        "tps_q3": tps.q3 if tps else None,
        "node_hours": cell.node_hours(now_s),
    }


def scaled(rows: Sequence[Row]) -> list[Row]:
    """The rows with their scaling: the median tokens/s per GPU over that of the fewest nodes of the same recipe and
    batch, among complete cells, where these have several sizes.
    """
    found = []
    for row in rows:
        kind = {key: row[key] for key in ("recipe", "local_batch_size", "complete")}
        same = [other for other in rows if row["complete"] and kind.items() <= other.items()]
        several = len({other["nodes"] for other in same}) > 1
        base = min(same, key=lambda other: int(other["nodes"])) if several else {}
        scaling = row["tps"] / base["tps"] if row["tps"] and base.get("tps") else None
        found.append(row | {"scaling": scaling, "scaling_base_nodes": base.get("nodes")})
    return found


def used(rows: Sequence[Row]) -> tuple[float, bool]:
    """Node-hours of all cells, and whether that is all of them."""
    known = [row["node_hours"] for row in rows if row["node_hours"] is not None]
    return sum(known), len(known) == len(rows)


def table_lines(rows: Sequence[Row], width: int = 0) -> list[str]:
    """The table for people, and below it what was used."""
    cells = [("run", "state", "GPUs", "tokens/s/GPU", "quartiles", "scaling", "node-hours", "")]
    for row in rows:
        tps, scaling = row["tps"], "-"
        if row["scaling"]:
            scaling = f"{row['scaling']:.1%} of {row['scaling_base_nodes']}n".replace("100.0%", "100%")
        cells.append(
            (
                row["run"],
                row["state"],
                str(row["gpus"]),
                f"{tps:,.0f}" if tps is not None else "-",
                f"{row['tps_q1']:,.0f}..{row['tps_q3']:,.0f}" if tps is not None else "-",
                scaling,
                _hours(row["node_hours"]),
                "" if row["complete"] or not row["problems"] else f"INCOMPLETE: {'; '.join(row['problems'])}",
            )
        )
    hours, all_known = used(rows)
    return [*columns(cells, 2, width), f"{'' if all_known else 'at least '}{hours:.2f} node-hours used"]


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def exit_status(rows: Sequence[Row]) -> ExitStatus:
    """Of the whole sweep, when nothing more is to be submitted."""
    without = [str(row["state"]) for row in rows if not row["complete"]]
    if any(word in FAILED | SUCCEEDED for word in without):  # ended, and no result
        return ExitStatus.JOB_FAILED
    return ExitStatus.JOB_UNKNOWN if UNKNOWN in without else ExitStatus.OK
