"""How the loopback Hub misbehaves on demand: each answers one request for a file's content in its own wrong way."""

from __future__ import annotations

import threading
import time

from tests.stage.hub_server import Content, Fault, Handler


def answer(body: bytes, code: int = 200, **headers: str) -> Fault:
    """Something else: `answer(b"{}", Content_Encoding="gzip")`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _content, _start: handler.answer(code, body, named)


def status(code: int, **headers: str) -> Fault:
    """An error: `status(429, Retry_After="1")`."""
    return answer(b"", code, **headers)


def moved(to: str) -> Fault:
    """A redirect; without an address, to itself."""
    return lambda handler, _content, _start: handler.answer(302, b"", {"Location": to or handler.path})


def cut(after: int, wait: threading.Event | None = None) -> Fault:
    """Announces everything, sends `after` bytes and closes the connection, with `wait` not before that is set."""

    def fault(handler: Handler, content: Content, start: int) -> None:
        handler.begin(content, start)
        handler.wfile.write(content.read()[start : start + after])
        handler.wfile.flush()
        if wait:
            wait.wait(60)
        handler.close_connection = True

    return fault


def wrong(handler: Handler, content: Content, start: int) -> None:
    """As many bytes as announced, but others."""
    handler.begin(content, start)
    handler.wfile.write(bytes(byte ^ 0x55 for byte in content.read()[start:]))


def whole(handler: Handler, content: Content, _start: int) -> None:
    """Ignores the range that was asked for: 200 and everything."""
    handler.answer(200, content.read(), {})


def longer(handler: Handler, content: Content, _start: int) -> None:
    """More bytes than the listing announced."""
    handler.answer(200, content.read() + b"and more", {})


def slow(seconds: float, piece: int) -> Fault:
    """Sends `piece` bytes, waits, and so on."""

    def fault(handler: Handler, content: Content, start: int) -> None:
        handler.begin(content, start)
        data = content.read()
        for begin in range(start, len(data), piece):
            handler.wfile.write(data[begin : begin + piece])
            handler.wfile.flush()
            time.sleep(seconds)

    return fault


def drips(begin: bytes, piece: bytes, pause_s: float = 0.1) -> Fault:
    """`begin`, and then `piece` again and again, until the client goes away."""

    def fault(handler: Handler, _content: Content, _start: int) -> None:
        handler.close_connection = True
        handler.wfile.write(begin)
        while not handler.hub.closed:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause_s)

    return fault


def endless(status: int = 200) -> Fault:
    """A MB of spaces again and again."""
    return drips(f"HTTP/1.1 {status} Ha\r\nLocation: /elsewhere\r\n\r\n".encode(), b" " * (1 << 20), 0)


def passed(_handler: Handler, _content: Content, _start: int) -> bool:
    """Nothing wrong with this one."""
    return False
