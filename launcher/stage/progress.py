"""Many files, several at once, and one display for them: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from launcher.base.output import echo, is_terminal, plain
from launcher.stage.source import RemoteFile
from launcher.stage.target import Stopped, gigabytes

JOBS = 8  # files at once; a parallel file system is slow with one, too
SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_STOP = 3.0

Result = TypeVar("Result")


class Progress:
    """Counts bytes from any thread, and draws."""

    def __init__(self, title: str, files: int, size: int) -> None:
        self.title, self.files, self.size = plain(title), files, size
        self.done_files, self.bytes, self.stopped = 0, 0, False
        self.lock = threading.Lock()
        self.began = self.last_line = self.drawn = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.size and is_terminal(sys.stderr):
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.DownloadColumn(),
                rich.TransferSpeedColumn(),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*columns, console=Console(file=sys.stderr), transient=True)
            self.task = self.bar.add_task(self._title(), total=self.size)
            self.bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stopped = True
        if self.bar is not None:
            self.bar.stop()

    def add(self, count: int) -> None:
        """`count` more bytes are there; negative when some turned out wrong. Raises Stopped when all is to end."""
        if self.stopped:
            raise Stopped
        with self.lock:
            self.bytes += count
            if time.monotonic() - self.drawn > 0.1:
                self.draw()

    def draw(self) -> None:
        now = self.drawn = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.bytes, description=self._title())
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = self.bytes / (now - self.began)
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
            echo(text, err=True)

    def _title(self) -> str:
        done = f"{self.done_files}/" if self.done_files else ""
        return f"{self.title} {done}{self.files} files"


def each(
    title: str, files: Sequence[RemoteFile], work: Callable[[RemoteFile, Progress], Result], jobs: int = JOBS
) -> Iterator[tuple[RemoteFile, Result]]:
    """`work` on every file, several at once, and what came of it, as it comes. The first error ends all.

    Its threads are daemons: a server that is waited for does not keep Ctrl-C waiting.
    """
    waiting: SimpleQueue[RemoteFile] = SimpleQueue()
    done: SimpleQueue[tuple[RemoteFile, Any, BaseException | None]] = SimpleQueue()
    for file in files:
        waiting.put(file)

    def run() -> None:
        with contextlib.suppress(Empty):
            while not progress.stopped:
                file = waiting.get_nowait()
                try:
                    done.put((file, work(file, progress), None))
                except BaseException as error:
                    done.put((file, None, error))

    with Progress(title, len(files), sum(file.bytes for file in files)) as progress:
        threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, len(files)))]
        for thread in threads:
            thread.start()
        try:
            while progress.done_files < len(files):
                try:
                    file, result, error = done.get(timeout=0.2)
                except Empty:
                    with progress.lock:
                        progress.draw()
                    continue
                if error is not None:
                    raise error
                progress.done_files += 1
                yield file, result
        finally:
            progress.stopped = True
            deadline = time.monotonic() + SECONDS_TO_STOP
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0))
