"""A file from a web server, such as a release's asset: continued after interruptions, by the standard library alone."""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import parse_json, whole
from launcher.stage.manifest import BLOCK

# (offset, size) -> the bytes from `offset` up to `size`
Reader = Callable[[int, int], Iterator[bytes]]
TIMEOUT_S = 60  # for a connection, and for each piece
ATTEMPTS = 6  # without a byte in between
BACKOFF_S = 1.0  # the first wait; doubles up to LONGEST_WAIT_S
LONGEST_WAIT_S = 60.0
SMALL = 1 << 20

_BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)
BAD_ADDRESS = (ValueError, http.client.InvalidURL)  # that a server leads to


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A token goes on to the server that it was meant for, and to no other; to nothing but web servers anyway."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read all that comes with the redirect, however much that is
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https"):
            raise ValueError("the server leads to another kind of address")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and old[:2] == new[:2] and req.has_header("Authorization"):
            request.add_unredirected_header("Authorization", req.get_header("Authorization"))
        return request


def open_url(
    url: str, headers: dict[str, str], timeout: float, token: str = "", tls: ssl.SSLContext | None = None
) -> Any:
    """The answer to a GET. Raises what urllib raises, for a redirect without end, too."""
    # Identity: of a compressed answer neither size nor range could be trusted, nor what it inflates to.
    headers = {"User-Agent": "titan-launcher", "Accept-Encoding": "identity"} | headers
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=tls))
    return opener.open(request, timeout=timeout)


def read_whole(answer: Any, limit: int) -> bytes:
    """All of an answer of at most `limit` bytes, nothing of a larger one. Raises IncompleteRead for one that is cut."""
    data: bytes = answer.read(limit + 1)
    if len(data) > limit:
        return b""
    if answer.length:
        raise http.client.IncompleteRead(data, answer.length)
    return data


def json_in(data: bytes) -> Any:
    """The value; None where it is no JSON."""
    try:
        return parse_json(data)
    except ValueError:
        return None


def read_small(url: str) -> dict[str, Any]:
    """The JSON object at `url`. Raises LauncherError where there is none."""
    value = json_in(b"".join(_read(url, 0, None)))
    if not isinstance(value, dict):
        raise LauncherError(f"{url}: not a JSON object", "the address of a .sqsh file of a release")
    return value


def stream_from(url: str) -> Reader:
    """A reader of the file at `url`. After a cut it asks for the rest; a server that knows no ranges sends all
    again.
    """
    return lambda offset, size: _read(url, offset, size)


def _read(url: str, offset: int, size: int | None) -> Iterator[bytes]:
    failures, wait, reached = 0, BACKOFF_S, offset
    while size is None or offset < size:
        try:
            with open_url(url, {"Range": f"bytes={offset}-"} if offset else {}, TIMEOUT_S) as answer:
                if offset and answer.status != 206:
                    _skip(answer, offset)
                if size is None:
                    yield read_whole(answer, SMALL)
                    return
                while offset < size and (chunk := answer.read(min(BLOCK, size - offset))):
                    offset += len(chunk)
                    yield chunk
            if offset < size:
                raise http.client.IncompleteRead(b"", size - offset)
        except _BROKEN as error:
            if offset - reached >= BLOCK:  # not for each byte: a server may give one at a time
                failures, wait, reached = 0, BACKOFF_S, offset
            failures += 1
            if failures >= ATTEMPTS or not _may_pass(error):
                raise _refused(url, error) from error
            time.sleep(max(wait, _retry_after(error)))
            wait = min(2 * wait, LONGEST_WAIT_S)


def _skip(answer: http.client.HTTPResponse, count: int) -> None:
    while count and (chunk := answer.read(min(BLOCK, count))):
        count -= len(chunk)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 429) or error.code >= 500
    return not isinstance(error, BAD_ADDRESS)


def _retry_after(error: Exception) -> float:
    text = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    return float(min(whole(text) or 0, 900))


def _refused(url: str, error: Exception) -> LauncherError:
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            fix = "the server asks who you are: download it with its own tools, then stage the file"
        elif error.code == 404 and url.endswith(".sqsh.json"):
            fix = "every image of a release has its .json beside it; check the address"
        else:
            fix = "check the address" if error.code < 500 else "the same command later continues"
        return LauncherError(f"{url}: HTTP {error.code}", fix, status=ExitStatus.NOT_FOUND)
    reason = getattr(error, "reason", None) or error
    words = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else str(reason)
    return LauncherError(
        f"{url}: {words or type(error).__name__}",
        "the same command continues; check the network and HTTPS_PROXY",
        status=ExitStatus.ERROR,
    )
