"""One HTML page from runs: no server, no network, no file but itself. A pure function; nothing here reads a clock.

All text passes through jinja2's escaping, and control characters are replaced before it. The page's own policy
forbids every script and style but the two whose hashes it names, and everything from the network.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from launcher.base.output import counted, duration, plain
from launcher.report.charts import of_gpu
from launcher.report.figures import differences, gpu_types, slow_nodes
from launcher.report.health import answers, health
from launcher.report.table import TAGS, table
from launcher.results.columns import drawable, percent
from launcher.results.measure import against_others
from launcher.results.outcome import PHASES, Outcome

GENERATOR = "titan-launcher report"
MOST_NODES = 60  # in a strip
NEWEST_OPEN = 16  # runs whose node strips are unfolded, beside those with a slow node


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
    runs = health(outcomes, published)
    style, script = chart_style() + text_of("page.css"), text_of("page.js")
    return _template().render(
        generator=GENERATOR,
        made=made,
        version=version,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        outcomes=outcomes,
        incomplete=sum(not outcome.complete for outcome in outcomes),
        left_out=left_out,
        answers=answers(runs),
        tags=TAGS,
        table=table(runs, published),
        by_gpu=[(gpu, of_gpu(outcomes, published, gpu, place)) for place, gpu in enumerate(gpu_types(outcomes))],
        strips=list(filter(None, (_strip(run, outcome) for run, outcome in enumerate(outcomes)))),
        startups=_startups(outcomes),
        phases=[called.capitalize() for _, called in PHASES],
        differing=differing,
        shared=shared,
    )


@dataclass(frozen=True)
class Strip:
    """A run's nodes: the sentence about them, and of the slowest each its difference, host and class, which is its
    level 0 (slowest) to 6.
    """

    run: int
    name: str
    complete: bool
    opened: bool
    slow: str  # "1 slow node", where there is one
    summary: str
    cells: tuple[tuple[str, str, str], ...]


def _strip(run: int, outcome: Outcome) -> Strip | None:
    """Each node against the others; None where fewer than two have a figure: there is nothing to compare."""
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
    cells = tuple((percent(-100 * n.behind), n.host, f"h{_level(-100 * n.behind)}") for n in found[:MOST_NODES])
    slow = slow_nodes(outcome)
    tag = counted(len(slow), "slow node") if slow else ""
    return Strip(run, outcome.run, outcome.complete, run < NEWEST_OPEN or bool(slow), tag, ", ".join(parts), cells)


def _level(value: float) -> int:
    return sum(value > limit for limit in (-5, -2, -1, 1, 2, 5))


@dataclass(frozen=True)
class Start:
    """How long each phase of a run's start took, then the sum, which is a bound where a phase is not known."""

    run: int
    name: str
    complete: bool
    spans: tuple[str, ...]


def _startups(outcomes: Sequence[Outcome]) -> list[Start]:
    found = []
    for run, outcome in enumerate(outcomes):
        amounts = [getattr(outcome.startup, name) for name, _ in PHASES]
        known = [max(0.0, amount) for amount in amounts if drawable(amount)]
        if known:
            total = ("" if len(known) == len(amounts) else "≥ ") + duration(sum(known))
            spans = (duration(max(0.0, amount)) if drawable(amount) else "" for amount in amounts)
            found.append(Start(run, outcome.run, outcome.complete, (*spans, total)))
    return found


def _hash(text: str) -> str:
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()


def chart_style() -> str:
    """The CSS of a chart alone, which the page and a chart's own file share."""
    return text_of("chart.css")


def text_of(name: str) -> str:
    """A file that travels beside this module."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(text_of("page.html.j2"))
