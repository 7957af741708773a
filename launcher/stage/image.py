"""Images on the shared file system once, under a name that holds their checksum: what `submit --image` is given.

A job that waits in the queue then starts the very bytes it was submitted with: a newer image gets another name. The
bytes arrive below .staged/partial and are renamed when their checksum is right, so whatever ends this process, nothing
half-written has a final name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_json, unreadable
from launcher.image.inspect import embedded_metadata
from launcher.image.squashfs_file import is_metadata, read_sidecar, sidecar_path, superblock
from launcher.stage.fetch import download_right
from launcher.stage.manifest import BLOCK, check_bytes, wrong_size
from launcher.stage.progress import each
from launcher.stage.source import RemoteFile, check_answer, is_digest
from launcher.stage.target import Incoming, at_work, check_space, gigabytes, is_directory
from launcher.stage.web import ask, download, read, refused_by_server

KINDS = (
    "name a .sqsh file or its http(s) address; download other files first, with their .json; convert a Docker image "
    "first: launcher image convert IMAGE"
)
NAME = re.compile(r"([0-9a-f]{12})-(.+)\.sqsh")  # of a staged image
Say = Callable[[str], None]
MODE = 0o644  # readable for the group, whatever the umask: jobs of others start from it, too
SMALL = 1 << 20  # bytes of a description


@dataclass(frozen=True)
class Wanted:
    """The image that is to be there. `about` is its sidecar's content; None where nothing describes it."""

    file: RemoteFile  # under its name in the directory
    about: Mapping[str, Any] | None
    download: Callable[[RemoteFile, Incoming], None]


def stage_image(source: str | Wanted, to: Path, *, say: Say) -> Path:
    """Puts an image below `to` unless it is there, and returns its path, which holds the first 12 digits of its sha256.

    `source`: a .sqsh file, the http(s) address of one with its .json beside it, or of a release. Raises LauncherError.
    """
    to = Path(os.path.expanduser(to)).absolute()
    is_directory(to)
    if isinstance(source, str):
        source = _of_address(source) if re.match(r"https?://", source) else _of_file(source, say)
    wanted = source
    final = to / wanted.file.path
    known = _is_known(wanted, final)  # asked without the lock: you may have the right to read there and not to write
    if known:
        say(f"{final}: already there, as far as its size tells; to read it: launcher stage verify {quoted(to)}")
    else:
        with at_work(to, say) as work:
            if not (_is_known(wanted, final) or _is_right(wanted, final)):
                check_space(to, wanted.file.bytes)
                for _ in each(
                    "staging", [wanted.file], lambda file, told: download_right(wanted.download, file, work, told)
                ):
                    say(f"{final}: {gigabytes(wanted.file.bytes)}, verified")
            if not _is_known(wanted, final) and wanted.about is not None:
                # Last of all: an image without one is read again by the next call, and then gets it.
                text = json.dumps(wanted.about, indent=2, ensure_ascii=False) + "\n"
                work.write(work.top, sidecar_path(final).name, text.encode("utf-8", "surrogateescape"), MODE)
    say(f"launcher submit --image {quoted(final)}")
    return final


# ------------------------------------------------------------------------------------------------ what is asked for


def _of_file(source: str, say: Say) -> Wanted:
    """A file, which the sidecar beside it must describe where there is one."""
    path = Path(os.path.expanduser(source))
    if not os.path.isfile(path):
        raise LauncherError("image-missing", f"{source[:200]!r}: no such file", KINDS)
    block = superblock(path)
    sidecar = sidecar_path(path)
    about = read_sidecar(path, block)
    if about is not None:
        digest = _digest_in(about, str(sidecar))
    elif os.path.lexists(sidecar):
        raise LauncherError(
            "image-description",
            f"{sidecar} does not describe the file beside it ({block.file_size:,} bytes)",
            f"copy the two again, together; or without a description: mv {quoted(sidecar)} {quoted(f'{sidecar}.old')}",
        )
    else:
        say(f"{path}: no {sidecar.name} beside it; reading it for its checksum")
        try:
            found = check_bytes(path, RemoteFile(path.name, block.file_size))
        except OSError as error:
            raise unreadable(path, error) from error
        if found is None:
            raise LauncherError(
                "being-written", f"{path}: is being written", "wait until it is complete, then the same command"
            )
        digest = found.sha256
        about = embedded_metadata(path)  # None where it says nothing of itself, or nothing here can read it
        about = about and {**about, "squashfs": block.recorded() | {"sha256": digest}}

    def copy(stream: Incoming) -> None:
        stream.restart()
        try:
            with open(path, "rb") as opened:
                shutil.copyfileobj(opened, stream, BLOCK)
        except OSError as error:
            raise unreadable(path, error) from error

    return _wanted(path.name, digest, block.file_size, about, copy)


def _path_of(url: str) -> str:
    """The path in an address that is a web server's and names no user, no password and no parameters; else ""."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return ""
    plain = parts.scheme in ("http", "https") and parts.netloc and not (parts.query or parts.fragment)
    return parts.path if plain and "@" not in parts.netloc else ""


def _of_address(url: str) -> Wanted:
    """A release's asset: its sidecar, the asset of the same name with .json, says checksum and size."""
    path = _path_of(url)
    if not path.endswith(".sqsh"):
        raise LauncherError(  # a password in it would be in the process list, and in every message
            "image-address",
            "the image's address must be valid and end with .sqsh, without user, password or parameters",
            "download it together with its .json, then: launcher stage image FILE --to DIR",
        )
    digest, size, about = _described_at(f"{url}.json")
    name = path.rsplit("/", 1)[-1]
    return _wanted(name, digest, size, about, lambda stream: download(url, stream, refused_by_server(url)))


def releases() -> str:
    """Where releases are: LAUNCHER_RELEASES, else the address of that name in the package's metadata."""
    from importlib.metadata import PackageNotFoundError, metadata  # slow to import

    urls: list[str] = []
    with suppress(PackageNotFoundError):
        urls = metadata("titan-launcher").get_all("Project-URL") or []
    known = (url.removeprefix("Releases, ") for url in urls if url.startswith("Releases, "))
    if _path_of(said := os.environ.get("LAUNCHER_RELEASES") or next(known, "")):
        return said.rstrip("/")
    what = "the address of the releases is unknown, or is not a web address without user, password and parameters"
    fix = "export LAUNCHER_RELEASES=https://github.com/OWNER/NAME/releases; without a release: make image"
    raise LauncherError("releases-unknown", what, fix)


def of_release(tag: str, channel: str, arch: str) -> Wanted:
    """One file, or several parts of it, by the checksums that .github/workflows/image.yml publishes beside them."""
    place = f"{releases()}/download/{quote(tag, safe='')}"
    image, listed = f"titan-{channel}-{arch}.sqsh", f"{place}/titan-{channel}.sha256"
    lines = read(listed, SMALL, refused_by_server(listed))[0].decode("utf-8", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if image not in sums:
        there = ", ".join(sorted(name for name in sums if name.endswith(".sqsh"))) or "no image"
        what = f"{listed}: has no {image}; it has {there}"
        raise LauncherError("release-lacks", what, "another --arch or --channel", status=ExitStatus.NOT_FOUND)
    digest, size, about = _described_at(f"{place}/{image}.json")
    if digest != sums[image]:
        what = f"{listed}: another checksum of {image} than its .json says"
        raise LauncherError("image-description", what, "the release is incomplete or damaged; try again later")
    parts = sorted(name for name in sums if re.fullmatch(rf"{re.escape(image)}\.part-\d+", name)) or [image]

    def join(stream: Incoming) -> None:
        stream.start = 0
        stream.restart()
        for url in (f"{place}/{name}" for name in parts):
            stream.start = stream.tell()
            download(url, stream, refused_by_server(url))

    return _wanted(image, digest, size, about, join)


def _described_at(where: str) -> tuple[str, int, Mapping[str, Any]]:
    """Checksum and size of the image that a description on a server is of, and all of it."""
    about, _ = ask(where, SMALL, refused_by_server(where))
    digest = _digest_in(about, where)
    size = about["squashfs"].get("bytes")
    check_answer(where, size=size)
    if not size or not is_metadata(about):
        raise LauncherError(
            "image-description", f"{where}: not the description of an image", "the address of a .sqsh file of a release"
        )
    return digest, size, about


def _wanted(
    name: str, digest: str, size: int, about: Mapping[str, Any] | None, fill: Callable[[Incoming], None]
) -> Wanted:
    """Named after its source: without .sqsh, and without the checksum of an earlier staging."""
    name = name.removesuffix(".sqsh").removeprefix(f"{digest[:12]}-")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "image"

    def bring(_file: RemoteFile, stream: Incoming) -> None:
        fill(stream)
        os.fchmod(stream.fileno(), MODE)

    return Wanted(RemoteFile(f"{digest[:12]}-{name}.sqsh", size, digest), about, bring)


def _digest_in(about: Any, where: str) -> str:
    facts = about.get("squashfs") if isinstance(about, dict) else None
    digest = facts.get("sha256") if isinstance(facts, dict) else None
    if not is_digest(digest):
        raise LauncherError(
            "image-description", f"{where}: has no sha256 of an image", "convert it again: launcher image convert IMAGE"
        )
    return str(digest)


def _is_known(wanted: Wanted, final: Path) -> bool:
    """Whether the image is there, as far as its head, its size and the description beside it tell."""
    with suppress(LauncherError):
        return (superblock(final).file_size, described(final).get("sha256")) == (wanted.file.bytes, wanted.file.sha256)
    return False


def _is_right(wanted: Wanted, final: Path) -> bool:
    """Whether the image is there without its description, as a call leaves it that ends before its last step."""
    with suppress(OSError):
        return not wrong_size(final, wanted.file.bytes) and check_bytes(final, wanted.file) is not None
    return False


def described(image: Path) -> dict[str, Any]:
    """What the description beside an image says of the file."""
    facts = (read_json(sidecar_path(image)) or {}).get("squashfs")
    return facts if isinstance(facts, dict) else {}
