"""The edge of launcher/preflight.py: asks Slurm. What the files here can tell is in launcher/look_here.py."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import placement
from launcher.candidates import fitting, place_of, usable
from launcher.check import WARNING, Check
from launcher.cluster import slurm
from launcher.cluster.detect import detect, detected
from launcher.cluster.facts import ClusterFacts
from launcher.cluster.parse import expand
from launcher.errors import LauncherError
from launcher.layers import merge, names_of, read_layer
from launcher.preflight import preflight
from launcher.spec import RunSpec

if TYPE_CHECKING:
    from launcher.cluster.state import JobState
    from launcher.runs import Run


def look(spec: RunSpec, facts: ClusterFacts | None = None) -> tuple[RunSpec, list[Check]]:
    """The run with its placement, and every check. Asks Slurm, unless `facts` has its answers already."""
    if spec.job.scheduler != "slurm" or not slurm.bin_dir():
        return spec, []  # without sbatch, the submission itself says so
    facts = facts or facts_now()
    spec, of_memory = _without_bad_nodes(spec, facts)
    spec = placed(spec, facts)
    missing = [source for mount in spec.job.mounts if not os.path.exists(source := mount.split(":")[0])]
    return spec, [*preflight(spec, facts, missing, names_of("profiles"), datetime.now()), *of_memory]


def facts_now() -> ClusterFacts:
    """Slurm's answers, asked for once. No error when it is silent: the facts then say so."""
    try:
        return detected()
    except LauncherError as error:
        return ClusterFacts(notes=(error.what, *error.original.splitlines()[:1]))


def _without_bad_nodes(spec: RunSpec, facts: ClusterFacts) -> tuple[RunSpec, list[Check]]:
    """The run without the nodes that failed their check lately, those of runs included that nobody has looked at."""
    from launcher import bad_nodes

    now_s = time.time()
    if not (facts.nodes and facts.name):  # a silent Slurm: whether it still has these nodes cannot be told
        return spec, []
    checks = []
    try:
        bad_nodes.remember_all(Path(spec.job.runs_dir), now_s, facts.name)
    except LauncherError as error:
        what = f"nodes that failed their check are not remembered: {error.what}"
        checks = [Check("excluded", WARNING, what, "", error.fix)]
    try:
        nodes = bad_nodes.of_cluster(facts.name, now_s)
    except LauncherError as error:
        what = f"nodes that failed their check are not left out: {error.what}"
        return spec, [Check("excluded", WARNING, what, "", error.fix)]
    spec, more = bad_nodes.without(spec, facts, nodes, now_s)
    return spec, [*checks, *more]


def placed(spec: RunSpec, facts: ClusterFacts) -> RunSpec:
    """The run with the segment that its partition's blocks allow."""
    able = fitting(spec, place_of(spec, facts))
    out = {node.name for node in able if not usable(node, spec.job.reservation)}
    return placement.with_segment(spec, facts, {node.name for node in able}, out)


def why_waiting(run: Run, state: JobState) -> list[str]:
    """Why Slurm has not started the run's job yet, and what would start sooner. Never raises: it is a help only."""
    from launcher.waiting import explain

    job_id = str((run.job or {}).get("job_id", ""))
    start, spec, facts = "", None, None
    with suppress(LauncherError):
        spec = _as_submitted(run)
    with suppress(LauncherError):
        start = slurm.ask(("squeue", "--noheader", "--start", f"--jobs={job_id}", "--format=%S")).strip()
    with suppress(LauncherError):
        facts = detect()
    return explain(state.reason, spec, facts, start, datetime.now())


def _as_submitted(run: Run) -> RunSpec:
    """The run's spec, with every node that its job leaves out: run.toml has those that the user named."""
    spec = merge([read_layer(run.path / "run.toml", "run.toml")])
    try:
        script = (run.path / "job.sbatch").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return spec
    said = re.search(r"^#SBATCH --exclude=(\S+)$", script, re.MULTILINE)
    return replace(spec, avoid=expand(said[1])) if said else spec
