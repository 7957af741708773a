"""What staging needs of a place that files come from: the Hub and object storage both have it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from io import FileIO
from typing import Any, Protocol

from launcher.base.errors import LauncherError
from launcher.stage.target import safe_path

LARGEST = 1 << 45  # bytes of a file: 35 TB, more than any place stores as one


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def is_digest(value: object, digits: int = 64) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


_FIELDS: dict[str, Callable[[object], bool]] = {
    "path": safe_path,
    "size": is_size,
    "sha256": is_digest,
    "git id": lambda value: is_digest(value, 40),
    "commit": lambda value: is_digest(value, 40),
}


def check_answer(server: str, **fields: object) -> None:
    """Names, sizes and checksums from a server become paths and limits: raises LauncherError for one that cannot."""
    for name, value in fields.items():
        name = name.replace("_", " ")
        if not _FIELDS[name](value):
            why = "would lie outside the target" if name == "path" else "makes no sense"
            raise LauncherError(
                f"{server}: the server names the {name} {repr(value)[:120]}, which {why}",
                "nothing of it was written; check the address and who runs it; the same command tries again",
            )


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

    def download(self, file: Any, stream: FileIO, on_bytes: Callable[[int], None], stop: threading.Event) -> Checksums:
        """Brings the rest of `file` into `stream`. Returns the checksums of all of it."""
