"""Checks before a run queues of where its nodes stand: racks, segments, blocks. Pure; part of
launcher/preflight/checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.base.finding import ERROR, OK, WARNING, Check
from launcher.base.output import some
from launcher.config.hardware import of_gpu
from launcher.config.spec import RunSpec
from launcher.preflight import placement
from launcher.preflight.candidates import Place, candidates, fitting, number_of, usable
from launcher.scheduler.facts import SEGMENT_SINCE, Block, ClusterFacts
from launcher.scheduler.parse import expand

NO_BLOCK = "Slurm would say: Requested topology configuration is not available, while nodes are idle"


def segment(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    """What becomes of the run's --segment, chosen or the user's own."""
    wanted, nodes = spec.job.segment, spec.job.nodes
    if not wanted:
        return None
    if not facts.segment:
        return _no_segments(wanted, facts)
    able = fitting(spec, place)
    blocks = placement.blocks_among(facts.blocks, candidates(spec, place))
    sizes = [len(block.nodes) for block in blocks]
    largest = max(sizes, default=0)
    if nodes % wanted:
        near = next(n for n in placement.divisors(nodes) if n <= (largest or nodes))
        return Check(
            "placement",
            ERROR,
            f"--segment {wanted} does not divide --nodes {nodes}",
            "Slurm refuses the job",
            f"--segment {near}",
            certain=True,
        )
    if not facts.blocks:
        return Check(
            "placement",
            WARNING,
            f"--segment {wanted}: topology could not be read",
            "whether a block has room for a piece of that size cannot be told",
            "scontrol show topology",
        )
    if not blocks:
        return None  # `blocks` below, and the check of the GPUs, say why
    if wanted > largest:
        return Check(
            "placement",
            ERROR,
            f"--segment {wanted}: the largest block has {number_of(largest)}",
            "Slurm would say: Requested topology configuration is not available",
            f"--segment {placement.segment(nodes, sizes)}",
            certain=place.sure and "topology" not in facts.unread,
        )
    out = {node.name for node in able if not usable(node, spec.job.reservation)}
    found = placement.describe(nodes, wanted, blocks, {node.name for node in able if node.free})
    what = f"{found.pieces} x {wanted} nodes, each in one block of up to {largest}; {placement.room_text(found)}"
    if found.whole or not placement.wants_segment(spec):
        return Check("placement", OK, what)
    why, fix = _straddles(spec, found, blocks, out)
    return Check("placement", WARNING, what, why, fix)


def _no_segments(wanted: int, facts: ClusterFacts) -> Check:
    if facts.segment_unknown:
        return Check(
            "placement",
            WARNING,
            f"--segment {wanted}: whether Slurm places segments could not be read",
            "",
            "scontrol show config; scontrol show topology",
        )
    why = (
        f"Slurm {facts.slurm[0]}.{facts.slurm[1]:02d}, topology {facts.topology or 'not known'}"
        if facts.slurm
        else f"topology {facts.topology}"
    )
    old = facts.slurm is not None and facts.slurm < SEGMENT_SINCE
    return Check(
        "placement",
        ERROR,
        f"--segment {wanted}: Slurm places no segments here (23.11 with topology/block does)",
        why,
        "--segment 0",
        certain=old,
    )


def _straddles(spec: RunSpec, found: placement.Placement, blocks: Sequence[Block], out: set[str]) -> tuple[str, str]:
    """Why the job crosses more NVLink domains than so many nodes need, and what to type instead."""
    nodes = spec.job.nodes
    best = placement.place(nodes, blocks, out).segment
    if best > found.segment:
        return f"pieces of {best} nodes cross fewer NVLink domains", f"--segment {best}"
    better = " or ".join(str(count) for count in placement.whole_counts(nodes, blocks, out))
    fix = f"--nodes {better}" if better else ""
    domains = f"{found.fewest} NVLink domain{'s' if found.fewest > 1 else ''}"
    lost = sorted(out.intersection(name for block in blocks for name in block.nodes))
    waiting = placement.segment(nodes, [len(block.nodes) for block in blocks])
    if lost and waiting > found.segment:
        return (
            f"{some(lost)} {'is' if len(lost) == 1 else 'are'} out of service; with them, pieces of {waiting} "
            "would do: "
            "until then, traffic that could stay on NVLink crosses the network",
            f"{fix}{', or ' if fix else ''}--segment {waiting}, which waits for them",
        )
    return (
        f"{nodes} nodes need {domains} at least, but no larger piece divides them and has blocks enough: traffic that "
        "could stay on NVLink crosses the network",
        fix,
    )


def racks(spec: RunSpec, facts: ClusterFacts, _place: Place) -> Check | None:
    """NVLink goes from node to node within a rack, and Slurm cannot be told to stay in one."""
    nodes = spec.job.nodes
    if spec.job.segment or (facts.blocks and facts.segment) or not placement.wants_segment(spec):
        return None
    if facts.segment_unknown:
        what = "whether Slurm takes --segment" if facts.blocks else "topology"
        return Check(
            "placement",
            WARNING,
            f"{what} could not be read, so the job has no --segment",
            "it may straddle NVLink domains, and traffic that could stay on NVLink crosses the network",
            "scontrol show config; scontrol show topology; or say it: --segment N",
        )
    what = f"Slurm does not know the racks (topology {facts.topology})"
    known = of_gpu(spec.profile.gpu)
    rack = known.nvlink_gpus // known.gpus_per_node if known else 1  # nodes that share an NVLink domain
    if nodes <= rack:
        return Check("placement", OK, f"{what}: whether the {nodes} nodes share an NVLink domain is left to chance")
    return Check(
        "placement",
        WARNING,
        f"{what}: the job may straddle NVLink domains",
        f"{nodes} nodes need {-(-nodes // rack)} at least, and get as many as chance has it",
        "an administrator enables topology/block",
    )


def blocks(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    """Nodes that stand in no block get no jobs, however idle they are."""
    if facts.topology != "block" or not facts.blocks or "topology" in facts.unread:
        return None
    able = fitting(spec, place)
    inside = {name for block in facts.blocks for name in block.nodes}
    if outside := [name for name in expand(spec.job.nodelist) if name not in inside]:
        return Check(
            "blocks",
            ERROR,
            f"--nodelist: {some(outside)}: in no block of the topology",
            NO_BLOCK,
            "leave them out of --nodelist; scontrol show topology",
        )
    lost = [node.name for node in able if node.name not in inside]
    if not lost or place.most([node for node in able if node.name in inside]) >= spec.job.nodes:
        return None
    empty = [block.name for block in facts.blocks if not block.nodes]
    return Check(
        "blocks",
        ERROR,
        f"{number_of(len(lost))} of {place.name} are in no block of the topology: {some(lost)}",
        (f"{some(empty)} has no nodes; " if empty else "") + NO_BLOCK,
        "an administrator updates topology.yaml (or .conf) and runs scontrol reconfigure; scontrol show topology",
    )
