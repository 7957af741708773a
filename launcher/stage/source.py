"""What staging needs of a place that files come from: the Hub, object storage, a web server, another directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from launcher.base.errors import LauncherError
from launcher.stage.target import safe_path

LARGEST = 1 << 45  # bytes of a file: 35 TB, more than any place stores as one


@dataclass(frozen=True)
class RemoteFile:
    """A file as its place describes it. The Hub knows large ones by their sha256, the others by git's object id."""

    path: str
    bytes: int
    sha256: str = ""
    blob: str = ""
    xet: str = ""  # what Xet's servers know the file by
    etag: str = ""  # what object storage answers with another one of, once the object is replaced


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
                "server-answer",
                f"{server}: the server names the {name} {repr(value)[:120]}, which {why}",
                "nothing of it was written; check the address and who runs it; the same command tries again",
            )
