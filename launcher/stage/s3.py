"""Object storage as a place that C4's files come from, or are streamed from in a job: s3://bucket/prefix.

botocore finds endpoint, region and credentials where every S3 client does (AWS_ENDPOINT_URL,
AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws, the machine's own role; never on a command line) and signs addresses. What is
there is asked for and read as from any web server.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.base.values import whole
from launcher.config.spec import S3_ADDRESS
from launcher.stage.manifest import LARGEST, Manifest, parse_manifest
from launcher.stage.source import RemoteFile, check_answer
from launcher.stage.target import STATE, Incoming
from launcher.stage.web import Refused, bounded, download, header_of, no_answer, read, status_of, words_of

ANSWER = 16 << 20  # bytes of a page of a listing
ENDPOINT = "check AWS_ENDPOINT_URL (or endpoint_url in ~/.aws/config)"


class Refusal(NamedTuple):
    """What a store's refusal means, and what to do about it."""

    code: str
    says: str
    fix: str
    status: ExitStatus = ExitStatus.ERROR

    def of(self, what: str, words: str = "") -> LauncherError:
        return LauncherError(self.code, f"{what}: {self.says}", self.fix, status=self.status, original=words)


MISSING = Refusal(
    "store-missing",
    "not there",
    "check bucket and prefix: aws s3 ls; and the endpoint: AWS_ENDPOINT_URL",
    ExitStatus.NOT_FOUND,
)
NO_ACCESS = Refusal(
    "store-access",
    "access denied",
    "other credentials (AWS_PROFILE), or ask the bucket's owner for reading rights",
    ExitStatus.INVALID,
)
NO_CONNECTION = Refusal("no-connection", "no connection to the store", ENDPOINT)
BY_STATUS = {
    401: NO_ACCESS,
    403: NO_ACCESS,
    404: MISSING,
    412: Refusal("store-differs", "has changed meanwhile", "the same command tries again"),
}


class Elsewhere(LauncherError):
    """The bucket is in another region, which `original` names."""


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket. `revision` is that of the data set where the bucket says it, else a checksum of the
    list.
    """

    source: str
    store: Any = field(repr=False, compare=False)  # botocore's client
    revision: str = ""

    def download(self, file: RemoteFile, stream: Incoming) -> None:
        download(lambda: self._address("get_object", file.path), stream, self._refused(file.path), match=file.etag)

    def head(self, path: str, count: int) -> bytes:
        """The first `count` bytes of an object, or all of a shorter one."""
        return read(self._address("get_object", path), count, self._refused(path))[0][:count]

    def _address(self, operation: str, path: str = "", **words: str) -> str:
        """A signed address. It works for an hour, for anyone who has it, so no message shows it."""
        bucket, _, prefix = self.source.removeprefix("s3://").partition("/")
        key = {"Key": f"{prefix}/{path}".strip("/")} if path else {}
        with _credentials():
            return str(self.store.generate_presigned_url(operation, {"Bucket": bucket, **key, **words}))

    def listed(self, folder: str) -> list[RemoteFile]:
        """The objects directly in `folder` ("": the prefix itself), by path; none where there is no such folder."""
        top = f"{self.source}/".partition("://")[2].partition("/")[2]
        files, fix = [], "name the prefix that holds en/"
        for entry in bounded(self._pages(f"{top}{folder}", not folder), self.source, self._refused(), fix):
            path = (entry.findtext("{*}Key") or "").removeprefix(top)
            if path.endswith("/"):  # the empty objects that stand for folders
                continue
            size = whole(entry.findtext("{*}Size"))
            check_answer(self.source, path=path, size=size)
            files.append(RemoteFile(path, size or 0, etag=(entry.findtext("{*}ETag") or "").strip('"')))
        return sorted(files, key=lambda file: file.path)

    def _pages(self, prefix: str, there: bool) -> Iterator[list[ElementTree.Element]]:
        """The objects of each page of a listing; `there`: raises LauncherError where it is empty."""
        words = {"Prefix": f"{prefix.rstrip('/')}/".lstrip("/"), "Delimiter": "/", "EncodingType": "url"}
        token: str | None = ""
        while token is not None:
            more = words | ({"ContinuationToken": token} if token else {})
            data, _ = read(self._address("list_objects_v2", **more), ANSWER, self._refused())
            try:
                page = ElementTree.fromstring(data[:ANSWER])
                if page.findtext("{*}IsTruncated") == "true" and not page.findtext("{*}NextContinuationToken"):
                    raise ValueError("more objects, and no way to them")
            except (ElementTree.ParseError, LookupError, ValueError) as error:  # also of encodings
                mib = ANSWER >> 20
                what = f"{self.source}: the store answers with more than {mib} MiB at once, or no whole list in XML"
                raise LauncherError("server-answer", what, "check AWS_ENDPOINT_URL: is it an object store?") from error
            if page.findtext("{*}EncodingType") == "url":
                for key in page.iterfind("{*}Contents/{*}Key"):
                    key.text = unquote_plus(key.text or "")
            entries, folders = page.findall("{*}Contents"), page.findall("{*}CommonPrefixes")
            before, token = token, page.findtext("{*}NextContinuationToken") or None
            if there and not (entries or folders or before or token):
                raise MISSING.of(self.source)
            yield entries

    def manifest(self) -> Manifest | None:
        """The one of the staged directory that was copied into the bucket, if there is one."""
        try:
            data = self.head(f"{STATE}/manifest.json", LARGEST)
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

    def _refused(self, path: str = "") -> Refused:
        """What the store or the network refuses, and what to do about it."""

        def refused(error: Exception) -> LauncherError:
            status = status_of(error)
            words = words_of(error) if status else no_answer(error)
            region = header_of(error, "x-amz-bucket-region")
            if status in (301, 400) and region not in ("", self.store.meta.region_name):
                what, fix = f"{self.source}: is in another region", f"export AWS_DEFAULT_REGION={region}"
                return Elsewhere("store-failed", what, fix, status=ExitStatus.ERROR, original=region)
            fix = "the same command continues; check AWS_* and ~/.aws/config"
            found = BY_STATUS.get(status) or Refusal("store-failed", f"HTTP {status}" if status else "no answer", fix)
            if "Token" in words:  # expired, with 400
                found = NO_ACCESS
            elif isinstance(error, URLError) and not status:
                found = NO_CONNECTION
            return found.of(f"{self.source}/{path}" if path else self.source, words)

        return refused


def open_bucket(address: str, region: str | None = None) -> tuple[Bucket, list[RemoteFile]]:
    """The bucket, and the objects at its prefix and in its folder `en`. Raises LauncherError."""
    match = S3_ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise LauncherError(
            "store-address",
            f"{address[:120]!r}: not an address of object storage",
            "s3://bucket/prefix; credentials and endpoint come from AWS_PROFILE, AWS_ENDPOINT_URL or ~/.aws",
        )
    bucket = Bucket(f"s3://{match[1]}{match[2]}", _store(region))
    try:
        objects = [*bucket.listed(""), *bucket.listed("en")]
    except Elsewhere as error:
        if region:
            raise
        return open_bucket(address, error.original)
    manifest = bucket.manifest()
    # Without a manifest, what changes with any object.
    listing = "".join(f"{file.path} {file.bytes} {file.etag}\n" for file in objects)
    revision = manifest.revision if manifest else hashlib.sha256(listing.encode()).hexdigest()[:40]
    return replace(bucket, revision=revision), [_known(file, bucket, manifest) for file in objects]


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


def _store(region: str | None) -> Any:
    """botocore's client, which only signs."""
    try:
        from botocore.config import Config
        from botocore.session import Session
    except ImportError as error:
        raise LauncherError(
            "package-missing",
            "object storage is read with botocore, which is not installed",
            install("s3"),
            status=ExitStatus.ERROR,
        ) from error
    with _credentials():
        session = Session()
        if bundle := session.get_config_variable("ca_bundle"):
            os.environ.setdefault("AWS_CA_BUNDLE", bundle)
        return session.create_client("s3", region, config=Config(signature_version="s3v4"))


@contextmanager
def _credentials() -> Iterator[None]:
    """Raises LauncherError for what botocore misses on this machine."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, OSError) as error:  # a role that is refused, a credential_process that fails
        fix = "aws configure; or export AWS_PROFILE=..., or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise LauncherError("store-access", "no credentials for object storage", fix, original=str(error)) from error
    except ValueError as error:  # an endpoint that is no address
        raise LauncherError("store-failed", str(error), ENDPOINT, status=ExitStatus.ERROR) from error
