"""One display for many files: bytes, rate and time left; a bar on a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, TextIO

from launcher.base.output import echo, is_terminal, plain
from launcher.stage.target import gigabytes

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes from any thread, and draws when `refresh` is called."""

    def __init__(self, title: str, files: int, size: int, present: int, stream: TextIO) -> None:
        self.title, self.files, self.size, self.stream = plain(title), files, size, stream
        self.done_files, self.bytes, self.present = 0, present, present
        self.lock = threading.Lock()
        self.began = self.last_line = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.size and is_terminal(self.stream):
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.DownloadColumn(),
                rich.TransferSpeedColumn(),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*columns, console=Console(file=self.stream), transient=True)
            self.task = self.bar.add_task(self._title(), total=self.size, completed=self.present)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, count: int) -> None:
        """`count` more bytes are there; negative when some turned out wrong."""
        with self.lock:
            self.bytes += count

    def refresh(self) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.bytes, description=self._title())
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (self.bytes - self.present) / (now - self.began)
            left = f"{(self.size - self.bytes) / rate:,.0f} s left" if rate > 0 else "no data yet"
            self.say(
                f"{self._title()}: {gigabytes(max(self.bytes, 0))} of {gigabytes(self.size)}, "
                f"{gigabytes(max(rate, 0))}/s, {left}"
            )

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(plain(text), markup=False, highlight=False)
        else:
            echo(text, file=self.stream)

    def _title(self) -> str:
        done = f"{self.done_files}/" if self.done_files else ""
        return f"{self.title} {done}{self.files} files"
