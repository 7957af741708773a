"""`stage image` from a file: what arrives, what is refused, and what is left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import read_sidecar, sidecar_path, superblock
from launcher.stage.image import stage_image
from launcher.stage.inventory import check_images
from tests.stage.stage_image import SIZE, expected, image_bytes, mode, needs_tools, said, source

__all__ = ["said", "source"]  # fixtures


def test_a_file_gets_the_name_of_its_checksum_and_is_readable_for_the_group(source, tmp_path, said: list[str]) -> None:
    old = os.umask(0o077)
    try:
        path = stage_image(str(source), tmp_path / "images", say=said.append)
    finally:
        os.umask(old)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(sidecar_path(source).read_text())
    assert (mode(path), mode(sidecar_path(path))) == (0o644, 0o644)
    assert said[-1] == f"launcher submit --image {path}"
    assert list((tmp_path / "images" / ".staged" / "partial").iterdir()) == []


def test_a_later_call_does_what_is_left(source: Path, tmp_path: Path, said: list[str]) -> None:
    def again(of: Path = source) -> Path:
        return stage_image(str(of), tmp_path / "images", say=said.append)

    path = again()
    before = path.stat()
    assert again() == path and any(line.startswith(f"{path}: already there") for line in said)
    assert again(path) == path, "what is staged can be staged: its name does not grow"
    sidecar_path(path).unlink()  # killed between the two renames
    assert again() == path and sidecar_path(path).exists()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    os.truncate(path, 1000)
    assert again().read_bytes() == image_bytes()


@needs_tools
@pytest.mark.parametrize("describes_itself", [True, False])
def test_an_image_without_its_sidecar_is_keyed_by_what_was_read(describes_itself: bool, tmp_path, said) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    if describes_itself:
        about = {"schema": 1, "arch": "amd64", "versions": {"torch": "2.14.1"}}
        (tmp_path / "root/etc/titan-image.json").write_text(json.dumps(about))
    source = tmp_path / "found here.sqsh"
    command = ["mksquashfs", str(tmp_path / "root"), str(source), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert path == tmp_path / "images" / f"{digest[:12]}-found-here.sqsh"
    assert (read_sidecar(path, superblock(path)) is not None) == describes_itself
    assert stage_image(str(source), tmp_path / "images", say=said.append) == path


@needs_tools
def test_without_its_sidecar_a_damaged_image_is_found_by_looking_inside(source, tmp_path, said: list[str]) -> None:
    sidecar_path(source).unlink()
    with pytest.raises(LauncherError, match="damaged"):
        stage_image(str(source), tmp_path / "images", say=said.append)


def describe_another(source: Path) -> None:
    about = json.loads(sidecar_path(source).read_text())
    about["squashfs"]["bytes"] += 4096
    sidecar_path(source).write_text(json.dumps(about))


BAD = {
    "cut off": lambda source: os.truncate(source, SIZE // 2),
    "wrong bytes": lambda source: source.write_bytes(image_bytes(1)),
    "does not describe": describe_another,
    "not a squashfs file": lambda source: source.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "no such file": lambda source: source.unlink(),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_source_leaves_nothing(words: str, source: Path, tmp_path: Path, said: list[str]) -> None:
    BAD[words](source)
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(str(source), tmp_path / "images", say=said.append)
    assert caught.value.fix and not list((tmp_path / "images").rglob("*.sqsh*"))


def test_two_stagers_at_once_copy_once(source: Path, tmp_path: Path) -> None:
    lines: list[list[str]] = [[], [], []]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda line: stage_image(str(source), tmp_path / "images", say=line.append), lines))
    verified = [line for said in lines for line in said if line.endswith("verified")]
    assert len(verified) == 1
    assert expected(tmp_path / "images").read_bytes() == image_bytes()


@pytest.mark.parametrize("size", ["7", None, -1])
def test_a_description_of_nonsense_is_one_problem(size: object, source: Path, tmp_path: Path) -> None:
    path = stage_image(str(source), tmp_path / "images", say=print)
    about = json.loads(sidecar_path(path).read_text())
    about["squashfs"]["bytes"] = size
    sidecar_path(path).write_text(json.dumps(about))
    (problem,) = check_images(tmp_path / "images", False).problems
    assert "describes another image" in problem.what
