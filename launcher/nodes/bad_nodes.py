"""Nodes that failed their check, remembered per user and cluster, and left out of what is submitted next.

    ~/.config/titan-launcher/nodes.json   {"schema": 1, "clusters": {"NAME": [{"host", "reason", "run", "at", ...}]}}

NAME is Slurm's ClusterName. A node is left out for KEEP_S after its failure, unless it is released before.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError, quoted
from launcher.base.files import filesystem_error, locked, read_bytes, unreadable, write_json
from launcher.base.finding import Finding, ok, warning
from launcher.base.output import age, some
from launcher.base.values import parse_json
from launcher.config.spec import PlacedRun
from launcher.config.user_file import default_path
from launcher.nodes import unfit
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.again import past_attempts
from launcher.runs.attempts import moment
from launcher.runs.directory import Run
from launcher.runs.judged import writable
from launcher.scheduler import slurm
from launcher.scheduler.facts import ClusterFacts
from launcher.scheduler.parse import compress, expand
from launcher.scheduler.state import JobState

DAY_S = 86400
KEEP_S = 7 * DAY_S
LAST_S = 1e11  # the year 5138: what is later is no time
NEWEST = 50  # runs that are looked through before a submission
# It reaches sbatch's --exclude: letters, digits, dots, dashes. RFC 1123, and the underscore that Slurm takes.
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)
ELSEWHERE = "export XDG_CONFIG_HOME=DIR"


@dataclass(frozen=True)
class BadNode:
    """A node, why and for how long it is left out. Times are in seconds since 1970."""

    host: str
    reason: str
    run: str  # its directory; "" where a person added the node
    at: float
    until: float
    released: float = 0.0  # when a person released it; 0: it is left out

    def counts(self, now_s: float) -> bool:
        return not self.released and now_s < self.until


Memory = Mapping[str, tuple[BadNode, ...]]  # by ClusterName


def path() -> Path:
    return default_path().with_name("nodes.json")


def read() -> Memory:
    """What is remembered; nothing where there is no file. Raises LauncherError for one that is damaged."""
    file = path()
    try:
        tables = parse_json(read_bytes(file))
        if tables["schema"] != 1:
            raise ValueError("another schema")
        return {str(name): tuple(map(_node, entries)) for name, entries in tables["clusters"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = f"{file}: damaged, so the nodes that failed their check are not known"
        fix = f"mv {quoted(file)} {quoted(f'{file}.damaged')}   (they are then forgotten)"
        raise LauncherError("bad-nodes-damaged", what, fix) from error


def _node(entry: Mapping[str, Any]) -> BadNode:
    host, reason, run = (writable(str(entry[key])) for key in ("host", "reason", "run"))
    at, until, released = (float(time) for time in (entry["at"], entry["until"], entry.get("released", 0)))
    if not HOST.fullmatch(host) or not all(0 <= time < LAST_S for time in (at, until, released)):
        raise ValueError("not a node")
    return BadNode(host, reason, run, at, until, released)


def added(old: Sequence[BadNode], new: Sequence[BadNode], now_s: float) -> tuple[BadNode, ...]:
    """`old` with `new`: the later failure of a node counts, and none that its release came after. Old ones go."""
    kept = {node.host: node for node in old if now_s < max(node.until, node.released + KEEP_S)}
    for node in new:
        known = kept.get(node.host)
        if known is None:
            kept[node.host] = node
        elif node.at > max(known.at, known.released):
            longer = node.until if known.released else max(node.until, known.until)
            kept[node.host] = replace(node, until=longer)
    return tuple(sorted(kept.values(), key=lambda node: node.host))


def of_cluster(name: str, now_s: float) -> list[BadNode]:
    """The nodes of a cluster that are left out now."""
    return [node for node in read().get(name, ()) if node.counts(now_s)]


def change(cluster: str, how: Callable[[tuple[BadNode, ...]], Sequence[BadNode]]) -> None:
    """Replaces a cluster's nodes by what `how` makes of them, while no other launcher does the same."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_name(f".{file.name}.lock"), fcntl.LOCK_EX, 0o600):
            memory = dict(read())
            before = memory.get(cluster, ())
            memory[cluster] = tuple(how(before))
            if memory[cluster] != before:
                tables = {name: [asdict(node) for node in nodes] for name, nodes in memory.items() if nodes}
                write_json(file, {"schema": 1, "clusters": tables}, 0o600, ELSEWHERE)
    except OSError as error:
        raise filesystem_error(file, error, ELSEWHERE) from error


def remember(run: Run, state: JobState, now_s: float, cluster: str = "") -> list[BadNode]:
    """Writes down the nodes to blame that failed a run's check, whether it stopped there or went on without them;
    returns those of them that are left out now.

    `cluster`: Slurm's ClusterName here, where it is known already; for a job that did not name its own. Raises
    LauncherError where Slurm does not say it, or the file cannot be read or written.
    """
    if not (state.unfit or run.chosen or past_attempts(run.path)) or run.is_local or run.is_copy:
        return []
    at = min(moment((run.end or {}).get("ended_at")) or now_s, now_s)
    folder = writable(str(run.path))
    found = [
        BadNode(node.host, node.why, folder, at, at + KEEP_S)
        for node in unfit.of_attempts(run).values()
        if node.own and HOST.fullmatch(node.host)
    ]
    known = {(node.host, node.run) for nodes in read().values() for node in nodes}
    new = [node for node in found if node.until > now_s and (node.host, node.run) not in known]
    if new:
        # Clusters may share a home: the nodes are those of the one that the job ran on.
        change(unfit.cluster_of(run) or cluster or slurm.cluster_name(), lambda old: added(old, new, now_s))
    hosts = {node.host for node in found}
    return [node for nodes in read().values() for node in nodes if node.host in hosts and node.counts(now_s)]


def without_remembered(spec: PlacedRun, facts: ClusterFacts, now_s: float) -> tuple[PlacedRun, list[Finding]]:
    """The run that leaves out the cluster's nodes that failed their check, and what there is to say of it.

    The newest runs that ended so, and that nobody has looked at since, are remembered first.
    """
    known: Memory = {}
    found: list[Finding] = []

    def newest() -> Memory:
        for run in runs.all_runs(Path(spec.job.runs_dir))[:NEWEST]:
            if run.end is not None:
                remember(run, control.state(run), now_s, facts.name)
        return {}

    for memory in (newest, read):  # where the first fails, what was remembered before is left out all the same
        try:
            known = memory()
        except LauncherError as failed:
            found = [warning("bad-nodes-not-left-out", failed.fix, why=failed.what)]
    if facts.name:
        spec, more = without(spec, facts, [node for node in known.get(facts.name, ()) if node.counts(now_s)], now_s)
        return spec, [*found, *more]
    excluded = set(expand(spec.job.exclude))
    counting = [node.host for nodes in known.values() for node in nodes if node.counts(now_s)]
    hosts = [host for host in counting if host not in excluded]
    return spec, [*found, *(_not_left_out(hosts, "Slurm does not say its cluster's name") if hosts else [])]


def without(
    spec: PlacedRun, facts: ClusterFacts, nodes: Sequence[BadNode], now_s: float
) -> tuple[PlacedRun, list[Finding]]:
    """The run that leaves these nodes out, and what there is to say. Pure.

    Only nodes that Slurm has in the run's partition: it refuses a job that excludes one which it does not know. A node
    that the user asks for by name is not left out.
    """
    if nodes and facts.lacks("nodes"):
        return spec, _not_left_out([node.host for node in nodes], facts.unread["nodes"])
    here = facts.hidden(spec.job.partition).union(node.name for node in facts.nodes_of(spec.job.partition))
    wanted = here.difference(expand(spec.job.exclude))
    named = set(expand(spec.job.nodelist))
    asked = [node for node in nodes if node.host in wanted and node.host in named]
    out = [node for node in nodes if node.host in wanted and node.host not in named]
    findings = [ok("bad-nodes", nodes=_said(out, now_s))] if out else []
    if asked:
        names = tuple(node.host for node in asked)
        findings.append(
            warning("bad-nodes-named", "leave it out of --nodelist", names=names, nodes=_said(asked, now_s))
        )
    return replace(spec, avoid=tuple(node.host for node in out)), findings


def _not_left_out(hosts: Sequence[str], why: str) -> list[Finding]:
    fix = f"sinfo -N -h -o %N; then {quoted('--exclude', compress(hosts))}"
    return [warning("bad-nodes-not-left-out", fix, why=f"{why} ({some(hosts)})")]


def _said(nodes: Sequence[BadNode], now_s: float) -> tuple[str, ...]:
    return tuple(f"{node.host} ({node.reason}, {age(max(0, now_s - node.at))} ago)" for node in nodes)
