"""The edge of launcher/preflight/checks.py: asks Slurm. What the files here can tell is in
launcher/preflight/local_files.py.
"""

from __future__ import annotations

import grp
import os
import re
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.base.files import read_bytes
from launcher.base.finding import WARNING, Check
from launcher.config.layers import merge, names_of, read_layer
from launcher.config.spec import RunSpec
from launcher.image.squashfs_file import known, superblock
from launcher.nodes import bad_nodes
from launcher.preflight import placement
from launcher.preflight.candidates import candidates, fitting, place_of, usable
from launcher.preflight.checks import preflight
from launcher.preflight.waiting import explain
from launcher.runs.directory import Run
from launcher.scheduler import slurm
from launcher.scheduler.detect import QUESTIONS, detect, detected
from launcher.scheduler.facts import ClusterFacts
from launcher.scheduler.parse import expand
from launcher.scheduler.state import JobState


def look(spec: RunSpec, facts: ClusterFacts | None = None) -> tuple[RunSpec, list[Check]]:
    """The run with its placement, and every check. Asks Slurm, unless `facts` has its answers already."""
    if spec.job.scheduler != "slurm" or not slurm.bin_dir():
        return spec, []  # without sbatch, the submission itself says so
    facts = facts or facts_now()
    spec, of_memory = _without_bad_nodes(spec, facts)
    spec = placed(spec, facts)
    found = preflight(
        spec, facts, _missing(spec), names_of("profiles"), datetime.now(), _groups(), _unpacked_bytes(spec)
    )
    return spec, [*found, *of_memory]


def facts_now() -> ClusterFacts:
    """Slurm's answers, asked for once. No error when it is silent: the facts then say so."""
    try:
        return detected()
    except LauncherError as error:
        return ClusterFacts(notes=(error.what, *error.original.splitlines()[:1]), unread=tuple(QUESTIONS))


def _missing(spec: RunSpec) -> list[str]:
    """Sources of mounts that this machine does not have."""
    mounts = () if spec.job.runtime == "bare" else (*spec.job.mounts, *spec.profile.mounts)
    return [source for source in dict.fromkeys(m.split(":")[0] for m in mounts) if not os.path.exists(source)]


def _groups() -> set[str] | None:
    """Names of the user's groups; None for root, who may use every partition."""
    if os.geteuid() == 0:
        return None
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        with suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return names


def _unpacked_bytes(spec: RunSpec) -> int:
    """How large the image is unpacked, by the file beside it; 0 where that does not say it."""
    path = Path(spec.job.image)
    if spec.job.runtime != "pyxis" or not path.is_file():
        return 0
    with suppress(LauncherError, OSError):
        facts = known(path, superblock(path))
        return facts.unpacked_bytes if facts else 0
    return 0


def _without_bad_nodes(spec: RunSpec, facts: ClusterFacts) -> tuple[RunSpec, list[Check]]:
    """The run without the nodes that failed their check lately, those of runs included that nobody has looked at."""
    now_s = time.time()
    checks = []
    try:
        bad_nodes.remember_all(Path(spec.job.runs_dir), now_s, facts.name)
    except LauncherError as error:
        what = f"nodes that failed their check are not remembered: {error.what}"
        checks = [Check("excluded", WARNING, what, "", error.fix)]
    try:
        nodes, of_names = bad_nodes.of_cluster_or_only(facts.name, now_s)
    except LauncherError as error:
        what = f"nodes that failed their check are not left out: {error.what}"
        return spec, [*checks, Check("excluded", WARNING, what, "", error.fix)]
    spec, more = bad_nodes.without(spec, facts, nodes, now_s)
    return spec, [*checks, *of_names, *more]


def placed(spec: RunSpec, facts: ClusterFacts) -> RunSpec:
    """The run with the segment that its partition's blocks allow."""
    place = place_of(spec, facts)
    out = {node.name for node in fitting(spec, place) if not usable(node, spec.job.reservation)}
    return placement.with_segment(spec, facts, candidates(spec, place), out)


def why_waiting(run: Run, state: JobState) -> list[str]:
    """Why Slurm has not started the run's job yet, and what would start sooner. Never raises: it is a help only."""
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
        script = read_bytes(run.path / "job.sbatch").decode("utf-8", "replace")
    except OSError:
        return spec
    said = re.search(r"^#SBATCH --exclude=(\S+)$", script, re.MULTILINE)
    return replace(spec, avoid=expand(said[1])) if said else spec
