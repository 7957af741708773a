"""Reading an image: from its sidecar, from inside, from what foreign images give away; and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.image import inspect as module
from launcher.image.inspect import inspect, problems
from launcher.image.squashfs_file import SUPERBLOCK, ImageFacts, follow, sidecar_path, superblock
from tests.image.converter import needs_tools, program

pytestmark = needs_tools
ABOUT = {
    "schema": 1,
    "channel": "stable",
    "arch": "arm64",
    "driver_min": "580",
    "sm": ["sm_100"],
    "versions": {"torch": "2.14.1", "cuda": "13.0", "torchtitan": "0.3.0"},
}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a squashfs of the given files: bytes, text, or a Path for the target of a link."""

    def build(files: dict[str, bytes | str | Path], *options: str) -> Path:
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, value in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(value, Path):
                path.symlink_to(value)
            else:
                path.write_bytes(value if isinstance(value, bytes) else value.encode())
        target = tmp_path / "titan.sqsh"
        words = ["mksquashfs", str(root), str(target), "-noappend", "-quiet", "-no-progress", *options]
        subprocess.run(words, check=True, capture_output=True)
        return target

    return build


def sidecar(path: Path, **changes: Any) -> None:
    squashfs = superblock(path).recorded() | changes.pop("squashfs", {})
    sidecar_path(path).write_text(json.dumps(ABOUT | {"squashfs": squashfs} | changes))


# --- the three sources ---------------------------------------------------------------------------------------------


def test_sidecar_answers_without_looking_inside(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make({"bin/sh": program()})
    sidecar(image)
    monkeypatch.setattr(module, "Tree", None)
    assert inspect(image) == ImageFacts(
        str(image),
        "aarch64",
        "sidecar",
        "gzip",
        4096,
        "stable",
        {"torch": "2.14.1", "cuda": "13.0", "torchtitan": "0.3.0"},
        "580",
        ("sm_100",),
    )


NOT_BELIEVED: list[dict[str, Any] | bytes] = [
    {"squashfs": {"bytes": 8192}},
    {"squashfs": {"entries": 99}},
    {"squashfs": {"compressor": "zstd"}},
    {"squashfs": {"block_kib": 64}},
    {"squashfs": {"mkfs_time": 0}},  # two builds of one image may agree in all else
    {"schema": 2},
    {"arch": None},
    *({"versions": wrong} for wrong in ({}, [1], {"torch": 2})),
    *(b"", b"{", b"[]", b"null", b"\xff", json.dumps(ABOUT | {"squashfs": None}).encode()),
]


def test_sidecar_of_another_file_is_not_believed(make: Make) -> None:
    image = make({"bin/sh": program()})
    for changes in NOT_BELIEVED:
        if isinstance(changes, bytes):
            sidecar_path(image).write_bytes(changes)
        else:
            sidecar(image, **changes)
        assert inspect(image).source == "guessed", changes


def test_metadata_in_the_image(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make({"etc/titan-image.json": json.dumps(ABOUT)}, "-comp", "zstd")
    monkeypatch.chdir(image.parent)
    dash = image.rename("-dash.sqsh")
    facts = inspect(dash)
    assert (facts.source, facts.arch, facts.channel, facts.driver_min) == ("image", "aarch64", "stable", "580")
    assert module.embedded_metadata(dash) == ABOUT


def test_metadata_that_is_no_metadata(make: Make) -> None:
    for text in ("{}", "nonsense", json.dumps(ABOUT | {"schema": 7})):
        assert inspect(make({"etc/titan-image.json": text, "bin/sh": program()})).source == "guessed"


FOREIGN: dict[str, bytes | str | Path] = {
    "usr/bin/busybox": program(183),
    "usr/bin/sh": Path("/usr/bin/busybox"),
    "bin": Path("usr/bin"),
    "opt/venv/lib/python3.12/site-packages/torch-2.14.1+cu130.dist-info/METADATA": "",
    "opt/venv/lib/python3.12/site-packages/torch/version.py": (
        "from typing import Optional\n__version__ = '2'\ncuda: Optional[str] = '13.0'\nhip = None\n"
    ),
    "opt/venv/lib/python3.12/site-packages/torchtitan-0.3.0.dist-info/METADATA": "",
    "opt/venv/lib/python3.12/site-packages/pytorch_triton-3.4.0+git1.dist-info/METADATA": "",
    "opt/venv/lib/python3.12/site-packages/nvidia_nccl_cu13-2.27.7.dist-info/METADATA": "",
    "opt/venv/lib/python3.12/site-packages/nvidia_cuda_runtime-13.0.96.dist-info/METADATA": "",
    "opt/venv/lib/python3.12/site-packages/a\nb -> c.py": "",
}


def test_foreign_image(make: Make) -> None:
    facts = inspect(make(FOREIGN, "-comp", "zstd"))
    assert (facts.source, facts.arch, facts.driver_min, facts.notes) == ("guessed", "aarch64", "580", ())
    assert facts.versions == {
        "torch": "2.14.1+cu130",
        "torchtitan": "0.3.0",
        "triton": "3.4.0+git1",
        "nccl": "2.27.7",
        "cuda": "13.0",
        "python": "3.12",
    }


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda = '12.8'", "12.8"),
        ('cuda = "12.6.77"', "12.6"),
        ("# nothing", "13.0"),
    ],
)
def test_torch_itself_says_whether_it_has_cuda(make: Make, line: str, cuda: str | None) -> None:
    """In a folder whose name is no pattern for unsquashfs."""
    files = {name.replace("opt/venv", "opt/[v]e*v"): value for name, value in FOREIGN.items()}
    version = next(name for name in files if name.endswith("version.py"))
    assert inspect(make({**files, version: f"{line}\n"})).versions["cuda"] == cuda


@pytest.mark.parametrize(
    ("files", "arch"),
    [
        ({"bin/sh": "#!script", "usr/bin/env": program(62)}, "x86_64"),
        ({"usr/local/bin/python3": Path("../lib/python"), "usr/local/lib/python": program(183)}, "aarch64"),
        ({"bin/sh": program(4711)}, "ELF machine 4711"),
        ({"bin/sh": b"\x7fELF\x02\x02" + bytes(12) + b"\x00\xb7"}, "aarch64"),  # big-endian
        ({"bin/sh": b"\x7fELF"}, ""),
        ({"bin/sh": Path("/nowhere")}, ""),
        ({"data": "x"}, ""),
    ],
)
def test_architecture_from_programs(make: Make, files: dict[str, bytes | str | Path], arch: str) -> None:
    facts = inspect(make(files))
    assert facts.arch == arch
    assert bool(facts.notes) == (arch == "")


def test_several_torches_and_a_checked_out_torchtitan(make: Make) -> None:
    files: dict[str, bytes | str | Path] = {
        "a/lib/python3.10/site-packages/torch-2.9.0.dist-info/METADATA": "",
        "b/lib/python3.12/dist-packages/torch-2.14.1.dist-info/METADATA": "",
        "b/lib/python3.12/dist-packages/triton-3.4.0.dist-info/METADATA": "",
        "workspace/torchtitan/torchtitan/train.py": "",
        "bin/sh": program(),
    }
    facts = inspect(make(files))
    assert facts.versions == {"torch": "2.14.1", "triton": "3.4.0", "torchtitan": "unknown", "python": "3.12"}
    assert facts.notes == (
        "torch is installed more than once; /b/lib/python3.12/dist-packages was read, not "
        "/a/lib/python3.10/site-packages",
        "torchtitan is not installed, but its source is there: /workspace/torchtitan/torchtitan/train.py",
    )


@pytest.mark.parametrize(
    ("version", "words"), [(None, "unsquashfs: No such file"), ("4.4", "version 4.4; 4.5 is needed"), ("none", "4.5")]
)
def test_nothing_to_look_inside_with(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    image = make(FOREIGN)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if version:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "unsquashfs").write_text(f"#!/bin/sh\necho 'unsquashfs version {version}'\n")
        (tmp_path / "bin" / "unsquashfs").chmod(0o755)
    with pytest.raises(LauncherError, match=words) as error:
        inspect(image)
    assert "squashfs-tools" in error.value.fix
    facts = inspect(image, required=False)
    assert (facts.source, facts.arch) == ("superblock", "")
    assert problems(facts, "x86_64", "cuda", "580") == []


# --- what is refused -----------------------------------------------------------------------------------------------


def test_truncated(make: Make) -> None:
    image = make({"bin/sh": os.urandom(50_000)})
    for keep in (25_000, 95, 50, 4):
        os.truncate(image, keep)
        with pytest.raises(LauncherError, match="cut off"):
            inspect(image)


def test_what_is_no_squashfs(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name, data in (("empty", b""), ("zip", b"PK\x03\x04"), ("other", b"sqsh" + bytes(200))):
        (tmp_path / name).write_bytes(data)
    for name, words in {
        "empty": "empty",
        "zip": "not a squashfs",
        "other": "not a squashfs",
        "pipe": "not a file",
        ".": "not a file",
        "no": "No such file",
        "pipe/x": "Not a directory",
        "n" * 300: "too long",
        "/dev/zero": "not a file",
    }.items():
        with pytest.raises(LauncherError, match=words):
            inspect(tmp_path / name)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.sqsh").write_bytes(b"hsqs")
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError(13, "Permission denied")))  # not for root
    with pytest.raises(LauncherError, match="Permission denied") as error:
        superblock(tmp_path / "x.sqsh")
    assert error.value.status is ExitStatus.FILESYSTEM


# Field of SUPERBLOCK, by its number -> what stands in none: inodes, block size, compressor, log of the block size,
# number of ids, version (two), bytes used, ids, inodes, directories.
SENSELESS = {
    **{1: [0], 3: [4095, 65536], 5: [0, 7], 6: [30], 9: [3], 10: [1]},
    **{12: [2**62, 10], 13: [2**60], 15: [0, 2**60], 16: [1]},
}


def test_a_superblock_without_sense(make: Make) -> None:
    image = make({"bin/sh": program()})
    whole = image.read_bytes()
    for field, values in SENSELESS.items():
        for value in values:
            fields = list(SUPERBLOCK.unpack_from(whole))
            fields[field] = value
            image.write_bytes(SUPERBLOCK.pack(*fields) + whole[SUPERBLOCK.size :])
            with pytest.raises(LauncherError):
                superblock(image)
                pytest.fail(f"field {field} may be {value}")


def test_a_damaged_image_is_an_error_or_facts(make: Make) -> None:
    """Never a traceback and never for ever, whichever bytes a bad copy has changed."""
    image = make(FOREIGN, "-comp", "zstd")
    whole, draw = image.read_bytes(), random.Random(7)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(96, len(whole))] = draw.randrange(256)
        image.write_bytes(data)
        try:
            assert isinstance(inspect(image), ImageFacts)
        except LauncherError as error:
            assert error.what


# --- small parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "links", "real"),
    [
        ("bin/sh", {}, "bin/sh"),
        ("bin/sh", {"bin": "usr/bin", "usr/bin/sh": "dash"}, "usr/bin/dash"),
        ("bin/sh", {"bin/sh": "/opt/x"}, "opt/x"),
        ("a/b", {"a": "../../c/./d/.."}, "c/b"),
        ("a", {"a": "/"}, ""),
        ("a", {"a": "a"}, None),
        ("a", {"a": "b", "b": "/a/a"}, None),
        ("a", {"a": "b/b", "b": "a/a"}, None),
    ],
)
def test_follow(path: str, links: dict[str, str], real: str | None) -> None:
    assert follow(path, links) == real
