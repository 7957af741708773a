"""An image on the shared file system once, under a name that holds its checksum: what `submit --image` is given.

A job that waits in the queue then starts the very bytes it was submitted with: a newer image gets another name. The
bytes arrive below .staged/partial and are renamed when their checksum is right, so whatever ends this process, nothing
half-written has a final name, and the next call goes on from what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_json, unreadable
from launcher.image.inspect import embedded_metadata
from launcher.image.squashfs_file import Superblock, is_metadata, read_sidecar, sidecar_path, superblock
from launcher.stage.manifest import BLOCK, sha256_of
from launcher.stage.progress import Progress
from launcher.stage.source import check_answer, is_digest
from launcher.stage.target import Work, at_work, check_space, gigabytes, refuse_unusable, write_error
from launcher.stage.web import Reader, read_small, stream_from

KINDS = "a .sqsh file, or the http(s) address of one; download others first, with their .json"
Say = Callable[[str], None]
MODE = 0o644  # readable for the group, whatever the umask: jobs of others start from it, too


@dataclass(frozen=True)
class Wanted:
    """The image that is to be there. `about` is its sidecar's content; None where nothing describes it."""

    name: str  # of the source, without .sqsh
    sha256: str
    bytes: int
    about: Mapping[str, Any] | None

    def path(self, directory: Path) -> Path:
        return directory / f"{self.sha256[:12]}-{self.name}.sqsh"


def stage_image(source: str, to: Path, *, say: Say) -> Path:
    """Puts an image below `to` unless it is there, and returns its path, which holds the first 12 digits of its sha256.

    `source` is a .sqsh file, or the http(s) address of one with its .json beside it. Raises LauncherError; an
    interrupted call is continued by the next one.
    """
    to = Path(os.path.expanduser(to)).absolute()
    if not source.strip():
        raise LauncherError("SOURCE is empty", KINDS)
    refuse_unusable(to)
    try:
        return _stage_image(source, to, say)
    except KeyboardInterrupt:
        say(f"stopped: {quoted(source)} is not in {to} yet; the same command goes on")
        raise


def _stage_image(source: str, to: Path, say: Say) -> Path:
    if re.match(r"https?://", source):
        _check_address(source)
        wanted, reader = _of_address(source), stream_from(source)
    elif "://" in source:
        raise LauncherError(f"{source.partition('://')[0][:20]}://: images are not staged from there", KINDS)
    elif _is_file_name(source):
        wanted, reader = _of_file(Path(os.path.expanduser(source)), say)
    else:
        what = "a directory" if os.path.isdir(source) else "no such file"
        fix = (
            "the path of a .sqsh file; an image of the Docker engine first becomes one: "
            f"{quoted('launcher', 'image', 'convert', source)}"
        )
        raise LauncherError(f"{source}: {what}", fix)
    final = wanted.path(to)
    if _is_known(wanted, final):  # also for whoever may only read there
        _already(final, say)
    else:
        with at_work(to, say) as work:
            # By content: what was left of another image is never continued.
            work.partial.clear([f"{wanted.sha256[:24]}.sqsh"])
            if _is_staged(wanted, final, work):
                _already(final, say)
            else:
                _bring(wanted, reader, work, say)
    say(f"launcher submit --image {quoted(final)}")
    return final


def _is_file_name(source: str) -> bool:
    return source.endswith(".sqsh") or source.startswith(("/", "./", "../", "~")) or os.path.isfile(source)


def _already(final: Path, say: Say) -> None:
    say(f"{final}: already there")
    say(f"its size was looked at; to read and hash it: launcher stage verify {quoted(final.parent)}")


# ------------------------------------------------------------------------------------------------ what is asked for


def _of_file(path: Path, say: Say) -> tuple[Wanted, Reader]:
    """A file, which the sidecar beside it must describe where there is one."""
    block = superblock(path)
    sidecar = sidecar_path(path)
    about = read_sidecar(path, block)
    if about is not None:
        digest = _digest_in(about, str(sidecar))
    elif os.path.lexists(sidecar):
        raise LauncherError(
            f"{sidecar} does not describe the file beside it ({block.file_size:,} bytes)",
            f"copy the two again, together; or without a description: mv {quoted(sidecar)} {quoted(f'{sidecar}.old')}",
        )
    else:
        say(f"{path}: no {sidecar.name} beside it; reading it for its checksum")
        digest = _sha256(path)
        about = _described(path, block, digest)
    return Wanted(_clean(path.name, digest), digest, block.file_size, about), _file_reader(path)


def _described(path: Path, block: Superblock, digest: str) -> dict[str, Any] | None:
    """A sidecar from what the image says of itself; None where it says nothing, or nothing here can read it."""
    about = embedded_metadata(path)
    if about is None:
        return None
    return {**about, "squashfs": block.recorded() | {"sha256": digest}}


def _of_address(url: str) -> Wanted:
    """A release's asset: its sidecar, the asset of the same name with .json, says checksum and size."""
    where = f"{url}.json"
    about = read_small(where)
    digest = _digest_in(about, where)
    size = about["squashfs"].get("bytes")
    check_answer(where, size=size)
    if not size or not is_metadata(about):
        raise LauncherError(f"{where}: not the description of an image", "the address of a .sqsh file of a release")
    return Wanted(_clean(urlsplit(url).path.rsplit("/", 1)[-1], digest), digest, size, about)


def _check_address(url: str) -> None:
    """A password in an address would be in the process list, and in every message."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        raise LauncherError("the image's address is none", "the address of a .sqsh file of a release") from None
    if "@" in parts.netloc or parts.query or parts.fragment or not parts.path.endswith(".sqsh"):
        raise LauncherError(
            "the image's address must end with .sqsh, without user, password or parameters",
            "download it together with its .json, then: launcher stage image FILE --to DIR",
        )


def _digest_in(about: Mapping[str, Any] | None, where: str) -> str:
    facts = about.get("squashfs") if about else None
    digest = facts.get("sha256") if isinstance(facts, dict) else None
    if not is_digest(digest):
        raise LauncherError(f"{where}: has no sha256 of an image", "convert it again: launcher image convert IMAGE")
    return str(digest)


def _clean(name: str, digest: str) -> str:
    """A part of a file's name from the source's own: without .sqsh, and without the checksum of an earlier staging."""
    name = name.removesuffix(".sqsh").removeprefix(f"{digest[:12]}-")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "image"


# ------------------------------------------------------------------------------------------------------ bringing it


def _is_known(wanted: Wanted, final: Path) -> bool:
    """Whether the image is there, as far as its head, its size and the description beside it tell."""
    if not os.path.lexists(final):
        return False
    try:
        size = superblock(final).file_size
    except LauncherError:
        return False
    recorded = (read_json(sidecar_path(final)) or {}).get("squashfs")
    return size == wanted.bytes and isinstance(recorded, dict) and recorded.get("sha256") == wanted.sha256


def _is_staged(wanted: Wanted, final: Path, work: Work) -> bool:
    """The same, for one without its description, too: an earlier call was ended before its last step. Reads that."""
    if _is_known(wanted, final):
        return True
    if not final.is_file() or final.stat().st_size != wanted.bytes or _sha256(final) != wanted.sha256:
        return False
    _write_sidecar(wanted, final, work)
    return True


def _bring(wanted: Wanted, reader: Reader, work: Work, say: Say) -> None:
    """Under the lock. A continued file with a wrong checksum is brought again from its beginning, once."""
    final = wanted.path(work.top.path)
    with work.partial.begin(f"{wanted.sha256[:24]}.sqsh") as stream:
        try:
            begun = os.fstat(stream.fileno()).st_size
            digest = _receive(wanted, reader, stream)
            if digest != wanted.sha256 and begun:
                say(f"{wanted.name}: what an earlier call had left does not fit; from the beginning")
                stream.truncate(0)
                digest = _receive(wanted, reader, stream)
            if digest != wanted.sha256:
                raise LauncherError(
                    f"{wanted.name}: wrong bytes: its description says sha256 {wanted.sha256[:16]}…, read was "
                    f"{digest[:16]}…",
                    "copy or download the image and its .json again; nothing of it was kept",
                )
            opened = Path(f"/proc/self/fd/{stream.fileno()}")
            try:
                superblock(opened)
            except LauncherError as error:
                raise LauncherError(f"{wanted.name}: {error.what.removeprefix(f'{opened}: ')}", error.fix) from None
        except LauncherError as error:
            if error.status == ExitStatus.INVALID:  # not what a full disk or the network have stopped
                work.partial.remove(Path(str(stream.name)).name)
            raise
        _publish(wanted, stream, work)
    say(f"{final}: {gigabytes(wanted.bytes)}, verified")


def _receive(wanted: Wanted, reader: Reader, stream: FileIO) -> str:
    """Fills `stream` up to the image's size, from where it ends. Returns the sha256 of all of it."""
    try:
        if stream.seek(0, os.SEEK_END) > wanted.bytes:
            stream.truncate(0)
        have = stream.seek(0, os.SEEK_END)
        check_space(Path(str(stream.name)).parent, wanted.bytes - have)
        digest = hashlib.sha256()
        stream.seek(0)
        while chunk := stream.read(BLOCK):
            digest.update(chunk)
        with Progress(f"staging {wanted.name},", 1, wanted.bytes, have, sys.stderr) as progress:
            for chunk in reader(have, wanted.bytes):
                _write_all(stream, chunk)
                digest.update(chunk)
                progress.add(len(chunk))
                progress.refresh()
        os.fsync(stream.fileno())
    except OSError as error:
        raise write_error(Path(str(stream.name)), error) from error
    return digest.hexdigest()


def _write_all(stream: Any, chunk: bytes) -> None:
    """An unbuffered file may take less than it is given, just before the disk is full."""
    view = memoryview(chunk)
    while view:
        view = view[stream.write(view) :]


def _file_reader(path: Path) -> Reader:
    def read(offset: int, size: int) -> Iterator[bytes]:
        try:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(offset)
                while offset < size and (chunk := stream.read(min(BLOCK, size - offset))):
                    offset += len(chunk)
                    yield chunk
        except OSError as error:
            raise unreadable(path, error) from error

    return read


def _publish(wanted: Wanted, stream: FileIO, work: Work) -> None:
    """The description comes last: an image without one is read again by the next call, and then gets it."""
    final = wanted.path(work.top.path)
    try:
        os.fchmod(stream.fileno(), MODE)
        work.top.remove(sidecar_path(final).name)
        work.partial.finish(stream, final, work.top)
    except OSError as error:
        raise write_error(final, error) from error
    _write_sidecar(wanted, final, work)


def _write_sidecar(wanted: Wanted, final: Path, work: Work) -> None:
    if wanted.about is None:
        return
    name, text = sidecar_path(final).name, json.dumps(wanted.about, indent=2, ensure_ascii=False) + "\n"
    work.top.write(name, text.encode("utf-8", "surrogateescape"))
    try:
        with FileIO(work.top.open(name, os.O_RDONLY)) as stream:
            os.fchmod(stream.fileno(), MODE)
    except OSError as error:
        raise write_error(sidecar_path(final), error) from error


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from error
