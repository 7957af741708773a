"""What a reader found who tried to break the launcher."""

import json
import os
import subprocess
import sys

import pytest

from launcher.base.files import write_json
from launcher.base.secret import looks_secret
from launcher.base.values import parse_json
from launcher.runs.directory import remove_left_over
from launcher.stage.manifest import parse_manifest
from launcher.stage.target import safe_path


def test_a_directory_of_another_program_is_not_removed(tmp_path):
    theirs = tmp_path / ".thesis.0.tmp"
    theirs.mkdir()
    (theirs / "chapter.txt").write_text("mine")
    os.utime(theirs, (1, 1))
    remove_left_over(tmp_path)
    assert (theirs / "chapter.txt").exists()


@pytest.mark.parametrize("path", [".", "./"])
def test_a_path_without_parts_is_refused(path):
    assert safe_path(path) is False


def test_a_manifest_with_a_dot_is_damaged():
    entry = {"bytes": 0, "sha256": "0" * 64, "mtime_ns": 0}
    value = {"schema": 1, "kind": "c4", "source": "s", "revision": "r", "files": {".": entry}, "made_by": "x"}
    assert parse_manifest(json.dumps(value).encode()) is None


def test_half_a_character_in_a_record_can_be_written(tmp_path):
    write_json(tmp_path / "x.json", parse_json(b'{"a": "\\ud800"}'))


def test_a_device_in_a_file_s_place_is_not_read_for_ever(tmp_path):
    (tmp_path / "e").symlink_to("/dev/zero")
    script = "import sys; from pathlib import Path; from launcher.stage.manifest import RemoteFile, check_bytes; "
    script += "check_bytes(Path(sys.argv[1]), RemoteFile('e', 0))"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "e")], timeout=60)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HUB_AUTHORIZATION", "Bearer abcdefgh"),
        ("NVIDIA_NOTE", "sk-proj-abcDEF123_456-abcdefghijklmnop"),
        ("NVIDIA_NOTE", "sk-ant-api03-abcdefghijklmnopqrstuvwx"),
        ("NVIDIA_API_TOKENS", "abcdefgh,ijklmnop"),
        ("NCCL_PROXY", "https://user:pa/ss@host/"),
    ],
)
def test_secrets_of_other_forms(name, value):
    assert looks_secret(name, value)
