"""The tar that `docker export` streams, rewritten into the tar that mksquashfs reads, with the files that enroot wants.

Pure: chunks in, chunks out, nothing is kept but names.
"""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import IO, cast

from launcher.base.errors import ExitStatus, LauncherError

PIECE = 64 * 1024  # larger writes into a pipe cost several times the CPU
BLOCK = tarfile.BLOCKSIZE
NAME_MAX = 255  # mksquashfs truncates longer ones with no more than a warning
# `docker create` makes these anew for every container; their times would make every conversion different.
MADE_BY_ENGINE = ("dev", "etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "sys")

HEADER_MAX = 1 << 20  # bytes of a header that continues another one
# Headers that say more of the next one.
_CONTINUED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


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


@dataclass
class Report:
    """What `rewrite` met on its way; complete when its iterator is."""

    unpacked_bytes: int = 0
    cleared: int = 0  # setuid and setgid bits, file capabilities
    devices: int = 0  # outside /dev
    root_only: list[str] = field(default_factory=list)


# --- enroot's files ---------------------------------------------------------------------------------------------


def enroot_files(config: ImageConfig) -> dict[str, str]:
    """The four files by which enroot and Pyxis start an image. A variable with a line break cannot be kept.

    enroot replaces $NAME in /etc/environment and /etc/fstab by its own environment, also in images that it makes.
    """
    command = shlex.join(config.entrypoint + config.cmd or ("/bin/sh",))
    given = f'{shlex.join(config.entrypoint)} "$@"'.lstrip()
    directory = shlex.quote(config.working_dir or "/")
    start = f"""# image {config.image_id}
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
    return {
        "etc/rc": start,
        "etc/rc.local": "# Read by /etc/rc when the container starts; here the command may still be changed.\n",
        "etc/environment": "".join(f"{line}\n" for line in kept),
        "etc/fstab": "".join(f"${{ENROOT_ROOTFS}}{m} {m} none x-create=dir,bind,rw,nosuid,nodev\n" for m in mounts),
    }


# --- the tar stream -----------------------------------------------------------------------------------------------


class _Entry(tarfile.TarInfo):
    """A header of the export. tarfile takes one without sense for the archive's end; here it is damage."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Entry:
        try:
            entry = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not any(buf):  # the archive's end
                raise
            raise _damaged(f"a header without sense: {error}") from None
        if not 0 <= entry.size < (HEADER_MAX if entry.type in _CONTINUED else 1 << 50):
            raise _damaged(f"{entry.name} has {entry.size:,} bytes")
        return entry


def _members(export: Iterable[bytes]) -> Iterator[tuple[tarfile.TarInfo, Callable[[int], bytes]]]:
    """Each file, with what reads its data: the caller takes what it wants of them before it asks for the next."""
    chunks = iter(export)

    def read(_most: int) -> bytes:
        """tarfile asks for no more than it needs, but would take an end between two files for the archive's."""
        if chunk := next(filter(None, chunks), b""):
            return chunk
        raise _damaged("it broke off in the middle")

    try:
        stream = cast(IO[bytes], SimpleNamespace(read=read))
        with tarfile.open(fileobj=stream, mode="r|", bufsize=PIECE, encoding="utf-8", tarinfo=_Entry) as tar:
            while info := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # its list would grow with the image
                info.mtime = int(info.mtime)
                yield info, tar.fileobj.read
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _damaged(f"a header without sense: {error}") from None
    for _ in chunks:  # to the end, so that the engine's connection can be used again
        pass


def _damaged(how: str) -> LauncherError:
    what = f"the image's export is incomplete or damaged: {how}"
    fix = "is the engine up? docker info; then the same command again"
    return LauncherError("export-broken", what, fix, status=ExitStatus.ERROR)


def unfit(what: str) -> LauncherError:
    return LauncherError("image-content", what, "change it in the image, and convert it again")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _path(name: str) -> str:
    """A tar's name without its leading ./ and trailing slash; refuses what no file system holds."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise unfit(f"the image's export has a name that leads out of it: {name!r}")
    if long := [part for part in parts if len(part.encode("utf-8", "surrogateescape")) > NAME_MAX]:
        raise unfit(f"a file name longer than {NAME_MAX} bytes: {long[0]!r}")
    return "/".join(parts)


def rewrite(export: Iterable[bytes], config: ImageConfig, report: Report) -> Iterator[bytes]:
    """The tar for mksquashfs: GNU headers, everything root's, without devices, enroot's files at the end.

    GNU, because mksquashfs 4.5 strips the leading slash of a link's target that comes in a PAX header. Setuid bits
    and file capabilities go: enroot unpacks as an ordinary user, which would turn every setuid program into one
    by which anybody on the node acts as that user. Each file keeps its time: a new one makes its .pyc stale.
    """
    own = enroot_files(config)
    replaced = {*own, ".dockerenv"}
    parts = _path(config.working_dir).split("/")
    fixed_time = {*MADE_BY_ENGINE, *("/".join(parts[:n]) for n in range(1, len(parts) + 1))}
    directories = {""}
    devices: set[str] = set()
    links: set[str] = set()
    names: set[str] = set()  # memory grows with the number of files, not with their size

    def header(info: tarfile.TarInfo, name: str) -> Iterator[bytes]:
        """After those of directories that the export does not list: mksquashfs would give them the time of day."""
        parent = name.rpartition("/")[0]
        if parent in links:
            raise unfit(f"/{name} is below the link /{parent}")
        if parent not in directories:
            made = tarfile.TarInfo()
            made.type, made.mode, made.mtime = tarfile.DIRTYPE, 0o755, config.created
            yield from header(made, parent)
        if info.isdir():
            directories.add(name)
        info.name = name
        info.mtime = config.created if name in fixed_time else min(max(info.mtime, 0), 2**32 - 1)
        info.uid, info.gid, info.uname, info.gname = 0, 0, "", ""
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")

    for info, read in _members(export):
        name, target = _path(info.name), _path(info.linkname) if info.islnk() else info.linkname
        if info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers):
            raise unfit(f"/{name}: stored as a sparse file, which engines do not export")
        if info.type not in tarfile.SUPPORTED_TYPES:
            raise unfit(f"/{name}: an entry of unknown type {info.type!r} in the image's export")
        if info.isreg():
            info.type = tarfile.REGTYPE
        else:
            info.size = 0
        if info.islnk() and target in replaced:
            raise unfit(f"/{name} is a hard link to /{target}, which the conversion replaces")
        # With these mksquashfs 4.5 crashes, or leaves a file out without a word.
        if info.islnk() and (target not in names or target in directories):
            raise _damaged(f"/{name} is a hard link to /{target}, and no file of that name came before it")
        if name in names and not info.isdir():
            raise _damaged(f"/{name} comes twice")
        if info.isdir() and name in replaced:
            raise unfit(f"/{name} is a directory; enroot needs a file of that name")
        names.add(name)
        if name.startswith("dev/") or info.ischr() or info.isblk() or (info.islnk() and target in devices):
            report.devices += not name.startswith("dev/")
            devices.add(name)
        if name in devices or name in replaced or name in directories:
            continue
        info.linkname = target
        if info.issym() or (info.islnk() and target in links):
            links.add(name)
        elif not info.islnk():
            _note(report, info, name)
        yield from header(info, name)
        for left in range(_padded(info.size), 0, -PIECE):
            yield read(min(left, PIECE))

    for name, text in own.items():
        data = text.encode("utf-8", "surrogateescape")
        made = tarfile.TarInfo()
        report.unpacked_bytes += len(data)
        made.size, made.mtime, made.mode = len(data), config.created, 0o755 if name == "etc/rc" else 0o644
        yield from header(made, name)
        yield data.ljust(_padded(len(data)), b"\0")
    yield bytes(2 * BLOCK)


def _note(report: Report, info: tarfile.TarInfo, name: str) -> None:
    """Takes away what must not travel, and counts what is said at the end."""
    report.unpacked_bytes += info.size
    if info.isdir():
        info.mode |= 0o700  # otherwise enroot's unpacking stops halfway, or its removal does
    elif info.mode & 0o6000 or "SCHILY.xattr.security.capability" in info.pax_headers:
        report.cleared += 1
        info.mode &= ~0o6000
    readable = 0o005 if info.isdir() else 0o004
    if info.mode & readable != readable:
        report.root_only.append(name)
