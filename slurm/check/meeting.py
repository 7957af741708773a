"""The nodes of a job meet at node 0 before torchrun starts: each says what it found, all hear one verdict.

JSON lines over TCP, with plain sockets: a node whose torch or GPU is broken must be able to say so, too. Whatever else
may come from the network, only what the verdict can be made of, or what is a verdict, is taken.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

LONGEST = 8 << 20  # bytes of one message
GOODBYE_S = 5
# Node 0's host is up while the job runs: it refuses connections at once until its container has started. One that says
# nothing at all for so long is behind a firewall, or the route to it is wrong.
SILENT_S = 120
# What the verdict is made of, and what the others hear, by example; a record may lack keys, its lists' items may not.
_PROBLEM = {"name": "", "fix": "", "fault": ""}
_RECORD: dict[str, Any] = {
    **{"host": "", "address": "", "problems": [_PROBLEM | {"what": ""}], "warnings": [{"name": "", "what": ""}]},
    **{"gpu_health": [{}], "speed": [{"gpu": 0, "product_tflops": 0, "copy_gbs": 0}]},
    **{"allreduce_node_gbs": 0, "allreduce_job_gbs": 0, "check_s": 0},
}
_EMPTY = {key: [] if isinstance(like, list) else like for key, like in _RECORD.items()}
_VERDICT: dict[str, Any] = {"ok": True, "unfit": [_PROBLEM | {"why": "", "host": "", "node": 0}]}
_CHOICE = {"chosen": [""], "head": ""}


class Lost(Exception):
    """The other side did not answer, or went away; the message says which and when."""

    def __init__(self, why: str, fix: str = "look at the log of node 0") -> None:
        super().__init__(why)
        self.fix = fix


def fits(value: Any, like: Any) -> bool:
    """Whether a value that came over the network is of this form. NaN is no number here."""
    if isinstance(like, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], like[key]) for key in like)
    if isinstance(like, list):
        return isinstance(value, list) and all(fits(one, like[0]) for one in value)
    if type(like) is int:
        return isinstance(value, (int, float)) and abs(value) < 1e15
    return isinstance(value, type(like))


def port_of(rendezvous_port: int) -> int:
    """The meeting's port. The job script's port for torchrun is 20000 + job id % 10000, so this is 10000 + the same:
    below the range from which Linux takes ports for outgoing connections (32768 and up).
    """
    return rendezvous_port - 10000 if rendezvous_port >= 11024 else rendezvous_port + 10000


class Host:
    """Node 0's side. Who says something that is not of this job is sent away.

    Raises Lost where it cannot listen at the port.
    """

    def __init__(self, port: int, job: str, nodes: int) -> None:
        self.job, self.nodes = job, nodes
        self.guests: dict[int, socket.socket] = {}
        self._said: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        try:
            self._listener = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            why = f"port {port}, at which the nodes meet, cannot be opened: {error.strerror}"
            raise Lost(f"{why}; submit again: the new job uses another port") from error
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                guest = self._listener.accept()[0]
                guest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
                self._readers.append(threading.Thread(target=self._read, args=(guest,), daemon=True))
                self._readers[-1].start()

    def _read(self, guest: socket.socket) -> None:
        """What a node says, a message a line, as (node, message); (node, None) once its connection has ended."""
        node = 0
        refused = (OSError, ValueError, TypeError, KeyError, RecursionError)
        with guest, guest.makefile("rb") as stream, contextlib.suppress(*refused):
            while line := stream.readline(LONGEST):
                message = json.loads(line)
                number = message["node"]
                ours = message["job"] == self.job and isinstance(number, int) and 0 < number < self.nodes
                if not (ours and fits({**_EMPTY, **message["say"]}, _RECORD)):
                    break
                node = number
                self.guests[node] = guest
                self._said.put((node, message["say"]))
        if self.guests.get(node) is guest:
            self._said.put((node, None))

    def gather(
        self,
        limit_s: float,
        hurry: Callable[[Mapping[str, Any]], float | None] = lambda _: None,
        among: Collection[int] = (),
    ) -> dict[int, dict[str, Any]]:
        """One message of each other node, or of those `among` them, by number; fewer where the time is over or a node
        has gone.

        `hurry` may answer with the seconds to wait from now on at most, for what is known after a message.
        """
        deadline = time.monotonic() + limit_s
        heard: dict[int, dict[str, Any]] = {}
        gone: set[int] = set()
        waited = set(among or range(self.nodes)) - {0}
        while waited - heard.keys() - gone:
            try:
                node, message = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if node not in waited:
                continue
            if message is None:
                gone.add(node)
                continue
            heard[node] = message
            gone.discard(node)
            if (seconds := hurry(message)) is not None:
                deadline = min(deadline, time.monotonic() + seconds)
        return heard

    def tell(self, message: Mapping[str, Any], among: Collection[int] = ()) -> None:
        """The same message to every node that has come, or to those `among` them."""
        data = json.dumps(message).encode() + b"\n"
        for guest in [guest for node, guest in list(self.guests.items()) if not among or node in among]:
            with contextlib.suppress(OSError):  # it has gone: the next `gather` says so
                guest.sendall(data)

    def close(self) -> None:
        """Waits a moment for the others to have read what they were told: this node's end may end theirs."""
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the waiting for another guest
        self._listener.close()
        deadline = time.monotonic() + GOODBYE_S
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        for guest in self.guests.values():
            with contextlib.suppress(OSError):
                guest.shutdown(socket.SHUT_RDWR)


class Guest:
    """Another node's side. Raises Lost where node 0 does not answer or goes away, or where `over` says that the nodes
    have met without this one.
    """

    def __init__(
        self, address: str, port: int, job: str, node: int, limit_s: float, over: Callable[[], bool] | None = None
    ) -> None:
        self.job, self.node = job, node
        self._socket = _connection(address, port, limit_s, over)
        self._heard = self._socket.makefile("rb")

    def say(self, what: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps({"job": self.job, "node": self.node, "say": what}).encode() + b"\n")
        except OSError as error:
            raise Lost(f"node 0 went away: {error.strerror or error}") from error

    def hear(self, limit_s: float) -> dict[str, Any]:
        """{"do": "allreduce", "port": N, "nodes": [...]} or {"verdict": {...}}."""
        self._socket.settimeout(limit_s)
        try:
            line = self._heard.readline(LONGEST)
        except OSError as error:
            raise Lost(f"node 0 gave no verdict within {limit_s:.0f} s") from error
        if not line:
            raise Lost("node 0 went away before it gave its verdict")
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            verdict = value["verdict"] if fits(value, {"verdict": {}}) else None
            begins = fits(value, {"port": 0, "nodes": [0]}) and "verdict" not in value and self.node in value["nodes"]
            if begins or fits(verdict, _VERDICT | (_CHOICE if "chosen" in (verdict or ()) else {})):
                return dict(value)
        raise Lost("another program answers at node 0's port; submit again: the new job uses another port")

    def close(self) -> None:
        self._heard.close()
        self._socket.close()


def _connection(address: str, port: int, limit_s: float, over: Callable[[], bool] | None) -> socket.socket:
    """To node 0, whose container may start minutes after this one's."""
    began, pause, silent = time.monotonic(), 0.1, True
    while True:
        try:
            return socket.create_connection((address, port), timeout=10)
        except OSError as error:
            silent = silent and not isinstance(error, ConnectionError)
            took, why = time.monotonic() - began + pause, error.strerror or str(error)
            if over is not None and over():
                raise Lost("the nodes have met without this one", "its log says why it came so late") from error
            if silent and took > min(SILENT_S, limit_s):
                fix = f"a firewall or a wrong route? ip route get {address}; the nodes need TCP among themselves, "
                fix += "ports 10000 to 29999 for the launcher and 32768 to 60999 for NCCL"
                what = f"node 0 at {address}:{port} does not answer or even refuse a connection: {why}"
                raise Lost(what, fix) from error
            if took > limit_s:
                raise Lost(f"node 0 at {address}:{port} did not answer within {limit_s:.0f} s: {why}") from error
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)
