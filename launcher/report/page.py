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
from launcher.report import charts, svg
from launcher.report.figures import Heat, NodeCell, differences, drawable, gpu_types, percent
from launcher.report.health import answers, health
from launcher.report.table import TAGS, Cell, table
from launcher.results.outcome import PHASES, Outcome, Startup

GENERATOR = "titan-launcher report"
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
    types = gpu_types(outcomes)
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
        by_gpu=[charts.of_gpu(outcomes, published, gpu, place) for place, gpu in enumerate(types)],
        strips=[_strip(run.place, run.outcome, run.nodes) for run in runs if run.nodes],
        startups=_startups(outcomes),
        phases=[(css, called.capitalize()) for css, called in PHASES],
        differences=differences(outcomes),
    )


@dataclass(frozen=True)
class Strip:
    """A run's nodes: the sentence about them and the cells, each with its level 0 (slowest) to 6."""

    run: int
    name: str
    complete: bool
    opened: bool
    slow: str  # "slow node", where there is one
    summary: str
    cells: tuple[tuple[NodeCell, str, str], ...]  # with its text and its class
    rest: str


def _strip(run: int, outcome: Outcome, found: Heat) -> Strip:
    def at(cell: NodeCell) -> str:
        return f"{cell.host} at {cell.tps:,.0f} ({percent(cell.percent)})"

    summary = (
        f"{len(outcome.by_node)} nodes, median {found.median:,.0f}, slowest {at(found.slowest)}, fastest "
        f"{at(found.fastest)}"
    )
    if found.silent:
        summary += f", {found.silent} without a figure"
    rest = ""
    if found.others:
        low, high = percent(found.others[0].percent), percent(found.others[-1].percent)
        rest = (
            f"The {len(found.cells)} slowest nodes, slowest first. The other {len(found.others)} lie between "
            f"{low} and {high}."
        )
    cells = tuple((cell, percent(cell.percent), f"h{_level(cell.percent)}") for cell in found.cells)
    slow = "slow node" if len(found.slow) == 1 else counted(len(found.slow), "slow node") if found.slow else ""
    opened = run < NEWEST_OPEN or bool(slow)
    return Strip(run, outcome.run, outcome.complete, opened, slow, summary, cells, rest)


def _level(value: float | None) -> str:
    if value is None:
        return "-none"
    return str(sum(value > limit for limit in (-5, -2, -1, 1, 2, 5)))


@dataclass(frozen=True)
class Start:
    run: int
    name: str
    complete: bool
    numbers: tuple[Cell, ...]  # one per phase, then the sum
    bar: Markup
    cut: bool  # the queue's part is drawn shorter than it was


def _startups(outcomes: Sequence[Outcome]) -> list[Start]:
    """Bars share a scale. A queue of hours would leave nothing of the rest, so no bar's queue is longer than the
    longest rest.
    """
    own = [_rest(outcome.startup) for outcome in outcomes]
    longest = max(own, default=0.0) or max((_seconds_of(o.startup, "queue_s") or 0.0 for o in outcomes), default=0.0)
    scale = max(
        (min(_seconds_of(o.startup, "queue_s") or 0.0, longest) + rest for o, rest in zip(outcomes, own, strict=True)),
        default=0.0,
    )
    found = []
    for run, outcome in enumerate(outcomes):
        amounts = [_seconds_of(outcome.startup, name) for name, _ in PHASES]
        if all(amount is None for amount in amounts):
            continue
        queue = amounts[0] or 0.0
        parts = [(name, min(amount or 0.0, longest)) for (name, _), amount in zip(PHASES, amounts, strict=True)]
        cut = queue > longest
        if cut:
            parts[0] = ("queue_s cut", longest)
        known = [amount for amount in amounts if amount is not None]
        total = Cell(("" if len(known) == len(amounts) else "≥ ") + duration(sum(known)), sum(known))
        numbers = tuple(Cell("" if a is None else duration(a), a) for a in amounts)
        found.append(Start(run, outcome.run, outcome.complete, (*numbers, total), svg.bar(parts, scale), cut))
    return found


def _seconds_of(startup: Startup, name: str) -> float | None:
    value: float | None = getattr(startup, name)
    return max(0.0, value) if value is not None and drawable(value) else None


def _rest(startup: Startup) -> float:
    return sum(_seconds_of(startup, name) or 0.0 for name, _ in PHASES[1:])


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
