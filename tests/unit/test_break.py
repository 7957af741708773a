"""What a reader found who tried to break the launcher."""

import json

import pytest

from launcher.base.files import write_json
from launcher.base.values import parse_json
from launcher.stage.manifest import check_bytes, parse_manifest
from launcher.stage.source import RemoteFile
from launcher.stage.target import safe_path


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
    with pytest.raises(OSError, match="not a regular file"):
        check_bytes(tmp_path / "e", RemoteFile("e", 0))
