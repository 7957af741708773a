"""What web servers answer, read by the standard library: small answers as bounded JSON, and files piece by piece."""

from __future__ import annotations

import http.client
import io
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import parse_json, whole
from launcher.stage.target import Incoming, TooSlow, WrongLength, gigabytes

TIMEOUT_S = 15.0  # without a byte from the server
ENTRIES = 100_000  # of a listing, and its pages, which may be empty
LISTING_S = 600.0  # for it
ATTEMPTS = 6  # for a file, and again as many after a connection that brought some of it
CONTACT_ATTEMPTS = 3  # for a small answer, before anything was downloaded
BACKOFF_S = 1.0  # the first wait; it doubles
LONGEST_RETRY_AFTER_S = 900  # a server that asks for more is not waited for
SLOW_S, LEAST_BYTES_PER_S = 120.0, 1000  # what brings less for so long is given up
PIECE = 1 << 20  # bytes
BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")  # variables that name trust
BAD_ADDRESS = (ValueError, http.client.InvalidURL)  # that a server leads to

Result = TypeVar("Result")
Refused = Callable[[Exception], LauncherError]


def with_retries(
    call: Callable[[], Result], url: str, refused: Refused, attempts: int, stream: Incoming | None = None
) -> Result:
    """`call()`, again after what may pass: lost connections, 408, 429 and 5xx, waiting as long as the server asks.

    It is given up after so many attempts in a row that brought `stream` next to nothing further than all before. Raises
    LauncherError: `refused` makes it of an error of the server or the network.
    """
    trust()
    attempt, furthest = 0, 0
    while True:
        try:
            return moving(call, stream)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise LauncherError(
                    "certificate",
                    f"{'://'.join(urlsplit(url)[:2])}: the server's certificate is not trusted "
                    f"({reason.verify_message or 'certificate verify failed'})",
                    "behind a proxy that inspects TLS, name its certificates: "
                    "export SSL_CERT_FILE=/path/to/ca-bundle.crt",
                    status=ExitStatus.ERROR,
                ) from error
            if stream and stream.tell() > furthest + SLOW_S * LEAST_BYTES_PER_S:
                attempt, furthest = 0, stream.tell()
            attempt += 1
            asked = whole(header_of(error, "Retry-After")) or 0
            if not _may_pass(error) or attempt >= attempts or asked > LONGEST_RETRY_AFTER_S:
                raise refused(error) from error
            time.sleep(max(asked, BACKOFF_S * 2 ** (attempt - 1)))


def moving(call: Callable[[], Result], stream: Incoming | None) -> Result:
    """`call()`, given up when it brings `stream` too little for SLOW_S, or lasts so long without one: a socket's own
    limit begins anew with each byte.

    Raises TooSlow. Its thread does not keep the process.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        before = stream.received if stream else 0
        try:
            return done.result(SLOW_S)
        except TimeoutError:
            if done.done():  # a connection's own
                raise
            if (stream.received if stream else 0) - before < SLOW_S * LEAST_BYTES_PER_S:
                raise TooSlow(f"less than {gigabytes(LEAST_BYTES_PER_S)}/s for {SLOW_S:.0f} s") from None


def _may_pass(error: Exception) -> bool:
    """Not what was given up: its thread may still write, until the file is closed."""
    if status := status_of(error):
        return status in (408, 429) or status >= 500
    return not isinstance(error, (*BAD_ADDRESS, TooSlow))


def status_of(error: BaseException) -> int:
    """The HTTP status in an error; 0 without one."""
    return error.code if isinstance(error, urllib.error.HTTPError) else 0


def header_of(error: BaseException, name: str) -> str:
    return str(error.headers.get(name) or "") if isinstance(error, urllib.error.HTTPError) else ""


def words_of(error: BaseException) -> str:
    """The code and the message of a refusal in XML, as object stores word it."""
    body = b""
    if isinstance(error, urllib.error.HTTPError) and isinstance(error.fp, io.BufferedIOBase):
        with suppress(OSError, http.client.HTTPException, ValueError):
            body = error.fp.read1(4096)  # what has come: more may never come
    return ": ".join(re.findall("<(?:Code|Message)>([^<]*)<", body.decode("utf-8", "replace")))


def no_answer(error: Exception) -> str:
    """What went wrong with a connection, for the middle of a message."""
    if isinstance(error, (TooSlow, WrongLength)):
        return str(error)
    if isinstance(error, BAD_ADDRESS):
        return "the server answers with a number or an address that cannot be used"
    reason = getattr(error, "reason", error)
    words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"{'no connection' if isinstance(error, urllib.error.URLError) else 'the connection breaks off'} ({words})"


def trust() -> str:
    """All clients trust the bundle that the user names, by whichever of the usual variables; else certifi's. Returns
    the bundle, "" where the system's directory is named.

    Raises LauncherError where that is no file.
    """
    for name in BUNDLES:
        if bundle := os.environ.get(name):
            if not os.path.exists(bundle):
                raise LauncherError("certificate", f"{name}={bundle}: no such file", f"unset {name}, or correct it")
            os.environ["SSL_CERT_FILE"] = bundle
            return bundle
    if os.environ.get("SSL_CERT_DIR"):
        return ""
    import certifi  # huggingface_hub's client brings it

    return os.environ.setdefault("SSL_CERT_FILE", certifi.where())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A token goes on to the server that it was meant for, and to no other; to nothing but web servers anyway."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read all that comes with the redirect, however much that is
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(req.full_url)[:2] == _server(newurl) and req.has_header("Authorization"):
            request.add_unredirected_header("Authorization", req.get_header("Authorization"))
        return request


def _server(url: str) -> tuple[str, str]:
    """Scheme and name of a web server. Raises ValueError for an address of another kind."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("another kind of address")
    return parts[:2]


def _open(url: str, token: str, start: int = 0, match: str = "") -> http.client.HTTPResponse:
    """The answer at `url`, from byte `start` on. Raises what urllib raises."""
    _server(url)
    # Identity: nobody knows what a compressed answer inflates to.
    headers = {"User-Agent": "titan-launcher", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if match:
        headers["If-Match"] = f'"{match}"'
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    answer: http.client.HTTPResponse = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    return answer


def read(url: str, most: int, refused: Refused, token: str = "") -> tuple[bytes, str]:
    """What is at `url`, of which one byte more than `most` shows that it is too long; and the address of the next
    page.
    """

    def once() -> tuple[bytes, str]:
        with _open(url, token) as answer:
            data = answer.read(most + 1)
            if len(data) <= most and answer.length:
                raise http.client.IncompleteRead(data, answer.length)
            found = re.search(r'<([^<>]*)>;\s*rel="next"', answer.headers.get("Link") or "")
            return data, urljoin(url, found[1]) if found else ""

    return with_retries(once, url, refused, CONTACT_ATTEMPTS)


def bounded(pages: Iterable[Sequence[Result]], server: str, refused: Refused, fix: str) -> Iterator[Result]:
    """The entries of a listing, page by page, as long as there are not too many."""
    asked, until = 0, time.monotonic() + LISTING_S
    for page in pages:
        asked += 1 + len(page)
        if asked > ENTRIES:
            raise LauncherError(
                "server-answer", f"{server}: the server's listing has more than {ENTRIES:,} entries", fix
            )
        if time.monotonic() > until:
            raise refused(TooSlow(f"no whole listing in {LISTING_S:.0f} s"))
        yield from page


def ask(url: str, most: int, refused: Refused, token: str = "") -> tuple[Any, str]:
    """The JSON at `url`, None where there is none or more than `most` bytes of it; and the address of the next page."""
    data, following = read(url, most, refused, token)
    try:
        return parse_json(data) if len(data) <= most else None, following
    except ValueError:
        return None, following


def download(
    url: str | Callable[[], str], stream: Incoming, refused: Refused, token: str = "", match: str = ""
) -> None:
    """Appends what is at `url` to `stream`, from `stream.start` on; after a cut it goes on from there, where the server
    can. An address that expires is made anew for each attempt. `match`: the ETag that it must have.
    """
    address = url if callable(url) else lambda: url

    def once() -> None:
        if stream.tell() >= stream.limit:  # more came than was announced
            stream.restart()
        with _open(address(), token, stream.tell() - stream.start, match) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                stream.restart()
            while piece := answer.read1(PIECE):
                stream.write(piece)
        if answer.length:  # where the server does not say it, the checksum tells
            raise WrongLength(f"the connection ended after {stream.tell():,} of {stream.limit:,} bytes")

    with_retries(once, address(), refused, ATTEMPTS, stream)


def refused_by_server(url: str) -> Refused:
    """For a file by its address: what its server or the network refuses, and what to do about it."""

    def refused(error: Exception) -> LauncherError:
        status = status_of(error)
        if not status:
            return LauncherError(
                "no-connection",
                f"{url}: {no_answer(error)}",
                "check the network and HTTPS_PROXY, then the same command",
                status=ExitStatus.ERROR,
            )
        fix = "check the address; every image of a release has its .json beside it"
        if status in (401, 403):
            fix = "the server asks for a login: download it with its own tools, then stage the file"
        elif status >= 500:
            fix = "the same command later tries again"
        return LauncherError("http-refused", f"{url}: HTTP {status}", fix, status=ExitStatus.NOT_FOUND)

    return refused
