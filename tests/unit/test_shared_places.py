"""Places on nodes and login nodes that others can write to: no link is followed, nobody else's folder is used."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.base.files import write_text
from launcher.titan import Refused, caches


def old(path: Path) -> None:
    os.utime(path, (time.time() - 999, time.time() - 999))


def test_a_lock_that_is_a_pipe_or_a_link_holds_nothing_up(tmp_path: Path) -> None:
    for name in ("pipe", "link"):
        folder = tmp_path / f"titan-{os.getuid()}-{name}"
        folder.mkdir(mode=0o700)
        (folder / "thesis").write_text("mine")
    os.mkfifo(tmp_path / f"titan-{os.getuid()}-pipe" / caches.LOCK)
    (tmp_path / f"titan-{os.getuid()}-link" / caches.LOCK).symlink_to(tmp_path / "free")
    (tmp_path / "free").touch()
    for folder in tmp_path.glob("titan-*"):
        old(folder)
    assert caches.scratch_dir({"TITAN_JOB_ID": "7"}, str(tmp_path)).parent == tmp_path
    assert (tmp_path / f"titan-{os.getuid()}-link/thesis").exists()


@pytest.mark.parametrize("how", ["link", "open to all"])
def test_caches_are_never_where_others_can_put_code(tmp_path: Path, how: str) -> None:
    (tmp_path / "theirs").mkdir()
    wanted = tmp_path / f"titan-{os.getuid()}-7"
    if how == "link":
        wanted.symlink_to(tmp_path / "theirs")
    else:
        wanted.mkdir()
        wanted.chmod(0o777)
    assert caches.scratch_dir({"TITAN_JOB_ID": "7"}, str(tmp_path)) != wanted
    with pytest.raises(Refused, match="somebody else's"):
        caches.scratch_dir({"TITAN_SCRATCH": str(wanted)})
    assert not list((tmp_path / "theirs").iterdir())


def test_a_file_is_never_written_through_a_link_of_a_guessed_name(tmp_path: Path) -> None:
    """The name held the process id: another user could put one there that is in the way."""
    (tmp_path / f".page.html.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    try:
        write_text(tmp_path / "page.html", "words")
    except LauncherError as error:
        pytest.fail(error.what)
    assert (tmp_path / "page.html").read_text() == "words" and not (tmp_path / "victim").exists()
