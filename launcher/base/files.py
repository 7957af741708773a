"""Writing files so that nobody ever sees half of one, and finding the files that travel with the package."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.values import parse_json

PACKAGE = Path(__file__).parents[1]  # launcher/
MOST_BYTES = 4 << 20  # of a file that is read whole; the largest of ours, a manifest, has some 200 kB


def data_dir(name: str) -> Path:
    """The folder `slurm` or `containers`: inside an installed wheel, else at the top of the checkout."""
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def write_bytes(path: Path, data: bytes, mode: int = 0o644, option: str = "") -> None:
    """Writes through a temporary name beside the target, then renames; `mode` holds from the first byte on.

    Raises LauncherError when the directory cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise filesystem_error(path, error, option) from error


def write_text(path: Path, text: str, mode: int = 0o644, option: str = "") -> None:
    """`write_bytes` of UTF-8; names of files that are not UTF-8 keep their bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"), mode, option)


def write_json(path: Path, value: Any, mode: int = 0o644, option: str = "") -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode, option)


def lock(descriptor: int, how: int) -> bool:
    """flock; False where the file system has no locks, as some network mounts. There, who locks goes on without.

    Raises BlockingIOError where `how` says not to wait and somebody holds it.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


@contextmanager
def locked(path: Path, how: int, mode: int = 0o644) -> Iterator[None]:
    """Holds the lock of the file `path`, which is made where it is missing and never a link. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        lock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def read_bytes(path: Path, most: int = MOST_BYTES, *, wait: bool = False) -> bytes:
    """All of a file that is read whole. Raises OSError; EFBIG where it has more than `most` bytes, or never ends.

    Run directories may be shared: a pipe of that name is not waited for, unless `wait` says that the user named it.
    """
    flags = 0 if wait else os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as stream:
        if not (wait or stat.S_ISREG(os.fstat(stream.fileno()).st_mode)):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most >> 20} MiB", str(path))
    return data


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is none or it is not a JSON object (copied half, edited, too long)."""
    try:
        value = parse_json(read_bytes(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def unreadable(path: Path, error: OSError | UnicodeDecodeError, fix: str = "") -> LauncherError:
    """What the operating system says of a file or directory that is to be read."""
    why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
    fix = fix or f"ls -ld {quoted(path)}"
    return LauncherError("unreadable", f"cannot read {path}: {why}", fix, status=ExitStatus.FILESYSTEM)


def filesystem_error(path: Path, error: OSError, option: str = "") -> LauncherError:
    """The operating system's refusal, with what to do about the common ones; `option` is what names another place."""
    elsewhere = f": {option}" if option else ""
    fixes = {
        errno.EACCES: f"choose a directory you can write{elsewhere}, or: ls -ld {quoted(path.parent)}",
        errno.EROFS: f"choose a directory you can write{elsewhere}",
        errno.ENOSPC: f"free space on it (df -h {quoted(path.parent)}), or choose another place{elsewhere}",
        errno.EDQUOT: f"free space on it (quota -s; du -sh {quoted(path.parent)}), or choose another place{elsewhere}",
        errno.ENOENT: f"choose another place{elsewhere}, or: mkdir -p {quoted(path.parent)}",
        errno.ENOTDIR: f"choose a directory{elsewhere}",
        errno.ENAMETOOLONG: f"choose a shorter path{elsewhere}",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    return LauncherError(
        "unwritable", f"cannot write {path}: {reason}", fixes.get(error.errno or 0, ""), status=ExitStatus.FILESYSTEM
    )
