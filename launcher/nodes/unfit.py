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
from launcher.runs.node_records import records

MOST_CHARS = 300  # of a reason
SHOWN = 12  # lines of a message


@dataclass(frozen=True)
class Unfit:
    """A node that failed its check. `own`: the fault is this node's, so that the run may go well without it."""

    host: str
    why: str
    fix: str
    own: bool
    said: tuple[str, ...] = ()  # all that is wrong with it, each with what to do


def of_run(run: Run) -> list[Unfit]:
    """The nodes of a run that failed their check, in the job's order; none where nothing of that can be read."""
    asked = run.asked["job"].get("nodes")
    nodes = asked if isinstance(asked, int) else 0
    return judge(records(run.path), read_json(run.path / "nodes" / "check.json"), nodes)


def cluster_of(run: Run) -> str:
    """Slurm's ClusterName as the run's job was told it; empty where no node wrote it down."""
    return next((name for record in records(run.path) if (name := _text(record.get("cluster")))), "")


def judge(records: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any] | None, nodes: int) -> list[Unfit]:
    """Who failed, and who is to blame, of a run on so many nodes.

    The first node, which has seen all the others, is believed before a node's own record. What befell every node of
    several under the same name is nobody's own fault, whatever is said.
    """
    problems = {_text(record.get("host")): _problems(record) for record in records if record.get("ok") is False}
    said = (verdict or {}).get("unfit")
    compared = [_Problem.of(entry) for entry in (said if isinstance(said, list) else []) if isinstance(entry, dict)]
    for host in {problem.host for problem in compared}:
        problems[host] = [problem for problem in compared if problem.host == host]
    names = [{problem.name for problem in found} for found in problems.values()]
    everywhere = set.intersection(*names) if nodes > 1 and len(names) >= max(nodes, 2) else set()
    unfit = []
    for host, found in problems.items():
        own = [problem for problem in found if problem.own and problem.name not in everywhere]
        first = (own or found)[0]
        said = tuple(f"{problem.why}; {problem.fix}" if problem.fix else problem.why for problem in found)
        unfit.append(Unfit(host, first.why, first.fix, bool(own), said))
    return unfit


@dataclass(frozen=True)
class _Problem:
    host: str
    name: str
    why: str
    fix: str
    own: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any], host: object = "") -> _Problem:
        why = _text(entry.get("why")) or _text(entry.get("what")) or "it did not say why"
        name = _text(entry.get("name")) or why
        own = entry.get("fault") == "node"
        return cls(_text(entry.get("host", host)), name, why, _text(entry.get("fix")), own)


def _problems(record: Mapping[str, Any]) -> list[_Problem]:
    """At least one: a record of an older launcher has nothing but "why" and "fix"."""
    found = record.get("problems")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return [_Problem.of(entry, record.get("host")) for entry in entries or [{**record, "fault": "run"}]]


def explain(run: Run, reference: str) -> Failure | None:
    """The failure of a run that stopped at its check, in the nodes' own words; None where they left none."""
    found = of_run(run)
    if not found:
        return None
    own = [unfit.host for unfit in found if unfit.own]
    first = found[0]
    if len(found) == 1:
        cause = f"node {first.host} is not fit to train: {first.why}"
    else:
        cause = f"{len(found)} nodes are not fit to train"
    again = quoted("launcher", "submit", run.path / "run.toml")
    fix = first.fix or quoted("launcher", "logs", reference)
    if own and not run.is_local and not run.is_copy:
        fix = f"{again}   (it leaves out what launcher cluster nodes lists)"
    lines = [f"{unfit.host}: {text}" for unfit in found for text in unfit.said]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
    return Failure("node-unfit", cause, fix, run.path / "nodes", lines, True)


def writable(text: str) -> str:
    """Without halves of characters, as in paths that are not UTF-8: they cannot be written or printed."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(value: object) -> str:
    """One line of what a record says, at most MOST_CHARS of it."""
    return writable(re.sub(r"\s+", " ", value).strip()[:MOST_CHARS]) if isinstance(value, str) else ""
