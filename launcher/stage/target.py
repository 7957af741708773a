"""The directory that is staged into: may it be used, is there room, and is nobody else at work in it.

Others may write there, too, and put a link where a file or folder of ours was. So everything is opened once, without
following links, checked as it was opened, and used through its descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, lock, unreadable
from launcher.base.output import some

STATE = ".staged"  # manifest, lock and unfinished downloads, inside the directory
IGNORED = {STATE, "lost+found", ".snapshot"}  # what a file system or we put into an empty directory
RESERVE = 64 << 20  # bytes that are left free: the manifest, and rounding
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Stopped(Exception):
    """Another file's error, or Ctrl-C, ends this download too."""


class WrongLength(OSError):
    """More or less comes than was announced."""


class TooSlow(OSError):
    """Bytes come, but so few that there is no end in sight."""


def safe_path(path: object) -> bool:
    """Whether a name from a server or a manifest stays inside the directory, and outside of our own part of it."""
    if not isinstance(path, str) or not path or not path.isprintable() or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    # Joined again it must be the same: no "//", no "./", no trailing slash.
    return not (path.startswith("/") or ".." in parts or parts[:1] == (STATE,)) and "/".join(parts) == path


def write_error(path: Path, error: OSError) -> LauncherError:
    """The operating system's refusal to write below the target, with what to do about it."""
    if error.errno == errno.ELOOP:
        return LauncherError(
            "in-the-way",
            f"cannot write {path}: {os.strerror(errno.ELOOP)}",
            f"it is a link, or not a file: ls -l {quoted(path)}; remove it, then the same command",
            status=ExitStatus.FILESYSTEM,
        )
    return filesystem_error(path, error, "--to DIR")


def is_directory(place: Path) -> bool:
    """Whether there is a directory. Raises LauncherError for a file, and where this user may not look into it."""
    try:
        if not stat.S_ISDIR(os.stat(place).st_mode):
            raise NotADirectoryError
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(place / STATE / "manifest.json")
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        file = next(path for path in (place, *place.parents) if os.path.exists(path))
        raise LauncherError("not-a-directory", f"{file}: a file, not a directory", "name a directory") from None
    except OSError as error:
        raise unreadable(place, error) from error
    return True


def refuse_foreign(target: Path, ours: Callable[[Path], object]) -> None:
    """Raises LauncherError for what is no directory, and for others' data: no manifest, and nothing that `ours` knows.
    Writes nothing.
    """
    if not is_directory(target) or (target / STATE / "manifest.json").exists() or ours(target):
        return
    try:
        found = sorted(set(os.listdir(target)) - IGNORED)
    except OSError as error:
        raise unreadable(target, error) from error
    if found:
        raise LauncherError(
            "target-holds-other",
            f"--to {target}: holds other data ({some(found)})",
            "name a directory that is new or empty, or one that was staged before",
        )


class Incoming(FileIO):
    """A file that is being received: it takes no more bytes than it should have, and tells of those that it took.

    Errors of the disk become LauncherErrors here, where they cannot be taken for errors of the network.
    """

    limit: int
    on_bytes: Callable[[int], None]
    received = 0  # bytes, in all attempts
    start = 0  # where the part begins that is being received, of a file that comes in parts

    @property
    def handle(self) -> Path:
        """A path that leads here and nowhere else, for code that knows nothing but paths."""
        return Path(f"/proc/{os.getpid()}/fd/{self.fileno()}")

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            raise WrongLength(f"more than the {self.limit:,} bytes that were announced")
        left = memoryview(data)
        try:
            while left:  # a disk that is nearly full takes a part, and refuses the next
                left = left[super().write(left) :]
        except OSError as error:
            raise write_error(Path(str(self.name)), error) from error
        self.received += len(data)
        self.on_bytes(len(data))
        return len(data)

    def restart(self) -> None:
        self.on_bytes(self.start - os.fstat(self.fileno()).st_size)
        self.seek(self.start)
        self.truncate()


class Folder:
    """A directory that was opened: names in it are used as they were checked, whatever its path leads to by now.

    It closes when nobody uses it any more: a download that is being stopped may do so for a moment longer than others.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    def __del__(self) -> None:
        os.close(self.fd)

    def below(self, *names: str) -> Folder:
        """The folder with these names in it, made where there is none. Raises LauncherError for a link on the way."""
        if not names:
            return self
        path = self.path / names[0]
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(names[0], dir_fd=self.fd)
            folder = Folder(path, os.open(names[0], DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd))
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise in_the_way(path, f"{'a link' if path.is_symlink() else 'a file'}, not a directory") from error
            raise write_error(path, error) from error
        return folder.below(*names[1:])

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """A descriptor of a regular file, which to be written has no second name. Raises OSError for anything else."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, mode, dir_fd=self.fd)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and (found.st_nlink == 1 or not flags & (os.O_WRONLY | os.O_RDWR)):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def remove(self, name: str) -> None:
        """Deletes what is ours: a link itself, no folder."""
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_uid == os.geteuid():
                os.unlink(name, dir_fd=self.fd)


def in_the_way(path: Path, what: str) -> LauncherError:
    """Nothing can be put at `path` as it is, nor through it."""
    place = quoted(path)
    return LauncherError("in-the-way", f"{path} is {what}", f"mv {place} {place}.old, then the same command")


@dataclass(frozen=True)
class Work:
    """A directory that is being staged into, its own part, and in that the unfinished files."""

    top: Folder
    state: Folder
    partial: Folder

    @contextlib.contextmanager
    def unfinished(self, limit: int, on_bytes: Callable[[int], None] = lambda _count: None) -> Iterator[Incoming]:
        """A new file under a random name, which goes again unless `keep` has given it a final one."""
        name = os.urandom(12).hex()
        path = self.partial.path / name
        try:
            stream = Incoming(str(path), "x+b", opener=lambda _path, flags: self.partial.open(name, flags))
        except OSError as error:
            raise write_error(path, error) from error
        stream.limit, stream.on_bytes = limit, on_bytes
        with stream:
            try:
                yield stream
            finally:
                self.partial.remove(name)

    def keep(self, stream: Incoming, folder: Folder, name: str) -> None:
        """Gives the file its final name; a link of that name is replaced, not what it leads to."""
        try:
            os.fsync(stream.fileno())  # what records the file must not outlive its bytes
            os.replace(Path(str(stream.name)).name, name, src_dir_fd=self.partial.fd, dst_dir_fd=folder.fd)
        except OSError as error:
            raise write_error(folder.path / name, error) from error

    def write(self, folder: Folder, name: str, data: bytes, mode: int = 0) -> None:
        """Replaces a small file as a whole; with `mode` whatever the umask. Raises LauncherError."""
        with self.unfinished(len(data)) as stream:
            stream.write(data)
            if mode:
                os.fchmod(stream.fileno(), mode)
            self.keep(stream, folder, name)


@contextlib.contextmanager
def at_work(target: Path, say: Callable[[str], None]) -> Iterator[Work]:
    """Makes the directory where it is new, holds its lock, and removes what an earlier call has left unfinished.

    Waits while another launcher stages there; the kernel frees the lock of one that died. Everybody who may write into
    the directory may stage into it, so our own part of it gets the same mode, where we own it.
    """
    is_directory(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        top = Folder(target, os.open(target, DIRECTORY))
    except OSError as error:
        raise write_error(Path(error.filename or target), error) from error
    state = top.below(STATE)
    partial = state.below("partial")
    try:
        held = state.open("lock", os.O_RDWR | os.O_CREAT, 0o664)
    except OSError as error:
        raise write_error(state.path / "lock", error) from error
    try:
        mode = stat.S_IMODE(os.fstat(top.fd).st_mode)
        for descriptor, bits in ((state.fd, mode), (partial.fd, mode), (held, mode & 0o666)):
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, bits)
        _lock(held, target, say)
        for name in os.listdir(partial.fd):  # what was killed has left
            partial.remove(name)
        yield Work(top, state, partial)
    finally:
        os.close(held)


def _lock(descriptor: int, target: Path, say: Callable[[str], None]) -> None:
    try:
        if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            say(f"warning: {target}: its file system has no locks; do not stage into it twice at once")
    except BlockingIOError:
        say(f"waiting: another launcher is staging into {target}")
        lock(descriptor, fcntl.LOCK_EX)


def check_space(target: Path, needed: int) -> None:
    """Refuses to begin what does not fit. `needed`: bytes still to be written. Quotas show only when writing."""
    free = shutil.disk_usage(target).free
    if needed and needed + RESERVE > free:
        raise LauncherError(
            "disk-full",
            f"{target}: {gigabytes(needed)} are still needed, {gigabytes(free)} are free",
            f"free space (df -h {quoted(target)}), ask for less, or name another file system",
            status=ExitStatus.FILESYSTEM,
        )


def scaled(count: float, what: str) -> str:
    """`20.3 GB`, `512 kB`, `2.05 G tokens`: decimal units, as disks and the Hub count."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}{what}" if count < 999 * size else f"{count / size:,.0f} {unit}{what}"
    return f"{int(count)} {what.strip()}"


def gigabytes(count: float) -> str:
    return scaled(count, "B")
