"""C4 from object storage: a real S3 server (moto's), and what it vouches for."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.stage import s3, web
from launcher.stage.c4 import plan_c4
from launcher.stage.fetch import Outcome, fetch
from launcher.stage.inventory import verify
from tests.conftest import Launch
from tests.stage.conftest import reader
from tests.stage.test_stage_c4 import stage_c4

pytest.importorskip("botocore")
moto_server = pytest.importorskip("moto.server")

BUCKET, PREFIX = "corpora", "text/c4"
ADDRESS = f"s3://{BUCKET}/{PREFIX}"
FIRST = "en/c4-train.00000-of-00012.json.gz"


@dataclass
class Store:
    """The server, with an administrator's client."""

    endpoint: str
    client: Any

    def put(self, path: str, data: bytes, **options: Any) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{path}", Body=data, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def store(server: str, workplace: Path, c4_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import boto3

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    reader(monkeypatch, server)
    monkeypatch.setattr(web, "BACKOFF_S", 0)
    store = Store(server, boto3.client("s3"))
    store.client.create_bucket(Bucket=BUCKET)
    for path, data in c4_files.items():
        store.put(path, data)
    yield store
    found = store.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    for entry in found:
        store.client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    store.client.delete_bucket(Bucket=BUCKET)


def staged(target: Path, files: int = 3, **options: Any) -> Outcome:
    outcome: Outcome = stage_c4(target, 4, source=ADDRESS, files=files, **options)
    return outcome


def test_what_is_asked_for_arrives_verified(store: Store, launch: Launch, c4_files: dict[str, bytes], tmp_path) -> None:
    target = tmp_path / "c4"
    words = ("--files", "3", "--validation", "--to", str(target), "--json")
    done = launch("stage", "c4", "--from", ADDRESS, *words)
    assert done.returncode == 0 and "very-secret" not in done.stdout + done.stderr
    assert json.loads(done.stdout)["source"] == ADDRESS and json.loads(done.stdout)["downloaded"] == 5
    expected = {path for path in c4_files if path == "README.md" or "validation" in path} | {
        f"en/c4-train.{index:05d}-of-00012.json.gz" for index in range(3)
    }
    assert {str(p.relative_to(target)) for p in target.rglob("*.*") if ".staged" not in p.parts} == expected
    assert all((target / path).read_bytes() == c4_files[path] for path in expected)
    report = verify(target, deep=True)
    assert not report.problems
    assert (report.manifest.source, report.manifest.train_files_in_all) == (ADDRESS, 12)
    assert f"--from {ADDRESS}" in report.repair
    again = staged(target, 4, validation=True)
    assert (again.present, again.downloaded) == (5, 1)


def test_a_staged_directory_in_a_bucket_brings_its_checksums(store: Store, tmp_path, c4_files) -> None:
    """`aws s3 sync` of a staged directory takes its manifest along: revision and sha256 are the Hub's then."""
    staged(tmp_path / "first", 2)
    manifest = json.loads((tmp_path / "first/.staged/manifest.json").read_text())
    manifest["revision"] = "a" * 40
    store.put(".staged/manifest.json", json.dumps(manifest).encode())
    assert staged(tmp_path / "c4", 2).manifest.revision == "a" * 40
    # Replaced by whoever may write there: of the same size, so only the manifest knows.
    data = bytearray(c4_files[FIRST])
    data[-1] ^= 1
    store.put(FIRST, bytes(data))
    with pytest.raises(LauncherError, match="wrong bytes twice"):
        staged(tmp_path / "other", 2)
    assert not (tmp_path / "other" / FIRST).exists()
    store.put(FIRST, b"short")
    with pytest.raises(LauncherError, match=r"5 bytes, and .* in the bucket's own"):
        staged(tmp_path / "third", 2)


def test_without_a_manifest_it_is_said_that_sizes_alone_are_compared(store: Store, tmp_path: Path) -> None:
    plan = plan_c4(tmp_path / "c4", source=ADDRESS, files=1)
    assert plan.notes[-1].startswith("2 files not in s3://")
    fetch(tmp_path / "c4", plan.repo, plan.files, "c4", 1, 12)
    # A file of the right size that was put there by somebody may be anything; what was staged is known.
    other = tmp_path / "other" / FIRST
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes((tmp_path / "c4" / FIRST).stat().st_size))
    assert (
        staged(tmp_path / "other", 1).downloaded == 2 and other.read_bytes() == (tmp_path / "c4" / FIRST).read_bytes()
    )
    os.utime(tmp_path / "c4" / FIRST, (4e9, 4e9))
    assert staged(tmp_path / "c4", 1).downloaded == 0
    store.put(FIRST, bytes(other.stat().st_size))  # another object, of the same size
    assert staged(tmp_path / "c4", 1).downloaded == 2 and not any((tmp_path / "c4" / FIRST).read_bytes())


def test_an_object_replaced_meanwhile_does_not_arrive_as_the_old_one(store: Store, c4_files, tmp_path) -> None:
    """Another size is found; with a manifest, any other byte."""
    plan = plan_c4(tmp_path / "c4", source=ADDRESS, files=1)
    for data in (c4_files[FIRST] + b"more", b"less"):
        store.put(FIRST, data)
        with pytest.raises(LauncherError, match="has changed meanwhile"):
            fetch(tmp_path / "c4", plan.repo, plan.files, "c4", 1, 12)
    assert not (tmp_path / "c4" / FIRST).exists() and not list((tmp_path / "c4/.staged/partial").iterdir())


def test_large_objects_come_whole(store: Store, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(11 << 20)
    store.put(FIRST, data)
    assert staged(tmp_path / "c4", 1).downloaded == 2
    assert (tmp_path / "c4" / FIRST).read_bytes() == data


def refusal(address: str = ADDRESS) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        s3.open_bucket(address)
    assert caught.value.fix
    assert "very-secret" not in f"{caught.value.what} {caught.value.original}"
    return caught.value


def test_what_a_store_refuses(store: Store, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("s3://nothing-here/c4", f"s3://{BUCKET}/text/c5"):
        assert refusal(address).status == ExitStatus.NOT_FOUND
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = refusal()
    assert "no connection to the store" in error.what and "AWS_ENDPOINT_URL" in error.fix
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials" in refusal().what
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in refusal().original
    (workplace / "home/.aws").mkdir()
    (workplace / "home/.aws/config").write_text("[profile nobody]\ncredential_process = /no/such/program\n")
    assert "no credentials" in refusal().what and "/no/such/program" in refusal().original
    monkeypatch.setitem(sys.modules, "botocore.config", None)
    assert "botocore, which is not installed" in refusal().what and "titan-launcher[s3]" in refusal().fix


def test_credentials_and_endpoint_come_from_the_profile(store: Store, workplace: Path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (workplace / "home/.aws").mkdir()
    (workplace / "home/.aws/config").write_text(
        f"[profile site]\nendpoint_url = {store.endpoint}\nregion = us-east-1\n"
        "aws_access_key_id = reader\naws_secret_access_key = very-secret\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "site")
    assert len(s3.open_bucket(ADDRESS)[1]) == 15


@pytest.mark.parametrize("address", ["s3://", "s3://key:secret@corpora/c4", "s3://corpora/../c4", "s3://corpora/c 4"])
def test_not_an_address(address: str) -> None:
    assert "not an address" in refusal(address).what


def test_an_address_that_has_expired_is_made_anew(store: Store, c4_files, tmp_path, monkeypatch) -> None:
    """Each attempt has its own."""
    asked: list[str] = []
    real = web._open

    def cut(url: str, *arguments: Any) -> Any:
        asked.append(url)
        if FIRST in url and len([one for one in asked if FIRST in one]) == 1:
            raise ConnectionResetError
        return real(url, *arguments)

    monkeypatch.setattr(web, "_open", cut)
    made = iter(range(99))
    real_address = s3.Bucket._address
    monkeypatch.setattr(s3.Bucket, "_address", lambda *a, **k: f"{real_address(*a, **k)}&n={next(made)}")
    assert staged(tmp_path / "c4", 1).downloaded == 2
    of_it = [url for url in asked if FIRST in url]
    assert len(of_it) == len(set(of_it)) == 2


def test_no_c4_there(store: Store) -> None:
    store.client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/README.md")
    with pytest.raises(LauncherError, match=r"has no README\.md") as caught:
        plan_c4(Path("c4"), source=ADDRESS, files=1)
    assert "aws s3 sync" in caught.value.fix
