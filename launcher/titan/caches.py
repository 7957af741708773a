"""Where a job's caches are on a node: on its own disk, and gone when the job has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from . import Refused

LOCK = ".lock"  # in a job's directory of caches
# File systems that every node shares, as /proc/mounts calls them: too slow for caches, and their locks unreliable.
NETWORK = re.compile(r"(fuse\.)?(afs|beegfs\w*|ceph|cifs|glusterfs|gpfs|juicefs|lustre|nfs4?|panfs|smb3|sshfs|wekafs)")


def scratch_dir(env: Any, configured: str = "") -> Path:
    """A directory of this job's own on this node; caches inside it are code that will be run.

    TITAN_SCRATCH names one that the job script made up and removes when the job ends; it is not used where it is on a
    shared file system. `configured`, on the node's own disk, comes next; then the temporary directory. In those two
    the next job removes what ended jobs left.
    """
    if (given := env.get("TITAN_SCRATCH")) and not NETWORK.fullmatch(filesystem_of(Path(given))):
        scratch = Path(given).absolute()  # torchrun starts in another directory
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(scratch):
            raise Refused(f"{scratch}, for caches, is a link or somebody else's", f"ls -ld {shlex.quote(str(scratch))}")
        return scratch
    place = Path(configured or tempfile.gettempdir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_ended(place)
        return _held(place / f"titan-{os.getuid()}-{env.get('TITAN_JOB_ID') or os.getpid()}")
    except OSError as error:
        if not configured:
            raise
        raise Refused(
            f"{place}, for caches, cannot be written on this node: {error.strerror}",
            'in your file of settings, [profile]: scratch = "/a/directory/on/the/nodes/own/disk"',
        ) from error


def _held(wanted: Path) -> Path:
    """The directory, ours alone, with a lock in it that torchrun inherits and holds as long as it lives."""
    wanted.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(wanted):  # somebody else was there first
        wanted = Path(tempfile.mkdtemp(prefix=f"{wanted.name}-", dir=wanted.parent))
    lock = os.open(wanted / LOCK, os.O_CREAT | os.O_RDONLY | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: then no later job removes it
        fcntl.flock(lock, fcntl.LOCK_SH)
    os.set_inheritable(lock, True)
    return wanted


def _is_ours(path: Path) -> bool:
    """A directory of this user's, into which nobody else may put anything; not a link to one."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _remove_ended(place: Path) -> None:
    """Removes this user's directories in `place` whose job has ended: their lock is free."""
    for path in place.glob(f"titan-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            if not _is_ours(path) or time.time() - path.stat().st_mtime < 60:  # made, and not yet locked
                continue
            lock = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def filesystem_of(path: Path) -> str:
    """The type of the file system that `path` is on, or will be; empty where the kernel does not say."""
    real, found = os.path.realpath(path), ("", "")
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split(" ")
        place = fields[1].replace("\\040", " ").rstrip("/")  # a later mount hides an earlier one
        if len(place) >= len(found[0]) and f"{real}/".startswith(f"{place}/"):
            found = (place, fields[2])
    return found[1]
