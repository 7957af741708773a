"""The page's charts: which lines each has, its axes, what a screen reader says of it, and its data as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from launcher.report import svg
from launcher.report.figures import Line, Scaling, lines, scaling, with_series
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
    """Throughput, loss and scaling of the runs on `gpu`; those with nothing to draw are left out."""
    left_out = with_series(outcomes, gpu) - len(lines(outcomes, gpu, "loss"))
    found = (
        _over_steps(outcomes, gpu, "tps", f"throughput-{place}", left_out),
        _over_steps(outcomes, gpu, "loss", f"loss-{place}", left_out),
        _scaling(outcomes, published, gpu, f"scaling-{place}"),
    )
    return OfGpu(gpu, tuple(figure for figure in found if figure))


def _over_steps(
    outcomes: Sequence[Outcome], gpu: str, figure: str, ident: str, left_out: int
) -> Figure | None:
    found = [line for line in lines(outcomes, gpu, figure) if line.points]
    if not found:
        return None
    tps = figure == "tps"
    name = "Throughput" if tps else "Loss"
    values = [value for line in found for _, value in line.points]
    x = svg.linear((step for line in found for step, _ in line.points), "step", whole=True)
    y = svg.linear(values, "")
    drawn = [
        svg.Drawn(line.points, _css(line), str(line.number), f"{line.number} {line.name}{_mark(line)}",
                  dots=len(line.points) <= 40, run=line.run)
        for line in found
    ]  # fmt: skip
    notes = (
        ["Tokens/s per GPU of the leading node; step 1 is not shown, it pays for start-up."] if tps else []
    )
    if tps and y.low > 0:
        notes.append("The vertical axis does not start at 0.")
    if any(not line.complete for line in found):
        notes.append("Dashed: incomplete.")
    if any(math.isnan(value) for value in values):
        notes.append("A cross at the top: NaN or infinity at that step.")
    if left_out:
        notes.append(f"Only the first {len(found)} runs of the table are drawn, {left_out} are not.")
    title = f"{name} of {gpu}, tokens/s per GPU" if tps else f"{name} of {gpu}"
    about = f"{len(found)} lines over training steps, one per run. The same as numbers is in the table below."
    return Figure(
        ident,
        title,
        svg.chart(drawn, x, y, ident, title, about),
        tuple(
            Entry(svg.swatch(_css(line), str(line.number)), line.name + _mark(line), line.run)
            for line in found
        ),
        tuple(notes),
        ("Run", "Steps", "First", "Lowest", "Highest", "Last", "Not finite"),
        tuple(_summary(line, 0 if tps else 4) for line in found),
    )


def _css(line: Line) -> str:
    return f"c{(line.number - 1) % svg.COLOURS}" + ("" if line.complete else " part")


def _mark(line: Line) -> str:
    return "" if line.complete else " (incomplete)"


def _summary(line: Line, digits: int) -> tuple[str, ...]:
    finite = [value for _, value in line.points if not math.isnan(value)]
    steps = f"{line.points[0][0]:.0f} to {line.points[-1][0]:.0f}"
    some = (finite[0], min(finite), max(finite), finite[-1]) if finite else ()
    numbers = [svg.tick_text(value, digits) for value in some] or ["none"] * 4
    name = f"{line.number} {line.name}{_mark(line)}"
    return (name, steps, *numbers, str(len(line.points) - len(finite)))


def _scaling(
    outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str, ident: str
) -> Figure | None:
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
            behind.append(
                svg.Drawn(((start, group.ideal), (x.high, group.ideal)), f"{css} ideal", "", "ideal")
            )
        medians = tuple((float(gpus), tps) for gpus, tps in group.medians)
        (behind if group.published else drawn).append(
            svg.Drawn(medians, css, label if len(medians) > 1 else "", group.label, dots=group.published)
        )
        drawn += [
            svg.Drawn(((dot.gpus, dot.tps),), css, tip=f"{dot.name}: {dot.tps:,.0f}", joined=False, dots=True,
                      run=dot.run)
            for dot in group.dots if not group.published
        ]  # fmt: skip
        legend.append(Entry(svg.swatch(css, label), group.label))
    if with_ideal:
        legend.append(Entry(svg.swatch("ideal", ""), "ideal: the smallest size's rate, held"))
    y = svg.linear([dot.tps for group in groups for dot in group.dots], "")
    notes = ["A dot is a run's median tokens/s per GPU after warm-up; lines join sizes of like runs."]
    if y.low > 0:
        notes.append("The vertical axis does not start at 0.")
    if incomplete:
        notes.append(f"Left out as incomplete: {incomplete} {'run' if incomplete == 1 else 'runs'}.")
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
