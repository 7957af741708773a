"""What web servers answer: small answers as bounded JSON, and files, which huggingface_hub's downloader brings.

Of huggingface_hub only `http_get` and `xet_get` are used, which write into a file that we have opened.
`hf_hub_download` takes a path and resolves it, and in a directory that others may write to it may lead elsewhere by the
time it is used. Its client reads listings of any size, also inflated, so the standard library asks for those.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import parse_json, whole
from launcher.stage.target import Incoming, Stopped, TooSlow, WrongLength, gigabytes

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 15.0  # without a byte from the server
ATTEMPTS = 6  # for a file; the downloader itself goes on after cuts
CONTACT_ATTEMPTS = 3  # for a small answer, before anything was downloaded
BACKOFF_S = 1.0  # the first wait; it doubles
LONGEST_RETRY_AFTER_S = 900.0  # a server that asks for more is not waited for
SLOW_S, LEAST_BYTES_PER_S = 120.0, 1000  # a download that brings less for so long is given up
BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")  # variables that name trust
SMALL = 64 << 10  # bytes of a refusal
ANSWER_S = 120.0  # for a small answer, whole
BAD_ADDRESS = (ValueError, http.client.InvalidURL)  # that a server leads to
BAD_ADDRESS_OF_HTTPX = ("UnsupportedProtocol", "InvalidURL")

ONE_AT_A_TIME = threading.Lock()
Result = TypeVar("Result")
Refused = Callable[[Exception], LauncherError]


def with_retries(call: Callable[[], Result], refused: Refused, attempts: int) -> Result:
    """`call()`, again after what may pass: lost connections, 408, 429 and 5xx, waiting as long as the server asks."""
    for attempt in range(attempts):
        try:
            return call()
        except (LauncherError, Stopped):
            raise
        except Exception as error:  # of urllib, http.client, ssl and httpx: no common root
            asked = _retry_after(error)
            if not _may_pass(error) or attempt + 1 == attempts or asked > LONGEST_RETRY_AFTER_S:
                raise refused(error) from error
            time.sleep(max(asked, BACKOFF_S * 2**attempt))
    raise AssertionError


def status_of(error: BaseException) -> int:
    """The HTTP status in an error of urllib's or huggingface_hub's; 0 without one."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "code", 0) or 0)


def header_of(error: BaseException, name: str) -> str:
    headers = getattr(getattr(error, "response", error), "headers", None)
    return str(headers.get(name) or "") if headers is not None else ""


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait; 0 when it does not. A date is taken relative to the answer's own."""
    text = header_of(error, "Retry-After")
    if (seconds := whole(text)) is not None:
        return float(seconds)
    try:
        asked, now = parsedate_to_datetime(text), parsedate_to_datetime(header_of(error, "Date"))
        return max((asked - now).total_seconds(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def distrust(error: BaseException | None) -> str:
    """Why a certificate is not trusted, in OpenSSL's words, wherever in an error of any client that is; else ""."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            found = getattr(error, "certificate_error", error)  # aiohttp's own wraps it
            return getattr(found, "verify_message", "") or "certificate verify failed"
        inner = getattr(error, "reason", None) or getattr(error, "os_error", None)
        error = inner if isinstance(inner, Exception) else error.__cause__ or error.__context__
    return ""


def not_trusted(where: str, why: str) -> LauncherError:
    return LauncherError(
        "certificate",
        f"{where}: the server's certificate is not trusted ({why})",
        "behind a proxy that inspects TLS, name its certificates: export SSL_CERT_FILE=/path/to/ca-bundle.crt",
        status=ExitStatus.ERROR,
    )


def _may_pass(error: Exception) -> bool:
    if distrust(error):
        return False
    if status := status_of(error):
        return status in (408, 416, 429) or status >= 500
    ours = isinstance(error, (OSError, http.client.HTTPException)) or type(error).__module__ == "httpx"
    return ours and not isinstance(error, BAD_ADDRESS) and type(error).__name__ not in BAD_ADDRESS_OF_HTTPX


def no_answer(error: Exception) -> str:
    """What went wrong with a connection, for the middle of a message."""
    if isinstance(error, (TooSlow, WrongLength)):
        return str(error)
    if isinstance(error, BAD_ADDRESS) or type(error).__name__ in BAD_ADDRESS_OF_HTTPX:
        return "the server answers with a number or an address that cannot be used"
    inner: BaseException | None = error
    words = ""
    while inner is not None and not words:  # the system's own words, wherever they are
        reason = getattr(inner, "reason", None)
        inner = reason if isinstance(reason, OSError) else inner
        words = (isinstance(inner, OSError) and inner.strerror) or ""
        inner = inner.__cause__ or inner.__context__
    words = words or str(error) or type(error).__name__
    return f"{'no connection' if isinstance(error, urllib.error.URLError) else 'the connection breaks off'} ({words})"


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


def ask(url: str, most: int, refused: Refused, token: str = "") -> tuple[Any, str]:
    """The JSON at `url`, None where there is none or more than `most` bytes of it; and the answer's Link header."""
    if urlsplit(url).scheme not in ("http", "https"):  # where a listing says that it goes on
        raise refused(ValueError("another kind of address"))
    trust()
    # Identity: nobody knows what a compressed answer inflates to.
    request = urllib.request.Request(url, headers={"User-Agent": "titan-launcher", "Accept-Encoding": "identity"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")

    def once() -> tuple[bytes, str]:
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(most + 1)
            if len(data) <= most and answer.length:
                raise http.client.IncompleteRead(data, answer.length)
            return data, str(answer.headers.get("Link") or "")

    data, link = with_retries(lambda: _within(ANSWER_S, once), refused, CONTACT_ATTEMPTS)
    try:
        return parse_json(data) if len(data) <= most else None, link
    except ValueError:
        return None, link


def _begun(call: Callable[[], Result]) -> Future[Result]:
    """`call()` in a thread that does not keep the process when it is given up."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """`call()`, given up after so long: a socket's own limit begins anew with each byte. Raises TooSlow."""
    done = _begun(call)
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # a connection's own
            raise
        raise TooSlow(f"no whole answer in {seconds:.0f} s") from None


def moving(call: Callable[[], Result], received: Callable[[], int]) -> Result:
    """`call()`, given up when it brings too little for SLOW_S, before its first byte, too. Raises TooSlow.

    `received`: bytes so far.
    """
    done = _begun(call)
    while True:
        before = received()
        try:
            return done.result(SLOW_S)
        except TimeoutError:
            if done.done():
                raise
            if received() - before < SLOW_S * LEAST_BYTES_PER_S:
                raise TooSlow(f"less than {gigabytes(LEAST_BYTES_PER_S)}/s for {SLOW_S:.0f} s") from None


def download(url: str, stream: Incoming, headers: dict[str, str], refused: Refused) -> None:
    """Fills `stream` from `url`."""

    def once() -> None:
        stream.restart()
        try:
            moving(lambda: library().http_get(url, stream, headers=headers), lambda: stream.received)
        except TooSlow as error:  # not again: what was given up may still write, until the file is closed
            raise refused(error) from error
        if stream.tell() < stream.limit:
            raise WrongLength(f"the connection ended after {stream.tell():,} of {stream.limit:,} bytes")

    with_retries(once, refused, ATTEMPTS)


def library() -> Any:
    """huggingface_hub's downloaders, quiet: their warnings quote addresses that carry a signature."""
    with ONE_AT_A_TIME:  # several threads begin at once, and setting a client closes the one before
        return _library()


@functools.cache
def _library() -> Any:
    refuse_offline()
    trust()
    xet_cache()
    from huggingface_hub import constants, file_download, set_client_factory
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    set_client_factory(_client)
    constants.DOWNLOAD_CHUNK_SIZE = None  # what was read is written; it would collect 10 MB
    with contextlib.suppress(ImportError):
        from httpcore._sync.http11 import HTTP11Connection

        HTTP11Connection.READ_NUM_BYTES = 1 << 20  # three times as fast as with its 64 kB
    return file_download


def _client() -> httpx.Client:
    """What huggingface_hub asks with. It reads refusals and redirects whole, and inflates what is compressed: of the
    first there is a beginning, of the second nothing.
    """
    import httpx

    class Beginning(httpx.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            left = SMALL
            for piece in self.stream:
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return

        def close(self) -> None:
            self.stream.close()

    def bound(response: httpx.Response) -> None:
        if not response.is_success or "/xet-read-token/" in response.url.path:
            response.headers.pop("Content-Encoding", None)  # a beginning could inflate without end
            response.stream = Beginning(response.stream)
            if response.status_code in (408, 429):  # the library would wait for as long as the server likes
                raise httpx.HTTPStatusError("later", request=response.request, response=response)
        elif response.headers.get("Content-Encoding", "identity") != "identity":
            raise WrongLength("a compressed answer, which nobody asked for")

    headers = {"Accept-Encoding": "identity"}
    return httpx.Client(headers=headers, follow_redirects=True, event_hooks={"response": [bound]})


@functools.cache
def xet_cache() -> TemporaryDirectory[str] | None:
    """Xet's working files on a disk of this machine, until this process ends: homes are on NFS, and those small files
    are slow there. None where the user has named a place.
    """
    if os.environ.get("HF_XET_CACHE") or os.environ.get("HF_HOME"):
        return None
    folder = TemporaryDirectory(prefix="launcher-xet-")
    os.environ["HF_XET_CACHE"] = folder.name
    return folder


def hub_constants() -> Any:
    """Those of huggingface_hub, which reads the user's HF_* variables while it is imported."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise LauncherError(
            "hub-settings", f"an HF_* variable has no usable value: {error}", "env | grep ^HF_"
        ) from None
    return constants


def refuse_offline() -> None:
    if hub_constants().HF_HUB_OFFLINE:
        raise LauncherError(
            "hub-settings", "HF_HUB_OFFLINE is set: nothing can be downloaded", "unset HF_HUB_OFFLINE, then again"
        )


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


def refused_by_server(url: str) -> Refused:
    """For a file by its address: what its server or the network refuses, and what to do about it."""

    def refused(error: Exception) -> LauncherError:
        status = status_of(error)
        if why := distrust(error):
            return not_trusted(url, why)
        if not status:
            return LauncherError(
                "no-connection",
                f"{url}: {no_answer(error)}",
                "check the network and HTTPS_PROXY, then the same command",
                status=ExitStatus.ERROR,
            )
        if status in (401, 403):
            fix = "the server asks who you are: download it with its own tools, then stage the file"
        elif status == 404 and url.endswith(".sqsh.json"):
            fix = "every image of a release has its .json beside it; check the address"
        else:
            fix = "check the address" if status < 500 else "the same command later tries again"
        return LauncherError("http-refused", f"{url}: HTTP {status}", fix, status=ExitStatus.NOT_FOUND)

    return refused
