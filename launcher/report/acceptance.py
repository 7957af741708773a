"""The report of an acceptance, to be handed over: one HTML file that prints well. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import quoted
from launcher.base.output import counted
from launcher.report.page import cell, document
from launcher.report.table import TAGS
from launcher.results.accept import MAX_SPREAD, THRESHOLD, Verdict, headline, share_text
from launcher.results.columns import COLUMNS, Cell
from launcher.results.measure import against_others
from launcher.results.outcome import NodeCheck, Outcome
from launcher.results.published import called, link_of, say
from launcher.results.submission import PRIVATE

GENERATOR = "titan-launcher accept"
_FIGURES = ("median_tps", "median_mfu_pct", "memory_gib", "loss", "slowest_node", "data_share")
_VERSIONS = ("image", "digest", "torch", "torchtitan", "driver", "cuda", "nccl", "python")
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
    what = (
        f"{counted(outcome.nodes, 'node')} x {outcome.gpus // max(1, outcome.nodes)} {outcome.gpu}" if outcome else run
    )
    return document(
        "acceptance.html.j2",
        GENERATOR,
        title=f"Acceptance of {(outcome.cluster if outcome else '') or 'a cluster'}: {what}, {inputs['date'][:10]}",
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
    found = [(column.title, column.shown(outcome), column.shown(row) if row else Cell("")) for column in COLUMNS]
    return [one for one, column in zip(found, COLUMNS, strict=True) if column.key in _FIGURES and one[1].text]


def _conditions(
    run: str, outcome: Outcome | None, verdict: Verdict, inputs: Mapping[str, Any]
) -> list[tuple[str, str]]:
    limits = (
        f"{share_text(inputs['threshold'])} of the baseline; a node at most {share_text(inputs['max_spread'])} slower"
    )
    judged = [("Limits", f"at least {limits}"), ("Baseline asked for", inputs["baseline"]), ("Judged", inputs["date"])]
    if outcome is None:
        return [("Run", run), *judged]
    size = f"{outcome.local_batch_size} x {outcome.seq_len:,} tokens a GPU, {outcome.precision}"
    work = f"{outcome.recipe}: {size}{', compiled' if outcome.compile else ''}, {counted(outcome.steps, 'step')}"
    versions = [(name.capitalize(), outcome.versions.get(name) or "not recorded") for name in _VERSIONS]
    return [("Run", run), ("Submitted", outcome.date or "not recorded"), ("Work", work), *versions, *judged]


def _nodes(outcome: Outcome | None, checks: Mapping[str, NodeCheck], measured: list[str]) -> list[NodeRow]:
    """The slowest first, then those without a figure."""
    against = {node.host: node for node in against_others(outcome.by_node)} if outcome else {}
    rates = {node.host: node.tps for node in (outcome.by_node if outcome else ())}
    found = []
    for host in dict.fromkeys([*against, *rates, *checks]):
        text, css = cell(against.get(host))
        check = checks.get(host)
        said = "not recorded" if check is None or check.passed is None else "passed" if check.passed else "failed"
        figures = check.measured if check else {}
        tps = rates.get(host)
        found.append(
            NodeRow(
                host,
                "" if tps is None else f"{tps:,.0f}",
                text,
                css,
                ": ".join(filter(None, [said, "; ".join(check.said) if check else ""])),
                tuple(f"{figures[key]:,.4g}" if key in figures else "" for key in measured),
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
        asked = [
            word
            for option, key in _ASKED.items()
            if key in outcome.settings
            for word in (option, outcome.settings[key])
        ]
        found.append(("The same work elsewhere", quoted("launcher", "accept", *asked, *limits)))
    return found


def _settings(outcome: Outcome) -> list[tuple[str, str]]:
    return [(key, say(value)) for key, value in sorted(outcome.settings.items()) if not PRIVATE.fullmatch(key)]
