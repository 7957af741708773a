"""`stage image` from the web, and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import sidecar_path
from launcher.stage.image import stage_image
from tests.conftest import Launch
from tests.stage import faults
from tests.stage.hub_server import Content, Hub
from tests.stage.stage_image import expected, image_bytes, said, source, url

__all__ = ["said", "source", "url"]  # fixtures
IMAGE = "/titan-stable-amd64.sqsh"


def test_a_release_comes_with_its_description(
    hub: Hub, url: str, source: Path, tmp_path: Path, said: list[str]
) -> None:
    moved = faults.moved(f"http://localhost:{hub.hub.server_port}{IMAGE}")  # as a release's assets are
    hub.faults[IMAGE] = [moved, faults.cut(1_200_000), moved]
    hub.faults[f"{IMAGE}.json"] = [faults.status(503), faults.status(429)]
    path = stage_image(url, tmp_path / "images", say=said.append)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(sidecar_path(source).read_text())
    # There already: only the description is asked for.
    hub.requests.clear()
    stage_image(url, tmp_path / "images", say=said.append)
    assert [request.path for request in hub.requests] == [f"{IMAGE}.json"]


@pytest.mark.parametrize(
    ("what", "content", "words"),
    [
        ("other bytes", image_bytes()[:-1] + b"!", "wrong bytes"),
        ("no image", b"<html>".ljust(len(image_bytes())), "wrong bytes"),
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


@pytest.mark.parametrize(
    "address", ["me:secret@host/titan.sqsh", "host/titan.sqsh?sig=secret", "[x/a.sqsh", "host:port/a.sqsh"]
)
def test_a_secret_in_the_address_is_refused_and_not_repeated(address: str, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError, match="must be valid") as caught:
        stage_image(f"https://{address}", tmp_path / "images", say=said.append)
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
