"""Directories that others may write to, too: nothing is followed out of them, and nothing but our own is deleted."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from launcher.stage import models
from launcher.stage.fetch import fetch
from launcher.stage.image import stage_image
from launcher.stage.inventory import verify
from launcher.stage.target import at_work
from tests.conftest import Launch
from tests.stage.conftest import GOOD_TOKEN
from tests.stage.hub_server import Hub
from tests.stage.stage_image import source
from tests.stage.test_stage_c4 import stage_c4, staged, train

assert source  # the fixture
FILE = train(0)[0]
MODEL, WEIGHTS = "meta-llama/Llama-3.1-8B", "model-00001-of-00002.safetensors"


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """All that is in a folder, with contents and modes."""
    return {
        str(path.relative_to(folder)): (path.read_text() if path.is_file() else "", path.stat().st_mode)
        for path in (folder, *sorted(folder.rglob("*")))
    }


@pytest.fixture
def victim(workplace: Path) -> Path:
    """Somebody's work, which a link leads to."""
    folder = workplace / "victim"
    (folder / "partial").mkdir(parents=True)
    for path in (folder / "thesis", folder / "partial" / "thesis"):
        path.write_text("years of work")
        path.chmod(0o600)
    return folder


def put(what: str, path: Path, to: Path) -> None:
    """What lies in the way at a path: a link, a second name of somebody's file, a pipe, a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(to),
        "hard link": lambda: os.link(to, path),
        "pipe": lambda: os.mkfifo(path),
        "file": lambda: path.write_text("mine"),
    }
    makers[what]()


REFUSED = {  # where, what lies there, where it leads to, and the words about it
    "the whole of our part": (".staged", "link", "", ".staged is a link"),
    "unfinished files": (".staged/partial", "link", "", "partial is a link"),
    "a file for them": (".staged/partial", "file", "", ".staged/partial is a file, not a directory"),
    "lock": (".staged/lock", "link", "thesis", "lock: Too many levels"),
    "dangling lock": (".staged/lock", "link", "new", "lock: Too many levels"),
    "lock with a second name": (".staged/lock", "hard link", "thesis", "lock: Too many levels"),
    "lock is a pipe": (".staged/lock", "pipe", "", "lock: Too many levels"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("what", ["c4", "image"])
def test_our_own_part_is_never_a_link(how: str, what: str, launch, hub, source: Path, workplace, victim: Path) -> None:
    path, kind, to, words = REFUSED[how]
    (workplace / "t/en").mkdir(parents=True)
    (workplace / "t/en/c4-train.00000-of-00012.json.gz").write_text("a start")
    put(kind, workplace / "t" / path, victim / to)
    before = snapshot(victim)
    arguments = ("c4", "--files", "1") if what == "c4" else ("image", str(source))
    done = launch("stage", *arguments, "--to", "t", timeout=30)
    said = " ".join(done.stderr.split())
    assert done.returncode in (3, 7) and words in said and "same command" in said and "Traceback" not in said
    assert snapshot(victim) == before


@pytest.mark.parametrize("folder", ["en", "original"])
def test_folders_on_the_way_are_folders(folder: str, launch: Launch, hub: Hub, workplace: Path, victim: Path) -> None:
    kind = ["c4", "--files", "1"] if folder == "en" else ["tokenizer"]
    hub.gated.clear()
    (workplace / "t").mkdir()
    (workplace / "t/tokenizer.json").write_text("{}")
    (workplace / "t" / folder).symlink_to(victim)
    (victim / "c4-train.00000-of-00012.json.gz").write_text("")  # looks like ours, so that the directory is taken
    before = snapshot(victim)
    done = launch("stage", *kind, "--to", "t")
    assert done.returncode == 3 and f"t/{folder} is a link" in done.stderr and f"mv t/{folder}" in done.stderr
    assert snapshot(victim) == before and not {r.where for r in hub.requests} - {"api"}


def test_a_final_file_that_is_a_link(hub: Hub, tmp_path: Path, c4_files: dict[str, bytes]) -> None:
    """With the right content it is kept, as it is only read; with other content the link itself is replaced."""
    right, wrong = train(0, 1)
    for name, data in ((right, c4_files[right]), (wrong, b"mine")):
        (tmp_path / Path(name).name).write_bytes(data)
        (tmp_path / "c4/en").mkdir(parents=True, exist_ok=True)
        (tmp_path / "c4" / name).symlink_to(tmp_path / Path(name).name)
    stage_c4(tmp_path / "c4", files=2)
    assert (tmp_path / "c4" / right).is_symlink() and not (tmp_path / "c4" / wrong).is_symlink()
    assert (tmp_path / Path(wrong).name).read_bytes() == b"mine"
    assert not verify(tmp_path / "c4", deep=True).problems


def test_a_manifest_is_no_link_and_no_pipe(hub: Hub, launch: Launch, workplace: Path) -> None:
    stage_c4(workplace / "c4", files=1)
    manifest = workplace / "c4/.staged/manifest.json"
    manifest.rename(workplace / "elsewhere.json")
    manifest.symlink_to(workplace / "elsewhere.json")
    done = launch("stage", "verify", "c4")
    assert done.returncode == 7 and "manifest.json: Too many levels" in done.stderr
    manifest.unlink()
    os.mkfifo(manifest)
    assert launch("stage", "verify", "c4", timeout=20).returncode == 7


def test_a_link_that_comes_meanwhile_leads_nowhere(hub: Hub, workplace: Path, victim: Path) -> None:
    """While the first file is on its way, our part of the directory is replaced: everything goes where it was
    opened.
    """
    target = workplace / "c4"

    def swap(*_arguments: object) -> bool:
        if not (target / ".staged").is_symlink():
            (target / ".staged").rename(target / "moved")
            (target / ".staged").symlink_to(victim)
        return False

    hub.always = swap
    before = snapshot(victim)
    stage_c4(target, files=2, jobs=1)
    assert snapshot(victim) == before
    assert staged(target)[:3] == ["README.md", *train(0, 1)] and (target / "moved/manifest.json").exists()


def test_what_lies_among_unfinished_files(hub: Hub, source: Path, tmp_path: Path, victim: Path) -> None:
    """Of an earlier call: removed. Links go themselves; folders stay."""
    before = snapshot(victim)
    for target in (tmp_path / "c4", tmp_path / "images"):
        (target / ".staged/partial/thesis").mkdir(parents=True)
        for what in ("link", "hard link", "pipe", "file"):
            put(what, target / ".staged/partial" / what, victim / "thesis")
        (target / ".staged/partial/folder").symlink_to(victim)
    (tmp_path / "c4/en").mkdir()
    (tmp_path / "c4/en/c4-train.00000-of-00012.json.gz").write_text("")
    stage_c4(tmp_path / "c4", files=1)
    assert not verify(tmp_path / "c4", deep=True).problems
    stage_image(str(source), tmp_path / "images", say=print)
    for target in (tmp_path / "c4", tmp_path / "images"):
        assert [path.name for path in (target / ".staged/partial").iterdir()] == ["thesis"]
    assert snapshot(victim) == before


# ----------------------------------------------------------------------------------------------------------- two users


@contextmanager
def as_user(uid: int, umask: int) -> Iterator[None]:
    """One of two users in group 4000."""
    before = os.umask(umask)
    os.setegid(4000)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.umask(before)


def stage_model(target: Path, kind: str) -> Any:
    return fetch(target, *models.plan(kind, target, MODEL), kind, 2)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory of group 4000."""
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "data"
        folder.mkdir()
        os.chown(folder, 4001, 4000)
        folder.chmod(0o2775)
        yield folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_two_users_stage_into_one_directory(hub: Hub, shared: Path, tmp_path: Path, umask: int, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    stage_model(tmp_path / "first", "model")  # what is imported inside is imported: other users may not read it
    with as_user(4001, umask):
        stage_model(shared, "tokenizer")
    theirs, mine = (shared / ".staged/partial" / name for name in ("theirs", "mine"))
    for path, owner in ((theirs, 4001), (mine, 4002)):
        path.write_bytes(b"a start")
        os.chown(path, owner, 4000)
        path.chmod(0o664)
    with as_user(4002, umask):
        assert stage_model(shared, "model").present == 4
    assert not verify(shared, deep=True).problems
    assert (shared / WEIGHTS).stat().st_uid == 4002
    assert theirs.exists() and not mine.exists()
    assert stat.S_IMODE((shared / ".staged/lock").stat().st_mode) == 0o664
    # And the first again.
    (shared / WEIGHTS).unlink()
    with as_user(4001, umask):
        assert stage_model(shared, "model").downloaded == 1
    assert not list((shared / ".staged/partial").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_a_lock_of_another_user_is_waited_for(shared: Path) -> None:
    with as_user(4001, 0o022), at_work(shared, print):
        pass
    said: list[str] = []
    with open(shared / ".staged/lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with as_user(4002, 0o022):

            def free(line: str) -> None:
                said.append(line)
                fcntl.flock(lock, fcntl.LOCK_UN)

            with at_work(shared, free) as work:
                assert work.state.path == shared / ".staged"
    assert "is staging into" in said[0]
