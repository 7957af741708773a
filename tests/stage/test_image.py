"""`launcher stage image`: from files and from a web server that cuts, ignores ranges, lies or stalls."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ExitStatus, LauncherError
from launcher.image.squashfs_file import read_sidecar, sidecar_path, superblock
from launcher.stage import target, web
from launcher.stage.image import stage_image
from tests.conftest import ROOT, Launch, squashfs_head
from tests.image.images import kept_engine
from tests.image.test_convert import program
from tests.image.test_registry import running_registry

needs_tools = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"
)
SIZE = 3 << 20
CALL = """
import pathlib, sys
from launcher.stage.image import stage_image
stage_image(sys.argv[1], pathlib.Path(sys.argv[2]), say=print)
"""


def image_bytes(seed: int = 0) -> bytes:
    return (squashfs_head(SIZE) + random.Random(seed).randbytes(SIZE))[:SIZE]


def description(data: bytes, path: Path) -> dict[str, Any]:
    block = superblock(path)
    facts = {
        "sha256": hashlib.sha256(data).hexdigest(), "bytes": block.file_size, "entries": block.inodes,
        "compressor": block.compressor, "block_kib": block.block_size // 1024,
    }  # fmt: skip
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
def said() -> list[str]:
    return []


def expected(to: Path) -> Path:
    return to / f"{hashlib.sha256(image_bytes()).hexdigest()[:12]}-titan-stable-amd64.sqsh"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------------------------ files


def test_a_file_gets_the_name_of_its_checksum_and_is_readable_for_the_group(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    old = os.umask(0o077)
    try:
        path = stage_image(str(source), tmp_path / "images", say=said.append)
    finally:
        os.umask(old)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(sidecar_path(source).read_text())
    assert (mode(path), mode(sidecar_path(path))) == (0o644, 0o644)
    assert said[-1] == f"launcher submit --image {path}"
    assert list((tmp_path / "images" / ".staged" / "partial").iterdir()) == []


def test_the_second_call_writes_nothing(source: Path, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    before = path.stat()
    assert stage_image(str(source), tmp_path / "images", say=said.append) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert f"{path}: already there" in said
    # What is staged can be staged: its name does not grow.
    assert stage_image(str(path), tmp_path / "images", say=said.append) == path


def test_another_image_of_the_same_name_lies_beside_the_first(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    first = stage_image(str(source), tmp_path / "images", say=said.append)
    source.write_bytes(image_bytes(1))
    sidecar_path(source).write_text(json.dumps(description(image_bytes(1), source)))
    second = stage_image(str(source), tmp_path / "images", say=said.append)
    assert first != second
    assert (first.read_bytes(), second.read_bytes()) == (image_bytes(), image_bytes(1))


@needs_tools
@pytest.mark.parametrize("describes_itself", [True, False])
def test_an_image_without_its_sidecar_is_keyed_by_what_was_read(
    describes_itself: bool, tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    if describes_itself:
        about = {"schema": 1, "arch": "amd64", "versions": {"torch": "2.14.1"}}
        (tmp_path / "root/etc/titan-image.json").write_text(json.dumps(about))
    source = tmp_path / "found here.sqsh"
    command = ["mksquashfs", str(tmp_path / "root"), str(source), "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert path == tmp_path / "images" / f"{digest[:12]}-found-here.sqsh"
    assert (read_sidecar(path, superblock(path)) is not None) == describes_itself
    assert stage_image(str(source), tmp_path / "images", say=said.append) == path


@needs_tools
def test_without_its_sidecar_a_damaged_image_is_found_by_looking_inside(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    sidecar_path(source).unlink()
    with pytest.raises(LauncherError, match="damaged"):
        stage_image(str(source), tmp_path / "images", say=said.append)


def test_a_damaged_staged_image_is_replaced(source: Path, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    os.truncate(path, 1000)
    assert stage_image(str(source), tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_an_image_whose_description_was_not_written_any_more_gets_it(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    path = stage_image(str(source), tmp_path / "images", say=said.append)
    inode = path.stat().st_ino
    sidecar_path(path).unlink()  # killed between the two renames
    stage_image(str(source), tmp_path / "images", say=said.append)
    assert sidecar_path(path).exists() and path.stat().st_ino == inode


def break_it(how: str, source: Path) -> None:
    if how == "truncated":
        os.truncate(source, SIZE // 2)
    elif how == "other bytes":
        data = bytearray(image_bytes())
        data[-1] ^= 1
        source.write_bytes(data)
    elif how == "another image's description":
        about = json.loads(sidecar_path(source).read_text())
        about["squashfs"]["bytes"] += 4096
        sidecar_path(source).write_text(json.dumps(about))
    elif how == "no image":
        source.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        source.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "cut off"),
        ("other bytes", "wrong bytes"),
        ("another image's description", "does not describe"),
        ("no image", "not a squashfs file"),
        ("missing", "No such file"),
    ],
)
def test_a_bad_source_leaves_nothing(
    how: str, words: str, source: Path, tmp_path: Path, said: list[str]
) -> None:
    break_it(how, source)
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(str(source), tmp_path / "images", say=said.append)
    assert caught.value.fix
    assert not [path for path in (tmp_path / "images").rglob("*.sqsh*")]


def test_a_target_that_is_a_file(source: Path, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "images").write_text("mine")
    with pytest.raises(LauncherError, match="a file, not a directory"):
        stage_image(str(source), tmp_path / "images", say=said.append)
    assert (tmp_path / "images").read_text() == "mine"


def test_a_target_that_cannot_be_written(source: Path, said: list[str]) -> None:
    with pytest.raises(LauncherError, match="cannot write /sys/titan-images") as caught:
        stage_image(str(source), Path("/sys/titan-images"), say=said.append)
    assert caught.value.status == ExitStatus.FILESYSTEM


def test_too_little_space_is_found_before_the_first_byte(
    source: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "free_bytes", lambda directory: SIZE)
    with pytest.raises(LauncherError, match=r"3\.15 MB are still needed, 3\.15 MB are free"):
        stage_image(str(source), tmp_path / "images", say=said.append)
    assert sum(path.stat().st_size for path in (tmp_path / "images").rglob("*.sqsh")) == 0


def test_a_disk_that_fills_up_stops_it_and_the_next_call_continues(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    """The kernel's refusal to let a file grow stands in for a full disk: the same place, another number."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(source), str(tmp_path / "images")],
        capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert "File too large" in done.stderr
    (partial,) = (tmp_path / "images" / ".staged" / "partial").iterdir()
    assert partial.stat().st_size == 1 << 20
    assert stage_image(str(source), tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_what_does_not_fit_is_not_continued(source: Path, tmp_path: Path, said: list[str]) -> None:
    partial = tmp_path / "images" / ".staged" / "partial"
    partial.mkdir(parents=True)
    digest = hashlib.sha256(image_bytes()).hexdigest()
    (partial / f"{digest[:24]}.sqsh").write_bytes(b"hsqs" + bytes(1 << 20))
    (partial / "of-another-image.sqsh").write_bytes(bytes(100))
    assert stage_image(str(source), tmp_path / "images", say=said.append).read_bytes() == image_bytes()
    assert "from the beginning" in " ".join(said)
    assert list(partial.iterdir()) == []


def test_two_stagers_at_once_copy_once(source: Path, tmp_path: Path) -> None:
    lines: list[list[str]] = [[], [], []]
    threads = [
        threading.Thread(
            target=stage_image, args=(str(source), tmp_path / "images"), kwargs={"say": line.append}
        )
        for line in lines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verified = [line for said in lines for line in said if line.endswith("verified")]
    assert len(verified) == 1
    assert expected(tmp_path / "images").read_bytes() == image_bytes()


def test_whoever_may_write_into_the_directory_may_stage_into_it(
    source: Path, tmp_path: Path, said: list[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    images.chmod(0o2775)
    stage_image(str(source), images, say=said.append)
    assert mode(images) == 0o2775
    assert mode(images / ".staged") == mode(images / ".staged" / "partial") == 0o2775
    assert mode(images / ".staged" / "lock") == 0o664


# ---------------------------------------------------------------------------------------------------------- the web


@dataclass
class Site:
    """A web server with one image and its description, and what is wrong with it."""

    data: bytes
    about: bytes
    url: str = ""
    cut_after: int = 0  # bytes of an answer, before the connection ends
    cuts: int = 0  # how often
    ranges: bool = True
    refuse: list[int] = field(default_factory=list)  # status codes of the next answers
    stall: bool = False  # after cut_after bytes, for ever
    asked: list[str] = field(default_factory=list)  # "path range" of every request
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def site(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(web, "BACKOFF_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site(source.read_bytes(), sidecar_path(source).read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            site.asked.append(f"{self.path} {wanted}".strip())
            if self.path == "/moved/" + source.name:  # as a release's assets are
                self.send_response(302)
                self.send_header("Location", f"/{source.name}")
                self.end_headers()
                return
            if site.refuse:
                self.send_error(site.refuse.pop(0))
                return
            data = {f"/{source.name}": site.data, f"/{source.name}.json": site.about}.get(
                self.path.replace("/moved", "")
            )
            if data is None:
                self.send_error(404)
                return
            offset = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            self.send_response(206 if offset else 200)
            self.send_header("Content-Length", str(len(data) - offset))
            self.end_headers()
            part = data[offset:]
            if len(part) > site.cut_after and (site.cuts or site.stall):
                site.cuts -= 1
                self.wfile.write(part[: site.cut_after])
                self.wfile.flush()
                if site.stall:
                    site.released.wait()
                self.close_connection = True
                return
            self.wfile.write(part)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/{source.name}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield site
    site.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_release_comes_with_its_description(site: Site, tmp_path: Path, said: list[str]) -> None:
    path = stage_image(site.url.replace("/titan", "/moved/titan"), tmp_path / "images", say=said.append)
    assert path == expected(tmp_path / "images")
    assert path.read_bytes() == image_bytes()
    assert json.loads(sidecar_path(path).read_text()) == json.loads(site.about)
    # There already: only the description is asked for.
    count = len(site.asked)
    stage_image(site.url, tmp_path / "images", say=said.append)
    assert [asked.rsplit(".", 1)[-1] for asked in site.asked[count:]] == ["json"]


def test_a_cut_connection_is_continued_where_it_ended(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.cut_after, site.cuts = 1_200_000, 2
    path = stage_image(site.url, tmp_path / "images", say=said.append)
    assert path.read_bytes() == image_bytes()
    assert [asked.split()[1] for asked in site.asked if " " in asked] == ["bytes=1200000-", "bytes=2400000-"]


def test_a_server_without_ranges_sends_it_all_again(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.cut_after, site.cuts, site.ranges = 2_000_000, 1, False
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_busy_answers_are_tried_again(site: Site, tmp_path: Path, said: list[str]) -> None:
    site.refuse = [503, 429]
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()


def test_a_server_that_never_answers_well_is_given_up_and_continued_later(
    site: Site, tmp_path: Path, said: list[str]
) -> None:
    site.cut_after, site.cuts = 1_000_000, 1

    def fail(seconds: float) -> None:
        """The description and a piece of the image came; from the first wait on there are only errors."""
        site.refuse = [500] * 10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.stage.web.time.sleep", fail)
        with pytest.raises(LauncherError, match="HTTP 500"):
            stage_image(site.url, tmp_path / "images", say=said.append)
    assert not expected(tmp_path / "images").exists()
    site.refuse = []
    site.asked.clear()
    assert stage_image(site.url, tmp_path / "images", say=said.append).read_bytes() == image_bytes()
    assert [asked.split()[1] for asked in site.asked if " " in asked] == ["bytes=1000000-"]


def test_kill_9_leaves_nothing_under_the_final_name_and_the_next_call_continues(
    site: Site, tmp_path: Path, said: list[str]
) -> None:
    site.cut_after, site.stall = 1_500_000, True
    images = tmp_path / "images"
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, site.url, str(images)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not [p for p in images.rglob("partial/*.sqsh") if p.stat().st_size >= 1 << 20]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in images.iterdir()) == [".staged"]
    (partial,) = (images / ".staged" / "partial").iterdir()
    have = partial.stat().st_size
    site.stall = False
    site.asked.clear()
    assert stage_image(site.url, images, say=said.append).read_bytes() == image_bytes()
    assert f"/titan-stable-amd64.sqsh bytes={have}-" in site.asked


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other bytes", "wrong bytes"),
        ("no description", "HTTP 404"),
        ("no checksum", "has no sha256"),
        ("a page", "not a JSON object"),
    ],
)
def test_what_the_description_does_not_prove_is_not_kept(
    what: str, words: str, site: Site, tmp_path: Path, said: list[str]
) -> None:
    url = site.url
    if what == "other bytes":
        site.data = site.data[:-1] + b"!"
    elif what == "no description":
        url = url.replace("stable", "nightly")
    else:
        site.about = b"<html>sign in</html>" if what == "a page" else b'{"schema": 1, "squashfs": {}}'
    with pytest.raises(LauncherError, match=words):
        stage_image(url, tmp_path / "images", say=said.append)
    assert not list(tmp_path.glob("images/**/*.sqsh*"))


@pytest.mark.parametrize(
    "address", ["https://me:secret@host/titan.sqsh", "https://host/titan.sqsh?sig=secret"]
)
def test_a_secret_in_the_address_is_refused_and_not_repeated(
    address: str, tmp_path: Path, said: list[str]
) -> None:
    with pytest.raises(LauncherError) as caught:
        stage_image(address, tmp_path / "images", say=said.append)
    assert "secret" not in f"{caught.value.what} {caught.value.fix} {said}"


def test_nobody_answers(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BACKOFF_S", 0.01)
    with pytest.raises(LauncherError, match="Connection refused"):
        stage_image("http://127.0.0.1:9/titan.sqsh", tmp_path / "images", say=said.append)


# ------------------------------------------------------------------------------------------------------- the engine


@needs_tools
def test_an_image_of_the_engine_is_converted_and_pulled_where_it_is_not_there(
    tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "registry").mkdir()
    with kept_engine() as engine, running_registry(tmp_path / "registry") as registry:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            folder = tarfile.TarInfo("bin")  # without it the engine would give it the time of day
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
            entry = tarfile.TarInfo("bin/sh")
            entry.size, entry.mode = len(program()), 0o755
            archive.addfile(entry, io.BytesIO(program()))
        name = f"{registry}/group/tiny"
        engine.client.api.import_image_from_data(tar.getvalue(), repository=name, tag="1")
        try:
            path = stage_image(f"{name}:1", tmp_path / "images", say=said.append)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.name == f"{digest[:12]}-{registry.replace(':', '-')}-group-tiny-1.sqsh"
            assert sorted(p.name for p in path.parent.iterdir()) == [
                ".staged",
                path.name,
                f"{path.name}.json",
            ]
            assert (mode(path), list((path.parent / ".staged/partial").iterdir())) == (0o644, [])
            engine.client.images.push(name, "1")
        finally:
            engine.client.images.remove(f"{name}:1", force=True)
        try:
            # The same image gives the same bytes, so the same name.
            assert stage_image(f"docker://{name}:1", tmp_path / "images", say=said.append) == path
        finally:
            engine.client.images.remove(f"{name}:1", force=True)
        assert f"pulling {name}:1" in said and f"{path}: already there" in said
        with pytest.raises(LauncherError, match="cannot pull"):
            stage_image(f"{registry}/group/other:1", tmp_path / "images", say=said.append)
        with pytest.raises(LauncherError, match="has no image"):
            stage_image("titan:not-built", tmp_path / "images", say=said.append)


def test_the_command_prints_the_path_that_jobs_refer_to(launch: Launch, source: Path, tmp_path: Path) -> None:
    done = launch("stage", "image", str(source), "--to", str(tmp_path / "images"))
    assert done.returncode == 0 and done.stdout == f"{expected(tmp_path / 'images')}\n", done.stderr
    again = launch("stage", "image", str(source), "--to", str(tmp_path / "images"), "--json")
    assert json.loads(again.stdout)["path"] == done.stdout.strip()
    assert f"launcher submit --image {done.stdout.strip()}" in again.stderr
