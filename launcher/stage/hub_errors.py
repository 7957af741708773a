"""What the Hub and the network refuse: what may pass is tried again, the rest is said in plain words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, TypeVar
from urllib.error import URLError

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import whole
from launcher.stage.manifest import BLOCK
from launcher.stage.receive import WrongLength
from launcher.stage.target import Stopped
from launcher.stage.web import BAD_ADDRESS

if TYPE_CHECKING:
    from launcher.stage.hub import Repo

ATTEMPTS = 6  # without progress in between
CONTACT_ATTEMPTS = 3  # for a Hub that cannot be reached at all, before anything was downloaded
BACKOFF_S = 1.0  # the first wait; it doubles up to LONGEST_WAIT_S
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 900.0  # a server that asks for more is not waited for

Result = TypeVar("Result")


def with_retries(
    call: Callable[[], Result],
    repo: Repo,
    path: str = "",
    progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> Result:
    """`call()`, again after what may pass: lost connections, 408, 429 and 5xx, waiting as long as the server asks."""
    failures, wait, reached = 0, BACKOFF_S, progress()
    while True:
        try:
            return call()
        except (LauncherError, Stopped):
            raise
        except Exception as error:  # of urllib, http.client and ssl: no common root
            if not _may_pass(error):
                raise translate(error, repo, path) from error
            if progress() - reached >= BLOCK:  # not for each byte: a server may give one at a time
                failures, wait, reached = 0, BACKOFF_S, progress()
            failures += 1
            asked = _retry_after(error)
            limit = ATTEMPTS if path or status_of(error) else CONTACT_ATTEMPTS
            if failures >= limit or asked > LONGEST_RETRY_AFTER_S:
                raise translate(error, repo, path) from error
            _sleep(max(asked, wait), stop)
            wait = min(2 * wait, LONGEST_WAIT_S)


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


def status_of(error: BaseException) -> int:
    """The HTTP status in an error of huggingface_hub's or urllib's; 0 without one."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "code", 0) or 0)


def _header(error: BaseException, name: str) -> str:
    headers = getattr(getattr(error, "response", error), "headers", None)
    return str(headers.get(name) or "") if headers is not None else ""


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait; 0 when it does not. A date is taken relative to the answer's own."""
    text = _header(error, "Retry-After")
    if (seconds := whole(text)) is not None:
        return float(seconds)

    try:
        asked, now = parsedate_to_datetime(text), parsedate_to_datetime(_header(error, "Date"))
        return max((asked - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _may_pass(error: Exception) -> bool:
    if status := status_of(error):
        return status in (408, 416, 429) or status >= 500
    return isinstance(error, (OSError, HTTPException, WrongLength)) and not isinstance(error, BAD_ADDRESS)


def translate(error: Exception, repo: Repo, path: str = "") -> LauncherError:
    """What the Hub or the network has refused, and what to do about it. Never holds an address with a signature."""
    status, code = status_of(error), _header(error, "X-Error-Code")
    words = _header(error, "X-Error-Message")
    if repo.token:
        words = words.replace(repo.token, "(token)")
    what = f"{repo.name}/{path}" if path else repo.name
    if status in (401, 403):
        return _refused(status, code, words, repo)
    if status == 404 and code == "RevisionNotFound":
        return LauncherError(
            f"{repo.name} has no revision {repo.revision[:80]!r}",
            f"--revision main, or one of {repo.page}/commits/main",
            status=ExitStatus.NOT_FOUND,
            original=words,
        )
    if status == 404:
        return LauncherError(
            f"{repo.site} has no {repo.kind} {what}",
            "check its name, and HF_ENDPOINT",
            status=ExitStatus.NOT_FOUND,
            original=words,
        )
    if status == 429:
        return LauncherError(
            f"{what}: the Hub answers 429, too many requests",
            "again later continues; a token (hf auth login) raises the limit, --jobs 2 asks less",
            status=ExitStatus.ERROR,
            original=words,
        )
    if status:
        return LauncherError(
            f"{what}: the Hub answers HTTP {status}",
            "the same command later continues",
            status=ExitStatus.ERROR,
            original=words,
        )
    if isinstance(error, WrongLength):
        reason = str(error)
    elif isinstance(error, BAD_ADDRESS):
        reason = "the server leads to an address that cannot be used"
    else:
        reason = "no connection" if isinstance(error, URLError) else "the connection breaks off"
        error = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    return LauncherError(
        f"{what}: {reason} ({repo.site}, {type(error).__name__})",
        "the same command continues; check the network, HTTPS_PROXY and HF_ENDPOINT",
        status=ExitStatus.ERROR,
    )


def _refused(status: int, code: str, words: str, repo: Repo) -> LauncherError:
    """401 and 403: no token, an invalid one, no access asked for, access pending, refused, or not for this token."""
    lower = words.lower()
    if not repo.token:
        return LauncherError(
            f"{repo.name} needs a token, and there is none",
            f"accept the licence on {repo.page}, then: hf auth login (or export HF_TOKEN, or --token-file FILE)",
            original=words,
        )
    if "awaiting" in lower or "pending" in lower:
        return LauncherError(
            f"{repo.name}: your request for access is pending: its owner has not answered yet",
            f"wait for the owner's mail, or look at {repo.site}/settings/gated-repos; then the same command",
            original=words,
        )
    if "rejected" in lower:
        return LauncherError(
            f"{repo.name}: your request for access was rejected",
            "name a copy that you may use: launcher stage tokenizer OWNER/NAME --to DIR",
            original=words,
        )
    if "fine-grained" in lower:
        return LauncherError(
            f"{repo.name}: your fine-grained token may not read gated repositories",
            f"allow it on {repo.site}/settings/tokens, or use a token of type Read",
            original=words,
        )
    if code == "GatedRepo" or status == 403:
        return LauncherError(
            f"{repo.name} is gated, and your account has no access to it",
            f"accept the licence on {repo.page} with the account of this token, then the same command",
            original=words,
        )
    return LauncherError(
        "the Hub does not accept your token: it is invalid or has expired",
        f"make a new one on {repo.site}/settings/tokens, then: hf auth login (or HF_TOKEN, or --token-file)",
        original=words,
    )
