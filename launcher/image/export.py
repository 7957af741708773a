"""The tar that `docker export` streams, rewritten into the tar that mksquashfs reads, with the files that enroot wants.

Pure: chunks in, chunks out, nothing is kept but names.
"""

from __future__ import annotations

import re
import shlex
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import parse_json
from launcher.image import ARCHES
from launcher.image.squashfs_file import METADATA, elf_machine, follow

PIECE = 64 * 1024  # larger writes into a pipe cost several times the CPU
BLOCK = tarfile.BLOCKSIZE
NAME_MAX = 255  # mksquashfs truncates longer ones with no more than a warning
# `docker create` makes these anew for every container; their times would make every conversion different.
MADE_BY_ENGINE = ("dev", "etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "sys")

# The header of a file, directory or link as Docker writes it: ustar, with plain octal numbers.
_PLAIN = re.compile(
    rb"(?P<name>.{100})(?P<mode>[0-7]{7})\0.{16}(?P<size>[0-7]{11})\0(?P<mtime>[0-7]{11})\0"
    rb"(?P<sum>[0-7]{6})\0 (?P<type>[0125])(?P<link>.{100})ustar\0.{82}(?P<prefix>.{155})",
    re.S,
)

# name, numbers, checksum, type, link, magic
_GNU = struct.Struct("100s48s8sc100s8s247x")


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


@dataclass
class Report:
    """What `rewrite` met on its way; complete when its iterator is."""

    arch: str = ""  # uname's word, from the header of /bin/sh: `docker import` labels every image as the host's
    unpacked_bytes: int = 0
    cleared: int = 0  # setuid and setgid bits, file capabilities
    devices: int = 0  # outside /dev
    root_only: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # variables that one line cannot hold
    links: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)  # executable file -> architecture, "" for scripts
    metadata: dict[str, Any] = field(default_factory=dict)  # what the image says of itself


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
        "etc/fstab": "".join(f"${{ENROOT_ROOTFS}}{m} {m} none x-create=dir,bind,rw,nosuid,nodev\n" for m in mounts),
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
        while size > 0:
            while not self._rest:
                try:
                    chunk = next(self._chunks, None)
                except LauncherError:
                    raise
                except Exception as error:  # of the engine, its client or the network
                    raise _damaged(f"{type(error).__name__}: {error}") from error
                if chunk is None:
                    raise _damaged("it broke off in the middle")
                self._rest = memoryview(chunk)
            piece = self._rest[: min(size, PIECE)]
            self._rest = self._rest[len(piece) :]
            size -= len(piece)
            yield piece

    def data(self, info: tarfile.TarInfo) -> bytes:
        """All the data of a small entry: a header that continues another one, or the image's metadata."""
        if info.size > 1 << 20:
            raise _damaged(f"{info.name} has {info.size:,} bytes")
        return b"".join(self.pieces(_padded(info.size)))[: info.size]

    def members(self) -> Iterator[tuple[tarfile.TarInfo, dict[str, bytes]]]:
        """Each file's header and PAX records; the caller reads the file's data before it asks for the next."""
        before: dict[str, bytes] = {}
        while any(block := b"".join(self.pieces(BLOCK))):
            try:
                info = _plain(block) or tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                if info.type == tarfile.XHDTYPE:
                    before |= _pax(self.data(info))
                elif info.type == tarfile.XGLTYPE:
                    self.data(info)
                elif info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                    key = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                    before[key] = self.data(info).rstrip(b"\0")
                else:
                    info.name = _text(before["path"]) if "path" in before else info.name
                    info.linkname = _text(before["linkpath"]) if "linkpath" in before else info.linkname
                    info.size = int(before.get("size", info.size))
                    if not 0 <= info.size < 1 << 50:
                        raise ValueError("a size that no file has")
                    info.mtime = int(float(before.get("mtime", info.mtime)))
                    yield info, before
                    before = {}
            except (tarfile.HeaderError, ValueError, OverflowError) as error:
                raise _damaged(f"a header without sense: {error}") from None
        for _ in self._chunks:  # to the end, so that the engine's connection can be used again
            pass


def _plain(block: bytes) -> tarfile.TarInfo | None:
    """An ordinary header in a fifth of tarfile's time; None for one that it had better read."""
    found = _PLAIN.match(block)
    if not found or sum(block) - sum(block[148:156]) + 8 * 32 != int(found["sum"], 8):
        return None
    name, link, prefix = (_text(found[field].partition(b"\0")[0]) for field in ("name", "link", "prefix"))
    info = tarfile.TarInfo(f"{prefix}/{name}" if prefix else name)
    info.mode, info.size, info.mtime = (int(found[field], 8) for field in ("mode", "size", "mtime"))
    info.linkname, info.type = link, found["type"]
    return info


def _damaged(how: str) -> LauncherError:
    what = f"the image's export is incomplete or damaged: {how}"
    return LauncherError(what, "is the engine up? docker info; then the same command again", status=ExitStatus.ERROR)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax(data: bytes) -> dict[str, bytes]:
    """Records of the form `LENGTH KEY=VALUE\\n`; their lengths count themselves."""
    records = {}
    while data:
        digits, _, rest = data.partition(b" ")
        key, equals, value = rest[: int(digits) - len(digits) - 2].partition(b"=")
        if not equals or not len(digits) + 2 < int(digits) <= len(data):
            raise ValueError("PAX record")
        records[_text(key)], data = value, data[int(digits) :]
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _path(name: str) -> str:
    """A tar's name without its leading ./ and trailing slash; refuses what no file system holds."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise LauncherError(f"the image's export has a name that leads out of it: {name!r}")
    if long := [part for part in parts if len(part.encode("utf-8", "surrogateescape")) > NAME_MAX]:
        raise LauncherError(f"a file name longer than {NAME_MAX} bytes: {long[0]!r}", "rename it in the image")
    return "/".join(parts)


def rewrite(export: Iterable[bytes], config: ImageConfig, report: Report) -> Iterator[bytes | memoryview]:
    """The tar for mksquashfs: GNU headers, everything root's, without devices, enroot's files at the end.

    GNU, because mksquashfs 4.5 strips the leading slash of a link's target that comes in a PAX header. Setuid bits
    and file capabilities go: enroot unpacks as an ordinary user, which would turn every setuid program into one
    by which anybody on the node acts as that user. Each file keeps its time: a new one makes its .pyc stale.
    """
    stream = _Stream(export)
    own, report.left_out = enroot_files(config)
    replaced = {*own, ".dockerenv"}
    parts = _path(config.working_dir).split("/")
    fixed_time = {*MADE_BY_ENGINE, *("/".join(parts[:n]) for n in range(1, len(parts) + 1))}
    directories = {""}
    devices: set[str] = set()
    names: set[str] = set()  # memory grows with the number of files, not with their size

    def header(info: tarfile.TarInfo, name: str) -> Iterator[bytes]:
        """After those of directories that the export does not list: mksquashfs would give them the time of day."""
        parent = name.rpartition("/")[0]
        if parent in report.links:
            raise LauncherError(f"/{name} is below the link /{parent}")
        if parent not in directories:
            made = tarfile.TarInfo()
            made.type, made.mode, made.mtime = tarfile.DIRTYPE, 0o755, config.created
            yield from header(made, parent)
        if info.isdir():
            directories.add(name)
        info.name = name
        info.mtime = config.created if name in fixed_time else min(max(info.mtime, 0), 2**32 - 1)
        yield _gnu_header(info)

    for info, pax in stream.members():
        name, target = _path(info.name), _path(info.linkname) if info.islnk() else info.linkname
        _refuse_strange(info, pax, name)
        if info.isreg():
            info.type = tarfile.REGTYPE
        else:
            info.size = 0
        if info.islnk() and target in replaced:
            raise LauncherError(f"/{name} is a hard link to /{target}, which the conversion replaces")
        # With these mksquashfs 4.5 crashes, or leaves a file out without a word.
        if info.islnk() and (target not in names or target in directories):
            raise _damaged(f"/{name} is a hard link to /{target}, and no file of that name came before it")
        if name in names and not info.isdir():
            raise _damaged(f"/{name} comes twice")
        if info.isdir() and name in replaced:
            raise LauncherError(f"/{name} is a directory; enroot needs a file of that name")
        names.add(name)
        if name.startswith("dev/") or info.ischr() or info.isblk() or (info.islnk() and target in devices):
            report.devices += not name.startswith("dev/")
            devices.add(name)
        if name in devices or name in replaced or name in directories:
            for _ in stream.pieces(_padded(info.size)):
                pass
            continue
        info.linkname = target
        _note(report, info, name, pax)
        yield from header(info, name)
        data = stream.data(info) if name == METADATA else None
        if data is not None:
            report.metadata = _metadata(data)
            yield data.ljust(_padded(info.size), b"\0")
        elif info.isreg() and info.size:
            first = b"".join(stream.pieces(BLOCK))
            if info.mode & 0o111:
                report.programs[name] = elf_machine(first)
            yield first
            yield from stream.pieces(_padded(info.size) - BLOCK)

    shell = follow("bin/sh", report.links)
    if shell not in report.programs:
        raise LauncherError(
            "the image has no /bin/sh, and Pyxis starts every container by it",
            "add a shell, or a base image with one",
        )
    report.arch = report.programs[shell] or ARCHES.get(config.arch, config.arch)
    for name, text in own.items():
        data = text.encode("utf-8", "surrogateescape")
        made = tarfile.TarInfo()
        report.unpacked_bytes += len(data)
        made.size, made.mtime, made.mode = len(data), config.created, 0o755 if name == "etc/rc" else 0o644
        yield from header(made, name)
        yield data.ljust(_padded(len(data)), b"\0")
    yield bytes(2 * BLOCK)


def _gnu_header(info: tarfile.TarInfo) -> bytes:
    """The entry as root's, as mksquashfs reads it best: from a PAX header, 4.5 takes a link's target without its slash.

    The plain case is written here: tarfile needs 26 microseconds, and an image has 50,000 entries.
    """
    name = info.name.encode("utf-8", "surrogateescape") + (b"/" if info.isdir() else b"")
    link = info.linkname.encode("utf-8", "surrogateescape")
    if len(name) > tarfile.LENGTH_NAME or len(link) > tarfile.LENGTH_LINK or info.size >= 8**11:
        info.uid, info.gid, info.uname, info.gname = 0, 0, "", ""
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (info.mode & 0o7777, 0, 0, info.size, int(info.mtime))
    head = _GNU.pack(name, numbers, b" " * 8, info.type, link, tarfile.GNU_MAGIC)
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _refuse_strange(info: tarfile.TarInfo, pax: Mapping[str, bytes], name: str) -> None:
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
        raise LauncherError(f"/{name}: stored as a sparse file", "use the engine's export, not tar --sparse")
    known = info.isreg() or info.isdir() or info.issym() or info.islnk() or info.isfifo() or info.isdev()
    if not known:
        raise LauncherError(f"/{name}: an entry of unknown type {info.type!r} in the image's export")


def _note(report: Report, info: tarfile.TarInfo, name: str, pax: Mapping[str, bytes]) -> None:
    """Takes away what must not travel, and remembers what is said or checked at the end."""
    if info.issym():
        report.links[name] = info.linkname
        return
    if info.islnk():
        if info.linkname in report.programs:
            report.programs[name] = report.programs[info.linkname]
        elif info.linkname in report.links:
            report.links[name] = report.links[info.linkname]
        return
    report.unpacked_bytes += info.size
    if info.isdir():
        info.mode |= 0o700  # otherwise enroot's unpacking stops halfway, or its removal does
    elif info.mode & 0o6000 or "SCHILY.xattr.security.capability" in pax:
        report.cleared += 1
        info.mode &= ~0o6000
    readable = 0o005 if info.isdir() else 0o004
    if info.mode & readable != readable:
        report.root_only.append(name)


def _metadata(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
