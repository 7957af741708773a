"""What is printed, and how: colour only on terminals, nothing that drives one, JSON, errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.secret import MOST, masked

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def clock(at_s: float) -> str:
    """Seconds since 1970 as this machine's date and time of day."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))
    except (OSError, OverflowError, ValueError):  # a damaged record
        return "?"


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()  # None: closed by the caller, as in `launcher ... <&-`


def terminal_width() -> int:
    """Columns of the terminal that stdout is; 0 for a pipe or a file."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 0


def columns(rows: Sequence[Sequence[str]], left: int = 99, width: int = 0) -> list[str]:
    """Side by side, each as wide as it needs: `left` of them to the left, then figures to the right; the last as it
    is. Where they are wider than `width`, the first, which is a name, loses its middle.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    over = sum(widths) + 2 * (len(widths) - 1 - (widths[-1] == 0)) - width
    if width and over > 0:
        most = max(12, widths[0] - over)
        rows = [(shortened(first, most), *others) for first, *others in rows]
        widths[0] = min(widths[0], most)
    widths[-1] = 0
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shortened(text: str, most: int) -> str:
    """With its beginning and its end, which tell names of runs apart."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"


def counted(number: int, what: str) -> str:
    """`1 node`, `1,024 nodes`"""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(nodes: int, each: int, gpu: str, on_cpu: bool = False) -> str:
    """`9 nodes x 4 GB200`; on CPUs the processes are no GPUs: `1 node x 2 CPU ranks`"""
    return f"{counted(nodes, 'node')} x {counted(each, f'{gpu} rank') if on_cpu else f'{each} {gpu}'}"


def duration(seconds: float) -> str:
    """A span for people: `0.4 s`, `38 s`, `2 min 05 s`, `3 h 12 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def plain(text: str) -> str:
    """Words of other programs and of files on one line, without what could drive a terminal, reorder or hide text."""
    return "".join(c if c.isprintable() else "?" for c in text)


_OURS = os.urandom(8).hex()  # begins each of our colours: what was written elsewhere cannot hold it


def style(text: str, **how: Any) -> str:
    """`text` in a colour that `echo` lets through; that of any other text is cleaned away."""
    return click.style(plain(text), **how).replace("\x1b", _OURS)


def echo(*lines: str, **where: Any) -> None:
    """Everything that people read is printed here. Each line stays one, whatever a name or a message in it holds."""
    text = "\n".join(plain(line.expandtabs()) for line in lines).replace(_OURS, "\x1b")
    click.echo(text, color=False if os.environ.get("NO_COLOR") else None, **where)  # None: by the terminal


def echo_file(text: str) -> None:
    """What is meant for a file reaches a pipe unchanged; on a terminal it is text like any other."""
    if is_terminal(sys.stdout):
        echo(*text.split("\n"), nl=False)
    else:
        click.echo(text, nl=False)


def never_fail(*streams: Any) -> None:
    """What a stream's encoding lacks is written as an escape; a stream of a test's own is left alone."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any, indent: int | None = 2) -> None:
    """In ASCII: nothing in it drives a terminal, and no stream's encoding can break it."""
    click.echo(json.dumps(value, indent=indent))


def say(line: str) -> None:
    """What is going on, for people: results go to standard output, this does not."""
    echo(line, err=True)


def warn(text: str) -> None:
    echo(f"{style('warning:', fg='yellow')} {text}", err=True)


def print_error(error: LauncherError) -> None:
    echo(f"{style('error:', fg='red')} {masked(error.what)} [{error.code}]", err=True)
    if error.original:
        lines = (
            line if len(line) <= WIDEST else f"{line[:WIDEST]}…" for line in error.original[:MOST].splitlines()[:20]
        )
        echo(*(f"  | {masked(line)}" for line in lines), err=True)
    if error.fix:
        echo(f"  {style('try:', fg='green')} {masked(error.fix)}", err=True)


def confirm(question: str, err: bool = False, otherwise: str = "nothing was submitted") -> None:
    """Asks on the terminal, and ends the program where the answer is no."""
    if not click.confirm(plain(question), default=True, err=err):
        echo(otherwise, err=True)
        sys.exit(ExitStatus.ERROR)


WIDEST = 1000  # characters of a line that another program wrote
SHOWN = 3  # names in a message


def some(names: Sequence[str], most: int = SHOWN, between: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
