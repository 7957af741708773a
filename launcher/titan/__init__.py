"""What differs between torchtitan's releases, and what its trainer prints.

This folder is also copied to `<run_dir>/job/titan` and imported there as `titan`, by whatever Python the image
has: standard library only at import time, nothing newer than Python 3.10, relative imports only.
"""

from __future__ import annotations

LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
GZIP_MAGIC = b"\x1f\x8b"


class Refused(ValueError):
    """A run that the installed torchtitan cannot do, with what the user can change."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.fix = fix
