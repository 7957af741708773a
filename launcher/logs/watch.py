"""Showing a run's progress: a bar on a terminal, one line per logged step anywhere else.

rich is imported only when a bar is drawn; a pipe or a log file gets plain ASCII lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from launcher.base.output import echo, plain
from launcher.config.mfu import mfu_text
from launcher.logs.follow import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType


DONE = "all steps are done; the job is ending, which takes minutes where nodes have containers to remove"


def watch(progress: Iterable[Progress], stream: TextIO, is_terminal: bool) -> Progress | None:
    """Shows snapshots until they end, and returns the last one, or None where nothing was ever logged."""
    return _watch_bar(progress, stream) if is_terminal else _watch_lines(progress, stream)


def plain_line(progress: Progress) -> str:
    """One snapshot as one line of plain text."""
    parts = [
        f"step {progress.step}/{progress.steps_total}",
        f"loss {progress.loss:.2f}",
        f"tps {progress.tps:,.0f}{_spread(progress)}",
    ]
    if progress.tflops is not None:
        parts.append(f"tflops {progress.tflops:,.2f}")
    parts.append(_mfu(progress))
    parts.append(_memory(progress))
    if progress.seconds_left is not None:
        parts.append(f"left {duration(progress.seconds_left)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A span of time for people: `45 s`, `3 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _watch_lines(progress: Iterable[Progress], stream: TextIO) -> Progress | None:
    last: Progress | None = None
    for snapshot in progress:
        # The same step comes again when another node's log shows it; a smaller one after a restart is news.
        if last is None or snapshot.step != last.step:
            echo(plain_line(snapshot), file=stream)
            if snapshot.step >= snapshot.steps_total:
                echo(DONE, file=stream)
        last = snapshot
    return last


def _watch_bar(progress: Iterable[Progress], stream: TextIO) -> Progress | None:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, force_terminal=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    last: Progress | None = None
    with Live(_panel(None), console=console, refresh_per_second=4) as live:
        for snapshot in progress:
            live.update(_panel(snapshot), refresh=last is None)
            last = snapshot
    return last


def _panel(progress: Progress | None) -> RenderableType:
    """The bar and what stands below it: three lines that fit 80 columns, and none that wraps on less."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if progress is None:
        return Text("waiting for the first step")
    left = "" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
        Text(f"step {progress.step}/{progress.steps_total}", style="bold"),
        ProgressBar(total=max(1, progress.steps_total), completed=progress.step),
        Text(left),
    )
    tflops = "" if progress.tflops is None else f"  {progress.tflops:,.2f} TFLOP/s"
    lines = [
        f"loss {progress.loss:.4f}  {progress.tps:,.0f} tokens/s per GPU{tflops}",
        f"{_mfu(progress)}  {_memory(progress)}",
    ]
    if len(progress.records) > 1:
        lines.append(f"tokens/s{_spread(progress)}")
    if progress.step >= progress.steps_total:
        lines.append(DONE)
    # Text, not markup: a node's name is not ours to trust.
    return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def _spread(progress: Progress) -> str:
    if len(progress.records) < 2:
        return ""
    logged = sum(1 for count in progress.records.values() if count)
    nodes = "nodes" if logged == len(progress.records) else f"{logged} of {len(progress.records)} nodes"
    return f" ({nodes} {progress.tps_min:,.0f}..{progress.tps_max:,.0f}, slowest {plain(progress.slowest_node)})"


def _mfu(progress: Progress) -> str:
    return f"mfu {mfu_text(progress.mfu_pct, progress.peak_tflops, unit='')}"


def _memory(progress: Progress) -> str:
    return f"memory {progress.memory_gib:.2f}GiB ({progress.memory_pct:.2f}%)"
