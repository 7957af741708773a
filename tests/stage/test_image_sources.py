"""`stage image` from the web."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import sidecar_path
from launcher.stage import web
from launcher.stage.image import stage_image
from tests.conftest import ROOT, Launch
from tests.stage.stage_image import CALL, expected, image_bytes, said, source

__all__ = ["said", "source"]  # fixtures


# ---------------------------------------------------------------------------------------------------------- the web


@dataclass
class Site:
    """A web server with one image and its description, and what is wrong with it."""

    data: bytes
    about: bytes
    url: str = ""
    cut_after: int = 0  # bytes of an answer, before the connection ends
    cuts: int = 0  # how often
    ranges: bool = True
    refuse: list[int] = field(default_factory=list)  # status codes of the next answers
    refuse_images: bool = False
    stall: bool = False  # after cut_after bytes, for ever
    asked: list[str] = field(default_factory=list)  # "path range" of every request
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def site(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(web, "BACKOFF_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site(source.read_bytes(), sidecar_path(source).read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            site.asked.append(f"{self.path} {wanted}".strip())
            if self.path == "/moved/" + source.name:  # as a release's assets are
                self.send_response(302)
                self.send_header("Location", f"/{source.name}")
                self.end_headers()
                return
            if site.refuse or (site.refuse_images and self.path.endswith(".sqsh")):
                self.send_error(site.refuse.pop(0) if site.refuse else 500)
                return
            data = {f"/{source.name}": site.data, f"/{source.name}.json": site.about}.get(
                self.path.replace("/moved", "")
            )
            if data is None:
                self.send_error(404)
                return
            offset = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            self.send_response(206 if offset else 200)
            self.send_header("Content-Length", str(len(data) - offset))
            self.end_headers()
            part = data[offset:]
            if len(part) > site.cut_after and (site.cuts or site.stall):
                site.cuts -= 1
                self.wfile.write(part[: site.cut_after])
                self.wfile.flush()
                if site.stall:
                    site.released.wait()
                self.close_connection = True
                return
            self.wfile.write(part)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/{source.name}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield site
    site.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_release_comes_with_its_description(site: Site, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(site.url.replace("/titan", "/moved/titan"), tmp_path / "images", say=said.append)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(site.about)
    # There already: only the description is asked for.
    count = len(site.asked)
    stage_image(site.url, tmp_path / "images", say=said.append)
    assert [asked.rsplit(".", 1)[-1] for asked in site.asked[count:]] == ["json"]


def test_a_cut_connection_is_continued_where_it_ended(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.cut_after, site.cuts = 1_200_000, 2
    path = stage_image(site.url, tmp_path / "images", say=said.append)
    assert path.read_bytes() == image_bytes()
    assert [asked.split()[1] for asked in site.asked if " " in asked] == ["bytes=1200000-", "bytes=2400000-"]


def test_a_server_without_ranges_sends_it_all_again(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.cut_after, site.cuts, site.ranges = 2_000_000, 1, False
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_busy_answers_are_tried_again(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.refuse = [503, 429]
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_a_server_that_never_answers_well_is_given_up(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.refuse_images = True
    with pytest.raises(LauncherError, match="HTTP 500"):
        stage_image(site.url, tmp_path / "images", say=said.append)
    assert len(site.asked) == 1 + web.ATTEMPTS and not expected(tmp_path / "images").exists()
    site.refuse_images = False
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_kill_9_leaves_nothing_under_the_final_name(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.cut_after, site.stall = 1_500_000, True
    images = tmp_path / "images"
    process = subprocess.Popen([sys.executable, "-c", CALL, site.url, str(images)], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not [p for p in images.rglob("partial/*") if p.stat().st_size >= 1 << 20]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in images.iterdir()) == [".staged"]
    site.stall = False
    assert stage_image(site.url, images, say=said.append).read_bytes() == image_bytes()
    assert not list((images / ".staged" / "partial").iterdir())


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other bytes", "wrong bytes"),
        ("no description", "HTTP 404"),
        ("no checksum", "has no sha256"),
        ("a page", "not a JSON object"),
    ],
)
def test_what_the_description_does_not_prove_is_not_kept(
    what: str, words: str, site: Site, tmp_path: Path, said: list[str]
) -> None:
    url = site.url
    if what == "other bytes":
        site.data = site.data[:-1] + b"!"
    elif what == "no description":
        url = url.replace("stable", "nightly")
    else:
        site.about = b"<html>sign in</html>" if what == "a page" else b'{"schema": 1, "squashfs": {}}'
    with pytest.raises(LauncherError, match=words):
        stage_image(url, tmp_path / "images", say=said.append)
    assert not list(tmp_path.glob("images/**/*.sqsh*"))


@pytest.mark.parametrize("address", ["https://me:secret@host/titan.sqsh", "https://host/titan.sqsh?sig=secret"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(address: str, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError) as caught:
        stage_image(address, tmp_path / "images", say=said.append)
    assert "secret" not in f"{caught.value.what} {caught.value.fix} {said}"


def test_nobody_answers(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BACKOFF_S", 0.01)
    with pytest.raises(LauncherError, match="Connection refused"):
        stage_image("http://127.0.0.1:9/titan.sqsh", tmp_path / "images", say=said.append)


# ------------------------------------------------------------------------------------------------------- the engine


def test_an_image_of_the_engine_is_converted_first(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError, match="no such file") as caught:
        stage_image("titan:stable-arm64", tmp_path, say=said.append)
    assert "launcher image convert titan:stable-arm64" in caught.value.fix and not list(tmp_path.iterdir())


def test_the_command_prints_the_path_that_jobs_refer_to(launch: Launch, source: Path, tmp_path: Path) -> None:
    done = launch("stage", "image", str(source), "--to", str(tmp_path / "images"))
    assert done.returncode == 0 and done.stdout == f"{expected(tmp_path / 'images')}\n", done.stderr
    again = launch("stage", "image", str(source), "--to", str(tmp_path / "images"), "--json")
    assert json.loads(again.stdout)["path"] == done.stdout.strip()
    assert f"launcher submit --image {done.stdout.strip()}" in again.stderr
