"""What differs between torchtitan's releases, and what its trainer prints.

This folder is also copied to `<run_dir>/job/titan` and imported there as `titan`, by whatever Python the image
has: standard library only at import time, nothing newer than Python 3.10, relative imports only.
"""

from __future__ import annotations

import json
import os
from typing import Any

LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
GZIP_MAGIC = b"\x1f\x8b"
MOST_BYTES = 256 << 20  # of a text file; the largest, a tokenizer.json, has 17 MB


class Refused(ValueError):
    """A run that the installed torchtitan cannot do, with what the user can change."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.fix = fix


def read_text(path: str | os.PathLike[str], errors: str = "strict") -> str:
    """A text file of at most MOST_BYTES. Raises OSError, and ValueError for a longer one or one that is not UTF-8."""
    with open(path, "rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    return data.decode("utf-8", errors)


def read_object(path: str | os.PathLike[str], fix: str) -> dict[str, Any]:
    """The JSON object in a file that was staged. Raises Refused, with `fix`, where there is none."""
    try:
        text = read_text(path)
        value = None if text.startswith(LFS_POINTER.decode()) else json.loads(text)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}", fix) from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON", fix) from error
    if value is None:
        raise Refused(f"{path} is a Git LFS pointer, not data", fix)
    if not isinstance(value, dict):
        raise Refused(f"{path} is not a JSON object", fix)
    return value
