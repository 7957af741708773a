"""What servers answer becomes paths, sizes and memory: whatever they say, no traceback, no file elsewhere, no flood."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.cli import main
from launcher.image.squashfs_file import sidecar_path
from launcher.stage import s3, web
from launcher.stage.image import stage_image
from tests.conftest import limited
from tests.stage.conftest import reader
from tests.stage.faults import answer, drips, endless, moved, passed
from tests.stage.hub_server import Content, Fault, Handler, Hub
from tests.stage.stage_image import source, url
from tests.stage.test_stage_c4 import stage_c4, train

__all__ = ["source", "url"]  # fixtures
FILE = train(0)[0]
BOMB = answer(gzip.compress(b" " * (1 << 20), 9) * 4096, Content_Encoding="gzip")  # 4 GB of spaces in 4 MB

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


def pages(count: int, pause_s: float = 0) -> Fault:
    """A listing whose every page says that there is another."""

    def fault(handler: Handler, _content: Content, _start: int) -> None:
        entries = [{"type": "file", "path": f"f{n}", "size": 1, "oid": "0" * 40} for n in range(count)]
        link = {"Link": f'<{handler.hub.endpoint}{handler.path}>; rel="next"'}
        time.sleep(pause_s)
        handler.hub.api_faults.append(fault)  # before the answer: the next request may be quick
        handler.answer(200, json.dumps(entries).encode(), link)

    return fault


def listed(key: str, size: str = "1") -> bytes:
    """A page of a bucket, which says that there is another."""
    entry = f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>"
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
    return f"<ListBucketResult>{more}{entry}</ListBucketResult>".encode()


STORE = ["c4", "--files", "1", "--from", "s3://corpora/text/c4"]
DRIP = drips(b"HTTP/1.1 200 OK\r\n\r\n", b" ")
FLOODS: dict[str, tuple[str, list[Fault], str]] = {  # where, what comes, and the words about it
    "a bomb": ("api", [BOMB], "is not JSON"),
    "a bomb as a listing": ("api", [passed, BOMB], "is not JSON"),
    "pages without end": ("api", [passed, pages(1000)], "more than 300 entries"),
    "empty pages without end": ("api", [passed, pages(0)], "more than 300 entries"),
    "pages that drip": ("api", [passed, pages(0, 0.5)], "no whole listing in 2 s"),
    "a next page nowhere": ("api", [passed, answer(b"[]", Link='<http://[bad>; rel="next"')], "cannot be used"),
    "a drip": ("api", [DRIP], "less than 1 kB/s"),
    "a bomb as a file": (FILE, [BOMB], "more than the"),
    "a redirect without end": (FILE, [endless(302)], "no dataset|needs a token"),
    "a refusal without end": (FILE, [endless(503)], "HTTP 503"),
    "a file without end": (FILE, [endless()], "more than the"),
    "a description without end": ("/titan-stable-amd64.sqsh.json", [endless()], "has no sha256"),
    "an image without end": ("/titan-stable-amd64.sqsh", [endless()], "more than the"),
    "a listing of a store": ("/corpora", [endless()], "more than 16 MiB at once"),
    "a refusal of a store": ("/corpora", [endless(403)], "access denied"),
    "pages of a store": ("/corpora", [answer(listed("text/c4/f"))], "more than 300 entries"),
    "a bomb of a store": ("/corpora", [BOMB], "no whole list in XML"),
    "a drip of a store": ("/corpora", [DRIP], "less than 1 kB/s"),
    "a web page as a store": ("/corpora", [answer(PAGE)], "not there"),
}


@pytest.mark.parametrize("how", FLOODS)
def test_a_flood_is_bounded(how: str, hub: Hub, url: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, answers, words = FLOODS[how]
    hub.faults[where] = answers * 1000
    hub.api_faults = list(answers) if where == "api" else []
    command = ["c4", "--files", "1"]
    if where.startswith("/"):
        command = STORE if where == "/corpora" else ["image", url]
        hub.site.setdefault(where, Content(b" " * 1000))
        reader(monkeypatch, hub.endpoint)
    limit = 2 if "drip" in how else 600
    for name, value in {"ATTEMPTS": 2, "BACKOFF_S": 0, "SLOW_S": limit, "ENTRIES": 300, "LISTING_S": limit}.items():
        monkeypatch.setattr(web, name, value)
    done = limited(main, ["launcher", "stage", *command, "--to", "to"])
    said = " ".join(done.stderr.split())
    assert "Traceback" not in said and re.search(words, said) and done.returncode in (1, 3, 4), said
    assert not [
        *(path for pattern in ("en/*", "*.sqsh*", ".staged/partial/*") for path in workplace.glob(f"to/{pattern}"))
    ]


# ------------------------------------------------------------------------------------------ images, and object storage


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("bytes", -1, "the size -1"),
        ("bytes", 0, "not the description"),
        ("sha256", "../../../victim", "has no sha256"),
    ],
)
def test_the_description_of_an_image(field: str, value: object, words: str, url: str, hub, source, tmp_path) -> None:
    about = json.loads(sidecar_path(source).read_text())
    about["squashfs"][field] = value
    hub.site[f"/{source.name}.json"] = Content(json.dumps(about).encode())
    with pytest.raises(LauncherError, match=words) as caught:
        stage_image(url, tmp_path / "images", say=print)
    assert url in caught.value.what and not (tmp_path / "images").exists()


SAYS = b"<Error><Code>ExpiredToken</Code><Message>The token has expired</Message></Error>"
STORES: list[tuple[Fault, str, str]] = [  # what comes, the words about it, and the store's own
    (answer(listed("text/c4/f", "-1")), "the size None", ""),
    (answer(listed("text/c4/../x")), "the path '../x'", ""),
    (answer(listed("/etc/x")), "the path '/etc/x'", ""),
    (answer(b"", 403), "access denied", ""),
    (answer(SAYS, 400), "access denied", "ExpiredToken: The token has expired"),
    (answer(SAYS.replace(b"Token", b""), 400), "HTTP 400", "Expired: The token has expired"),
    (answer(b'<?xml version="1.0" encoding="foo-bar"?><a/>'), "no whole list in XML", ""),
    (answer(listed("text/c4/f").replace(b"<NextContinuationToken>t", b"<NextContinuationToken>")), "no whole list", ""),
    (answer(b"zz\r\n", 403, Transfer_Encoding="chunked"), "access denied", ""),
    (answer(b"", 301, x_amz_bucket_region="mars-1"), "HTTP 301", ""),
]


@pytest.mark.parametrize(("fault", "words", "original"), STORES)
def test_what_a_store_says(fault: Fault, words: str, original: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("botocore")
    reader(monkeypatch, hub.endpoint)
    signed: list[str] = []

    def recorded(handler: Handler, content: Content, start: int) -> bool | None:
        signed.append(handler.path)
        return fault(handler, content, start)

    hub.site["/corpora"] = Content(b" ")
    hub.faults["/corpora"] = [recorded] * 9
    with pytest.raises(LauncherError, match=words) as caught:
        s3.open_bucket("s3://corpora/text/c4")
    assert "s3://corpora/text/c4" in caught.value.what and original in caught.value.original
    assert "Signature" not in f"{caught.value} {caught.value.original}"
    assert ("mars-1" in signed[-1]) == (words == "HTTP 301")  # asked again, there
