"""What is in a squashfs image, without mounting it, without root, whatever its architecture and whoever made it.

The sidecar file answers at once; else /etc/titan-image.json inside; else what the files themselves give away.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import ExitStatus, LauncherError, install
from launcher.image import ARCHES
from launcher.image.squashfs_file import (
    METADATA,
    Superblock,
    elf_machine,
    follow,
    is_metadata,
    read_sidecar,
    superblock,
)

TIMEOUT = 120  # seconds for one unsquashfs; listing 50,000 files takes less than one
HINT = f"apt-get install squashfs-tools, or: {install('image')}"
HEAD = 4096  # bytes of a program that are read for its ELF header
PROGRAMS = ("bin/sh", "usr/bin/env", "bin/bash", "usr/bin/python3", "usr/local/bin/python3")
# The oldest driver branch that runs programs of a CUDA major version, by minor-version compatibility.
# Source: CUDA Toolkit release notes, table "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility"; containers/describe.py has it, too, for images that are made here.
DRIVERS = {"11": "450", "12": "525", "13": "580"}
# Distribution name -> key in `versions`; the CUDA 12 and 13 packages differ in their suffix.
DISTRIBUTIONS = {
    r"torch": "torch",
    r"torchtitan": "torchtitan",
    r"triton|pytorch_triton": "triton",
    r"nvidia_nccl(_cu\d+)?": "nccl",
    r"nvidia_cuda_runtime(_cu\d+)?": "cuda",
}
# What PySquashfsImage needs for each compressor. Not lz4: it expects frames, and squashfs has bare blocks.
LIBRARIES = {"gzip": "zlib", "xz": "lzma", "zstd": "zstandard", "lzo": "lzo"}
_LISTED = re.compile(
    rb"^([-lpdbcs])\S{9}\s+\d+/\d+\s+(?:\d+|\d+,\s*\d+)\s+\d{4}-\d\d-\d\d \d\d:\d\d squashfs-root/(.+)$", re.M
)
_DIST_INFO = re.compile(r"^((?:.*/)?(?:site|dist)-packages)/([^/-]+)-([^/-]+)\.dist-info$")


@dataclass(frozen=True)
class ImageFacts:
    """What is known about an image. `versions` has None for what is known to be absent (cuda: a CPU build)."""

    path: str
    arch: str  # uname's word, "" if unknown
    source: str  # sidecar, image, guessed, or superblock: nothing here can look inside
    compressor: str
    bytes: int
    channel: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    driver_min: str | None = None
    sm: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Tree(Protocol):
    """The files of an image. Paths have no leading slash; links are not followed."""

    def entries(self) -> tuple[set[str], dict[str, str]]:
        """Every name, and the target of every symbolic link."""

    def read(self, path: str, limit: int) -> bytes | None:
        """The first bytes of a regular file, None if there is none of that name."""


def inspect(path: Path, *, required: bool = True) -> ImageFacts:
    """Facts about the image; raises LauncherError for a file that is no complete squashfs.

    `required=False` is for `submit`: where neither unsquashfs nor the extra is installed, it answers with what the
    superblock says instead of an error.
    """
    block = superblock(path)
    if about := read_sidecar(path, block):
        return _facts(path, block, about, "sidecar")
    with _open(path, block.compressor) as tree:
        if tree is not None:
            if about := _json(tree.read(METADATA, 1 << 20)):
                return _facts(path, block, about, "image")
            return _guess(path, block, tree)
    if required:
        raise _unreadable(path, block.compressor)
    note = f"nothing here can look into it: {HINT}"
    return ImageFacts(str(path), "", "superblock", block.compressor, block.file_size, notes=(note,))


def embedded_metadata(path: Path) -> dict[str, Any] | None:
    """/etc/titan-image.json of the image, if it has one and something here can read it."""
    with _open(path, superblock(path).compressor) as tree:
        return _json(tree.read(METADATA, 1 << 20)) if tree else None


def read_inside(path: Path, name: str) -> bytes | None:
    """The first MiB of the file `name` (no leading slash) in the image, None where it has no such file.

    Raises LauncherError for a file that is no complete squashfs, and where nothing here can look into it.
    """
    compressor = superblock(path).compressor
    with _open(path, compressor) as tree:
        if tree is None:
            raise _unreadable(path, compressor)
        return tree.read(name, 1 << 20)


def problems(facts: ImageFacts, profile_arch: str, profile_device: str, driver: str) -> list[tuple[str, str]]:
    """(what, fix) for everything that would fail on the nodes; what is not known is not held against the image.

    `profile_arch` is uname's word, `profile_device` cuda or cpu, `driver` the nodes' NVIDIA driver
    such as 580.95.05, empty where it is not known.
    """
    found = []
    if facts.arch and profile_arch and facts.arch != profile_arch:
        docker = {uname: name for name, uname in ARCHES.items()}.get(profile_arch, profile_arch)
        found.append(
            (
                f"the image is for {facts.arch}, the nodes are {profile_arch}",
                f"launcher image build --arch {docker}, or a --gpu whose nodes are {facts.arch}",
            )
        )
    if facts.source == "superblock":
        return found
    missing = [name for name in ("torch", "torchtitan") if not facts.versions.get(name)]
    if missing:
        found.append((f"no {' and no '.join(missing)} in the image", "launcher image build"))
    if profile_device != "cuda":
        return found
    if facts.versions.get("torch") and facts.versions.get("cuda", "unknown") is None:
        found.append(
            (
                f"torch {facts.versions['torch']} in the image is built without CUDA",
                "launcher image build stable, or --gpu cpu",
            )
        )
    if is_too_old(driver, facts):
        found.append(
            (
                f"{needed_driver(facts)}, the nodes have {driver}",
                "an image with an older CUDA, or a newer driver: nvidia-smi on a node; or NVIDIA's cuda-compat",
            )
        )
    return found


def is_too_old(driver: str, facts: ImageFacts) -> bool:
    """By its own, this driver does not run the image's CUDA; NVIDIA's forward compatibility may make it."""
    return bool(driver and facts.driver_min) and _numbers(driver) < _numbers(facts.driver_min or "")


def needed_driver(facts: ImageFacts) -> str:
    """Which driver the image needs, in words; "" where that is not known."""
    cuda = facts.versions.get("cuda")
    return (
        f"{f'CUDA {cuda} in the' if cuda else 'the'} image needs driver {facts.driver_min}" if facts.driver_min else ""
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _facts(path: Path, block: Superblock, about: Mapping[str, Any], source: str) -> ImageFacts:
    arch, sm, driver = str(about["arch"]), about.get("sm"), about.get("driver_min")
    return ImageFacts(
        str(path),
        ARCHES.get(arch, arch),
        source,
        block.compressor,
        block.file_size,
        channel=str(about.get("channel") or ""),
        versions=dict(about["versions"]),
        driver_min=str(driver) if driver else None,
        sm=tuple(str(word) for word in sm) if isinstance(sm, list) else (),
    )


def _json(data: bytes | None) -> dict[str, Any] | None:
    try:
        value = json.loads(data or b"null")
    except ValueError:
        return None
    return value if isinstance(value, dict) and is_metadata(value) else None


def _guess(path: Path, block: Superblock, tree: _Tree) -> ImageFacts:
    """An image that somebody else made."""
    names, links = tree.entries()
    versions, notes = _versions(tree, names)
    arch = ""
    loaders = sorted(name for name in names if re.fullmatch(r"(usr/)?lib(64)?/ld-linux[^/]*", name))
    for program in (*PROGRAMS, *loaders):
        real = follow(program, links)
        if real in names and (arch := elf_machine(tree.read(real, HEAD) or b"")):
            break
    else:
        notes.append("its architecture is unknown: no program that it could be read from")
    cuda = versions.get("cuda")
    return ImageFacts(
        str(path),
        arch,
        "guessed",
        block.compressor,
        block.file_size,
        versions=versions,
        driver_min=DRIVERS.get(cuda.split(".")[0]) if cuda else None,
        notes=tuple(notes),
    )


def _versions(tree: _Tree, names: set[str]) -> tuple[dict[str, str | None], list[str]]:
    """From the names of *.dist-info directories; CUDA from torch's own word, which also knows a CPU build."""
    found: dict[str, dict[str, str | None]] = {}
    for name in names:
        if match := _DIST_INFO.match(name):
            folder, package, version = match.groups()
            for pattern, key in DISTRIBUTIONS.items():
                if re.fullmatch(pattern, re.sub(r"[-_.]+", "_", package.lower())):
                    found.setdefault(folder, {})[key] = version
    notes = []
    # The one that has the most of it; among equals a fixed one.
    order = sorted(found, key=lambda folder: ("torch" not in found[folder], -len(found[folder]), folder))
    versions = found[order[0]] if order else {}
    if more := [f"/{folder}" for folder in order[1:] if "torch" in found[folder]]:
        notes.append(f"torch is there more than once; /{order[0]} was read, not {', '.join(more)}")
    if cuda := versions.get("cuda"):
        versions["cuda"] = ".".join(cuda.split(".")[:2])
    if order and (text := tree.read(f"{order[0]}/torch/version.py", 1 << 16)):
        said = re.search(rb"^cuda\b[^=\n]*=\s*(?:None|['\"](\d+\.\d+)[^'\"]*['\"])", text, re.M)
        if said:
            versions["cuda"] = said[1].decode() if said[1] else None
    if not versions.get("torchtitan") and (
        source := sorted(name for name in names if name.endswith("/torchtitan/train.py"))
    ):
        versions["torchtitan"] = "unknown"
        notes.append(f"torchtitan is not installed, but its source is there: /{source[0]}")
    pythons = [re.search(r"python(3\.\d+)(?=/|$)", name) for name in [*order[:1], *sorted(names)]]
    if python := next((match[1] for match in pythons if match), None):
        versions["python"] = python
    return versions, notes


# --- the two ways into a squashfs --------------------------------------------------------------------------------


@contextmanager
def _open(path: Path, compressor: str) -> Iterator[_Tree | None]:
    """unsquashfs where it knows -cat (4.5 and later), else PySquashfsImage where it can, else None."""
    program = shutil.which("unsquashfs")
    if program is not None:
        version = _run([program, "-version"])[1]
        match = re.search(rb"version (\d+)\.(\d+)", version)
        if match and (int(match[1]), int(match[2])) >= (4, 5):
            yield _Unsquashfs(program, path)
            return
    needed = LIBRARIES.get(compressor)
    if needed is None or not all(find_spec(name) for name in ("PySquashfsImage", needed)):
        yield None
        return
    from PySquashfsImage import SquashFsImage

    try:
        with SquashFsImage.from_file(str(path)) as image:
            yield _PySquashfs(image)
    except LauncherError:
        raise
    except Exception as error:  # the library meets damage with errors of every kind
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


class _Unsquashfs:
    """By the program of squashfs-tools: a fraction of a second for any image."""

    def __init__(self, program: str, path: Path) -> None:
        # Absolute: a name may begin with a dash.
        self._program, self._path = program, path.absolute()

    def entries(self) -> tuple[set[str], dict[str, str]]:
        code, out, err = _run([self._program, "-lln", str(self._path)])
        if code:
            raise _damaged(self._path, err.decode(errors="replace"))
        names, links = set(), {}
        for kind, rest in _LISTED.findall(out):
            name, _, target = rest.decode("utf-8", "surrogateescape").partition(" -> ")
            names.add(name)
            if kind == b"l":
                links[name] = target
        return names, links

    def read(self, path: str, limit: int) -> bytes | None:
        code, out, err = _run([self._program, "-no-wildcards", "-cat", str(self._path), path])
        if code and not re.search(rb"no matches|is a directory|failed to resolve|not a regular", err):
            raise _damaged(self._path, err.decode(errors="replace"))
        return None if code else out[:limit]


class _PySquashfs:
    """By the library PySquashfsImage, in Python alone: where squashfs-tools are not installed."""

    def __init__(self, image: Any) -> None:
        self._image = image

    def entries(self) -> tuple[set[str], dict[str, str]]:
        names, links = set(), {}
        for file in self._image:
            name = file.path.lstrip("/")
            names.add(name)
            if file.is_symlink:
                links[name] = file.readlink()
        return names - {""}, links

    def read(self, path: str, limit: int) -> bytes | None:
        file = self._image.select("/" + path)
        if file is None or not file.is_file:
            return None
        data = bytearray()
        for piece in file.iter_bytes():
            data += piece
            if len(data) >= limit:
                break
        return bytes(data[:limit])


def _run(command: list[str]) -> tuple[int, bytes, bytes]:
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    except OSError as error:
        raise LauncherError(f"{command[0]}: {error.strerror}", status=ExitStatus.ERROR) from None
    except subprocess.TimeoutExpired:
        raise LauncherError(
            f"{command[0]} did not answer in {TIMEOUT} s",
            "is the file system that holds the image slow?",
            status=ExitStatus.ERROR,
        ) from None
    return done.returncode, done.stdout, done.stderr


def _unreadable(path: Path, compressor: str) -> LauncherError:
    return LauncherError(
        f"{path}: nothing here can look into a squashfs compressed with {compressor}",
        HINT,
        status=ExitStatus.ERROR,
    )


def _damaged(path: Path, original: str) -> LauncherError:
    return LauncherError(f"{path}: damaged", "copy it again, then compare: sha256sum", original=original[-2000:])
