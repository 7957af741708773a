"""Made-up exports of an image, and the conversion of one in a directory of its own."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image.convert import convert
from launcher.image.export import ImageConfig
from launcher.image.squashfs_tools import SquashfsFormat

needs_tools = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"
)
CREATED = 1_700_000_000
FAST = SquashfsFormat("gzip", 128, 1)
CONFIG = ImageConfig("amd64", "sha256:abc", CREATED)
VERSIONS = {"torch": "2.13.0+cpu", "cuda": None, "torchtitan": "0.3.0"}
ABOUT = {"schema": 1, "channel": "cpu", "arch": "amd64", "versions": VERSIONS}


def program(machine: int = 62) -> bytes:
    """As much of an ELF file as anybody looks at: 62 is x86-64, 183 is AArch64."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + machine.to_bytes(2, "little") + bytes(44)


@dataclass(frozen=True)
class File:
    name: str
    data: bytes = b""
    mode: int = 0o644
    mtime: float = 1000
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    pax: tuple[tuple[str, str], ...] = ()


def folder(name: str, mode: int = 0o755, mtime: float = 1000) -> File:
    return File(name, mode=mode, mtime=mtime, kind=tarfile.DIRTYPE)


DESCRIPTION = File("etc/titan-image.json", json.dumps(ABOUT).encode())


def link(name: str, target: str) -> File:
    return File(name, mode=0o777, kind=tarfile.SYMTYPE, target=target)


def hard_link(name: str, target: str) -> File:
    return File(name, kind=tarfile.LNKTYPE, target=target)


def device(name: str) -> File:
    return File(name, kind=tarfile.CHRTYPE)


SHELL = (folder("bin"), File("bin/sh", program(), 0o755))


def tar_of(*files: File, form: int = tarfile.PAX_FORMAT, shell: bool = True) -> bytes:
    """A stream as an engine exports it; PAX is what Docker writes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for file in (*(SHELL if shell else ()), *files):
            info = tarfile.TarInfo(file.name)
            info.size, info.mode, info.mtime, info.type = len(file.data), file.mode, file.mtime, file.kind
            info.linkname, info.uid, info.gname, info.pax_headers = file.target, 1234, "staff", dict(file.pax)
            tar.addfile(info, io.BytesIO(file.data))
    return out.getvalue()


def chunks(data: bytes, size: int = 10_000) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


class Converter:
    """Converts in a directory of its own and shows what an unpacking node gets."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.output = home / "titan.sqsh"

    def __call__(self, *files: File, config: ImageConfig = CONFIG, **how: Any) -> Path:
        about = {name: how.pop(name) for name in ("form", "shell") if name in how}
        if how.pop("described", True):
            files = (*files, DESCRIPTION)
        return self.feed(chunks(tar_of(*files, **about)), config, **how)

    def feed(self, export: Iterator[bytes], config: ImageConfig = CONFIG, **how: Any) -> Path:
        return convert(export, config, self.output, **({"fmt": FAST} | how))

    def sidecar(self) -> dict[str, Any]:
        value = json.loads((self.home / "titan.sqsh.json").read_text())
        assert isinstance(value, dict)
        return value

    def unpacked(self) -> Path:
        target = self.home / "unpacked"
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(
            ["unsquashfs", "-quiet", "-no-progress", "-d", str(target), str(self.output)],
            check=True,
            capture_output=True,
            umask=0,
        )
        return target

    def refused(self, *files: File, **how: Any) -> LauncherError:
        """The error of a conversion, after which nothing may be left."""
        before = sorted(self.home.iterdir())
        with pytest.raises(LauncherError) as error:
            self(*files, **how)
        assert sorted(self.home.iterdir()) == before
        return error.value


@pytest.fixture
def converter(tmp_path: Path) -> Converter:
    return Converter(tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
