"""The words of every finding, made from its code and facts, and what all findings together stop."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any, NamedTuple

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.finding import ERROR, Finding
from launcher.base.output import some


class Text(NamedTuple):
    """A heading, as docs/preflight.md lists them; what was seen; why that matters."""

    name: str
    what: str
    why: str = ""


QOS = "the job would wait for ever, unless its QOS lifts the limit"
NO_BLOCK = "even with idle nodes, Slurm would say: Requested topology configuration is not available"
COUNTS = "{asked} requested; {place} has {there}, {in_service} of them in service, {free} of them free now"
TOO_MANY = "--nodes {asked}: {place} has {there}{gres: with }{left_out:, without }"
ARCHITECTURE = "profile {profile} is for {arch}, but {place} has {seen}"
PIECES = "{pieces} x {segment} nodes, each in one block; room now for {starting}{room:: }"
NETWORK = "traffic that could stay on NVLink crosses the network"
RACKS = "Slurm does not know the racks (topology {topology})"

# `{fact: with }` is " with " and the fact, or nothing where the fact is "". Of many names the first few are shown.
TEXTS = {
    # Slurm
    "slurm-missing": Text("cluster", "{said}"),
    "cluster-silent": Text(
        "cluster", "Slurm's nodes and partitions could not be read, so nothing about them was checked", "{said}"
    ),
    "cluster-unread": Text("cluster", "{said}", "not checked: {skipped}"),
    "sbatch-variables": Text("environment", "the run ignores {names} from your environment"),
    # the partition
    "partition": Text("partition", "{place} is up"),
    "partition-unknown": Text("partition", "Slurm has no partition {partition!r}; it has {known}"),
    "partition-not-named": Text("partition", "no partition was named, and the cluster has no default; it has {known}"),
    "partition-closed": Text("partition", "{place} is {state}", "its jobs do not start"),
    "time": Text("time", "--time {time}; {place} allows {limit}"),
    "time-limit": Text("time", "--time {time} is above the limit of {place}, {limit}", QOS),
    "job-too-large": Text("nodes per job", "--nodes {asked}: {place} allows at most {limit!n} per job", QOS),
    "job-too-small": Text("nodes per job", "--nodes {asked}: {place} needs at least {limit!n} per job", QOS),
    # nodes
    "nodes": Text("nodes", COUNTS),
    "nodes-busy": Text("nodes", f"{COUNTS}: the job waits for others to end"),
    "nodes-too-few": Text("nodes", TOO_MANY, "the job would wait for ever"),
    "nodes-not-yet": Text("nodes", TOO_MANY, "the job waits until more nodes come up"),
    "node-states": Text("node states", "{nodes}"),
    "nodes-out-of-service": Text(
        "node states", "{asked!n} requested, {left} in service: {nodes}", "the job waits until enough of them are back"
    ),
    "node-unknown": Text("{option}", "--{option} {given}: Slurm has no node {unknown}", "it has {known}"),
    "nodelist-too-long": Text(
        "nodelist", "--nodelist names {count!n}, but the job has {asked}", "Slurm gives a job every node of its list"
    ),
    "nodelist-out": Text("nodelist", "--nodelist: {nodes}", "the job waits until they are back"),
    "bad-nodes": Text("excluded", "{nodes}; launcher cluster nodes"),
    "bad-nodes-named": Text("excluded", "--nodelist names nodes that failed their check: {names}", "{nodes}"),
    "bad-nodes-not-left-out": Text("excluded", "nodes that failed their check could not be left out: {why}"),
    # what the nodes are
    "memory-short": Text(
        "memory",
        "batch {batch} needs about {needed} GiB, but only {there} of a GPU's memory can be used",
        "training would run out of memory",
    ),
    "gpus": Text("GPUs", "{gres} on {count!n} of {place}"),
    "gpus-absent": Text(
        "GPUs",
        "the run asks for {gres} per node, but no node of {place} has that: {have}",
        "Slurm reports {said} there",
    ),
    "gpu-quantization": Text(
        "quantization",
        "{quantize} needs a GPU of compute capability {needed} or later, but {gpu} has {there}",
        "torchtitan refuses it on every node",
    ),
    "no-nvidia-driver": Text("GPUs", "--gpu {profile}: this machine has no NVIDIA driver (no nvidia-smi)"),
    "gpus-idle": Text(
        "GPUs per node",
        "profile {profile} uses {used} GPUs per node, but {node} has {there} ({gres})",
        "the others would sit idle, held by this job; this may be the wrong profile",
    ),
    "gpu-type": Text(
        "GPU type",
        "the profile is for {gpu}, but Slurm reports {seen} on {node} ({said})",
        "settings and published figures of one GPU do not fit another",
    ),
    "gpu-memory": Text(
        "GPU memory",
        "the profile's {gpu} has {gib} GiB, but the GPUs' names in Slurm say {named} ({said})",
        "the run is checked against the smaller memory",
    ),
    "architecture": Text("architecture", "{arch}"),
    "architecture-other": Text("architecture", ARCHITECTURE, "an image for another architecture does not start"),
    "disk-small": Text(
        "disk",
        "the image unpacks to {gib} GiB, but Slurm reports TmpDisk={tmp_mib} MiB for {nodes}",
        "where Pyxis has no squashfuse, each node unpacks the image onto its own disk before the run",
    ),
    "uptime": Text(
        "uptime", "up for more than {most} days: {nodes}", "a firmware bug stops NVLink on {gpu} nodes after 60 days"
    ),
    "pyxis": Text("Pyxis", "Pyxis"),
    "pyxis-absent": Text(
        "Pyxis",
        "Pyxis is not installed here (srun has no --container-image)",
        "the job would end with: srun: unrecognized option '--container-image=...'",
    ),
    # placement
    "segment": Text("placement", PIECES),
    "segment-unsupported": Text(
        "placement",
        "--segment {segment}: Slurm places no segments here (23.11 with topology/block does)",
        "Slurm {slurm}, topology {topology}",
    ),
    "segment-above-block": Text(
        "placement",
        "--segment {segment}: the largest block has {largest!n}",
        "Slurm would say: Requested topology configuration is not available",
    ),
    "segment-straddles": Text(
        "placement",
        PIECES,
        f"{{nodes}} nodes fit into {{domains}} NVLink domains, but not split like this: some {NETWORK}"
        "{lost:; out of service: }",
    ),
    "racks-unknown": Text(
        "placement", f"{RACKS}: whether the {{nodes}} nodes share an NVLink domain is left to chance"
    ),
    "racks-straddled": Text(
        "placement",
        f"{RACKS}: the job may straddle NVLink domains",
        "{nodes} nodes need at least {domains}, and may get more",
    ),
    "nodes-in-no-block": Text(
        "blocks", "{count!n} of {place} are in no block of the topology: {nodes}", f"{NO_BLOCK}{{empty:; no nodes in }}"
    ),
    # files and data here
    "image": Text("image", "{path}"),
    "image-refused": Text("image", "{what}", "{why}"),
    "batch-size-not-named": Text(
        "batch size", "{recipe} has no local batch size for {gpu}, so 1 is used, which does not fill the GPUs"
    ),
    "image-not-named": Text("image", "the run needs an image, but no --image was given, so none was checked"),
    "image-note": Text("files", "--image {path}: {said}"),
    "driver": Text("driver", "{needed}, the nodes have {driver}"),
    "driver-old": Text(
        "driver",
        "{needed}, the nodes have {driver}",
        "it runs there only with NVIDIA's forward compatibility (cuda-compat), in the image or on the nodes",
    ),
    "driver-unknown": Text(
        "driver", "{needed}; the nodes' driver is not known here", "{seen:similar clusters have run with }"
    ),
    "weights-refused": Text("weights", "{what}", "{why}"),
    "data": Text("data", "{said}"),
    "data-refused": Text("data", "{what}", "{why}"),
    "data-note": Text("files", "{said}"),
    "data-unfit": Text("data", "--data {why}", "every node refuses it before training"),
    "tokenizer-unfit": Text("tokenizer", "--tokenizer {why}", "every node refuses it before training"),
    "s3-no-credentials": Text(
        "files",
        "--data {data}: the job gets no credentials for it",
        "fine if the nodes have their own, or none are needed",
    ),
    "hub-no-token": Text(
        "files", "--data hub: the job has no token for the Hub", "without one the Hub limits requests sooner (429)"
    ),
    "checkpoint-space-short": Text(
        "checkpoints",
        "{count} checkpoints take {needed}, but only {there} are free in {path}",
        "the run would end on a full disk",
    ),
    "path-absent": Text("files", "{path} does not exist here", "if the compute nodes lack it too, the job will fail"),
    "path-absent-here": Text("files", "{path} is not on this machine"),
    "setting-unknown": Text("settings", "{key} (from {origin}): torchtitan {versions} has no such setting"),
    "setting-value": Text("settings", "{key}={value} (from {origin}): torchtitan {versions} takes: {takes}"),
    "python-absent": Text("files", "{python}: no such program"),
    "software-absent": Text("software", "{lacking}: not installed for {python}", "this Python would run the training"),
    "preload": Text(
        "preload",
        "--env LD_PRELOAD={value}",
        "the container does not have the host's library, so every program there would complain or fail",
    ),
    "mount-absent": Text(
        "mounts", "--mount {source}: not on this machine", "a node without it cannot start the container"
    ),
    "mount-of-profile-absent": Text(
        "mounts",
        "{source}, which profile {profile} mounts, is not on this machine",
        "compute nodes usually have it, login nodes need not; a node without it cannot start the container",
    ),
}
NOT_FOUND = {"partition-unknown", "node-unknown"}  # something that was named does not exist


class _Words(Formatter):
    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion == "n":
            return f"{value} node" if value == 1 else f"{value} nodes"
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, spec: str) -> str:
        text = some(value) if isinstance(value, tuple) else str(value)
        return spec + text if text else ""


def words(finding: Finding) -> Text:
    """The finding as people read it."""
    return Text(*(_Words().vformat(text, (), finding.facts) for text in TEXTS[finding.code]))


def sentence(finding: Finding) -> str:
    """A finding in one line: what, why, fix."""
    _, what, why = words(finding)
    return what + (f": {why}" if why else "") + (f"; {finding.fix}" if finding.fix else "")


def as_dict(finding: Finding) -> dict[str, object]:
    """A finding as JSON takes it."""
    values = {"status": finding.status, "fix": finding.fix, "certain": finding.certain}
    return words(finding)._asdict() | values | {"code": finding.code, "facts": dict(finding.facts)}


def refusal(findings: Sequence[Finding], force: bool) -> LauncherError | None:
    """Why the run is not submitted; None where nothing stops it. `force` passes errors that are not certain."""
    errors = [finding for finding in findings if finding.status == ERROR and (finding.certain or not force)]
    if not errors:
        return None
    first = next((finding for finding in errors if finding.certain), errors[0])
    if first.error:
        return first.error
    _, what, why = words(first)
    fix = first.fix
    if not first.certain:
        fix = f"{fix}; --force submits it anyway" if fix else "--force submits it anyway"
    return LauncherError(
        first.code,
        what + (f": {why}" if why else ""),
        fix,
        status=ExitStatus.NOT_FOUND if first.code in NOT_FOUND else ExitStatus.INVALID,
        original="\n".join(f"{words(one).name}: {sentence(one)}" for one in errors if one is not first),
    )
