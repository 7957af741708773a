"""Checks before a run queues of what its partition lets it do. Pure; part of launcher/preflight/checks.py."""

from __future__ import annotations

from collections.abc import Collection

from launcher.base.errors import quoted
from launcher.base.finding import ERROR, OK, WARNING, Check
from launcher.base.output import some
from launcher.config.spec import RunSpec
from launcher.preflight.candidates import Place, number_of
from launcher.scheduler.facts import ClusterFacts
from launcher.scheduler.parse import seconds, time_text

UNLESS_QOS = "the job would wait for ever, unless its QOS lifts the limit"


def exists(spec: RunSpec, facts: ClusterFacts) -> Check | None:
    """Whether the run names a partition that there is, or may leave it to Slurm."""
    known = [partition.name for partition in facts.partitions]
    unread = "partitions" in facts.unread
    if not known:
        return None
    unknown = [name for name in spec.job.partition.split(",") if name and name not in known]
    if unknown and unread:
        return Check(
            "partition",
            WARNING,
            f"whether Slurm has a partition {unknown[0]!r} could not be read",
            f"its nodes say {', '.join(known)}",
            "sinfo -s",
        )
    if unknown:
        return Check(
            "partition",
            ERROR,
            f"Slurm has no such partition as {unknown[0]!r}; it has {', '.join(known)}",
            "",
            quoted("--partition", known[0]),
            not_found=True,  # not certain: a hidden partition is not listed
        )
    if spec.job.partition or any(partition.default for partition in facts.partitions):
        return None
    if unread:
        return Check(
            "partition",
            WARNING,
            f"which partition is the default could not be read; there are {', '.join(known)}",
            "the job gets Slurm's own default, where there is one",
            quoted("--partition", known[0]),
        )
    return Check(
        "partition",
        ERROR,
        f"no partition was named, and none is the default; there are {', '.join(known)}",
        "",
        quoted("--partition", known[0]),
        certain=True,
    )


def state(_spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    states = {partition.state.upper() for partition in place.partitions}
    if place.guessed:
        return None
    if "UP" in states or "" in states:
        return Check("partition", OK, f"{place.name} is up")
    fix = "another --partition: sinfo -s"
    if states == {"DOWN"}:
        return Check("partition", WARNING, f"{place.name} is DOWN", "jobs queue there and none starts", fix)
    return Check("partition", ERROR, f"{place.name} is {'/'.join(sorted(states))}", "it takes no jobs", fix)


def time(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    limits = [partition.max_time_s for partition in place.partitions]
    known = [limit for limit in limits if limit is not None]
    if not limits or len(known) < len(limits):
        return None
    wanted, most = seconds(spec.job.time) or 0, max(known)
    if wanted <= most:
        return Check("time", OK, f"--time {spec.job.time}; {place.name} allows {time_text(most)}")
    return Check(
        "time",
        ERROR,
        f"--time {spec.job.time} is above the limit of {place.name}, {time_text(most)}",
        UNLESS_QOS,
        f"--time {time_text(most)}",
    )


def most_nodes(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    limits = [partition.max_nodes for partition in place.partitions]
    known = [limit for limit in limits if limit is not None]
    if not limits or len(known) < len(limits) or spec.job.nodes <= max(known):
        return None
    return Check(
        "nodes per job",
        ERROR,
        f"--nodes {spec.job.nodes}: {place.name} allows {number_of(max(known))} in a job",
        UNLESS_QOS,
        f"--nodes {max(known)}",
    )


def least_nodes(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    least = min((partition.min_nodes for partition in place.partitions), default=0)
    if spec.job.nodes >= least:
        return None
    return Check(
        "nodes per job",
        ERROR,
        f"--nodes {spec.job.nodes}: {place.name} takes jobs of {number_of(least)} and more",
        UNLESS_QOS,
        f"--nodes {least}, or another --partition: sinfo -o '%P %s'",
    )


def reservation(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    if spec.job.reservation or not place.partitions or not all(p.needs_reservation for p in place.partitions):
        return None
    return Check(
        "reservation",
        ERROR,
        f"{place.name} takes jobs of a reservation alone",
        "Slurm refuses the job",
        "--reservation NAME; scontrol show reservation",
    )


def access(place: Place, groups: Collection[str]) -> Check | None:
    """`groups`: those of the user, who is not root."""
    if place.partitions and all(partition.root_only for partition in place.partitions):
        return Check("access", ERROR, f"{place.name} is for root alone", "", "another --partition: sinfo -s")
    allowed = [partition.groups for partition in place.partitions]
    if not allowed or not all(allowed) or any(not set(groups).isdisjoint(names) for names in allowed):
        return None
    names = list(dict.fromkeys(name for several in allowed for name in several))
    return Check(
        "access",
        WARNING,
        f"{place.name} is for the groups {some(names)}; you are in {some(sorted(groups)) or 'none'}",
        "Slurm may refuse the job",
        "id; another --partition: sinfo -o '%P %g'",
    )
