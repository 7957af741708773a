"""The report of an acceptance, to be handed over: one HTML file that prints well. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.base.errors import quoted
from launcher.report.page import cell, document
from launcher.report.table import TAGS
from launcher.results.accept import MAX_SPREAD, THRESHOLD, Verdict, headline
from launcher.results.columns import COLUMNS
from launcher.results.measure import against_others
from launcher.results.outcome import NodeCheck, Outcome, per_unit
from launcher.results.published import called, publisher, say
from launcher.results.submission import PRIVATE

GENERATOR = "titan-launcher accept"
_FIGURES = ("median_tps", "median_mfu_pct", "memory_gib", "loss", "slowest_node", "data_share")
# Options of `accept` with which the same work is asked for elsewhere; what else was changed is in the settings.
_ASKED = {"image": "job.image", "data": "job.data", "gpu": "job.gpu", "nodes": "job.nodes", "recipe": "job.recipe"}


def acceptance(
    run: str,
    reference: str,
    outcome: Outcome | None,
    verdict: Verdict,
    inputs: Mapping[str, Any],
    checks: Mapping[str, NodeCheck],
    steps: Sequence[str] = (),
) -> str:
    """`reference` names the run in a command; `inputs`: what accept.json keeps of the question; `steps`: what to do."""
    row, settings = verdict.baseline, outcome.settings if outcome else {}
    shown = [column for column in COLUMNS if outcome and column.key in _FIGURES and column.shown(outcome).text]
    own = [outcome] if outcome else []
    return document(
        "acceptance.html.j2",
        GENERATOR,
        run=run,
        outcome=outcome,
        rate=per_unit("Tokens/s per GPU", own),
        verdict=verdict,
        tags=TAGS,
        headline=headline(run, outcome, verdict),
        row=row,
        row_name=called(row) if row else "",
        row_link=publisher(row)["link"] if row else "",
        figures=[(per_unit(one.title, own), [*map(one.shown, [*own, *([row] if row else [])])]) for one in shown],
        inputs=inputs,
        steps=steps,
        nodes=_nodes(outcome, checks),
        measured={key for check in checks.values() for key in check.measured},
        cell=cell,
        commands=_commands(run, reference, outcome, inputs),
        settings=[(key, say(value)) for key, value in sorted(settings.items()) if not PRIVATE.fullmatch(key)],
    )


def _nodes(outcome: Outcome | None, checks: Mapping[str, NodeCheck]) -> list[tuple[Any, ...]]:
    """Host, tokens/s, place against the others, check: failed ones first, then the slowest, last without a figure."""
    by_node = outcome.by_node if outcome else ()
    against, rates = {node.host: node for node in against_others(by_node)}, {node.host: node.tps for node in by_node}
    hosts = dict.fromkeys([*against, *rates, *checks])
    found = [(host, rates.get(host), against.get(host), checks.get(host, NodeCheck(None))) for host in hosts]
    return sorted(found, key=lambda node: node[-1].passed is not False)


def _commands(run: str, reference: str, outcome: Outcome | None, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    limits = [] if inputs["threshold"] == THRESHOLD else ["--threshold", f"{100 * inputs['threshold']:g}%"]
    limits += [] if inputs["max_spread"] == MAX_SPREAD else ["--max-spread", f"{100 * inputs['max_spread']:g}%"]
    limits += [] if inputs["baseline"] == "published" else ["--baseline", inputs["baseline"]]
    asked = {"Judge this run again": [reference]}
    if outcome:
        asked["Run the same again here"] = [f"{outcome.run_dir}/run.toml", "--name", f"{run}-again"]
        known = [(f"--{option}", value) for option, key in _ASKED.items() if (value := outcome.settings.get(key))]
        local = ["--local"] if outcome.cluster == "local" else []
        asked["The same work elsewhere"] = [*local, *(word for pair in known for word in pair)]
    return [(what, quoted("launcher", "accept", *words, *limits)) for what, words in asked.items()]
