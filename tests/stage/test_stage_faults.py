"""Servers and networks that misbehave, against the real client: what arrives is right, or nothing arrives."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace

import pytest

from launcher.base.errors import LauncherError
from launcher.stage import fetch, web
from launcher.stage import hub as hub_module
from launcher.stage.inventory import verify
from tests.conftest import Launch, forked
from tests.stage import faults
from tests.stage.hub_server import Content, Fault, Handler, Hub
from tests.stage.test_stage_c4 import stage_c4, staged, train

FILE = train(0)[0]


OVERCOME: dict[str, tuple[list[Fault], list[str]]] = {  # what comes, and from where on the file is asked for each time
    "5xx": ([faults.status(500), faults.status(503)], ["", "", ""]),
    "no time": ([faults.status(503, Retry_After="-1")], ["", ""]),
    "cut twice": ([faults.cut(1500), faults.cut(1000)], ["", "bytes=1500-", "bytes=2500-"]),
    "cut at once": ([faults.cut(0)], ["", ""]),
    "slow": ([faults.slow(0.01, 2000)], [""]),
    "wrong": ([faults.wrong], ["", ""]),
    "longer": ([faults.longer], ["", ""]),
    "range ignored": ([faults.cut(1500), faults.whole], ["", "bytes=1500-"]),
    "wrong rest": ([faults.cut(1500), faults.wrong], ["", "bytes=1500-", ""]),
}


@pytest.mark.parametrize("what", OVERCOME)
def test_what_may_pass_is_overcome(what: str, hub: Hub, tmp_path: Path, c4_files):
    answers, ranges = OVERCOME[what]
    hub.faults[FILE] = list(answers)
    hub.faults["README.md"] = [faults.wrong]  # whose checksum is git's
    stage_c4(tmp_path / "c4", files=1)
    assert (tmp_path / "c4" / FILE).read_bytes() == c4_files[FILE]
    assert [request.range for request in hub.asked(FILE, "cdn")] == ranges and len(hub.asked("README.md")) == 2
    assert not verify(tmp_path / "c4", deep=True).problems


def cut_from_the_start(handler: Handler, content: Content, _start: int) -> None:
    faults.cut(1500)(handler, content, 0)


STAYS = {
    "few bytes": (faults.slow(0.1, 10), "less than 1 kB/s for"),
    "headers": (faults.drips(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), "less than 1 kB/s for"),
    "hints": (faults.drips(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), "HTTP 103"),
    "a refusal": (faults.drips(b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n", b"x"), "has no dataset"),
    "a chunk": (faults.drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x"), "less than 1 kB/s"),
    "always from the start": (cut_from_the_start, "the connection ended after 1,500"),
    "an address of another kind": (faults.moved("ftp://host/x"), "address that cannot be used"),
    "in a circle": (faults.moved(""), "HTTP 302"),
    "503": (faults.status(503), "HTTP 503"),
    "wait for hours": (faults.status(429, Retry_After="7200"), "too many requests"),
    "wrong bytes": (faults.wrong, "wrong bytes twice"),
}


@pytest.mark.parametrize("what", STAYS)
def test_what_stays_is_given_up_and_nothing_of_it_kept(
    what: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(web, "SLOW_S", 0.5)
    monkeypatch.setattr(web, "ATTEMPTS", 2)
    fault, words = STAYS[what]
    hub.faults[FILE] = [fault] * 20
    with pytest.raises(LauncherError, match=words) as caught:
        stage_c4(tmp_path / "c4", files=1)
    assert caught.value.fix and len(hub.asked(FILE, "cdn")) <= (5 if "circle" in what else 2)
    assert FILE not in staged(tmp_path / "c4") and not list((tmp_path / "c4/.staged/partial").iterdir())


def test_a_busy_server_is_waited_for_as_long_as_it_asks(hub: Hub, tmp_path: Path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    hub.api_faults = [faults.status(429, Retry_After="7"), faults.status(503)]
    hub.faults[FILE] = [faults.status(503, Retry_After="30")]
    assert stage_c4(tmp_path / "c4", files=1).downloaded == 2
    assert waits == [7, 0.02, 30]


def test_no_hub_at_all(launch: Launch, hub: Hub, workplace: Path):
    done = launch("stage", "c4", "--to", "c4", "--files", "1", HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and "unset HF_HUB_OFFLINE" in done.stderr
    hub.close()
    for address in (hub.endpoint, "nothing", "ftp://hub", "http://hub:port", "http://[bad"):
        done = launch("stage", "c4", "--to", "c4", "--files", "1", HF_ENDPOINT=address)
        assert done.returncode == 1 and "HF_ENDPOINT" in done.stderr


# ------------------------------------------------------------------------------------- killed, interrupted, two at once


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_killed_call_keeps_what_is_complete(hub: Hub, workplace: Path, how: signal.Signals):
    """At once, although the server stalls; and what was cut is brought again."""
    target, event = workplace / "c4", threading.Event()
    first, second = train(0, 1)
    files = {name: os.urandom(12 << 20) for name in (first, second)}  # more than one piece
    hub.add("dataset", "allenai/c4", {"README.md": b"words", **files})
    hub.faults[second] = [faults.cut(11 << 20, event)]
    process = forked("stage", "c4", "--to", "c4", "--files", "2")
    partial = target / ".staged/partial"
    wait_for(lambda: staged(target) == ["README.md", first])
    wait_for(lambda: any(path.stat().st_size >= 11 << 20 for path in partial.iterdir()))
    os.kill(process.pid, how)
    done = process.end()
    event.set()
    assert done.returncode == (130 if how == signal.SIGINT else -how), done.stderr
    assert "Traceback" not in done.stderr
    assert staged(target) == ["README.md", first]

    hub.requests.clear()
    outcome = stage_c4(target, files=2)
    assert outcome.present == 2 and outcome.downloaded == 1
    assert not hub.asked(first) and len(hub.asked(second, "cdn")) == 1
    assert (target / second).read_bytes() == files[second]
    assert not verify(target, deep=True).problems and not list(partial.iterdir())


def test_two_at_once_take_turns(hub: Hub, tmp_path: Path, monkeypatch):
    event, said = threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        event.set()

    monkeypatch.setattr(fetch, "say", say)
    hub.faults[FILE] = [faults.cut(1000, event)]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(stage_c4, tmp_path / "c4", files=1)
        wait_for(lambda: hub.asked(FILE, "cdn"))
        assert stage_c4(tmp_path / "c4", files=2).present == 2 and first.result().downloaded == 2
    assert said == [f"waiting: another launcher is staging into {tmp_path}/c4"]
    assert not verify(tmp_path / "c4", deep=True).problems


def test_files_are_downloaded_at_the_same_time(hub: Hub, tmp_path: Path):
    """All are under way before any has ended: otherwise the barrier breaks."""
    barrier = threading.Barrier(3, timeout=5)

    def together(_handler: Handler, _content: Content, _start: int) -> bool:
        barrier.wait()
        return False

    for name in train(0, 1, 2):
        hub.faults[name] = [together]
    assert stage_c4(tmp_path / "c4", files=3, jobs=3).downloaded == 4
    assert not barrier.broken


def test_files_of_xet_come_by_xet_or_else_by_https(hub: Hub, tmp_path: Path, c4_files, monkeypatch):
    """Xet's own servers are replaced at the library's border: by its function that talks to them. What reports of the
    bytes is the library's own.
    """
    from huggingface_hub import file_download
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    monkeypatch.setattr(file_download, "is_xet_available", lambda: True)  # whatever a variable said at the import
    monkeypatch.setattr(hub_module, "ENDPOINT", hub.endpoint)  # of no other Hub: nothing bounds what Xet's client does
    monkeypatch.setattr(web, "SLOW_S", 0.3)
    monkeypatch.setattr(web, "LEAST_BYTES_PER_S", 100)
    for name in train(0, 1, 2):
        hub.content("allenai/c4", name).announced = {"xetHash": "f" * 64}
    taken = []

    def xet_get(*, incomplete_path: Path, xet_file_data, headers, expected_size: int, _tqdm_bar: object) -> None:
        taken.append(incomplete_path)
        if len(taken) == 2:
            incomplete_path.write_bytes(b"half")
            raise RuntimeError("the chunk server is not to be reached")
        if len(taken) == 3:
            time.sleep(60)
        reporter = XetDownloadProgressReporter(
            reconstruction_desc="", total=expected_size, log_level=40, external_reconstruction_bar=_tqdm_bar
        )
        for tenth in range(1, 6):  # it lasts longer than nothing may come for
            time.sleep(0.1)
            counts = {"total_bytes_completed": 0, "total_transfer_bytes_completed": 1000 * tenth, "total_bytes": 5000}
            rates = {"total_bytes_completion_rate": None, "total_transfer_bytes_completion_rate": 1.0}
            reporter.update_progress(SimpleNamespace(**counts, **rates))
        incomplete_path.write_bytes(next(data for data in c4_files.values() if len(data) == expected_size))

    monkeypatch.setattr(file_download, "xet_get", xet_get)
    stage_c4(tmp_path / "c4", files=2, jobs=1)
    assert len(taken) == 2
    assert [len(hub.asked(name, "cdn")) for name in train(0, 1)] == [0, 1]
    assert not verify(tmp_path / "c4", deep=True).problems
    assert staged(tmp_path / "c4") == ["README.md", *train(0, 1)]
    with pytest.raises(LauncherError, match="from Xet") as caught:
        stage_c4(tmp_path / "c4", files=3, jobs=1)
    assert "HF_HUB_DISABLE_XET" in caught.value.fix
    assert not list((tmp_path / "c4/.staged/partial").iterdir())


def test_the_library_takes_what_we_hand_to_xet():
    from huggingface_hub import file_download

    asked = {"incomplete_path", "xet_file_data", "headers", "expected_size", "_tqdm_bar"}
    assert asked <= inspect.signature(file_download.xet_get).parameters.keys()


def test_the_working_files_of_xet_are_not_in_the_home(hub: Hub, monkeypatch):
    for name in ("HF_HOME", "HF_XET_CACHE"):
        monkeypatch.setenv(name, "")  # back to what it was at the end
    hub_module.pin("allenai/c4", "dataset", None, "")
    folder = Path(os.environ["HF_XET_CACHE"])
    assert folder.is_relative_to(gettempdir()) and folder.stat().st_mode & 0o777 == 0o700
