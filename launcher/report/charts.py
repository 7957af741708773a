"""The page's charts: which lines each has, its axes, what a screen reader says of it, and its data as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from markupsafe import Markup

from launcher.base.output import counted
from launcher.report import svg
from launcher.report.figures import MOST_LINES, Group, Line, grouped, lines, measured_by, scaling, trends, with_series
from launcher.results.accept import THRESHOLD
from launcher.results.outcome import Outcome, per_unit
from launcher.results.published import beside, called, publisher

LEAST = 3  # points: fewer are a sentence
MOST_LABELS = 12  # names beside a chart


@dataclass(frozen=True)
class Entry:
    """One line of a legend."""

    swatch: Markup
    text: str
    run: int | None = None
    link: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with what stands around it. `rows` are the data for those who cannot see the drawing."""

    ident: str
    title: str
    chart: Markup
    legend: tuple[Entry, ...]
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def of_gpu(outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str, place: int) -> list[Figure]:
    """Speed over time, throughput of each kind of run, loss and scaling on `gpu`; none where fewer than three points
    are to be drawn.
    """
    figures = []
    rate = per_unit("tokens/s per GPU", [outcome for outcome in outcomes if outcome.gpu == gpu])
    over_time, relative = trends(outcomes, published, gpu)
    if sum(len(group.dots) for group in over_time) >= LEAST:
        figures.append(_over_time(over_time, relative, f"trend-{place}", gpu, rate))
    rates, losses = (
        [line for line in lines(outcomes, gpu, name) if sum(math.isfinite(v) for _, v in line.points) >= LEAST]
        for name in ("tps", "loss")
    )
    drawn = {line.run: line for line in rates}
    kinds = grouped((line.run, outcomes[line.run]) for line in rates)
    left_out = len(with_series(outcomes, gpu)) - MOST_LINES
    for number, (label, members) in enumerate(kinds):
        title = f"Throughput of {gpu}, {f'{label}, ' if len(kinds) > 1 else ''}{rate}"
        rows = measured_by([outcome for _, outcome in members], published)
        more = f"Only the first {MOST_LINES} runs of the table on {gpu} are drawn over steps, {left_out} are not."
        figures.append(
            _over_steps([drawn[run] for run, _ in members], rows, f"throughput-{place}-{number}", title, rate)
        )
        if left_out > 0 and not number:
            figures[-1] = replace(figures[-1], notes=(*figures[-1].notes, more))
    if losses:
        figures.append(_over_steps(losses, [], f"loss-{place}", f"Loss of {gpu}"))
    groups = scaling(outcomes, beside(outcomes, published), gpu)
    if sum(len(group.dots) for group in groups) >= LEAST:
        incomplete = sum(outcome.gpu == gpu and not outcome.complete for outcome in outcomes)
        figures.append(_scaling(groups, incomplete, f"scaling-{place}", gpu, rate))
    return figures


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _short(labels: Sequence[str]) -> list[str]:
    """What tells the labels of a chart's lines apart."""
    parts = [label.split(", ") for label in labels]
    return [", ".join(one for one in own if not all(one in other for other in parts)) or "your runs" for own in parts]


def _over_time(groups: Sequence[Group], relative: bool, ident: str, gpu: str, rate: str) -> Figure:
    measure = "percent of published tokens/s" if relative else rate
    x = svg.days((dot.at for group in groups for dot in group.dots), "day of the run (UTC)")
    limits = (("published", 100.0), ("accept's limit", 100 * THRESHOLD)) if relative else ()
    return _of_groups(
        groups,
        x,
        (lambda day: f"{date.fromordinal(int(day))}", "{:.1f}%".format if relative else "{:,.0f}".format),
        (ident, f"Speed of {gpu} over time, {measure}"),
        ["A dot is a complete run; lines join like runs on as many nodes."],
        ("Runs", "Day", _capital(measure), "Of the first run's", "Run"),
        limits=limits,
    )


def _scaling(groups: Sequence[Group], incomplete: int, ident: str, gpu: str, rate: str) -> Figure:
    notes = [f"A dot is a run's median {rate} after warm-up; lines join sizes of like runs."]
    notes += [f"Left out as incomplete: {counted(incomplete, 'run')}."] if incomplete else []
    return _of_groups(
        groups,
        svg.counts([int(dot.at) for group in groups for dot in group.dots], "GPUs (logarithmic)"),
        ("{:,.0f} GPUs".format, "{:,.0f}".format),
        (ident, f"Scaling of {gpu}, {rate} over GPUs"),
        notes,
        ("Settings", "GPUs", _capital(rate), "Of the smallest size's", "Run"),
        ideal="ideal: the smallest size's rate, held",
    )


def _of_groups(
    groups: Sequence[Group],
    x: svg.Axis,
    said: tuple[Callable[[float], str], Callable[[float], str]],
    named: tuple[str, str],
    notes: Sequence[str],
    columns: tuple[str, ...],
    limits: Sequence[tuple[str, float]] = (),
    ideal: str = "",
) -> Figure:
    """A dot for each measurement, a line for each group. `said`: a place and a value in words; `named`: the chart's
    ident and title; `limits`: dashed lines; `ideal`: what the first value, held, is called.
    """
    behind = [svg.Drawn(((x.low, at), (x.high, at)), "published", name, name) for name, at in limits]
    drawn: list[svg.Drawn] = []  # our own runs are never hidden by published rows
    legend: list[Entry] = []
    rows: list[tuple[str, ...]] = []
    shorts = iter(_short([group.label for group in groups if not group.published]))
    for number, group in enumerate(groups):  # our own are the first
        start, first = group.medians[0]
        css = "published" if group.published else f"c{number % svg.COLOURS}"
        if group.published:
            behind.append(svg.Drawn(group.medians, css, "", group.label, dots=True))
        else:
            label, several = next(shorts), len(group.medians) > 1  # the median of two runs of one size is no run
            if several and ideal:
                behind.append(svg.Drawn(((start, first), (x.high, first)), f"{css} ideal", "", "ideal"))
            if several:
                drawn.append(svg.Drawn(group.medians, css, label, group.label))
            for place, dot in enumerate(group.dots):
                own, at = "" if several or place else label, ((dot.at, dot.value),)
                drawn.append(svg.Drawn(at, css, own, dot.name, joined=False, dots=True, run=dot.run))
        legend.append(Entry(svg.swatch(css), group.label))
        rows += [
            (group.label, said[0](dot.at), said[1](dot.value), f"{100 * dot.value / first:.1f}%", dot.name)
            for dot in group.dots
        ]
    if any("ideal" in one.css for one in behind):
        legend.append(Entry(svg.swatch("ideal"), ideal))
    y = svg.linear([value for one in (*behind, *drawn) for _, value in one.points], "")
    ours = sum(not group.published for group in groups)
    about = (
        f"{ours} groups of like runs and {len(groups) - ours} published ones. "
        "The same as numbers is in the table below."
    )
    chart = svg.chart([*behind, *drawn], x, y, lambda at, value: f"{said[0](at)}: {said[1](value)}", *named, about)
    shown = tuple(filter(None, (*notes, svg.not_from_zero(y))))
    return Figure(*named, chart, tuple(legend), shown, columns, tuple(rows))


def _over_steps(found: Sequence[Line], measures: Sequence[Outcome], ident: str, title: str, rate: str = "") -> Figure:
    """A line per run, the newest bold; behind them a dashed one for each published row that they are measured by.

    `rate`: what tokens/s are per; empty for a loss.
    """
    digits = 0 if rate else 4
    newest = max(found, key=lambda line: line.outcome.date)
    # A loss that explodes before it is NaN would press all others flat.
    starts = [next(value for _, value in line.points if not math.isnan(value)) for line in found]
    top = 2 * max(starts) if digits else math.inf
    drawn: list[svg.Drawn] = []
    legend: list[Entry] = []
    rows: list[tuple[str, ...]] = []
    for place, line in enumerate(found):
        name = line.outcome.run + ("" if line.outcome.complete else " (incomplete)")
        age = "" if len(found) == 1 else " new" if line is newest else " old"
        css = f"c{(line.number - 1) % svg.COLOURS}{age}" + ("" if line.outcome.complete else " part")
        points = tuple((step, value if math.isnan(value) or value <= top else math.inf) for step, value in line.points)
        label = line.outcome.run if place < MOST_LABELS else ""
        drawn.append(svg.Drawn(points, css, label, name, dots=len(points) <= 40, run=line.run))
        legend.append(Entry(svg.swatch(css), name, line.run))
        rows.append(_summary(name, line.points, digits))
    steps = [step for one in drawn for step, value in one.points if math.isfinite(value)]
    lost = [min((s for s, v in one.points if not math.isfinite(v)), default=0.0) for one in drawn]
    x = svg.linear([*steps, *filter(None, lost)], "step", whole=True)
    drawn = [replace(one, points=tuple(p for p in one.points if p[0] <= x.high)) for one in drawn]
    behind: list[svg.Drawn] = []
    for row in measures:
        tps = row.median_tps or math.nan
        text = f"{called(row)}: {tps:,.0f}"
        behind.append(svg.Drawn(((x.low, tps), (x.high, tps)), "published", f"published on {row.nodes}", called(row)))
        legend.append(Entry(svg.swatch("published"), text, link=publisher(row)["link"]))
        rows.append((text, f"{row.step or ''}", "", "", "", svg.tick_text(tps, 0), ""))
    values = [value for one in (*drawn, *behind) for _, value in one.points]
    y = svg.linear(values, "")
    notes = [f"{_capital(rate)} of the leading node; step 1 is not shown, it pays for start-up."] if rate else []
    notes += ["Bold: the newest run."] if len(found) > 1 else []
    notes += filter(None, [svg.not_from_zero(y)])
    if any(not line.outcome.complete for line in found):
        notes.append("Dashed: incomplete.")
    for outcome in (line.outcome for line in found):
        if ends := [f"{one.kept_step:,}" for one in outcome.attempts[:-1] if one.kept_step]:
            notes.append(f"{outcome.run} began anew after step {' and '.join(ends)}.")
    if not all(map(math.isfinite, values)):
        notes.append("A cross at the top: from that step on NaN, infinity, or more than the chart shows.")
    about = (
        f"{counted(len(found), 'line')} over training steps, one per run. The same as numbers is in the table below."
    )
    columns = ("Run", "Steps", "First", "Lowest", "Highest", "Last", "Not finite")

    def tell(step: float, value: float) -> str:
        if math.isfinite(value):
            return f"step {step:.0f}: {svg.tick_text(value, digits)}"
        return f"step {step:.0f}: {'not finite' if math.isnan(value) else 'off the chart'}"

    chart = svg.chart([*behind, *drawn], x, y, tell, ident, title, about)
    return Figure(ident, title, chart, tuple(legend), tuple(notes), columns, tuple(rows))


def _summary(name: str, points: Sequence[tuple[float, float]], digits: int) -> tuple[str, ...]:
    finite = [value for _, value in points if not math.isnan(value)]
    steps = f"{points[0][0]:.0f} to {points[-1][0]:.0f}"
    some = (finite[0], min(finite), max(finite), finite[-1]) if finite else ()
    numbers = [svg.tick_text(value, digits) for value in some] or ["none"] * 4
    return (name, steps, *numbers, str(len(points) - len(finite)))
