"""Bytes from a server into a file: checksums, progress and a way to stop with every piece."""

from __future__ import annotations

import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from launcher.stage.manifest import BLOCK
from launcher.stage.source import Checksums, RemoteFile
from launcher.stage.target import Stopped, write_error


class Sink:
    """The file that is being written, and with every piece its checksums, the progress, and a way to stop.

    Errors of the disk become LauncherErrors here, where they cannot be taken for errors of the network.
    """

    def __init__(
        self,
        stream: FileIO,
        file: RemoteFile,
        on_bytes: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self.stream, self.file, self.on_bytes, self.stop = stream, file, on_bytes, stop
        self.buffer = memoryview(bytearray(BLOCK))
        self.digests: Checksums = file.digests()
        self.size = 0

    def take_existing(self) -> None:
        """Counts what an earlier, interrupted call has left. The caller has told the progress about it."""
        self.stream.seek(0)
        while count := self.stream.readinto(self.buffer):
            self.digests.update(self.buffer[:count])
            self.size += count
            if self.stop.is_set():
                raise Stopped

    def take(self, answer: Any) -> None:
        """Everything that `answer` has, up to what was announced."""
        while count := answer.readinto(self.buffer):
            if self.stop.is_set():
                raise Stopped
            if self.size + count > self.file.bytes:
                self.restart()
                raise WrongLength(f"more than the {self.file.bytes:,} bytes that were announced")
            piece = self.buffer[:count]
            self.digests.update(piece)
            try:
                while piece:  # a disk that is nearly full takes a part, and refuses the next
                    piece = piece[self.stream.write(piece) :]
            except OSError as error:
                raise write_error(Path(str(self.stream.name)), error) from error
            self.size += count
            self.on_bytes(count)

    def restart(self) -> None:
        """Forgets everything: what is there, or what would come next, does not belong together."""
        self.stream.seek(0)
        self.stream.truncate()
        self.on_bytes(-self.size)
        self.digests, self.size = self.file.digests(), 0


class WrongLength(Exception):
    """The server sends more or less than it announced."""
