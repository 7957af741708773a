"""What is printed, and how: colour only on terminals, nothing that drives one, JSON, errors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from launcher.errors import LauncherError
from launcher.secret import masked

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class ReaderGone(Exception):
    """Whoever read what is printed has gone, as in `launcher logs | head`."""


class PipedGroup(click.Group):
    """A group out of which a broken pipe comes as ReaderGone: click itself makes exit code 1 of it."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _pipe_may_break():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        with _pipe_may_break():
            return super().invoke(context)


@contextmanager
def _pipe_may_break() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGone from error


def age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def clock(at_s: float) -> str:
    """Seconds since 1970 as this machine's date and time of day."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def colour() -> bool | None:
    """None lets click decide by the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()  # None: closed by the caller, as in `launcher ... <&-`


def columns(rows: Sequence[Sequence[str]], left: int = 99) -> list[str]:
    """Side by side, each as wide as it needs: `left` of them to the left, then figures to the right; the last as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plain(text: str) -> str:
    """Words of other programs and of files, without what could drive a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def json_line(value: Any) -> None:
    import json

    click.echo(json.dumps(value, ensure_ascii=False))


def warn(text: str) -> None:
    click.echo(f"{click.style('warning:', fg='yellow')} {text}", err=True, color=colour())


def print_error(error: LauncherError) -> None:
    click.echo(f"{click.style('error:', fg='red')} {plain(masked(error.what))}", err=True, color=colour())
    if error.original:
        click.echo("\n".join(f"  | {plain(masked(line))}" for line in error.original.splitlines()[:20]), err=True)
    if error.fix:
        click.echo(f"  {click.style('try:', fg='green')} {plain(masked(error.fix))}", err=True, color=colour())


SHOWN = 3  # names in a message


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
