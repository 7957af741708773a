"""What is known about a Slurm cluster: plain values, read once before anything is submitted.

`detect` asks Slurm; every other function here and in launcher/cluster/parse.py is a function over text or values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

from launcher.errors import ExitStatus, LauncherError

# Base states and flags with which Slurm gives a node to a job at once. A flag that is not listed here is one that a
# later Slurm has invented: such a node is not counted on.
FREE = {"IDLE", "CLOUD", "DYNAMIC_NORM", "DYNAMIC_FUTURE", "POWERED_DOWN"}


@dataclass(frozen=True)
class Node:
    """One node as `scontrol show node` has it. Memory in MiB as configured; "" and 0 where Slurm says nothing."""

    name: str
    states: frozenset[str] = frozenset()  # upper case, base state and flags: {"IDLE", "DRAIN"}
    reason: str = ""  # why it is down or drained, with Slurm's own [user@time]
    partitions: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    gres: str = ""
    gpus: int = 0
    gpu_type: str = ""  # from the GRES, lower case; "" where it is untyped
    cpus: int = 0
    memory_mib: int = 0
    arch: str = ""  # uname's word; "" until slurmd has registered once
    block: str = ""  # of topology/block; "" for none
    booted: str = ""  # when, as Slurm writes local time: "2026-03-01T00:00:00"; "" where it does not know

    @property
    def free(self) -> bool:
        """Slurm would start a job on it now; a powered-down cloud node counts, since Slurm wakes it for a job."""
        return "IDLE" in self.states and self.states <= FREE

    @property
    def state(self) -> str:
        """One word or two, as in sinfo: what matters most about the node comes first."""
        for flag, word in (
            ("DOWN", "down"), ("ERROR", "error"), ("FAIL", "failed"), ("INVAL", "invalid"), ("INVALID_REG", "invalid"),
            ("NOT_RESPONDING", "not responding"),
        ):  # fmt: skip
            if flag in self.states:
                return word
        if "DRAIN" in self.states:
            busy = self.states & {"ALLOCATED", "MIXED", "COMPLETING"}
            return "draining" if busy else "drained"
        for flag, word in (
            ("MAINTENANCE", "maintenance"), ("MAINT", "maintenance"), ("REBOOT_ISSUED", "rebooting"),
            ("REBOOT", "rebooting"), ("REBOOT_REQUESTED", "reboot requested"), ("COMPLETING", "completing"),
            ("ALLOCATED", "allocated"), ("MIXED", "mixed"), ("RESERVED", "reserved"), ("PLANNED", "planned"),
            ("BLOCKED", "blocked"), ("POWERING_DOWN", "powering down"), ("POWERING_UP", "powering up"),
            ("POWERED_DOWN", "powered down"), ("FUTURE", "future"),
        ):  # fmt: skip
            if flag in self.states:
                return word
        return "idle" if self.free else "+".join(sorted(self.states)).lower() or "unknown"


@dataclass(frozen=True)
class Partition:
    """A partition. `max_time_s` and `max_nodes` are None for no limit."""

    name: str
    default: bool = False
    state: str = ""  # Slurm's word: UP, DOWN, DRAIN, INACTIVE
    max_time_s: int | None = None
    max_nodes: int | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A block of topology/block: nodes that share a rack's NVLink domain. An empty one is possible."""

    name: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterFacts:
    """A cluster at one moment. None and "" mean that it could not be read; `notes` then says why."""

    name: str = ""
    slurm: tuple[int, int] | None = None  # (25, 11)
    topology: str = ""  # the plugin without "topology/": block, tree, flat
    segment: bool = False  # Slurm takes --segment and the topology is made of blocks
    accounting: bool | None = None
    pyxis: str | None = None  # "" present, of unknown version; None absent, or unknown: then a note says so
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    blocks: tuple[Block, ...] = ()
    notes: tuple[str, ...] = ()
    pyxis_options: tuple[str, ...] = ()  # "--container-image", ... as srun --help lists them
    squashfuse: bool | None = None  # an image is mounted (True) or unpacked on every node (False)

    def partition(self, name: str = "") -> Partition | None:
        """The partition `name`, or the default one for ""; where none is the default, the only one there is."""
        if name:
            return next((p for p in self.partitions if p.name == name), None)
        chosen = next((p for p in self.partitions if p.default), None)
        return chosen or (self.partitions[0] if len(self.partitions) == 1 else None)

    def require(self, partition: str) -> ClusterFacts:
        """These facts; raises LauncherError, naming the partitions that there are, where one of "a,b" is not."""
        known = [p.name for p in self.partitions]
        missing = [name for name in partition.split(",") if name and name not in known]
        if missing:
            raise LauncherError(
                f"Slurm has no partition {missing[0]!r}; it has {', '.join(known) or 'none'}",
                f"--partition {known[0]}" if known else "sinfo -s",
                status=ExitStatus.NOT_FOUND,
            )
        return self

    def nodes_of(self, partition: str = "") -> tuple[Node, ...]:
        """Nodes of `partition` ("a,b" is both), or of the default one for "", or all where there is none."""
        wanted = set(partition.split(",")) if partition else set()
        if not wanted and (chosen := self.partition()):
            wanted = {chosen.name}
        return tuple(n for n in self.nodes if wanted & set(n.partitions)) if wanted else self.nodes


Run = Callable[[Sequence[str]], str]

# Asked at the same time, so that a controller that hangs costs one bound and not five.
QUESTIONS = {
    "config": ("scontrol", "show", "config"),
    "nodes": ("scontrol", "-o", "show", "node"),
    "partitions": ("scontrol", "-o", "show", "partition"),
    "topology": ("scontrol", "-o", "show", "topology"),
    "srun": ("srun", "--help"),
}
# By the version: a site's own sbatch may submit whatever it is given, so it is not asked for its --help.
SEGMENT_SINCE = (23, 11)
SINFO = ("sinfo", "--noheader", "--Node", "--format=%N|%R|%T|%G|%f|%c|%m|%E")


def detect(run: Run | None = None, plugstack: Callable[[str], str] | None = None) -> ClusterFacts:
    """Asks Slurm, which changes nothing, and waits for at most twice the bound of one command.

    What one command cannot say becomes a note. `run` and `plugstack` (path of plugstack.conf -> its text with what it
    includes) are replaced in tests. Raises LauncherError of status CLUSTER where no node can be read at all.
    """
    from launcher.cluster import parse, slurm  # parse builds the values above

    ask = run or slurm.ask
    answers, errors = _ask_all(ask)
    notes = [f"{' '.join(QUESTIONS[name])}: {_why(error)}" for name, error in errors.items()]
    config = parse.config(answers.get("config", ""))
    nodes, broken = parse.nodes(answers.get("nodes", ""))
    if broken:
        notes.append(
            f"scontrol -o show node: {broken} records are cut off or in another form; these are not counted"
        )
    if not nodes:
        nodes = _from_sinfo(ask, errors, answers, notes)
    partitions = parse.partitions(answers.get("partitions", "")) or parse.partitions_of(nodes)
    kind, blocks = parse.topology(answers.get("topology", ""))
    plugin = config.get("TopologyPlugin", "").removeprefix("topology/")
    topology = kind or {"none": "flat", "default": "flat"}.get(plugin, plugin)
    version = parse.version(config.get("SLURM_VERSION", ""))
    options = parse.container_options(answers.get("srun", ""))
    storage = config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    path = config.get("PlugStackConfig", "")
    return ClusterFacts(
        name=config.get("ClusterName", ""),
        slurm=version,
        topology=topology,
        segment=(version or (0, 0)) >= SEGMENT_SINCE and topology == "block",
        accounting=storage not in ("", "none") if config else None,
        pyxis="" if "--container-image" in options else None,
        partitions=partitions,
        nodes=_with_blocks(nodes, blocks),
        blocks=blocks,
        notes=(*notes, *_disagreements(partitions, nodes)),
        pyxis_options=options,
        squashfuse=parse.squashfuse((plugstack or slurm.plugstack)(path)) if path and options else None,
    )


@cache
def detected() -> ClusterFacts:
    """`detect` once for all that a submission looks at. What is asked later, or again, calls `detected.cache_clear()`."""
    return detect()


def _ask_all(ask: Run) -> tuple[dict[str, str], dict[str, LauncherError]]:
    answers: dict[str, str] = {}
    errors: dict[str, LauncherError] = {}
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        asked = {name: pool.submit(ask, words) for name, words in QUESTIONS.items()}
    for name, answer in asked.items():
        try:
            answers[name] = answer.result()
        except LauncherError as error:
            errors[name] = error
    return answers, errors


def _from_sinfo(
    ask: Run, errors: dict[str, LauncherError], answers: dict[str, str], notes: list[str]
) -> tuple[Node, ...]:
    """The second source of nodes; where it has none either, the first error is the one to show."""
    from launcher.cluster import parse

    said = answers.get("nodes", "").strip()
    has_config = bool(parse.config(answers.get("config", "")))
    if "nodes" in answers and has_config and said in ("", "No nodes in the system"):
        notes.append("Slurm has no nodes now: dynamic ones may register later")
        return ()
    nonsense = LauncherError(
        "scontrol answered nonsense", "scontrol -o show node", status=ExitStatus.CLUSTER, original=said[:500]
    )
    first = errors.get("nodes", nonsense)
    try:
        nodes = parse.sinfo_nodes(ask(SINFO))
    except LauncherError as error:
        raise first from error
    if not nodes:
        raise first
    notes.append("nodes are read from sinfo, which does not say their architecture")
    return nodes


def _with_blocks(nodes: Sequence[Node], blocks: Sequence[Block]) -> tuple[Node, ...]:
    of = {name: block.name for block in blocks for name in block.nodes}
    return tuple(replace(node, block=of[node.name]) if node.name in of else node for node in nodes)


def _disagreements(partitions: Sequence[Partition], nodes: Sequence[Node]) -> list[str]:
    """Two answers of Slurm that do not fit: a node came or went between them."""
    known = {node.name for node in nodes}
    gone = sorted({name for partition in partitions for name in partition.nodes} - known)
    if not gone:
        return []
    return [
        f"{len(gone)} nodes of a partition are not among the nodes, such as {gone[0]}: they came or went meanwhile"
    ]


def _why(error: LauncherError) -> str:
    words = error.original.splitlines()
    return error.what + (f": {words[0]}" if words else "")
