"""Which nodes of a run failed their check, and which of them are to blame: from RUN/nodes, which slurm/node.py wrote.

    nodes/NNNN-host.json   one node's own record: "ok", "why", "fix", and "problems", each with the "fault" that it is
    nodes/check.json       what the first node saw when it compared them all

A "fault" is the node's own ("node") or the run's ("run"): a path that is wrong on every node, say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import quoted
from launcher.base.files import read_json
from launcher.logs.known_errors import Failure
from launcher.runs.directory import Run

MOST_CHARS = 300  # of a reason
SHOWN = 12  # lines of a message


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a node. `own`: the fault is this node's."""

    host: str
    name: str
    why: str
    fix: str
    own: bool


@dataclass(frozen=True)
class Unfit:
    """A node that failed its check. `own`: it is to blame itself, so that the run may go well without it."""

    host: str
    problems: tuple[Problem, ...]  # those first that it is to blame for
    own: bool

    @property
    def why(self) -> str:
        return self.problems[0].why


def of_run(run: Run) -> list[Unfit]:
    """The nodes of a run that failed their check, in the job's order; none where nothing of that can be read."""
    return judge(run.node_records, read_json(run.path / "nodes" / "check.json"), run.nodes)


def cluster_of(run: Run) -> str:
    """Slurm's ClusterName as the run's job was told it; empty where no node wrote it down."""
    return next((name for record in run.node_records if (name := _text(record.get("cluster")))), "")


def judge(records: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any] | None, nodes: int) -> list[Unfit]:
    """Who failed, and who is to blame, of a run on so many nodes.

    The first node, which has seen all the others, is believed before a node's own record. What befell every node of
    several under the same name is nobody's own fault, whatever is said.
    """
    problems = {_text(record.get("host")): _of_record(record) for record in records if record.get("ok") is False}
    compared = [_problem(entry) for entry in _objects((verdict or {}).get("unfit"))]
    problems |= {one.host: [other for other in compared if other.host == one.host] for one in compared}
    names = [{problem.name for problem in found} for found in problems.values()]
    everywhere = set.intersection(*names) if nodes > 1 and len(names) >= max(nodes, 2) else set()
    unfit = []
    for host, found in problems.items():
        own = [problem for problem in found if problem.own and problem.name not in everywhere]
        unfit.append(Unfit(host, (*own, *(problem for problem in found if problem not in own)), bool(own)))
    return unfit


def _of_record(record: Mapping[str, Any]) -> list[Problem]:
    """At least one: a record of an older launcher has nothing but "why" and "fix"."""
    entries = _objects(record.get("problems")) or [{**record, "fault": "run"}]
    return [_problem({**entry, "host": record.get("host")}) for entry in entries]


def _problem(entry: Mapping[str, Any]) -> Problem:
    why = _text(entry.get("why")) or _text(entry.get("what")) or "it did not say why"
    name = _text(entry.get("name")) or why
    return Problem(_text(entry.get("host")), name, why, _text(entry.get("fix")), entry.get("fault") == "node")


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


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


def writable(text: str) -> str:
    """Without halves of characters, as in paths that are not UTF-8: they cannot be written or printed."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(value: object) -> str:
    """One line of what a record says, at most MOST_CHARS of it."""
    return writable(re.sub(r"\s+", " ", value).strip()[:MOST_CHARS]) if isinstance(value, str) else ""
