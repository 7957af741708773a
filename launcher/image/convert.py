"""From an image's `docker export` stream to a squashfs that enroot and Pyxis start; nothing is unpacked, no root.

`rewrite` is the pure core: it turns the chunks of the exported tar into the chunks of the tar that mksquashfs reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from launcher.errors import ExitStatus, LauncherError
from launcher.files import filesystem_error, write_json
from launcher.image import ARCHES
from launcher.image.squashfs_file import METADATA, elf_machine, follow, is_metadata, sidecar_path, superblock

Say = Callable[[str], None]

PIECE = 64 * 1024  # larger writes into a pipe cost several times the CPU
BLOCK = tarfile.BLOCKSIZE
NAME_MAX = 255  # mksquashfs truncates longer ones with no more than a warning
# `docker create` makes these anew for every container; their times would make every conversion different.
MADE_BY_ENGINE = ("dev", "etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "sys")
INSTALL = "apt-get install squashfs-tools (4.5 or newer: Debian 12, Ubuntu 22.04)"


@dataclass(frozen=True)
class ImageConfig:
    """What enroot keeps of an image's configuration; it ignores USER and HEALTHCHECK, and so do we."""

    arch: str  # Docker's word
    image_id: str = ""
    created: int = 0  # seconds since 1970: SOURCE_DATE_EPOCH, else the image's own date; never now
    env: tuple[str, ...] = ()
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SquashfsFormat:
    """How mksquashfs compresses."""

    compressor: str
    block_kib: int
    level: int | None = None  # for compressors that have one

    def options(self) -> list[str]:
        """As mksquashfs takes them (sqfstar misreads the level)."""
        level = [] if self.level is None else ["-Xcompression-level", str(self.level)]
        return ["-comp", self.compressor, *level, "-b", f"{self.block_kib}K"]


# What the cluster does with the file -> the format.
FORMATS = {
    "unpack": SquashfsFormat("zstd", 128, 3),
    "mount": SquashfsFormat("zstd", 128, 3),
}


@dataclass
class Report:
    """What `rewrite` met on its way; complete when its iterator is."""

    entries: int = 0
    unpacked_bytes: int = 0
    cleared: int = 0  # setuid and setgid bits, file capabilities
    devices: int = 0  # outside /dev
    root_only: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # variables that one line cannot hold
    links: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)  # executable file -> architecture, "" for scripts
    metadata: dict[str, Any] = field(default_factory=dict)  # as it stands in the image, and beside it


def image_config(attrs: Mapping[str, Any], environ: Mapping[str, str]) -> ImageConfig:
    """From what `docker image inspect` says (docker-py: image.attrs), and SOURCE_DATE_EPOCH."""
    config = attrs.get("Config") or {}
    epoch = environ.get("SOURCE_DATE_EPOCH", "")
    if epoch and not epoch.isdecimal():
        raise LauncherError(
            f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds",
            "export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)",
        )
    return ImageConfig(
        arch=str(attrs.get("Architecture") or ""),
        image_id=str(attrs.get("Id") or ""),
        created=int(epoch) if epoch else _seconds(str(attrs.get("Created") or "")),
        env=tuple(config.get("Env") or ()),
        working_dir=str(config.get("WorkingDir") or ""),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        cmd=tuple(config.get("Cmd") or ()),
        volumes=tuple(sorted(config.get("Volumes") or ())),
        labels=dict(config.get("Labels") or {}),
    )


def _seconds(date: str) -> int:
    """Docker's 2026-11-22T10:00:00.123456789Z as seconds; 0 where there is none (it writes the year 1)."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", date)
    return max(0, int(datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp())) if found else 0


# --- enroot's files ---------------------------------------------------------------------------------------------


def enroot_files(config: ImageConfig) -> tuple[dict[str, str], list[str]]:
    """The four files by which enroot and Pyxis start an image, and the names of variables that could not be kept.

    enroot replaces $NAME in /etc/environment and /etc/fstab by its own environment, also in images that it makes.
    """
    command = shlex.join(config.entrypoint + config.cmd or ("/bin/sh",))
    given = f'{shlex.join(config.entrypoint)} "$@"'.lstrip()
    directory = shlex.quote(config.working_dir or "/")
    comments = [f"image {config.image_id}", *(f"{k} {v}" for k, v in sorted(config.labels.items()))]
    start = "".join(f"# {' '.join(comment.split())}\n" for comment in comments)
    start += f"""
mkdir -p {directory} 2>/dev/null
cd {directory} && unset OLDPWD || exit 1

# Pyxis mounts a file of its own here, to leave the entrypoint out or to put something before it.
if [ -s /etc/rc.local ]; then
    . /etc/rc.local
fi

if [ "$#" -gt 0 ]; then
    exec {given}
fi
exec {command}
"""
    kept = [line for line in config.env if "\n" not in line and "=" in line]
    escapes = str.maketrans({"\\": "\\134", " ": "\\040", "\t": "\\011", "\n": "\\012"})
    mounts = [volume.translate(escapes) for volume in config.volumes if volume.startswith("/")]
    files = {
        "etc/rc": start,
        "etc/rc.local": "# Read by /etc/rc when the container starts; here the command may still be changed.\n",
        "etc/environment": "".join(f"{line}\n" for line in kept),
        "etc/fstab": "".join(
            f"${{ENROOT_ROOTFS}}{m} {m} none x-create=dir,bind,rw,nosuid,nodev\n" for m in mounts
        ),
    }
    return files, [line.split("=")[0] for line in config.env if line not in kept]


# --- the tar stream -----------------------------------------------------------------------------------------------


class _Stream:
    """The export, read exactly: tarfile takes a stream that breaks off between two files for a complete one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes, at most PIECE of them at a time."""
        while size:
            while not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise LauncherError(
                        "the image's export broke off in the middle", "launcher image convert ..., again",
                        status=ExitStatus.ERROR,
                    )  # fmt: skip
                self._rest = memoryview(chunk)
            piece = self._rest[: min(size, PIECE)]
            self._rest = self._rest[len(piece) :]
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def extension(self, info: tarfile.TarInfo) -> bytes:
        """The data of a header that only continues another one."""
        if info.size > 1 << 20:
            raise LauncherError(f"the export has a header of {info.size:,} bytes")
        return self.read(_padded(info.size))[: info.size]

    def drain(self) -> None:
        """To the end, so that the engine's connection can be used again."""
        for _ in self._chunks:
            pass


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _members(stream: _Stream) -> Iterator[tuple[tarfile.TarInfo, dict[str, bytes]]]:
    """Each file's header, with its PAX records; the caller reads the data before it asks for the next one."""
    name = link = None
    pax: dict[str, bytes] = {}
    while any(block := stream.read(BLOCK)):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise LauncherError(
                "the image's export is damaged: not a tar header where one must be", original=str(error)
            ) from None
        if info.type in (tarfile.XGLTYPE, tarfile.XHDTYPE):
            records = _pax(stream.extension(info))
            pax |= records if info.type == tarfile.XHDTYPE else {}
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(stream.extension(info).rstrip(b"\0"))
        elif info.type == tarfile.GNUTYPE_LONGLINK:
            link = _text(stream.extension(info).rstrip(b"\0"))
        else:
            info.name = _text(pax["path"]) if "path" in pax else name or info.name
            info.linkname = _text(pax["linkpath"]) if "linkpath" in pax else link or info.linkname
            with suppress(ValueError):
                info.size = int(pax.get("size", info.size))
                info.mtime = float(pax.get("mtime", info.mtime))
            yield info, pax
            name, link, pax = None, None, {}
    stream.drain()


def _pax(data: bytes) -> dict[str, bytes]:
    """Records `LENGTH KEY=VALUE\\n`."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(data):
            raise LauncherError("the image's export is damaged: a PAX header without sense")
        records[_text(key)], data = value, data[length:]
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _path(name: str) -> str:
    """A tar's name without its leading ./ and trailing slash; refuses what no file system holds."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise LauncherError(f"the image's export has a name that leads out of it: {name!r}")
    if long := next((part for part in parts if len(part.encode("utf-8", "surrogateescape")) > NAME_MAX), ""):
        raise LauncherError(f"a file name longer than {NAME_MAX} bytes: {long!r}", "rename it in the image")
    return "/".join(parts)


def rewrite(
    export: Iterable[bytes], config: ImageConfig, metadata: Mapping[str, Any], report: Report
) -> Iterator[bytes | memoryview]:
    """The tar for mksquashfs: GNU headers, everything root's, without devices, with enroot's files at the end.

    GNU, because mksquashfs 4.5 strips the leading slash of a link's target that comes in a PAX header. Setuid bits
    and file capabilities go: enroot unpacks as an ordinary user, and every setuid program would become one that
    lets anybody on the node act as that user. Each file keeps its time, so that no .pyc becomes stale.
    """
    stream = _Stream(export)
    own, report.left_out = enroot_files(config)
    replaced = {*own, ".dockerenv", *([METADATA] if metadata else [])}
    workdir = _path(config.working_dir)
    fixed_time = {*MADE_BY_ENGINE, *(workdir[:n] for n in range(1, len(workdir) + 1))}
    directories = {""}
    devices: set[str] = set()

    def entry(info: tarfile.TarInfo, name: str) -> Iterator[bytes]:
        """The header, after those of directories that the export left out: mksquashfs would give them the time of day."""
        for depth in range(name.count("/")):
            parent = "/".join(name.split("/")[: depth + 1])
            if parent in report.links:
                raise LauncherError(f"the image has a file below the link /{parent}: /{name}")
            if parent not in directories:
                made = tarfile.TarInfo(parent)
                made.type, made.mode = tarfile.DIRTYPE, 0o755
                yield from entry(made, parent)
        info.name, info.uid, info.gid, info.uname, info.gname = name, 0, 0, "", ""
        info.mtime = config.created if name in fixed_time else min(max(int(info.mtime), 0), 2**32 - 1)
        if info.isdir():
            if name in directories:
                return
            directories.add(name)
        report.entries += 1
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")

    for info, pax in _members(stream):
        name = _path(info.name)
        if info.issparse() or any(key.startswith("GNU.sparse") for key in pax):
            raise LauncherError(
                f"/{name}: stored as a sparse file; no engine exports those", "docker export, not tar --sparse"
            )
        if info.isreg():
            info.type = tarfile.REGTYPE
        elif not (info.isdir() or info.issym() or info.islnk() or info.isfifo() or info.isdev()):
            raise LauncherError(f"/{name}: an entry of unknown type {info.type!r} in the image's export")
        else:
            info.size = 0
        if info.islnk():
            info.linkname = _path(info.linkname)
            if info.linkname in replaced:
                raise LauncherError(f"/{name} is a hard link to /{info.linkname}, which the conversion replaces")
        if info.ischr() or info.isblk() or name.startswith("dev/") or (info.islnk() and info.linkname in devices):
            report.devices += not name.startswith("dev/")
            devices.add(name)
        if name in devices or name in replaced or not name:
            if name in replaced and info.isdir():
                raise LauncherError(f"/{name} is a directory; enroot needs a file of that name")
            data = stream.read(_padded(info.size)) if name == METADATA else b""
            ...
