"""A squashfs file: what its first 96 bytes and the JSON file beside it tell.

Cheap enough for every `submit`: standard library only, and nothing but the superblock is read.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_json
from launcher.image import ARCHES

COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
# ELF's e_machine -> uname's word
MACHINES = {3: "i686", 21: "ppc64le", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
METADATA = "etc/titan-image.json"  # inside the image
AGAIN = "copy it again, then compare: sha256sum"
# magic, inodes, mkfs_time, block_size, fragments, compressor, block_log, flags, ids, major, minor, root inode,
# bytes_used, then the starts of the tables: ids, xattrs, inodes, directories, fragments, exports
SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")


@dataclass(frozen=True)
class Superblock:
    """The head of a squashfs 4.0 file, checked for sense."""

    compressor: str
    block_size: int  # bytes
    inodes: int  # names that are hard links of one file count once
    mkfs_time: int  # seconds since 1970
    file_size: int  # bytes; what is used of it, padded to a multiple of 4096

    def recorded(self) -> dict[str, Any]:
        """As the sidecar has it. mksquashfs counts the root directory among the inodes, and so do the entries."""
        return {
            "bytes": self.file_size,
            "compressor": self.compressor,
            "block_kib": self.block_size // 1024,
            "entries": self.inodes,
            "mkfs_time": self.mkfs_time,
        }


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
    sha256: str = ""
    unpacked_bytes: int = 0
    quantization: tuple[str, ...] = ()  # the recipe.quantize that it can do; empty: it does not say


def superblock(path: Path) -> Superblock:
    """Reads and checks the superblock; raises LauncherError for anything that no node could mount or unpack."""
    try:
        # A pipe or a device would block, or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LauncherError("not-a-file", f"{path}: not a file", f"ls -ld {quoted(path)}")
        with open(path, "rb") as stream:
            head, size = stream.read(SUPERBLOCK.size), os.fstat(stream.fileno()).st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        status = ExitStatus.INVALID if missing else ExitStatus.FILESYSTEM
        fix = f"ls -l {quoted(Path(path).parent)}" if missing else f"ls -l {quoted(path)}"
        raise LauncherError("unreadable", f"{path}: {error.strerror}", fix, status=status) from None
    if size == 0:
        raise LauncherError("image-cut", f"{path}: the file is empty", "copy or build it again")
    if not head.startswith(b"hsqs"):
        what = f"{path}: not a squashfs file (it begins with {head[:4]!r})"
        raise LauncherError("not-squashfs", what, quoted("file", path))
    if len(head) < SUPERBLOCK.size:
        raise LauncherError("image-cut", f"{path}: cut off: {size} bytes", AGAIN)
    fields = SUPERBLOCK.unpack(head)
    inodes, mkfs_time, block_size = fields[1:4]
    compressor, block_log, _, _, major, minor, _, used, ids, _, inode_table, directories = fields[5:17]
    if (major, minor) != (4, 0):
        what = f"{path}: squashfs {major}.{minor}, which no current kernel reads"
        raise LauncherError("squashfs-version", what, "convert it again")
    sane = (
        compressor in COMPRESSORS
        and 12 <= block_log <= 20
        and block_size == 1 << block_log
        and inodes > 0
        and SUPERBLOCK.size <= inode_table < directories < used
        and ids < used
    )
    if not sane:
        raise LauncherError("image-damaged", f"{path}: damaged: its superblock is invalid", AGAIN)
    if size < used:
        raise LauncherError("image-cut", f"{path}: cut off: {size:,} of {used:,} bytes", AGAIN)
    return Superblock(COMPRESSORS[compressor], block_size, inodes, mkfs_time, size)


def sidecar_path(path: Path) -> Path:
    """titan-stable-arm64.sqsh -> titan-stable-arm64.sqsh.json"""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path, block: Superblock) -> dict[str, Any] | None:
    """The JSON file beside `path`, if there is one and it describes this very file; else None.

    An image copied without it, or over another one, must not be taken for what it was.
    """
    value = read_json(sidecar_path(path))
    said = value.get("squashfs") if value else None
    if not value or not isinstance(said, dict) or not is_metadata(value):
        return None
    # Two builds of one image may agree in all but their time; older sidecars do not have it.
    seen = block.recorded()
    return value if {"mkfs_time": block.mkfs_time} | {key: said[key] for key in seen if key in said} == seen else None


def known(path: Path, block: Superblock) -> ImageFacts | None:
    """What the sidecar tells, if it describes this file."""
    about = read_sidecar(path, block)
    return described(path, block, about, "sidecar") if about else None


def described(path: Path, block: Superblock, about: Mapping[str, Any], source: str) -> ImageFacts:
    """The facts in a description: of the sidecar, or of the image itself."""
    arch, sm, driver = about["arch"], about.get("sm"), about.get("driver_min")
    quantization = about.get("quantization")
    recorded = about["squashfs"] if source == "sidecar" else {}
    digest, size = recorded.get("sha256"), recorded.get("unpacked_bytes")
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
        sha256=digest if isinstance(digest, str) else "",
        unpacked_bytes=size if type(size) is int else 0,
        quantization=tuple(str(word) for word in quantization) if isinstance(quantization, list) else (),
    )


def is_metadata(value: Mapping[str, Any]) -> bool:
    """Whether this is a description that this launcher understands and that says what is in the image."""
    versions = value.get("versions")
    return (
        value.get("schema") == 1
        and isinstance(value.get("arch"), str)
        and isinstance(versions, dict)
        and bool(versions)
        and all(isinstance(v, str) or v is None for v in versions.values())
    )


def elf_machine(head: bytes) -> str:
    """uname's word for the architecture of a program that begins with `head`; "" for a script or anything else."""
    if len(head) < 20 or not head.startswith(b"\x7fELF"):
        return ""
    number = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
    return MACHINES.get(number, f"ELF machine {number}")


def follow(path: str, links: Mapping[str, str]) -> str | None:
    """`path` with every symbolic link on its way resolved inside the image; None for a loop.

    Paths have no leading slash; `links` maps a path to its target. Readers of squashfs leave this to the caller.
    """
    done: list[str] = []
    todo, hops = path.split("/")[::-1], 0
    while todo and hops <= 40:  # the kernel's limit
        part = todo.pop()
        if target := links.get("/".join([*done, part])):
            hops += 1
            done = [] if target.startswith("/") else done
            todo += target.split("/")[::-1]
        elif part == "..":
            del done[-1:]
        elif part not in ("", "."):
            done.append(part)
    return "/".join(done) if hops <= 40 else None
