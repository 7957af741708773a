"""The Hugging Face Hub: what a repository holds at one commit, one file of it, and its refusals in plain words.

Asked with the standard library, and every answer is bounded and checked where it is read: huggingface_hub's client
takes a listing of any size, also inflated, and what is wrong in it for granted. Its `hf_hub_download` keeps an
interrupted download in 0.34 and throws it away in 2.4. The one module that imports it: for the user's token, and for
Xet.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_bytes
from launcher.stage.hub_errors import status_of, translate, with_retries
from launcher.stage.receive import Sink, WrongLength
from launcher.stage.source import Checksums, check_answer, is_digest
from launcher.stage.target import Stopped
from launcher.stage.web import json_in, open_url, read_whole

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 15.0  # without a byte from the server
ANSWER_BYTES = 8 << 20  # of the API: twenty pages of a listing
ENTRIES = 100_000  # of one listing


@dataclass(frozen=True)
class Repo:
    """A repository at one commit. `kind` is "model" or "dataset"; the token stays out of every message."""

    name: str
    kind: str
    revision: str  # 40 hexadecimal digits
    token: str | None = field(default=None, repr=False)

    @property
    def source(self) -> str:
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def site(self) -> str:
        return endpoint()

    @property
    def page(self) -> str:
        return f"{self.site}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def download(
        self, file: HubFile, stream: FileIO, on_bytes: Callable[[int], None], stop: threading.Event
    ) -> Checksums:
        return download(self, file, stream, on_bytes, stop)


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: large ones by their sha256, the others by git's object id (sha1)."""

    path: str
    bytes: int
    sha256: str = ""
    blob: str = ""
    xet: str = ""  # what Xet's servers know the file by

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob

    def digests(self) -> Digests:
        return Digests(None if self.sha256 else self.bytes)


class Digests:
    """The checksums by which the Hub knows files, of bytes as they pass: git's only where its size is given."""

    def __init__(self, git_bytes: int | None = None) -> None:
        self.sha256 = hashlib.sha256()
        self.git = None
        if git_bytes is not None:  # git hashes "blob <size>" and a zero byte before the content
            self.git = hashlib.sha1(b"blob %d\0" % git_bytes, usedforsecurity=False)

    def update(self, chunk: bytes | memoryview) -> None:
        self.sha256.update(chunk)
        if self.git is not None:
            self.git.update(chunk)

    def match(self, file: HubFile) -> bool:
        if file.sha256 or self.git is None:
            return self.sha256.hexdigest() == file.sha256
        return self.git.hexdigest() == file.blob


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, where it is set. Raises LauncherError for one that is no address."""
    address = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is no number
        if parts.scheme in ("http", "https") and parts.hostname:
            return address
    except ValueError:
        pass
    shown = "" if "@" in address else f"={address[:80]}"  # what stands before an @ may be a password
    raise LauncherError(
        f"HF_ENDPOINT{shown}: not a valid address", f"unset HF_ENDPOINT, or: export HF_ENDPOINT={ENDPOINT}"
    )


def find_token(token_file: Path | None = None) -> str | None:
    """The token in `token_file`, else HF_TOKEN, else the one of `hf auth login`; None without any.

    Raises LauncherError for a token file that cannot be read or does not hold exactly one line.
    """
    if token_file is None:
        from huggingface_hub import constants, get_token

        try:
            found: str | None = get_token()
        except (OSError, UnicodeDecodeError) as error:
            place = str(constants.HF_TOKEN_PATH)
            raise LauncherError(
                f"the Hub's token in {place} cannot be read: {getattr(error, 'strerror', None) or 'not text'}",
                f"ls -l {quoted(place)}; or export HF_TOKEN, or --token-file FILE, or HF_TOKEN_PATH=FILE",
                status=ExitStatus.FILESYSTEM,
            ) from None
        return found
    try:
        lines = read_bytes(token_file, 64 << 10, wait=True).decode("utf-8").split()
    except OSError as error:
        raise LauncherError(
            f"--token-file {token_file}: {error.strerror}",
            f"ls -l {quoted(token_file)}",
            status=ExitStatus.FILESYSTEM,
        ) from None
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1:
        raise LauncherError(
            f"--token-file {token_file}: must hold one token and nothing else",
            "write it there with: umask 077; cat > FILE, paste it, Ctrl-D",
        )
    return lines[0]


def pin(name: str, kind: str, revision: str | None, token: str | None) -> Repo:
    """The repository at the commit that `revision` (a branch, tag or commit; None: main) stands for now."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise LauncherError("HF_HUB_OFFLINE is set: nothing can be downloaded", "unset HF_HUB_OFFLINE, then again")
    asked = Repo(name, kind, revision or "main", token)
    info, _ = _ask(asked, f"{_api(asked)}/revision/{quote(asked.revision, safe='')}")
    commit = info.get("sha") if isinstance(info, dict) else None
    check_answer(asked.page, commit=commit)
    return Repo(name, kind, str(commit), token)


def _api(repo: Repo) -> str:
    return f"{repo.site}/api/{repo.kind}s/{repo.name}"


def _open(repo: Repo, url: str, headers: dict[str, str] | None = None) -> Any:
    token = repo.token if url.startswith(f"{repo.site}/") else None
    return open_url(url, headers or {}, TIMEOUT_S, token or "", _tls())


def _ask(repo: Repo, url: str) -> tuple[Any, str]:
    """What the Hub's API answers, and the address of the next page. Raises LauncherError for what is no JSON."""

    def once() -> tuple[bytes, str]:
        with _open(repo, url) as answer:
            return read_whole(answer, ANSWER_BYTES), str(answer.headers.get("Link") or "")

    data, link = with_retries(once, repo)
    value = json_in(data)
    if not isinstance(value, (dict, list)):
        raise LauncherError(
            f"{repo.page}: the server's answer is no JSON, or more than {ANSWER_BYTES >> 20} MB of it",
            "check HF_ENDPOINT and HTTPS_PROXY: a login page, perhaps; the same command tries again",
        )
    found = re.search(r'<([^<>]*)>;\s*rel="next"', link)
    return value, urljoin(url, found[1]) if found else ""


def list_files(repo: Repo, folder: str = "", recursive: bool = False) -> list[HubFile]:
    """The files in `folder` ("": the top), by path. Raises LauncherError for an answer that makes no sense."""
    url = f"{_api(repo)}/tree/{repo.revision}/{quote(folder)}".rstrip("/") + f"?recursive={recursive}&expand=False"
    files: dict[str, HubFile] = {}
    asked = 0
    while url:
        entries, url = _ask(repo, url)
        asked += 1 + len(entries)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or asked > ENTRIES:
            what = "is no list of files" if asked <= ENTRIES else f"has more than {ENTRIES:,} entries"
            raise LauncherError(f"{repo.page}: the server's listing {what}", "check HF_ENDPOINT and who runs it")
        for entry in entries:
            check_answer(repo.page, path=entry.get("path"))
            if entry.get("type") == "file":
                files[entry["path"]] = _file(repo, entry)
    return sorted(files.values(), key=lambda file: file.path)


def _file(repo: Repo, entry: dict[str, Any]) -> HubFile:
    check_answer(repo.page, size=entry.get("size"))
    xet = entry["xetHash"] if is_digest(entry.get("xetHash")) else ""
    if entry.get("lfs") is None:
        check_answer(repo.page, git_id=entry.get("oid"))
        return HubFile(entry["path"], entry["size"], blob=entry["oid"], xet=xet)
    sha256 = entry["lfs"].get("oid") if isinstance(entry["lfs"], dict) else entry["lfs"]
    check_answer(repo.page, sha256=sha256)
    return HubFile(entry["path"], entry["size"], sha256=str(sha256), xet=xet)


def download(
    repo: Repo, file: HubFile, stream: FileIO, on_bytes: Callable[[int], None], stop: threading.Event
) -> Checksums:
    """Brings `file` into `stream`, continuing what is there, and returns the checksums of its bytes.

    Waits and tries again after errors of the network, 429 and 5xx. Raises LauncherError for what waiting does not
    cure, Stopped when `stop` is set.
    """

    def size() -> int:
        return os.fstat(stream.fileno()).st_size

    if file.xet and not size() and xet_wanted():
        digests = _download_by_xet(repo, file, stream, on_bytes, stop)
        if digests is not None:
            return digests
        stream.truncate(0)

    def once() -> Checksums:
        if size() > file.bytes:
            stream.truncate(0)
        sink = Sink(stream, file, on_bytes, stop)
        sink.take_existing()
        if sink.size < file.bytes:
            _get(repo, file, sink)
        return sink.digests

    return with_retries(once, repo, file.path, size, stop)


def _get(repo: Repo, file: HubFile, sink: Sink) -> None:
    """The rest of a file into `sink`. The Hub is asked each time where its content is: an address is valid for an
    hour.
    """
    url = f"{repo.page}/resolve/{repo.revision}/{quote(file.path)}"
    try:
        with _open(repo, url, {"Range": f"bytes={sink.size}-"} if sink.size else None) as answer:
            if sink.size and answer.status != 206:
                sink.restart()
            sink.take(answer)
    except OSError as error:
        if status_of(error) == 416:
            sink.restart()
        raise
    if sink.size < file.bytes:
        raise WrongLength(f"the connection ended after {sink.size:,} of {file.bytes:,} bytes")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Trusts what huggingface_hub's own client trusts, which Xet uses: the bundle that the user names, else
    certifi's, the system's.
    """
    context = ssl.create_default_context()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle and not os.environ.get("SSL_CERT_FILE"):
        with contextlib.suppress(ImportError):
            import certifi

            bundle = certifi.where()
    if bundle:
        context.load_verify_locations(bundle)
    return context


def xet_wanted() -> bool:
    """Whether Xet is installed, and HF_HUB_DISABLE_XET does not forbid it."""
    from huggingface_hub import constants

    if getattr(constants, "HF_HUB_DISABLE_XET", False):
        return False

    return importlib.util.find_spec("hf_xet") is not None


def _download_by_xet(
    repo: Repo, file: HubFile, stream: FileIO, on_bytes: Callable[[int], None], stop: threading.Event
) -> Checksums | None:
    """Through Xet's chunk servers; None where that fails, and plain HTTP, which can continue, is tried instead.

    Xet gives a file whole: the progress moves when it is there, and an interrupted one starts again. It opens the file
    by a path, so it is given one that leads to the open file and to no other.
    """
    try:
        from huggingface_hub import file_download
        from huggingface_hub.utils import XetFileData, build_hf_headers

        with _quiet():
            file_download.xet_get(
                incomplete_path=Path(f"/proc/self/fd/{stream.fileno()}"),
                xet_file_data=XetFileData(file.xet, f"{_api(repo)}/xet-read-token/{repo.revision}"),
                headers=build_hf_headers(token=repo.token or False),
                expected_size=file.bytes,
            )
        sink = Sink(stream, file, on_bytes, stop)
        sink.take_existing()
        on_bytes(sink.size)
        return sink.digests
    except Exception as error:  # hf_xet is compiled, and its errors have no common root
        if stop.is_set():
            raise Stopped from error
        if status_of(error) in (401, 403):
            raise translate(error, repo, file.path) from error
        return None


@contextlib.contextmanager
def _quiet() -> Any:
    """Neither huggingface_hub's own bars nor its warnings: those quote addresses that carry a signature."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    yield
