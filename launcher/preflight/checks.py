"""What can be known before a run queues: pure checks over (spec, facts), each with what, why and the fix.

docs/preflight.md has a paragraph for each name. What only the files here can tell is in
launcher/preflight/local_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from launcher.base.errors import quoted
from launcher.base.finding import ERROR, OK, WARNING, Check
from launcher.base.output import some
from launcher.config.spec import RunSpec
from launcher.preflight import hardware_checks as hardware
from launcher.preflight import partition_checks as partition
from launcher.preflight import placement_checks as placement
from launcher.preflight.candidates import (
    OUT,
    Place,
    fitting,
    left_out,
    number_of,
    place_of,
    reasons,
    usable,
)
from launcher.scheduler.facts import ClusterFacts
from launcher.scheduler.parse import compress, expand


def preflight(
    spec: RunSpec,
    facts: ClusterFacts | None,
    missing: Sequence[str] = (),
    profiles: Sequence[str] = (),
    now: datetime | None = None,
    groups: Collection[str] | None = None,
    unpacked_bytes: int = 0,
) -> list[Check]:
    """Every check that applies, in the order in which a reader wants them. Pure.

    `missing`: sources of mounts that are not on this machine. `profiles`: names of the GPU profiles there are.
    `now`: this machine's time, by which nodes that run for long are told. `groups`: the user's; None for root, and
    where they are not known. `unpacked_bytes`: of the image; 0 where it is not known.
    """
    found = [_preload(spec), *_mounts(spec, missing)]
    if facts is None or not (facts.nodes or facts.partitions):
        why = "; ".join(facts.notes) if facts else ""
        found.append(
            Check(
                "cluster",
                WARNING,
                "Slurm's nodes and partitions cannot be read now, so nothing of them was checked",
                why,
                "scontrol ping; sinfo -s",
            )
        )
        return [check for check in found if check]
    of_partition = partition.exists(spec, facts)
    if of_partition and of_partition.status == ERROR:
        return [check for check in (of_partition, *found) if check]
    found += [of_partition, *_half_answers(facts)]
    place = place_of(spec, facts)
    checks: tuple[Callable[[RunSpec, ClusterFacts, Place], Check | None], ...] = (
        partition.state,
        partition.time,
        partition.most_nodes,
        partition.least_nodes,
        partition.reservation,
        _lists,
        hardware.gpus,
        _node_count,
        _out_of_service,
        hardware.architecture,
        hardware.gpus_per_node,
        _pyxis,
        placement.segment,
        placement.racks,
        placement.blocks,
    )
    found += [check(spec, facts, place) for check in checks]
    if profiles:
        found.append(hardware.gpu_named(spec, place, profiles))
    if groups is not None:
        found.append(partition.access(place, groups))
    if unpacked_bytes:
        found.append(hardware.room_to_unpack(spec, facts, place, unpacked_bytes))
    if now:
        found.append(hardware.up_for_long(spec, place, now))
    return [check for check in found if check]


def _preload(spec: RunSpec) -> Check | None:
    if "LD_PRELOAD" not in spec.env:
        return None
    return Check(
        "preload",
        WARNING,
        f"--env LD_PRELOAD={spec.env['LD_PRELOAD']}",
        "a library of the host's is not in the container, and every program there would complain or fail",
        "leave it out: the image brings its own NCCL",
    )


def _mounts(spec: RunSpec, missing: Sequence[str]) -> list[Check]:
    of_profile = {mount.split(":")[0] for mount in spec.profile.mounts}
    own = {mount.split(":")[0] for mount in spec.job.mounts}
    return [
        Check(
            "mounts",
            OK,
            f"{source}, which profile {spec.job.gpu} mounts: not on this machine",
            "compute nodes have it as a rule, login nodes need not; on a node that does not, no container starts",
            f"srun -N1 ls -ld {quoted(source)}; without it: --set 'profile.mounts=[]'",
        )
        if source in of_profile - own
        else Check(
            "mounts",
            WARNING,
            f"--mount {source}: not on this machine",
            "if a node does not have it either, no container starts there",
            f"ls -ld {quoted(source)}",
        )
        for source in missing
    ]


def _half_answers(facts: ClusterFacts) -> list[Check]:
    """What Slurm did not say: a check that needs it says less than it could."""
    return [Check("cluster", WARNING, note, "", "scontrol ping; launcher cluster show") for note in facts.notes]


def _lists(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    known = {node.name for node in facts.nodes} | {name for p in facts.partitions for name in p.nodes}
    wanted = expand(spec.job.nodelist)
    for option, names in (("nodelist", wanted), ("exclude", expand(spec.job.exclude))):
        if unknown := [name for name in names if name not in known]:
            what = f"--{option} {getattr(spec.job, option)}: Slurm has no node {some(unknown)}"
            why, fix = f"it has {some(sorted(known))}", "sinfo -N -h -o %N"
            if "nodes" in facts.unread:
                what = (
                    f"--{option} {getattr(spec.job, option)}: {some(unknown)} is not among the nodes that could be read"
                )
                return Check(option, WARNING, what, why, fix)
            return Check(option, ERROR, what, why, fix, not_found=True)
    if not wanted:
        return None
    if excluded := [name for name in wanted if name in expand(spec.job.exclude)]:
        return Check(
            "nodelist",
            ERROR,
            f"{some(excluded)} stands in --nodelist and in --exclude",
            "",
            "take it out of one of them",
            certain=True,
        )
    here = {node.name: node for node in place.nodes}
    if elsewhere := [name for name in wanted if name not in here and name not in place.unread]:
        return Check(
            "nodelist",
            ERROR if place.partitions else WARNING,
            f"--nodelist: {some(elsewhere)} is not in {place.name}",
            "",
            "sinfo -N -o '%N %P'",
            certain=not place.guessed,
        )
    if len(set(wanted)) > spec.job.nodes:
        return Check(
            "nodelist",
            ERROR,
            f"--nodelist names {number_of(len(set(wanted)))}, and the job has {spec.job.nodes}",
            "Slurm gives a job every node of its list",
            f"--nodes {len(set(wanted))}",
            certain=True,
        )
    if unread := [name for name in wanted if name not in here]:
        return Check(
            "nodelist",
            WARNING,
            f"--nodelist: whether {some(unread)} is in service could not be read",
            "",
            quoted("scontrol", "show", "node", compress(unread)),
        )
    if out := [here[name] for name in wanted if not usable(here[name], spec.job.reservation)]:
        return Check(
            "nodelist",
            WARNING,
            f"--nodelist: {reasons(out)}",
            "the job waits until they are back",
            "leave them out of --nodelist",
        )
    return Check("nodelist", OK, f"{number_of(len(wanted))} named, all of them in service")


def _node_count(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check | None:
    asked, able = spec.job.nodes, fitting(spec, place)
    if not place.nodes:
        return _no_nodes(spec, facts, place)
    if not able:
        return None
    there = place.most(able)
    in_service = place.most([node for node in able if usable(node, spec.job.reservation)])
    free = place.most([node for node in able if node.free])
    if asked <= in_service:
        wait = "" if free >= asked else ": the job waits for others to end"
        what = f"{asked} asked; {place.name} has {in_service} in service, {free} of them free now{wait}"
        return Check("nodes", OK, what)
    if asked <= there:  # _out_of_service warns of it
        return Check("nodes", OK, f"{asked} asked; {place.name} has {there}, {in_service} of them in service")
    kind = f" with {spec.profile.gres}:{spec.profile.gpus_per_node}" if len(able) < len(place.nodes) else ""
    what = f"--nodes {asked}: {place.name} has {there}{kind}"
    if left_out(spec):
        what += f", without {left_out(spec)}"
    fix = f"--nodes {there}, or another --partition"
    if spec.avoid:
        fix += f", or launcher cluster nodes release {quoted(spec.avoid[0])}"
    if not place.whole:
        why = "not all of Slurm's nodes could be read, so there may be more"
        return Check("nodes", WARNING, what, why, f"{fix}; sinfo -s")
    if place.grows:
        return Check("nodes", WARNING, what, "the job waits until more nodes register", fix)
    return Check("nodes", ERROR, what, "the job would wait for ever", fix)


def _no_nodes(spec: RunSpec, facts: ClusterFacts, place: Place) -> Check:
    fix = "another --partition: sinfo -s"
    if not place.whole:
        return Check("nodes", WARNING, f"{place.name}: none of its nodes could be read", "", fix)
    if left_out(spec) and facts.nodes_of(spec.job.partition):
        what = f"{place.name}: no node is left without {left_out(spec)}"
        return Check("nodes", ERROR, what, "", "another --partition, or launcher cluster nodes release --all")
    return Check("nodes", WARNING, f"{place.name}: it has no nodes now", "the job waits until one registers", fix)


def _out_of_service(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    able = fitting(spec, place)
    out = [node for node in able if not usable(node, spec.job.reservation)]
    if not out:
        return None
    left = place.most([node for node in able if usable(node, spec.job.reservation)])
    if left >= spec.job.nodes or place.most(able) < spec.job.nodes:
        return Check("node states", OK, reasons(out))
    fixes = [f"--nodes {left}" if left else "another --partition"]
    fixes += ["sinfo -R has the reasons"] if any(node.states & OUT for node in out) else []
    fixes += ["scontrol show reservation says until when"] if not all(node.states & OUT for node in out) else []
    return Check(
        "node states",
        WARNING,
        f"{number_of(spec.job.nodes)} asked, {left} in service: {reasons(out)}",
        "the job waits until enough of them are back",
        "; ".join(fixes),
    )


def _pyxis(spec: RunSpec, facts: ClusterFacts, _place: Place) -> Check | None:
    if spec.job.runtime != "pyxis":
        return None
    if facts.pyxis is not None:
        return Check("Pyxis", OK, f"Pyxis {facts.pyxis}".strip())
    if "srun" in facts.unread:
        return Check(
            "Pyxis",
            WARNING,
            "whether Slurm has Pyxis cannot be told here",
            "",
            "srun --help | grep container",
        )
    return Check(
        "Pyxis",
        ERROR,
        "srun has no --container-image: Slurm has no Pyxis here",
        "the job would end with: srun: unrecognized option '--container-image=...'",
        "--runtime apptainer (launcher image sif) where that is installed; or ask for Pyxis",
    )
