"""s3:// for `datasets`, which hands the options of its web client to every store (huggingface/datasets#7295)."""

from __future__ import annotations

from typing import Any

from s3fs import S3FileSystem as _S3FileSystem

_OF_AIOHTTP = ("requote_redirect_url", "trust_env")


class S3FileSystem(_S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs's own, without the options that no S3 client takes."""

    def __init__(self, *args: Any, client_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kept = {key: value for key, value in (client_kwargs or {}).items() if key not in _OF_AIOHTTP}
        super().__init__(*args, client_kwargs=kept, **kwargs)


def first_bytes(url: str, count: int) -> bytes:
    """The beginning of an object. Raises whatever s3fs, botocore or aiohttp raise."""
    data: bytes = S3FileSystem(skip_instance_cache=True).cat_file(url, start=0, end=count)
    return data
