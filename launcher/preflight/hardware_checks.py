"""Checks before a run queues of what its nodes are: GPUs, architecture, uptime. Pure; part of
launcher/preflight/checks.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from launcher.base.errors import quoted
from launcher.base.finding import ERROR, OK, WARNING, Check
from launcher.base.output import SHOWN, some
from launcher.config.hardware import of_gpu
from launcher.config.spec import RunSpec
from launcher.preflight.candidates import Place, fitting, gpus_of, number_of
from launcher.scheduler.facts import ClusterFacts
from launcher.scheduler.parse import compress


def gpus(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
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
        "GPUs",
        ERROR,
        f"the run asks for {gres}:{count} on a node, and no node of {place.name} has that: {text}",
        f"Slurm says {some(words)}" if words else "Slurm lists no generic resources (GRES) there",
        fix,
        certain=place.sure,
    )


def gpus_per_node(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
    used, gres = spec.profile.gpus_per_node, spec.profile.gres
    users = spec.origin.get("profile.gpus_per_node", "").startswith("option")
    if spec.profile.device != "cuda" or not gres or users:
        return None
    more = [node for node in fitting(spec, place) if gpus_of(node, gres) > used]
    if not more:
        return None
    there = gpus_of(more[0], gres)
    return Check(
        "GPUs per node",
        WARNING,
        f"profile {spec.job.gpu} uses {used} GPUs of a node; {more[0].name} has {there} ({more[0].gres})",
        "the rest would idle, held by this job; it may be the wrong profile",
        f"--gpu NAME, or --gpus-per-node {there}",
    )


def gpu_named(spec: RunSpec, place: Place, profiles: Sequence[str]) -> Check | None:
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
        "GPU type",
        WARNING,
        f"the profile is for {spec.profile.gpu}; Slurm speaks of {', '.join(seen)} on {able[0].name} "
        f"({', '.join(filter(None, (able[0].gres, *able[0].features)))})",
        "settings and published figures of one GPU do not fit another",
        f"--gpu {seen[0]}",
    )


def architecture(spec: RunSpec, _facts: ClusterFacts, place: Place) -> Check | None:
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
            "architecture",
            WARNING,
            what,
            "on the others the image does not start",
            quoted("--exclude", ",".join(strange)) if len(strange) <= SHOWN else "another --partition",
        )
    if spec.job.runtime == "bare":
        return Check("architecture", WARNING, what, "", "--gpu NAME")
    return Check(
        "architecture",
        ERROR,
        what,
        "an image for another architecture does not start",
        f"--gpu NAME; or, where the image is for {other}: --set profile.arch={other}",
        certain=place.whole and not place.guessed,
    )


def room_to_unpack(spec: RunSpec, facts: ClusterFacts, place: Place, unpacked_bytes: int) -> Check | None:
    """Without squashfuse, every node unpacks the image onto its own disk first."""
    if spec.job.runtime != "pyxis" or facts.squashfuse:
        return None
    small = [node for node in fitting(spec, place) if 0 < node.tmp_mib << 20 < unpacked_bytes]
    if not small:
        return None
    least = min(node.tmp_mib for node in small)
    return Check(
        "disk",
        WARNING,
        f"the image unpacks to {unpacked_bytes / 2**30:.1f} GiB; Slurm says TmpDisk={least} MiB of "
        f"{some([node.name for node in small])}",
        "where Pyxis has no squashfuse, each node unpacks the image onto its own disk before the run",
        f"srun -N1 -w {quoted(small[0].name)} df -h; launcher cluster show says whether images are mounted",
    )


def up_for_long(spec: RunSpec, place: Place, now: datetime) -> Check | None:
    """B200's NVLink firmware fails at 60 days of uptime, which is known and goes with a reboot."""
    known = of_gpu(spec.profile.gpu)
    if known is None or not known.max_uptime_days:
        return None
    most = known.max_uptime_days
    booted = {node.name: datetime.fromisoformat(node.booted) for node in fitting(spec, place) if node.booted}
    days = {name: (now - at).days for name, at in booted.items() if (now - at).days > most}
    if not days:
        return None
    names = sorted(days, key=lambda name: -days[name])
    return Check(
        "uptime",
        WARNING,
        f"up for more than {most} days: {some([f'{name} ({days[name]})' for name in names])}",
        f"a firmware bug stops NVLink of {known.gpu} nodes at 60 days",
        f"an administrator reboots them: scontrol reboot ASAP nextstate=RESUME {quoted(compress(names))}",
    )
