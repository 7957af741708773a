"""What is known about a Slurm cluster: plain values, read once before anything is submitted.

launcher/scheduler/detect.py asks Slurm for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launcher.base.errors import ExitStatus, LauncherError, quoted

# Base states and flags with which Slurm gives a node to a job at once. A flag that is not listed here is one that a
# later Slurm has invented: such a node is not counted on.
FREE = {"IDLE", "CLOUD", "DYNAMIC_NORM", "DYNAMIC_FUTURE", "POWERED_DOWN"}
# What matters most about a node comes first, in words of our own where Slurm's flag is none.
SAID_FIRST = (
    *("DOWN", "ERROR", "FAIL", "INVAL", "INVALID_REG", "NOT_RESPONDING", "DRAIN", "MAINTENANCE", "MAINT"),
    *("REBOOT_ISSUED", "REBOOT", "REBOOT_REQUESTED", "COMPLETING", "ALLOCATED", "MIXED", "RESERVED", "PLANNED"),
    *("BLOCKED", "POWERING_DOWN", "POWERING_UP", "POWERED_DOWN", "FUTURE"),
)
WORDS = {"FAIL": "failed", "INVAL": "invalid", "INVALID_REG": "invalid", "MAINT": "maintenance"}
WORDS |= {"REBOOT_ISSUED": "rebooting", "REBOOT": "rebooting"}
# Of --segment, by the version: a site's own sbatch may submit whatever it is given, so it is not asked for its --help.
SEGMENT_SINCE = (23, 11)
NO_SLURM = "go to the cluster's login node; without Slurm: launcher submit --local"


@dataclass(frozen=True)
class Node:
    """One node as `scontrol show node` has it. Memory in MiB as configured; "" and 0 where Slurm says nothing."""

    name: str
    states: frozenset[str] = frozenset()  # upper case, base state and flags: {"IDLE", "DRAIN"}
    reason: str = ""  # why it is down or drained, with Slurm's own [user@time]
    partitions: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    gres: str = ""
    gpus: int = 0
    gpu_type: str = ""  # from the GRES, lower case; "" where it is untyped
    cpus: int = 0
    memory_mib: int = 0
    arch: str = ""  # uname's word; "" until slurmd has registered once
    booted: str = ""  # when, as Slurm writes local time: "2026-03-01T00:00:00"; "" where it does not know
    tmp_mib: int = 0  # TmpDisk: its local disk for temporary files

    @property
    def free(self) -> bool:
        """Slurm would start a job on it now; a powered-down cloud node counts, since Slurm wakes it for a job."""
        return self.free_but_for()

    def free_but_for(self, *held: str) -> bool:
        """The same for a job that may use nodes with these flags: RESERVED, where the reservation is its own."""
        return "IDLE" in self.states and self.states <= FREE.union(held)

    @property
    def state(self) -> str:
        """One word or two, as in sinfo."""
        first = next((flag for flag in SAID_FIRST if flag in self.states), "")
        if first == "DRAIN":
            return "draining" if self.states & {"ALLOCATED", "MIXED", "COMPLETING"} else "drained"
        if first:
            return WORDS.get(first, first.lower().replace("_", " "))
        return "idle" if self.free else "+".join(sorted(self.states)).lower() or "unknown"


@dataclass(frozen=True)
class Partition:
    """A partition. `max_time_s` and `max_nodes` are None for no limit."""

    name: str
    default: bool = False
    state: str = ""  # Slurm's word: UP, DOWN, DRAIN, INACTIVE
    max_time_s: int | None = None
    max_nodes: int | None = None
    nodes: tuple[str, ...] = ()
    min_nodes: int = 0  # of a job
    groups: tuple[str, ...] = ()  # Unix groups that may use it; empty: all
    root_only: bool = False
    needs_reservation: bool = False
    topology: str = ""  # name of its own, from Slurm 25.05; "": the cluster's


@dataclass(frozen=True)
class Block:
    """A block of topology/block: nodes that share a rack's NVLink domain. An empty one is possible."""

    name: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topology:
    """One that partitions name. `unread`: its command, and why there is no answer."""

    kind: str = ""  # block, tree, flat
    blocks: tuple[Block, ...] = ()
    unread: str = ""


@dataclass(frozen=True)
class ClusterFacts:
    """A cluster at one moment. What could not be read is as empty as what is not there: `unread` tells them apart."""

    name: str = ""
    slurm: tuple[int, int] | None = None  # (25, 11)
    topology: str = ""  # the plugin without "topology/": block, tree, flat
    accounting: bool | None = None
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    blocks: tuple[Block, ...] = ()
    pyxis_options: tuple[str, ...] = ()  # "--container-image", ... as srun --help lists them
    squashfuse: bool | None = None  # an image is mounted (True) or unpacked on every node (False)
    topologies: Mapping[str, Topology] = field(default_factory=dict)  # by name; the cluster's default is not in it
    # The question of launcher/scheduler/detect.py -> its command, and why there is no answer, or not a whole one.
    unread: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""  # why Slurm cannot be asked at all: it is not installed here

    @property
    def segment(self) -> bool:
        """Slurm takes --segment, and the topology is made of blocks."""
        return self.topology == "block" and (self.slurm or (0, 0)) >= SEGMENT_SINCE

    @property
    def pyxis(self) -> bool:
        return "--container-image" in self.pyxis_options

    def lacks(self, *questions: str) -> bool:
        """Whether any of these answers is missing: then nothing is concluded from it."""
        return not self.unread.keys().isdisjoint(questions)

    def partition(self) -> Partition | None:
        """The default partition; where none is the default, the only one there is."""
        chosen = next((p for p in self.partitions if p.default), None)
        return chosen or (self.partitions[0] if len(self.partitions) == 1 else None)

    def require(self, partition: str) -> ClusterFacts:
        """These facts; raises LauncherError where the nodes could not be read, or one of "a,b" is no partition."""
        if self.absent:
            raise LauncherError("slurm-missing", self.absent, NO_SLURM, status=ExitStatus.CLUSTER)
        if why := self.unread.get("nodes"):
            what = f"Slurm's nodes cannot be read: {why}"
            raise LauncherError("slurm-failed", what, "scontrol ping", status=ExitStatus.CLUSTER)
        known = [p.name for p in self.partitions]
        missing = [name for name in partition.split(",") if name and name not in known]
        if missing and not self.lacks("partitions"):
            what = f"Slurm has no partition {missing[0]!r}; it has {', '.join(known) or 'none'}"
            fix = quoted("--partition", known[0]) if known else "sinfo -s"
            raise LauncherError("partition-unknown", what, fix, status=ExitStatus.NOT_FOUND)
        return self

    def partitions_of(self, names: str = "") -> tuple[Partition, ...]:
        """Those that "a,b" names, or the default one for ""; none where there is none."""
        if names:
            return tuple(p for p in self.partitions if p.name in names.split(","))
        return tuple(filter(None, (self.partition(),)))

    def as_placed(self, partition: str = "") -> ClusterFacts:
        """These facts with the topology by which Slurm places jobs of `partition`; none where "a,b" have several."""
        used = {p.topology for p in self.partitions_of(partition)} or {""}
        if used == {""}:
            return self
        own = self.topologies.get(used.pop(), Topology()) if len(used) == 1 else Topology()
        unread = {name: why for name, why in self.unread.items() if name != "topology"}
        unread |= {"topology": own.unread} if own.unread else {}
        return replace(self, topology=own.kind, blocks=own.blocks, unread=unread)

    def nodes_of(self, partition: str = "") -> tuple[Node, ...]:
        """Nodes of `partition` ("a,b" is both), or of the default one for "", or all where there is none."""
        wanted = set(partition.split(",")) if partition else {p.name for p in self.partitions_of()}
        return tuple(n for n in self.nodes if wanted & set(n.partitions)) if wanted else self.nodes

    def hidden(self, partition: str = "") -> frozenset[str]:
        """Names that the partition's own record lists and Slurm does not show: cloud nodes that are powered down."""
        listed = {node for p in self.partitions_of(partition) for node in p.nodes}
        return frozenset(listed.difference(node.name for node in self.nodes))
