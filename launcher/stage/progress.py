"""Many files, several at once, and a line about them: in its place on a terminal, else now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from launcher.base.output import counted, is_terminal, plain, say
from launcher.stage.source import RemoteFile
from launcher.stage.target import Stopped, gigabytes

JOBS = 8  # files at once; a parallel file system is slow with one, too
SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_STOP = 3.0

Result = TypeVar("Result")


class Progress:
    """Counts bytes from any thread, and tells of them."""

    def __init__(self, title: str, files: int, size: int) -> None:
        self.title, self.files, self.size = title, files, size
        self.done_files, self.bytes, self.stopped = 0, 0, False
        self.lock = threading.Lock()
        self.began = self.last_line = time.monotonic()
        self.line: Any = None  # on a terminal
        if files and is_terminal(sys.stderr):
            from rich.console import Console

            console = Console(stderr=True)
            if console.is_interactive:
                self.line = console.status(title, spinner="line")
                self.line.start()

    def add(self, count: int) -> None:
        """`count` more bytes are there; negative when some turned out wrong. Raises Stopped when all is to end."""
        if self.stopped:
            raise Stopped
        with self.lock:
            self.bytes += count

    def tell(self) -> None:
        now = time.monotonic()
        if self.line or now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line, rate = now, max(self.bytes, 0) / max(now - self.began, 1e-3)
            left = f"{(self.size - self.bytes) / rate:,.0f} s left" if rate else "no data yet"
            done = f"{gigabytes(max(self.bytes, 0))} of {gigabytes(self.size)}, {gigabytes(rate)}/s, {left}"
            text = f"{self.title} {self.done_files} of {counted(self.files, 'file')}: {done}"
            self.line.update(text) if self.line else say(text)

    def say(self, text: str) -> None:
        """Above the line."""
        if self.line:
            self.line.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def stop(self) -> None:
        self.stopped = True
        if self.line:
            self.line.stop()


def each(
    title: str, files: Sequence[RemoteFile], work: Callable[[RemoteFile, Progress], Result], jobs: int = JOBS
) -> Iterator[tuple[RemoteFile, Result]]:
    """`work` on every file, several at once, and what came of it, as it comes. The first error ends all.

    Its threads are daemons: a server that is waited for does not keep Ctrl-C waiting.
    """
    left = iter(files)
    done: SimpleQueue[tuple[RemoteFile, Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        for file in left:  # each thread goes on with the next that no other has
            try:
                done.put((file, work(file, progress), None))
            except BaseException as error:
                done.put((file, None, error))
            if progress.stopped:
                break

    progress = Progress(title, len(files), sum(file.bytes for file in files))
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, len(files)))]
    for thread in threads:
        thread.start()
    try:
        while progress.done_files < len(files):
            progress.tell()
            with contextlib.suppress(Empty):
                file, result, error = done.get(timeout=0.2)
                if error is not None:
                    raise error
                progress.done_files += 1
                yield file, result
    finally:
        progress.stop()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
