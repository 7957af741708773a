"""An image to stage, and what is said meanwhile."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from launcher.image.squashfs_file import sidecar_path, superblock
from tests.conftest import squashfs_head
from tests.stage.hub_server import Content, Hub

needs_tools = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"
)
SIZE = 3 << 20


def image_bytes(seed: int = 0) -> bytes:
    return (squashfs_head(SIZE) + random.Random(seed).randbytes(SIZE))[:SIZE]


def description(data: bytes, path: Path) -> dict[str, Any]:
    block = superblock(path)
    facts = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": block.file_size,
        "entries": block.inodes,
        "compressor": block.compressor,
        "block_kib": block.block_size // 1024,
    }
    return {"schema": 1, "arch": "amd64", "versions": {"torch": "2.14.1"}, "squashfs": facts}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An image as `launcher image convert` leaves it: the file and its description."""
    path = tmp_path / "made" / "titan-stable-amd64.sqsh"
    path.parent.mkdir()
    path.write_bytes(image_bytes())
    sidecar_path(path).write_text(json.dumps(description(image_bytes(), path)))
    return path


@pytest.fixture
def url(source: Path, hub: Hub) -> str:
    """The same on a web server, which is the Hub's."""
    for path in (source, sidecar_path(source)):
        hub.site[f"/{path.name}"] = Content(path.read_bytes())
    return f"{hub.endpoint}/{source.name}"


@pytest.fixture
def said() -> list[str]:
    return []


def expected(to: Path) -> Path:
    return to / f"{hashlib.sha256(image_bytes()).hexdigest()[:12]}-titan-stable-amd64.sqsh"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
