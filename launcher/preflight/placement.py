"""Which nodes a run may get, and which of them should stand together. Pure, from (spec, facts).

A block of topology/block is a rack whose GPUs share one NVLink domain. `--segment=S` cuts a job into pieces of S nodes
and puts each piece into one block; S must divide the number of nodes. Source: Slurm's manual of sbatch and
topology.yaml.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate

from launcher.base.finding import Fact, Finding, error, impossible, ok, warning
from launcher.config.hardware import of_gpu
from launcher.config.spec import PlacedRun, RunSpec
from launcher.scheduler.facts import SEGMENT_SINCE, Block, ClusterFacts, Node, Partition
from launcher.scheduler.parse import count_of, expand, gres_of

# Node states out of which only an operator, or a node that comes back, leads.
OUT = {"DOWN", "DRAIN", "ERROR", "FAIL", "FUTURE", "INVAL", "INVALID_REG", "NOT_RESPONDING", "UNKNOWN"}
HELD = {"RESERVED", "MAINT", "MAINTENANCE"}  # kept for a reservation
NVLINK_OVER_NODES = "NCCL_MNNVL_ENABLE"  # NCCL's switch for it: a profile that sets it has domains of several nodes
NEEDED = ("config", "nodes", "partitions", "topology")  # answers of Slurm without which no segment is chosen or judged


# --- which nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run may go: the partitions asked for, and their nodes without those that are left out."""

    spec: PlacedRun
    facts: ClusterFacts
    partitions: tuple[Partition, ...]
    nodes: tuple[Node, ...]
    fitting: tuple[Node, ...]  # those that have what each node of the run asks for
    hidden: frozenset[str]  # names of others that the partitions have, and of which nothing is known
    now: datetime | None
    unpacked_bytes: int  # of the image; 0 where it is not known

    @property
    def name(self) -> str:
        names = ",".join(partition.name for partition in self.partitions)
        return f"partition {names}" if names else "the default partition"

    @property
    def grows(self) -> bool:
        """Others may come at any time, so that what is missing now is not missing for ever."""
        return bool(self.hidden) or any(state.startswith("DYNAMIC") for node in self.nodes for state in node.states)

    @property
    def out(self) -> tuple[Node, ...]:
        """Fitting nodes that run no jobs now: out of service, or kept for somebody else."""
        closed = OUT if self.spec.job.reservation else OUT | HELD
        return tuple(node for node in self.fitting if node.states & closed)

    @property
    def in_service(self) -> tuple[Node, ...]:
        out = {node.name for node in self.out}
        return tuple(node for node in self.fitting if node.name not in out)

    @property
    def free(self) -> tuple[Node, ...]:
        held = HELD if self.spec.job.reservation else ()
        return tuple(node for node in self.fitting if node.free_but_for(*held))

    def most(self, nodes: Collection[Node]) -> int:
        """The most of these nodes that one of the partitions has: a job runs in one of them."""
        count = Counter(name for node in nodes for name in node.partitions)
        return max((count[partition.name] for partition in self.partitions), default=len(nodes))


def place_of(spec: PlacedRun, facts: ClusterFacts, now: datetime | None = None, unpacked_bytes: int = 0) -> Place:
    facts = facts.as_placed(spec.job.partition)
    chosen = facts.partitions_of(spec.job.partition)
    excluded = {*expand(spec.job.exclude), *spec.avoid}
    all_of = re.fullmatch(r"[\w.:+&-]+", spec.job.constraint)  # what other constraints mean is left to Slurm
    features = set(all_of[0].split("&")) if all_of else set()
    nodes = tuple(
        node
        for node in facts.nodes_of(spec.job.partition)
        if node.name not in excluded and features.issubset(node.features)
    )
    gres, count = spec.profile.gres, spec.profile.gpus_per_node
    fitting = tuple(node for node in nodes if not gres or gpus_of(node, gres) >= count)
    hidden = facts.hidden(spec.job.partition) - excluded
    return Place(spec, facts, chosen, nodes, fitting, hidden, now, unpacked_bytes)


def gpus_of(node: Node, gres: str) -> int:
    """How many of the generic resource `gres` ("gpu", "gpu:gb200") a node has."""
    return count_of(node.gres, gres) or (node.gpus if gres == "gpu" else 0)


NAMED_GB = re.compile(r"(?<![a-z0-9])(\d{1,3})gi?b(?![a-z0-9])")  # a100_40gb, nvidia_a100-sxm4-40gb, 1g.10gb
SEEN = 0.985  # of the memory in a GPU's name, what torch sees: 39.4 GiB of 40, 79.2 of 80


def with_gpu_memory(spec: PlacedRun, facts: ClusterFacts) -> PlacedRun:
    """The run with the memory that the nodes' GRES or features name, where their GPUs have less than the profile's.

    Of a GPU type there are several: a batch for 80 GB does not fit an A100 of 40.
    """
    known, gpu = of_gpu(spec.profile.gpu), spec.profile.gpu.lower()
    texts = {
        text.lower()
        for node in place_of(spec, facts).fitting
        for text in (*(kind for kind, _ in gres_of(node.gres) if kind.startswith("gpu:")), *node.features)
    }
    found = [int(named[1]) for text in texts if text[:4] == "gpu:" or gpu in text for named in NAMED_GB.finditer(text)]
    least = SEEN * min(found, default=0)
    return replace(spec, gpu_gib=0.0 if known and least > 0.9 * known.memory_gib else least)


# --- which of them together ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """What a segment means for a job, and which blocks could take a piece of it now."""

    segment: int
    pieces: int  # nodes / segment
    fewest: int  # blocks that hold this many nodes at least
    room: tuple[tuple[str, int], ...]  # (block, free nodes) of those with at least `segment` free nodes, most first

    @property
    def facts(self) -> dict[str, Fact]:
        starting = min(self.pieces, sum(free // self.segment for _, free in self.room))
        room = tuple(f"{name} ({free} free)" for name, free in self.room)
        return {"pieces": self.pieces, "segment": self.segment, "starting": starting, "room": room}


def segment_of(nodes: int, sizes: Sequence[int]) -> int:
    """The largest divisor of `nodes` that fits a block, with blocks enough for all pieces; 1 where none does.

    `sizes`: of the blocks, in nodes. With blocks of 18, 9 gives 9, 36 gives 18, 19 and 37 give 1.
    """
    for n in range(min(nodes, max(sizes, default=0)), 1, -1):
        if nodes % n == 0 and sum(size // n for size in sizes) >= nodes // n:
            return n
    return 1


def best_segment(nodes: int, blocks: Sequence[Block], out: Collection[str] = ()) -> int:
    """The segment for `nodes` nodes. `out`: nodes that are down or drained.

    What is out is not counted on, unless only the whole rack would do: then the job waits for the repair.
    """
    chosen = segment_of(nodes, [sum(node not in out for node in block.nodes) for block in blocks])
    return chosen if chosen > 1 else segment_of(nodes, [len(block.nodes) for block in blocks])


def describe(nodes: int, segment: int, blocks: Sequence[Block], free: Collection[str] = ()) -> Placement:
    """What a segment means for a job, the user's own included; it must divide `nodes`. `free`: nodes idle now."""
    counts = {block.name: sum(node in free for node in block.nodes) for block in blocks}
    room = sorted(((name, n) for name, n in counts.items() if n >= segment), key=lambda pair: (-pair[1], pair[0]))
    sums = list(accumulate(sorted((len(block.nodes) for block in blocks), reverse=True)))
    return Placement(segment, nodes // segment, bisect_left(sums, nodes) + 1, tuple(room))


def blocks_of(place: Place) -> list[Block]:
    """The blocks that have any of the nodes that the run may get, with no others in them."""
    names = place.hidden.union(node.name for node in place.fitting)
    kept = [Block(block.name, tuple(node for node in block.nodes if node in names)) for block in place.facts.blocks]
    return [block for block in kept if block.nodes]


def wants_segment(spec: RunSpec) -> bool:
    """The GPUs have NVLink from node to node, and there is more than one node."""
    return spec.job.nodes > 1 and spec.env.get(NVLINK_OVER_NODES) == "1"


def with_segment(spec: PlacedRun, facts: ClusterFacts) -> PlacedRun:
    """The run with the `--segment` that its partition's blocks allow, where Slurm knows it and NVLink crosses nodes.

    The user's own stays as it is.
    """
    if spec.job.segment:
        return replace(spec, segment=spec.job.segment)
    place = place_of(spec, facts)
    blocks, facts = blocks_of(place), place.facts
    if facts.lacks(*NEEDED) or not (facts.segment and blocks and wants_segment(spec)):
        return replace(spec, segment=0)
    return replace(spec, segment=best_segment(spec.allocated, blocks, {node.name for node in place.out}))


# --- what is found ------------------------------------------------------------------------------------------


def segment(place: Place) -> Finding | None:
    """What becomes of the run's --segment, chosen or the user's own."""
    facts, wanted, nodes = place.facts, place.spec.segment, place.spec.allocated
    if not wanted:
        return None
    if not facts.segment:
        old = facts.slurm is not None and facts.slurm < SEGMENT_SINCE
        version = f"{facts.slurm[0]}.{facts.slurm[1]:02d}" if facts.slurm else "of unknown version"
        topology = facts.topology or "not known"
        refuse = impossible if old else error
        return refuse("segment-unsupported", "--segment 0", segment=wanted, slurm=version, topology=topology)
    blocks = blocks_of(place)
    if not blocks:
        return None  # `blocks` below, and the check of the GPUs, say why
    largest, out = max(len(block.nodes) for block in blocks), {node.name for node in place.out}
    best = best_segment(nodes, blocks, out)
    if wanted > largest:
        refuse = error if place.grows else impossible
        return refuse("segment-above-block", f"--segment {best}", segment=wanted, largest=largest)
    found = describe(nodes, wanted, blocks, {node.name for node in place.free})
    if found.pieces == found.fewest or not wants_segment(place.spec):
        return ok("segment", **found.facts)
    fix = f"--segment {best}" if best > wanted else f"--nodes {largest}, or a multiple of it"
    lost = tuple(sorted(out.intersection(name for block in blocks for name in block.nodes)))
    return warning("segment-straddles", fix, nodes=nodes, domains=found.fewest, lost=lost, **found.facts)


def racks(place: Place) -> Finding | None:
    """NVLink goes from node to node within a rack, and Slurm cannot be told to stay in one."""
    spec, facts, nodes = place.spec, place.facts, place.spec.allocated
    if spec.segment or (facts.blocks and facts.segment) or not wants_segment(spec):
        return None
    known, topology = of_gpu(spec.profile.gpu), facts.topology or "not known"
    rack = known.nvlink_gpus // known.gpus_per_node if known else 1  # nodes that share an NVLink domain
    if nodes <= rack:
        return ok("racks-unknown", topology=topology, nodes=nodes)
    fix = "an administrator enables topology/block"
    return warning("racks-straddled", fix, topology=topology, nodes=nodes, domains=-(-nodes // rack))


def blocks(place: Place) -> Finding | None:
    """Nodes that stand in no block get no jobs, however idle they are."""
    all_blocks = place.facts.blocks
    inside = {name for block in all_blocks for name in block.nodes}
    placeable = [node for node in place.fitting if node.name in inside]
    if not all_blocks or len(placeable) == len(place.fitting) or place.most(placeable) >= place.spec.allocated:
        return None
    lost = tuple(node.name for node in place.fitting if node.name not in inside)
    empty = tuple(block.name for block in all_blocks if not block.nodes)
    fix = "an administrator updates topology.yaml (or .conf) and runs scontrol reconfigure; scontrol show topology"
    return error("nodes-in-no-block", fix, count=len(lost), nodes=lost, place=place.name, empty=empty)
