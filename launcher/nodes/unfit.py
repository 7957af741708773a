"""Which nodes of a run failed their check, read from its directory, and the message about them."""

from __future__ import annotations

from launcher.base.errors import quoted
from launcher.logs.known_errors import Failure
from launcher.runs.again import past_attempts
from launcher.runs.directory import Run
from launcher.runs.judged import Unfit, text_of, unfit_in

SHOWN = 12  # lines of a message


def of_run(run: Run) -> list[Unfit]:
    """The nodes of a run that failed their check, in the job's order; none where nothing of that can be read."""
    return unfit_in(run.path, run.nodes)


def of_attempts(run: Run) -> dict[str, Unfit]:
    """The nodes that failed their check in any attempt, by host."""
    found = [one for folder in (*past_attempts(run.path), run.path) for one in unfit_in(folder, run.nodes)]
    return {one.host: one for one in sorted(found, key=lambda one: one.own)}


def cluster_of(run: Run) -> str:
    """Slurm's ClusterName as the run's job was told it; empty where no node wrote it down."""
    return next((name for record in run.node_records if (name := text_of(record.get("cluster")))), "")


def explain(run: Run, reference: str) -> Failure | None:
    """The failure of a run that stopped at its check, in the nodes' own words; None where they left none."""
    found = of_run(run)
    if not found:
        return None
    first = found[0]
    cause = f"node {first.host} is not fit to train: {first.why}"
    if len(found) > 1:
        cause = f"{len(found)} nodes are not fit to train"
    fix = first.problems[0].fix or quoted("launcher", "logs", reference)
    if any(unfit.own for unfit in found) and not run.is_local and not run.is_copy:
        again = quoted("launcher", "submit", run.path / "run.toml")
        fix = f"{again}   (it leaves out what launcher cluster nodes lists)"
    lines = [
        f"{unfit.host}: {problem.why}" + (f"; {problem.fix}" if problem.fix else "")
        for unfit in found
        for problem in unfit.problems
    ]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
    return Failure("node-unfit", cause, fix, run.path / "nodes", lines, True)
