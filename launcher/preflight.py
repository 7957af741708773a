"""What can be known before a run queues: pure checks over (spec, facts), each with what, why and the fix.

docs/preflight.md has a paragraph for each name. What only the files here can tell is in launcher/readiness.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher import placement
from launcher.candidates import SHOWN, Place, fitting, gpus_of, number_of, place_of, reasons, some, usable
from launcher.cluster.facts import ClusterFacts
from launcher.cluster.parse import expand, seconds
from launcher.spec import RunSpec

OK, WARNING, ERROR = "ok", "warning", "error"
SEGMENT_SINCE = (23, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before anything was submitted. `what` is in the cluster's own words."""

    name: str
    status: str  # OK, WARNING or ERROR
    what: str
    why: str = ""
    fix: str = ""
    certain: bool = False  # of an error: it cannot work, so --force does not go past it
    not_found: bool = False  # of an error: something that was named does not exist


def preflight(
    spec: RunSpec, facts: ClusterFacts | None, missing: Sequence[str] = (), profiles: Sequence[str] = ()
) -> list[Check]:
    """Every check that applies, in the order in which a reader wants them. Pure.

    `missing`: sources of mounts that are not on this machine. `profiles`: names of the GPU profiles there are.
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
        _partition_state, _time, _most_nodes, _lists, _gpus, _node_count, _out_of_service, _arch, _gpus_per_node,
        _pyxis, _segment, _blocks,
    )  # fmt: skip
    found += [check(spec, facts, place) for check in checks]
    if profiles:
        found.append(_named(spec, place, profiles))
    return [check for check in found if check]


def time_text(limit_s: int) -> str:
    """Seconds as Slurm writes a limit."""
    days, rest = divmod(limit_s, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


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


def _gpus(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    gres, count = spec.profile.gres, spec.profile.gpus_per_node
    if not gres or not place.nodes:
        return None
    if fitting(spec, place):
        return Check("GPUs", OK, f"{gres}:{count} on {number_of(len(fitting(spec, place)))} of {place.name}")
    have = Counter(f"{gpus_of(node, gres)} of {gres}" if node.gres else "no GPUs" for node in place.nodes)
    words = sorted({node.gres for node in place.nodes if node.gres})
    text = ", ".join(f"{number} with {what}" for what, number in have.most_common(SHOWN))
    most = max(gpus_of(node, gres) for node in place.nodes)
    fix = (
        f"--gpus-per-node {most}"
        if most
        else "--gpu NAME, another --partition, or [profile] gres in a file for --config"
    )
    return Check(
        "GPUs", ERROR, f"the run asks for {gres}:{count} on a node, and no node of {place.name} has that: {text}",
        f"Slurm says {some(words)}" if words else "Slurm lists no generic resources (GRES) there", fix,
        certain=not place.grows,
    )  # fmt: skip


def _node_count(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    asked, able = spec.job.nodes, fitting(spec, place)
    if not place.nodes:
        left = "no node is left without those of --exclude" if spec.job.exclude else "it has no nodes now"
        why = "the job waits until one registers"
        return Check("nodes", WARNING, f"{place.name}: {left}", why, "another --partition: sinfo -s")
    if not able:
        return None
    there = place.most(able)
    free = place.most([node for node in able if node.free])
    if asked <= there:
        wait = "" if free >= asked else ": the job waits for others to end"
        return Check("nodes", OK, f"{asked} asked; {place.name} has {there}, {free} of them free now{wait}")
    kind = f" with {spec.profile.gres}:{spec.profile.gpus_per_node}" if len(able) < len(place.nodes) else ""
    what = f"--nodes {asked}: {place.name} has {there}{kind}"
    if len(place.nodes) and spec.job.exclude:
        what += ", without those of --exclude"
    fix = f"--nodes {there}, or another --partition"
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


def _arch(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    able = fitting(spec, place)
    found = Counter(node.arch for node in able if node.arch)
    wanted = spec.profile.arch
    if not found:
        return None
    if set(found) == {wanted}:
        return Check("architecture", OK, wanted)
    text = " and ".join(f"{number_of(count)} of {arch}" for arch, count in found.most_common())
    what = f"profile {spec.job.gpu} is for {wanted}; {place.name} has {text}"
    other = found.most_common(1)[0][0]
    if wanted in found:
        strange = [node.name for node in able if node.arch not in ("", wanted)]
        return Check(
            "architecture", WARNING, what, "on the others the image does not start",
            f"--exclude {','.join(strange)}" if len(strange) <= SHOWN else "another --partition",
        )  # fmt: skip
    if spec.job.runtime == "bare":
        return Check("architecture", WARNING, what, "", "--gpu NAME")
    return Check(
        "architecture", ERROR, what, "an image for another architecture does not start",
        f"--gpu NAME; or, where the image is for {other}: --set profile.arch={other}", certain=True,
    )  # fmt: skip


def _gpus_per_node(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    used, gres = spec.profile.gpus_per_node, spec.profile.gres
    users = spec.origin.get("profile.gpus_per_node", "").startswith("option")
    if spec.profile.device != "cuda" or not gres or users:
        return None
    more = [node for node in fitting(spec, place) if gpus_of(node, gres) > used]
    if not more:
        return None
    there = gpus_of(more[0], gres)
    return Check(
        "GPUs per node", WARNING,
        f"profile {spec.job.gpu} uses {used} GPUs of a node; {more[0].name} has {there} ({more[0].gres})",
        "the rest would idle, held by this job; it may be the wrong profile", f"--gpu NAME, or --gpus-per-node {there}",
    )  # fmt: skip


def _named(spec: RunSpec, place: Place, profiles: Sequence[str]) -> Check | None:
    """Another GPU's name in what Slurm says of the nodes. A hint only: some clouds name GB200 "B200"."""
    able = fitting(spec, place)
    if spec.profile.device != "cuda" or not able:
        return None
    words = " ".join({f"{node.gres} {' '.join(node.features)} {node.name}".lower() for node in able})
    known = {name: re.search(rf"(?<![a-z0-9]){name}(?![0-9])", words) for name in profiles if name != "cpu"}
    seen = sorted(name for name, hit in known.items() if hit)
    mine = spec.profile.gpu.lower()
    if not seen or mine in seen or any(name in mine for name in seen):
        return None
    return Check(
        "GPU type", WARNING, f"the profile is for {spec.profile.gpu}; Slurm speaks of {', '.join(seen)} on {able[0].name} "
        f"({', '.join(filter(None, (able[0].gres, *able[0].features)))})",
        "settings and published figures of one GPU do not fit another", f"--gpu {seen[0]}",
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
