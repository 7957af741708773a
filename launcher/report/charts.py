"""The page's charts: which lines each has, its axes, what a screen reader says of it, and its data as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from launcher.base.output import counted
from launcher.report import svg
from launcher.report.figures import MOST_LINES, Line, Scaling, grouped, lines, measured_by, scaling, with_series
from launcher.results.outcome import Outcome
from launcher.results.published import beside


@dataclass(frozen=True)
class Entry:
    """One line of a legend."""

    swatch: Markup
    text: str
    run: int | None = None


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
    """Throughput of each kind of run, loss and scaling on `gpu`; those with nothing to draw are left out."""
    rates, losses = lines(outcomes, gpu, "tps"), lines(outcomes, gpu, "loss")
    drawn = {line.run: line for line in rates}
    kinds = grouped((line.run, outcomes[line.run]) for line in rates)
    figures = []
    for number, (label, members) in enumerate(kinds):
        title = f"Throughput of {gpu}, {f'{label}, ' if len(kinds) > 1 else ''}tokens/s per GPU"
        rows = measured_by([outcome for _, outcome in members], published)
        figures.append(_over_steps([drawn[run] for run, _ in members], rows, f"throughput-{place}-{number}", title, 0))
    if losses:
        figures.append(_over_steps(losses, [], f"loss-{place}", f"Loss of {gpu}", 4))
    if groups := scaling(outcomes, beside(outcomes, published), gpu):
        incomplete = sum(outcome.gpu == gpu and not outcome.complete for outcome in outcomes)
        figures.append(_scaling(groups, incomplete, f"scaling-{place}", gpu))
    left_out = len(with_series(outcomes, gpu)) - MOST_LINES
    if left_out > 0 and figures:
        more = f"Only the first {MOST_LINES} runs of the table on {gpu} are drawn over steps, {left_out} are not."
        figures[0] = replace(figures[0], notes=(*figures[0].notes, more))
    return figures


def _over_steps(found: Sequence[Line], measures: Sequence[Outcome], ident: str, title: str, digits: int) -> Figure:
    """A line per run, behind them a dashed one for each published row that they are measured by."""
    x = svg.linear((step for line in found for step, _ in line.points), "step", whole=True)
    drawn: list[svg.Drawn] = []
    legend: list[Entry] = []
    rows: list[tuple[str, ...]] = []
    for line in found:
        name = line.name + ("" if line.complete else " (incomplete)")
        css = f"c{(line.number - 1) % svg.COLOURS}" + ("" if line.complete else " part")
        numbered = f"{line.number} {name}"
        dots = len(line.points) <= 40
        drawn.append(svg.Drawn(line.points, css, str(line.number), numbered, dots=dots, run=line.run))
        legend.append(Entry(svg.swatch(css, str(line.number)), name, line.run))
        rows.append(_summary(numbered, line.points, digits))
    behind: list[svg.Drawn] = []
    for row in measures:
        rate, label = row.median_tps or math.nan, f"P{row.nodes}"
        text = f"published on {counted(row.nodes, 'node')} ({row.source}): {rate:,.0f}"
        behind.append(svg.Drawn(((x.low, rate), (x.high, rate)), "published", label, text))
        legend.append(Entry(svg.swatch("published", label), text))
        rows.append((text, f"{row.step or ''}", "", "", "", svg.tick_text(rate, 0), ""))
    values = [value for one in (*drawn, *behind) for _, value in one.points]
    y = svg.linear(values, "")
    notes = ["Tokens/s per GPU of the leading node; step 1 is not shown, it pays for start-up."] if not digits else []
    notes += filter(None, [svg.not_from_zero(y)])
    if any(not line.complete for line in found):
        notes.append("Dashed: incomplete.")
    if any(math.isnan(value) for value in values):
        notes.append("A cross at the top: NaN or infinity at that step.")
    about = f"{len(found)} lines over training steps, one per run. The same as numbers is in the table below."
    columns = ("Run", "Steps", "First", "Lowest", "Highest", "Last", "Not finite")
    chart = svg.chart([*behind, *drawn], x, y, ident, title, about)
    return Figure(ident, title, chart, tuple(legend), tuple(notes), columns, tuple(rows))


def _summary(name: str, points: Sequence[tuple[float, float]], digits: int) -> tuple[str, ...]:
    finite = [value for _, value in points if not math.isnan(value)]
    steps = f"{points[0][0]:.0f} to {points[-1][0]:.0f}"
    some = (finite[0], min(finite), max(finite), finite[-1]) if finite else ()
    numbers = [svg.tick_text(value, digits) for value in some] or ["none"] * 4
    return (name, steps, *numbers, str(len(points) - len(finite)))


def _scaling(groups: Sequence[Scaling], incomplete: int, ident: str, gpu: str) -> Figure:
    x = svg.counts([dot.gpus for group in groups for dot in group.dots], "GPUs (logarithmic)")
    y = svg.linear([dot.tps for group in groups for dot in group.dots], "")
    behind: list[svg.Drawn] = []  # our own runs are never hidden by published rows
    drawn: list[svg.Drawn] = []
    legend: list[Entry] = []
    rows: list[tuple[str, ...]] = []
    for number, group in enumerate(groups, 1):  # our own are the first
        medians = tuple((float(gpus), tps) for gpus, tps in group.medians)
        start, ideal = medians[0]
        css, label = f"c{(number - 1) % svg.COLOURS}", str(number)
        if group.published:
            css, label = "published", ""
            behind.append(svg.Drawn(medians, css, "", group.label, dots=True))
        else:
            several = len(medians) > 1  # the median of two runs of one size is no run
            if several:
                behind.append(svg.Drawn(((start, ideal), (x.high, ideal)), f"{css} ideal", "", "ideal"))
                drawn.append(svg.Drawn(medians, css, label, group.label))
            for place, dot in enumerate(group.dots):
                own = "" if several or place else label
                tip = f"{dot.name}: {dot.tps:,.0f}"
                drawn.append(svg.Drawn(((dot.gpus, dot.tps),), css, own, tip, joined=False, dots=True, run=dot.run))
        legend.append(Entry(svg.swatch(css, label), group.label))
        rows += [
            (group.label, f"{dot.gpus:,}", f"{dot.tps:,.0f}", f"{100 * dot.tps / ideal:.1f}%", dot.name)
            for dot in group.dots
        ]
    if any("ideal" in one.css for one in behind):
        legend.append(Entry(svg.swatch("ideal", ""), "ideal: the smallest size's rate, held"))
    notes = ["A dot is a run's median tokens/s per GPU after warm-up; lines join sizes of like runs."]
    notes += filter(None, [svg.not_from_zero(y)])
    if incomplete:
        notes.append(f"Left out as incomplete: {counted(incomplete, 'run')}.")
    title = f"Scaling of {gpu}, tokens/s per GPU over GPUs"
    ours = sum(not group.published for group in groups)
    about = (
        f"{ours} groups of like runs and {len(groups) - ours} published ones. "
        "The same as numbers is in the table below."
    )
    columns = ("Settings", "GPUs", "Tokens/s per GPU", "Of the smallest size's", "Run")
    chart = svg.chart([*behind, *drawn], x, y, ident, title, about)
    return Figure(ident, title, chart, tuple(legend), tuple(notes), columns, tuple(rows))
