"""From an image of the Docker engine to a squashfs that enroot and Pyxis start; nothing is unpacked, no root."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast

from launcher.base.errors import LauncherError
from launcher.base.files import filesystem_error, write_json
from launcher.base.values import whole
from launcher.image import ARCHES, DOCKER
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine
from launcher.image.export import ImageConfig, Report, rewrite, unfit
from launcher.image.inspect import architecture, description
from launcher.image.squashfs_file import follow, sidecar_path, superblock
from launcher.image.squashfs_tools import FORMATS, SquashfsFormat, Tree, write_squashfs

Say = Callable[[str], None]


def image_config(attrs: Mapping[str, Any], environ: Mapping[str, str]) -> ImageConfig:
    """From what `docker image inspect` says (docker-py: image.attrs), and SOURCE_DATE_EPOCH."""
    config = attrs.get("Config") or {}
    epoch = environ.get("SOURCE_DATE_EPOCH", "")
    if epoch and not (whole(epoch) or 2**32) < 2**32:
        raise LauncherError(
            "source-date-epoch",
            f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds that a squashfs can hold",
            "export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)",
        )
    try:
        labels = dict(config.get("Labels") or {})
        # The commit's date, where ours is labelled with it; the engine's own is the build's.
        date = str(labels.get("org.opencontainers.image.created") or attrs.get("Created") or "")
        found = ImageConfig(
            arch=str(attrs.get("Architecture") or ""),
            image_id=str(attrs.get("Id") or ""),
            created=min(int(epoch) if epoch else _seconds(date), 2**32 - 1),
            env=tuple(config.get("Env") or ()),
            working_dir=str(config.get("WorkingDir") or ""),
            entrypoint=tuple(config.get("Entrypoint") or ()),
            cmd=tuple(config.get("Cmd") or ()),
            volumes=tuple(sorted(config.get("Volumes") or ())),
            labels=labels,
        )
        words = (*found.env, *found.entrypoint, *found.cmd, *found.volumes, *chain(*found.labels.items()))
        if all(isinstance(word, str) for word in words):
            return found
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise LauncherError(
        "image-configuration", "the image's configuration makes no sense", "docker image inspect IMAGE; build it again"
    )


def _seconds(date: str) -> int:
    """Docker's 2026-11-22T10:00:00.123456789Z as seconds; 0 where there is none (it writes the year 1)."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", date)
    return max(0, int(datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp())) if found else 0


def convert(
    export: Iterable[bytes],
    config: ImageConfig,
    output: Path,
    *,
    fmt: SquashfsFormat = FORMATS["unpack"],
    say: Say = lambda line: None,
) -> Path:
    """Writes `output` and its sidecar from the chunks of a `docker export`; the same image gives the same bytes.

    The sidecar repeats what the image says of itself in /etc/titan-image.json. Nothing stands under the final name
    before it is complete.
    """
    report = Report()
    with beside(output) as target:
        tree = Tree(target)  # before gigabytes are read: without unsquashfs they are for nothing
        write_squashfs(_progress(rewrite(export, config, report), say), target, fmt, config.created)
        names, links = tree.entries()
        if follow("bin/sh", links) not in names:
            raise unfit("the image has no /bin/sh, and Pyxis starts every container by it")
        # Of a program: `docker import` labels every image as the host's.
        said = ARCHES.get(config.arch, config.arch)
        arch = architecture(tree, names, links) or said
        if arch != said:
            say(f"the engine calls this image {config.arch or 'nothing'}, its programs are for {arch}")
        for line in remarks(report):
            say(line)
        about = {"schema": 1, **(description(tree) or {}), "arch": DOCKER.get(arch, arch)}
        recorded = superblock(target).recorded() | {"level": fmt.level, "unpacked_bytes": report.unpacked_bytes}
        # The old sidecar goes before, the new one comes after: at no time does one lie beside a file that it does not
        # describe.
        try:
            with open(target, "rb") as stream:
                recorded["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
                os.fsync(stream.fileno())
            sidecar_path(output).unlink(missing_ok=True)
            os.replace(target, output)
        except OSError as error:
            raise filesystem_error(output, error, "-o FILE") from None
    about.setdefault("created", datetime.fromtimestamp(config.created, UTC).isoformat().replace("+00:00", "Z"))
    write_json(sidecar_path(output), {**about, "image_id": config.image_id, "squashfs": recorded})
    say(f"{output}: {recorded['bytes'] / 1e6:,.0f} MB, sha256 {recorded['sha256']}")
    return output


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A temporary file beside `output`, created at once to learn early whether it can be; removed in every case."""
    target = output.with_name(f".{output.name}.{os.urandom(4).hex()}.tmp")
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except OSError as error:
        raise filesystem_error(output, error, "-o FILE") from None
    try:
        yield target
    finally:
        target.unlink(missing_ok=True)


def convert_image(
    image: str,
    output: Path,
    *,
    engine: Engine,
    fmt: SquashfsFormat = FORMATS["unpack"],
    say: Say = lambda line: None,
) -> Path:
    """Writes `output` and its sidecar from an image of the engine, which describes itself in /etc/titan-image.json.

    Raises LauncherError for no such image, no mksquashfs, and for everything that `convert` refuses.
    """
    config = image_config(docker_engine.inspect(engine, image), os.environ)
    say(f"converting {image} to {output}")
    # By its id: a build that ends meanwhile gives the name to another image. Closed, so that an error or Ctrl-C leaves
    # no container behind.
    stream = cast("Generator[bytes]", docker_engine.export(engine, config.image_id))
    with closing(stream):
        return convert(stream, config, output, fmt=fmt, say=say)


def _progress(chunks: Iterable[bytes | memoryview], say: Say) -> Iterator[bytes | memoryview]:
    done = 0
    for chunk in chunks:
        before, done = done >> 30, done + len(chunk)
        if done >> 30 > before:
            say(f"{done >> 30} GiB read")
        yield chunk


def remarks(report: Report) -> list[str]:
    """What a user may want to know about what was left out or may not be read."""
    lines = []
    if report.cleared:
        lines.append(f"setuid, setgid or capabilities taken from {report.cleared} files")
    if report.devices:
        lines.append(f"{report.devices} device nodes outside /dev left out")
    if report.root_only:
        some = ", ".join(f"/{name}" for name in report.root_only[:3])
        lines.append(f"{len(report.root_only)} entries that only root may read, such as {some}")
    if report.left_out:
        lines.append(f"variables with a line break left out: {', '.join(report.left_out)}")
    return lines
