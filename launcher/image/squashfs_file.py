"""A squashfs file: what its first 96 bytes and the JSON file beside it tell, and mksquashfs, which writes it.

Cheap enough for every `submit`: standard library only, and reading touches nothing but the superblock.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile  # here, because every `submit` imports this module
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, read_json, write_json

COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
# ELF's e_machine -> uname's word
MACHINES = {3: "i686", 21: "ppc64le", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
METADATA = "etc/titan-image.json"  # inside the image
INSTALL = "apt-get install squashfs-tools    # 4.5 or newer: Debian 12, Ubuntu 22.04"
# magic, inodes, mkfs_time, block_size, fragments, compressor, block_log, flags, ids, major, minor, root inode,
# bytes_used, then the starts of the tables: ids, xattrs, inodes, directories, fragments, exports
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")


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


@dataclass(frozen=True)
class Superblock:
    """The head of a squashfs 4.0 file, checked for sense."""

    compressor: str
    block_size: int  # bytes
    inodes: int  # names that are hard links of one file count once
    mkfs_time: int  # seconds since 1970
    bytes_used: int
    file_size: int  # bytes_used, padded to a multiple of 4096


def superblock(path: Path) -> Superblock:
    """Reads and checks the superblock; raises LauncherError for anything that no node could mount or unpack."""
    try:
        # A pipe or a device would block, or never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LauncherError(f"{path}: not a file", f"ls -ld {quoted(path)}")
        with open(path, "rb") as stream:
            head, size = stream.read(_SUPERBLOCK.size), os.fstat(stream.fileno()).st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        status = ExitStatus.INVALID if missing else ExitStatus.FILESYSTEM
        fix = f"ls -l {quoted(Path(path).parent)}" if missing else f"ls -l {quoted(path)}"
        raise LauncherError(f"{path}: {error.strerror}", fix, status=status) from None
    if size == 0:
        raise LauncherError(f"{path}: the file is empty", "copy or build it again")
    if not head.startswith(b"hsqs"):
        raise LauncherError(f"{path}: not a squashfs file (it begins with {head[:4]!r})", quoted("file", path))
    if len(head) < _SUPERBLOCK.size:
        raise LauncherError(f"{path}: cut off: {size} bytes", "copy it again, then compare: sha256sum")
    fields = _SUPERBLOCK.unpack(head)
    inodes, mkfs_time, block_size = fields[1:4]
    compressor, block_log, _, _, major, minor, _, used, ids, _, inode_table, directories = fields[5:17]
    if (major, minor) != (4, 0):
        raise LauncherError(f"{path}: squashfs {major}.{minor}, which no current kernel reads", "convert it again")
    sane = (
        compressor in COMPRESSORS
        and 12 <= block_log <= 20
        and block_size == 1 << block_log
        and inodes > 0
        and _SUPERBLOCK.size <= inode_table < directories < used
        and ids < used
    )
    if not sane:
        raise LauncherError(f"{path}: damaged: its superblock makes no sense", "copy it again, then compare: sha256sum")
    if size < used:
        raise LauncherError(f"{path}: cut off: {size:,} of {used:,} bytes", "copy it again, then compare: sha256sum")
    return Superblock(COMPRESSORS[compressor], block_size, inodes, mkfs_time, used, size)


def sidecar_path(path: Path) -> Path:
    """titan-stable-arm64.sqsh -> titan-stable-arm64.sqsh.json"""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path, block: Superblock) -> dict[str, Any] | None:
    """The JSON file beside `path`, if there is one and it describes this very file; else None.

    An image copied without it, or over another one, must not be taken for what it was.
    """
    value = read_json(sidecar_path(path))
    recorded = value.get("squashfs") if value else None
    if not value or not isinstance(recorded, dict) or not is_metadata(value):
        return None
    # mksquashfs counts the root directory among the inodes, and so does the sidecar.
    seen = (block.file_size, block.inodes, block.compressor, block.block_size // 1024)
    said = tuple(recorded.get(key) for key in ("bytes", "entries", "compressor", "block_kib"))
    # Two builds of one image may agree in all of these, not in their time; older sidecars do not have it.
    return value if seen == said and recorded.get("mkfs_time", block.mkfs_time) == block.mkfs_time else None


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
    todo = path.split("/")[::-1]
    hops = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del done[-1:]
            continue
        target = links.get("/".join([*done, part]))
        if target is None:
            done.append(part)
            continue
        hops += 1
        if hops > 40:  # the kernel's limit
            return None
        if target.startswith("/"):
            done = []
        todo += target.split("/")[::-1]
    return "/".join(done)


def mksquashfs_path() -> str:
    """mksquashfs, if it is there and reads tar streams; otherwise a LauncherError with the package's name."""
    path = shutil.which("mksquashfs")
    if path is None:
        raise LauncherError("mksquashfs: no such program", INSTALL, status=ExitStatus.ERROR)
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(f"{path} does not start", INSTALL, status=ExitStatus.ERROR, original=str(error)) from None
    found = re.search(r"version (\d+)\.(\d+)", done.stdout + done.stderr)
    if not found:
        raise LauncherError(f"{path} does not say its version", INSTALL, status=ExitStatus.ERROR, original=done.stderr)
    if (int(found[1]), int(found[2])) < (4, 5):
        raise LauncherError(
            f"{path} is version {found[1]}.{found[2]}, which cannot read a tar stream; 4.5 can",
            INSTALL,
            status=ExitStatus.ERROR,
        )
    return path


def write_squashfs(
    program: str, tar: Iterable[bytes | memoryview], target: Path, fmt: SquashfsFormat, created: int
) -> None:
    """Feeds the chunks of a tar to mksquashfs, which writes `target`; what is left there after an error is no image.

    `created`, in seconds, becomes the time of the file system and of its root directory.
    """
    command = [
        *(program, "-", str(target), "-tar", "-noappend", "-exit-on-error", "-quiet", "-no-progress"),
        # Without these the root directory is writable for everybody and belongs to whoever converts: with a tar,
        # 4.5 ignores -root-uid.
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
                whole = True
                process.stdin.close()
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            with suppress(OSError):
                process.stdin.close()
        if code or not whole:
            log.seek(0)
            raise _failure(code, log.read().decode(errors="replace"), target)
    superblock(target)
    _set_root_time(target, created)


def _set_root_time(path: Path, seconds: int) -> None:
    """mksquashfs 4.5 gives the root directory the time of day when it reads a tar, -root-time or not."""
    with open(path, "r+b") as stream:
        fields = _SUPERBLOCK.unpack(stream.read(_SUPERBLOCK.size))
        root, table = fields[11], fields[15]
        block = table + (root >> 16)
        stream.seek(block)
        if not stream.read(2)[1] & 0x80:
            raise LauncherError("mksquashfs compressed the inodes in spite of -noI", status=ExitStatus.ERROR)
        for index, byte in enumerate(seconds.to_bytes(4, "little")):
            # The time stands at byte 8 of the inode; blocks have 2 bytes of header and 8192 of inodes.
            blocks, offset = divmod((root & 0xFFFF) + 8 + index, 8192)
            stream.seek(block + blocks * (2 + 8192) + 2 + offset)
            stream.write(bytes([byte]))


def _failure(code: int, log: str, target: Path) -> LauncherError:
    last = "\n".join(log.strip().splitlines()[-5:])
    if "No space left" in log or "quota exceeded" in log:
        return LauncherError(
            f"{target.parent}: no space left for the squashfs",
            f"df -h {quoted(target.parent)}",
            status=ExitStatus.FILESYSTEM,
            original=last,
        )
    if "is not supported" in log and "Compressor" in log:
        return LauncherError(
            "this mksquashfs was built without that compressor",
            INSTALL,
            status=ExitStatus.ERROR,
            original=last,
        )
    how = f"was killed by signal {-code}" if code < 0 else f"failed with code {code}" if code else "stopped reading"
    fix = "free memory: dmesg | tail" if code == -9 else ""
    return LauncherError(f"mksquashfs {how}", fix, status=ExitStatus.ERROR, original=last)


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A temporary file beside `output`, created at once to learn early whether it can be; removed in every case."""
    if output.is_dir():
        raise LauncherError(f"{output}: a directory", f"-o '{output}/titan-stable-amd64.sqsh'", status=ExitStatus.USAGE)
    target = output.with_name(f".{output.name}.{os.urandom(4).hex()}.tmp")
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except OSError as error:
        raise filesystem_error(output, error, "-o FILE") from None
    try:
        yield target
    finally:
        target.unlink(missing_ok=True)


def publish(
    target: Path,
    output: Path,
    about: Mapping[str, Any],
    image_id: str,
    fmt: SquashfsFormat,
    unpacked: int,
    say: Callable[[str], None],
) -> None:
    """Gives the finished file its name. The old sidecar goes before, the new one comes after: at no time does one
    lie beside a file that it does not describe."""
    block = superblock(target)
    try:
        with open(target, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        sidecar_path(output).unlink(missing_ok=True)
        os.replace(target, output)
    except OSError as error:
        raise filesystem_error(output, error, "-o FILE") from None
    facts = {
        "sha256": digest,
        "bytes": block.file_size,
        "compressor": block.compressor,
        "level": fmt.level,
        "block_kib": block.block_size // 1024,
        "unpacked_bytes": unpacked,
        "entries": block.inodes,
        "mkfs_time": block.mkfs_time,
    }
    write_json(sidecar_path(output), {**about, "image_id": image_id, "squashfs": facts})
    say(f"{output}: {block.file_size / 1e6:,.0f} MB, sha256 {digest}")
