"""Why a job is still waiting, in plain words, and what would start sooner. Pure: launcher/preflight/readiness.py asks Slurm.

The reasons are those of squeue's manual (JOB REASON CODES) and of Slurm's source, 22.05 to 25.11.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from launcher.cluster.facts import ClusterFacts, Node
from launcher.cluster.parse import DATE, seconds
from launcher.errors import quoted
from launcher.output import some
from launcher.preflight import placement
from launcher.preflight.candidates import HELD, OUT, Place, fitting, number_of, place_of
from launcher.spec import RunSpec
from launcher.watch import duration

# The first that matches the beginning of Slurm's reason: what it means, and whether free nodes are what is missing.
REASONS = (
    (r"Priority", "jobs with a higher priority are to start first", True),
    (r"Resources", "enough nodes are not free yet; it is its turn", True),
    (
        r"ReqNodeNotAvail.*maint",
        "its nodes are reserved for maintenance that begins before its time limit ends: a shorter --time may fit in before",
        True,
    ),
    (r"ReqNodeNotAvail", "nodes that it needs are down, drained, or reserved", True),
    (
        r"Nodes required for job are",
        "nodes that it needs are down, drained, or reserved for a partition of higher priority",
        True,
    ),
    (
        r"Not enough|BadConstraints",
        "no nodes have what it asks for (GPUs per node, features): it never starts as it is",
        True,
    ),
    (r"NodeDown", "a node that it needs is down", True),
    (
        r"PartitionNodeLimit|PartitionConfig",
        "it asks for more nodes than its partition has or allows: it never starts as it is",
        True,
    ),
    (
        r"PartitionTimeLimit",
        "its --time is above the partition's limit: it never starts as it is; sinfo -o '%P %l'",
        False,
    ),
    (r"PartitionDown|PartitionInactive", "its partition is closed to new starts", True),
    (
        r"Reservation ?invalid",
        "its reservation is not one that it may use: scontrol show reservation, then launcher cancel",
        False,
    ),
    (r"Reservation$", "its reservation has not begun yet: scontrol show reservation", False),
    (r"ReservationDeleted", "its reservation no longer exists: cancel it", False),
    (r"BeginTime", "the time at which it may begin has not come", False),
    (r"DependencyNeverSatisfied", "the job that it depends on failed: it never starts", False),
    (r"Dependency", "it waits for another job to end", False),
    (r"DeadLine", "it can no longer end before its deadline: it never starts", False),
    (
        r"JobHoldMaxRequeue",
        "it was requeued too often, and Slurm holds it: scontrol release lets it go; launcher logs says why it fails",
        False,
    ),
    (r"job requeued in held state", "it was requeued to be held: scontrol release lets it go", False),
    (
        r"user env retrieval failed",
        "Slurm could not read your login environment on the node, and holds it: scontrol release lets it go",
        False,
    ),
    (r"JobHeldUser", "you hold it: scontrol release lets it go", False),
    (r"JobHeldAdmin", "an administrator holds it: ask why", False),
    (
        r"launch failed|JobLaunchFailure|SystemFailure|Prolog",
        "a node could not start it, and Slurm holds it: scontrol release after the node is repaired",
        False,
    ),
    (r"Licenses", "a licence that it asks for is in use", False),
    (r"InvalidAccount|AccountNotAllowed|AccountingPolicy", "its account may not use this partition: --account", False),
    (r"InvalidQOS|QOSNotAllowed", "its QOS may not be used here: --qos", False),
    (r"QOS", "a limit of its QOS is reached: sacctmgr show qos", False),
    (r"Assoc|Max\w*Per", "a limit of your account is reached: squeue --me; sacctmgr show assoc user=$USER", False),
    (r"Cleaning", "what its last start left is being cleaned up", False),
    (r"(None)?$", "Slurm has not looked at it yet", False),
)


def meaning(reason: str) -> tuple[str, bool]:
    """Plain words for Slurm's reason ("" for one that is not known), and whether other nodes could help."""
    for pattern, text, is_nodes in REASONS:
        if re.match(pattern, reason, re.IGNORECASE):
            return text, is_nodes
    return "", False


def explain(
    reason: str,
    spec: RunSpec | None,
    facts: ClusterFacts | None,
    start: str = "",
    now: datetime | None = None,
) -> list[str]:
    """Lines that tell why a job waits. `start`: Slurm's estimate (local time), as squeue prints it."""
    words, is_nodes = meaning(reason)
    lines = [words] if words else []
    if spec is not None and facts is not None and facts.nodes:
        lines += _nodes(spec, place_of(spec, facts))
        lines += _blocks(spec, facts, place_of(spec, facts))
    lines += _estimate(start, now)
    if is_nodes and spec is not None and facts is not None and facts.nodes:
        lines += _sooner(spec, facts)
    return lines


def _nodes(spec: RunSpec, place: Place) -> list[str]:
    able = fitting(spec, place)
    count = Counter(_group(node) for node in able)
    parts = [
        f"{count[group]} {group}" for group in ("free", "in use", "out of service", "reserved", "other") if count[group]
    ]
    kind = f" with {spec.profile.gres}:{spec.profile.gpus_per_node}" if len(able) < len(place.nodes) else ""
    lines = [f"{number_of(spec.job.nodes)} asked; {place.name} has {len(able)}{kind}: {', '.join(parts) or 'none'}"]
    out = [node for node in able if node.states & OUT]
    if out:
        reasons = Counter(f"{node.state}" + (f" ({node.reason})" if node.reason else "") for node in out)
        texts = [text if number == 1 else f"{number} {text}" for text, number in reasons.most_common()]
        lines.append(f"out of service: {some([node.name for node in out])}: {some(texts)}")
    return lines


def _group(node: Node) -> str:
    if node.states & OUT:
        return "out of service"
    if node.free:
        return "free"
    if node.states & HELD:
        return "reserved"
    return "in use" if node.states & {"ALLOCATED", "MIXED", "COMPLETING", "PLANNED"} else "other"


def _blocks(spec: RunSpec, facts: ClusterFacts, place: Place) -> list[str]:
    if not (spec.job.segment > 1 and facts.segment) or spec.job.nodes % spec.job.segment:
        return []
    able = fitting(spec, place)
    blocks = placement.blocks_among(facts.blocks, {node.name for node in able})
    free = {node.name for node in able if node.free}
    found = placement.describe(spec.job.nodes, spec.job.segment, blocks, free)
    return [f"{found.pieces} x {spec.job.segment} nodes, each in one block; {placement.room_text(found)}"]


def _estimate(start: str, now: datetime | None) -> list[str]:
    """From squeue's words: a warning may stand before the time, and a time zone, which is this machine's, behind it."""
    said = re.findall(rf"^\s*({DATE.pattern})", start, re.MULTILINE)
    try:
        when = datetime.fromisoformat(said[-1])
    except (IndexError, ValueError):
        return ["Slurm has no estimate of its start"]
    left = (when - now).total_seconds() if now else 0.0
    # Slurm's plan is as old as its last round of planning: a start in the past is one that is due.
    return [f"estimated start: {when:%Y-%m-%d %H:%M}" + (f", in {duration(left)}" if left > 0 else ", which is now")]


def _sooner(spec: RunSpec, facts: ClusterFacts) -> list[str]:
    place = place_of(spec, facts)
    able = fitting(spec, place)
    asked, free = spec.job.nodes, place.most([node for node in able if node.free])
    lines = []
    count = fewer(spec, min(free, asked - 1))
    if free < asked and count:
        lines.append(f"sooner: --nodes {count}: {number_of(free)} free now")
    others = [name for name in _other_partitions(spec, facts, place) if name]
    if others:
        lines.append(f"sooner: {quoted('--partition', others[0])}: it has that many free now")
    return lines


def fewer(spec: RunSpec, most: int) -> int:
    """The largest number of nodes up to `most` that the run's parallel degrees divide; 0 for none."""
    recipe = spec.recipe
    degree = recipe.tensor_parallel * recipe.context_parallel * recipe.pipeline_parallel * recipe.dp_replicate
    if recipe.dp_shard > 0:  # then the product is fixed, and with it the number of nodes
        return 0
    return next((n for n in range(most, 0, -1) if n * spec.profile.gpus_per_node % degree == 0), 0)


def _other_partitions(spec: RunSpec, facts: ClusterFacts, place: Place) -> Sequence[str]:
    mine = {partition.name for partition in place.partitions}
    needed_s = seconds(spec.job.time) or 0
    arches = {"", spec.profile.arch}
    found = []
    for partition in facts.partitions:
        long_enough = partition.max_time_s is None or partition.max_time_s >= needed_s
        wide_enough = partition.max_nodes is None or partition.max_nodes >= spec.job.nodes
        if partition.name in mine or partition.state not in ("", "UP") or not (long_enough and wide_enough):
            continue
        here = fitting(spec, Place((partition,), facts.nodes_of(partition.name)))
        if sum(node.free and node.arch in arches for node in here) >= spec.job.nodes:
            found.append(partition.name)
    return found
