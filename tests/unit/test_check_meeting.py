"""The nodes' meeting over real sockets, and the workers as real processes that hang, die or speak."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from slurm.check import meeting, workers
from slurm.check.meeting import Guest, Host, Lost, port_of
from tests.unit.test_submission import wait_for

ROOT = Path(__file__).parent.parent.parent
FIT = {"verdict": {"ok": True, "unfit": []}}
UNFIT = {"node": 1, "host": "gpu1", "name": "ecc", "why": "3 errors", "fix": "reset it", "fault": "node"}


@pytest.fixture(autouse=True)
def short_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "GOODBYE_S", 0.2)


class Meeting:
    """Node 0's host at a free port, and what the other nodes heard of it."""

    def __init__(self, nodes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.nodes, self.heard = nodes, dict[int, Any]()
        self.threads: list[threading.Thread] = []

    def comes(self, node: int, *, job: str = "7") -> None:
        """The node says that it is well, and waits for an answer."""
        self.threads.append(threading.Thread(target=self._meet, args=(node, job), daemon=True))
        self.threads[-1].start()

    def _meet(self, node: int, job: str) -> None:
        guest = Guest("127.0.0.1", self.port, job, node, 30)
        guest.say({"host": f"gpu{node}", "problems": []})
        try:
            heard: Any = guest.hear(30)
        except Lost as lost:
            heard = str(lost)
        if job == "7":
            self.heard[node] = heard
        guest.close()

    def says(self, line: bytes) -> socket.socket:
        """Somebody who is no node."""
        stranger = socket.create_connection(("127.0.0.1", self.port))
        stranger.sendall(line)
        return stranger

    @contextmanager
    def hosted(self) -> Iterator[Host]:
        with closing(Host(self.port, "7", self.nodes)) as host:
            yield host
        for thread in self.threads:
            thread.join(30)


def test_every_node_is_heard_and_told() -> None:
    meeting = Meeting(4)
    for node in (1, 2, 3):
        meeting.comes(node)  # before node 0 listens
    with meeting.hosted() as host:
        assert {node: record["host"] for node, record in host.gather(30).items()} == {1: "gpu1", 2: "gpu2", 3: "gpu3"}
        host.tell({"verdict": {**FIT["verdict"], "more": "x" * 1_000_000}})
        for thread in meeting.threads:
            thread.join(30)
    assert all(len(meeting.heard[node]["verdict"]["more"]) == 1_000_000 for node in (1, 2, 3))


# As a node of another release might say them: their nodes count as some that did not come.
NO_RECORDS: tuple[Any, ...] = (
    *({"problems": "x"}, {"problems": [{"name": "ecc"}]}, {"problems": [3]}, {"warnings": {}}, {"gpu_health": "no"}),
    *({"gpu_health": ["no"]}, {"check_s": "x"}, {"check_s": float("nan")}, {"speed": [{"copy_gbs": 1}]}),
    *({"speed": [{"gpu": 0, "product_tflops": 1, "copy_gbs": "fast"}]}, {"allreduce_node_gbs": []}, {"host": 5}),
    *({"address": None}, 3),
)


def test_strangers_are_sent_away() -> None:
    meeting = Meeting(2)
    said = [
        {"job": "7", "node": 5, "say": {}},
        {"job": "8", "node": 1, "say": {}},
        {"job": "7", "node": True, "say": []},
    ]
    said += [{"job": "7", "node": 1, "say": record} for record in NO_RECORDS]
    lines = [
        b"GET / HTTP/1.0\r\n",
        b"[1]\n",
        b"[" * 99_999 + b"\n",
        *(json.dumps(one).encode() + b"\n" for one in said),
    ]
    with meeting.hosted() as host:
        meeting.says(b"").close()
        for line in lines:
            with meeting.says(line) as stranger, suppress(ConnectionResetError):
                stranger.settimeout(30)
                assert stranger.recv(1) == b"", line[:99]
        assert host.gather(0.1) == {}
        meeting.comes(1)
        assert host.gather(30)[1]["host"] == "gpu1"
        host.tell(FIT)
        meeting.threads[-1].join(30)
    assert meeting.heard == {1: FIT}


def test_who_does_not_come_is_not_waited_for_longer_than_the_limit() -> None:
    meeting = Meeting(3)
    with meeting.hosted() as host:
        meeting.comes(2)
        assert sorted(host.gather(1.0)) == [2]
    assert meeting.heard[2] == "node 0 went away before it gave its verdict"


def test_bad_news_shortens_the_waiting() -> None:
    meeting = Meeting(3)
    with meeting.hosted() as host:
        meeting.comes(2)
        began = time.monotonic()
        assert sorted(host.gather(300, lambda record: 0.1)) == [2]
        assert time.monotonic() - began < 200


def test_a_node_that_goes_away_is_not_waited_for() -> None:
    meeting = Meeting(2)
    with meeting.hosted() as host:
        guest = Guest("127.0.0.1", meeting.port, "7", 1, 30)
        guest.say({})
        assert sorted(host.gather(30)) == [1]
        guest.close()
        began = time.monotonic()
        assert host.gather(300) == {}
        assert time.monotonic() - began < 200


def test_who_comes_when_the_others_are_at_work_hears_the_verdict_alone() -> None:
    """With spares the rest is not waited for: it has no rank in the all-reduce, and its record is no result of it."""
    meeting = Meeting(4)
    with meeting.hosted() as host:
        meeting.comes(1)
        assert sorted(host.gather(300, lambda record: 0.1)) == [1]
        meeting.comes(3)
        wait_for(lambda: 3 in host.guests)
        assert host.gather(0.2, among=[0, 1]) == {}  # node 3 is not asked for
        host.tell({"do": "allreduce", "port": 4711, "nodes": [0, 1]}, [0, 1])
        host.tell(FIT)
        for thread in meeting.threads:
            thread.join(30)
    assert meeting.heard == {1: {"do": "allreduce", "port": 4711, "nodes": [0, 1]}, 3: FIT}


def test_a_node_that_nobody_needs_stops_trying_when_the_others_have_met() -> None:
    answers = iter([False, False, True])
    with pytest.raises(Lost, match="the nodes have met without this one"):
        Guest("127.0.0.1", 1, "7", 1, 900, lambda: next(answers))


def test_node_0_never_answers() -> None:
    with pytest.raises(Lost, match=r"node 0 at 127\.0\.0\.1:1 did not answer within 0 s"):
        Guest("127.0.0.1", 1, "7", 1, 0.3)


NO_VERDICTS: tuple[Any, ...] = (
    *([1], 5, None, {"x": 1}, {"do": "allreduce"}, {"do": "allreduce", "port": "1"}, {"port": 1, "nodes": [0, 2]}),
    *({"port": 1, "nodes": [0, 1], "verdict": 5}, {"verdict": 5}, {"verdict": {}}),
    *({"verdict": {"ok": True, "unfit": wrong}} for wrong in ([3], "no", [{**UNFIT, "why": None}])),
    *({"verdict": {"ok": True, "unfit": [], **wrong}} for wrong in ({"chosen": [3]}, {"chosen": ["a"], "head": 3})),
)


def test_another_program_at_node_0s_port() -> None:
    for line in (b"SSH-2.0-OpenSSH_9.2\r\n", *(json.dumps(one).encode() + b"\n" for one in NO_VERDICTS)):
        with socket.create_server(("127.0.0.1", 0)) as other:
            guest = Guest("127.0.0.1", other.getsockname()[1], "7", 1, 30)
            with other.accept()[0] as connection, closing(guest):
                connection.sendall(line)
                with pytest.raises(Lost, match="another program answers"):
                    guest.hear(30)


class Network:
    """In the place of real connections: what each attempt ends with, and a clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: OSError) -> None:
        self.errors, self.now = list(errors), 0.0
        monkeypatch.setattr(socket, "create_connection", self.connect)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def connect(self, _address: Any, timeout: float) -> socket.socket:
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        self.now += timeout if isinstance(error, TimeoutError) else 0
        raise error

    def sleep(self, seconds: float) -> None:
        self.now += seconds


REFUSED, TIMEOUT = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), TimeoutError("timed out")


@pytest.mark.parametrize(
    "error", [TIMEOUT, OSError(errno.EHOSTUNREACH, "No route to host"), OSError(errno.ENETUNREACH, "x")]
)
def test_a_firewall_is_told_within_minutes(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch, error)
    with pytest.raises(Lost, match=r"node 0 at 10\.0\.0\.1:10007 does not answer or even refuse") as lost:
        Guest("10.0.0.1", 10007, "7", 1, 900)
    assert network.now < 140 and "ip route get 10.0.0.1" in lost.value.fix and "10000 to 29999" in lost.value.fix


@pytest.mark.parametrize("errors", [[REFUSED], [TIMEOUT, REFUSED, TIMEOUT], [REFUSED, TIMEOUT]])
def test_a_node_0_that_has_refused_may_take_its_time(errors: list[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is there: its container is still being unpacked."""
    network = Network(monkeypatch, *errors)
    with pytest.raises(Lost, match="did not answer within 900 s") as lost:
        Guest("10.0.0.1", 10007, "7", 1, 900)
    assert network.now > 880 and lost.value.fix == "look at the log of node 0"


def test_the_meeting_is_at_a_port_that_linux_gives_to_nobody_else() -> None:
    assert {port_of(20000 + job) for job in (0, 9999)} == {10000, 19999}
    assert all(1024 <= port_of(port) < 65536 for port in (1, 1024, 11023, 11024, 65535))


# --- workers ----------------------------------------------------------------------------------------------

FAKE = {
    "answers": "import os\nversion = type('V', (), {'cuda': None})\nprint('noise on standard output')\n"
    "__version__ = 'for ' + os.environ['OMP_NUM_THREADS']\n",
    "dies": "import os, sys\nsys.stderr.write('libcudart.so: broken\\n'); sys.stderr.flush(); os._exit(7)\n",
    "hangs": "import time\ntime.sleep(600)\n",
}


def crew(folder: Path, torch: str, count: int = 2) -> list[workers.Worker]:
    (folder / "torch.py").write_text(FAKE[torch])
    return workers.start(count, "cpu", folder, {**os.environ, "PYTHONPATH": str(folder)})


@pytest.mark.parametrize(
    ("torch", "limit_s", "said"),
    [("dies", 30, "look: the worker ended with 7: libcudart.so: broken"), ("hangs", 0.2, "look: no answer within 0 s")],
)
def test_a_worker_that_dies_or_hangs(tmp_path: Path, torch: str, limit_s: float, said: str) -> None:
    made = crew(tmp_path, torch)
    answers = workers.ask(made, {"do": "look", "gpus": 2}, limit_s)
    workers.stop(made)
    assert [answer["problem"] for answer in answers] == [said] * 2
    assert all(worker.process.poll() is not None for worker in made)


def test_workers_answer_and_end_with_their_input(tmp_path: Path) -> None:
    made = crew(tmp_path, "answers")
    answers = workers.ask(made, {"do": "look", "gpus": 2}, 30)
    assert [answer["torch"] for answer in answers] == ["for 1", "for 1"]
    assert "AttributeError" in workers.ask(made, {"do": "measure"}, 30)[0]["problem"]
    workers.stop(made)
    assert [worker.process.returncode for worker in made] == [0, 0]
    assert not list(tmp_path.glob("check-*"))


def test_workers_never_outlive_who_started_them(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(FAKE["hangs"])
    program = (
        "import os, sys, time; from pathlib import Path; from slurm.check import workers\n"
        "made = workers.start(2, 'cpu', Path(sys.argv[1]), dict(os.environ))\n"
        "print(*(w.process.pid for w in made), flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    time.sleep(1)  # until they have asked the kernel for it
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(running(pid) for pid in pids):
        time.sleep(0.05)
    assert len(pids) == 2 and not [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # whoever adopted it may not have asked for its end
