"""The conversion: every kind of entry that an exported image may hold, and every way in which it may break off."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import ExitStatus, LauncherError
from launcher.image import squashfs_file
from launcher.image.convert import FORMATS, convert, convert_with_enroot, image_config
from launcher.image.export import ImageConfig, Report, enroot_files, rewrite
from launcher.image.squashfs_file import SquashfsFormat, superblock
from tests.conftest import ROOT

needs_tools = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"
)
CREATED = 1_700_000_000
FAST = SquashfsFormat("gzip", 128, 1)
CONFIG = ImageConfig("amd64", "sha256:abc", CREATED)
ABOUT = {"schema": 1, "channel": "cpu", "arch": "amd64", "versions": {"torch": "2.13.0+cpu", "cuda": None}}


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
        self.said: list[str] = []

    def __call__(self, *files: File, config: ImageConfig = CONFIG, **how: Any) -> Path:
        about = {name: how.pop(name) for name in ("form", "shell") if name in how}
        if how.pop("described", True):
            files = (*files, DESCRIPTION)
        return self.feed(chunks(tar_of(*files, **about)), config, **how)

    def feed(self, export: Iterator[bytes], config: ImageConfig = CONFIG, **how: Any) -> Path:
        options: dict[str, Any] = {"fmt": FAST, "say": self.said.append}
        return convert(export, config, self.output, **(options | how))

    def sidecar(self) -> dict[str, Any]:
        value = json.loads((self.home / "titan.sqsh.json").read_text())
        assert isinstance(value, dict)
        return value

    def unpacked(self) -> Path:
        target = self.home / "unpacked"
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(
            ["unsquashfs", "-quiet", "-no-progress", "-d", str(target), str(self.output)],
            check=True, capture_output=True, umask=0,
        )  # fmt: skip
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


# --- what is in the result ---------------------------------------------------------------------------------------


@needs_tools
def test_same_image_gives_the_same_bytes_whenever_the_engine_made_the_container(converter: Converter) -> None:
    def export(now: int) -> tuple[File, ...]:
        return (
            File(".dockerenv", mtime=now), folder("dev", mtime=now), device("dev/console"),
            folder("etc", mtime=now), File("etc/hosts", mtime=now), link("etc/mtab", "/proc/mounts"),
            folder("proc", mtime=now), folder("workspace", mtime=now), folder("workspace/runs", mtime=now),
            File("usr/lib/missing/parents/x.py", b"x = 1"),
        )  # fmt: skip

    config = ImageConfig("amd64", created=CREATED, working_dir="/workspace/runs")
    first = sha256(converter(*export(1_800_000_000), config=config))
    tree = converter.unpacked()
    assert superblock(converter.output).mkfs_time == CREATED
    assert {int((tree / p).stat().st_mtime) for p in (".", "etc", "usr/lib", "workspace", "etc/rc")} == {
        CREATED
    }
    assert sha256(converter(*export(1_900_000_000), config=config)) == first


@needs_tools
def test_files_keep_their_time_and_become_roots(converter: Converter) -> None:
    """A .pyc whose source has another time is compiled again at every start, and never saved."""
    converter(
        File("usr/a.py", mtime=1_234_567_890.75), File("usr/old", mtime=-5), File("usr/far", mtime=2**40)
    )
    listing = subprocess.run(["unsquashfs", "-lln", converter.output], capture_output=True, text=True).stdout
    assert {line.split()[1] for line in listing.splitlines() if "squashfs-root" in line} == {"0/0"}
    tree = converter.unpacked()
    assert [int((tree / "usr" / n).stat().st_mtime) for n in ("a.py", "old", "far")] == [
        1_234_567_890,
        0,
        2**32 - 1,
    ]
    assert stat.S_IMODE(tree.stat().st_mode) == 0o755


@needs_tools
def test_source_date_epoch_in_the_environment_does_no_harm(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    converter()
    assert superblock(converter.output).mkfs_time == CREATED


@needs_tools
def test_devices_and_dockerenv_are_left_out_and_pipes_stay(converter: Converter) -> None:
    converter(
        File(".dockerenv"), folder("dev"), device("dev/null"), File("dev/note", b"x" * 5000), device("var/null"),
        hard_link("var/zero", "var/null"), File("var/pipe", kind=tarfile.FIFOTYPE),
    )  # fmt: skip
    tree = converter.unpacked()
    assert list((tree / "dev").iterdir()) == []
    assert [p.name for p in (tree / "var").iterdir()] == ["pipe"]
    assert not (tree / ".dockerenv").exists()
    assert "2 device nodes outside /dev left out" in converter.said


@needs_tools
def test_setuid_and_capabilities_are_taken_away_and_said(converter: Converter) -> None:
    """Unpacked by a user, a setuid program would let anybody on the node act as that user."""
    capability = (("SCHILY.xattr.security.capability", "\x01"),)
    converter(
        File("usr/su", b"x", 0o4755), File("usr/wall", b"x", 0o2755), File("usr/ping", b"x", 0o755, pax=capability),
        folder("tmp", 0o1777), folder("locked", 0o500), File("etc/shadow", b"x", 0o600),
    )  # fmt: skip
    tree = converter.unpacked()
    modes = {
        name: oct(stat.S_IMODE((tree / name).stat().st_mode))
        for name in ("usr/su", "usr/wall", "tmp", "locked")
    }
    assert modes == {"usr/su": "0o755", "usr/wall": "0o755", "tmp": "0o1777", "locked": "0o700"}
    assert "setuid, setgid or capabilities taken from 3 files" in converter.said
    assert "2 entries that only root may read, such as /locked, /etc/shadow" in converter.said


@needs_tools
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_links_keep_their_targets(converter: Converter, form: int) -> None:
    targets = [
        "/" + "long/" * 60 + "end",
        "/opt/größe",
        "relative/../x",
        "/" + "ä" * 90,
        "/new\nline",
        "nowhere",
        "/",
    ]
    converter(*(link(f"links/{n}", target) for n, target in enumerate(targets)), form=form)
    tree = converter.unpacked()
    assert [os.readlink(tree / "links" / str(n)) for n in range(len(targets))] == targets


@needs_tools
def test_hard_links_stay_one_file(converter: Converter) -> None:
    data = os.urandom(300_000)
    converter(
        File("a", data), hard_link("b", "a"), hard_link("c", "./a"), link("s", "a"), hard_link("t", "s")
    )
    tree = converter.unpacked()
    assert len({(tree / name).stat().st_ino for name in "abc"}) == 1
    assert (tree / "c").read_bytes() == data
    assert os.readlink(tree / "t") == "a"
    assert converter.output.stat().st_size < 400_000


@needs_tools
def test_holes_cost_nothing(converter: Converter) -> None:
    """Engines export a sparse file with its zeros."""
    converter(File("disk", bytes(20_000_000) + b"end"))
    assert converter.output.stat().st_size < 100_000
    assert (converter.unpacked() / "disk").stat().st_blocks * 512 < 1_000_000
    assert converter.sidecar()["squashfs"]["unpacked_bytes"] > 20_000_000


@needs_tools
@pytest.mark.parametrize(
    "name", ["new\nline", "ünï", "\udcff\udcfe", " lead", "-e", "*?[x]", "back\\slash", "n" * 255, "ä" * 127]
)
def test_names(converter: Converter, name: str) -> None:
    converter(File(f"d/{name}", b"here"), folder(f"e/{name}"), File(f"e/{name}/{name}", b"there"))
    tree = converter.unpacked()
    assert (tree / "d" / name).read_bytes() == b"here"
    assert (tree / "e" / name / name).read_bytes() == b"there"


@needs_tools
def test_every_format_is_what_it_says(converter: Converter) -> None:
    for fmt in {
        *FORMATS.values(),
        SquashfsFormat("gzip", 64, 2),
        SquashfsFormat("lz4", 1024, None, ("-Xhc",)),
    }:
        converter(File("x", b"words " * 1000), fmt=fmt)
        block = superblock(converter.output)
        assert (block.compressor, block.block_size) == (fmt.compressor, fmt.block_kib * 1024)
        assert converter.sidecar()["squashfs"]["level"] == fmt.level


NAME = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12).map(lambda b: b.replace(b"/", b"_").replace(b"\0", b"_").decode("utf-8", "surrogateescape")),
    st.integers(90, 255).map(lambda n: "n" * n),
).filter(lambda name: name not in (".", ".."))  # fmt: skip
TARGET = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150)


@st.composite
def trees(draw: st.DrawFn) -> list[File]:
    """Files in an order that an export could have: a directory before what is in it, a file before its links."""
    folders, plain, files, seen = ["t"], [], [folder("t")], {"t"}
    for _ in range(draw(st.integers(0, 12))):
        name = f"{draw(st.sampled_from(folders))}/{draw(NAME)}"
        kind = draw(st.sampled_from(["file", "folder", "link", "hard link", "pipe"]))
        mode = draw(st.integers(0, 0o1777)) | 0o400  # readable, so that a test without root can look
        mtime = draw(st.integers(0, 2**32 - 1))
        if name in seen or len(name.encode("utf-8", "surrogateescape")) > 3000:
            continue
        seen.add(name)
        if kind == "file":
            files.append(File(name, draw(st.binary(max_size=2000)), mode, mtime))
            plain.append(name)
        elif kind == "folder":
            files.append(folder(name, mode, mtime))
            folders.append(name)
        elif kind == "link":
            files.append(link(name, draw(TARGET)))
        elif kind == "pipe":
            files.append(File(name, mode=mode, mtime=mtime, kind=tarfile.FIFOTYPE))
        elif plain:
            files.append(hard_link(name, draw(st.sampled_from(plain))))
    return files


@needs_tools
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    files=trees(), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), size=st.integers(1, 70_000)
)
def test_any_tree_arrives(
    tmp_path_factory: pytest.TempPathFactory, files: list[File], form: int, size: int
) -> None:
    converter = Converter(tmp_path_factory.mktemp("tree"))
    converter.feed(chunks(tar_of(*files, form=form), size))
    root = os.fsencode(converter.unpacked())
    expected: dict[bytes, tuple[object, ...]] = {}
    for file in files:
        name = file.name.encode("utf-8", "surrogateescape")
        if file.kind == tarfile.LNKTYPE:
            expected[name] = expected[file.target.encode("utf-8", "surrogateescape")]
        elif file.kind == tarfile.SYMTYPE:
            expected[name] = ("link", file.target.encode())
        elif file.kind == tarfile.DIRTYPE:
            expected[name] = ("dir", file.mode | 0o700, file.mtime)
        elif file.kind == tarfile.FIFOTYPE:
            expected[name] = ("pipe", file.mode, file.mtime)
        else:
            expected[name] = ("file", file.mode, file.mtime, file.data)
    found: dict[bytes, tuple[object, ...]] = {}
    for where, folders, names in os.walk(os.path.join(root, b"t")):
        for path in (os.path.join(where, name) for name in [*folders, *names, b""]):
            path = path.rstrip(b"/")
            about = os.lstat(path)
            rest: tuple[object, ...] = (stat.S_IMODE(about.st_mode), int(about.st_mtime))
            if stat.S_ISLNK(about.st_mode):
                value: tuple[object, ...] = ("link", os.readlink(path))
            elif stat.S_ISDIR(about.st_mode):
                value = ("dir", *rest)
            elif stat.S_ISFIFO(about.st_mode):
                value = ("pipe", *rest)
            else:
                value = ("file", *rest, Path(os.fsdecode(path)).read_bytes())
            found[os.path.relpath(path, root)] = value
    assert found == expected


# --- enroot's files and the metadata -----------------------------------------------------------------------------


def test_rc_runs_entrypoint_and_command_as_written(tmp_path: Path) -> None:
    where = tmp_path / "it's a $HOME"
    config = ImageConfig(
        "amd64", "sha256:1", working_dir=str(where), entrypoint=("/bin/sh", "-c", 'printf "%s|" "$PWD" "$@"', "a b"),
        cmd=("c'd", "", "$x"), labels={"b": "two\nrm -rf /", "a": "1"},
    )  # fmt: skip
    script = enroot_files(config)[0]["etc/rc"]
    assert script.startswith("# image sha256:1\n# a 1\n# b two rm -rf /\n\n")
    assert ". /etc/rc.local" in script
    (tmp_path / "rc").write_text(script)

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(["sh", tmp_path / "rc", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.split("|")[:-1]

    assert run() == [str(where), "c'd", "", "$x"]
    assert run("x", "y z") == [str(where), "x", "y z"]


def test_rc_without_entrypoint_runs_what_it_is_given_and_without_command_a_shell() -> None:
    assert enroot_files(ImageConfig("amd64"))[0]["etc/rc"].endswith('    exec "$@"\nfi\nexec /bin/sh\n')
    assert "cd / &&" in enroot_files(ImageConfig("amd64"))[0]["etc/rc"]


def test_environment_is_verbatim_and_volumes_are_mounted() -> None:
    env = ("PATH=/usr/bin:/bin", "EMPTY=", "QUOTED=a 'b' \"c\" $d", "KEY=one\nLD_PRELOAD=/evil.so")
    files, left_out = enroot_files(ImageConfig("amd64", env=env, volumes=("/a b", "/data", "relative")))
    assert files["etc/environment"] == "PATH=/usr/bin:/bin\nEMPTY=\nQUOTED=a 'b' \"c\" $d\n"
    assert left_out == ["KEY"]
    options = "none x-create=dir,bind,rw,nosuid,nodev\n"
    mounts = [rf"${{ENROOT_ROOTFS}}/a\040b /a\040b {options}", f"${{ENROOT_ROOTFS}}/data /data {options}"]
    assert files["etc/fstab"] == "".join(mounts)


@needs_tools
def test_enroots_files_replace_the_images_own(converter: Converter) -> None:
    converter(
        File("etc/environment", b"OLD=1"), link("etc/rc.local", "/nowhere"), File("etc/passwd", b"root"),
        config=ImageConfig("amd64", env=("NEW=1",)),
    )  # fmt: skip
    tree = converter.unpacked()
    assert (tree / "etc/environment").read_text() == "NEW=1\n"
    assert (tree / "etc/rc.local").read_text().startswith("#")
    assert sorted(p.name for p in (tree / "etc").iterdir()) == [
        "environment", "fstab", "passwd", "rc", "rc.local", "titan-image.json"
    ]  # fmt: skip


@needs_tools
def test_metadata_stands_inside_and_beside(converter: Converter) -> None:
    converter()
    assert json.loads((converter.unpacked() / "etc/titan-image.json").read_text()) == ABOUT
    beside = converter.sidecar()
    size = converter.output.stat().st_size
    total = sum(path.stat().st_size for path in converter.unpacked().rglob("*") if path.is_file())
    assert beside.pop("squashfs") == {
        "sha256": sha256(converter.output), "bytes": size, "compressor": "gzip", "level": 1, "block_kib": 128,
        "unpacked_bytes": total, "entries": superblock(converter.output).inodes,
        "mkfs_time": superblock(converter.output).mkfs_time,
    }  # fmt: skip
    assert beside == {**ABOUT, "image_id": "sha256:abc", "created": "2023-11-14T22:13:20Z"}


@needs_tools
def test_an_image_that_says_nothing_of_itself(converter: Converter) -> None:
    converter(described=False)
    assert "versions" not in converter.sidecar()


@needs_tools
def test_architecture_is_the_shells_not_the_label(converter: Converter) -> None:
    """`docker import --platform linux/arm64` leaves the image marked amd64."""
    converter(
        link("bin", "usr/bin"), link("usr/bin/sh", "/usr/bin/dash"), File("usr/bin/dash", program(183), 0o755),
        shell=False,
    )  # fmt: skip
    assert "the engine calls this image amd64, its /bin/sh is for aarch64" in converter.said
    assert converter.sidecar()["arch"] == "arm64"


@needs_tools
def test_busyboxs_shell_is_a_hard_link(converter: Converter) -> None:
    converter(File("bin/busybox", program(), 0o755), hard_link("bin/sh", "bin/busybox"), shell=False)
    assert converter.output.exists()


def test_image_config_from_what_the_engine_says() -> None:
    attrs = {
        "Id": "sha256:1", "Architecture": "arm64", "Created": "2026-11-22T10:00:00.123456789Z",
        "Config": {"Env": ["A=1"], "WorkingDir": "/w", "Entrypoint": None, "Cmd": ["bash"], "Volumes": {"/b": {}, "/a": {}}},
    }  # fmt: skip
    expected = ImageConfig("arm64", "sha256:1", 1795341600, ("A=1",), "/w", (), ("bash",), ("/a", "/b"), {})
    assert image_config(attrs, {}) == expected
    assert image_config(attrs, {"SOURCE_DATE_EPOCH": "77"}).created == 77
    assert image_config({"Created": "0001-01-01T00:00:00Z", "Config": None}, {}) == ImageConfig("")
    for wrong in ("yesterday", "-1", str(2**32)):
        with pytest.raises(LauncherError, match=wrong):
            image_config(attrs, {"SOURCE_DATE_EPOCH": wrong})


# --- what is refused -----------------------------------------------------------------------------------------------


@needs_tools
@pytest.mark.parametrize(
    ("files", "shell", "words"),
    [
        ([File("etc/x")], False, "no /bin/sh"),
        ([link("bin/sh", "/bin/dash")], False, "no /bin/sh"),
        ([link("bin/sh", "sh")], False, "no /bin/sh"),
        ([File("bin/sh", program(), 0o644)], False, "no /bin/sh"),
        ([File("n" * 256)], True, "longer than 255"),
        ([File("ä" * 128)], True, "longer than 255"),
        ([File("a/../../x")], True, "leads out"),
        ([link("etc", "usr/etc")], True, "below the link /etc"),
        ([link("d", "bin"), File("d/x")], True, "below the link /d"),
        ([folder("etc/rc")], True, "/etc/rc is a directory"),
        ([File("etc/fstab"), hard_link("x", "etc/fstab")], True, "hard link to /etc/fstab"),
        ([hard_link("x", "nowhere")], True, "no file of that name came before it"),
        ([hard_link("x", "bin")], True, "no file of that name came before it"),
        ([File("x", b"1"), File("x", b"2")], True, "/x comes twice"),
        ([File("x", kind=b"W")], True, "unknown type"),
        ([File("x", kind=tarfile.GNUTYPE_SPARSE)], True, "sparse"),
        ([File("x", pax=(("GNU.sparse.major", "1"),))], True, "sparse"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_converted(
    converter: Converter, files: list[File], shell: bool, words: str
) -> None:
    assert words in converter.refused(*files, shell=shell).what


@needs_tools
def test_a_failure_leaves_the_old_image_and_its_sidecar(converter: Converter) -> None:
    converter(File("x", b"old"))
    old = sha256(converter.output), converter.sidecar()
    converter.refused(File("x"), shell=False)
    assert (sha256(converter.output), converter.sidecar()) == old


@needs_tools
def test_no_old_sidecar_lies_beside_a_new_image(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the new one cannot be written."""

    def full(*arguments: Any) -> None:
        raise LauncherError("no space left", status=ExitStatus.FILESYSTEM)

    converter(File("x", b"old"))
    monkeypatch.setattr(squashfs_file, "write_json", full)
    with pytest.raises(LauncherError, match="no space left"):
        converter(File("x", b"new"))
    assert [path.name for path in converter.home.iterdir()] == ["titan.sqsh"]
    assert (converter.unpacked() / "x").read_bytes() == b"new"


@needs_tools
@pytest.mark.parametrize("keep", [0, 100, 512, 1024, 1536, 2048, 60_000, -1024])
def test_an_export_that_breaks_off(converter: Converter, keep: int) -> None:
    """Also between two files, where Python's tarfile sees a complete archive; -1024 lacks just the end marker."""
    whole = tar_of(File("a", os.urandom(100_000)))
    whole = whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512) + bytes(1024)
    with pytest.raises(LauncherError, match="incomplete or damaged"):
        converter.feed(chunks(whole[:keep]))
    assert list(converter.home.iterdir()) == []


@needs_tools
def test_an_export_that_fails(converter: Converter) -> None:
    def export() -> Iterator[bytes]:
        yield tar_of(File("a", bytes(100_000)))[:5000]
        raise ConnectionResetError("engine gone")

    with pytest.raises(LauncherError, match="ConnectionResetError: engine gone") as error:
        converter.feed(export())
    assert error.value.status is ExitStatus.ERROR
    assert list(converter.home.iterdir()) == []


@needs_tools
def test_ctrl_c_ends_mksquashfs_and_removes_its_file(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **options))
        return started[0]

    def export() -> Iterator[bytes]:
        yield tar_of(File("a", bytes(1_000_000)))[:500_000]
        assert started[0].poll() is None
        assert len(list(converter.home.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(squashfs_file, "subprocess", _Subprocess(popen))
    with pytest.raises(KeyboardInterrupt):
        converter.feed(export())
    assert started[0].poll() == -9
    assert list(converter.home.iterdir()) == []


ENDLESS = """
import sys, time
from pathlib import Path
from launcher.image.convert import convert
from launcher.image.export import ImageConfig

def export(head):
    yield head
    print("started", flush=True)
    while True:
        time.sleep(0.02)
        yield bytes(512)

try:
    convert(export(sys.stdin.buffer.read()), ImageConfig("amd64"), Path(sys.argv[1]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@needs_tools
def test_ctrl_c_in_a_terminal_reaches_the_whole_group(converter: Converter) -> None:
    head = tar_of(File("a", bytes(1_000_000)))[:500_224]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(converter.output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(head)
        process.stdin.close()
        assert process.stdout.readline() == b"started\n"
        assert len(list(converter.home.iterdir())) == 1
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == b"interrupted\n"
    assert list(converter.home.iterdir()) == []


class _Subprocess:
    """The module, with another Popen."""

    def __init__(self, popen: Callable[..., subprocess.Popen[bytes]]) -> None:
        self.Popen = popen

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


@pytest.fixture
def fake(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """Puts a shell script in the place of a program: `fake("mksquashfs", "exit 1")`."""
    place = tmp_path_factory.mktemp("programs")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def add(name: str, script: str) -> None:
        path = place / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    return add


GOOD = 'if [ "$1" = -version ]; then echo "mksquashfs version 4.6.1 (2023/03/25)"; exit; fi\n'


@pytest.mark.parametrize(
    ("script", "words", "status"),
    [
        ("echo 'mksquashfs version 4.4 (2019/08/29)'", "version 4.4", ExitStatus.ERROR),
        ("echo hello", "does not say its version", ExitStatus.ERROR),
        (GOOD + "head -c 5000 >/dev/null; kill -9 $$", "killed by signal 9", ExitStatus.ERROR),
        (GOOD + "head -c 5000 >/dev/null; echo broken >&2; exit 3", "failed with code 3", ExitStatus.ERROR),
        (GOOD + "echo half >$2; echo 'FATAL ERROR: write: No space left on device'; exit 1", "no space left", ExitStatus.FILESYSTEM),
        (GOOD + "echo 'FATAL ERROR: Compressor \"zstd\" is not supported!'; exit 1", "without that compressor", ExitStatus.ERROR),
        (GOOD + "cat >/dev/null; echo half >$2; exit 0", "not a squashfs", ExitStatus.INVALID),
        (GOOD + "head -c 5000 >/dev/null; exit 0", "stopped reading", ExitStatus.ERROR),
    ],
)  # fmt: skip
def test_mksquashfs_that_cannot(
    converter: Converter, fake: Callable[[str, str], None], script: str, words: str, status: ExitStatus
) -> None:
    fake("mksquashfs", script)
    error = converter.refused(File("x", os.urandom(3_000_000)))
    assert words in error.what
    assert error.status is status


def test_no_mksquashfs(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error = converter.refused()
    assert error.what == "mksquashfs: no such program"
    assert "squashfs-tools" in error.fix


@needs_tools
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a small file system is mounted")
def test_full_disk(converter: Converter) -> None:
    small = converter.home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
    try:
        converter.output = small / "titan.sqsh"
        with pytest.raises(LauncherError, match="no space left") as error:
            converter(File("x", os.urandom(5_000_000)))
        assert error.value.status is ExitStatus.FILESYSTEM
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@needs_tools
def test_places_that_cannot_be_written(converter: Converter) -> None:
    for place in (converter.home / "no" / "x.sqsh", Path("/proc/x.sqsh"), converter.home):
        converter.output = place
        converter.refused()


def test_the_stream_is_not_kept_in_memory() -> None:
    """An image has gigabytes, the machine that converts it perhaps not."""

    def export() -> Iterator[bytes]:
        yield tar_of()[: -(10240 - 3 * 512 % 10240)][:1536]
        for number in range(40):
            info = tarfile.TarInfo(f"big{number}")
            info.size = 5_000_192
            yield info.tobuf()
            yield from (bytes(65536) for _ in range(76))
            yield bytes(info.size - 76 * 65536)
            yield bytes(-info.size % 512)
        yield bytes(1024)

    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in rewrite(export(), CONFIG, Report()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 200_000_000
    assert peak < 2_000_000


def test_a_size_beyond_8_gib_comes_in_the_pax_header() -> None:
    data = bytearray(tar_of(File("big", b"x" * 5000, pax=(("size", "5000"),))))
    at = data.rindex(b"big\0")
    data[at + 124 : at + 136] = b"00000000000\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    report = Report()
    out = b"".join(rewrite(chunks(bytes(data)), CONFIG, report))
    assert b"x" * 5000 in out
    assert report.unpacked_bytes > 5000


def test_a_header_that_does_not_add_up_is_damage() -> None:
    data = bytearray(tar_of(File("a", b"x")))
    at = data.rindex(b"a\0")
    data[at + 103] ^= 1  # one bit of the mode
    with pytest.raises(LauncherError, match="incomplete or damaged: a header without sense"):
        list(rewrite(chunks(bytes(data)), CONFIG, Report()))


SAMPLE = tar_of(
    folder("a" * 60),
    File("a" * 60 + "/" + "b" * 90, b"data" * 300),
    link("l", "/" + "ä" * 90),
    hard_link("h", "bin/sh"),
)


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, len(SAMPLE)),
)
def test_a_damaged_stream_is_an_error_or_a_tar(edits: list[tuple[int, int]], cut: int) -> None:
    """Never an endless loop, a crash or a tar that mksquashfs could not read."""
    data = bytearray(SAMPLE)
    for at, value in edits:
        data[at] = value
    try:
        out = b"".join(rewrite(chunks(bytes(data[: cut or None]), 777), CONFIG, Report()))
    except LauncherError:
        return
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        assert "etc/rc" in tar.getnames()


# --- by enroot -----------------------------------------------------------------------------------------------------

# enroot cannot be installed where these tests run: a script that takes the same arguments stands for it.
ENROOT = r"""
[ "$1 $2 $4" = "import -o dockerd://titan:test" ] || { echo "Usage: enroot import" >&2; exit 2; }
[ ! -e "$3" ] || { echo "[ERROR] File already exists: $3" >&2; exit 1; }
[ -z "${SOURCE_DATE_EPOCH-}" ] || exit 3
mkdir -p "$WORK/root/etc" && echo "$ABOUT" >"$WORK/root/etc/titan-image.json"
mksquashfs "$WORK/root" "$3" -all-root -no-progress $ENROOT_SQUASH_OPTIONS
"""


@needs_tools
def test_by_enroot(
    converter: Converter, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    fake("enroot", ENROOT)
    monkeypatch.setenv("WORK", str(tmp_path_factory.mktemp("enroot")))
    monkeypatch.setenv("ABOUT", json.dumps(ABOUT))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    convert_with_enroot(
        "titan:test", converter.output, fmt=SquashfsFormat("zstd", 64, 3), image_id="sha256:1"
    )
    assert superblock(converter.output).block_size == 65536
    assert converter.sidecar()["versions"] == ABOUT["versions"]
    assert converter.sidecar()["squashfs"]["sha256"] == sha256(converter.output)
    assert len(list(converter.home.iterdir())) == 2


def test_by_enroot_that_fails(converter: Converter, fake: Callable[[str, str], None]) -> None:
    fake("enroot", 'echo half >"$3"; echo "[ERROR] Command not found: jq" >&2; exit 1')
    with pytest.raises(LauncherError, match="failed with code 1") as error:
        convert_with_enroot("titan:test", converter.output)
    assert error.value.original == "[ERROR] Command not found: jq"
    assert list(converter.home.iterdir()) == []


def test_by_enroot_that_is_not_there(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LauncherError, match="enroot: no such program"):
        convert_with_enroot("titan:test", converter.output)
    assert list(converter.home.iterdir()) == []
