"""The conversion: every kind of entry that an exported image may hold, and what stands in the result."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.base.errors import LauncherError
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


# --- what is in the result ---------------------------------------------------------------------------------------


@needs_tools
def test_same_image_gives_the_same_bytes_whenever_the_engine_made_the_container(converter: Converter) -> None:
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
    assert sha256(converter(*export(1_900_000_000), config=config)) == first


@needs_tools
def test_files_keep_their_time_and_become_roots(converter: Converter) -> None:
    """A .pyc whose source has another time is compiled again at every start, and never saved."""
    converter(File("usr/a.py", mtime=1_234_567_890.75), File("usr/old", mtime=-5), File("usr/far", mtime=2**40))
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
        File(".dockerenv"),
        folder("dev"),
        device("dev/null"),
        File("dev/note", b"x" * 5000),
        device("var/null"),
        hard_link("var/zero", "var/null"),
        File("var/pipe", kind=tarfile.FIFOTYPE),
    )
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
        File("usr/su", b"x", 0o4755),
        File("usr/wall", b"x", 0o2755),
        File("usr/ping", b"x", 0o755, pax=capability),
        folder("tmp", 0o1777),
        folder("locked", 0o500),
        File("etc/shadow", b"x", 0o600),
    )
    tree = converter.unpacked()
    modes = {name: oct(stat.S_IMODE((tree / name).stat().st_mode)) for name in ("usr/su", "usr/wall", "tmp", "locked")}
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
    converter(File("a", data), hard_link("b", "a"), hard_link("c", "./a"), link("s", "a"), hard_link("t", "s"))
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
    }:
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
@given(files=trees(), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), size=st.integers(1, 70_000))
def test_any_tree_arrives(tmp_path_factory: pytest.TempPathFactory, files: list[File], form: int, size: int) -> None:
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
        "amd64",
        "sha256:1",
        working_dir=str(where),
        entrypoint=("/bin/sh", "-c", 'printf "%s|" "$PWD" "$@"', "a b"),
        cmd=("c'd", "", "$x"),
        labels={"b": "two\nrm -rf /", "a": "1"},
    )
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
        File("etc/environment", b"OLD=1"),
        link("etc/rc.local", "/nowhere"),
        File("etc/passwd", b"root"),
        config=ImageConfig("amd64", env=("NEW=1",)),
    )
    tree = converter.unpacked()
    assert (tree / "etc/environment").read_text() == "NEW=1\n"
    assert (tree / "etc/rc.local").read_text().startswith("#")
    assert sorted(p.name for p in (tree / "etc").iterdir()) == [
        "environment",
        "fstab",
        "passwd",
        "rc",
        "rc.local",
        "titan-image.json",
    ]


@needs_tools
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


@needs_tools
def test_an_image_that_says_nothing_of_itself(converter: Converter) -> None:
    converter(described=False)
    assert "versions" not in converter.sidecar()


@needs_tools
def test_architecture_is_the_shells_not_the_label(converter: Converter) -> None:
    """`docker import --platform linux/arm64` leaves the image marked amd64."""
    converter(
        link("bin", "usr/bin"),
        link("usr/bin/sh", "/usr/bin/dash"),
        File("usr/bin/dash", program(183), 0o755),
        shell=False,
    )
    assert "the engine calls this image amd64, its programs are for aarch64" in converter.said
    assert converter.sidecar()["arch"] == "arm64"


@needs_tools
def test_busyboxs_shell_is_a_hard_link(converter: Converter) -> None:
    converter(File("bin/busybox", program(), 0o755), hard_link("bin/sh", "bin/busybox"), shell=False)
    assert converter.output.exists()


def test_image_config_from_what_the_engine_says() -> None:
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
    expected = ImageConfig("arm64", "sha256:1", 1795341600, ("A=1",), "/w", (), ("bash",), ("/a", "/b"), {})
    assert image_config(attrs, {}) == expected
    assert image_config(attrs, {"SOURCE_DATE_EPOCH": "77"}).created == 77
    assert image_config({"Created": "0001-01-01T00:00:00Z", "Config": None}, {}) == ImageConfig("")
    for wrong in ("yesterday", "-1", str(2**32)):
        with pytest.raises(LauncherError, match=wrong):
            image_config(attrs, {"SOURCE_DATE_EPOCH": wrong})
