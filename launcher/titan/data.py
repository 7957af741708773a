"""Can this node read the training data and the tokenizer? Looks at names, sizes and the first bytes of one file."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from . import GZIP_MAGIC, LFS_POINTER, Refused, read_object, read_text

SMALLEST_SHARD = 200  # bytes; an LFS pointer is about 130
CREDENTIALS = "--env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"


def check_data(node: dict[str, Any]) -> dict[str, Any]:
    """The training data can be read as C4: a header that names `en`, and shards that are not LFS pointers.

    `data` is what the trainer reads, in most runs a folder of links to `data_source`.
    """
    data, source = node["placed"]["data"], node["placed"]["data_source"]
    facts = {"data": data, "data_source": source, "data_files": 0}
    if data == "hub":
        return facts
    if not data or not source:
        raise Refused("no data directory was given", "--data /data/c4")
    if source.startswith("s3://"):
        return {**facts, "data_files": check_streamed(Path(data), source)}
    run_toml = f"{shlex.quote(node['placed']['run_dir'])}/run.toml"
    stage = f"launcher stage c4 --to {shlex.quote(source)} --for {run_toml}"
    for folder in map(Path, (source, data)):
        if not folder.is_dir():
            raise Refused(f"{folder} is not a directory on this node", f"mount it, or: {stage}")
    header = _header(folder / "README.md", stage)
    if not re.search(r"""^\s*-?\s*config_name:\s*["']?en["']?\s*$""", header, re.MULTILINE):
        raise Refused(
            f"{folder}/README.md does not describe the configuration `en`",
            f"the Hub's README.md of allenai/c4 must stand beside en/: {stage}",
        )
    shards = sorted((folder / "en").glob("*train*.json.gz")) or sorted((folder / "en").glob("*.json.gz"))
    if not shards:
        raise Refused(f"{folder}/en holds no *.json.gz", stage)
    if re.search(r"en/c4-validation", header) and not any((folder / "en").glob("c4-validation.*")):
        raise Refused(
            f"{folder}/README.md names a validation split, {folder}/en has no file of it: "
            "`datasets` then reads neither",
            f"submit where {folder} can be seen, which makes a view of it, or: {stage} --validation",
        )
    if broken := [shard for shard in shards if not shard.exists()]:
        raise Refused(
            f"{broken[0]} leads to {os.path.realpath(broken[0])}, which is not on this node",
            f"mount {source} where it was when the job was submitted, or submit again: launcher submit {run_toml}",
        )
    check_shards(shards, stage)
    return {**facts, "data_files": len(shards)}


def check_shards(shards: list[Path], fix: str) -> None:
    """Raises Refused where one is a Git LFS pointer, or the first is no gzip file."""
    small = [shard for shard in shards if shard.stat().st_size < SMALLEST_SHARD]
    if pointers := [shard for shard in small if _start(shard) == LFS_POINTER]:
        what = f"{len(pointers)} of {len(shards)} shards in {shards[0].parent} are Git LFS pointers, not data"
        raise Refused(what, fix)
    if not _start(shards[0]).startswith(GZIP_MAGIC):
        raise Refused(f"{shards[0]} is not a gzip file", fix)


def _start(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(len(LFS_POINTER))


def check_streamed(folder: Path, source: str) -> int:
    """How many objects the run streams. The first one's beginning is read, as the trainer will read it."""
    header = _header(folder / "README.md", "submit again: launcher submit RUN/run.toml")
    objects = re.findall(r"^\s*- (s3://\S+)$", header, re.MULTILINE)
    if not objects:
        raise Refused(f"{folder}/README.md names no object of {source}", "submit again")
    count = sum("/c4-train." in name for name in objects)
    stage = f"launcher stage c4 --from {shlex.quote(source)} --to DIR --files {count}, then --data DIR"
    if importlib.util.find_spec("s3fs") is None:
        raise Refused(
            f"object storage is read through s3fs, which is not installed for {sys.executable}",
            f"an image that holds it (launcher image build); with --runtime bare: pip install s3fs; or {stage}",
        )
    from .s3 import first_bytes

    try:
        start = first_bytes(objects[0], len(LFS_POINTER))
    except Exception as error:  # of s3fs, botocore and aiohttp, which have no common root
        raise Refused(
            f"{objects[0]}: {type(error).__name__}: {str(error)[:300]}",
            f"credentials and endpoint reach the job by {CREDENTIALS}; or {stage}",
        ) from error
    if not start.startswith(GZIP_MAGIC):
        raise Refused(f"{objects[0]} is not a gzip file", stage)
    return len(objects)


def _header(readme: Path, fix: str) -> str:
    """The YAML between the two `---` lines at the top; empty where there is none."""
    try:
        text = read_text(readme, errors="replace")
    except (OSError, ValueError) as error:
        raise Refused(f"{readme}: {getattr(error, 'strerror', None) or error}", fix) from error
    match = re.match(r"---\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    return match.group(1) if match else ""


def check_tokenizer(folder: Path) -> None:
    """Both files are JSON objects: without the second, BOS and EOS would silently be none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_object(folder / name, f"launcher stage tokenizer --to {shlex.quote(str(folder))}")
