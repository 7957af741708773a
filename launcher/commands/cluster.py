"""The commands `launcher cluster ...`: what they take and what they print."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import click

from launcher.base.errors import quoted
from launcher.base.output import as_json, echo, print_json, warn
from launcher.commands.nodes import nodes
from launcher.config.propose import Proposal, propose
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts, Node
from launcher.scheduler.parse import compress

_partition = click.option("--partition", "-p", default="", help="Slurm partition.  [default: Slurm's own]")


@click.command()
@_partition
@as_json
def show(partition: str, as_json: bool) -> None:
    """Show this cluster, and the GPU profile that fits it.

    Prints Slurm's version and features, the nodes, their blocks, and what the choice of the profile rests on.

    \b
    launcher cluster show
    launcher cluster show --partition batch --json
    """
    facts = detect().require(partition).as_placed(partition)
    nodes = facts.nodes_of(partition)
    proposal = propose(nodes)
    if as_json:
        print_json(_as_dict(facts, nodes, proposal))
        return
    echo(*_slurm_lines(facts), *_node_lines(facts, nodes, partition), *_profile_lines(proposal))
    for why in facts.unread.values():
        warn(why)


@click.command(hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1)
def use(words: tuple[str, ...]) -> None:
    raise click.UsageError(f"cluster use is gone: {quoted('launcher', 'init', '--gpu', *words or ['PROFILE'])}")


def _slurm_lines(facts: ClusterFacts) -> list[str]:
    version = ".".join(f"{number:02d}" for number in facts.slurm) if facts.slurm else "of unknown version"
    segment = "--segment works" if facts.segment else "no --segment"
    if facts.lacks("config", "topology"):
        segment = "whether --segment works is unknown"
    accounting = {True: "on", False: "off: Slurm forgets a job minutes after its end", None: "unknown"}
    images = {True: ", images are mounted with squashfuse", False: ", images are unpacked on every node", None: ""}
    pyxis = f"yes{images[facts.squashfuse]}" if facts.pyxis else "no --container-image in srun --help"
    by_name = {node.name: node for node in facts.nodes}
    lines = [
        _row("cluster", f"{facts.name or '(name unknown)'}, Slurm {version}"),
        _row("topology", f"{facts.topology or 'unknown'}, {segment}"),
        _row("accounting", accounting[facts.accounting]),
        _row("Pyxis", "unknown" if facts.lacks("srun") else pyxis),
        *([_row("", " ".join(facts.pyxis_options))] if facts.pyxis_options else []),
    ]
    for partition in facts.partitions:
        states = Counter(by_name[name].state for name in partition.nodes if name in by_name)
        most = f", at most {partition.max_nodes} nodes a job" if partition.max_nodes else ""
        text = f"{partition.name}{'*' if partition.default else ''} {partition.state.lower()}"
        counts = ", ".join(f"{number} {state}" for state, number in states.most_common())
        text += f", {_hours(partition.max_time_s)}{most}: {states.total()} nodes" + (f" ({counts})" if counts else "")
        lines.append(_row("partition", text))
    return lines


def _node_lines(facts: ClusterFacts, nodes: tuple[Node, ...], partition: str) -> list[str]:
    default = facts.partition()
    lines = ["", f"Nodes of {partition or (default.name if default else 'all partitions')}"]
    sorts: dict[str, list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        has = f"{node.gpus} GPUs{f' ({node.gpu_type})' if node.gpu_type else ''}" if node.gpus else "no GPUs"
        text = f"{has}, {node.arch or 'architecture unknown'}, {node.cpus} CPUs, {node.memory_mib / 1024:.0f} GiB"
        text += f", features {','.join(node.features)}" if node.features else ""
        sorts.setdefault(text, []).append(node.name)
        if node.reason or not ({"IDLE", "ALLOCATED", "MIXED"} & node.states):
            reasons.setdefault((node.state, node.reason or "no reason given"), []).append(node.name)
    lines += [_row("", f"{len(names)} x {text}: {compress(names)}") for text, names in sorts.items()]
    lines += [_row(state, f"{compress(names)}: {reason}") for (state, reason), names in reasons.items()]
    free = {node.name for node in nodes if node.free}
    for block in facts.blocks:
        if not block.nodes or {node.name for node in nodes}.intersection(block.nodes):
            idle = len(free & set(block.nodes))
            lines.append(_row("block", f"{block.name}: {len(block.nodes)} nodes, {idle} idle"))
    return lines


def _profile_lines(proposal: Proposal) -> list[str]:
    lines = ["", f"Profile: {proposal.profile or 'none fits for sure'}"]
    lines += [
        _row("for" if e.names else "fits", f"{e.what}: {', '.join(e.profiles) or 'no profile'}")
        for e in proposal.evidence
    ]
    lines += [_row("against", text) for text in proposal.contradictions]
    choice = proposal.profile or "|".join(proposal.candidates) or "PROFILE"
    return [*lines, f"Save it: launcher init --gpu {choice}"]


def _as_dict(facts: ClusterFacts, nodes: tuple[Node, ...], proposal: Proposal) -> dict[str, Any]:
    """The facts as JSON takes them; `nodes` in place of all, each with its state in one word."""
    free = {node.name for node in facts.nodes if node.free}
    block_of = {name: block.name for block in facts.blocks for name in block.nodes}
    return vars(facts) | {
        "segment": facts.segment,
        "pyxis": "" if facts.pyxis else None,  # where it is, its version is not known
        "notes": list(facts.unread.values()),
        "unread": list(facts.unread),
        "partitions": [vars(p) | {"guessed": False} for p in facts.partitions],
        "nodes": [
            vars(n) | {"states": sorted(n.states), "state": n.state, "free": n.free, "block": block_of.get(n.name, "")}
            for n in nodes
        ],
        "blocks": [vars(b) | {"idle": len(free & set(b.nodes))} for b in facts.blocks],
        "topologies": {name: asdict(topology) for name, topology in facts.topologies.items()},
        "proposal": asdict(proposal),
    }


def _hours(seconds: int | None) -> str:
    if seconds is None:
        return "no time limit"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds / 3600:.4g} h"


def _row(title: str, text: str) -> str:
    return f"  {title:<14} {text}".rstrip()


@click.group()
def cluster() -> None:
    """Show this Slurm cluster, and the nodes that are left out.

    \b
    launcher cluster show                       Slurm, nodes, blocks, and the profile with its evidence
    launcher cluster nodes                      which nodes are left out, and why
    """


for _command in (show, use, nodes):
    cluster.add_command(_command)
