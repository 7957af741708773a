"""Images on the shared file system once, under a name that holds their checksum: what `submit --image` is given.

A job that waits in the queue then starts the very bytes it was submitted with: a newer image gets another name. The
bytes arrive below .staged/partial and are renamed when their checksum is right, so whatever ends this process, nothing
half-written has a final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_json, unreadable
from launcher.base.values import parse_json
from launcher.image.inspect import embedded_metadata
from launcher.image.squashfs_file import is_metadata, read_sidecar, sidecar_path, superblock
from launcher.stage.fetch import download_right
from launcher.stage.manifest import BLOCK, check_bytes, wrong_size
from launcher.stage.progress import each
from launcher.stage.source import RemoteFile, check_answer, is_digest
from launcher.stage.target import Incoming, at_work, check_space, gigabytes, is_directory
from launcher.stage.web import ask, download, read, refused_by_server, size_of

KINDS = (
    "name a .sqsh file or the http(s) address of one; download others first, with their .json; an image of the Docker "
    "engine first becomes one: launcher image convert IMAGE"
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


@dataclass(frozen=True)
class Release:
    """An image of a release, as .github/workflows/image.yml publishes it."""

    tag: str
    channel: str
    arch: str  # amd64, arm64


def stage_image(source: str | Release, to: Path, *, say: Say) -> Path:
    """Puts an image below `to` unless it is there, and returns its path, which holds the first 12 digits of its sha256.

    `source` is a .sqsh file, the http(s) address of one with its .json beside it, or a release. Raises LauncherError.
    """
    to = Path(os.path.expanduser(to)).absolute()
    is_directory(to)
    if isinstance(source, Release):
        wanted = _of_release(source)
    else:
        wanted = _of_address(source) if re.match(r"https?://", source) else _of_file(source, say)
    final = to / wanted.file.path
    known = _is_known(wanted, final)  # asked without the lock: you may have the right to read there and not to write
    if known:
        say(f"{final}: already there, as far as its size tells; to read it: launcher stage verify {quoted(to)}")
    else:
        with at_work(to, say) as work:
            if not (_is_known(wanted, final) or _is_right(wanted, final)):
                check_space(to, wanted.file.bytes)
                for _ in each("staging", [wanted.file], lambda file, told: download_right(wanted, file, work, told)):
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
    where = f"{url}.json"
    about, _ = ask(where, SMALL, refused_by_server(where))
    digest, size = _described_in(about, where)
    name = path.rsplit("/", 1)[-1]
    return _wanted(name, digest, size, about, lambda stream: download(url, stream, refused_by_server(url)))


def releases() -> str:
    """Where releases are: LAUNCHER_RELEASES, else the address of that name in the package's metadata."""
    from importlib.metadata import PackageNotFoundError, metadata  # slow to import

    said = os.environ.get("LAUNCHER_RELEASES", "")
    with suppress(PackageNotFoundError):
        urls = (entry.partition(", ") for entry in metadata("titan-launcher").get_all("Project-URL") or ())
        said = said or next((url for label, _, url in urls if label.lower() == "releases"), "")
    if said and _path_of(said):
        return said.rstrip("/")
    what = "LAUNCHER_RELEASES must be a web address without user, password or parameters"
    raise LauncherError(
        "releases-unknown",
        what if said else "this launcher does not say where its releases are",
        "export LAUNCHER_RELEASES=https://github.com/OWNER/NAME/releases; or make the image: launcher image build",
    )


def _of_release(release: Release) -> Wanted:
    """One file or several parts of it, by the checksums that the release has for all its files of that channel."""
    if not re.fullmatch(r"[\w.-]+", release.tag, re.ASCII):
        raise LauncherError("value", f"--release {release.tag[:80]!r}: not a release's tag", "--release v0.1.0")
    place = f"{releases()}/download/{release.tag}"
    listed = f"{place}/titan-{release.channel}.sha256"
    text, _ = read(listed, SMALL, refused_by_server(listed))
    lines = re.findall(r"^([0-9a-f]{64}) [ *]([\w.-]+)$", text.decode("utf-8", "replace"), re.MULTILINE | re.ASCII)
    sums = {name: digest for digest, name in lines}
    image = f"titan-{release.channel}-{release.arch}.sqsh"
    if not {image, f"{image}.json"} <= sums.keys():
        there = ", ".join(sorted(name for name in sums if name.endswith(".sqsh"))) or "no image"
        raise LauncherError(
            "release-lacks",
            f"{listed}: has no {image}; it has {there}",
            "--arch, --channel",
            status=ExitStatus.NOT_FOUND,
        )
    where = f"{place}/{image}.json"
    data, _ = read(where, SMALL, refused_by_server(where))
    about = None
    with suppress(ValueError):
        about = parse_json(data)
    digest, size = _described_in(about, where)
    if hashlib.sha256(data).hexdigest() != sums[f"{image}.json"] or digest != sums[image]:
        what = f"{where}: other checksums than {listed} says"
        raise LauncherError("image-description", what, "the release is being written, or damaged: again later")
    parts = [
        f"{place}/{name}" for name in sorted(name for name in sums if name.startswith(f"{image}.part-")) or [image]
    ]

    def join(stream: Incoming) -> None:
        sizes = [size_of(url, refused_by_server(url)) or 0 for url in parts]
        if sum(sizes) != size:
            what = f"{place}: the parts of {image} have {sum(sizes):,} bytes together, the image {size:,}"
            raise LauncherError("server-answer", what, "the release is being written, or damaged: again later")
        stream.start = 0
        stream.restart()
        for url, bytes_ in zip(parts, sizes, strict=True):
            stream.start, stream.limit = stream.tell(), stream.tell() + bytes_
            download(url, stream, refused_by_server(url))

    return _wanted(image, digest, size, about, join)


def _described_in(about: Any, where: str) -> tuple[str, int]:
    """Checksum and size of the image that a description from a server is of."""
    digest = _digest_in(about, where)
    size = about["squashfs"].get("bytes")
    check_answer(where, size=size)
    if not size or not is_metadata(about):
        raise LauncherError(
            "image-description", f"{where}: not the description of an image", "the address of a .sqsh file of a release"
        )
    return digest, int(size)


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
    if not os.path.lexists(final):
        return False
    try:
        size = superblock(final).file_size
    except LauncherError:
        return False
    return size == wanted.file.bytes and described(final).get("sha256") == wanted.file.sha256


def _is_right(wanted: Wanted, final: Path) -> bool:
    """Whether the image is there without its description, as a call leaves it that ends before its last step."""
    try:
        return not wrong_size(final, wanted.file.bytes) and check_bytes(final, wanted.file) is not None
    except OSError:
        return False


def described(image: Path) -> dict[str, Any]:
    """What the description beside an image says of the file."""
    facts = (read_json(sidecar_path(image)) or {}).get("squashfs")
    return facts if isinstance(facts, dict) else {}
