"""From an image of the Docker engine to a squashfs that enroot and Pyxis start; nothing is unpacked, no root."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.files import filesystem_error, write_json
from launcher.base.output import say
from launcher.base.values import whole
from launcher.image import ARCHES, DOCKER
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine
from launcher.image.export import ImageConfig, Report, rewrite, unfit
from launcher.image.inspect import architecture, description
from launcher.image.squashfs_file import follow, sidecar_path, superblock
from launcher.image.squashfs_tools import FORMATS, SquashfsFormat, Tree, write_squashfs


def source_date() -> int | None:
    """What SOURCE_DATE_EPOCH asks for, in seconds since 1970; None where it is not set. Raises LauncherError."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = whole(epoch)
    if epoch and (seconds is None or seconds >= 2**32):
        what = f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds that a squashfs can hold"
        raise LauncherError("source-date-epoch", what, "export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)")
    return seconds


def image_config(attrs: Mapping[str, Any]) -> ImageConfig:
    """From what `docker image inspect` says (docker-py: image.attrs), and SOURCE_DATE_EPOCH."""
    config, date = attrs.get("Config") or {}, source_date()
    try:
        # The commit's date, where ours is labelled with it; the engine's own is the build's.
        label = (config.get("Labels") or {}).get("org.opencontainers.image.created")
        found = ImageConfig(
            arch=str(attrs.get("Architecture") or ""),
            image_id=str(attrs.get("Id") or ""),
            created=_seconds(str(label or attrs.get("Created") or "")) if date is None else date,
            env=tuple(config.get("Env") or ()),
            working_dir=str(config.get("WorkingDir") or ""),
            entrypoint=tuple(config.get("Entrypoint") or ()),
            cmd=tuple(config.get("Cmd") or ()),
            volumes=tuple(sorted(config.get("Volumes") or ())),
        )
        if all(isinstance(word, str) for word in (*found.env, *found.entrypoint, *found.cmd, *found.volumes)):
            return found
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise LauncherError(
        "image-configuration", "the image's configuration is invalid", "docker image inspect IMAGE; build it again"
    )


def _seconds(date: str) -> int:
    """Docker's 2026-11-22T10:00:00.123456789Z as seconds; 0 where there is none (it writes the year 1)."""
    found = re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", date)
    seconds = datetime.fromisoformat(found[0]).replace(tzinfo=UTC).timestamp() if found else 0
    return min(max(0, int(seconds)), 2**32 - 1)


def convert(
    export: Iterable[bytes], config: ImageConfig, output: Path, fmt: SquashfsFormat = FORMATS["unpack"]
) -> Path:
    """Writes `output` and its sidecar from the chunks of a `docker export`; the same image gives the same bytes.

    The sidecar repeats what the image says of itself in /etc/titan-image.json. Nothing stands under the final name
    before it is complete.
    """
    report = Report()
    with beside(output) as target:
        tree = Tree(target)  # before gigabytes are read: without unsquashfs they are for nothing
        write_squashfs(_progress(rewrite(export, config, report)), target, fmt, config.created)
        names, links = tree.entries()
        if follow("bin/sh", links) not in names:
            raise unfit("the image has no /bin/sh, and Pyxis starts every container by it")
        # Of a program: `docker import` labels every image as the host's.
        said = ARCHES.get(config.arch, config.arch)
        arch = architecture(tree, names, links) or said
        if arch != said:
            say(f"the engine calls this image {config.arch or 'nothing'}, its programs are for {arch}")
        if report.cleared:
            say(f"setuid, setgid or capabilities taken from {report.cleared} files")
        if report.devices:
            say(f"{report.devices} device nodes outside /dev left out")
        if some := report.root_only:
            say(f"{len(some)} entries that only root may read, such as /{', /'.join(some[:3])}")
        if lost := [line.split("=")[0] for line in config.env if "\n" in line]:
            say(f"variables with a line break left out: {', '.join(lost)}")
        about = {"schema": 1, **(description(tree) or {}), "arch": DOCKER.get(arch, arch)}
        recorded = superblock(target).recorded() | {"level": fmt.level, "unpacked_bytes": report.unpacked_bytes}
        # The old sidecar goes before, the new one comes after: at no time does one lie beside a file that it does not
        # describe.
        with open(target, "rb") as stream:
            recorded["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        sidecar_path(output).unlink(missing_ok=True)
        os.replace(target, output)
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


def convert_image(image: str, output: Path, *, engine: Engine, fmt: SquashfsFormat = FORMATS["unpack"]) -> Path:
    """Writes `output` and its sidecar from an image of the engine, which describes itself in /etc/titan-image.json.

    Raises LauncherError for no such image, no mksquashfs, and for everything that `convert` refuses.
    """
    config = image_config(docker_engine.inspect(engine, image))
    say(f"converting {image} to {output}")
    # By its id: a build that ends meanwhile gives the name to another image. Closed, so that an error or Ctrl-C leaves
    # no container behind.
    with closing(docker_engine.export(engine, config.image_id)) as stream:
        return convert(stream, config, output, fmt)


def _progress(chunks: Iterable[bytes]) -> Iterator[bytes]:
    done = 0
    for chunk in chunks:
        before, done = done >> 30, done + len(chunk)
        if done >> 30 > before:
            say(f"{done >> 30} GiB read")
        yield chunk
