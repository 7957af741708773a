"""The conversion: every kind of entry that an exported image may hold, and what stands in the result."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import LauncherError
from launcher.image.build import created
from launcher.image.convert import image_config
from launcher.image.export import ImageConfig, enroot_files
from launcher.image.squashfs_file import superblock
from launcher.image.squashfs_tools import FORMATS, SquashfsFormat
from tests.image.converter import (
    ABOUT,
    CREATED,
    Converter,
    File,
    chunks,
    converter,
    device,
    folder,
    hard_link,
    link,
    needs_tools,
    program,
    sha256,
    tar_of,
)

__all__ = ["converter"]  # fixtures

pytestmark = needs_tools


# --- what is in the result ---------------------------------------------------------------------------------------


def test_same_image_gives_the_same_bytes_whenever_the_engine_made_the_container(
    converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(now: int) -> tuple[File, ...]:
        return (
            File(".dockerenv", mtime=now),
            folder("dev", mtime=now),
            device("dev/console"),
            folder("etc", mtime=now),
            File("etc/hosts", mtime=now),
            link("etc/mtab", "/proc/mounts"),
            folder("proc", mtime=now),
            folder("workspace", mtime=now),
            folder("workspace/runs", mtime=now),
            File("usr/lib/missing/parents/x.py", b"x = 1"),
        )

    config = ImageConfig("amd64", created=CREATED, working_dir="/workspace/runs")
    first = sha256(converter(*export(1_800_000_000), config=config))
    tree = converter.unpacked()
    assert superblock(converter.output).mkfs_time == CREATED
    assert {int((tree / p).stat().st_mtime) for p in (".", "etc", "usr/lib", "workspace", "etc/rc")} == {CREATED}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")  # to mksquashfs, given twice, an error
    assert sha256(converter(*export(1_900_000_000), config=config)) == first


def test_what_changes_on_the_way(converter: Converter, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pyc whose source has another time is compiled again at every start, and never saved. Unpacked by a user, a
    setuid program would let anybody on the node act as that user."""
    converter(
        File(".dockerenv"),
        folder("dev"),
        device("dev/null"),
        File("dev/note", b"x" * 5000),
        device("var/null"),
        hard_link("var/zero", "var/null"),
        File("var/pipe", kind=tarfile.FIFOTYPE),
        File("usr/su", b"x", 0o4755),
        File("usr/wall", b"x", 0o2755),
        File("usr/ping", b"x", 0o755, pax=(("SCHILY.xattr.security.capability", "\x01"),)),
        folder("tmp", 0o1777),
        folder("locked", 0o500),
        File("a.py", mtime=1_234_567_890.75),
        File("old", mtime=-5),
        File("far", mtime=2**40),
        File("etc/environment", b"OLD=1"),
        link("etc/rc.local", "/nowhere"),
        File("etc/passwd", b"root"),
        File("etc/shadow", b"x", 0o600),
        config=ImageConfig("amd64", created=CREATED, env=("NEW=1", "TWO=1\n2")),
    )
    listing = subprocess.run(["unsquashfs", "-lln", converter.output], capture_output=True, text=True).stdout
    assert {line.split()[1] for line in listing.splitlines() if "squashfs-root" in line} == {"0/0"}
    tree = converter.unpacked()
    assert list((tree / "dev").iterdir()) == [] and not (tree / ".dockerenv").exists()
    assert [path.name for path in (tree / "var").iterdir()] == ["pipe"]
    modes = {"usr/su": 0o755, "usr/wall": 0o755, "tmp": 0o1777, "locked": 0o700, ".": 0o755}
    assert {name: stat.S_IMODE((tree / name).stat().st_mode) for name in modes} == modes
    times = {"a.py": 1_234_567_890, "old": 0, "far": 2**32 - 1}
    assert {name: int((tree / name).stat().st_mtime) for name in times} == times
    assert (tree / "etc/environment").read_text() == "NEW=1\n"
    assert (tree / "etc/rc.local").read_text().startswith("#")
    names = ["environment", "fstab", "passwd", "rc", "rc.local", "shadow", "titan-image.json"]
    assert sorted(path.name for path in (tree / "etc").iterdir()) == names
    assert capsys.readouterr().err.splitlines()[:4] == [
        "setuid, setgid or capabilities taken from 3 files",
        "2 device nodes outside /dev left out",
        "2 entries that only root may read, such as /locked, /etc/shadow",
        "variables with a line break left out: TWO",
    ]


def test_hard_links_stay_one_file(converter: Converter) -> None:
    data = os.urandom(300_000)
    converter(File("a", data), hard_link("b", "a"), hard_link("c", "./a"), link("s", "a"), hard_link("t", "s"))
    tree = converter.unpacked()
    assert len({(tree / name).stat().st_ino for name in "abc"}) == 1
    assert (tree / "c").read_bytes() == data
    assert os.readlink(tree / "t") == "a"
    assert converter.output.stat().st_size < 400_000


def test_every_format_is_what_it_says(converter: Converter) -> None:
    for fmt in (*FORMATS.values(), SquashfsFormat("gzip", 64, 2)):
        converter(File("x", b"words " * 1000), fmt=fmt)
        block = superblock(converter.output)
        assert (block.compressor, block.block_size) == (fmt.compressor, fmt.block_kib * 1024)
        assert converter.sidecar()["squashfs"]["level"] == fmt.level


NAME = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12).map(
        lambda b: b.replace(b"/", b"_").replace(b"\0", b"_").decode("utf-8", "surrogateescape")
    ),
    st.integers(90, 255).map(lambda n: "n" * n),
).filter(lambda name: name not in (".", ".."))
TARGET = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150)


@st.composite
def trees(draw: st.DrawFn) -> list[File]:
    """Files in an order that an export could have: a directory before what is in it, a file before its links."""
    folders, plain, files, names = ["t"], list[File](), [folder("t")], {"t"}
    for _ in range(draw(st.integers(0, 12))):
        name = f"{draw(st.sampled_from(folders))}/{draw(NAME)}"
        kind = draw(st.sampled_from(["file", "folder", "link", "hard link", "pipe"]))
        mode = draw(st.integers(0, 0o1777)) | 0o400  # readable, so that a test without root can look
        mtime = draw(st.integers(0, 2**32 - 1))
        if name in names or len(name.encode("utf-8", "surrogateescape")) > 3000:
            continue
        names.add(name)
        if kind == "file":
            files.append(File(name, draw(st.binary(max_size=2000)), mode, mtime))
            plain.append(files[-1])
        elif kind == "folder":
            files.append(folder(name, mode, mtime))
            folders.append(name)
        elif kind == "link":
            files.append(link(name, draw(TARGET)))
        elif kind == "pipe":
            files.append(File(name, mode=mode, mtime=mtime, kind=tarfile.FIFOTYPE))
        elif plain:
            file = draw(st.sampled_from(plain))  # tarfile takes mode and time of the link, which an engine has alike
            files.append(replace(file, name=name, data=b"", kind=tarfile.LNKTYPE, target=file.name))
    return files


ODD = ["new\nline", "ünï", "\udcff\udcfe", " lead", "-e", "*?[x]", "back\\slash", "n" * 255, "ä" * 127]
TARGETS = ["/" + "long/" * 60 + "end", "/opt/größe", "relative/../x", "/" + "ä" * 90, "/new\nline", "nowhere", "/"]
SPECIAL = [
    folder("t"),
    *(File(f"t/{name}", b"here") for name in ODD),
    *(link(f"t/link{number}", target) for number, target in enumerate(TARGETS)),
]


@given(files=trees(), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), size=st.integers(1, 70_000))
@example(files=SPECIAL, form=tarfile.PAX_FORMAT, size=10_000)
@example(files=SPECIAL, form=tarfile.GNU_FORMAT, size=10_000)
def test_any_tree_arrives(tmp_path_factory: pytest.TempPathFactory, files: list[File], form: int, size: int) -> None:
    converter, plain = Converter(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("plain")
    converter.feed(chunks(tar_of(*files, form=form), size))
    opened = [replace(file, mode=file.mode | 0o700) if file.kind == tarfile.DIRTYPE else file for file in files]
    with tarfile.open(fileobj=io.BytesIO(tar_of(*opened, form=form)), encoding="utf-8") as tar:
        tar.extractall(plain, filter="fully_trusted")
    assert seen(converter.unpacked() / "t") == seen(plain / "t")


def seen(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Whatever stands below: kind, mode, time and content; of a link, where it leads."""
    found: dict[bytes, tuple[object, ...]] = {}
    top = os.fsencode(root)
    for where, folders, names in os.walk(top):
        for path in (where, *(os.path.join(where, name) for name in [*folders, *names])):
            about = os.lstat(path)
            if stat.S_ISLNK(about.st_mode):
                found[os.path.relpath(path, top)] = (os.readlink(path),)
                continue
            data = Path(os.fsdecode(path)).read_bytes() if stat.S_ISREG(about.st_mode) else b""
            found[os.path.relpath(path, top)] = (about.st_mode, int(about.st_mtime), data)
    return found


# --- enroot's files and the metadata -----------------------------------------------------------------------------


def test_rc_runs_entrypoint_and_command_as_written(tmp_path: Path) -> None:
    where = tmp_path / "it's a $HOME"
    config = ImageConfig(
        "amd64",
        "sha256:1",
        working_dir=str(where),
        entrypoint=("/bin/sh", "-c", 'printf "%s|" "$PWD" "$@"', "a b"),
        cmd=("c'd", "", "$x"),
    )
    script = enroot_files(config)["etc/rc"]
    assert script.startswith("# image sha256:1\n")
    assert ". /etc/rc.local" in script
    (tmp_path / "rc").write_text(script)

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(["sh", tmp_path / "rc", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.split("|")[:-1]

    assert run() == [str(where), "c'd", "", "$x"]
    assert run("x", "y z") == [str(where), "x", "y z"]
    without = enroot_files(ImageConfig("amd64"))["etc/rc"]
    assert without.endswith('    exec "$@"\nfi\nexec /bin/sh\n') and "cd / &&" in without


def test_environment_is_verbatim_and_volumes_are_mounted() -> None:
    env = ("PATH=/usr/bin:/bin", "EMPTY=", "QUOTED=a 'b' \"c\" $d", "KEY=one\nLD_PRELOAD=/evil.so")
    files = enroot_files(ImageConfig("amd64", env=env, volumes=("/a b", "/data", "relative")))
    assert files["etc/environment"] == "PATH=/usr/bin:/bin\nEMPTY=\nQUOTED=a 'b' \"c\" $d\n"
    options = "none x-create=dir,bind,rw,nosuid,nodev\n"
    mounts = [rf"${{ENROOT_ROOTFS}}/a\040b /a\040b {options}", f"${{ENROOT_ROOTFS}}/data /data {options}"]
    assert files["etc/fstab"] == "".join(mounts)


def test_metadata_stands_inside_and_beside(converter: Converter) -> None:
    converter()
    assert json.loads((converter.unpacked() / "etc/titan-image.json").read_text()) == ABOUT
    beside = converter.sidecar()
    size = converter.output.stat().st_size
    total = sum(path.stat().st_size for path in converter.unpacked().rglob("*") if path.is_file())
    assert beside.pop("squashfs") == {
        "sha256": sha256(converter.output),
        "bytes": size,
        "compressor": "gzip",
        "level": 1,
        "block_kib": 128,
        "unpacked_bytes": total,
        "entries": superblock(converter.output).inodes,
        "mkfs_time": superblock(converter.output).mkfs_time,
    }
    assert beside == {**ABOUT, "image_id": "sha256:abc", "created": "2023-11-14T22:13:20Z"}


def test_architecture_is_the_shells_not_the_label(converter: Converter, capsys: pytest.CaptureFixture[str]) -> None:
    """`docker import --platform linux/arm64` leaves the image marked amd64."""
    converter(
        link("bin", "usr/bin"),
        link("usr/bin/sh", "/usr/bin/dash"),
        File("usr/bin/dash", program(183), 0o755),
        shell=False,
        described=False,
    )
    assert converter.sidecar()["arch"] == "arm64" and "versions" not in converter.sidecar()
    assert "the engine calls this image amd64, its programs are for aarch64" in capsys.readouterr().err
    # busybox's
    converter(File("bin/busybox", program(), 0o755), hard_link("bin/sh", "bin/busybox"), shell=False)
    assert converter.sidecar()["arch"] == "amd64"


def test_image_config_from_what_the_engine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    attrs = {
        "Id": "sha256:1",
        "Architecture": "arm64",
        "Created": "2026-11-22T10:00:00.123456789Z",
        "Config": {
            "Env": ["A=1"],
            "WorkingDir": "/w",
            "Entrypoint": None,
            "Cmd": ["bash"],
            "Volumes": {"/b": {}, "/a": {}},
        },
    }
    expected = ImageConfig("arm64", "sha256:1", 1795341600, ("A=1",), "/w", (), ("bash",), ("/a", "/b"))
    assert image_config(attrs) == expected
    assert image_config({"Created": "0001-01-01T00:00:00Z", "Config": None}) == ImageConfig("")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "77")
    assert image_config(attrs).created == 77 and created() == "1970-01-01T00:01:17Z"
    for wrong in ("yesterday", "-1", str(2**32)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        for read in (lambda: image_config(attrs), created):
            with pytest.raises(LauncherError, match=f"SOURCE_DATE_EPOCH={wrong}: not a number"):
                read()
