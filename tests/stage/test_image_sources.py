"""`stage image` from the web, and as a command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import sidecar_path
from launcher.stage.image import stage_image
from tests.conftest import ROOT, Launch
from tests.stage import faults
from tests.stage.hub_server import Content, Hub
from tests.stage.stage_image import CALL, expected, image_bytes, said, source, url

__all__ = ["said", "source", "url"]  # fixtures
IMAGE = "/titan-stable-amd64.sqsh"


def test_a_release_comes_with_its_description(
    hub: Hub, url: str, source: Path, tmp_path: Path, said: list[str]
) -> None:
    hub.faults[IMAGE] = [faults.moved(f"http://localhost:{hub.hub.server_port}{IMAGE}")]  # as a release's assets are
    path = stage_image(url, tmp_path / "images", say=said.append)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(sidecar_path(source).read_text())
    # There already: only the description is asked for.
    hub.requests.clear()
    stage_image(url, tmp_path / "images", say=said.append)
    assert [request.path for request in hub.requests] == [f"{IMAGE}.json"]


@pytest.mark.parametrize(
    ("answers", "ranges"),
    [
        ([faults.cut(1_200_000), faults.cut(1_200_000)], ["", "bytes=1200000-", "bytes=2400000-"]),
        ([faults.cut(2_000_000), faults.whole], ["", "bytes=2000000-"]),
        ([faults.status(503), faults.status(500)], ["", "", ""]),
    ],
    ids=["cut", "range-ignored", "busy"],
)
def test_what_may_pass_is_overcome(
    answers: list[Any], ranges: list[str], hub: Hub, url: str, tmp_path: Path, said: list[str]
) -> None:
    hub.faults[IMAGE] = list(answers)
    hub.faults[f"{IMAGE}.json"] = [faults.status(503), faults.status(429)]
    assert stage_image(url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()
    assert [request.range for request in hub.asked(IMAGE)] == ranges


def test_a_server_that_never_answers_well_is_given_up(hub: Hub, url: str, tmp_path: Path, said: list[str]) -> None:
    hub.faults[IMAGE] = [faults.cut(1_000_000), *[faults.status(500)] * 10]
    with pytest.raises(LauncherError, match="HTTP 500"):
        stage_image(url, tmp_path / "images", say=said.append)
    assert not list(tmp_path.glob("images/**/*.sqsh"))


def test_kill_9_leaves_nothing_under_the_final_name(hub: Hub, url: str, tmp_path: Path, said: list[str]) -> None:
    event = threading.Event()
    hub.faults[IMAGE] = [faults.stall(event, 1_500_000)]
    images = tmp_path / "images"
    process = subprocess.Popen([sys.executable, "-c", CALL, url, str(images)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not [p for p in images.rglob("partial/*") if p.stat().st_size >= 1 << 20]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    event.set()
    assert [path.name for path in images.iterdir()] == [".staged"]
    assert stage_image(url, images, say=said.append).read_bytes() == image_bytes()
    assert not list((images / ".staged/partial").iterdir())


@pytest.mark.parametrize(
    ("what", "content", "words"),
    [
        ("other bytes", image_bytes()[:-1] + b"!", "wrong bytes"),
        ("no image", b"<html>".ljust(len(image_bytes())), "not a squashfs file"),
        ("no description", None, "HTTP 404"),
        ("no checksum", b'{"schema": 1, "squashfs": {}}', "has no sha256"),
        ("a page", b"<html>sign in</html>", "has no sha256"),
    ],
)
def test_what_the_description_does_not_prove_is_not_kept(
    what: str, content: bytes | None, words: str, hub: Hub, url: str, tmp_path: Path, said: list[str]
) -> None:
    path = IMAGE if what in ("other bytes", "no image") else f"{IMAGE}.json"
    if content is None:
        del hub.site[path]
    else:
        hub.site[path] = Content(content)
    with pytest.raises(LauncherError, match=words):
        stage_image(url, tmp_path / "images", say=said.append)
    assert not list(tmp_path.glob("images/**/*.sqsh*"))


@pytest.mark.parametrize("address", ["https://me:secret@host/titan.sqsh", "https://host/titan.sqsh?sig=secret"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(address: str, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError) as caught:
        stage_image(address, tmp_path / "images", say=said.append)
    assert "secret" not in f"{caught.value.what} {caught.value.fix} {said}"


def test_nobody_answers(hub: Hub, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError, match="Connection refused"):
        stage_image("http://127.0.0.1:9/titan.sqsh", tmp_path / "images", say=said.append)


def test_the_command_prints_the_path_that_jobs_refer_to(launch: Launch, source: Path, tmp_path: Path) -> None:
    done = launch("stage", "image", str(source), "--to", str(tmp_path / "images"))
    assert done.returncode == 0 and done.stdout == f"{expected(tmp_path / 'images')}\n", done.stderr
    again = launch("stage", "image", str(source), "--to", str(tmp_path / "images"), "--json")
    assert json.loads(again.stdout)["path"] == done.stdout.strip()
    assert f"launcher submit --image {done.stdout.strip()}" in again.stderr
