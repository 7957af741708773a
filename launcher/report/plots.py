"""The charts of the page as PNG and SVG files, for slides and reports. matplotlib is imported when they are asked for."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.base.files import filesystem_error, write_bytes
from launcher.base.output import plain
from launcher.report.figures import (
    Line,
    Scaling,
    gpu_types,
    kinds,
    lines,
    measured_by,
    percent,
    scaling,
    slow_node,
)
from launcher.report.svg import spread_out
from launcher.results.outcome import Outcome

COLOURS = ("#0060a8", "#b84a00", "#00734f", "#8a3ba0", "#806000", "#c2185b", "#00788a", "#5c5c5c")
GREY = "#57606a"  # of what was published
NAMES = ("throughput", "loss", "scaling")
INCHES = (10.0, 4.6)  # of one GPU type's chart
DPI = 150
LABEL_GAP = 0.038  # between the numbers at the ends of lines, as a share of a chart's height
End = tuple[float, float, str, str]  # of a line: where it ends, what is written there, in which colour


def require() -> None:
    """Raises LauncherError where matplotlib is not installed."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise LauncherError(
            f"plots need matplotlib, which cannot be imported: {error}",
            f"{install('report')}, or leave --plots out: the page needs nothing",
            status=ExitStatus.ERROR,
        ) from error


def write_plots(outcomes: Sequence[Outcome], published: Sequence[Outcome], folder: Path) -> list[Path]:
    """Writes NAME.png and NAME.svg for each of NAMES that has something to show, one chart per GPU type.

    Returns the files. Raises LauncherError when they cannot be written, or matplotlib is missing.
    """
    require()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise filesystem_error(folder, error) from error
    written = []
    for name in NAMES:
        figure = _figure(name, outcomes, published)
        if figure is None:
            continue
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            write_bytes(path, _rendered(figure, kind))
            written.append(path)
    return written


def _figure(name: str, outcomes: Sequence[Outcome], published: Sequence[Outcome]) -> Figure | None:
    from matplotlib.figure import Figure

    charts = [chart for gpu in gpu_types(outcomes) for chart in _charts(name, outcomes, published, gpu)]
    if not charts:
        return None
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(charts)), layout="constrained")
    for axes, draw in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        ends = draw(axes)
        axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        _number_ends(axes, ends)
        if axes.get_ylim()[0] > 0:
            axes.set_ylabel("the axis does not start at 0", fontsize=8, color=GREY)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.06, 1.0), frameon=False, fontsize=8)
        for text in (*legend.get_texts(), axes.title):
            text.set_parse_math(False)  # a dollar in a name is a dollar
    return figure


def _charts(
    name: str, outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str
) -> list[Callable[[Axes], list[End]]]:
    """What draws each chart of one GPU type: throughput has one for each kind of run, as the page has."""
    if name == "scaling":
        groups = scaling(outcomes, published, gpu)
        return [lambda axes: _scaling(axes, groups, gpu)] if groups else []
    found = [line for line in lines(outcomes, gpu, "tps" if name == "throughput" else "loss") if _finite(line)]
    if name == "loss":
        return [lambda axes: _over_steps(axes, found, f"{plain(gpu)}: loss")] if found else []
    groups_of_lines = [(kind.label, [line for line in found if line.run in kind.runs]) for kind in kinds(outcomes, gpu)]
    return [
        partial(
            _throughput, found=members, outcomes=outcomes, published=published, title=f"{plain(gpu)}, {plain(label)}"
        )
        for label, members in groups_of_lines
        if members
    ]


def _finite(line: Line) -> bool:
    return any(math.isfinite(value) for _, value in line.points)


def _throughput(
    axes: Axes, found: Sequence[Line], outcomes: Sequence[Outcome], published: Sequence[Outcome], title: str
) -> list[End]:
    ends = _over_steps(axes, found, f"{title}: tokens/s per GPU, leading node")
    for line in found:
        known = slow_node(outcomes[line.run])
        if known and known[1]:
            node, points = known
            steps, values = zip(*points, strict=True)
            label = f"{line.number} thin: {plain(node.host)}, {percent(node.percent)}"
            axes.plot(steps, values, "-", color=_colour(line.number), linewidth=0.7, label=_short(label))
    for row in measured_by([outcomes[line.run] for line in found], published):
        rate = row.tps.median if row.tps else math.nan
        nodes = f"{row.nodes} node{'s' if row.nodes > 1 else ''}"
        axes.axhline(
            rate,
            color=GREY,
            linestyle=(0, (6, 3)),
            linewidth=1,
            zorder=1,
            label=_short(f"P{row.nodes} published on {nodes}: {rate:,.0f}"),
        )
        ends.append((max(line.points[-1][0] for line in found), rate, f"P{row.nodes}", GREY))
    _plain_numbers(axes, 0)
    return ends


def _over_steps(axes: Axes, found: Sequence[Line], title: str) -> list[End]:
    from matplotlib.ticker import MaxNLocator

    ends = []
    for line in found:
        steps, values = [x for x, _ in line.points], [y for _, y in line.points]
        colour = _colour(line.number)
        dash, marker = "-" if line.complete else "--", "." if len(steps) <= 40 else ""
        label = f"{line.number} {plain(line.name)}" + ("" if line.complete else " (incomplete)")
        axes.plot(steps, values, dash, color=colour, marker=marker, label=_short(label))
        end = next((x, y) for x, y in reversed(line.points) if math.isfinite(y))
        ends.append((*end, str(line.number), colour))
        lost = [x for x, y in line.points if math.isnan(y)]
        if lost:
            top = axes.get_xaxis_transform()  # steps across, a share of the height up
            axes.plot(lost, [0.98] * len(lost), "x", color=colour, transform=top)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left")
    return ends


def _scaling(axes: Axes, groups: Sequence[Scaling], gpu: str) -> list[End]:
    sizes = sorted({dot.gpus for group in groups for dot in group.dots})
    ends, number = [], 0
    for group in groups:
        number += not group.published
        colour = GREY if group.published else _colour(number)
        label = _short(plain(group.label) if group.published else f"{number} {plain(group.label)}")
        counts, rates = zip(*group.medians, strict=True)
        if group.published:
            axes.plot(counts, rates, "--", color=colour, label=label, marker="o", markerfacecolor="white", zorder=1)
        else:  # a dot is a run: the line through the medians has none of its own
            axes.plot(counts, rates, "-", color=colour, label=label)
            axes.plot([d.gpus for d in group.dots], [d.tps for d in group.dots], "o", color=colour)
            ends.append((float(counts[-1]), rates[-1], str(number), colour))
        if len(group.medians) > 1 and (not group.published or all(g.published for g in groups)):
            axes.plot((counts[0], sizes[-1]), (group.ideal, group.ideal), ":", color=colour, label="ideal")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("GPUs (logarithmic)")
    axes.set_title(f"{plain(gpu)}: median tokens/s per GPU of complete runs", loc="left")
    _plain_numbers(axes, 0)
    return ends


def _number_ends(axes: Axes, ends: Sequence[End]) -> None:
    """The lines' numbers at their ends, as on the page: there are more lines than colours."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    across = axes.transScale + axes.transLimits
    at_right = [end for end in ends if across.transform(end[:2])[0] > 0.9]
    heights = spread_out([(y - low) / (high - low) for _, y, _, _ in at_right], LABEL_GAP, 0.0, 1.0)
    for (x, y, label, colour), height in zip(at_right, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            (1.02, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            fontweight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "relpos": (0, 0.5)},
        )
    for x, y, label, colour in ends:
        if (x, y, label, colour) not in at_right:
            axes.annotate(
                label, (x, y), (5, 3), textcoords="offset points", color=colour, fontsize=8, fontweight="bold"
            )


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


def _plain_numbers(axes: Axes, digits: int | None) -> None:
    from matplotlib.ticker import FuncFormatter

    if digits is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.{digits}f}"))


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:47]}…"


def _rendered(figure: Figure, kind: str) -> bytes:
    import matplotlib

    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    stream = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "titan"}):
        warnings.simplefilter("ignore")  # a name in a script that the font lacks
        figure.savefig(stream, format=kind, dpi=DPI, metadata=metadata)
    return stream.getvalue()
