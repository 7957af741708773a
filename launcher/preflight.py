"""What can be known before a run queues: pure checks over (spec, facts), each with what, why and the fix.

docs/preflight.md has a paragraph for each name. What only the files here can tell is in launcher/look_here.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from launcher import hardware_checks as hardware
from launcher import placement
from launcher.candidates import (
    Place,
    fitting,
    left_out,
    number_of,
    place_of,
    reasons,
    usable,
)
from launcher.check import ERROR, OK, WARNING, Check
from launcher.cluster.facts import ClusterFacts
from launcher.cluster.parse import expand, seconds, time_text
from launcher.output import some
from launcher.spec import RunSpec

SEGMENT_SINCE = (23, 11)
__all__ = ["ERROR", "OK", "WARNING", "Check", "preflight"]


def preflight(
    spec: RunSpec,
    facts: ClusterFacts | None,
    missing: Sequence[str] = (),
    profiles: Sequence[str] = (),
    now: datetime | None = None,
) -> list[Check]:
    """Every check that applies, in the order in which a reader wants them. Pure.

    `missing`: sources of mounts that are not on this machine. `profiles`: names of the GPU profiles there are.
    `now`: this machine's time, by which nodes that run for long are told.
    """
    found = [_preload(spec), *_mounts(missing)]
    if facts is None or not (facts.nodes or facts.partitions):
        why = "; ".join(facts.notes) if facts else ""
        found.append(
            Check("cluster", WARNING, "Slurm's nodes and partitions cannot be read now, so nothing of them was checked",
                  why, "scontrol ping; sinfo -s")
        )  # fmt: skip
        return [check for check in found if check]
    if missing_partition := _partition(spec, facts):
        return [check for check in (missing_partition, *found) if check]
    place = place_of(spec, facts)
    checks: tuple[Callable[[RunSpec, ClusterFacts, Place], Check | None], ...] = (
        _partition_state, _time, _most_nodes, _lists, hardware.gpus, _node_count, _out_of_service, hardware.architecture, hardware.gpus_per_node,
        _pyxis, _segment, _blocks,
    )  # fmt: skip
    found += [check(spec, facts, place) for check in checks]
    if profiles:
        found.append(hardware.gpu_named(spec, place, profiles))
    if now:
        found.append(hardware.up_for_long(spec, place, now))
    return [check for check in found if check]


def _preload(spec: RunSpec) -> Check | None:
    if "LD_PRELOAD" not in spec.env:
        return None
    return Check(
        "preload", WARNING, f"--env LD_PRELOAD={spec.env['LD_PRELOAD']}",
        "a library of the host's is not in the container, and every program there would complain or fail",
        "leave it out: the image brings its own NCCL",
    )  # fmt: skip


def _mounts(missing: Sequence[str]) -> list[Check]:
    return [
        Check(
            "mounts", WARNING, f"--mount {source}: not on this machine",
            "if a node does not have it either, no container starts there", f"ls -ld '{source}'",
        )
        for source in missing
    ]  # fmt: skip


def _partition(spec: RunSpec, facts: ClusterFacts) -> Check | None:
    known = [partition.name for partition in facts.partitions]
    if not known:
        return None
    unknown = [name for name in spec.job.partition.split(",") if name and name not in known]
    if unknown:
        return Check(
            "partition", ERROR, f"Slurm has no such partition as {unknown[0]!r}; it has {', '.join(known)}", "",
            f"--partition {known[0]}", not_found=True,  # not certain: a hidden partition is not listed
        )  # fmt: skip
    if not spec.job.partition and not any(partition.default for partition in facts.partitions):
        return Check(
            "partition", ERROR, f"no partition was named, and none is the default; there are {', '.join(known)}", "",
            f"--partition {known[0]}", certain=True,
        )  # fmt: skip
    return None


def _partition_state(_spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    states = {partition.state.upper() for partition in place.partitions}
    if not place.partitions or "UP" in states or "" in states:
        return Check("partition", OK, f"{place.name} is up") if place.partitions else None
    fix = "another --partition: sinfo -s"
    if states == {"DOWN"}:
        return Check("partition", WARNING, f"{place.name} is DOWN", "jobs queue there and none starts", fix)
    return Check("partition", ERROR, f"{place.name} is {'/'.join(sorted(states))}", "it takes no jobs", fix)


def _time(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    limits = [partition.max_time_s for partition in place.partitions]
    known = [limit for limit in limits if limit is not None]
    if not limits or len(known) < len(limits):
        return None
    wanted, most = seconds(spec.job.time) or 0, max(known)
    if wanted <= most:
        return Check("time", OK, f"--time {spec.job.time}; {place.name} allows {time_text(most)}")
    return Check(
        "time", ERROR, f"--time {spec.job.time} is above the limit of {place.name}, {time_text(most)}",
        "the job would wait for ever, unless its QOS lifts the limit", f"--time {time_text(most)}",
    )  # fmt: skip


def _most_nodes(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    limits = [partition.max_nodes for partition in place.partitions]
    known = [limit for limit in limits if limit is not None]
    if not limits or len(known) < len(limits) or spec.job.nodes <= max(known):
        return None
    return Check(
        "nodes per job", ERROR, f"--nodes {spec.job.nodes}: {place.name} allows {number_of(max(known))} in a job",
        "the job would wait for ever, unless its QOS lifts the limit", f"--nodes {max(known)}",
    )  # fmt: skip


def _lists(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    known = {node.name for node in facts.nodes}
    wanted = expand(spec.job.nodelist)
    for option, names in (("nodelist", wanted), ("exclude", expand(spec.job.exclude))):
        if unknown := [name for name in names if name not in known]:
            return Check(
                option, ERROR, f"--{option} {getattr(spec.job, option)}: Slurm has no node {some(unknown)}",
                f"it has {some(sorted(known))}", "sinfo -N -h -o %N", not_found=True,
            )  # fmt: skip
    if not wanted:
        return None
    if excluded := [name for name in wanted if name in expand(spec.job.exclude)]:
        return Check(
            "nodelist", ERROR, f"{some(excluded)} stands in --nodelist and in --exclude", "",
            "take it out of one of them", certain=True,
        )  # fmt: skip
    here = {node.name: node for node in place.nodes}
    if elsewhere := [name for name in wanted if name not in here]:
        return Check(
            "nodelist", ERROR, f"--nodelist: {some(elsewhere)} is not in {place.name}", "",
            "sinfo -N -o '%N %P'", certain=True,
        )  # fmt: skip
    if len(set(wanted)) > spec.job.nodes:
        return Check(
            "nodelist", ERROR, f"--nodelist names {number_of(len(set(wanted)))}, and the job has {spec.job.nodes}",
            "Slurm gives a job every node of its list", f"--nodes {len(set(wanted))}", certain=True,
        )  # fmt: skip
    if out := [here[name] for name in wanted if not usable(here[name], spec.job.reservation)]:
        return Check(
            "nodelist", WARNING, f"--nodelist: {reasons(out)}", "the job waits until they are back",
            "leave them out of --nodelist",
        )  # fmt: skip
    return Check("nodelist", OK, f"{number_of(len(wanted))} named, all of them in service")


def _node_count(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    asked, able = spec.job.nodes, fitting(spec, place)
    if not place.nodes:
        if left_out(spec) and facts.nodes_of(spec.job.partition):
            what = f"{place.name}: no node is left without {left_out(spec)}"
            return Check(
                "nodes", ERROR, what, "", "another --partition, or launcher cluster nodes release --all"
            )
        why = "the job waits until one registers"
        return Check(
            "nodes", WARNING, f"{place.name}: it has no nodes now", why, "another --partition: sinfo -s"
        )
    if not able:
        return None
    there = place.most(able)
    free = place.most([node for node in able if node.free])
    if asked <= there:
        wait = "" if free >= asked else ": the job waits for others to end"
        return Check("nodes", OK, f"{asked} asked; {place.name} has {there}, {free} of them free now{wait}")
    kind = f" with {spec.profile.gres}:{spec.profile.gpus_per_node}" if len(able) < len(place.nodes) else ""
    what = f"--nodes {asked}: {place.name} has {there}{kind}"
    if left_out(spec):
        what += f", without {left_out(spec)}"
    fix = f"--nodes {there}, or another --partition"
    if spec.avoid:
        fix += f", or launcher cluster nodes release {spec.avoid[0]}"
    if place.grows:
        return Check("nodes", WARNING, what, "the job waits until more nodes register", fix)
    return Check("nodes", ERROR, what, "the job would wait for ever", fix)


def _out_of_service(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    able = fitting(spec, place)
    out = [node for node in able if not usable(node, spec.job.reservation)]
    if not out:
        return None
    left = place.most([node for node in able if usable(node, spec.job.reservation)])
    if left >= spec.job.nodes or place.most(able) < spec.job.nodes:
        return Check("node states", OK, reasons(out))
    return Check(
        "node states", WARNING, f"{number_of(spec.job.nodes)} asked, {left} in service: {reasons(out)}",
        "the job waits until enough of them are back",
        (f"--nodes {left}" if left else "another --partition") + "; sinfo -R has the reasons",
    )  # fmt: skip


def _pyxis(spec: RunSpec, facts: ClusterFacts, _place: Place) -> Check | None:
    if spec.job.runtime != "pyxis":
        return None
    if facts.pyxis is not None:
        return Check("Pyxis", OK, f"Pyxis {facts.pyxis}".strip())
    if any("pyxis" in note.lower() or "srun" in note.lower() for note in facts.notes):
        return Check(
            "Pyxis",
            WARNING,
            "whether Slurm has Pyxis cannot be told here",
            "",
            "srun --help | grep container",
        )
    return Check(
        "Pyxis", ERROR, "srun has no --container-image: Slurm has no Pyxis here",
        "the job would end with: srun: unrecognized option '--container-image=...'",
        "--runtime apptainer (launcher image sif) where that is installed; or ask for Pyxis",
    )  # fmt: skip


def _segment(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    wanted, nodes = spec.job.segment, spec.job.nodes
    names = {node.name for node in fitting(spec, place)}
    blocks = placement.blocks_among(facts.blocks, names)
    largest = max((len(block.nodes) for block in blocks), default=0)
    if not wanted:
        return None
    if not facts.segment:
        why = (
            f"Slurm {facts.slurm[0]}.{facts.slurm[1]:02d}, topology {facts.topology or 'not known'}"
            if facts.slurm
            else ""
        )
        old = facts.slurm is not None and facts.slurm < SEGMENT_SINCE
        return Check(
            "placement", ERROR, f"--segment {wanted}: Slurm places no segments here (23.11 with topology/block does)", why,
            "--segment 0", certain=old,
        )  # fmt: skip
    if nodes % wanted:
        near = next(n for n in placement.divisors(nodes) if n <= (largest or nodes))
        return Check(
            "placement", ERROR, f"--segment {wanted} does not divide --nodes {nodes}", "Slurm refuses the job",
            f"--segment {near}", certain=True,
        )  # fmt: skip
    if largest and wanted > largest:
        return Check(
            "placement", ERROR, f"--segment {wanted}: the largest block has {number_of(largest)}",
            "Slurm would say: Requested topology configuration is not available",
            f"--segment {placement.segment(nodes, [len(block.nodes) for block in blocks])}", certain=not place.grows,
        )  # fmt: skip
    free = {node.name for node in place.nodes if node.free}
    found = placement.describe(nodes, wanted, blocks, free)
    what = (
        f"{found.pieces} x {wanted} nodes, each in one block of up to {largest}; {placement.room_text(found)}"
    )
    if found.whole or not placement.wants_segment(spec):
        return Check("placement", OK, what)
    better = " or ".join(str(count) for count in placement.whole_counts(nodes, blocks))
    return Check(
        "placement", WARNING, what,
        f"{nodes} nodes need {found.fewest} NVLink domains at least, and no larger piece divides them: traffic that could "
        "stay on NVLink crosses the network",
        f"--nodes {better}" if better else "",
    )  # fmt: skip


def _blocks(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    """Nodes that stand in no block get no jobs, however idle they are."""
    if facts.topology != "block" or not facts.blocks:
        return None
    able = fitting(spec, place)
    inside = {name for block in facts.blocks for name in block.nodes}
    lost = [node.name for node in able if node.name not in inside]
    if not lost or place.most([node for node in able if node.name in inside]) >= spec.job.nodes:
        return None
    empty = [block.name for block in facts.blocks if not block.nodes]
    return Check(
        "blocks", ERROR, f"{number_of(len(lost))} of {place.name} are in no block of the topology: {some(lost)}",
        (f"{some(empty)} has no nodes; " if empty else "")
        + "Slurm would say: Requested topology configuration is not available, while nodes are idle",
        "an administrator updates topology.yaml (or .conf) and runs scontrol reconfigure; scontrol show topology",
    )  # fmt: skip
