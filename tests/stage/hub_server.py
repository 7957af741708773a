"""A Hugging Face Hub on loopback: what staging asks of it, answered from files, with faults on demand.

Two servers, as in reality: the Hub itself, and the content servers that it redirects large files to, under another
host name. Large files are those that C4 and models keep in Git LFS. As a program it serves one C4 directory:

    python -m tests.stage.hub_server C4_DIRECTORY      prints HF_ENDPOINT=...
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 1000  # entries of a folder in one answer
LARGE = (".gz", ".safetensors", ".model")
KINDS = {"datasets": "dataset", "models": "model"}
GATED_WORDS = {
    "none": "Access to model {0} is restricted and you are not in the authorized list. Visit https://hub/{0}.",
    "pending": "Your request to access model {0} is awaiting a review from the repo authors.",
    "rejected": "Your request to access model {0} has been rejected by the repo's authors.",
    "fine": "Please enable access to public gated repositories in your fine-grained token settings.",
}


@dataclass
class Content:
    """A file's bytes, in memory or on disk, and what the Hub says about them."""

    data: bytes | Path
    announced: dict[str, Any] = field(default_factory=dict)  # other words than the truth, for bad servers
    has_length: bool = True  # whether an answer says its Content-Length

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.read(), usedforsecurity=False).hexdigest()

    def read(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()


@dataclass
class Request:
    """One request as it came, for a test to look at."""

    path: str  # of the file, or of the API
    where: str  # "api", "hub" or "cdn"
    authorization: str
    range: str


Fault = Callable[["Handler", Content, int], bool | None]  # answers itself, unless it returns False


class Hub:
    """Repositories, tokens, faults, and the log of what was asked."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Content]] = {}
        self.commits: dict[tuple[str, str], str] = {}
        self.site: dict[str, Content] = {}  # what it has besides, as any web server, by the path of its address
        self.gated: dict[str, dict[str, str]] = {}  # repository -> token -> "ok" or a key of GATED_WORDS
        self.tokens: set[str] = set()
        self.faults: dict[str, list[Fault]] = defaultdict(list)  # file's path -> one for each answer
        self.api_faults: list[Fault] = []
        self.always: Fault | None = None  # for every file
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.closed = False  # faults that never end do then
        self.hub = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "hub"))
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, "cdn"))
        for server in (self.hub, self.cdn):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def add(self, kind: str, name: str, files: Mapping[str, bytes | Path], revision: str = "a" * 40) -> None:
        self.repos[kind, name] = {path: Content(data) for path, data in files.items()}
        self.commits[kind, name] = revision

    def content(self, name: str, path: str) -> Content:
        return next(files for (_, repo), files in self.repos.items() if repo == name)[path]

    def asked(self, path: str, where: str = "") -> list[Request]:
        """The requests for content of a file."""
        return [r for r in self.requests if r.path == path and where in ("", r.where)]

    def close(self) -> None:
        self.closed = True
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    where: str

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.where == "cdn":
                return self._cdn(path, url.query)
            if match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/(revision|tree)/(.*)", path):
                return self._api(KINDS[match[1]], match[2], match[3], match[4], url.query)
            if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
                kind = "dataset" if match[1] else "model"
                return self._resolve(kind, match[2], match[3], match[4])
            self._log(path, "site")
            if path in self.hub.site:
                return self._content(path, self.hub.site[path], {})
            self.answer(404, b"", {})

    def _log(self, path: str, where: str) -> None:
        with self.hub.lock:
            self.hub.requests.append(
                Request(path, where, self.headers.get("Authorization") or "", self.headers.get("Range") or "")
            )

    def answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuses(self, kind: str, name: str, revision: str, content: bool) -> bool:
        """Answers the refusals of the real Hub: metadata of gated repositories is public, content is not."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        state = self.hub.gated[name].get(token, "none") if content and name in self.hub.gated else "ok"
        status, code, words = 200, "", ""
        if token and token not in self.hub.tokens:
            status, words = 401, "Invalid credentials in Authorization header"
        elif (kind, name) not in self.hub.repos:
            status, code, words = 404 if token else 401, "RepoNotFound", "Repository not found"
        elif state != "ok":
            status, code = 403 if token else 401, "" if state == "fine" else "GatedRepo"
            words = GATED_WORDS[state].format(name)
        elif revision not in ("main", self.hub.commits[kind, name]):
            status, code, words = 404, "RevisionNotFound", f"Invalid rev id: {revision}"
        if status != 200:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": words})
        return status != 200

    def _api(self, kind: str, name: str, what: str, rest: str, query: str) -> None:
        self._log(f"{name} {what}", "api")
        with self.hub.lock:
            fault = self.hub.api_faults.pop(0) if self.hub.api_faults else None
        if fault is not None and fault(self, Content(b""), 0) is not False:
            return
        revision, _, folder = rest.partition("/")
        if self._refuses(kind, name, revision, content=False):
            return
        if what == "revision":
            self._json({"id": name, "sha": self.hub.commits[kind, name], "private": False, "tags": [], "siblings": []})
            return
        asked = parse_qs(query)
        recursive = asked.get("recursive", [""])[0].lower() == "true"
        entries = _listing(self.hub.repos[kind, name], folder, recursive)
        start = int(asked.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            here = f"{self.hub.endpoint}{self.path.split('?')[0]}"
            headers["Link"] = f'<{here}?recursive={recursive}&expand=False&cursor={start + PAGE}>; rel="next"'
        self._json(entries[start : start + PAGE], headers)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        self._log(path, "hub")
        if self._refuses(kind, name, revision, content=True):
            return
        content = self.hub.repos[kind, name].get(path)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        commit = {"X-Repo-Commit": self.hub.commits[kind, name]}
        if not path.endswith(LARGE):
            self._content(path, content, commit | {"ETag": f'"{content.git}"'})
            return
        place = f"http://localhost:{self.hub.cdn.server_port}/{quote(path)}?Signature=secret-of-the-cdn"
        self.answer(302, b"", commit | {"Location": place, "ETag": f'"{content.sha256}"'})

    def _cdn(self, path: str, query: str) -> None:
        path = path.lstrip("/")
        self._log(path, "cdn")
        found = [files[path] for files in self.hub.repos.values() if path in files]
        if not found or "Signature" not in query:
            self.answer(403, b"", {})
            return
        self._content(path, found[0], {"ETag": f'"{found[0].sha256}"'})

    def _content(self, path: str, content: Content, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        with self.hub.lock:
            queue = self.hub.faults[path]
            fault = queue.pop(0) if queue else self.hub.always
        if fault is not None and fault(self, content, start) is not False:
            return
        if start >= content.size and match:
            self.answer(416, b"", {"Content-Range": f"bytes */{content.size}"})
            return
        self.begin(content, start, headers)
        if isinstance(content.data, bytes):
            self.wfile.write(content.data[start:])
        else:
            self.wfile.flush()
            with open(content.data, "rb") as stream:
                while sent := os.sendfile(self.connection.fileno(), stream.fileno(), start, 1 << 24):
                    start += sent

    def begin(self, content: Content, start: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(206 if start else 200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        if content.has_length:
            self.send_header("Content-Length", str(content.size - start))
        else:
            self.close_connection = True
        if start:
            self.send_header("Content-Range", f"bytes {start}-{content.size - 1}/{content.size}")
        self.end_headers()


def _handler(hub: Hub, where: str) -> type[Handler]:
    return type(f"_{where.capitalize()}Handler", (Handler,), {"hub": hub, "where": where})


def _entry(path: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": content.size}
    if path.endswith(LARGE):  # the oid is that of the pointer, which nobody looks at
        entry |= {"oid": "0" * 40, "lfs": {"oid": content.sha256, "size": content.size, "pointerSize": 134}}
    else:
        entry["oid"] = content.git
    return entry | content.announced


def _listing(files: Mapping[str, Content], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    entries, folders = [], set()
    for path, content in sorted(files.items()):
        rest = path.removeprefix(prefix)
        if not path.startswith(prefix):
            continue
        if "/" in rest and not recursive:
            folders.add(prefix + rest.split("/")[0])
        else:
            entries.append(_entry(path, content))
    return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]


def main() -> None:
    directory = Path(sys.argv[1])
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    hub = Hub()
    hub.add("dataset", "allenai/c4", {str(path.relative_to(directory)): path for path in paths})
    for content in hub.repos["dataset", "allenai/c4"].values():
        _ = content.sha256
    print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
    sys.stdin.read()  # until whoever started it goes away


if __name__ == "__main__":
    main()
