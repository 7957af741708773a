"""Which nodes should stand together: `--segment` from the blocks of Slurm's topology. Pure.

A block of topology/block is a rack whose GPUs share one NVLink domain. `--segment=S` cuts a job into pieces of S nodes
and puts each piece into one block; S must divide the number of nodes. Source: Slurm's manual of sbatch and
topology.yaml.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from launcher.config.spec import RunSpec
from launcher.scheduler.facts import Block, ClusterFacts

NVLINK_OVER_NODES = "NCCL_MNNVL_ENABLE"  # NCCL's switch for it: a profile that sets it has domains of several nodes
CHOSEN = "chosen from the topology"  # how the origin of a segment begins that was not the user's


@dataclass(frozen=True)
class Placement:
    """A segment, and which blocks could take one now."""

    segment: int
    pieces: int  # nodes / segment
    fewest: int  # blocks that hold this many nodes at least
    room: tuple[tuple[str, int], ...]  # (block, free nodes) of those with at least `segment` free nodes, most first

    @property
    def whole(self) -> bool:
        """No piece is smaller than it must be: the job crosses no more NVLink domains than it has to."""
        return self.pieces == self.fewest

    @property
    def starts_now(self) -> bool:
        return sum(free // self.segment for _, free in self.room) >= self.pieces


def divisors(number: int) -> list[int]:
    """Every divisor, largest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


def segment(nodes: int, sizes: Sequence[int]) -> int:
    """The largest divisor of `nodes` that fits a block, with blocks enough for all pieces; 1 where none does.

    `sizes` are the numbers of nodes of the blocks. 9 of 18 gives 9, 36 gives 18, 19 and 37 give 1.
    """
    return _segment(nodes, Counter(sizes))


def _segment(nodes: int, blocks_of: Mapping[int, int]) -> int:
    """The same by the number of blocks of each size: racks by the hundred have few sizes."""
    most = max(blocks_of, default=0)
    for n in divisors(nodes):
        if n <= most and sum(size // n * count for size, count in blocks_of.items()) >= nodes // n:
            return n
    return 1


def place(nodes: int, blocks: Sequence[Block], out: Collection[str] = (), free: Collection[str] = ()) -> Placement:
    """The segment for `nodes` nodes. `out`: nodes that are down or drained; `free`: nodes that are idle now.

    What is out is not counted on, unless only the whole rack would do: then the job waits for the repair.
    """
    chosen = _chosen(nodes, Counter(_in_service(blocks, out)), Counter(_in_service(blocks, ())))
    return describe(nodes, chosen, blocks, free)


def _chosen(nodes: int, in_service: Mapping[int, int], all_of_them: Mapping[int, int]) -> int:
    chosen = _segment(nodes, in_service)
    return chosen if chosen > 1 else _segment(nodes, all_of_them)


def _in_service(blocks: Sequence[Block], out: Collection[str]) -> list[int]:
    """The numbers of nodes of the blocks, without those that are out."""
    return [sum(node not in out for node in block.nodes) for block in blocks]


def describe(nodes: int, chosen: int, blocks: Sequence[Block], free: Collection[str] = ()) -> Placement:
    """What a segment means for a job, the user's own included; it must divide `nodes`."""
    counts = {block.name: sum(node in free for node in block.nodes) for block in blocks}
    room = sorted(((name, n) for name, n in counts.items() if n >= chosen), key=lambda pair: (-pair[1], pair[0]))
    return Placement(chosen, nodes // chosen, _fewest(nodes, _sums(blocks)), tuple(room))


def _sums(blocks: Sequence[Block]) -> list[int]:
    """How many nodes the largest block has, the two largest, and so on."""
    return list(accumulate(sorted((len(block.nodes) for block in blocks), reverse=True)))


def _fewest(nodes: int, sums: Sequence[int]) -> int:
    """The least number of blocks that hold so many nodes, by `_sums`; one more than there are where they do not."""
    return bisect_left(sums, nodes) + 1


def room_text(found: Placement) -> str:
    """Which blocks have room for a piece now."""
    if not found.room:
        return "no block has room for one now"
    texts = [f"{name} ({free} free)" for name, free in found.room[:3]]
    more = f" and {len(found.room) - 3} more" if len(found.room) > 3 else ""
    return f"room now{'' if found.starts_now else ', but not for all'}: {', '.join(texts)}{more}"


def whole_counts(nodes: int, blocks: Sequence[Block], out: Collection[str] = ()) -> list[int]:
    """The nearest numbers of nodes, one below and one above, that cross no more domains than they have to."""
    sizes = _in_service(blocks, out)
    in_service, all_of_them, sums = Counter(sizes), Counter(_in_service(blocks, ())), _sums(blocks)

    def good(count: int) -> bool:
        return count // _chosen(count, in_service, all_of_them) == _fewest(count, sums)

    below = next((n for n in range(nodes - 1, 0, -1) if good(n)), None)
    above = next((n for n in range(nodes + 1, sum(sizes) + 1) if good(n)), None)
    return [n for n in (below, above) if n is not None]


def wants_segment(spec: RunSpec) -> bool:
    """The GPUs have NVLink from node to node, and there is more than one node."""
    return spec.job.nodes > 1 and spec.env.get(NVLINK_OVER_NODES) == "1"


def is_users_own(spec: RunSpec, known: bool) -> bool:
    """The segment was asked for. One that a run.toml brings along counts while it still fits."""
    origin = spec.origin.get("job.segment", "")
    if not spec.job.segment or origin.startswith(CHOSEN):
        return False
    repeated = origin.startswith("file ") and origin.endswith("run.toml")
    return not repeated or (known and spec.job.nodes % spec.job.segment == 0)


def blocks_among(blocks: Sequence[Block], names: Collection[str]) -> list[Block]:
    """The blocks that have any of these nodes, with no others in them."""
    kept = [Block(block.name, tuple(node for node in block.nodes if node in names)) for block in blocks]
    return [block for block in kept if block.nodes]


def with_segment(spec: RunSpec, facts: ClusterFacts, names: Collection[str], out: Collection[str] = ()) -> RunSpec:
    """The run with its `--segment`, where Slurm knows it and NVLink crosses nodes; the user's own stays as it is.

    `names`: the nodes that the job may have; `out`: those of them that are down or drained.
    """
    if is_users_own(spec, facts.segment):
        return spec
    blocks = blocks_among(facts.blocks, names)
    if not (facts.segment and blocks and wants_segment(spec)):
        return _with(spec, 0, "default") if spec.job.segment else spec
    chosen = place(spec.job.nodes, blocks, out).segment
    return _with(spec, chosen, f"{CHOSEN}, blocks of {max(len(block.nodes) for block in blocks)}")


def _with(spec: RunSpec, chosen: int, origin: str) -> RunSpec:
    return replace(spec, job=replace(spec.job, segment=chosen), origin={**spec.origin, "job.segment": origin})
