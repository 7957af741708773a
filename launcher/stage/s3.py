"""Object storage as a place that C4's files come from, or are streamed from in a job: s3://bucket/prefix.

Through s3fs, which finds endpoint, region and credentials where every S3 client does: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID, ~/.aws, the machine's own role. Never on a command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.config.spec import S3_ADDRESS
from launcher.stage.manifest import LARGEST, Manifest, parse_manifest
from launcher.stage.source import RemoteFile, check_answer
from launcher.stage.target import STATE, Incoming, Stopped

PIECE = 8 << 20  # bytes of one request; each of the files at once holds one in memory
ANSWER = 16 << 20  # bytes of any answer: a piece of a file, or a page of a listing
ANSWER_S = 300.0  # and the time that it may take, whole
ENTRIES = 100_000  # of a listing, and its pages, which may be empty
LISTING_S = 600.0  # for it


class TooLong(Exception):
    """An answer above `ANSWER`: no store sends that."""


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket. `revision` is that of the data set where the bucket says it, else a checksum of the
    list.
    """

    source: str
    root: str  # bucket/prefix, as s3fs writes it
    store: Any = field(repr=False, compare=False)  # s3fs.S3FileSystem
    revision: str = ""

    def download(self, file: RemoteFile, stream: Incoming) -> None:
        """In pieces of one request each. s3fs and botocore repeat what may pass by themselves."""
        stream.restart()
        with self._asking(file.path), self.store.open(f"{self.root}/{file.path}", cache_type="none") as opened:
            shutil.copyfileobj(opened, stream, PIECE)

    def head(self, file: RemoteFile, count: int) -> bytes:
        """The first `count` bytes of an object, or all of a shorter one."""
        if not file.bytes:
            return b""
        with self._asking(file.path):
            data: bytes = self.store.cat_file(f"{self.root}/{file.path}", start=0, end=min(count, file.bytes))
        return data

    @contextlib.contextmanager
    def _asking(self, path: str = "") -> Iterator[None]:
        try:
            yield
        except (LauncherError, Stopped):
            raise
        except Exception as error:  # of s3fs, botocore and aiohttp, which have no common root
            raise _refused(error, f"{self.source}/{path}" if path else self.source) from error

    def listed(self, folder: str) -> list[tuple[RemoteFile, str]]:
        """The objects directly in `folder` ("": the prefix itself) and their ETags, by path; none where there is no
        such folder.
        """
        bucket, _, prefix = self.root.partition("/")
        prefix = "/".join(part for part in (prefix, folder) if part)
        where: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "/"}
        found, asked, page, until = [], 0, {"IsTruncated": True}, time.monotonic() + LISTING_S
        while page.get("IsTruncated"):
            if asked > ENTRIES or time.monotonic() > until:
                what = f"more than {ENTRIES:,} entries" if asked > ENTRIES else f"for more than {LISTING_S:.0f} s"
                raise LauncherError("server-answer", f"{self.source}: lists {what}", "name the prefix that holds en/")
            with self._asking():
                page = self.store.call_s3("list_objects_v2", **where)
            found += page.get("Contents", [])
            asked += 1 + len(page.get("Contents", []))
            where["ContinuationToken"] = page.get("NextContinuationToken")
            if not (found or folder or page.get("CommonPrefixes") or page.get("IsTruncated")):
                raise _refused(FileNotFoundError(), self.source)
        files = []
        for entry in found:
            path = str(entry.get("Key")).removeprefix(f"{self.root.partition('/')[2]}/")
            if path.endswith("/"):  # the empty objects that stand for folders
                continue
            check_answer(self.source, path=path, size=entry.get("Size"))
            files.append((RemoteFile(path, entry["Size"]), str(entry.get("ETag", "")).strip('"')))
        return sorted(files, key=lambda found: found[0].path)

    def manifest(self) -> Manifest | None:
        """The one of the staged directory that was copied into the bucket, if there is one."""
        try:
            with self._asking():
                data = self.store.cat_file(f"{self.root}/{STATE}/manifest.json", start=0, end=LARGEST)
        except LauncherError as error:
            if error.status == ExitStatus.NOT_FOUND:
                return None
            raise
        found = parse_manifest(data)
        if found is None or found.kind != "c4":
            raise LauncherError(
                "manifest-damaged",
                f"{self.source}/{STATE}/manifest.json: damaged, or not of C4",
                "copy it again from the staged directory, or remove it: then only sizes are compared",
            )
        return found


def open_bucket(address: str) -> tuple[Bucket, list[RemoteFile]]:
    """The bucket, and the objects at its prefix and in its folder `en`. Raises LauncherError."""
    match = S3_ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise LauncherError(
            "store-address",
            f"{address[:120]!r}: not an address of object storage",
            "s3://bucket/prefix; credentials and endpoint come from AWS_PROFILE, AWS_ENDPOINT_URL or ~/.aws",
        )
    root = match[1] + match[2]
    bucket = Bucket(f"s3://{root}", root, _store())
    objects = [*bucket.listed(""), *bucket.listed("en")]
    manifest = bucket.manifest()
    # Without a manifest, what changes with any object.
    listing = "".join(f"{file.path} {file.bytes} {etag}\n" for file, etag in objects)
    revision = manifest.revision if manifest else hashlib.sha256(listing.encode()).hexdigest()[:40]
    return replace(bucket, revision=revision), [_known(file, bucket, manifest) for file, _ in objects]


def _known(file: RemoteFile, bucket: Bucket, manifest: Manifest | None) -> RemoteFile:
    """With the sha256 that the manifest has."""
    entry = manifest.files.get(file.path) if manifest else None
    if entry and entry.bytes != file.bytes:
        raise LauncherError(
            "store-differs",
            f"{bucket.source}/{file.path}: {file.bytes:,} bytes, and {entry.bytes:,} in the bucket's own "
            f"{STATE}/manifest.json",
            "copy the file again from the staged directory; nothing was downloaded",
        )
    return replace(file, sha256=entry.sha256 if entry else "")


def _store() -> Any:
    """s3fs, on answers that end: its libraries read whatever comes, for as long as it comes."""
    # Here, as s3fs: every submission imports this module, and with asyncio and ssl it would start a third slower.
    import asyncio
    import logging

    from launcher.stage.web import BUNDLES, trust

    try:
        import aiohttp
        import s3fs
        from aiobotocore.httpsession import AIOHTTPSession
        from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
    except ImportError as error:
        raise LauncherError(
            "package-missing",
            "object storage is read through s3fs, which is not installed",
            install("s3"),
            status=ExitStatus.ERROR,
        ) from error

    named = any(os.environ.get(name) for name in BUNDLES)
    bundle = trust() if named else None  # None: the profile's own ca_bundle, else certifi's

    class Session(AIOHTTPSession):  # type: ignore[misc]
        async def send(self, request: Any) -> Any:
            request.stream_output = True  # the session itself does not read the answer then
            try:
                return await asyncio.wait_for(self._whole(request), ANSWER_S)
            except TimeoutError as error:
                raise ReadTimeoutError(endpoint_url=request.url, error=error) from error
            except aiohttp.ClientError as error:
                raise ConnectionClosedError(endpoint_url=request.url, error=error) from error

        async def _whole(self, request: Any) -> Any:
            answer = await super().send(request)
            data = bytearray()
            async with answer.raw as raw:
                async for piece in raw.content.iter_any():
                    data += piece
                    if len(data) > ANSWER:
                        raw.close()
                        raise TooLong
            answer.raw = _Whole(answer.url, bytes(data))
            return answer

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that a server broke, after the refusal
    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"http_session_cls": Session},
        client_kwargs={"verify": bundle} if bundle else {},
    )


class _Whole:
    """An answer that was read: what aiobotocore asks of one of aiohttp's."""

    def __init__(self, url: str, data: bytes) -> None:
        self.url, self.data, self.content = url, data, self

    async def read(self, amount: int = -1) -> bytes:
        amount = len(self.data) if amount < 0 else amount
        piece, self.data = self.data[:amount], self.data[amount:]
        return piece

    def at_eof(self) -> bool:
        return not self.data

    def close(self) -> None:
        pass


class Refusal(NamedTuple):
    code: str
    what: str
    fix: str
    status: ExitStatus = ExitStatus.ERROR


# By the names of an error's classes, the libraries' own among them.
_REFUSALS = {
    ("WrongLength", "FileExpired"): Refusal(
        "store-differs",
        "has changed meanwhile",
        "the same command tries again",
    ),
    ("TooLong",): Refusal(
        "server-answer",
        f"the store answers with more than {ANSWER >> 20} MiB at once",
        "check AWS_ENDPOINT_URL: is it an object store?",
    ),
    ("FileNotFoundError",): Refusal(
        "store-missing",
        "not there",
        "check bucket and prefix: aws s3 ls; and the endpoint: AWS_ENDPOINT_URL",
        ExitStatus.NOT_FOUND,
    ),
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"): Refusal(
        "store-access",
        "no credentials for object storage",
        "aws configure; or export AWS_PROFILE=..., or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ExitStatus.INVALID,
    ),
    ("PermissionError",): Refusal(
        "store-access",
        "access denied",
        "other credentials (AWS_PROFILE), or ask the bucket's owner for reading rights",
        ExitStatus.INVALID,
    ),
    ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "SSLError"): Refusal(
        "no-connection",
        "no connection to the store",
        "check AWS_ENDPOINT_URL (or endpoint_url in ~/.aws/config)",
    ),
}


def _refused(error: Exception, what: str) -> LauncherError:
    """The store's or the network's refusal, and what to do about it. The libraries' words hold no secret key."""
    from launcher.stage.web import distrust, not_trusted  # brings ssl: see _store

    if why := distrust(error):
        return not_trusted(what, why)
    classes = {one.__name__ for one in type(error).__mro__}
    fix = "the same command continues; check AWS_* and ~/.aws/config"
    found = Refusal("store-failed", type(error).__name__, fix)
    for names, refusal in _REFUSALS.items():
        if classes & set(names):
            found = refusal
            break
    return LauncherError(found.code, f"{what}: {found.what}", found.fix, status=found.status, original=str(error))
