"""Which nodes of the cluster a run may get: pure, from (spec, facts)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from launcher.base.output import SHOWN
from launcher.base.values import whole
from launcher.config.spec import RunSpec
from launcher.scheduler.facts import ClusterFacts, Node, Partition
from launcher.scheduler.parse import expand

# Node states out of which only an operator, or a node that comes back, leads.
OUT = {"DOWN", "DRAIN", "ERROR", "FAIL", "FUTURE", "INVAL", "INVALID_REG", "NOT_RESPONDING", "UNKNOWN"}
HELD = {"RESERVED", "MAINT", "MAINTENANCE"}  # kept for a reservation


@dataclass(frozen=True)
class Place:
    """Where the run may go: the partitions asked for, and their nodes without those that are left out."""

    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    asked: str = ""  # the partitions by the name that the run gives them; "" for the default one
    unread: frozenset[str] = frozenset()  # names of nodes that the partitions list and of which nothing is known
    whole: bool = True  # every node there is was read

    @property
    def name(self) -> str:
        names = ",".join(partition.name for partition in self.partitions) or self.asked
        return f"partition {names}" if names else "the default partition"

    @property
    def guessed(self) -> bool:
        """The partitions' own records could not be read: what they allow is not known."""
        return not self.partitions or any(partition.guessed for partition in self.partitions)

    @property
    def sure(self) -> bool:
        """What is not there now will not be there later, and what was not read does not exist."""
        return self.whole and not self.grows and not self.guessed

    @property
    def grows(self) -> bool:
        """Dynamic nodes: others may register at any time, so that what is missing now is not missing for ever."""
        return any(state.startswith("DYNAMIC") for node in self.nodes for state in node.states)

    def most(self, nodes: Collection[Node]) -> int:
        """The most of these nodes that one of the partitions has: a job runs in one of them."""
        count = Counter(name for node in nodes for name in node.partitions)
        return max((count[partition.name] for partition in self.partitions), default=len(nodes))


def place_of(spec: RunSpec, facts: ClusterFacts) -> Place:
    names = [name for name in spec.job.partition.split(",") if name]
    default = facts.partition()
    chosen = [p for p in facts.partitions if p.name in names] if names else [default] if default else []
    excluded = {*expand(spec.job.exclude), *spec.avoid}
    nodes = tuple(node for node in facts.nodes_of(spec.job.partition) if node.name not in excluded)
    unread = facts.names_of(spec.job.partition).difference(node.name for node in facts.nodes)
    whole = not unread and "nodes" not in facts.unread
    return Place(tuple(chosen), nodes, spec.job.partition, frozenset(unread - excluded), whole)


def left_out(spec: RunSpec) -> str:
    """What says which nodes the run may not have; "" where it may have all."""
    return " and ".join(
        text
        for text, named in (
            ("those of --exclude", spec.job.exclude),
            ("those that failed their check (launcher cluster nodes)", spec.avoid),
        )
        if named
    )


def usable(node: Node, reservation: str = "") -> bool:
    """The node runs jobs, now or after others: neither out of service nor kept for somebody else."""
    return not node.states & (OUT if reservation else OUT | HELD)


def gpus_of(node: Node, gres: str) -> int:
    """How many of the generic resource `gres` ("gpu", "gpu:gb200") a node has."""
    return _count(node.gres, gres) or (node.gpus if gres == "gpu" else 0)


@cache
def _count(text: str, gres: str) -> int:
    """Nodes by the thousand have the same few texts."""
    found = 0
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        kind, _, count = entry.rpartition(":")
        if kind and (number := whole(count)) is not None and (kind == gres or kind.startswith(f"{gres}:")):
            found += number
    return found


def fitting(spec: RunSpec, place: Place) -> tuple[Node, ...]:
    """The nodes that have what each node of the run asks for."""
    gres = spec.profile.gres
    if not gres:
        return place.nodes
    return tuple(node for node in place.nodes if gpus_of(node, gres) >= spec.profile.gpus_per_node)


def candidates(spec: RunSpec, place: Place) -> set[str]:
    """Names of the nodes that the run may get; what could not be read is not held against it."""
    return {node.name for node in fitting(spec, place)} | place.unread


def number_of(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def reasons(nodes: Sequence[Node]) -> str:
    """Which nodes are in which state, with what the administrator wrote."""
    texts = [f"{node.name} is {node.state}" + (f" ({node.reason})" if node.reason else "") for node in nodes]
    more = f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
