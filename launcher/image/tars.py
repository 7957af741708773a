"""The small tars that an engine is sent."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def tar_of_folder(folder: Path) -> bytes:
    """A build's context, a few hundred kB. Times and owners are zero, so that the same files hit the cache."""
    buffer = io.BytesIO()

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".", filter=plain)
    return buffer.getvalue()


def tar_of_files(files: dict[str, bytes]) -> bytes:
    """These names with these contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
