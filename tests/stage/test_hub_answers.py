"""What servers answer becomes paths, sizes and memory: whatever they say, no traceback, no file elsewhere, no flood."""

from __future__ import annotations

import gzip
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image.squashfs_file import sidecar_path
from launcher.stage import hub as hub_module
from launcher.stage import s3
from launcher.stage.image import stage_image
from tests.stage.faults import answer, drips, endless, moved, passed, slow
from tests.stage.hub_server import Content, Fault, Handler, Hub
from tests.stage.stage_image import source, url
from tests.stage.test_stage_c4 import stage_c4, train

__all__ = ["source", "url"]  # fixtures
FILE = train(0)[0]
BOMB = answer(gzip.compress(b" " * (1 << 20), 9) * 4096, Content_Encoding="gzip")  # 4 GB of spaces in 4 MB
MEMORY = 3 << 30  # of a whole Python with its libraries, as addresses


WRONG = [
    ({"lfs": {"oid": "../../../victim/a", "size": 4}}, "the sha256 '../../../victim/a'"),
    ({"lfs": {"oid": 7}}, "the sha256 7"),
    ({"lfs": {"oid": "A" * 64}}, "the sha256 'AAA"),
    ({"lfs": "../x"}, "the sha256 '../x'"),
    ({"lfs": None, "oid": "../../victim/a"}, "the git id '../../victim/a'"),
    ({"size": -1}, "the size -1"),
    ({"size": 1 << 60}, "the size 1152921504606846976"),
    ({"size": None}, "the size None"),
    ({"size": True}, "the size True"),
    ({"size": float("nan")}, "the size None"),
    ({"path": None}, "the path None"),
    ({"path": ["en"]}, "the path ['en']"),
    *(
        ({"path": path}, f"the path {path!r}, which would lie outside the target")
        for path in ("../victim/a", "en/../../a", "/etc/a", "en/./a", ".staged/manifest.json", "en/a\nb")
    ),
]


@pytest.mark.parametrize(("said", "words"), WRONG)
def test_fields_of_a_listing(said: dict[str, Any], words: str, hub: Hub, tmp_path: Path) -> None:
    victim = tmp_path / "victim/a-c4-train.00000-of-00012.json.gz"
    victim.parent.mkdir()
    victim.write_text("mine")
    hub.content("allenai/c4", FILE).announced = said
    with pytest.raises(LauncherError, match=re.escape(words)) as caught:
        stage_c4(tmp_path / "d/c4", files=1)
    assert hub.endpoint in caught.value.what and caught.value.status == 3
    assert victim.read_text() == "mine" and not (tmp_path / "d").exists()


PAGE = b"<html>sign in</html>"
ANSWERS = [
    ([answer(PAGE)], "is not JSON"),
    ([answer(b"")], "is not JSON"),
    ([answer(b"[" * 100_000)], "is not JSON"),
    ([answer(b"9" * 10_000)], "is not JSON"),
    ([answer(b'{"sha": 7}')], "the commit 7"),
    ([answer(b'{"sha": "../../victim"}')], "the commit '../../victim'"),
    ([passed, answer(PAGE)], "is not JSON"),
    ([passed, answer(b"{}")], "is no list of files"),
    ([passed, answer(b"[7]")], "is no list of files"),
    ([moved("")] * 6, "HTTP 302"),
    ([moved("file:///etc/passwd")], "address that cannot be used|HTTP 302"),
    ([moved("http://[bad")], "address that cannot be used"),
]


@pytest.mark.parametrize(("answers", "words"), ANSWERS)
def test_an_answer_about_the_repository(answers: list[Fault], words: str, hub: Hub, tmp_path: Path) -> None:
    hub.api_faults = list(answers)
    with pytest.raises(LauncherError, match=words) as caught:
        stage_c4(tmp_path / "c4", files=1)
    assert caught.value.fix and not (tmp_path / "c4").exists()


def test_a_token_follows_to_its_own_server_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed repository is answered with a redirect on the same server, which may be gated."""
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.tokens.add("hf_mine")
    cdn = f"http://localhost:{hub.cdn.server_port}/elsewhere"
    hub.api_faults = [moved("/api/datasets/allenai/c4/revision/main")]
    stage_c4(tmp_path / "c4", files=1)
    assert {r.authorization for r in hub.requests if r.where == "api"} == {"Bearer hf_mine"}
    hub.api_faults = [moved(cdn)]
    with pytest.raises(LauncherError):
        stage_c4(tmp_path / "other", files=1)
    assert {r.authorization for r in hub.requests if r.where == "cdn"} == {""}


CONTENT_FLOODS = {
    "a bomb": (BOMB, "more than the"),
    "a redirect without end": (endless(302), "no dataset|needs a token"),
    "a refusal without end": (endless(503), "HTTP 503"),
    "a file without end": (endless(), "more than the"),
}


@pytest.mark.parametrize("how", CONTENT_FLOODS)
def test_a_flood_in_place_of_a_file_is_bounded(how: str, hub: Hub, workplace: Path) -> None:
    hub.always, words = CONTENT_FLOODS[how]
    code = "import launcher.stage.web as w; w.ATTEMPTS = 2; w.BACKOFF_S = 0; from launcher.cli import main; main()"
    done = run_with_little_memory(code)
    said = " ".join(done.stderr.split())
    assert "Traceback" not in said and re.search(words, said) and done.returncode in (1, 3, 4), done.stderr
    assert not list((workplace / "c4/.staged/partial").iterdir())


def run_with_little_memory(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "stage", "c4", "--to", "c4", "--files", "1", *words],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )


def pages(count: int, pause_s: float = 0) -> Fault:
    """A listing whose every page says that there is another."""

    def fault(handler: Handler, _content: Content, _start: int) -> None:
        entries = [{"type": "file", "path": f"f{n}", "size": 1, "oid": "0" * 40} for n in range(count)]
        link = {"Link": f'<{handler.hub.endpoint}{handler.path}>; rel="next"'}
        time.sleep(pause_s)
        handler.hub.api_faults.append(fault)  # before the answer: the next request may be quick
        handler.answer(200, json.dumps(entries).encode(), link)

    return fault


FLOODS: dict[str, tuple[list[Fault], str]] = {
    "bomb": ([BOMB], "is not JSON"),
    "bomb as a listing": ([passed, BOMB], "is not JSON"),
    "pages without end": ([passed, pages(1000)], "more than 100,000 entries"),
    "empty pages without end": ([passed, pages(0)], "more than 300 entries"),
    "pages that drip": ([passed, pages(0, 0.5)], "no whole listing in 2 s"),
    "a next page nowhere": (
        [passed, answer(b"[]", Link='<http://[bad>; rel="next"')],
        "an address that cannot be used",
    ),
    "a drip": ([drips(b"HTTP/1.1 200 OK\r\n\r\n", b" ")], "less than 1 kB/s"),
}


@pytest.mark.parametrize("how", FLOODS)
def test_a_flood_is_bounded(how: str, hub: Hub, workplace: Path) -> None:
    faults, words = FLOODS[how]
    hub.api_faults = list(faults)
    less = "300" if "empty" in how else str(hub_module.ENTRIES)
    slow = "drip" in how
    code = (
        f"import launcher.stage.hub as h; h.ENTRIES = {less}; h.LISTING_S = {2 if slow else 600}; "
        f"import launcher.stage.web as w; w.BACKOFF_S = 0; w.SLOW_S = {1 if slow else 60}; "
        "from launcher.cli import main; main()"
    )
    done = run_with_little_memory(code)
    assert "Traceback" not in done.stderr and words in done.stderr and done.returncode in (1, 3, 4), done.stderr
    assert not (workplace / "c4").exists()


# ------------------------------------------------------------------------------------------ images, and object storage


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("bytes", -1, "the size -1"),
        ("bytes", 0, "not the description"),
        ("sha256", "../../../victim", "has no sha256"),
    ],
)
def test_the_description_of_an_image(
    field: str, value: object, words: str, url: str, hub: Hub, source: Path, tmp_path: Path
) -> None:
    about = json.loads(sidecar_path(source).read_text())
    about["squashfs"][field] = value
    hub.site[f"/{source.name}.json"] = Content(json.dumps(about).encode())
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(url, tmp_path / "images", say=print)
    assert url in caught.value.what and not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("suffix", "fault", "words"), [(".json", endless(), "has no sha256"), ("", endless(), "more than the")]
)
def test_a_web_server_without_end(
    suffix: str, fault: Fault, words: str, url: str, hub: Hub, source: Path, tmp_path: Path
) -> None:
    hub.faults[f"/{source.name}{suffix}"] = [fault] * 10
    with pytest.raises(LauncherError, match=words):
        stage_image(url, tmp_path / "images", say=print)
    assert not list(tmp_path.glob("images/.staged/partial/*"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"Size": -1}, "the size -1"),
        ({"Key": "c4/../x"}, "the path '../x'"),
        ({"Key": "/etc/x"}, "the path '/etc/x'"),
    ],
)
def test_the_listing_of_a_bucket(entry: dict[str, Any], words: str) -> None:
    class Store:
        def call_s3(self, *_arguments: object, **_options: object) -> dict[str, Any]:
            return {"Contents": [{"Key": "c4/README.md", "Size": 1, "ETag": "x"} | entry]}

    with pytest.raises(LauncherError, match=words) as caught:
        s3.Bucket("s3://bucket/c4", "bucket/c4", Store()).listed("")
    assert "s3://bucket/c4" in caught.value.what


ENTRY = "<Contents><Key>text/c4/f</Key><Size>1</Size></Contents>"
LISTING = f"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>{ENTRY}"
STORE_FLOODS: dict[str, tuple[Fault, str]] = {
    "a listing without end": (endless(), "more than 16 MiB at once"),
    "a refusal without end": (endless(403), "more than 16 MiB at once"),
    "pages without end": (answer(f"{LISTING}</ListBucketResult>".encode()), "more than 30 entries"),
    "a bomb": (BOMB, "the same command continues"),
    "a page that drips": (slow(0.1, 1), "ReadTimeoutError"),
    "a web page": (answer(PAGE), "not there"),
}


@pytest.mark.parametrize("how", STORE_FLOODS)
def test_what_a_store_answers_is_bounded(how: str, hub: Hub, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    fault, words = STORE_FLOODS[how]
    hub.site["/corpora"] = Content(b" " * 1000)
    hub.faults["/corpora"] = [fault] * 2000
    for name, value in {
        "AWS_ENDPOINT_URL": hub.endpoint,
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    code = "import launcher.stage.s3 as s; s.ANSWER_S = 2; s.ENTRIES = 30; from launcher.cli import main; main()"
    done = run_with_little_memory(code, "--from", "s3://corpora/text/c4")
    assert "Traceback" not in done.stderr and words in done.stderr and done.returncode in (1, 3, 4), done.stderr
    assert not (workplace / "c4").exists()
