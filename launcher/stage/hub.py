"""The Hugging Face Hub: what a repository holds at one commit, one file of it, and its refusals in plain words."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_bytes
from launcher.stage.source import RemoteFile, check_answer, is_digest
from launcher.stage.target import Incoming, TooSlow
from launcher.stage.web import (
    Refused,
    ask,
    distrust,
    download,
    header_of,
    hub_constants,
    library,
    no_answer,
    not_trusted,
    refuse_offline,
    status_of,
)

ENDPOINT = "https://huggingface.co"
ANSWER_BYTES = 8 << 20  # of the API: twenty pages of a listing
TOKEN_BYTES = 64 << 10  # of a file that holds one
ENTRIES = 100_000  # of one listing
LISTING_S = 600.0  # for it


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

    @property
    def api(self) -> str:
        return f"{self.site}/api/{self.kind}s/{self.name}"

    def download(self, file: RemoteFile, stream: Incoming) -> None:
        from huggingface_hub.utils import build_hf_headers

        headers = build_hf_headers(token=self.token or False)
        if not (file.xet and _came_by_xet(self, file, stream, headers)):
            url = f"{self.page}/resolve/{self.revision}/{quote(file.path)}"
            download(url, stream, headers, refused_by_hub(self, file.path))


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
        "hub-settings",
        f"HF_ENDPOINT{shown}: not a valid address",
        f"unset HF_ENDPOINT, or: export HF_ENDPOINT={ENDPOINT}",
    )


def find_token(token_file: Path | None = None) -> str | None:
    """The token in `token_file`, else HF_TOKEN, else the one of `hf auth login`; None without any.

    Raises LauncherError for a file that cannot be read, and for a `token_file` that does not hold exactly one word.
    """
    constants = hub_constants()
    from huggingface_hub import get_token

    try:
        if token_file is None:
            if not os.environ.get("HF_TOKEN"):
                with contextlib.suppress(FileNotFoundError):
                    read_bytes(Path(constants.HF_TOKEN_PATH), TOKEN_BYTES)  # the library reads any length
            found: str | None = get_token()
            if found and not found.isascii():
                fix = "copy it again: export HF_TOKEN=..., or hf auth login"
                raise LauncherError("hub-token", "the Hub's token holds a character that is not ASCII", fix)
            return found
        words = read_bytes(token_file, TOKEN_BYTES, wait=True).decode("utf-8", "replace").split()
    except (OSError, UnicodeDecodeError) as error:
        place = str(token_file or constants.HF_TOKEN_PATH)
        raise LauncherError(
            "hub-token",
            f"the Hub's token in {place} cannot be read: {getattr(error, 'strerror', None) or 'not text'}",
            f"ls -l {quoted(place)}; or export HF_TOKEN, or --token-file FILE, or HF_TOKEN_PATH=FILE",
            status=ExitStatus.FILESYSTEM,
        ) from None
    if len(words) != 1 or not words[0].isascii():
        raise LauncherError(
            "hub-token",
            f"--token-file {token_file}: must hold one token and nothing else",
            "write it there with: umask 077; cat > FILE, paste it, Ctrl-D",
        )
    return words[0]


def pin(name: str, kind: str, revision: str | None, token: str | None) -> Repo:
    """The repository at the commit that `revision` (a branch, tag or commit; None: main) stands for now."""
    refuse_offline()
    asked = Repo(name, kind, revision or "main", token)
    info, _ = _ask(asked, f"{asked.api}/revision/{quote(asked.revision, safe='')}")
    commit = info.get("sha") if isinstance(info, dict) else None
    check_answer(asked.page, commit=commit)
    return Repo(name, kind, str(commit), token)


def _ask(repo: Repo, url: str) -> tuple[Any, str]:
    """What the Hub's API answers, and the address of the next page. Raises LauncherError for what is no JSON."""
    token = repo.token if url.startswith(f"{repo.site}/") else None
    value, link = ask(url, ANSWER_BYTES, refused_by_hub(repo), token or "")
    if not isinstance(value, (dict, list)):
        raise LauncherError(
            "server-answer",
            f"{repo.page}: the server's answer is no JSON, or more than {ANSWER_BYTES >> 20} MB of it",
            "check HF_ENDPOINT and HTTPS_PROXY: a login page, perhaps; the same command tries again",
        )
    found = re.search(r'<([^<>]*)>;\s*rel="next"', link)
    try:
        return value, urljoin(url, found[1]) if found else ""
    except ValueError as error:
        raise refused_by_hub(repo)(error) from None


def list_files(repo: Repo, folder: str = "", recursive: bool = False) -> list[RemoteFile]:
    """The files in `folder` ("": the top), by path. Raises LauncherError for an answer that makes no sense."""
    url = f"{repo.api}/tree/{repo.revision}/{quote(folder)}".rstrip("/") + f"?recursive={recursive}&expand=False"
    files: dict[str, RemoteFile] = {}
    asked, until = 0, time.monotonic() + LISTING_S
    while url:
        if time.monotonic() > until:
            raise refused_by_hub(repo)(TooSlow(f"no whole listing in {LISTING_S:.0f} s"))
        entries, url = _ask(repo, url)
        asked += 1 + len(entries)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or asked > ENTRIES:
            what = "is no list of files" if asked <= ENTRIES else f"has more than {ENTRIES:,} entries"
            raise LauncherError(
                "server-answer", f"{repo.page}: the server's listing {what}", "check HF_ENDPOINT and who runs it"
            )
        for entry in entries:
            check_answer(repo.page, path=entry.get("path"))
            if entry.get("type") == "file":
                files[entry["path"]] = _file(repo, entry)
    return sorted(files.values(), key=lambda file: file.path)


def _file(repo: Repo, entry: dict[str, Any]) -> RemoteFile:
    check_answer(repo.page, size=entry.get("size"))
    xet = entry["xetHash"] if is_digest(entry.get("xetHash")) else ""
    if entry.get("lfs") is None:
        check_answer(repo.page, git_id=entry.get("oid"))
        return RemoteFile(entry["path"], entry["size"], blob=entry["oid"], xet=xet)
    sha256 = entry["lfs"].get("oid") if isinstance(entry["lfs"], dict) else entry["lfs"]
    check_answer(repo.page, sha256=sha256)
    return RemoteFile(entry["path"], entry["size"], sha256=str(sha256), xet=xet)


def _came_by_xet(repo: Repo, file: RemoteFile, stream: Incoming, headers: dict[str, str]) -> bool:
    """Through Xet's chunk servers; where that fails, plain HTTP has its turn. The progress moves when all is there."""
    from huggingface_hub.utils import XetFileData

    # Xet's client takes any amount of memory and time that its server likes: that of the Hub itself alone is trusted.
    if repo.site != ENDPOINT or not library().is_xet_available():  # not installed, or HF_HUB_DISABLE_XET
        return False
    try:
        library().xet_get(
            incomplete_path=stream.handle,
            xet_file_data=XetFileData(file.xet, f"{repo.api}/xet-read-token/{repo.revision}"),
            headers=headers,
            expected_size=file.bytes,
        )
    except Exception:  # hf_xet is compiled, and its errors have no common root
        os.ftruncate(stream.fileno(), 0)
        return False
    stream.on_bytes(file.bytes)
    return True


def refused_by_hub(repo: Repo, path: str = "") -> Refused:
    """What the Hub or the network refuses, and what to do about it. Never holds an address with a signature."""

    def refused(error: Exception) -> LauncherError:
        status, code, words = status_of(error), header_of(error, "X-Error-Code"), header_of(error, "X-Error-Message")
        if why := distrust(error):
            return not_trusted(repo.site, why)
        if repo.token:
            words = words.replace(repo.token, "(token)")
        what = f"{repo.name}/{path}" if path else repo.name
        if status in (401, 403):
            return LauncherError("hub-access", *_no_access(status, code, words.lower(), repo), original=words)
        exit_status = ExitStatus.NOT_FOUND if status == 404 else ExitStatus.ERROR
        if status == 404 and code == "RevisionNotFound":
            says = f"{repo.name} has no revision {repo.revision[:80]!r}"
            fix = f"--revision main, or one of {repo.page}/commits/main"
        elif status == 404:
            says, fix = f"{repo.site} has no {repo.kind} {what}", "check its name, and HF_ENDPOINT"
        elif status == 429:
            says = f"{what}: the Hub answers 429, too many requests"
            fix = "again later continues; a token (hf auth login) raises the limit, --jobs 2 asks less"
        elif status:
            says, fix = f"{what}: the Hub answers HTTP {status}", "the same command later continues"
        else:
            says = f"{what}: {no_answer(error)} at {repo.site}"
            fix = "the same command continues; check the network, HTTPS_PROXY and HF_ENDPOINT"
        return LauncherError("hub-refused", says, fix, status=exit_status, original=words)

    return refused


def _no_access(status: int, code: str, words: str, repo: Repo) -> tuple[str, str]:
    """401 and 403: no token, an invalid one, no access asked for, access pending, refused, or not for this token."""
    if not repo.token:
        return (
            f"{repo.name} needs a token, and there is none",
            f"accept the licence on {repo.page}, then: hf auth login (or export HF_TOKEN, or --token-file FILE)",
        )
    if "awaiting" in words or "pending" in words:
        return (
            f"{repo.name}: your request for access is pending: its owner has not answered yet",
            f"wait for the owner's mail, or look at {repo.site}/settings/gated-repos; then the same command",
        )
    if "rejected" in words:
        return (
            f"{repo.name}: your request for access was rejected",
            "name a copy that you may use: launcher stage tokenizer OWNER/NAME --to DIR",
        )
    if "fine-grained" in words:
        return (
            f"{repo.name}: your fine-grained token may not read gated repositories",
            f"allow it on {repo.site}/settings/tokens, or use a token of type Read",
        )
    if code == "GatedRepo" or status == 403:
        return (
            f"{repo.name} is gated, and your account has no access to it",
            f"accept the licence on {repo.page} with the account of this token, then the same command",
        )
    return (
        "the Hub does not accept your token: it is invalid or has expired",
        f"make a new one on {repo.site}/settings/tokens, then: hf auth login (or HF_TOKEN, or --token-file)",
    )
