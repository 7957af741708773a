"""mksquashfs and unsquashfs, and how a program is run so that nothing it prints fills memory or waits for ever."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.image.squashfs_file import AGAIN, SUPERBLOCK, superblock

INSTALL = "apt-get install squashfs-tools    # 4.5 or newer: Debian 12, Ubuntu 22.04"
TIMEOUT_S = 120  # for a question; listing 50,000 files takes less than one second
LISTING = 64 << 20  # bytes of names; an image of 50,000 files has 6 MB of them
TAIL = 4096  # bytes of what a program complained
_LISTED = re.compile(
    rb"^([-lpdbcs])\S{9}\s+\d+/\d+\s+(?:\d+|\d+,\s*\d+)\s+\d{4}-\d\d-\d\d \d\d:\d\d squashfs-root/(.+)$", re.M
)


# --- running programs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """How a program ended. One that prints more than was asked for is ended there, and `cut` says so."""

    code: int
    out: bytes
    err: str  # the end of it
    cut: bool


def run(command: Sequence[str], limit: int, *, stdin: bytes = b"", timeout_s: float = TIMEOUT_S) -> Ran:
    """The first `limit` bytes of what it prints, and the last of what it complains.

    Raises LauncherError where it does not start, or does not end in time.
    """
    with tempfile.TemporaryFile() as asked:
        asked.write(stdin)
        asked.seek(0)
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=asked, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            what = f"{command[0]}: {error.strerror}"
            fix = INSTALL if command[0] in ("mksquashfs", "unsquashfs") else f"command -v {quoted(command[0])}"
            raise LauncherError("program-missing", what, fix, status=ExitStatus.ERROR) from None
    deadline = time.monotonic() + timeout_s
    out, complained = bytearray(), b""
    with process, selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream or 0, selectors.EVENT_READ)
        try:
            while selector.get_map() and len(out) <= limit:
                ready = selector.select(deadline - time.monotonic())
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(command, timeout_s)
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        out += chunk
                    else:
                        complained = (complained + chunk)[-TAIL:]
            if cut := len(out) > limit:
                _end(process)
            code = process.wait(max(0, deadline - time.monotonic()))
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            what = f"{command[0]} did not end within {timeout_s:.0f} s"
            fix = "is the file system that holds the image slow?"
            raise LauncherError("program-slow", what, fix, status=ExitStatus.ERROR) from None
    return Ran(code, bytes(out[:limit]), complained.decode(errors="replace"), cut)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started, which holds the pipes, too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def need(name: str) -> None:
    """Raises LauncherError unless mksquashfs or unsquashfs is of 4.5 or newer, which reads tar and knows -cat."""
    found = re.search(rb"version (\d+)\.(\d+)", run([name, "-version"], TAIL).out)
    if not found or (int(found[1]), int(found[2])) < (4, 5):
        what = f"{name} is {found[0].decode() if found else 'of an unknown version'}; 4.5 is needed"
        raise LauncherError("program-old", what, INSTALL, status=ExitStatus.ERROR)


# --- reading -------------------------------------------------------------------------------------------------------


class Tree:
    """The files of an image, by unsquashfs: a fraction of a second for any image. Links are not followed.

    Raises LauncherError where nothing here can look into it.
    """

    def __init__(self, path: Path) -> None:
        need("unsquashfs")
        self._path = path.absolute()  # a name may begin with a dash

    def entries(self) -> tuple[set[str], dict[str, str]]:
        """Every name, without its leading slash, and the target of every symbolic link."""
        ran = run(["unsquashfs", "-lln", str(self._path)], LISTING)
        if ran.code or ran.cut:
            raise self._damaged(f"it lists more than {LISTING >> 20} MiB of names" if ran.cut else ran.err)
        names, links = set(), {}
        for kind, rest in _LISTED.findall(ran.out):
            name, _, target = rest.decode("utf-8", "surrogateescape").partition(" -> ")
            names.add(name)
            if kind == b"l":
                links[name] = target
        return names, links

    def read(self, path: str, limit: int) -> bytes | None:
        """The first `limit` bytes of a regular file, None if there is none of that name."""
        ran = run(["unsquashfs", "-no-wildcards", "-cat", str(self._path), path], limit)
        if ran.cut or not ran.code:
            return ran.out
        if not re.search("no matches|is a directory|failed to resolve|not a regular", ran.err):
            raise self._damaged(ran.err)
        return None

    def unpack(self, root: Path, timeout_s: float) -> None:
        """All files, into a directory that does not exist yet."""
        command = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-force", "-dest", str(root)]
        ran = run([*command, str(self._path)], LISTING, timeout_s=timeout_s)
        if ran.code:
            what = f"{self._path} cannot be unpacked into {root.parent}"
            fix = "is the file complete? (launcher image inspect); is there room? another place: export TMPDIR=DIR"
            raise LauncherError("unpack-failed", what, fix, original=ran.err)

    def _damaged(self, original: str) -> LauncherError:
        return LauncherError("image-damaged", f"{self._path}: damaged", AGAIN, original=original)


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SquashfsFormat:
    """How mksquashfs compresses."""

    compressor: str
    block_kib: int
    level: int | None = None  # for compressors that have one

    def options(self) -> list[str]:
        """As mksquashfs takes them (sqfstar, its sister, misreads the level)."""
        level = [] if self.level is None else ["-Xcompression-level", str(self.level)]
        return ["-comp", self.compressor, *level, "-b", f"{self.block_kib}K"]


# What the cluster does with the file -> the format; measured by benchmarks/squashfs.py on torch's packages.
FORMATS = {
    # enroot reads all of it on every node, from a shared disk: bytes count. A third of the size of enroot's own
    # default and a quarter of its CPU; smaller blocks gain nothing, 1M blocks read too much for each small file.
    "unpack": SquashfsFormat("zstd", 128, 3),
    # squashfuse decompresses in one thread whatever is touched: the cheapest decompression counts. From cold caches
    # `import torch` takes 10 to 30% less than with zstd, for a file that is 45% larger, still half of enroot's.
    "mount": SquashfsFormat("lz4", 128),
}


def write_squashfs(tar: Iterable[bytes], target: Path, fmt: SquashfsFormat, created: int) -> None:
    """Feeds the chunks of a tar to mksquashfs, which writes `target`; what is left there after an error is no image.

    `created`, in seconds, becomes the time of the file system and of its root directory.
    """
    need("mksquashfs")
    command = [
        *("mksquashfs", "-", str(target), "-tar", "-noappend", "-exit-on-error", "-quiet", "-no-progress"),
        # Otherwise everybody may write in the root directory, and it belongs to the user who converts. With a tar,
        # version 4.5 ignores -root-uid, hence -all-root.
        *("-no-xattrs", "-root-mode", "755", "-all-root"),
        # -noI leaves the inodes, 0.5% of a torch image, uncompressed: see _set_root_time.
        *("-mkfs-time", str(created), "-noI", *fmt.options()),
    ]
    # Given twice, by variable and by option, the time is an error.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            bufsize=1 << 16,
            start_new_session=True,  # Ctrl-C is for us alone, who end mksquashfs: its last words would hide the cause
        )
        assert process.stdin
        whole = False
        try:
            with suppress(BrokenPipeError):  # it died; its own words say why
                for chunk in tar:
                    process.stdin.write(chunk)
                process.stdin.flush()
                whole = True
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()  # closes its input, and waits
        if (code := process.returncode) or not whole:
            log.seek(0)
            words = "\n".join(log.read().decode(errors="replace").strip().splitlines()[-5:])
            what, status = f"mksquashfs failed with code {code}", ExitStatus.ERROR
            fix = "free memory: dmesg | tail" if code == -9 else ""
            if "No space left" in words or "quota exceeded" in words:
                what, fix = f"{target.parent}: no space left for the squashfs", f"df -h {quoted(target.parent)}"
                status = ExitStatus.FILESYSTEM
            raise LauncherError("mksquashfs-failed", what, fix, status=status, original=words)
    superblock(target)
    _set_root_time(target, created)


def _set_root_time(path: Path, seconds: int) -> None:
    """mksquashfs 4.5 gives the root directory the time of day when it reads a tar, -root-time or not."""
    with open(path, "r+b") as stream:
        fields = SUPERBLOCK.unpack(stream.read(SUPERBLOCK.size))
        root, table = fields[11], fields[15]
        block = table + (root >> 16)
        stream.seek(block)
        if not stream.read(2)[1] & 0x80:
            what = "mksquashfs compressed the inodes in spite of -noI"
            raise LauncherError("mksquashfs-failed", what, status=ExitStatus.ERROR)
        for index, byte in enumerate(seconds.to_bytes(4, "little")):
            # The time stands at byte 8 of the inode; blocks have 2 bytes of header and 8192 of inodes.
            blocks, offset = divmod((root & 0xFFFF) + 8 + index, 8192)
            stream.seek(block + blocks * (2 + 8192) + 2 + offset)
            stream.write(bytes([byte]))
