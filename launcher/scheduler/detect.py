"""Asks Slurm what a cluster is, all questions at once, and makes launcher/scheduler/facts.py's values of the
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from queue import SimpleQueue
from threading import Thread

from launcher.base.errors import ExitStatus, LauncherError
from launcher.scheduler import parse, slurm
from launcher.scheduler.facts import SEGMENT_SINCE, Block, ClusterFacts, Node, Partition

Run = Callable[[Sequence[str]], str]

# Asked at the same time, so that a controller that hangs costs one bound and not five.
QUESTIONS = {
    "config": ("scontrol", "show", "config"),
    "nodes": ("scontrol", "-o", "show", "node"),
    "partitions": ("scontrol", "-o", "show", "partition"),
    "topology": ("scontrol", "-o", "show", "topology"),
    "srun": ("srun", "--help"),
}
SINFO = ("sinfo", "--noheader", "--Node", "--format=%N|%R|%T|%G|%f|%c|%m|%E")


def detect(run: Run | None = None, plugstack: Callable[[str], str] | None = None) -> ClusterFacts:
    """Asks Slurm, which changes nothing, and waits for at most twice the bound of one command.

    What one command cannot say becomes a note. `run` and `plugstack` (path of plugstack.conf -> its text with what it
    includes) are replaced in tests. Raises LauncherError of status CLUSTER where no node can be read at all.
    """
    ask = run or slurm.ask
    answers, errors = _ask_all(ask)
    notes = {name: f"{' '.join(QUESTIONS[name])}: {_why(error)}" for name, error in errors.items()}
    config = parse.config(answers.get("config", ""))
    nodes, broken = parse.nodes(answers.get("nodes", ""))
    partitions, cut_off = parse.partitions(answers.get("partitions", ""))
    kind, blocks = parse.topology(answers.get("topology", ""))
    plugin = config.get("TopologyPlugin", "").removeprefix("topology/")
    halves = (
        ("config", not config, "nothing of it can be read"),
        ("nodes", broken > 0, f"{broken} records are cut off or in another form; these are not counted"),
        ("partitions", cut_off > 0, f"{cut_off} records are cut off or in another form"),
        ("partitions", bool(nodes) and not partitions, "nothing of it can be read"),
        ("topology", parse.topology_is_cut_off(answers.get("topology", "")), "it is cut off"),
        ("topology", plugin == "block" and not blocks, "no blocks, although the plugin is topology/block"),
    )
    for name, is_half, what in halves:
        if is_half:
            notes.setdefault(name, f"{' '.join(QUESTIONS[name])}: {what}")
    unread = list(notes)
    more: list[str] = []
    if not nodes:
        nodes = _from_sinfo(ask, errors, answers, more)
        unread += ["nodes"] if nodes and "nodes" not in unread else []
    known = {partition.name for partition in partitions}
    if not known or "partitions" in unread:
        partitions += tuple(p for p in parse.partitions_of(nodes) if p.name not in known)
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
        notes=(*notes.values(), *more, *_disagreements(partitions, nodes)),
        pyxis_options=options,
        squashfuse=parse.squashfuse((plugstack or slurm.plugstack)(path)) if path and options else None,
        unread=tuple(unread),
    )


@cache
def detected() -> ClusterFacts:
    """`detect` once for all that a submission looks at. What is asked later, or again, calls
    `detected.cache_clear()`.
    """
    return detect()


def _ask_all(ask: Run) -> tuple[dict[str, str], dict[str, LauncherError]]:
    """Every question's answer or error. Ctrl-C ends it at once: the threads, and what they wait for, are left
    behind.
    """
    said: SimpleQueue[tuple[str, str | BaseException]] = SimpleQueue()

    def one(name: str) -> None:
        try:
            said.put((name, ask(QUESTIONS[name])))
        except BaseException as error:  # the caller raises it, or notes it
            said.put((name, error))

    for name in QUESTIONS:
        Thread(target=one, args=(name,), daemon=True).start()
    found = dict(said.get() for _ in QUESTIONS)
    errors: dict[str, LauncherError] = {}
    answers: dict[str, str] = {}
    for name in QUESTIONS:  # in a fixed order
        match found[name]:
            case LauncherError() as error:
                errors[name] = error
            case BaseException() as error:
                raise error
            case answer:
                answers[name] = answer
    return answers, errors


def _from_sinfo(
    ask: Run, errors: dict[str, LauncherError], answers: dict[str, str], notes: list[str]
) -> tuple[Node, ...]:
    """The second source of nodes; where it has none either, the first error is the one to show."""
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
        f"{len(gone)} nodes of a partition are not among the nodes, such as {gone[0]}: they came or went meanwhile, or "
        "their records are cut off"
    ]


def _why(error: LauncherError) -> str:
    words = error.original.splitlines()
    return error.what + (f": {words[0]}" if words else "")
