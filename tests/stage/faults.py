"""How the loopback Hub misbehaves on demand: each answers one request for a file's content in its own wrong way."""

from __future__ import annotations

import threading
import time

from tests.stage.hub_server import Content, Fault, Handler


def status(code: int, **headers: str) -> Fault:
    """Answers with an error: `status(429, Retry_After="1")`."""

    def fault(handler: Handler, _content: Content, _start: int) -> bool:
        handler.answer(code, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def cut(after: int) -> Fault:
    """Announces everything, sends `after` bytes and closes the connection."""

    def fault(handler: Handler, content: Content, start: int) -> bool:
        handler.begin(content, start)
        handler.wfile.write(content.read()[start : start + after])
        handler.close_connection = True
        return True

    return fault


def wrong(handler: Handler, content: Content, start: int) -> bool:
    """As many bytes as announced, but others."""
    handler.begin(content, start)
    handler.wfile.write(bytes(byte ^ 0x55 for byte in content.read()[start:]))
    return True


def whole(handler: Handler, content: Content, _start: int) -> bool:
    """Ignores the range that was asked for: 200 and everything."""
    handler.begin(content, 0)
    handler.wfile.write(content.read())
    return True


def longer(handler: Handler, content: Content, _start: int) -> bool:
    """More bytes than the listing announced."""
    handler.answer(200, content.read() + b"and more", {})
    return True


def slow(seconds: float, piece: int) -> Fault:
    """Sends `piece` bytes, waits, and so on."""

    def fault(handler: Handler, content: Content, start: int) -> bool:
        handler.begin(content, start)
        data = content.read()
        for begin in range(start, len(data), piece):
            handler.wfile.write(data[begin : begin + piece])
            handler.wfile.flush()
            time.sleep(seconds)
        return True

    return fault


def drips(begin: bytes, piece: bytes) -> Fault:
    """`begin`, and then a little of something that has no end, again and again."""

    def fault(handler: Handler, _content: Content, _start: int) -> bool:
        handler.close_connection = True
        handler.wfile.write(begin)
        while not handler.hub.closed:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.1)
        return True

    return fault


def stall(event: threading.Event, after: int) -> Fault:
    """Sends `after` bytes, then nothing until `event` is set; then cuts."""

    def fault(handler: Handler, content: Content, start: int) -> bool:
        handler.begin(content, start)
        handler.wfile.write(content.read()[start : start + after])
        handler.wfile.flush()
        event.wait(60)
        handler.close_connection = True
        return True

    return fault


def answer(body: bytes, **headers: str) -> Fault:
    """Something else, as if it were right."""

    def fault(handler: Handler, _content: Content, _start: int) -> bool:
        handler.answer(200, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def endless(status: int = 200) -> Fault:
    """A MB of spaces again and again, until the client goes away."""

    def fault(handler: Handler, _content: Content, _start: int) -> bool:
        handler.send_response(status)
        handler.send_header("Location", "/elsewhere")
        handler.end_headers()
        handler.close_connection = True
        while not handler.hub.closed:
            handler.wfile.write(b" " * (1 << 20))
        return True

    return fault


def moved(to: str) -> Fault:
    """A redirect; without an address, to itself."""

    def fault(handler: Handler, _content: Content, _start: int) -> bool:
        handler.answer(302, b"", {"Location": to or handler.path})
        return True

    return fault


def passed(_handler: Handler, _content: Content, _start: int) -> bool:
    """Nothing wrong with this one."""
    return False
