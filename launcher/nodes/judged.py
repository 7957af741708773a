"""Which nodes failed their check and which of them are to blame, from what slurm/node.py wrote. Values in, values out.

    nodes/NNNN-host.json   one node's own record: "ok", "why", "fix", and "problems", each with the "fault" that it is
    nodes/check.json       what the first node saw when it compared them all

A "fault" is the node's own ("node") or the run's ("run"): a path that is wrong on every node, say. Standard library
only: a job asks the same on its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHARS = 300  # of a reason


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


def judge(records: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any] | None, nodes: int) -> list[Unfit]:
    """Who failed, and who is to blame, of a run on so many nodes; more of them met where it has spares.

    The first node, which has seen all the others, is believed before a node's own record. What befell every node of
    several under the same name is nobody's own fault, whatever is said.
    """
    met = (verdict or {}).get("nodes")
    nodes = max(nodes, met) if isinstance(met, int) else nodes
    problems = {text_of(record.get("host")): _of_record(record) for record in records if record.get("ok") is False}
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
    why = text_of(entry.get("why")) or text_of(entry.get("what")) or "it did not say why"
    name = text_of(entry.get("name")) or why
    return Problem(text_of(entry.get("host")), name, why, text_of(entry.get("fix")), entry.get("fault") == "node")


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def writable(text: str) -> str:
    """Without halves of characters, as in paths that are not UTF-8: they cannot be written or printed."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_of(value: object) -> str:
    """One line of what a record says, at most MOST_CHARS of it."""
    return writable(re.sub(r"\s+", " ", value).strip()[:MOST_CHARS]) if isinstance(value, str) else ""
