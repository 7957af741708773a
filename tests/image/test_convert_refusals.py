"""The conversion: what is refused, and every way in which it may break off."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.image import convert as module
from launcher.image.export import Report, rewrite
from tests.image.converter import (
    CONFIG,
    Converter,
    File,
    chunks,
    converter,
    folder,
    hard_link,
    link,
    needs_tools,
    sha256,
    tar_of,
)

__all__ = ["converter"]  # fixtures

pytestmark = needs_tools


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "shell", "words"),
    [
        ([File("etc/x")], False, "no /bin/sh"),
        ([link("bin/sh", "/bin/dash")], False, "no /bin/sh"),
        ([link("bin/sh", "sh")], False, "no /bin/sh"),
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
)
def test_images_that_cannot_be_converted(converter: Converter, files: list[File], shell: bool, words: str) -> None:
    assert words in converter.refused(*files, shell=shell).what


def test_a_failure_leaves_the_old_image_and_its_sidecar(converter: Converter) -> None:
    converter(File("x", b"old"))
    old = sha256(converter.output), converter.sidecar()
    converter.refused(File("x"), shell=False)
    assert (sha256(converter.output), converter.sidecar()) == old


def test_no_old_sidecar_lies_beside_a_new_image(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the new one cannot be written."""

    def full(*arguments: Any) -> None:
        raise LauncherError("disk-full", "no space left", status=ExitStatus.FILESYSTEM)

    converter(File("x", b"old"))
    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(LauncherError, match="no space left"):
        converter(File("x", b"new"))
    assert [path.name for path in converter.home.iterdir()] == ["titan.sqsh"]
    assert (converter.unpacked() / "x").read_bytes() == b"new"


@pytest.mark.parametrize("keep", [0, 100, 512, 1024, 1536, 2048, 60_000, -1024])
def test_an_export_that_breaks_off(converter: Converter, keep: int) -> None:
    """Also between two files, where Python's tarfile sees a complete archive; -1024 lacks just the end marker."""
    whole = tar_of(File("a", os.urandom(100_000)))
    whole = whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512) + bytes(1024)
    with pytest.raises(LauncherError, match="incomplete or damaged"):
        converter.feed(chunks(whole[:keep]))
    assert list(converter.home.iterdir()) == []


def test_ctrl_c_ends_mksquashfs_and_removes_its_file(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        return started[-1]

    def export() -> Iterator[bytes]:
        yield tar_of(File("a", bytes(1_000_000)))[:500_000]
        assert started[-1].poll() is None
        assert os.getsid(started[-1].pid) != os.getsid(0)  # a terminal's Ctrl-C is for us alone
        assert len(list(converter.home.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        converter.feed(export())
    assert started[-1].poll() == -9
    assert list(converter.home.iterdir()) == []


GOOD = 'if [ "$1" = -version ]; then echo "mksquashfs version 4.6.1 (2023/03/25)"; exit; fi\n'


@pytest.mark.parametrize(
    ("script", "words", "status"),
    [
        ("echo 'mksquashfs version 4.4 (2019/08/29)'", "version 4.4; 4.5 is needed", ExitStatus.ERROR),
        ("echo hello", "unknown version", ExitStatus.ERROR),
        (GOOD + "head -c 5000 >/dev/null; kill -9 $$", "failed with code -9", ExitStatus.ERROR),
        (GOOD + "head -c 5000 >/dev/null; echo broken >&2; exit 3", "failed with code 3", ExitStatus.ERROR),
        (
            GOOD + "echo half >$2; echo 'FATAL ERROR: write: No space left on device'; exit 1",
            "no space left",
            ExitStatus.FILESYSTEM,
        ),
        (GOOD + "cat >/dev/null; echo half >$2; exit 0", "not a squashfs", ExitStatus.INVALID),
        (GOOD + "head -c 5000 >/dev/null; exit 0", "failed with code 0", ExitStatus.ERROR),
    ],
)
def test_mksquashfs_that_cannot(
    converter: Converter, monkeypatch: pytest.MonkeyPatch, script: str, words: str, status: ExitStatus
) -> None:
    program = converter.home / "bin" / "mksquashfs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    error = converter.refused(File("x", os.urandom(3_000_000)))
    assert words in error.what
    assert error.status is status


def test_no_squashfs_tools(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error = converter.refused()
    assert error.what == "unsquashfs: No such file or directory"
    assert "squashfs-tools" in error.fix


def test_places_that_cannot_be_written(converter: Converter) -> None:
    for place in (converter.home / "no" / "x.sqsh", Path("/proc/x.sqsh")):
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
