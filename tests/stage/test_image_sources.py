"""`stage image` from the web, and as a command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import sidecar_path
from launcher.stage.image import stage_image
from tests.cluster_fixtures import CLUSTERS, install
from tests.conftest import ROOT, Launch
from tests.stage import faults
from tests.stage.hub_server import Content, Hub
from tests.stage.stage_image import expected, image_bytes, said, source, url

__all__ = ["said", "source", "url"]  # fixtures
IMAGE = "/titan-stable-amd64.sqsh"


def test_a_release_comes_with_its_description(hub: Hub, url: str, source: Path, tmp_path, said: list[str]) -> None:
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


UNPROVED: dict[str, tuple[str, bytes | None, str]] = {  # which file, what it holds, and the words about it
    "other bytes": (IMAGE, image_bytes()[:-1] + b"!", "wrong bytes"),
    "no image": (IMAGE, b"<html>".ljust(len(image_bytes())), "wrong bytes"),
    "no description": (f"{IMAGE}.json", None, "HTTP 404"),
    "no checksum": (f"{IMAGE}.json", b'{"schema": 1, "squashfs": {}}', "has no sha256"),
    "a page": (f"{IMAGE}.json", b"<html>sign in</html>", "has no sha256"),
}


@pytest.mark.parametrize("what", UNPROVED)
def test_what_the_description_does_not_prove_is_not_kept(what: str, hub: Hub, url: str, tmp_path: Path) -> None:
    path, content, words = UNPROVED[what]
    hub.site.pop(path) if content is None else hub.site.update({path: Content(content)})
    with pytest.raises(LauncherError, match=words):
        stage_image(url, tmp_path / "images", say=print)
    assert not list(tmp_path.glob("images/**/*.sqsh*"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://me:secret@host/titan.sqsh", "must be valid"),
        ("https://host/titan.sqsh?sig=secret", "must be valid"),
        ("https://[x/a.sqsh", "must be valid"),
        ("https://host:port/a.sqsh", "must be valid"),
        ("http://127.0.0.1:9/titan.sqsh", "Connection refused"),
    ],
)
def test_an_address_that_gives_nothing(address: str, words: str, hub: Hub, tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(address, tmp_path / "images", say=said.append)
    assert "secret" not in f"{caught.value.what} {caught.value.fix} {said}"


def test_the_command_prints_the_path_that_jobs_refer_to(launch: Launch, source: Path, tmp_path: Path) -> None:
    done = launch("stage", "image", str(source), "--to", str(tmp_path / "images"))
    assert done.returncode == 0 and done.stdout == f"{expected(tmp_path / 'images')}\n", done.stderr
    again = launch("stage", "image", str(source), "--to", str(tmp_path / "images"), "--json")
    assert json.loads(again.stdout)["path"] == done.stdout.strip()
    assert f"launcher submit --image {done.stdout.strip()}" in again.stderr


# ------------------------------------------------------------------------------------------ releases


@pytest.fixture
def release(source: Path, hub: Hub, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Content]:
    """The assets that image.yml's own step makes of an image; parts of 1 MiB stand for those of 1,900."""
    text = (ROOT / ".github/workflows/image.yml").read_text()
    step = text[text.index("- name: Release assets") :]
    script = textwrap.dedent(re.split(r"\n {2}\S", step.partition("run: |\n")[2])[0])
    assert "1900M" in script and "2147483648" in script
    script = script.replace("1900M", "1M").replace("2147483648", "1048576")
    (workplace / "bin").mkdir()
    (workplace / "bin" / "gh").write_text(
        f'#!/bin/sh\n[ "$2" != upload ] || {{ shift 4; cp "$@" {workplace}/assets; }}\n'
    )
    (workplace / "bin" / "gh").chmod(0o755)
    (workplace / "assets").mkdir()
    (workplace / "files").mkdir()
    for path in (source, sidecar_path(source)):
        shutil.copy(path, workplace / "files")
    env = {"CHANNEL": "stable", "VERSION": "v0.1.0", "GITHUB_STEP_SUMMARY": "/dev/null"}
    env["PATH"] = f"{workplace}/bin:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], check=True, cwd=workplace, env=os.environ | env)
    assets = {f"/releases/download/v0.1.0/{p.name}": Content(p.read_bytes()) for p in (workplace / "assets").iterdir()}
    hub.site |= assets
    monkeypatch.setenv("LAUNCHER_RELEASES", f"{hub.endpoint}/releases")
    return assets


def test_a_release_in_parts_is_joined_and_verified(
    hub: Hub, release: dict[str, Content], launch: Launch, fake_slurm: Any, workplace: Path
) -> None:
    parts = sorted(name for name in release if ".part-" in name)
    assert len(parts) == 3 and f"/releases/download/v0.1.0{IMAGE}" not in release
    hub.faults[parts[1]] = [faults.status(503), faults.cut(400_000)]
    hub.site[parts[2]] = dataclasses.replace(release[parts[2]], has_length=False)  # as some proxies answer
    install(CLUSTERS["managed-25.11"], fake_slurm)
    launch("init", "--yes", "--image-dir", "images")
    done = launch("stage", "image", "--release", "v0.1.0", "--json")  # --arch and --to: as init found and saved them
    path = expected(workplace / "images")
    assert done.returncode == 0 and json.loads(done.stdout)["path"] == str(path), done.stderr
    assert path.read_bytes() == image_bytes() and sidecar_path(path).exists()
    hub.requests.clear()
    assert launch("stage", "image", "--release", "v0.1.0").returncode == 0
    assert not any(".part-" in request.path for request in hub.requests), "there already"


@pytest.mark.parametrize(
    ("words", "spoiled", "said"),
    [
        ((), ".sqsh.part-01", "wrong-bytes"),
        ((), ".sqsh.json", "image-description"),
        ((), ".sha256", "release-lacks"),
        (("--arch", "arm64"), "", "release-lacks"),
        (("--release", "../v0.1.0"), "", "http-refused"),
        (("--release", "v9"), "", "http-refused"),
    ],
)
def test_what_a_release_does_not_prove_is_not_kept(
    words: tuple[str, ...],
    spoiled: str,
    said: str,
    hub: Hub,
    release: dict[str, Content],
    launch: Launch,
    tmp_path: Path,
) -> None:
    for name in release if spoiled else ():
        if name.endswith(spoiled):
            hub.site[name] = Content(b"#" * hub.site[name].size)
    done = launch("stage", "image", "--release", "v0.1.0", "--arch", "amd64", "--to", str(tmp_path / "images"), *words)
    assert f"[{said}]" in done.stderr, done.stderr
    assert not list(tmp_path.glob("images/**/*.sqsh*"))


@pytest.mark.parametrize(("place", "words"), [("", "is unknown"), ("https://me:x@host/r", "without user")])
def test_a_launcher_that_knows_no_releases_says_so(place: str, words: str, launch: Launch) -> None:
    done = launch("stage", "image", "--release", "v1", "--arch", "arm64", "--to", "images", LAUNCHER_RELEASES=place)
    assert words in done.stderr and "[releases-unknown]" in done.stderr and "me:x" not in done.stderr
