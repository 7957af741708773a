"""One HTML page from runs: no server, no network, no file but itself. A pure function; nothing here reads a clock.

All text passes through jinja2's escaping, and control characters are replaced before it. The page's own policy
forbids every script and style but the two whose hashes it names, and everything from the network.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launcher.base.output import counted, duration, plain, shortened, some
from launcher.base.values import by
from launcher.report.charts import of_gpu
from launcher.report.figures import Placed, differences, gpu_types, slow_nodes
from launcher.report.health import answers, health
from launcher.report.svg import LONGEST
from launcher.report.table import TAGS, table
from launcher.results.columns import drawable, percent
from launcher.results.formats import attempt_text
from launcher.results.measure import Against, against_others
from launcher.results.outcome import PHASES, Goodput, Outcome, per_unit

GENERATOR = "titan-launcher report"
MOST_NODES = 60  # in a strip
MOST_RUNS = 10  # beside each other in the table of nodes


def page(
    outcomes: Sequence[Outcome],
    published: Sequence[Outcome],
    *,
    made: str,
    version: str,
    left_out: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text, runs in the order given. `made` is when, for people; `left_out` are (run, why)."""
    differing, shared = differences(outcomes)
    clusters = list(dict.fromkeys(outcome.cluster for outcome in outcomes if outcome.cluster))
    return document(
        "page.html.j2",
        GENERATOR,
        script=text_of("page.js"),
        title=f"{some(clusters) or 'Runs'}, {made[:10]}",
        made=made,
        version=version,
        outcomes=outcomes,
        rate=per_unit("tokens/s per GPU", outcomes),
        incomplete=sum(not outcome.complete for outcome in outcomes),
        left_out=left_out,
        answers=answers(runs := health(outcomes, published)),
        tags=TAGS,
        table=table(runs, published),
        by_gpu=[(gpu, of_gpu(outcomes, published, gpu, place)) for place, gpu in enumerate(gpu_types(outcomes))],
        strips=[(run, one, *strip) for run, one in enumerate(outcomes) if (strip := _strip(one))],
        matrices=_matrices(outcomes),
        most_nodes=MOST_NODES,
        cell=cell,
        shortened=partial(shortened, most=LONGEST),
        startups=[(run, one, spans) for run, one in enumerate(outcomes) if (spans := _spans(one))],
        spent=[(run, one) for run, one in enumerate(outcomes) if one.has_spent],
        parts=[part.name for part in fields(Goodput)],
        duration=duration,
        attempt_text=attempt_text,
        phases=[called.capitalize() for _, called in PHASES],
        differing=differing,
        shared=shared,
    )


def document(template: str, generator: str, script: str = "", **values: Any) -> str:
    """An HTML file that needs nothing but itself, and runs nothing but `script`."""
    style = text_of("chart.css") + text_of("page.css")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'"
    head = {"generator": generator, "policy": policy, "style": Markup(style), "script": Markup(script)}
    return _environment().get_template(template).render(**head, **values)


def _strip(outcome: Outcome) -> tuple[str, str, list[tuple[str, str, str]]] | None:
    """Each node against the others, as a tag where one is slow, a sentence, and of the slowest each its difference, the
    class of its level and its host. None where fewer than two have a figure: there is nothing to compare.
    """
    found = against_others(outcome.by_node)
    if not found:
        return None
    slowest, fastest = (
        f"{node.host} at {node.tps:,.0f} ({percent(-100 * node.behind)})" for node in (found[0], found[-1])
    )
    parts = [f"{len(outcome.by_node)} nodes, slowest {slowest}, fastest {fastest}"]
    if silent := len(outcome.by_node) - len(found):
        parts.append(f"{silent} without a figure")
    if len(found) > MOST_NODES:
        parts.append(f"here the {MOST_NODES} slowest")
    slow = slow_nodes(outcome)
    cells = [(*cell(node), node.host) for node in found[:MOST_NODES]]
    return counted(len(slow), "slow node") if slow else "", ", ".join(parts), cells


def cell(node: Against | None) -> tuple[str, str]:
    """A node's difference to the others, and the class of its level."""
    return (percent(-100 * node.behind), f"h{_level(-100 * node.behind)}") if node else ("", "")


def _matrices(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Placed], list[tuple[str, list[Against | None]]]]]:
    """The nodes of one cluster's GPU type in several runs, the newest first: which were slow, and since when. A title,
    the runs, and each host with its place in every one, the slowest first.
    """
    measured = [(run, outcome) for run, outcome in enumerate(outcomes) if against_others(outcome.by_node)]
    matrices = []
    for (gpu, cluster), members in by(lambda placed: (placed[1].gpu, placed[1].cluster), measured).items():
        newest = sorted(members, key=lambda member: member[1].date, reverse=True)[:MOST_RUNS]
        found = [{node.host: node for node in against_others(outcome.by_node)} for _, outcome in newest]
        hosts = dict.fromkeys(host for one in found for host in one)
        rows = [(host, [one.get(host) for one in found]) for host in hosts]
        rows.sort(key=lambda row: -max(node.behind for node in row[1] if node))
        if len(newest) > 1:
            matrices.append((f"{gpu}, {cluster}" if cluster else gpu, newest, rows))
    return matrices


def _level(value: float) -> int:
    return sum(value > limit for limit in (-5, -2, -1, 1, 2, 5))


def _spans(outcome: Outcome) -> list[str]:
    """How long each phase of a run's start took, then the sum, which is a bound where one is not known; [] for none."""
    amounts = [getattr(outcome.startup, name) for name, _ in PHASES]
    known = [max(0.0, amount) for amount in amounts if drawable(amount)]
    spans = [duration(max(0.0, amount)) if drawable(amount) else "" for amount in amounts]
    total = ("" if len(known) == len(amounts) else "≥ ") + duration(sum(known))
    return [*spans, total] if known else []


def _hash(text: str) -> str:
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()


def text_of(name: str) -> str:
    """A file that travels beside this module."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(text_of),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
