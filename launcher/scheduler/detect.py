"""Asks Slurm what a cluster is, all questions at once, and makes launcher/scheduler/facts.py's values of the
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from launcher.base.errors import LauncherError
from launcher.scheduler import parse, slurm
from launcher.scheduler.facts import ClusterFacts, Topology

Run = Callable[[Sequence[str]], str]
T = TypeVar("T")

# Asked at the same time, so that a controller that hangs costs one bound and not five.
QUESTIONS = {
    "config": ("scontrol", "show", "config"),
    "nodes": ("scontrol", "-o", "show", "node"),
    "partitions": ("scontrol", "-o", "show", "partition"),
    "topology": ("scontrol", "-o", "show", "topology"),
    "srun": ("srun", "--help"),
}
PARSERS: Mapping[str, Callable[[str], Any]] = {
    "config": parse.config,
    "nodes": parse.nodes,
    "partitions": parse.partitions,
    "topology": parse.blocks,
    "srun": parse.container_options,
}


def detect(run: Run | None = None, plugstack: Callable[[str], str] | None = None) -> ClusterFacts:
    """Asks Slurm, which changes nothing, and waits for as long as one command may take. Never raises LauncherError.

    A command that fails, hangs or is cut off has said nothing: `unread` has its name and why. `run` and `plugstack`
    (path of plugstack.conf -> its text with what it includes) are replaced in tests.
    """
    ask = run or slurm.ask
    answers = _ask_all(ask, QUESTIONS)
    said: dict[str, Any] = {}
    why: dict[str, str] = {}
    for name, parser in PARSERS.items():
        try:
            said[name] = _parsed(answers[name], parser)
        except LauncherError as error:
            why[name] = ": ".join([error.what, *error.original.splitlines()[:1]])
        except ValueError as error:
            why[name] = str(error)
    config = said.get("config", {})
    nodes, partitions, blocks, options = (said.get(name, ()) for name in ("nodes", "partitions", "topology", "srun"))
    # Answers that contradict another are none, either.
    plugin = config.get("TopologyPlugin", "").removeprefix("topology/")
    if plugin == "block" and not blocks:
        why.setdefault("topology", "no blocks, although the plugin is topology/block")
    if not nodes and not config:
        why.setdefault("nodes", "it answered nonsense")
    if nodes and not partitions:
        why.setdefault("partitions", "nothing of it can be read")
    topology = "block" if blocks else {"none": "flat", "default": "flat"}.get(plugin, plugin)
    storage = config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    path = config.get("PlugStackConfig", "")
    return ClusterFacts(
        name=config.get("ClusterName", ""),
        slurm=parse.version(config.get("SLURM_VERSION", "")),
        topology=topology,
        accounting=storage not in ("", "none") if config else None,
        partitions=partitions,
        nodes=nodes,
        blocks=blocks,
        pyxis_options=options,
        squashfuse=parse.squashfuse((plugstack or slurm.plugstack)(path)) if path and options else None,
        topologies=_topologies(ask, {p.topology for p in partitions} - {""}),
        absent=answer.what if isinstance(answer := answers["nodes"], slurm.Missing) else "",
        unread={name: f"{' '.join(QUESTIONS[name])}: {text}" for name, text in why.items()},
    )


def _parsed(answer: str | BaseException, parser: Callable[[str], T]) -> T:
    if isinstance(answer, BaseException):
        raise answer
    if answer and not answer.endswith("\n"):
        raise ValueError("its answer is cut off")
    return parser(answer)


def _topologies(ask: Run, names: Collection[str]) -> dict[str, Topology]:
    """Those that partitions name: the cluster's own, which was asked for with all else, says nothing about them."""
    questions = {name: (*QUESTIONS["topology"], name) for name in names}
    found = {}
    for name, answer in _ask_all(ask, questions).items():
        try:
            found[name] = _parsed(answer, parse.topology)
        except (LauncherError, ValueError) as error:
            found[name] = Topology(unread=f"{' '.join(questions[name])}: {error}")
    return found


@cache
def detected() -> ClusterFacts:
    """`detect` once for all that a submission looks at. What is asked later, or again, calls
    `detected.cache_clear()`.
    """
    return detect()


def _ask_all(ask: Run, questions: Mapping[str, Sequence[str]]) -> dict[str, str | BaseException]:
    """Every question's answer or error. Ctrl-C ends it at once: the threads, and what they wait for, are left
    behind.
    """
    said: SimpleQueue[tuple[str, str | BaseException]] = SimpleQueue()

    def one(name: str) -> None:
        try:
            said.put((name, ask(questions[name])))
        except BaseException as error:  # raised where the answer is read
            said.put((name, error))

    for name in questions:
        Thread(target=one, args=(name,), daemon=True).start()
    return dict(said.get() for _ in questions)
