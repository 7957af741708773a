"""Why a job is still waiting, in plain words, and what would start sooner.

Pure: launcher/preflight/readiness.py asks Slurm. reasons.toml says what Slurm's reasons mean.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from launcher.base.errors import quoted
from launcher.base.output import some
from launcher.config.spec import RunSpec
from launcher.logs.watch import duration
from launcher.preflight import placement
from launcher.preflight.candidates import HELD, OUT, Place, fitting, number_of, place_of
from launcher.scheduler.facts import ClusterFacts, Node
from launcher.scheduler.parse import DATE, seconds


@cache
def reasons() -> list[dict[str, Any]]:
    table: dict[str, list[dict[str, Any]]]
    table = tomllib.loads(Path(__file__).with_name("reasons.toml").read_text(encoding="utf-8"))
    return table["reason"]


def meaning(reason: str) -> tuple[str, bool]:
    """Plain words for Slurm's reason ("" for one that is not known), and whether other nodes could help."""
    for entry in reasons():
        if re.match(entry["pattern"], reason, re.IGNORECASE):
            return entry["says"], entry["nodes"]
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
