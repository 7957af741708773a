"""Reading an image: from its sidecar, from inside, from what foreign images give away; and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.image import inspect as module
from launcher.image.inspect import inspect, problems
from launcher.image.squashfs_file import ImageFacts, elf_machine, follow, read_sidecar, sidecar_path, superblock

needs_mksquashfs = pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")
ABOUT = {
    "schema": 1,
    "channel": "stable",
    "arch": "arm64",
    "driver_min": "580",
    "sm": ["sm_100"],
    "versions": {"torch": "2.14.1", "cuda": "13.0", "torchtitan": "0.3.0"},
}
Make = Callable[..., Path]


def elf(machine: int = 62) -> bytes:
    """62 is x86-64, 183 is AArch64."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + machine.to_bytes(2, "little") + bytes(44)


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


def without_unsquashfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)


def sidecar(path: Path, **changes: Any) -> None:
    block = superblock(path)
    recorded = {
        "bytes": block.file_size,
        "entries": block.inodes,
        "compressor": block.compressor,
        "block_kib": block.block_size // 1024,
    }
    squashfs = recorded | changes.pop("squashfs", {})
    path.with_name(path.name + ".json").write_text(json.dumps(ABOUT | {"squashfs": squashfs} | changes))


# --- the three sources ---------------------------------------------------------------------------------------------


@needs_mksquashfs
def test_sidecar_answers_without_looking_inside(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make({"bin/sh": elf()})
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


@needs_mksquashfs
@pytest.mark.parametrize(
    "changes",
    [
        {"squashfs": {"bytes": 8192}},
        {"squashfs": {"entries": 99}},
        {"squashfs": {"compressor": "zstd"}},
        {"squashfs": {"block_kib": 64}},
        {"squashfs": None},
        {"schema": 2},
        {"versions": {}},
        {"versions": [1]},
        {"versions": {"torch": 2}},
        {"arch": None},
    ],
)
def test_sidecar_of_another_file_is_not_believed(make: Make, changes: dict[str, Any]) -> None:
    image = make({"bin/sh": elf()})
    if changes.get("squashfs", 1) is None:
        image.with_name("titan.sqsh.json").write_text(json.dumps(ABOUT | changes))
    else:
        sidecar(image, **changes)
    assert inspect(image).source == "guessed"


@needs_mksquashfs
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_sidecar_that_is_no_json(make: Make, text: str) -> None:
    image = make({"bin/sh": elf()})
    image.with_name("titan.sqsh.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert inspect(image).source == "guessed"


@needs_mksquashfs
def test_metadata_in_the_image(make: Make) -> None:
    image = make({"etc/titan-image.json": json.dumps(ABOUT)}, "-comp", "zstd")
    facts = inspect(image)
    assert (facts.source, facts.arch, facts.channel, facts.driver_min) == (
        "image",
        "aarch64",
        "stable",
        "580",
    )
    assert module.embedded_metadata(image) == ABOUT


@needs_mksquashfs
def test_metadata_that_is_no_metadata(make: Make) -> None:
    for text in ("{}", "nonsense", json.dumps(ABOUT | {"schema": 7})):
        assert inspect(make({"etc/titan-image.json": text, "bin/sh": elf()})).source == "guessed"


FOREIGN: dict[str, bytes | str | Path] = {
    "usr/bin/busybox": elf(183),
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


@needs_mksquashfs
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


@needs_mksquashfs
def test_a_name_is_no_pattern(make: Make) -> None:
    files = {name.replace("opt/venv", "opt/[v]e*v"): value for name, value in FOREIGN.items()}
    version = next(name for name in files if name.endswith("version.py"))
    assert inspect(make({**files, version: "cuda = '12.6'\n"})).versions["cuda"] == "12.6"


@needs_mksquashfs
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
    version = next(name for name in FOREIGN if name.endswith("version.py"))
    assert inspect(make({**FOREIGN, version: f"{line}\n"})).versions["cuda"] == cuda


@needs_mksquashfs
@pytest.mark.parametrize(
    ("files", "arch"),
    [
        ({"bin/sh": "#!script", "usr/bin/env": elf(62)}, "x86_64"),
        ({"usr/local/bin/python3": Path("../lib/python"), "usr/local/lib/python": elf(183)}, "aarch64"),
        ({"bin/sh": elf(4711)}, "ELF machine 4711"),
        ({"bin/sh": Path("/nowhere")}, ""),
        ({"data": "x"}, ""),
    ],
)
def test_architecture_from_programs(make: Make, files: dict[str, bytes | str | Path], arch: str) -> None:
    facts = inspect(make(files))
    assert facts.arch == arch
    assert bool(facts.notes) == (arch == "")


@needs_mksquashfs
def test_several_torches_and_a_checked_out_torchtitan(make: Make) -> None:
    files: dict[str, bytes | str | Path] = {
        "a/lib/python3.10/site-packages/torch-2.9.0.dist-info/METADATA": "",
        "b/lib/python3.12/dist-packages/torch-2.14.1.dist-info/METADATA": "",
        "b/lib/python3.12/dist-packages/triton-3.4.0.dist-info/METADATA": "",
        "workspace/torchtitan/torchtitan/train.py": "",
        "bin/sh": elf(),
    }
    facts = inspect(make(files))
    assert facts.versions == {"torch": "2.14.1", "triton": "3.4.0", "torchtitan": "unknown", "python": "3.12"}
    assert facts.notes == (
        "torch is there more than once; /b/lib/python3.12/dist-packages was read, not /a/lib/python3.10/site-packages",
        "torchtitan is not installed, but its source is there: /workspace/torchtitan/torchtitan/train.py",
    )


@needs_mksquashfs
@pytest.mark.parametrize(
    "options",
    [
        ("-comp", "gzip"),
        ("-comp", "lzo"),
        ("-comp", "lz4"),
        ("-comp", "xz"),
        ("-comp", "zstd", "-noI"),
        ("-comp", "zstd", "-noD"),
    ],
)
def test_compressions(make: Make, options: tuple[str, ...]) -> None:
    assert inspect(make(FOREIGN, *options)).versions["torchtitan"] == "0.3.0"


@needs_mksquashfs
def test_nothing_to_look_inside_with(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(FOREIGN)
    without_unsquashfs(monkeypatch)
    with pytest.raises(LauncherError, match="unsquashfs: no such program") as error:
        inspect(image)
    assert "squashfs-tools" in error.value.fix
    facts = inspect(image, required=False)
    assert (facts.source, facts.arch) == ("superblock", "")
    assert problems(facts, "x86_64", "cuda", "580") == []


@needs_mksquashfs
def test_an_unsquashfs_that_is_too_old_is_not_used(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "unsquashfs"
    old.write_text("#!/bin/sh\necho 'unsquashfs version 4.4 (2019/08/29)'\n")
    old.chmod(0o755)
    image = make(FOREIGN)
    monkeypatch.setattr("shutil.which", lambda name: str(old))
    assert inspect(image, required=False).source == "superblock"


# --- what is refused -----------------------------------------------------------------------------------------------


@needs_mksquashfs
def test_truncated_by_half(make: Make) -> None:
    image = make({"bin/sh": os.urandom(50_000)})
    size = image.stat().st_size
    for keep in (size // 2, 95, 50, 4):
        os.truncate(image, keep)
        with pytest.raises(LauncherError, match="cut off"):
            inspect(image)


def test_files_that_are_no_squashfs(tmp_path: Path) -> None:
    image = tmp_path / "x.sqsh"
    for data, words in (
        (b"", "empty"),
        (b"PK\x03\x04", "not a squashfs"),
        (b"sqsh" + bytes(200), "not a squashfs"),
    ):
        image.write_bytes(data)
        with pytest.raises(LauncherError, match=words):
            inspect(image)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "not a file"),
        (tmp_path, "not a file"),
        (tmp_path / "no", "No such file"),
        (tmp_path / "pipe" / "x", "Not a directory"),
        (tmp_path / ("n" * 300), "too long"),
        (Path("/dev/zero"), "not a file"),
    ):
        with pytest.raises(LauncherError, match=words):
            inspect(path)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "x.sqsh"
    image.write_bytes(b"hsqs")
    image.chmod(0)
    if os.geteuid() == 0:  # may read everything

        def refuse(*arguments: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(LauncherError, match="Permission denied") as error:
        superblock(image)
    assert error.value.status is ExitStatus.FILESYSTEM


@needs_mksquashfs
@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (4, "<I", 0),
        (12, "<I", 4095),
        (12, "<I", 65536),
        (20, "<H", 0),
        (20, "<H", 7),
        (22, "<H", 30),
        (28, "<H", 3),
        (30, "<H", 1),
        (40, "<Q", 2**62),
        (40, "<Q", 10),
        (48, "<Q", 2**60),
        (64, "<Q", 0),
        (64, "<Q", 2**60),
        (72, "<Q", 1),
    ],
)
def test_a_superblock_without_sense(make: Make, offset: int, form: str, value: int) -> None:
    image = make({"bin/sh": elf()})
    data = bytearray(image.read_bytes())
    struct.pack_into(form, data, offset, value)
    image.write_bytes(data)
    with pytest.raises(LauncherError):
        superblock(image)


@needs_mksquashfs
def test_a_damaged_image_is_an_error_or_facts(make: Make) -> None:
    """Never a traceback and never for ever, whichever bytes a bad copy has changed."""
    image = make(FOREIGN, "-comp", "zstd")
    whole, draw = image.read_bytes(), random.Random(7)
    used = superblock(image).bytes_used
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(96, used)] = draw.randrange(256)
        image.write_bytes(data)
        try:
            assert isinstance(inspect(image), ImageFacts)
        except LauncherError as error:
            assert error.what


# --- what would fail on the nodes ----------------------------------------------------------------------------------

GOOD = ImageFacts(
    "x.sqsh",
    "aarch64",
    "sidecar",
    "zstd",
    1,
    "stable",
    {"torch": "2.14.1", "cuda": "13.0", "torchtitan": "0.3.0"},
    "580",
)


@pytest.mark.parametrize(
    ("changes", "arch", "device", "driver", "words"),
    [
        ({}, "aarch64", "cuda", "580.95.05", []),
        ({}, "aarch64", "cuda", "", []),
        ({}, "aarch64", "cuda", "590.1", []),
        ({}, "", "cuda", "", []),
        ({"arch": ""}, "x86_64", "cuda", "", []),
        ({}, "x86_64", "cuda", "", ["the image is for aarch64, the GPU profile for x86_64"]),
        ({}, "aarch64", "cuda", "570.172.08", ["needs driver 580, the nodes have 570.172.08"]),
        ({"driver_min": "580.65.06"}, "aarch64", "cuda", "580.9", ["needs driver 580.65.06"]),
        ({}, "aarch64", "cpu", "570", []),
        ({"driver_min": None}, "aarch64", "cuda", "470", []),
        (
            {"versions": {"torch": "2.13.0+cpu", "cuda": None, "torchtitan": "1"}},
            "aarch64",
            "cuda",
            "",
            ["without CUDA"],
        ),
        ({"versions": {"torch": "2.13.0+cpu", "cuda": None, "torchtitan": "1"}}, "aarch64", "cpu", "", []),
        ({"versions": {"torch": "2.13.0", "torchtitan": "unknown"}}, "aarch64", "cuda", "", []),
        ({"versions": {"torch": "2.14.1", "cuda": "13.0"}}, "aarch64", "cuda", "", ["no torchtitan in"]),
        ({"versions": {}}, "x86_64", "cuda", "", ["the GPU profile for x86_64", "no torch and no torchtitan in"]),
    ],
)
def test_problems(changes: dict[str, Any], arch: str, device: str, driver: str, words: list[str]) -> None:
    found = problems(replace(GOOD, **changes), arch, device, driver)
    assert len(found) == len(words)
    for (what, fix), expected in zip(found, words, strict=True):
        assert expected in what
        assert fix


def test_wrong_architecture_names_the_build() -> None:
    assert "--arch amd64" in problems(GOOD, "x86_64", "cuda", "")[0][1]


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


def test_elf_machine() -> None:
    assert elf_machine(elf(62)) == "x86_64"
    assert elf_machine(b"\x7fELF\x02\x02" + bytes(12) + b"\x00\xb7") == "aarch64"
    assert elf_machine(b"#!/bin/sh") == ""
    assert elf_machine(b"\x7fELF") == ""


@needs_mksquashfs
def test_a_name_that_begins_with_a_dash(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make({"bin/sh": elf(), "etc/titan-image.json": json.dumps(ABOUT)})
    path = path.rename(path.with_name("-dash.sqsh"))
    monkeypatch.chdir(path.parent)
    assert inspect(Path("./-dash.sqsh")).source == "image"


@pytest.mark.parametrize(("recorded", "taken"), [({}, True), ({"mkfs_time": 0}, True), ({"mkfs_time": 1}, False)])
def test_a_sidecar_of_a_build_at_another_time_is_not_believed(
    image: Path, recorded: dict[str, int], taken: bool
) -> None:
    about = json.loads(sidecar_path(image).read_text())
    about["squashfs"] |= recorded
    sidecar_path(image).write_text(json.dumps(about))
    assert (read_sidecar(image, superblock(image)) is not None) == taken
