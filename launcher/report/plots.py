"""The charts of the page as PNG and SVG files, for slides and reports. matplotlib is imported when they are asked for."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ExitStatus, LauncherError
from launcher.files import filesystem_error, write_bytes
from launcher.output import plain
from launcher.report.figures import gpu_types, lines, scaling
from launcher.results.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0060a8", "#b84a00", "#00734f", "#8a3ba0", "#806000", "#c2185b", "#00788a", "#5c5c5c")
NAMES = ("throughput", "loss", "scaling")
INCHES = (10.0, 4.6)  # of one GPU type's chart
DPI = 150


def require() -> None:
    """Raises LauncherError where matplotlib is not installed."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise LauncherError(
            f"plots need matplotlib, which cannot be imported: {error}",
            "pip install 'titan-launcher[report]', or leave --plots out: the page needs nothing",
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

    types = [gpu for gpu in gpu_types(outcomes) if _has(name, outcomes, published, gpu)]
    if not types:
        return None
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(types)), layout="constrained")
    for axes, gpu in zip(figure.subplots(len(types), squeeze=False)[:, 0], types, strict=True):
        if name == "scaling":
            _scaling(axes, outcomes, published, gpu)
        else:
            _over_steps(axes, outcomes, gpu, "tps" if name == "throughput" else "loss")
        axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
        for text in (*legend.get_texts(), axes.title):
            text.set_parse_math(False)  # a dollar in a name is a dollar
    return figure


def _has(name: str, outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str) -> bool:
    if name == "scaling":
        return bool(scaling(outcomes, published, gpu))
    figure = "tps" if name == "throughput" else "loss"
    return any(math.isfinite(y) for line in lines(outcomes, gpu, figure) for _, y in line.points)


def _over_steps(axes: Axes, outcomes: Sequence[Outcome], gpu: str, figure: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in lines(outcomes, gpu, figure):
        steps, values = [x for x, _ in line.points], [y for _, y in line.points]
        colour = COLOURS[(line.number - 1) % len(COLOURS)]
        dash, marker = "-" if line.complete else "--", "." if len(steps) <= 40 else ""
        label = f"{line.number} {plain(line.name)}" + ("" if line.complete else " (incomplete)")
        axes.plot(steps, values, dash, color=colour, marker=marker, label=_short(label))
        lost = [x for x, y in line.points if math.isnan(y)]
        if lost:
            top = axes.get_xaxis_transform()  # steps across, a share of the height up
            axes.plot(lost, [0.98] * len(lost), "x", color=colour, transform=top)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{plain(gpu)}: " + ("tokens/s per GPU, leading node" if figure == "tps" else "loss"), loc="left"
    )
    _plain_numbers(axes, 0 if figure == "tps" else None)


def _scaling(axes: Axes, outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str) -> None:
    groups = scaling(outcomes, published, gpu)
    sizes = sorted({dot.gpus for group in groups for dot in group.dots})
    number = 0
    for group in groups:
        number += not group.published
        colour = "#57606a" if group.published else COLOURS[(number - 1) % len(COLOURS)]
        counts, rates = zip(*group.medians, strict=True)
        axes.plot(counts, rates, "--" if group.published else "-", color=colour, label=_short(plain(group.label)),
                  marker="o", markerfacecolor="white" if group.published else colour, zorder=1 if group.published else 2)  # fmt: skip
        if not group.published:
            axes.plot([d.gpus for d in group.dots], [d.tps for d in group.dots], "o", color=colour)
        if len(group.medians) > 1 and (not group.published or all(g.published for g in groups)):
            axes.plot((counts[0], sizes[-1]), (group.ideal, group.ideal), ":", color=colour, label="ideal")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("GPUs (logarithmic)")
    axes.set_title(f"{plain(gpu)}: median tokens/s per GPU of complete runs", loc="left")
    _plain_numbers(axes, 0)


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
