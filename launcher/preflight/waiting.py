"""Why a job is still waiting, in plain words, and what would start sooner.

`why_waiting` asks Slurm; the rest is pure. reasons.toml says what Slurm's reasons mean.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.finding import ok
from launcher.base.output import counted, duration, some
from launcher.config.layers import merge, read_layer
from launcher.config.spec import PlacedRun, RunSpec
from launcher.preflight.cluster import in_words
from launcher.preflight.placement import HELD, OUT, Place, blocks_of, describe, place_of
from launcher.preflight.text import words
from launcher.runs.directory import Run
from launcher.scheduler import slurm
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts, Node
from launcher.scheduler.parse import DATE
from launcher.scheduler.state import JobState


def why_waiting(run: Run, state: JobState) -> list[str]:
    """Why Slurm has not started the run's job yet, and what would start sooner. Never raises: it is a help only."""
    job_id = str((run.job or {}).get("job_id", ""))
    start, spec = "", None
    with suppress(LauncherError):
        spec = _as_submitted(run)
    with suppress(LauncherError):
        start = slurm.ask(("squeue", "--noheader", "--start", f"--jobs={job_id}", "--format=%S")).strip()
    return explain(state.reason, spec, detect(), start, datetime.now())


def _as_submitted(run: Run) -> PlacedRun:
    """The run's spec, with every node that its job leaves out: run.toml has those that the user named."""
    spec = merge([read_layer(run.path / "run.toml", "run.toml")])
    decided = run.asked["placed"]
    left_out, segment = decided.get("exclude"), decided.get("segment")
    return PlacedRun(
        **vars(spec),
        avoid=tuple(name for name in left_out if isinstance(name, str)) if isinstance(left_out, list) else (),
        segment=segment if type(segment) is int else spec.job.segment,
    )


@cache
def reasons() -> list[dict[str, Any]]:
    table = tomllib.loads(Path(__file__).with_name("reasons.toml").read_text(encoding="utf-8"))
    return list(table["reason"])


def meaning(reason: str) -> tuple[str, bool]:
    """Plain words for Slurm's reason ("" for one that is not known), and whether other nodes could help."""
    for entry in reasons():
        if re.match(entry["pattern"], reason, re.IGNORECASE):
            return entry["says"], entry["nodes"]
    return "", False


def explain(
    reason: str, spec: PlacedRun | None, facts: ClusterFacts, start: str = "", now: datetime | None = None
) -> list[str]:
    """Lines that tell why a job waits. `start`: Slurm's estimate (local time), as squeue prints it."""
    says, fewer_nodes_help = meaning(reason)
    place = place_of(spec, facts) if spec and facts.nodes and not facts.lacks("partitions") else None
    lines = [says] if says else []
    if place:
        lines += _nodes(place)
    lines.append(_estimate(start, now))
    if place and fewer_nodes_help:
        free, asked = place.most(place.free), place.spec.job.nodes
        if free < asked and (count := fewer(place.spec, free)):
            lines.append(f"sooner: --nodes {count}: {counted(free, 'node')} free now")
    return lines


def _nodes(place: Place) -> list[str]:
    profile = place.spec.profile
    count = Counter(_group(node) for node in place.fitting)
    groups = ("free", "in use", "out of service", "reserved", "other")
    parts = ", ".join(f"{count[group]} {group}" for group in groups if count[group])
    kind = f" with {profile.gres}:{profile.gpus_per_node}" if len(place.fitting) < len(place.nodes) else ""
    asked = counted(place.spec.job.nodes, "node")
    lines = [f"{asked} requested; {place.name} has {len(place.fitting)}{kind}: {parts or 'none'}"]
    if out := [node for node in place.fitting if node.states & OUT]:
        lines.append(f"out of service: {some(in_words(out))}")
    nodes, segment = place.spec.job.nodes, place.spec.segment
    if segment > 1 and place.facts.segment and nodes % segment == 0:
        found = describe(nodes, segment, blocks_of(place), {node.name for node in place.free})
        lines.append(words(ok("segment", **found.facts)).what)
    return lines


def _group(node: Node) -> str:
    if node.states & OUT:
        return "out of service"
    if node.free:
        return "free"
    if node.states & HELD:
        return "reserved"
    return "in use" if node.states & {"ALLOCATED", "MIXED", "COMPLETING", "PLANNED"} else "other"


def _estimate(start: str, now: datetime | None) -> str:
    """From squeue's words: a warning may stand before the time, and a time zone, which is this machine's, behind it."""
    said = re.findall(rf"^\s*({DATE.pattern})", start, re.MULTILINE)
    try:
        when = datetime.fromisoformat(said[-1])
    except (IndexError, ValueError):
        return "Slurm has no estimate of its start"
    left = (when - now).total_seconds() if now else 0.0
    # Slurm's plan is as old as its last round of planning: a start in the past is one that is due.
    return f"estimated start: {when:%Y-%m-%d %H:%M}, " + (f"in {duration(left)}" if left > 0 else "which is now")


def fewer(spec: RunSpec, most: int) -> int:
    """The largest number of nodes up to `most` that the run's parallel degrees divide; 0 for none."""
    if spec.recipe.dp_shard > 0:  # then the product is fixed, and with it the number of nodes
        return 0
    degree = spec.recipe.dp_replicate * spec.model_parallel
    return next((n for n in range(most, 0, -1) if n * spec.profile.gpus_per_node % degree == 0), 0)
