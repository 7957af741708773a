"""When a run hangs, and whose fault it is. Pure: watch.py collects what is judged here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

KEEP = 50  # intervals that the pace is learned from
STUCK = 3  # a rank that computes gets so many bounds; where only logs move, and no step comes, one more each
BUSY = 0.2  # of a CPU

Evidence = Mapping[str, Any]  # of one node: "host", "quiet_s", "ranks"; see watch.py


@dataclass
class Pace:
    """How fast a run logs its steps, and since when it does not.

    `startup_s`: the bound while no pace is known, where a run `pauses` (it does more than steps, unlogged), and at
    steps with a checkpoint: torchtitan 0.3 waits for the one before without a word.
    """

    now: float
    steps: int = 0
    least_s: float = 45
    startup_s: float = 900
    pauses: bool = False
    log_every: int = 1
    save_every: int = 0
    step: int = 0
    intervals: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.moved = self.stepped = self.now

    def saw(self, now: float, step: int | None = None) -> None:
        """Something was logged, a step perhaps."""
        self.moved = now
        if step is not None and step != self.step:
            if self.step and step > self.step:
                self.intervals = [*self.intervals, (now - self.stepped, step - self.step)][-KEEP:]
            self.step, self.stepped = step, now

    def slept(self, seconds: float) -> None:
        """This process stood still itself, as when Slurm suspends the job."""
        self.moved, self.stepped = self.moved + seconds, self.stepped + seconds

    @property
    def bound_s(self) -> float:
        """For how long nothing may move."""
        last, before, every = 0 < self.steps <= self.step, self.step - 1, self.save_every
        saves = every > 0 and (before + self.log_every) // every > before // every
        if len(self.intervals) < 2 or saves or self.pauses or last:
            return self.startup_s
        interval = median(seconds for seconds, _ in self.intervals)
        return max(self.least_s, interval + 10 * median(seconds / steps for seconds, steps in self.intervals))

    def is_silent(self, now: float) -> bool:
        silent = now - self.moved > self.bound_s
        return silent or (bool(self.step) and now - self.stepped > (STUCK + 1) * self.bound_s)


@dataclass(frozen=True)
class Culprit:
    """Whom the others wait for. `kind`: see _STATES; "behind": in the collectives."""

    kind: str
    host: str
    rank: int | None = None  # None: the node as a whole
    local_rank: int | None = None
    operation: str = ""  # that `waiting` ranks wait in, and its number
    number: int = 0
    waiting: int = 0
    at: str = ""  # where in Python the rank is

    def why(self, on_gpu: bool) -> str:
        gpu = f", {'GPU' if on_gpu else 'local rank'} {self.local_rank}"
        who = f"node {self.host}" if self.rank is None else f"rank {self.rank} ({self.host}{gpu})"
        others = f"{self.waiting} other{'s wait' if self.waiting > 1 else ' waits'}"
        where = f"{self.operation} {self.number:,}"
        if self.kind == "behind":
            at = f"; it is at {self.at}" if self.at else ""
            return f"{who} has not entered {where} that {others} in{at}"
        return f"{who} {_STATES[self.kind]}" + (f"; {others} in {where}" if self.waiting else "")


_STATES = {
    "stopped": "is stopped by a signal or a debugger",
    "disk": "waits in the kernel for a disk, a file system or a device",
    "unreachable": "cannot reach the first node over the network",
    "mute": "does not answer, as if a library call never returned",
    "silent": "does not answer",
}


def moves(nodes: Sequence[Evidence], bound_s: float, silence_s: float, on_gpu: bool) -> bool:
    """Whether it is slow, not hung: logs elsewhere, collectives, or a computing rank that the others wait for.

    `silence_s`: how long no step was logged; after very long other lines save nobody.
    """
    ranks = [rank for node in nodes for rank in node["ranks"]]
    logs = any(node["quiet_s"] < bound_s / 2 for node in nodes) and silence_s < (STUCK + 1) * bound_s
    if logs or any(rank["moved"] for rank in ranks):
        return True
    busy = [rank for rank in ranks if rank["cpu"] > BUSY]
    return bool(busy) and not on_gpu and silence_s < STUCK * bound_s  # on GPUs a rank that waits computes, too


def name(nodes: Sequence[Evidence], hosts: Sequence[str]) -> Culprit | None:
    """Whom the others wait for, of the `hosts` that were asked; None where nothing says it."""
    silent = [host for host in hosts if host not in {node["host"] for node in nodes}]
    if len(silent) == 1 < len(hosts):
        return Culprit("silent", silent[0])
    ranks = {rank["rank"]: {**rank, "host": node["host"]} for node in nodes for rank in node["ranks"]}
    behind, waits = _behind(ranks), _waits(ranks)
    roots = [rank for rank in behind if not any(one["waits"] for one in (ranks[rank]["groups"] or {}).values())]
    mute = [rank for rank, facts in ranks.items() if facts["groups"] is None]
    for kind, found in (
        ("stopped", [rank for rank, facts in ranks.items() if facts["state"] in ("T", "t")]),
        ("disk", [rank for rank, facts in ranks.items() if facts["state"] == "D"]),
        ("behind", roots or list(behind)),
        ("mute", mute if waits[2] else []),
    ):
        if found and len({ranks[rank]["host"] for rank in found}) == 1:
            facts = ranks[found[0]]
            at = next(iter(facts.get("stack") or ()), "")
            waited = behind.get(found[0], waits)
            return Culprit(kind, facts["host"], found[0], facts["local_rank"], *waited, at=at)
    lost = [node["host"] for node in nodes if node.get("reaches_head") is False]
    if len(hosts) > 2 and len(lost) == len(hosts) - 1:  # nobody reaches it: its own network
        lost = [host for host in hosts if host not in lost]
    return Culprit("unreachable", lost[0], None, None, *waits) if len(lost) == 1 < len(hosts) else None


def _waits(ranks: Mapping[int, Evidence]) -> tuple[str, int, int]:
    """The collective that most ranks wait in, its number, and how many do."""
    waits = [one["waits"] for facts in ranks.values() for one in (facts["groups"] or {}).values() if one["waits"]]
    counts = Counter((_plain(operation), number) for number, operation, _ in waits)
    return (*counts.most_common(1)[0][0], counts.most_common(1)[0][1]) if counts else ("", 0, 0)


def _plain(operation: str) -> str:
    return operation.strip("_").replace("_", "-")


def _behind(ranks: Mapping[int, Evidence]) -> dict[int, tuple[str, int, int]]:
    """Rank -> the collective that it has not entered, its number, and how many wait in it.

    A rank that has queued it on its GPU, where others have begun it, has not entered it either.
    """
    found: dict[int, tuple[str, int, int]] = {}
    for group in sorted({group for facts in ranks.values() for group in facts["groups"] or ()}):
        members = {rank: facts["groups"][group] for rank, facts in ranks.items() if group in (facts["groups"] or ())}
        waits = {rank: one["waits"] for rank, one in members.items() if one["waits"]}
        if not waits:
            continue
        number, operation, _ = min(waits.values())
        late = [rank for rank, one in members.items() if one["entered"] < number]
        if not late:
            begun = [rank for rank, wait in waits.items() if wait[0] == number and wait[2]]
            late = [rank for rank, wait in waits.items() if wait[0] == number and not wait[2]] if begun else []
        waiting = sum(rank not in late and wait[0] == number for rank, wait in waits.items())
        for rank in late:
            if waiting > found.get(rank, ("", 0, 0))[2]:
                found[rank] = (_plain(operation), number, waiting)
    return found
