"""`stage image` from a file: what arrives, what is refused, and what is left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import read_sidecar, sidecar_path, superblock
from launcher.stage.image import stage_image
from launcher.stage.inventory import check_images
from tests.stage.stage_image import (
    SIZE,
    expected,
    image_bytes,
    mode,
    needs_tools,
    said,
    source,
)

__all__ = ["said", "source"]  # fixtures


# ------------------------------------------------------------------------------------------------------------ files


def test_a_file_gets_the_name_of_its_checksum_and_is_readable_for_the_group(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
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


def test_the_second_call_writes_nothing(source: Path, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    before = path.stat()
    assert stage_image(str(source), tmp_path / "images", say=said.append) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert any(line.startswith(f"{path}: already there") for line in said)
    # What is staged can be staged: its name does not grow.
    assert stage_image(str(path), tmp_path / "images", say=said.append) == path


@needs_tools
@pytest.mark.parametrize("describes_itself", [True, False])
def test_an_image_without_its_sidecar_is_keyed_by_what_was_read(
    describes_itself: bool, tmp_path: Path, said: list[str]
) -> None:
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
def test_without_its_sidecar_a_damaged_image_is_found_by_looking_inside(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    sidecar_path(source).unlink()
    with pytest.raises(LauncherError, match="damaged"):
        stage_image(str(source), tmp_path / "images", say=said.append)


def test_a_damaged_staged_image_is_replaced(source: Path, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    os.truncate(path, 1000)
    assert stage_image(str(source), tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_an_image_whose_description_was_not_written_any_more_gets_it(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    inode = path.stat().st_ino
    sidecar_path(path).unlink()  # killed between the two renames
    stage_image(str(source), tmp_path / "images", say=said.append)
    assert sidecar_path(path).exists() and path.stat().st_ino == inode


def break_it(how: str, source: Path) -> None:
    if how == "truncated":
        os.truncate(source, SIZE // 2)
    elif how == "other bytes":
        data = bytearray(image_bytes())
        data[-1] ^= 1
        source.write_bytes(data)
    elif how == "another image's description":
        about = json.loads(sidecar_path(source).read_text())
        about["squashfs"]["bytes"] += 4096
        sidecar_path(source).write_text(json.dumps(about))
    elif how == "no image":
        source.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        source.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "cut off"),
        ("other bytes", "wrong bytes"),
        ("another image's description", "does not describe"),
        ("no image", "not a squashfs file"),
        ("missing", "no such file"),
    ],
)
def test_a_bad_source_leaves_nothing(how: str, words: str, source: Path, tmp_path: Path, said: list[str]) -> None:
    break_it(how, source)
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(str(source), tmp_path / "images", say=said.append)
    assert caught.value.fix
    assert not [path for path in (tmp_path / "images").rglob("*.sqsh*")]


def test_two_stagers_at_once_copy_once(source: Path, tmp_path: Path) -> None:
    lines: list[list[str]] = [[], [], []]
    threads = [
        threading.Thread(target=stage_image, args=(str(source), tmp_path / "images"), kwargs={"say": line.append})
        for line in lines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
