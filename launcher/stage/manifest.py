"""What is in a staged directory and how that is known: DIR/.staged/manifest.json, and the directory held against it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.base.errors import LauncherError
from launcher.base.files import unreadable
from launcher.base.values import parse_json
from launcher.stage.source import is_digest, is_size
from launcher.stage.target import DIRECTORY, STATE, Folder, safe_path
from launcher.titan import LFS_POINTER

SCHEMA = 1
KINDS = ("c4", "tokenizer", "model")
LARGEST = 64 << 20  # bytes of a manifest
BLOCK = 1 << 20
READERS = 8  # files at once: a parallel file system is slow with one


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
    made_by: str = f"launcher {__version__}"

    def with_file(self, path: str, file: StagedFile) -> Manifest:
        return replace(self, files={**self.files, path: file})


@dataclass(frozen=True)
class Problem:
    """A file that is not as the manifest has it."""

    path: str
    what: str


def manifest_path(directory: Path) -> Path:
    return directory / STATE / "manifest.json"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest, or None where there is none. Raises LauncherError for one that nobody can trust any more."""
    path = manifest_path(directory)
    try:
        with (
            Folder(path.parent, os.open(path.parent, DIRECTORY | os.O_NOFOLLOW)) as state,
            open(state.open(path.name, os.O_RDONLY), "rb") as stream,
        ):
            data = stream.read(LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    manifest = parse_manifest(data)
    if manifest is None:
        raise LauncherError(
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


def write_manifest(state: Folder, manifest: Manifest) -> None:
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
    state.write("manifest.json", (json.dumps(value, indent=1) + "\n").encode())


def is_verified(directory: Path, path: str, file: StagedFile) -> bool:
    """Whether the file is still the one that was verified, as far as size and time tell. Reads no data."""
    try:
        found = (directory / path).stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (file.bytes, file.mtime_ns)


def look(directory: Path, manifest: Manifest, deep: bool = False) -> tuple[list[Problem], list[str]]:
    """What is wrong as far as names and sizes tell, and the files to be read: the touched ones; with `deep`, all."""
    problems = [Problem(path, "not downloaded yet") for path in sorted(set(manifest.wanted) - manifest.files.keys())]
    unread = []
    for path, file in sorted(manifest.files.items()):
        problem = _size_problem(directory, path, file)
        if problem is not None:
            problems.append(problem)
        elif deep or not is_verified(directory, path, file):
            unread.append(path)
    return problems, unread


def read(directory: Path, manifest: Manifest, paths: Sequence[str], on_bytes: Callable[[int], None]) -> list[Problem]:
    """What is wrong with the bytes of `paths`; several files at once."""

    def problem_of(path: str) -> Problem | None:
        try:
            if sha256_of(directory / path, on_bytes) == manifest.files[path].sha256:
                return None
        except OSError as error:
            return Problem(path, error.strerror or str(error))
        return Problem(path, "other bytes than were verified")

    with ThreadPoolExecutor(READERS) as pool:
        return [problem for problem in pool.map(problem_of, paths) if problem is not None]


def _size_problem(directory: Path, path: str, file: StagedFile) -> Problem | None:
    try:
        size = (directory / path).stat().st_size
    except OSError as error:
        return Problem(path, "missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error))
    if size == file.bytes:
        return None
    return Problem(path, describe_wrong(directory / path, size, file.bytes))


def describe_wrong(path: Path, size: int, expected: int) -> str:
    """What a file of the wrong size is."""
    if path.is_dir():
        return "a directory, not a file"
    if size == 0:
        return "empty"
    if is_lfs_pointer(path):
        return "a Git LFS pointer, not the data"
    if size < expected:
        return f"truncated: {size:,} of {expected:,} bytes"
    return f"{size:,} bytes instead of {expected:,}"


def is_lfs_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def open_at_once(path: Path) -> FileIO:
    """A file to be read. Raises OSError for a pipe or a device that has taken its place."""
    stream = FileIO(str(path), opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stream


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> str:
    """Reads the whole file. Raises OSError."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    with open_at_once(path) as stream:
        left = os.fstat(stream.fileno()).st_size  # one that grows meanwhile is not followed for ever
        while left >= 0 and (count := stream.readinto(buffer)):
            left -= count
            digest.update(memoryview(buffer)[:count])
            on_bytes(count)
    return digest.hexdigest()
