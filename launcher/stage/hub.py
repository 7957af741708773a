"""The Hugging Face Hub: what a repository holds at one commit, one file of it, and its refusals in plain words."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_bytes
from launcher.stage.source import RemoteFile, check_answer, is_digest
from launcher.stage.target import Incoming, TooSlow
from launcher.stage.web import Refused, ask, bounded, download, header_of, moving, no_answer, status_of

ENDPOINT = "https://huggingface.co"
ANSWER_BYTES = 8 << 20  # of the API: twenty pages of a listing
CHECK = "check HF_ENDPOINT and who runs it"
TOKEN_BYTES = 64 << 10  # of a file that holds one
xet_files = functools.cache(functools.partial(TemporaryDirectory, prefix="launcher-xet-"))  # until this process ends


@dataclass(frozen=True)
class Repo:
    """A repository at one commit. `kind` is "model" or "dataset"; the token stays out of every message."""

    name: str
    kind: str
    revision: str  # 40 hexadecimal digits
    token: str = field(default="", repr=False)

    @property
    def source(self) -> str:
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def site(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        return f"{self.site}/{self.source.removeprefix('hf://')}"

    @property
    def api(self) -> str:
        return f"{self.site}/api/{self.kind}s/{self.name}"

    def download(self, file: RemoteFile, stream: Incoming) -> None:
        if not _came_by_xet(self, file, stream):
            url = f"{self.page}/resolve/{self.revision}/{quote(file.path)}"
            download(url, stream, refused_by_hub(self, file.path), self.token)


def hub_constants() -> Any:
    """Those of huggingface_hub, which reads the user's HF_* variables while it is imported."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise LauncherError(
            "hub-settings", f"an HF_* variable has an invalid value: {error}", "env | grep ^HF_"
        ) from None
    return constants


def find_token(token_file: Path | None = None) -> str:
    """The token in `token_file`, else HF_TOKEN, else the one of `hf auth login`; "" without any.

    Raises LauncherError for a file that cannot be read, and for what is not exactly one word.
    """
    place = token_file or Path(hub_constants().HF_TOKEN_PATH)
    named = [] if token_file else [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    try:
        found = next(filter(str.strip, named), "") or read_bytes(place, TOKEN_BYTES, wait=bool(token_file)).decode(
            "utf-8", "replace"
        )
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not token_file:
            return ""
        raise LauncherError(
            "hub-token",
            f"the Hub's token in {place} cannot be read: {error.strerror}",
            f"ls -l {quoted(place)}; or export HF_TOKEN, or --token-file FILE, or HF_TOKEN_PATH=FILE",
            status=ExitStatus.FILESYSTEM,
        ) from None
    words = found.split()
    if len(words) > 1 or (token_file and not words) or not found.isascii():
        where = f"--token-file {token_file}" if token_file else "the Hub's token"
        fix = "write the token into a file: umask 077; cat > FILE, paste it, Ctrl-D; then --token-file FILE"
        raise LauncherError("hub-token", f"{where}: must hold one token and nothing else", fix)
    return words[0] if words else ""


def pin(name: str, kind: str, revision: str | None, token: str) -> Repo:
    """The repository at the commit that `revision` (a branch, tag or commit; None: main) stands for now."""
    if hub_constants().HF_HUB_OFFLINE:
        raise LauncherError(
            "hub-settings", "HF_HUB_OFFLINE is set: nothing can be downloaded", "unset HF_HUB_OFFLINE, then again"
        )
    if not (os.environ.get("HF_XET_CACHE") or os.environ.get("HF_HOME")):  # homes are on NFS, slow for small files
        os.environ["HF_XET_CACHE"] = xet_files().name
    asked = Repo(name, kind, revision or "main", token)
    info, _ = _ask(asked, f"{asked.api}/revision/{quote(asked.revision, safe='')}")
    commit = info.get("sha") if isinstance(info, dict) else None
    check_answer(asked.page, commit=commit)
    return Repo(name, kind, str(commit), token)


def _ask(repo: Repo, url: str) -> tuple[Any, str]:
    """What the Hub's API answers, and the address of the next page. Raises LauncherError for what is no JSON."""
    token = repo.token if url.startswith(f"{repo.site}/") else ""
    value, following = ask(url, ANSWER_BYTES, refused_by_hub(repo), token)
    if not isinstance(value, (dict, list)):
        raise LauncherError(
            "server-answer",
            f"{repo.page}: the server's answer is not JSON, or more than {ANSWER_BYTES >> 20} MB of it",
            "check HF_ENDPOINT and HTTPS_PROXY: a login page, perhaps; the same command tries again",
        )
    return value, following


def list_files(repo: Repo, folder: str = "", recursive: bool = False) -> list[RemoteFile]:
    """The files in `folder` ("": the top), by path. Raises LauncherError for an answer that makes no sense."""
    files = {}
    for entry in bounded(_pages(repo, folder, recursive), repo.page, refused_by_hub(repo), CHECK):
        check_answer(repo.page, path=entry.get("path"))
        if entry.get("type") == "file":
            files[entry["path"]] = _file(repo, entry)
    return sorted(files.values(), key=lambda file: file.path)


def _pages(repo: Repo, folder: str, recursive: bool) -> Iterator[list[dict[str, Any]]]:
    url = f"{repo.api}/tree/{repo.revision}/{quote(folder)}".rstrip("/") + f"?recursive={recursive}&expand=False"
    while url:
        entries, url = _ask(repo, url)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise LauncherError("server-answer", f"{repo.page}: the server's listing is no list of files", CHECK)
        yield entries


def _file(repo: Repo, entry: dict[str, Any]) -> RemoteFile:
    check_answer(repo.page, size=entry.get("size"))
    xet = entry["xetHash"] if is_digest(entry.get("xetHash")) else ""
    if entry.get("lfs") is None:
        check_answer(repo.page, git_id=entry.get("oid"))
        return RemoteFile(entry["path"], entry["size"], blob=entry["oid"], xet=xet)
    sha256 = entry["lfs"].get("oid") if isinstance(entry["lfs"], dict) else entry["lfs"]
    check_answer(repo.page, sha256=sha256)
    return RemoteFile(entry["path"], entry["size"], sha256=str(sha256), xet=xet)


def _came_by_xet(repo: Repo, file: RemoteFile, stream: Incoming) -> bool:
    """Through Xet's chunk servers; where that fails, plain HTTPS has its turn. The progress moves when all is there."""
    # Xet's client takes as much memory as its server likes: that of the Hub itself alone is trusted.
    if not file.xet or repo.site != ENDPOINT:
        return False
    from huggingface_hub import file_download
    from huggingface_hub.utils import XetFileData, build_hf_headers

    if not file_download.is_xet_available():
        return False
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings quote addresses that carry a signature

    def alive(count: float) -> None:
        stream.received += int(count)

    quiet = dict.fromkeys(("set_postfix_str", "set_transfer_postfix_str"), lambda *_words, **_how: None)
    get = functools.partial(
        file_download.xet_get,
        incomplete_path=stream.handle,
        xet_file_data=XetFileData(file.xet, f"{repo.api}/xet-read-token/{repo.revision}"),
        headers=build_hf_headers(token=repo.token or False),
        expected_size=file.bytes,
        _tqdm_bar=SimpleNamespace(update=alive, update_transfer=alive, **quiet),
    )
    try:
        moving(get, stream)
    except TooSlow as error:  # not by HTTPS: what was given up may still write
        fix = "the same command continues; without Xet: export HF_HUB_DISABLE_XET=1"
        raise LauncherError("hub-refused", f"{file.path}: {error} from Xet", fix, status=ExitStatus.ERROR) from error
    except Exception:  # hf_xet is compiled, and its errors have no common root
        os.ftruncate(stream.fileno(), 0)
        return False
    stream.on_bytes(file.bytes)
    return True


def refused_by_hub(repo: Repo, path: str = "") -> Refused:
    """What the Hub or the network refuses, and what to do about it. Never holds an address with a signature."""

    def refused(error: Exception) -> LauncherError:
        status, code, words = status_of(error), header_of(error, "X-Error-Code"), header_of(error, "X-Error-Message")
        if repo.token:
            words = words.replace(repo.token, "(token)")
        what = f"{repo.name}/{path}" if path else repo.name
        exit_status = ExitStatus.NOT_FOUND if status == 404 else ExitStatus.ERROR
        if status in (401, 403):
            says, fix = _no_access(repo, gated=code == "GatedRepo" or status == 403)
            return LauncherError("hub-access", says, fix, original=words)
        if status == 404 and code == "RevisionNotFound":
            says = f"{repo.name} has no revision {repo.revision[:80]!r}"
            fix = f"--revision main, or one of {repo.page}/commits/main"
        elif status == 404:
            says, fix = f"{repo.site} has no {repo.kind} {what}", "check its name, and HF_ENDPOINT"
        elif status == 429:
            says = f"{what}: the Hub answers 429, too many requests"
            fix = "try again later to continue; a token (hf auth login) raises the limit, --jobs 2 asks for less"
        elif status:
            says, fix = f"{what}: the Hub answers HTTP {status}", "the same command later continues"
        else:
            says = f"{what}: {no_answer(error)} at {repo.site}"
            fix = "the same command continues; check the network, HTTPS_PROXY and HF_ENDPOINT"
        return LauncherError("hub-refused", says, fix, status=exit_status, original=words)

    return refused


def _no_access(repo: Repo, gated: bool) -> tuple[str, str]:
    """401 and 403. Which of the reasons it is (not asked for, pending, rejected, not for this token) the Hub's own
    words say, which are printed below.
    """
    if not repo.token:
        return (
            f"{repo.name} needs a token, and there is none",
            f"accept the licence on {repo.page}, then: hf auth login (or export HF_TOKEN, or --token-file FILE)",
        )
    if gated:
        return (
            f"{repo.name} is gated, and your account or token has no access to it",
            f"accept the licence on {repo.page} with the account of this token, or look at {repo.site}/settings: "
            "gated-repos for your request, tokens for what the token may read",
        )
    return (
        "the Hub does not accept your token: it is invalid or has expired",
        f"make a new one on {repo.site}/settings/tokens, then: hf auth login (or HF_TOKEN, or --token-file)",
    )
