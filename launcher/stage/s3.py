"""Object storage as a place that C4's files come from, or are streamed from in a job: s3://bucket/prefix.

Through s3fs, which finds endpoint, region and credentials where every S3 client does: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID, ~/.aws, the machine's own role. Never on a command line.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.config.spec import S3_ADDRESS
from launcher.stage.manifest import LARGEST, Manifest, parse_manifest
from launcher.stage.receive import Sink
from launcher.stage.source import Checksums, check_answer
from launcher.stage.target import STATE

PIECE = 8 << 20  # bytes of one request; each of the files at once holds one in memory
MD5 = re.compile(r"([0-9a-f]{32})(?:-(\d+))?")


@dataclass(frozen=True)
class S3File:
    """An object. `sha256` is known from the manifest in the bucket, where a staged directory was copied there."""

    path: str  # below the prefix
    bytes: int
    etag: str
    bucket: Bucket = field(repr=False, compare=False)
    sha256: str = ""

    @property
    def digest(self) -> str:
        return self.sha256 or hashlib.sha256(f"{self.etag} {self.bytes}".encode()).hexdigest()

    def digests(self) -> ObjectChecksums:
        """Asks the store how the object was uploaded, unless its sha256 is known: that decides what its ETag is."""
        if self.sha256:
            return ObjectChecksums(None, 0)
        part, is_md5 = self.bucket.upload_of(self)
        return ObjectChecksums("md5" if is_md5 else "gzip" if self.path.endswith(".gz") else None, part)


class ObjectChecksums:
    """sha256, and what an ETag is made of: the md5, or of an upload in parts the md5 of the parts' md5s.

    Where the store encrypts with keys of its own the ETag is no checksum. Then the CRC-32 that every gzip file ends
    with tells whether it is whole.
    """

    def __init__(self, kind: str | None, part_bytes: int) -> None:
        self.sha256 = hashlib.sha256()
        self._kind = kind
        self._part_bytes = part_bytes  # 0: uploaded as a whole
        self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0
        self._parts: list[bytes] = []
        self._gzip = zlib.decompressobj(wbits=31)
        self._gzip_sound = True

    def update(self, chunk: bytes | memoryview) -> None:
        self.sha256.update(chunk)
        if self._kind == "gzip":
            self._inflate(chunk)
        view = memoryview(chunk)
        while self._kind == "md5" and view:
            room = self._part_bytes - self._in_part if self._part_bytes else len(view)
            self._part.update(view[:room])
            self._in_part += len(view[:room])
            view = view[room:]
            if self._in_part == self._part_bytes:
                self._end_part()

    def _end_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0

    def _inflate(self, chunk: bytes | memoryview) -> None:
        try:
            data = bytes(chunk)
            while data:
                if self._gzip.eof:  # files of several members are gzip files, too
                    self._gzip = zlib.decompressobj(wbits=31)
                self._gzip.decompress(data, PIECE)  # no more of it at once, whatever it inflates to
                data = self._gzip.unconsumed_tail or self._gzip.unused_data
        except zlib.error:
            self._gzip_sound = False

    def match(self, file: S3File) -> bool:
        """Whether the bytes are the object's, by the best that is known of it; at the least they are as many."""
        if file.sha256:
            return self.sha256.hexdigest() == file.sha256
        if self._kind == "gzip":
            return self._gzip_sound and self._gzip.eof
        return self._kind is None or self._etag() == file.etag

    def _etag(self) -> str:
        if not self._part_bytes:
            return self._part.hexdigest()
        parts = [*self._parts, self._part.digest()] if self._in_part else self._parts
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket. `revision` is that of the data set where the bucket says it, else a checksum of the
    list.
    """

    source: str
    root: str  # bucket/prefix, as s3fs writes it
    store: Any = field(repr=False, compare=False)  # s3fs.S3FileSystem
    revision: str = ""

    def upload_of(self, file: S3File) -> tuple[int, bool]:
        """Bytes of each part (0: uploaded as a whole), and whether the ETag is made of md5s."""
        match = MD5.fullmatch(file.etag)
        if match is None:
            return 0, False
        part = {"PartNumber": 1} if match[2] else {}
        bucket, _, key = f"{self.root}/{file.path}".partition("/")
        head = self._asked(lambda: self.store.call_s3("head_object", Bucket=bucket, Key=key, **part), file.path)
        plain = head.get("ServerSideEncryption") in (None, "AES256") and not head.get("SSECustomerAlgorithm")
        return (int(head["ContentLength"]) if match[2] else 0), plain

    def download(
        self, file: S3File, stream: io.FileIO, on_bytes: Callable[[int], None], stop: threading.Event
    ) -> Checksums:
        """Brings `file` into `stream`, continuing what is there. s3fs and botocore repeat what may pass by itself."""
        sink = Sink(stream, file, on_bytes, stop)
        sink.take_existing()
        if sink.size > file.bytes:
            sink.restart()
        while sink.size < file.bytes:
            sink.take(io.BytesIO(self._piece(file, sink.size, min(sink.size + PIECE, file.bytes))))
        return sink.digests

    def head(self, file: S3File, count: int) -> bytes:
        """The first `count` bytes of an object, or all of a shorter one."""
        return self._piece(file, 0, min(count, file.bytes)) if file.bytes else b""

    def _piece(self, file: S3File, start: int, end: int) -> bytes:
        chunk: bytes = self._asked(
            lambda: self.store.cat_file(f"{self.root}/{file.path}", start=start, end=end), file.path
        )
        if len(chunk) != end - start:
            raise LauncherError(
                f"{self.source}/{file.path}: has changed or ends too early",
                "the same command tries again",
                status=ExitStatus.ERROR,
            )
        return chunk

    def _asked(self, call: Callable[[], Any], path: str = "") -> Any:
        try:
            return call()
        except Exception as error:  # of s3fs, botocore and aiohttp, which have no common root
            raise _refused(error, f"{self.source}/{path}" if path else self.source) from error

    def listed(self, folder: str) -> list[S3File]:
        """The objects directly in `folder` ("": the prefix itself), by path; none where there is no such folder."""
        try:
            found = self._asked(lambda: self.store.ls(f"{self.root}/{folder}".rstrip("/"), detail=True, refresh=True))
        except LauncherError as error:
            if error.status == ExitStatus.NOT_FOUND and folder:
                return []
            raise
        files = []
        for entry in found:
            path = str(entry.get("name")).removeprefix(f"{self.root}/")
            if entry.get("type") != "file" or path.endswith("/"):  # folders, and the empty objects that stand for them
                continue
            check_answer(self.source, path=path, size=entry.get("size"))
            files.append(S3File(path, entry["size"], str(entry.get("ETag", "")).strip('"'), self))
        return sorted(files, key=lambda file: file.path)

    def manifest(self) -> Manifest | None:
        """The one of the staged directory that was copied into the bucket, if there is one."""
        try:
            data = self._asked(lambda: self.store.cat_file(f"{self.root}/{STATE}/manifest.json", start=0, end=LARGEST))
        except LauncherError as error:
            if error.status == ExitStatus.NOT_FOUND:
                return None
            raise
        found = parse_manifest(data)
        if found is None or found.kind != "c4":
            raise LauncherError(
                f"{self.source}/{STATE}/manifest.json: damaged, or not of C4",
                "copy it again from the staged directory, or remove it: then the objects' ETags count",
            )
        return found


def open_bucket(address: str) -> tuple[Bucket, list[S3File], list[S3File]]:
    """The bucket, the objects at its prefix, and those in its folder `en`. Raises LauncherError."""
    match = S3_ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise LauncherError(
            f"{address[:120]!r}: not an address of object storage",
            "s3://bucket/prefix; credentials and endpoint come from AWS_PROFILE, AWS_ENDPOINT_URL or ~/.aws",
        )
    root = match[1] + match[2]
    bucket = Bucket(f"s3://{root}", root, _store())
    top, en = bucket.listed(""), bucket.listed("en")
    manifest = bucket.manifest()
    revision = manifest.revision if manifest else _revision((*top, *en))
    bucket = Bucket(bucket.source, root, bucket.store, revision)
    return bucket, _known(top, bucket, manifest), _known(en, bucket, manifest)


def _known(files: Iterable[S3File], bucket: Bucket, manifest: Manifest | None) -> list[S3File]:
    """The same with what the manifest says of each."""
    known = []
    for file in files:
        entry = manifest.files.get(file.path) if manifest else None
        if entry and entry.bytes != file.bytes:
            raise LauncherError(
                f"{bucket.source}/{file.path}: {file.bytes:,} bytes, and {entry.bytes:,} in the bucket's own "
                f"{STATE}/manifest.json",
                "copy the file again from the staged directory; nothing was downloaded",
            )
        known.append(S3File(file.path, file.bytes, file.etag, bucket, entry.sha256 if entry else ""))
    return known


def _revision(files: Sequence[S3File]) -> str:
    text = "".join(f"{file.path} {file.bytes} {file.etag}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def readme(source: str, train: Iterable[str], validation: Iterable[str] = ()) -> str:
    """README.md of a directory through which `datasets` streams objects: its header names them, nothing else is there.

    The paths are relative to `source`, s3://bucket/prefix. In the job it takes titan.s3 and s3fs in the image.
    """
    lines = ["---", "configs:", "- config_name: en", "  data_files:"]
    for split, paths in (("train", train), ("validation", validation)):
        urls = [f"    - {source}/{path}" for path in paths]
        lines += [f"  - split: {split}", "    path:", *urls] if urls else []
    return "\n".join([*lines, "---", ""])


def _store() -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise LauncherError(
            "object storage is read through s3fs, which is not installed",
            install("s3"),
            status=ExitStatus.ERROR,
        ) from error
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def _refused(error: Exception, what: str) -> LauncherError:
    """The store's or the network's refusal, and what to do about it. The libraries' words hold no secret key."""
    name, words = type(error).__name__, str(error)
    if isinstance(error, FileNotFoundError):
        return LauncherError(
            f"{what}: not there",
            "check bucket and prefix: aws s3 ls; and the endpoint: AWS_ENDPOINT_URL",
            status=ExitStatus.NOT_FOUND,
        )
    if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return LauncherError(
            f"{what}: no credentials for object storage",
            "aws configure; or export AWS_PROFILE=..., or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            original=words,
        )
    if isinstance(error, PermissionError):
        return LauncherError(
            f"{what}: access denied",
            "other credentials (AWS_PROFILE), or ask the bucket's owner for reading rights",
            original=words,
        )
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "SSLError"):
        return LauncherError(
            f"{what}: no connection to the store",
            "check AWS_ENDPOINT_URL (or endpoint_url in ~/.aws/config)",
            status=ExitStatus.ERROR,
            original=words,
        )
    return LauncherError(f"{what}: {name}", "the same command continues", status=ExitStatus.ERROR, original=words)
