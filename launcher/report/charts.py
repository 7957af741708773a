"""The page's charts: which lines each has, its axes, what a screen reader says of it, and its data as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from launcher.base.output import counted
from launcher.report import svg
from launcher.report.figures import (
    Line,
    Scaling,
    kinds,
    lines,
    measured_by,
    percent,
    scaling,
    slow_node,
    with_series,
)
from launcher.results.accept import MAX_SPREAD
from launcher.results.outcome import Outcome


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


@dataclass(frozen=True)
class OfGpu:
    """The charts of one GPU type."""

    gpu: str
    figures: tuple[Figure, ...]


def of_gpu(outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str, place: int) -> OfGpu:
    """Throughput of each kind of run, loss and scaling on `gpu`; those with nothing to draw are left out."""
    rates, losses = lines(outcomes, gpu, "tps"), lines(outcomes, gpu, "loss")
    left_out = with_series(outcomes, gpu) - len(losses)
    drawn = {line.run for line in rates if line.points}
    groups = [kind for kind in kinds(outcomes, gpu) if drawn & set(kind.runs)]
    found: list[Figure | None] = [
        _throughput(
            [line for line in rates if line.run in kind.runs and line.points],
            outcomes,
            published,
            f"throughput-{place}-{number}",
            f"Throughput of {gpu}, {kind.label + ', ' if len(groups) > 1 else ''}tokens/s per GPU",
        )
        for number, kind in enumerate(groups)
    ]
    found += [_loss([line for line in losses if line.points], f"loss-{place}", f"Loss of {gpu}")]
    found += [_scaling(outcomes, published, gpu, f"scaling-{place}")]
    figures = [figure for figure in found if figure]
    if left_out and figures:
        more = f"Only the first {len(losses)} runs of the table on {gpu} are drawn over steps, {left_out} are not."
        figures[0] = replace(figures[0], notes=(*figures[0].notes, more))
    return OfGpu(gpu, tuple(figures))


def _throughput(
    found: Sequence[Line], outcomes: Sequence[Outcome], published: Sequence[Outcome], ident: str, title: str
) -> Figure:
    """Like runs with what they are measured by, and with each one's slow node, which the leading node does not show."""
    x = svg.linear((step for line in found for step, _ in line.points), "step", whole=True)
    measures = [
        (f"P{row.nodes}", f"published on {counted(row.nodes, 'node')} ({row.source})", row)
        for row in measured_by([outcomes[line.run] for line in found], published)
    ]
    behind: list[svg.Drawn] = []
    legend: list[Entry] = []
    rows: list[tuple[str, ...]] = []
    for label, text, row in measures:
        rate = row.median_tps or math.nan
        behind.append(svg.Drawn(((x.low, rate), (x.high, rate)), "published", label, f"{text}: {rate:,.0f}"))
        legend.append(Entry(svg.swatch("published", label), f"{text}: {rate:,.0f}"))
        rows.append((text, f"{row.step}", "", "", "", svg.tick_text(rate, 0), ""))
    slow = []
    for line in found:
        known = slow_node(outcomes[line.run])
        if known is None or not known[1]:
            continue
        node, points = known
        text = f"thin: {node.host}, {percent(node.percent)}"
        legend.append(Entry(svg.swatch(f"{_css(line)} thin", str(line.number)), text, line.run))
        slow.append(svg.Drawn(points, f"{_css(line)} thin", "", f"{line.number}, {text}", run=line.run))
        rows.append(_summary(f"{line.number} {line.name}: slow node {node.host}", points, 0))
    notes = ["Tokens/s per GPU of the leading node; step 1 is not shown, it pays for start-up."]
    notes += [f"Thin: a node more than {100 * MAX_SPREAD:g}% below the others."] if slow else []
    return _over_steps(found, x, [*behind, *slow], ident, title, legend, rows, notes, 0)


def _loss(found: Sequence[Line], ident: str, title: str) -> Figure | None:
    if not found:
        return None
    x = svg.linear((step for line in found for step, _ in line.points), "step", whole=True)
    return _over_steps(found, x, [], ident, title, [], [], [], 4)


def _over_steps(
    found: Sequence[Line],
    x: svg.Axis,
    others: Sequence[svg.Drawn],
    ident: str,
    title: str,
    legend: Sequence[Entry],
    rows: Sequence[tuple[str, ...]],
    notes: Sequence[str],
    digits: int,
) -> Figure:
    """A line per run; `others`, `legend`, `rows` and `notes` are what the figure has beside them."""
    drawn = [
        svg.Drawn(
            line.points,
            _css(line),
            str(line.number),
            f"{line.number} {line.name}{_mark(line)}",
            dots=len(line.points) <= 40,
            run=line.run,
        )
        for line in found
    ]
    values = [value for line in (*drawn, *others) for _, value in line.points]
    y = svg.linear(values, "")
    said = [*notes, svg.not_from_zero(y)]
    if any(not line.complete for line in found):
        said.append("Dashed: incomplete.")
    if any(math.isnan(value) for value in values):
        said.append("A cross at the top: NaN or infinity at that step.")
    about = f"{len(found)} lines over training steps, one per run. The same as numbers is in the table below."
    own = [Entry(svg.swatch(_css(one), str(one.number)), one.name + _mark(one), one.run) for one in found]
    numbers = [_summary(f"{one.number} {one.name}{_mark(one)}", one.points, digits) for one in found]
    return Figure(
        ident,
        title,
        svg.chart([*others, *drawn], x, y, ident, title, about),
        (*own, *legend),
        tuple(filter(None, said)),
        ("Run", "Steps", "First", "Lowest", "Highest", "Last", "Not finite"),
        (*numbers, *rows),
    )


def _css(line: Line) -> str:
    return f"c{(line.number - 1) % svg.COLOURS}" + ("" if line.complete else " part")


def _mark(line: Line) -> str:
    return "" if line.complete else " (incomplete)"


def _summary(name: str, points: Sequence[tuple[float, float]], digits: int) -> tuple[str, ...]:
    finite = [value for _, value in points if not math.isnan(value)]
    steps = f"{points[0][0]:.0f} to {points[-1][0]:.0f}"
    some = (finite[0], min(finite), max(finite), finite[-1]) if finite else ()
    numbers = [svg.tick_text(value, digits) for value in some] or ["none"] * 4
    return (name, steps, *numbers, str(len(points) - len(finite)))


def _scaling(outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str, ident: str) -> Figure | None:
    groups = scaling(outcomes, published, gpu)
    ours = [group for group in groups if not group.published]
    incomplete = sum(outcome.gpu == gpu and not outcome.complete for outcome in outcomes)
    if not groups:
        return None
    # Ideal lines of our own runs; where those have one size only, the published rows' show what to expect.
    growing = [group for group in ours if len(group.medians) > 1]
    with_ideal = growing or [group for group in groups if len(group.medians) > 1]
    sizes = [dot.gpus for group in groups for dot in group.dots]
    x = svg.counts(sizes, "GPUs (logarithmic)")
    behind: list[svg.Drawn] = []  # our own runs are never hidden by published rows
    drawn: list[svg.Drawn] = []
    legend = []
    number = 0
    for group in groups:
        number += not group.published
        css = _scaling_css(group, number)
        label = "" if group.published else str(number)
        if group in with_ideal:
            start = group.medians[0][0]
            behind.append(svg.Drawn(((start, group.ideal), (x.high, group.ideal)), f"{css} ideal", "", "ideal"))
        medians = tuple((float(gpus), tps) for gpus, tps in group.medians)
        joined = len(medians) > 1 or group.published  # the median of two runs of one size is no run
        if joined:
            (behind if group.published else drawn).append(
                svg.Drawn(medians, css, label, group.label, dots=group.published)
            )
        drawn += [
            svg.Drawn(
                ((dot.gpus, dot.tps),),
                css,
                "" if joined or place else label,
                f"{dot.name}: {dot.tps:,.0f}",
                joined=False,
                dots=True,
                run=dot.run,
            )
            for place, dot in enumerate(group.dots)
            if not group.published
        ]
        legend.append(Entry(svg.swatch(css, label), group.label))
    if with_ideal:
        legend.append(Entry(svg.swatch("ideal", ""), "ideal: the smallest size's rate, held"))
    y = svg.linear([dot.tps for group in groups for dot in group.dots], "")
    notes = ["A dot is a run's median tokens/s per GPU after warm-up; lines join sizes of like runs."]
    notes += filter(None, [svg.not_from_zero(y)])
    if incomplete:
        notes.append(f"Left out as incomplete: {counted(incomplete, 'run')}.")
    title = f"Scaling of {gpu}, tokens/s per GPU over GPUs"
    about = (
        f"{len(ours)} groups of like runs and {len(groups) - len(ours)} published ones. "
        "The same as numbers is in the table below."
    )
    rows = tuple(
        (group.label, f"{dot.gpus:,}", f"{dot.tps:,.0f}", f"{100 * dot.tps / group.ideal:.1f}%", dot.name)
        for group in groups
        for dot in group.dots
    )
    columns = ("Settings", "GPUs", "Tokens/s per GPU", "Of the smallest size's", "Run")
    chart = svg.chart([*behind, *drawn], x, y, ident, title, about)
    return Figure(ident, title, chart, tuple(legend), tuple(notes), columns, rows)


def _scaling_css(group: Scaling, number: int) -> str:
    return "published" if group.published else f"c{(number - 1) % svg.COLOURS}"
