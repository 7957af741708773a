"""What is in a staged directory and how that is known: DIR/.staged/manifest.json, and the directory held against it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from launcher import version
from launcher.base.errors import LauncherError
from launcher.base.files import unreadable
from launcher.base.values import parse_json
from launcher.stage.progress import Progress, each
from launcher.stage.shards import wrong_start
from launcher.stage.source import RemoteFile, is_digest, is_size
from launcher.stage.target import DIRECTORY, STATE, Folder, Work, safe_path
from launcher.titan import LFS_POINTER

SCHEMA = 1
KINDS = ("c4", "tokenizer", "model")
LARGEST = 64 << 20  # bytes of a manifest
BLOCK = 1 << 20


@dataclass(frozen=True)
class StagedFile:
    """A file whose bytes were compared with the source. The same size and time mean: not touched since."""

    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """A staged directory. `wanted` are the paths that the last call was to bring; all in `files` when it is
    complete.
    """

    kind: str
    source: str  # "hf://datasets/allenai/c4", "s3://bucket/prefix"
    revision: str  # the commit, 40 hexadecimal digits
    files: Mapping[str, StagedFile]
    wanted: tuple[str, ...] = ()
    train_files_in_all: int = 0  # C4 only
    made_by: str = field(default_factory=lambda: f"launcher {version()}")


@dataclass(frozen=True)
class Problem:
    """A file that is not as the manifest has it."""

    path: str
    what: str


def manifest_path(directory: Path) -> Path:
    return directory / STATE / "manifest.json"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest, or None where there is none. Raises LauncherError for one that nobody can trust any more, and for a
    link: others may write there.
    """
    path = manifest_path(directory)
    try:
        state = Folder(path.parent, os.open(path.parent, DIRECTORY | os.O_NOFOLLOW))
        with open(state.open(path.name, os.O_RDONLY), "rb") as stream:
            data = stream.read(LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    manifest = parse_manifest(data)
    if manifest is None:
        raise LauncherError(
            "manifest-damaged",
            f"{path}: damaged or edited",
            "the `launcher stage` command that filled it reads every file again and writes a new one",
        )
    return manifest


def parse_manifest(data: bytes) -> Manifest | None:
    """A manifest from its JSON; None for anything that we would not have written."""
    try:
        value: Any = parse_json(data)
        files = {
            path: StagedFile(entry["bytes"], entry["sha256"], entry["mtime_ns"])
            for path, entry in value["files"].items()
        }
        manifest = Manifest(
            value["kind"],
            value["source"],
            value["revision"],
            files,
            tuple(value.get("wanted", files)),
            value.get("train_files_in_all", 0),
            value["made_by"],
        )
        numbers = [n for file in files.values() for n in (file.bytes, file.mtime_ns)]
        sound = (
            value["schema"] == SCHEMA
            and manifest.kind in KINDS
            and all(isinstance(text, str) for text in (manifest.source, manifest.revision, manifest.made_by))
            and all(type(n) is int and n >= 0 for n in (*numbers, manifest.train_files_in_all))
            and all(is_size(file.bytes) and is_digest(file.sha256) for file in files.values())
            and all(safe_path(path) for path in (*files, *manifest.wanted))
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return manifest if sound else None


def write_manifest(work: Work, manifest: Manifest) -> None:
    """Replaces the manifest as a whole; a reader sees the old or the new one."""
    value = {
        "schema": SCHEMA,
        "kind": manifest.kind,
        "source": manifest.source,
        "revision": manifest.revision,
        "files": {path: vars(file) for path, file in sorted(manifest.files.items())},
        "wanted": sorted(manifest.wanted),
        "train_files_in_all": manifest.train_files_in_all,
        "made_by": manifest.made_by,
    }
    if manifest.kind != "c4":
        del value["train_files_in_all"]
    work.write(work.state, "manifest.json", (json.dumps(value, indent=1) + "\n").encode())


def is_verified(directory: Path, path: str, file: StagedFile) -> bool:
    """Whether the file is still the one that was verified, as far as size and time tell. Reads no data."""
    try:
        found = (directory / path).stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (file.bytes, file.mtime_ns)


def check(directory: Path, manifest: Manifest, deep: bool = False) -> list[Problem]:
    """What is wrong as far as names and sizes tell, and the bytes of the touched files; with `deep`, of all."""
    problems = [Problem(path, "not downloaded yet") for path in sorted(set(manifest.wanted) - manifest.files.keys())]
    unread = []
    for path, file in sorted(manifest.files.items()):
        if what := wrong_size(directory / path, file.bytes):
            problems.append(Problem(path, what))
        elif deep or not is_verified(directory, path, file):
            unread.append(RemoteFile(path, file.bytes, file.sha256))
    return problems + read(directory, unread, "other bytes than were verified")


def read(directory: Path, files: Sequence[RemoteFile], other: str) -> list[Problem]:
    """What is wrong with the bytes of `files`; several at once."""

    def problem_of(file: RemoteFile, progress: Progress) -> str:
        try:
            return "" if check_bytes(directory / file.path, file, progress.add) else other
        except OSError as error:
            return error.strerror or str(error)

    found = {file.path: what for file, what in each("reading", files, problem_of) if what}
    return [Problem(file.path, found[file.path]) for file in files if file.path in found]


def wrong_size(path: Path, expected: int) -> str:
    """What is wrong with a file as far as name and size tell; "" for nothing."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "a directory, not a file" if stat.S_ISDIR(found.st_mode) else "not a file"
        if found.st_size == expected:
            return ""
        with open(path, "rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    if start in (b"", LFS_POINTER):
        return wrong_start(start)
    if found.st_size < expected:
        return f"truncated: {found.st_size:,} of {expected:,} bytes"
    return f"{found.st_size:,} bytes instead of {expected:,}"


def check_bytes(
    path: Path, file: RemoteFile, on_bytes: Callable[[int], None] = lambda _count: None
) -> StagedFile | None:
    """The file at `path` as it is recorded; None where its bytes are not those of `file`. Raises OSError.

    Of a checksum the digits that are known are compared: of an image without a description, those in its name.
    """
    with FileIO(str(path), opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        before = os.fstat(stream.fileno())
        if not stat.S_ISREG(before.st_mode):  # a pipe or a device has taken its place
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        hashes = [hashlib.sha256()]
        if file.blob:  # git hashes "blob <size>" and a zero byte before the content
            hashes.append(hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False))
        buffer, size = bytearray(BLOCK), 0
        while size <= before.st_size and (count := stream.readinto(buffer)):  # one that grows is not followed for ever
            size += count
            for digest in hashes:
                digest.update(memoryview(buffer)[:count])
            on_bytes(count)
    if size != file.bytes or not hashes[-1].hexdigest().startswith(file.blob or file.sha256):
        return None
    return StagedFile(size, hashes[0].hexdigest(), before.st_mtime_ns)
