"""Locks: what the committed ones hold, and how they are made, with uv and an index on this machine."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import data_dir
from launcher.image import ARCHES
from launcher.image import lock as locking
from launcher.image.channels import Channel, channel, channels, lock_path
from launcher.image.lock import lock, pinned
from tests.image.dockerd import served

LOCKS = sorted((data_dir("containers") / "locks").glob("*.txt"))
MADE_UP = Channel("made-up", "for this test", "debian:12-slim", "3.11", ["alpha"], 1.0)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_committed_lock_pins_everything_by_hash_and_knows_no_machine(path: Path) -> None:
    name, _, arch = path.stem.rpartition("-")
    about = channel(name)
    text = path.read_text()
    assert arch in ARCHES
    assert text.startswith(f"# Channel {name}, {arch}, Python {about.python}. Made by: launcher image lock ")
    shape = re.compile(r"#.*|[a-z0-9-]+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    if about.record_urls:
        shape = re.compile(f"{shape.pattern}|[a-z0-9-]+ @ {re.escape(about.torch_index)}\\S+ \\\\")
    assert [line for line in text.splitlines() if not shape.fullmatch(line)] == []
    found = pinned(text)
    for requirement in about.packages:
        assert re.match(r"[a-z0-9-]+", requirement)[0] in found  # type: ignore[index]
    assert found["torchtitan"].startswith("0.2.2" if name == "reference" else "0.3.")
    assert ("nvidia-nccl-cu13" in found) == bool(about.cuda)
    if about.cuda:
        assert found["cuda-toolkit"].startswith(f"{about.cuda}.")


def test_every_channel_from_pypi_has_its_locks() -> None:
    assert list(channels()) == ["nightly", "stable", "reference", "cpu"]
    names = {path.stem for path in LOCKS}
    assert names >= {f"{name}-{arch}" for name in ("stable", "reference") for arch in ARCHES} | {"cpu-amd64"}
    assert lock_path("stable", "arm64") in LOCKS


def test_an_unknown_channel() -> None:
    with pytest.raises(LauncherError, match="there is no channel 'stabel'") as error:
        lock("stabel", "amd64")
    assert error.value.fix == "one of nightly, stable, reference, cpu"
    assert error.value.status is ExitStatus.NOT_FOUND


def test_versions_are_read_from_both_kinds_of_lines() -> None:
    text = (
        "# a comment\nidna==3.10 \\\n    --hash=sha256:00\ntorch-x @ https://i/whl/torch_x-2.16.0.dev1%2Bcu130-cp312-"
        "cp312-manylinux_2_28_x86_64.whl \\\n    --hash=sha256:00\n"
    )
    assert pinned(text) == {"idna": "3.10", "torch-x": "2.16.0.dev1+cu130"}


# ---------------------------------------------------------------------------------------- making them


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package index without hashes, as the nightly one is; and no other index."""
    pytest.importorskip("uv")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    files = tmp_path / "index"
    for name, version, needs in (("alpha", "1.0+cu130", "beta"), ("alpha", "0.9", "beta"), ("beta", "2.0", "")):
        wheel = f"{name}-{version}-py3-none-any.whl"
        folder = files / "simple" / name
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            info = f"{name}-{version}.dist-info"
            archive.writestr(f"{name}.py", "")
            archive.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                + (f"Requires-Dist: {needs}\n" if needs else ""),
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        links = "".join(f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>\n' for path in folder.glob("*.whl"))
        (folder / "index.html").write_text(links)
    with served(files) as address:
        yield f"{address}simple"


def digest(folder: Path, wheel: str) -> str:
    return hashlib.sha256(next(folder.rglob(wheel)).read_bytes()).hexdigest()


def test_a_lock_of_a_channel_that_records_addresses(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ["alpha", "beta"]
    about = replace(MADE_UP, packages=both, torch_index=index, from_torch_index=both, record_urls=True)
    monkeypatch.setattr(locking, "channel", lambda name: about)
    target = lock("made-up", "amd64", output=tmp_path / "locks" / "new.txt")
    assert target.read_text().splitlines() == [
        "# Channel made-up, amd64, Python 3.11. Made by: launcher image lock made-up --arch amd64",
        f"alpha @ {index}/alpha/alpha-1.0%2Bcu130-py3-none-any.whl \\",
        f"    --hash=sha256:{digest(tmp_path, 'alpha-1.0+cu130-*.whl')}",
        f"beta @ {index}/beta/beta-2.0-py3-none-any.whl \\",
        f"    --hash=sha256:{digest(tmp_path, 'beta-2.0-*.whl')}",
    ]
    assert pinned(target.read_text()) == {"alpha": "1.0+cu130", "beta": "2.0"}


def test_a_lock_of_versions_computes_the_hashes_that_the_index_lacks(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", index)  # a mirror in the place of PyPI
    monkeypatch.setattr(locking, "channel", lambda name: MADE_UP)
    text = lock("made-up", "arm64", output=tmp_path / "new.txt").read_text()
    assert text.splitlines()[1:] == [
        "alpha==1.0+cu130 \\",
        f"    --hash=sha256:{digest(tmp_path, 'alpha-1.0+cu130-*.whl')}",
        "beta==2.0 \\",
        f"    --hash=sha256:{digest(tmp_path, 'beta-2.0-*.whl')}",
    ]


class Fails(NamedTuple):
    code: str
    what: str
    fix: str
    packages: list[str]
    at: str = ""  # an index in the place of the one that answers
    blocked: str = "x"  # what is a file where a directory is needed
    path: str = ""  # PATH, where not the usual one


@pytest.mark.parametrize(
    "case",
    [
        Fails("lock-unsolvable", "no set of packages satisfies alpha>=2", "channels.toml", ["alpha>=2"]),
        Fails("index-silent", "index http://127.0.0.1:9", "CHANNEL=stable", ["alpha"], "http://127.0.0.1:9/whl"),
        Fails("lock-failed", "uv made no lock", "UV_", ["alpha"], blocked="cache"),
        Fails("unwritable", "cannot write", "", ["alpha"], blocked="locks"),
        Fails(
            "package-missing",
            "locks are made with uv, which is not",
            "titan-launcher[image]",
            ["alpha"],
            path="/nowhere",
        ),
    ],
    ids=lambda case: case.code,
)
def test_locks_that_cannot_be_made(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Fails) -> None:
    (tmp_path / case.blocked).write_text("")
    if case.path:
        monkeypatch.setenv("PATH", case.path)
        monkeypatch.setattr("sys.executable", f"{case.path}/python")
    own = ["alpha", "beta"]
    about = replace(MADE_UP, packages=[*case.packages, "beta"], torch_index=case.at or index, from_torch_index=own)
    monkeypatch.setattr(locking, "channel", lambda name: replace(about, cuda="13"))
    with pytest.raises(LauncherError, match=case.what) as error:
        lock("made-up", "amd64", output=tmp_path / "locks" / "new.txt")
    assert (error.value.code, case.fix in error.value.fix) == (case.code, True), error.value.original
    assert not (tmp_path / "locks" / "new.txt").exists()
    assert (error.value.status is ExitStatus.FILESYSTEM) == (case.code == "unwritable")
