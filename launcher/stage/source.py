"""What staging needs of a place that files come from: the Hub and object storage both have it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Checksums(Protocol):
    """The checksums of bytes as they pass: always their sha256, and whatever the place knows its files by."""

    sha256: Any  # hashlib's

    def update(self, chunk: bytes | memoryview) -> None: ...

    def match(self, file: Any) -> bool:
        """Whether all bytes so far are those of `file`."""


class RemoteFile(Protocol):
    """A file as its place describes it."""

    @property
    def path(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def sha256(self) -> str:
        """Empty where the place knows the file by something else."""

    @property
    def digest(self) -> str:
        """What changes with the content: names an unfinished download."""

    def digests(self) -> Checksums: ...


class Source(Protocol):
    """One version of the files in one place."""

    @property
    def source(self) -> str:
        """For the manifest: hf://datasets/allenai/c4, s3://bucket/prefix."""

    @property
    def revision(self) -> str: ...

    def download(
        self, file: Any, partial: Path, on_bytes: Callable[[int], None], stop: threading.Event
    ) -> Checksums: ...
