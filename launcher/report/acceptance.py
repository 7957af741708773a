"""The report of an acceptance, to be handed over: one HTML file that prints well. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import quoted
from launcher.base.output import counted
from launcher.report.page import cell, document
from launcher.report.table import TAGS
from launcher.results.accept import MAX_SPREAD, THRESHOLD, Verdict, headline
from launcher.results.columns import COLUMNS, Cell
from launcher.results.measure import against_others
from launcher.results.outcome import NodeCheck, Outcome
from launcher.results.published import called, link_of, say
from launcher.results.submission import PRIVATE

GENERATOR = "titan-launcher accept"
_FIGURES = ("median_tps", "median_mfu_pct", "memory_gib", "loss", "slowest_node", "data_share")
_VERSIONS = {
    "image": "Image",
    "digest": "Image SHA-256",
    "torch": "torch",
    "torchtitan": "torchtitan",
    "driver": "NVIDIA driver",
    "cuda": "CUDA",
    "nccl": "NCCL",
    "python": "Python",
}
_MEASURED = {
    "product_tflops": "Matrix product, TFLOP/s",
    "copy_gbs": "Memory copy, GB/s",
    "allreduce_node_gbs": "All-reduce in the node, GB/s",
}
# Options of `accept` with which the same work is asked for elsewhere; the recipe and its changes are in the settings.
_ASKED = {"--image": "job.image", "--gpu": "job.gpu", "--nodes": "job.nodes", "--recipe": "job.recipe"}


@dataclass(frozen=True)
class NodeRow:
    """A node's tokens/s, how it stands against the others, what its check said, and what it measured."""

    host: str
    tps: str
    against: str
    css: str
    check: str
    measured: tuple[str, ...]


def acceptance(
    run: str,
    reference: str,
    outcome: Outcome | None,
    verdict: Verdict,
    inputs: Mapping[str, Any],
    checks: Mapping[str, NodeCheck],
) -> str:
    """`reference` names the run in a command; `inputs` are what accept.json keeps of the question."""
    row = verdict.baseline
    measured = [key for key in _MEASURED if any(key in check.measured for check in checks.values())]
    what = f"{outcome.cluster or 'a cluster'}: {_size(outcome)}" if outcome else run
    return document(
        "acceptance.html.j2",
        GENERATOR,
        title=f"Acceptance of {what}, {inputs['date'][:10]}",
        word=str(verdict.word),
        tag=TAGS[verdict.word],
        headline=headline(run, outcome, verdict),
        reasons=[("ok" if reason.word == "PASS" else str(reason.word), reason.what) for reason in verdict.reasons],
        notes=verdict.notes,
        figures=_figures(outcome, row) if outcome else [],
        baseline=(called(row), link_of(row)) if row else None,
        conditions=_conditions(run, outcome, verdict, inputs),
        measured=[_MEASURED[key] for key in measured],
        nodes=_nodes(outcome, checks, measured),
        commands=_commands(run, reference, outcome, inputs),
        settings=_settings(outcome) if outcome else [],
        inputs=inputs,
    )


def _figures(outcome: Outcome, row: Outcome | None) -> list[tuple[str, Cell, Cell]]:
    shown = [column for column in COLUMNS if column.key in _FIGURES]
    found = [(one.title, one.shown(outcome), one.shown(row) if row else Cell("")) for one in shown]
    return [one for one in found if one[1].text]


def _conditions(
    run: str, outcome: Outcome | None, verdict: Verdict, inputs: Mapping[str, Any]
) -> list[tuple[str, str]]:
    threshold, spread = (f"{100 * inputs[key]:g}%" for key in ("threshold", "max_spread"))
    limits = f"at least {threshold} of the baseline; a node at most {spread} slower than the others"
    judged = [("Limits", limits), ("Baseline asked for", inputs["baseline"]), ("Judged", inputs["date"])]
    if outcome is None:
        return [("Run", run), *judged]
    size = f"{outcome.local_batch_size} x {outcome.seq_len:,} tokens a GPU, {outcome.precision}"
    work = f"{outcome.recipe}: {size}{', compiled' if outcome.compile else ''}, {counted(outcome.steps, 'step')}"
    versions = [(title, outcome.versions.get(name) or "not recorded") for name, title in _VERSIONS.items()]
    nodes = f"{_size(outcome)}{f', cluster {outcome.cluster}' if outcome.cluster else ''}"
    asked = [("Run", run), ("Submitted", outcome.date or "not recorded"), ("Nodes", nodes), ("Work", work)]
    return [*asked, *versions, *judged]


def _size(outcome: Outcome) -> str:
    return f"{outcome.nodes} x {outcome.gpus // max(1, outcome.nodes)} {outcome.gpu}"


def _nodes(outcome: Outcome | None, checks: Mapping[str, NodeCheck], measured: list[str]) -> list[NodeRow]:
    """Those that failed their check first, then the slowest, then those without a figure."""
    against = {node.host: node for node in against_others(outcome.by_node)} if outcome else {}
    rates = {node.host: node.tps for node in (outcome.by_node if outcome else ())}
    words = {None: "not recorded", True: "passed", False: "failed"}
    found = []
    hosts = dict.fromkeys([*against, *rates, *checks])
    for host in sorted(hosts, key=lambda host: host not in checks or checks[host].passed is not False):
        text, css = cell(against.get(host))
        check = checks.get(host, NodeCheck(None))
        tps = rates.get(host)
        found.append(
            NodeRow(
                host,
                "" if tps is None else f"{tps:,.0f}",
                text,
                css,
                "; ".join([words[check.passed], *check.said]),
                tuple(f"{check.measured[key]:,.4g}" if key in check.measured else "" for key in measured),
            )
        )
    return found


def _commands(run: str, reference: str, outcome: Outcome | None, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    limits = [] if inputs["threshold"] == THRESHOLD else ["--threshold", f"{100 * inputs['threshold']:g}%"]
    limits += [] if inputs["max_spread"] == MAX_SPREAD else ["--max-spread", f"{100 * inputs['max_spread']:g}%"]
    limits += [] if inputs["baseline"] == "published" else ["--baseline", inputs["baseline"]]
    found = [("Judge this run again", quoted("launcher", "accept", reference, *limits))]
    if outcome:
        again = (f"{outcome.run_dir}/run.toml", "--name", f"{run}-again")
        found.append(("Run the same again here", quoted("launcher", "accept", *again, *limits)))
        known = [(option, outcome.settings[key]) for option, key in _ASKED.items() if key in outcome.settings]
        asked = [word for pair in known for word in pair]
        found.append(("The same work elsewhere", quoted("launcher", "accept", *asked, *limits)))
    return found


def _settings(outcome: Outcome) -> list[tuple[str, str]]:
    return [(key, say(value)) for key, value in sorted(outcome.settings.items()) if not PRIVATE.fullmatch(key)]
