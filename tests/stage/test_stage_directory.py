"""The directory that is staged into: full, read-only, somebody else's, damaged, edited; `verify` and `list`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.base.errors import LauncherError
from launcher.stage import hub as hub_module
from launcher.stage import target as target_module
from launcher.stage.inventory import verify
from tests.conftest import Launch
from tests.stage.hub_server import Hub
from tests.stage.test_stage_c4 import stage_c4, train

FILE = train(0)[0]


@pytest.mark.parametrize("name", ["en/notes.txt", ".git/config", "en/c4-train.00000-of-00004.json.gz"])
def test_somebody_elses_data(launch: Launch, hub: Hub, workplace: Path, name: str):
    path = workplace / "c4" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    done = launch("stage", "c4", "--to", "c4", "--files", "1")
    words = f"another C4 ({name}" if "train" in name else "holds other data"
    assert done.returncode == 3 and words in done.stderr
    assert sorted(p for p in (workplace / "c4").rglob("*") if p.is_file()) == [path]


def test_too_small_a_disk_is_refused_before_anything_is_downloaded(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _target: SimpleNamespace(free=target_module.RESERVE + 1000))
    with pytest.raises(LauncherError, match=r"are still needed, 67.1 MB are free"):
        stage_c4(tmp_path / "c4", files=12)
    assert not any(request.where != "api" for request in hub.requests)


def in_small_disk(target: Path, options: str, command: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher where `target` is a file system of its own, seen by that process alone."""
    script = f"mount -t tmpfs -o {options} none '{target}' && {command}"
    enter = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(target)], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    return subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True, timeout=60)


def test_a_disk_that_fills_up_meanwhile(hub: Hub, workplace: Path):
    files = {name: os.urandom(12 << 20) for name in train(0, 1)}
    hub.add("dataset", "allenai/c4", {"README.md": b"words", **files})
    (workplace / "c4").mkdir()
    code = "import launcher.stage.fetch as f; f.check_space = lambda *a: None; from launcher.cli import main; main()"
    command = f"{sys.executable} -c '{code}' stage c4 --to c4 --files 2; echo $?; find c4/en c4/.staged -type f"
    done = in_small_disk(workplace / "c4", "size=14m", command)
    assert "No space left on device" in done.stderr and "free space on it" in done.stderr
    assert "Traceback" not in done.stderr
    status, *left = done.stdout.split()
    assert status == "7" and "c4/.staged/manifest.json" in left


def test_a_read_only_file_system(hub: Hub, workplace: Path):
    (workplace / "c4").mkdir()
    done = in_small_disk(workplace / "c4", "ro", f"{sys.executable} -m launcher stage c4 --to c4 --files 1")
    assert done.returncode == 7 and "Read-only file system" in done.stderr and "--to" in done.stderr


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 300000000\n")


DAMAGES = {
    "a Git LFS pointer": lfs_pointer,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, 500),
    "missing": lambda path: path.unlink(),
    "other bytes": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_repaired(launch: Launch, hub: Hub, workplace: Path, c4_files, damage: str):
    target = workplace / "my c4"
    stage_c4(target, files=3)
    DAMAGES[damage](target / FILE)
    found = launch("stage", "verify", "my c4")
    assert found.returncode == 3 and f"{FILE}: {damage}" in found.stdout and "INCOMPLETE, 1 file\n" in found.stdout
    hub.requests.clear()
    repair = shlex.split(found.stderr.split("repair: launcher ")[1])
    assert launch(*repair).returncode == 0
    assert {r.path for r in hub.requests if r.where == "cdn"} == {FILE}
    assert (target / FILE).read_bytes() == c4_files[FILE]
    assert launch("stage", "verify", "my c4").returncode == 0


def test_size_and_time_are_compared_and_never_ordered(launch: Launch, hub: Hub, workplace: Path):
    """A copy with other times, or a clock that jumps: read, and kept. What they hide is found by --deep."""
    path = workplace / "c4" / FILE
    stage_c4(workplace / "c4", files=1)
    for name in (FILE, "README.md"):
        os.utime(workplace / "c4" / name, (4e9, 4e9))
    assert launch("stage", "verify", "c4").returncode == 0
    assert stage_c4(workplace / "c4", files=1).downloaded == 0
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, (4e9, 4e9))
    assert launch("stage", "verify", "c4").returncode == 0
    assert launch("stage", "verify", "c4", "--deep").returncode == 3


def test_a_clone_whose_large_files_are_pointers(hub: Hub, tmp_path: Path):
    (tmp_path / "c4/en").mkdir(parents=True)
    (tmp_path / "c4/.git").mkdir()
    (tmp_path / "c4/lost+found").mkdir()
    for name in train(0, 1, 2):
        lfs_pointer(tmp_path / "c4" / name)
    assert stage_c4(tmp_path / "c4", files=2).downloaded == 3
    report = verify(tmp_path / "c4", deep=True)
    assert not report.problems and report.unknown == train(2)  # still a pointer


EDITS = {
    "not JSON": lambda text: text[:-20],
    "a checksum": lambda text: text.replace('"sha256": "', '"sha256": "x'),
    "another schema": lambda text: text.replace('"schema": 1', '"schema": 99'),
    "a path that leads outside": lambda text: text.replace("README.md", "../README.md"),
    "a size that is none": lambda text: text.replace('"bytes": ', '"bytes": -'),
    "a list": lambda text: f"[{text}]",
    "nested too deeply": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_nobody_can_trust(launch: Launch, hub: Hub, workplace: Path, edit: str):
    stage_c4(workplace / "c4", files=2)
    path = workplace / "c4/.staged/manifest.json"
    good = json.loads(path.read_text())
    path.write_text(EDITS[edit](path.read_text()))
    found = launch("stage", "verify", "c4")
    assert found.returncode == 3 and "damaged or edited" in found.stderr
    assert "damaged or edited" in launch("stage", "list", "c4").stderr
    hub.requests.clear()
    assert launch("stage", "c4", "--to", "c4", "--files", "2").returncode == 0
    assert not [request for request in hub.requests if request.where == "cdn"]
    assert json.loads(path.read_text()) == good


def test_an_interrupted_directory_says_what_is_missing(launch: Launch, hub: Hub, workplace: Path, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise LauncherError("value", "no")

    monkeypatch.setattr(hub_module.Repo, "download", refuse)
    with pytest.raises(LauncherError):
        stage_c4(workplace / "c4", files=2)
    found = launch("stage", "verify", "c4", "--json")
    report = json.loads(found.stdout)
    assert found.returncode == 3 and not report["complete"]
    assert {row["what"] for row in report["problems"]} == {"not downloaded yet"}
    assert "launcher stage c4 --files 2 --to c4" in launch("stage", "verify", "c4").stderr


def test_what_a_directory_suffices_for(launch: Launch, hub: Hub, workplace: Path):
    stage_c4(workplace / "data/c4", files=12)
    done = launch("stage", "list", "data")
    assert done.returncode == 0 and "complete" in done.stdout
    assert "12 of 12 train files, about 2.05 G tokens: for up to 12 data-parallel ranks" in done.stdout
    assert "; all of them are used by 1, 2, 3, 4, 6, 12\n" in done.stdout
    [row] = json.loads(launch("stage", "list", "data", "--json").stdout)
    assert row["largest_data_parallel_degree"] == 12 and row["complete"]


def test_directories_that_nobody_staged(launch: Launch, hub: Hub, workplace: Path, c4_files):
    (workplace / "c4/en").mkdir(parents=True)
    (workplace / "c4" / FILE).write_bytes(c4_files[FILE])
    found = launch("stage", "verify", "c4")
    assert found.returncode == 4 and "--to c4 (or tokenizer, or model)" in found.stderr
    assert launch("stage", "verify", "nowhere").returncode == 4
    assert "nothing staged in c4" in launch("stage", "list", "c4").stderr
