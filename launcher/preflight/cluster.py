"""What Slurm lets a run do, and what its nodes are, known before it queues. `look` asks Slurm; the checks are pure.

docs/preflight.md has a paragraph for each; launcher/preflight/text.py has the words.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from launcher.base.errors import LauncherError, quoted
from launcher.base.finding import ERROR, Fact, Finding, error, impossible, ok, warning
from launcher.base.output import SHOWN
from launcher.config.hardware import of_gpu
from launcher.config.propose import named
from launcher.config.spec import PlacedRun
from launcher.image.squashfs_file import known, superblock
from launcher.nodes import bad_nodes
from launcher.preflight import placement
from launcher.preflight.placement import Place, gpus_of, place_of, wants_segment
from launcher.scheduler import slurm
from launcher.scheduler.detect import detected
from launcher.scheduler.facts import NO_SLURM, ClusterFacts, Node
from launcher.scheduler.parse import compress, expand, seconds, time_text

Check = Callable[[Place], Finding | None]
ANOTHER = "another --partition: sinfo -s"


def look(spec: PlacedRun) -> tuple[PlacedRun, list[Finding]]:
    """The run with its placement, and all that is found. Asks Slurm once in the life of this process."""
    if spec.job.scheduler != "slurm":
        return spec, []
    if not slurm.bin_dir():
        lack = slurm.missing("sbatch")
        return spec, [Finding("slurm-missing", ERROR, {"said": lack.what}, lack.fix, certain=True, error=lack)]
    facts = detected()
    spec, of_memory = bad_nodes.without_remembered(spec, facts, time.time())
    spec = placement.with_segment(placement.with_gpu_memory(spec, facts), facts)
    return spec, [*preflight(spec, facts, datetime.now(), _unpacked_bytes(spec)), *of_memory]


def _unpacked_bytes(spec: PlacedRun) -> int:
    """How large the image is unpacked, by the file beside it; 0 where that does not say it."""
    path = Path(spec.job.image)
    with suppress(LauncherError, OSError):
        if spec.job.runtime == "pyxis" and (image := known(path, superblock(path))):
            return image.unpacked_bytes
    return 0


def preflight(
    spec: PlacedRun, facts: ClusterFacts, now: datetime | None = None, unpacked_bytes: int = 0
) -> list[Finding]:
    """Every check that applies, in the order in which a reader wants them. Pure.

    What Slurm did not answer is one warning, and the checks that need it are skipped.
    """
    if not (facts.nodes or facts.partitions):
        said, fix = next(iter(facts.unread.values()), ""), "scontrol ping; sinfo -s"
        return [warning("cluster-silent", NO_SLURM if facts.absent else fix, said=facts.absent or said)]
    place = place_of(spec, facts, now, unpacked_bytes)
    facts = place.facts
    if not facts.lacks("partitions") and (named := partition_named(place)):
        return [named]
    found: list[Finding | None] = []
    for name, why in facts.unread.items():
        if name != "topology" or wants_segment(spec):
            skipped = tuple(title for title, needed, _ in CHECKS if name in needed)
            found.append(warning("cluster-unread", "scontrol ping; launcher cluster show", said=why, skipped=skipped))
    found += [check(place) for _, needed, checks in CHECKS if not facts.lacks(*needed) for check in checks]
    return [finding for finding in found if finding]


# --- the partition ------------------------------------------------------------------------------------------


def partition_named(place: Place) -> Finding | None:
    """The run must name a partition that there is, or may leave it to Slurm."""
    known = tuple(partition.name for partition in place.facts.partitions)
    unknown = [name for name in place.spec.job.partition.split(",") if name and name not in known]
    fix = quoted("--partition", *known[:1])
    if unknown:  # not certain: a hidden partition is not listed
        return error("partition-unknown", fix, partition=unknown[0], known=", ".join(known))
    if not place.spec.job.partition and not any(partition.default for partition in place.facts.partitions):
        return impossible("partition-not-named", fix, known=", ".join(known))
    return None


def partition_state(place: Place) -> Finding:
    states = {partition.state for partition in place.partitions}
    if "UP" in states or "" in states:
        return ok("partition", place=place.name)
    refuse = warning if states == {"DOWN"} else error  # jobs do queue where it is DOWN
    return refuse("partition-closed", ANOTHER, place=place.name, state="/".join(sorted(states)))


def _most_allowed(limits: Sequence[int | None]) -> int | None:
    """The highest limit of the partitions; None where one of them has none."""
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def time_limit(place: Place) -> Finding | None:
    most = _most_allowed([partition.max_time_s for partition in place.partitions])
    if most is None:
        return None
    facts: dict[str, Fact] = {"time": place.spec.job.time, "place": place.name, "limit": time_text(most)}
    if (seconds(place.spec.job.time) or 0) <= most:
        return ok("time", **facts)
    return error("time-limit", f"--time {time_text(most)}", **facts)


def nodes_per_job(place: Place) -> Finding | None:
    asked, most = place.spec.allocated, _most_allowed([partition.max_nodes for partition in place.partitions])
    least = min((partition.min_nodes for partition in place.partitions), default=0)
    if most is not None and asked > most:
        return error("job-too-large", f"--nodes {most}", asked=asked, place=place.name, limit=most)
    if asked < least:
        fix = f"--nodes {least}, or another --partition: sinfo -o '%P %s'"
        return error("job-too-small", fix, asked=asked, place=place.name, limit=least)
    return None


# --- its nodes ----------------------------------------------------------------------------------------------


def nodes_listed(place: Place) -> Finding | None:
    """What --nodelist and --exclude name."""
    job = place.spec.job
    known = {node.name for node in place.facts.nodes}.union(*(partition.nodes for partition in place.facts.partitions))
    wanted, excluded = expand(job.nodelist), expand(job.exclude)
    for option, given, names in (("nodelist", job.nodelist, wanted), ("exclude", job.exclude, excluded)):
        if unknown := tuple(name for name in names if name not in known):
            facts: dict[str, Fact] = {"option": option, "given": given, "known": tuple(sorted(known))}
            return error("node-unknown", "sinfo -N -h -o %N", unknown=unknown, **facts)
    count = len(set(wanted))
    if count > (asked := place.spec.allocated):
        return impossible("nodelist-too-long", f"--nodes {count - job.spares}", count=count, asked=asked)
    if out := [node for node in place.out if node.name in wanted]:
        return warning("nodelist-out", "leave them out of --nodelist", nodes=in_words(out))
    return None


def gpus(place: Place) -> Finding | None:
    profile = place.spec.profile
    if not profile.gres or not place.nodes:
        return None
    wanted = f"{profile.gres}:{profile.gpus_per_node}"
    if place.fitting:
        return ok("gpus", gres=wanted, count=len(place.fitting), place=place.name)
    have = Counter(
        f"{gpus_of(node, profile.gres)} of {profile.gres}" if node.gres else "no GPUs" for node in place.nodes
    )
    text = ", ".join(f"{number} with {what}" for what, number in have.most_common(SHOWN))
    said = tuple(sorted({node.gres for node in place.nodes if node.gres})) or ("no generic resources (GRES)",)
    most = max(gpus_of(node, profile.gres) for node in place.nodes)
    other = "--gpu NAME, another --partition, or [profile] gres in a file for --config"
    fix = f"--gpus-per-node {most}" if most else other
    refuse = error if place.grows else impossible
    return refuse("gpus-absent", fix, gres=wanted, place=place.name, have=text, said=said)


def node_count(place: Place) -> Finding | None:
    asked, left_out = place.spec.allocated, _left_out(place.spec)
    if place.nodes and not place.fitting:
        return None  # `gpus` says why
    there, in_service, free = (place.most(nodes) for nodes in (place.fitting, place.in_service, place.free))
    facts: dict[str, Fact] = {"asked": asked, "place": place.name, "there": there}
    if asked <= there:  # `out_of_service` warns where they are not in service
        busy = "nodes-busy" if free < asked <= in_service else "nodes"
        return ok(busy, in_service=in_service, free=free, **facts)
    nodes = place.spec.job.nodes
    smaller = f"--spares {there - nodes}" if there >= nodes else f"--nodes {there}"
    fix = f"{smaller}, or another --partition" if there else ANOTHER
    if place.spec.avoid:
        fix += f", or launcher cluster nodes release {quoted(place.spec.avoid[0])}"
    gres = place.spec.profile.gres if len(place.fitting) < len(place.nodes) else ""
    facts |= {"gres": gres and f"{gres}:{place.spec.profile.gpus_per_node}", "left_out": left_out}
    may_come = place.grows or not place.facts.nodes_of(place.spec.job.partition)
    return warning("nodes-not-yet", fix, **facts) if may_come else error("nodes-too-few", fix, **facts)


def _left_out(spec: PlacedRun) -> str:
    """What says which nodes the run may not have; "" where it may have all."""
    by_hand = ["those of --exclude"] if spec.job.exclude else []
    by_hand += [f"those that lack --constraint {spec.job.constraint}"] if spec.job.constraint else []
    return " and ".join(by_hand + ["those that failed their check (launcher cluster nodes)"] * bool(spec.avoid))


def out_of_service(place: Place) -> Finding | None:
    out, asked = place.out, place.spec.allocated
    if not out:
        return None
    left = place.most(place.in_service)
    if left >= asked or place.most(place.fitting) < asked:
        return ok("node-states", nodes=in_words(out))
    fix = f"--nodes {left}" if left else "another --partition"
    fix += "; sinfo -R and scontrol show reservation have the reasons"
    return warning("nodes-out-of-service", fix, asked=asked, left=left, nodes=in_words(out))


def in_words(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Which nodes are in which state, with what the administrator wrote."""
    return tuple(f"{node.name} is {node.state}" + (f" ({node.reason})" if node.reason else "") for node in nodes)


def architecture(place: Place) -> Finding | None:
    """An image for another architecture does not start: the job fails after queueing, with "Exec format error"."""
    found = Counter(node.arch for node in place.fitting if node.arch)
    spec, wanted = place.spec, place.spec.profile.arch
    if not found:
        return None
    if set(found) == {wanted}:
        return ok("architecture", arch=wanted)
    seen = tuple(f"{count} of {arch}" for arch, count in found.most_common())
    facts: dict[str, Fact] = {"profile": spec.job.gpu, "arch": wanted, "place": place.name}
    if wanted in found or spec.job.runtime == "bare":
        return warning("architecture-other", "--gpu NAME, or --exclude the others", seen=seen, **facts)
    other = found.most_common(1)[0][0]
    fix = f"--gpu NAME; or, where the image is for {other}: --set profile.arch={other}"
    refuse = error if place.grows else impossible
    return refuse("architecture-other", fix, seen=seen, **facts)


def gpus_per_node(place: Place) -> Finding | None:
    spec, used, gres = place.spec, place.spec.profile.gpus_per_node, place.spec.profile.gres
    users = spec.origin.get("profile.gpus_per_node", "").startswith("option")
    more = [node for node in place.fitting if gpus_of(node, gres) > used]
    if spec.profile.device != "cuda" or not gres or users or not more:
        return None
    there = gpus_of(more[0], gres)
    fix = f"--gpu NAME, or --gpus-per-node {there}"
    return warning("gpus-idle", fix, profile=spec.job.gpu, used=used, node=more[0].name, there=there, gres=more[0].gres)


def gpu_type(place: Place) -> Finding | None:
    """Another GPU's name in what Slurm says of the nodes. A hint only: some clouds name GB200 "B200"."""
    able, profile = place.fitting, place.spec.profile
    if profile.device != "cuda" or not able:
        return None
    seen = named([f"{node.gres} {' '.join(node.features)} {node.name}" for node in able])
    if not seen or any(name in profile.gpu.lower() for name in seen):
        return None
    said = tuple(filter(None, (able[0].gres, *able[0].features)))
    return warning("gpu-type", f"--gpu {seen[0]}", gpu=profile.gpu, seen=seen, node=able[0].name, said=said)


def gpu_memory(place: Place) -> Finding | None:
    """GPUs of one type come with different memory; plan, and the check of the memory, go by the smaller one."""
    spec, known = place.spec, of_gpu(place.spec.profile.gpu)
    if not (spec.gpu_gib and known):
        return None
    said = tuple(sorted({text for node in place.fitting for text in (node.gres, *node.features) if text}))
    fix = "launcher plan says what fits; --constraint and --exclude choose nodes"
    return warning(
        "gpu-memory", fix, gpu=known.gpu, gib=f"{known.memory_gib:g}", named=f"{spec.gpu_gib:.1f}", said=said
    )


def disk(place: Place) -> Finding | None:
    """Without squashfuse, every node unpacks the image onto its own disk first."""
    needed = 0 if place.facts.squashfuse else place.unpacked_bytes
    small = [node for node in place.fitting if 0 < node.tmp_mib << 20 < needed]
    if not small:
        return None
    fix = f"srun -N1 -w {quoted(small[0].name)} df -h; launcher cluster show says whether images are mounted"
    gib, names = f"{needed / 2**30:.1f}", tuple(node.name for node in small)
    return warning("disk-small", fix, gib=gib, tmp_mib=min(node.tmp_mib for node in small), nodes=names)


def uptime(place: Place) -> Finding | None:
    """B200's NVLink firmware fails at 60 days of uptime, which is known and goes with a reboot."""
    known = of_gpu(place.spec.profile.gpu)
    if known is None or not known.max_uptime_days or place.now is None:
        return None
    booted = {node.name: datetime.fromisoformat(node.booted) for node in place.fitting if node.booted}
    days = {name: (place.now - at).days for name, at in booted.items()}
    names = sorted((name for name in days if days[name] > known.max_uptime_days), key=lambda name: -days[name])
    if not names:
        return None
    fix = f"an administrator reboots them: scontrol reboot ASAP nextstate=RESUME {quoted(compress(names))}"
    texts = tuple(f"{name} ({days[name]})" for name in names)
    return warning("uptime", fix, most=known.max_uptime_days, nodes=texts, gpu=known.gpu)


def pyxis(place: Place) -> Finding | None:
    if place.spec.job.runtime != "pyxis":
        return None
    if place.facts.pyxis:
        return ok("pyxis")
    fix = "--runtime apptainer (launcher image sif) where that is installed; or ask for Pyxis"
    return error("pyxis-absent", fix)


# What is checked, the answers of Slurm that it needs, and how.
CHECKS: tuple[tuple[str, Sequence[str], Sequence[Check]], ...] = (
    ("partition", ("partitions",), (partition_state, time_limit, nodes_per_job)),
    (
        "nodes and GPUs",
        ("nodes", "partitions"),
        (
            *(nodes_listed, gpus, node_count, out_of_service, architecture),
            *(gpus_per_node, gpu_type, gpu_memory, disk, uptime),
        ),
    ),
    ("Pyxis", ("srun",), (pyxis,)),
    ("placement", placement.NEEDED, (placement.segment, placement.racks, placement.blocks)),
)
