"""The directory that is staged into: may it be used, is there room, and is nobody else at work in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from launcher.errors import ExitStatus, LauncherError, quoted

STATE = ".staged"  # manifest, lock and unfinished downloads, inside the directory
IGNORED = {STATE, "lost+found", ".snapshot"}  # what a file system or we put into an empty directory
RESERVE = 64 << 20  # bytes that are left free: the manifest, and rounding


class Stopped(Exception):
    """Another file's error, or Ctrl-C, ends this download too; what it has is kept."""


def safe_path(path: object) -> bool:
    """Whether a name from a server or a manifest stays inside the directory, and outside of our own part of it."""
    if not isinstance(path, str) or not path or not path.isprintable() or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    # Joined again it must be the same: no "//", no "./", no trailing slash.
    return not (path.startswith("/") or ".." in parts or parts[0] == STATE) and "/".join(parts) == path


def write_error(path: Path, error: OSError) -> LauncherError:
    """The operating system's refusal to write below the target, with what to do about it."""
    place = quoted(path.parent)
    fixes = {
        errno.EACCES: f"--to a directory that you can write, or: ls -ld {place}",
        errno.EPERM: f"--to a directory that you can write, or: ls -ld {place}",
        errno.EROFS: "--to a directory on a file system that is not mounted read-only",
        errno.ENOSPC: f"free space (df -h {place}), then the same command continues",
        errno.EDQUOT: f"free space (quota -s; du -sh {place}), then the same command continues",
        errno.EFBIG: "the file system, or ulimit -f, does not allow files of this size",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    return LauncherError(
        f"cannot write {path}: {reason}",
        fixes.get(error.errno or 0, f"ls -ld {place}"),
        status=ExitStatus.FILESYSTEM,
    )


def refuse_unusable(target: Path) -> None:
    """Raises LauncherError for a file, and for a place where this user may not even look. Writes nothing."""
    try:
        if stat.S_ISDIR(os.stat(target).st_mode):
            os.stat(target / STATE / "manifest.json")
            return
    except FileNotFoundError:
        return
    except NotADirectoryError:
        above = next(parent for parent in target.parents if os.path.exists(parent))
        raise LauncherError(
            f"--to {target}: {above} is a file, not a directory", "name a directory that is not below a file"
        ) from None
    except OSError as error:
        raise write_error(target, error) from error
    raise LauncherError(f"--to {target}: a file, not a directory", "name a new directory, or one to continue in")


def refuse_foreign(target: Path, ours: Callable[[Path], bool]) -> None:
    """`refuse_unusable`, and others' data: no manifest, and nothing in it that `ours` knows. Writes nothing."""
    refuse_unusable(target)
    try:
        found = sorted(set(os.listdir(target)) - IGNORED)
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_error(target, error) from error
    if found and not (target / STATE / "manifest.json").exists() and not ours(target):
        raise LauncherError(
            f"--to {target}: holds other data ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})",
            "name a directory that is new or empty, or one that was staged before",
        )


def refuse_unwritable(target: Path) -> None:
    """Raises LauncherError where no directory can be made: by making one, and removing it."""
    above = next(place for place in (target, *target.absolute().parents) if os.path.isdir(place))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".launcher-probe-", dir=above))
    except OSError as error:
        raise write_error(target, error) from error


def prepare(target: Path, ours: Callable[[Path], bool]) -> None:
    """Makes the directory and its own part; refuses a file, a place that cannot be written, and others' data.

    `ours` says whether a directory without a manifest holds what would be staged here.
    """
    refuse_foreign(target, ours)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / STATE / "partial").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(Path(error.filename or target), error) from error


@contextlib.contextmanager
def locked(target: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the directory's lock; waits for another stager, after saying who it is. The kernel frees a dead one's."""
    path = target / STATE / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: {_holder(descriptor)} is staging into {target}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # no locks on this file system: ENOLCK, ENOSYS, EOPNOTSUPP
            say(f"warning: {target}: {os.strerror(error.errno or 0)}; do not stage into it twice at once")
        with contextlib.suppress(OSError):  # who it is helps to wait; a full disk must not stop here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(who['pid'])} on {str(who['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another launcher"


def check_space(target: Path, needed: int) -> None:
    """Refuses to begin what does not fit. `needed`: bytes still to be written."""
    free = free_bytes(target)
    if needed and needed + RESERVE > free:
        raise LauncherError(
            f"{target}: {gigabytes(needed)} are still needed, {gigabytes(free)} are free",
            f"free space (df -h {quoted(target)}), ask for fewer files (--files N), or another place, or --to another file system",
            status=ExitStatus.FILESYSTEM,
        )


def free_bytes(target: Path) -> int:
    """Bytes that this user may still write there; quotas are not in it, they show only when writing."""
    found = os.statvfs(target)
    return found.f_bavail * found.f_frsize


def gigabytes(count: float) -> str:
    """`20.3 GB`, `512 kB`: decimal units, as disks and the Hub count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999 * size else f"{count / size:,.0f} {unit}"
    return f"{int(count)} B"
