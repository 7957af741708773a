"""The Hugging Face Hub: what a repository holds at one commit, one file of it, and its refusals in plain words.

The one module that imports huggingface_hub: for the listing, for where a file's content is, for tokens and errors, and
for Xet. The content itself is read with the standard library. `hf_hub_download` keeps an interrupted download in 0.34
and throws it away in 2.4, and hands bytes on in pieces of 10 MB at 2.4 times the CPU time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import ExitStatus, LauncherError, quoted
from launcher.stage.hub_errors import status_of, translate, with_retries
from launcher.stage.receive import Sink, WrongLength
from launcher.stage.source import Checksums
from launcher.stage.target import Stopped, safe_path, write_error

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 15.0  # without a byte from the server


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
        self, file: HubFile, partial: Path, on_bytes: Callable[[int], None], stop: threading.Event
    ) -> Checksums:
        return download(self, file, partial, on_bytes, stop)


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: large ones by their sha256, the others by git's object id (sha1)."""

    path: str
    bytes: int
    sha256: str = ""
    blob: str = ""
    xet: bool = False

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
        lines = token_file.read_text(encoding="utf-8").split()
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
    from huggingface_hub import HfApi

    asked = Repo(name, kind, revision or "main", token)
    api = HfApi(endpoint=endpoint())
    info = with_retries(
        lambda: api.repo_info(name, repo_type=kind, revision=revision, timeout=30, token=token or False),
        asked,
    )
    commit = str(info.sha or "")
    if len(commit) != 40 or set(commit) - set("0123456789abcdef"):
        raise LauncherError(f"{asked.page}: the Hub named no commit for {asked.revision}", "try again later")
    return Repo(name, kind, commit, token)


def list_files(repo: Repo, folder: str | None = None, recursive: bool = False) -> list[HubFile]:
    """The files in `folder` (None: the top), by path. Raises LauncherError for names that lead out of a directory."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())

    def ask() -> list[Any]:
        found: Iterable[Any] = api.list_repo_tree(
            repo.name,
            folder,
            recursive=recursive,
            revision=repo.revision,
            repo_type=repo.kind,
            token=repo.token or False,
        )
        return list(found)

    files = []
    for entry in with_retries(ask, repo):
        if not safe_path(entry.path):
            raise LauncherError(
                f"{repo.page}: the server names a file {entry.path[:120]!r}, which would lie outside the target",
                "nothing was written; check HF_ENDPOINT and who runs it",
            )
        size = getattr(entry, "size", None)
        if size is None:  # a folder
            continue
        large = entry.lfs.sha256 if entry.lfs else ""
        files.append(
            HubFile(
                entry.path,
                size,
                large,
                "" if large else entry.blob_id,
                bool(getattr(entry, "xet_hash", None)),
            )
        )
    return sorted(files, key=lambda file: file.path)


def download(
    repo: Repo, file: HubFile, partial: Path, on_bytes: Callable[[int], None], stop: threading.Event
) -> Checksums:
    """Brings `file` into `partial`, continuing what is there, and returns the checksums of its bytes.

    Waits and tries again after errors of the network, 429 and 5xx. Raises LauncherError for what waiting does not
    cure, Stopped when `stop` is set.
    """
    if file.xet and not partial.exists() and xet_wanted():
        digests = _download_by_xet(repo, file, partial, on_bytes, stop)
        if digests is not None:
            return digests

    def once() -> Checksums:
        with _opened(partial) as stream:
            if os.fstat(stream.fileno()).st_size > file.bytes:
                stream.truncate(0)
            sink = Sink(stream, partial, file, on_bytes, stop)
            sink.take_existing()
            if sink.size < file.bytes:
                _get(repo, file, sink)
            return sink.digests

    with _quiet():
        return with_retries(once, repo, file.path, lambda: partial.stat().st_size if partial.exists() else 0, stop)


def _get(repo: Repo, file: HubFile, sink: Sink) -> None:
    """The rest of a file into `sink`. The Hub is asked first where its content is: that address is valid for an hour."""
    import urllib.request

    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo.name, file.path, repo_type=repo.kind, revision=repo.revision, endpoint=endpoint())
    place = get_hf_file_metadata(url, token=repo.token or False, timeout=TIMEOUT_S).location
    if not place.startswith(("http://", "https://")):
        raise LauncherError(f"{repo.name}/{file.path}: the Hub leads to another kind of address", "check HF_ENDPOINT")
    # Identity: of a compressed answer neither the size nor a range could be trusted.
    request = urllib.request.Request(place, headers=build_hf_headers(token=False) | {"Accept-Encoding": "identity"})
    if repo.token and place.startswith(f"{endpoint()}/"):  # the Hub itself; never the servers that it redirects to
        request.add_unredirected_header("Authorization", f"Bearer {repo.token}")
    if sink.size:
        request.add_header("Range", f"bytes={sink.size}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_tls()) as answer:
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
    """Trusts what huggingface_hub's own client trusts: the bundle that the user names, else certifi's, the system's."""
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
    import importlib.util

    return importlib.util.find_spec("hf_xet") is not None


def _opened(partial: Path) -> FileIO:
    try:
        return open(partial, "r+b" if partial.exists() else "x+b", buffering=0)
    except OSError as error:
        raise write_error(partial, error) from error


def _download_by_xet(
    repo: Repo, file: HubFile, partial: Path, on_bytes: Callable[[int], None], stop: threading.Event
) -> Checksums | None:
    """Through Xet's chunk servers; None where that fails, and plain HTTP, which can continue, is tried instead.

    Xet gives a file whole: the progress moves when it is there, and an interrupted one starts again.
    """
    from huggingface_hub import hf_hub_download

    folder = partial.with_name(f"{partial.name}.xet")
    try:
        with _quiet():
            path = hf_hub_download(
                repo.name,
                file.path,
                repo_type=repo.kind,
                revision=repo.revision,
                local_dir=folder,
                endpoint=endpoint(),
                token=repo.token or False,
            )
        os.replace(path, partial)
        with open(partial, "rb", buffering=0) as stream:
            sink = Sink(stream, partial, file, on_bytes, stop)
            sink.take_existing()
        on_bytes(sink.size)
        return sink.digests
    except Exception as error:  # hf_xet is compiled, and its errors have no common root
        if stop.is_set():
            raise Stopped from error
        if status_of(error) in (401, 403):
            raise translate(error, repo, file.path) from error
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Any:
    """Neither huggingface_hub's own bars nor its warnings: those quote addresses that carry a signature."""
    import logging

    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    yield
