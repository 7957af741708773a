"""What is in a squashfs image, without mounting it, without root, whatever its architecture and whoever made it.

The sidecar file answers at once; else /etc/titan-image.json inside; else what the files themselves give away.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import parse_json
from launcher.image import ARCHES, DOCKER
from launcher.image.squashfs_file import (
    INSTALL,
    METADATA,
    Superblock,
    elf_machine,
    follow,
    is_metadata,
    read_sidecar,
    superblock,
)

TIMEOUT_S = 120  # for one unsquashfs; listing 50,000 files takes less than one second
METADATA_BYTES = 1 << 20  # of /etc/titan-image.json, which has some 2 kB
LISTING = 64 << 20  # bytes of names; an image of 50,000 files has 6 MB of them
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


def inspect(path: Path, *, required: bool = True) -> ImageFacts:
    """Facts about the image; raises LauncherError for a file that is no complete squashfs.

    `required=False` is for `submit`: where unsquashfs is not installed, it answers with what the
    superblock says instead of an error.
    """
    block = superblock(path)
    if about := read_sidecar(path, block):
        return _facts(path, block, about, "sidecar")
    if tree := _open(path):
        if about := _json(tree.read(METADATA, METADATA_BYTES)):
            return _facts(path, block, about, "image")
        return _guess(path, block, tree)
    if required:
        raise _unreadable(path)
    note = f"nothing here can look into it: {INSTALL}"
    return ImageFacts(str(path), "", "superblock", block.compressor, block.file_size, notes=(note,))


def embedded_metadata(path: Path) -> dict[str, Any] | None:
    """/etc/titan-image.json of the image, if it has one and something here can read it."""
    superblock(path)
    return _json(tree.read(METADATA, METADATA_BYTES)) if (tree := _open(path)) else None


def read_inside(path: Path, name: str) -> bytes | None:
    """The first MiB of the file `name` (no leading slash) in the image, None where it has no such file.

    Raises LauncherError for a file that is no complete squashfs, and where nothing here can look into it.
    """
    superblock(path)
    if (tree := _open(path)) is None:
        raise _unreadable(path)
    return tree.read(name, METADATA_BYTES)


def problems(facts: ImageFacts, profile_arch: str, profile_device: str, driver: str) -> list[tuple[str, str]]:
    """(what, fix) for everything that would fail on the nodes; what is not known is not held against the image.

    `profile_arch` is uname's word, `profile_device` cuda or cpu, `driver` the nodes' NVIDIA driver
    such as 580.95.05, empty where it is not known.
    """
    found = []
    if facts.arch and profile_arch and facts.arch != profile_arch:
        build = f"launcher image build --arch {DOCKER.get(profile_arch, profile_arch)}"
        what = f"the image is for {facts.arch}, the nodes are {profile_arch}"
        found.append((what, f"{build}, or a --gpu whose nodes are {facts.arch}"))
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
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version))


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
        value = parse_json(data or b"null")
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


# --- the way into a squashfs -------------------------------------------------------------------------------------


class _Tree:
    """The files of an image, by unsquashfs: a fraction of a second for any image. Links are not followed."""

    def __init__(self, program: str, path: Path) -> None:
        # Absolute: a name may begin with a dash.
        self._program, self._path = program, path.absolute()

    def entries(self) -> tuple[set[str], dict[str, str]]:
        """Every name, without its leading slash, and the target of every symbolic link."""
        code, out, err = _run([self._program, "-lln", str(self._path)], LISTING)
        if code or len(out) > LISTING:
            raise _damaged(self._path, err or f"it lists more than {LISTING >> 20} MiB of names")
        names, links = set(), {}
        for kind, rest in _LISTED.findall(out):
            name, _, target = rest.decode("utf-8", "surrogateescape").partition(" -> ")
            names.add(name)
            if kind == b"l":
                links[name] = target
        return names, links

    def read(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file, None if there is none of that name."""
        code, out, err = _run([self._program, "-no-wildcards", "-cat", str(self._path), path], limit)
        if code and not re.search("no matches|is a directory|failed to resolve|not a regular", err):
            raise _damaged(self._path, err)
        return None if code else out[:limit]


def _open(path: Path) -> _Tree | None:
    """None where there is no unsquashfs that knows -cat (4.5 and later)."""
    if (program := shutil.which("unsquashfs")) is None:
        return None
    match = re.search(rb"version (\d+)\.(\d+)", _run([program, "-version"], HEAD)[1])
    return _Tree(program, path) if match and (int(match[1]), int(match[2])) >= (4, 5) else None


def _run(command: list[str], limit: int) -> tuple[int, bytes, str]:
    """The exit code, what was printed, and the last of what was complained. Of output without end, `limit` + 1
    bytes.
    """
    try:
        with (
            tempfile.TemporaryFile() as log,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process,
        ):
            assert process.stdout
            timer = threading.Timer(TIMEOUT_S, process.kill)
            timer.start()
            try:
                out = process.stdout.read(limit + 1)
                if enough := len(out) > limit:
                    process.kill()
                code = process.wait()
            finally:
                timed_out = timer.finished.is_set()
                timer.cancel()
            log.seek(max(0, log.seek(0, os.SEEK_END) - HEAD))
            said = log.read().decode(errors="replace")
    except OSError as error:
        raise LauncherError(f"{command[0]}: {error.strerror}", status=ExitStatus.ERROR) from None
    if timed_out:
        raise LauncherError(
            f"{command[0]} did not answer in {TIMEOUT_S} s",
            "is the file system that holds the image slow?",
            status=ExitStatus.ERROR,
        )
    return 0 if enough else code, out, said


def _unreadable(path: Path) -> LauncherError:
    return LauncherError(f"{path}: nothing here can look into a squashfs", INSTALL, status=ExitStatus.ERROR)


def _damaged(path: Path, original: str) -> LauncherError:
    return LauncherError(f"{path}: damaged", "copy it again, then compare: sha256sum", original=original[-2000:])
