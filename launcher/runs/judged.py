"""Which nodes failed their check and which of them are to blame, from what slurm/node.py wrote, and the readers of
what a record may hold.

    nodes/NNNN-host.json   one node's own record: "ok", "why", "fix", and "problems", each with the "fault" that it is
    nodes/check.json       what the first node saw when it compared them all

A "fault" is the node's own ("node") or the run's ("run"): a path that is wrong on every node, say. Standard library
only: a job asks the same on its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.files import read_json

MOST_CHARS = 300  # of a reason
MOST_NAMES = 10_000  # in a record: more is damage


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


def records_in(folder: Path) -> list[dict[str, Any]]:
    """What the nodes of an attempt wrote about their own check, in the job's order. `folder` has nodes/."""
    files = sorted((folder / "nodes").glob("[0-9]*-*.json"))
    return [record for file in files if (record := read_json(file))]


def unfit_in(folder: Path, nodes: int) -> list[Unfit]:
    """The nodes that failed their check in an attempt of so many; none where nothing of that can be read."""
    return judge(records_in(folder), read_json(folder / "nodes" / "check.json"), nodes)


def culprit_of(folder: Path) -> dict[str, Any]:
    """The rank, with its "host", that the nodes blame for a hang; empty where there is none."""
    culprit = (read_json(folder / "nodes" / "hang.json") or {}).get("culprit")
    return culprit if isinstance(culprit, dict) and isinstance(culprit.get("host"), str) else {}


def judge(records: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any] | None, nodes: int) -> list[Unfit]:
    """Who failed, and who is to blame, of a run on so many nodes; more of them met where it has spares.

    The first node, which has seen all the others, is believed before a node's own record. What befell every node of
    several under the same name is nobody's own fault, whatever is said.
    """
    met = (verdict or {}).get("nodes")
    nodes = max(nodes, met) if isinstance(met, int) else nodes
    problems = {text_of(record.get("host")): _of_record(record) for record in records if record.get("ok") is False}
    compared = [_problem(entry) for entry in objects((verdict or {}).get("unfit"))]
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
    entries = objects(record.get("problems")) or [{**record, "fault": "run"}]
    return [_problem({**entry, "host": record.get("host")}) for entry in entries]


def _problem(entry: Mapping[str, Any]) -> Problem:
    why = text_of(entry.get("why")) or text_of(entry.get("what")) or "it did not say why"
    name = text_of(entry.get("name")) or why
    return Problem(text_of(entry.get("host")), name, why, text_of(entry.get("fix")), entry.get("fault") == "node")


def objects(value: object) -> list[dict[str, Any]]:
    """A record's list of tables; empty where it is none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def writable(text: str) -> str:
    """Without halves of characters, as in paths that are not UTF-8: they cannot be written or printed."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_of(value: object) -> str:
    """One line of what a record says, at most MOST_CHARS of it."""
    return writable(re.sub(r"\s+", " ", value).strip()[:MOST_CHARS]) if isinstance(value, str) else ""


def texts(value: object) -> tuple[str, ...]:
    """A record's list of names, bounded; empty where it is none."""
    names = value[:MOST_NAMES] if isinstance(value, list) else ()
    return tuple(one[:100] for one in names if isinstance(one, str) and one)


def number(value: Any) -> float | None:
    """A number that may be one of seconds."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e11 else None


def count(value: object) -> int:
    """How many of something; 0 where a record does not say."""
    return value if type(value) is int and 0 <= value <= 10**9 else 0
