"""The commands `launcher image ...`: what they take and what they print.

Progress goes to standard error; standard output has the names of what was made, one per line, or JSON.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, read_json
from launcher.base.output import as_json, echo, print_json, say, style
from launcher.config.layers import find, names_of, read_layer
from launcher.config.options import FilePath, gone
from launcher.image import ARCHES, registry
from launcher.image import build as building
from launcher.image import check as checking
from launcher.image import engine as docker_engine
from launcher.image import lock as locking
from launcher.image.build import Built
from launcher.image.channels import channel as channel_of
from launcher.image.channels import channels
from launcher.image.check import is_file
from launcher.image.convert import convert_image
from launcher.image.engine import Engine
from launcher.image.inspect import inspect, problems
from launcher.image.lock import pinned
from launcher.image.sif import sif
from launcher.image.squashfs_file import ImageFacts, sidecar_path
from launcher.image.squashfs_tools import FORMATS, need

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_STATUS_COLOURS = {"ok": "green", "failed": "red", "skipped": "yellow"}


# ------------------------------------------------------------------------------------ arguments and options


_WORD = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?/)?{_WORD}(?:/{_WORD})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)


def is_reference(name: str) -> bool:
    """Whether an engine's image can be called so: registry/path:tag@digest, in Docker's grammar, or an id."""
    return _REFERENCE.fullmatch(name) is not None


def image_name(_context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """An image of the engine, which would take ../../containers/json for a request; "" where none is given.

    No name that an image gets has a digest; to push to one that is empty is an error.
    """
    if value is None or (value == "" and parameter.name in ("tag", "base")):
        return ""
    if not is_reference(value) or ("@" in value and parameter.name in ("tag", "reference")):
        what = f"{value[:200]!r} is not the name of an image, such as titan:stable-amd64"
        raise click.BadParameter(what, param=parameter)
    return value


def file_or_image(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """A squashfs, or an image of the engine."""
    return value if is_file(value) else image_name(context, parameter, value)


def _squashfs(status: ExitStatus = ExitStatus.INVALID) -> Decorator:
    """A squashfs; for what names an image of the engine, the command that makes one of it."""

    def refuse_image(_context: click.Context, _parameter: click.Parameter, value: str) -> Path:
        if not os.path.lexists(value) and not is_file(value) and is_reference(value):
            what = f"{value}: no such file; a Docker image has to be converted to a file first"
            fix = f"launcher image check {quoted(value)}, or: launcher image convert {quoted(value)}"
            raise LauncherError("image-not-a-file", what, fix, status=status)
        return Path(value)

    return click.argument("file", type=FilePath(), callback=refuse_image, metavar="FILE.sqsh")


def no_password(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Build arguments stay readable in the image's history, and in the process list while it is built."""
    if value and re.match(r"[^/]*//[^/]*@", value):
        raise click.BadParameter(
            "a user or password in the address would stay readable in the image; put it into the base image's pip.conf",
            param=parameter,
        )
    return value


def file_name(about: Mapping[str, Any]) -> str:
    """titan-stable-arm64.sqsh for an image that `build` made; "" for any other."""
    labels = (about.get("Config") or {}).get("Labels") or {}
    title = str(labels.get("org.opencontainers.image.title", ""))
    known = re.fullmatch(r"titan-[A-Za-z0-9][A-Za-z0-9._-]*", title) and about.get("Architecture") in ARCHES
    return f"{title}-{about['Architecture']}.sqsh" if known else ""


def target_path(output: str | None, name: str, force: bool) -> Path:
    """`output`, or in it `name` where it is a directory; the working directory by default.

    Raises LauncherError where nothing could be written, and for a file that exists unless `force`.
    """
    path = Path(output or ".")
    if path.is_dir():
        if not name:
            raise click.UsageError("The image does not say its channel: name the file with -o FILE.")
        path /= name
    elif str(output).endswith("/"):  # which a Path forgets
        fix = f"mkdir -p {quoted(path)}, or a file's name without the slash"
        raise LauncherError("directory-missing", f"{output}: no such directory", fix, status=ExitStatus.FILESYSTEM)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise filesystem_error(path, OSError(errno.EACCES if path.parent.is_dir() else errno.ENOENT, ""), "-o PATH")
    if os.path.lexists(path) and not (path.is_file() or path.is_symlink()):
        raise LauncherError("not-a-file", f"{path} is not a file", "another name: -o FILE")
    if os.path.lexists(path) and not force:
        raise LauncherError("file-exists", f"{path} exists", "replace it: --force; or another name: -o FILE")
    return path


class _WithChannels(click.Command):
    """A command whose help lists the channels."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Channels"):
            formatter.write_dl([(channel.name, channel.about) for channel in channels().values()])


def _completing(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    return lambda _context, _parameter, incomplete: [name for name in names() if name.startswith(incomplete)]


_channel = click.argument("channel", default="nightly", shell_complete=_completing(channels))
_torch_index = click.option(
    "--torch-index",
    metavar="URL",
    callback=no_password,
    help="Index to get torch from, instead of the channel's; '' for the index of the other packages.",
)
_purpose = click.option(
    "--for",
    "purpose",
    type=click.Choice(["unpack", "mount"]),
    default="unpack",
    show_default=True,
    help="How nodes start the image. unpack: a smaller file (zstd); mount, with squashfuse: faster to read (lz4).",
)
_force = click.option("--force", is_flag=True, help="Replace a file that exists.")


def _arch(default: str | None, about: str) -> Decorator:
    choice = click.Choice([*ARCHES, "all"])
    return click.option("--arch", type=choice, default=default, help=f"Architecture.  [default: {about}]")


def _output(about: str, *, directory: bool = True) -> Decorator:
    return click.option("--output", "-o", type=FilePath(dir_okay=directory), metavar="PATH", help=about)


def _image_option(name: str, metavar: str, about: str) -> Decorator:
    return click.option(name, default="", metavar=metavar, callback=image_name, help=about)


# ------------------------------------------------------------------------------------------- the commands


@click.group()
def image() -> None:
    """Build, convert, inspect and check the image that jobs run in.

    \b
    launcher image build cpu -o .                       build it and write titan-cpu-amd64.sqsh
    launcher image inspect titan-cpu-amd64.sqsh         what is in it
    """


@image.command("build", cls=_WithChannels)
@_channel
@_arch(None, "the Docker engine's own")
@_output("Also write it as a .sqsh: the file, or a directory for titan-CHANNEL-ARCH.sqsh.")
@_purpose
@_force
@_image_option("--tag", "NAME:TAG", "Name of the image in Docker.  [default: titan:CHANNEL-ARCH]")
@_image_option("--base", "IMAGE", "Base image instead of the channel's.")
@click.option(
    "--lock",
    "lock_file",
    type=FilePath(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Lock file instead of the channel's.",
)
@_torch_index
@click.option("--index-url", default="", metavar="URL", callback=no_password, help="A mirror of PyPI for the build.")
@click.option("--network", default="", metavar="NAME", help="Network for the build steps, such as 'host'.")
@click.option("--no-cache", is_flag=True, help="Rebuild every layer.")
@click.option(
    "--push",
    "reference",
    metavar="REFERENCE",
    callback=image_name,
    help="Push the result to registry/path:tag, as one manifest list for all architectures.",
)
@as_json
def build_command(
    channel: str, arch: str | None, output: str | None, purpose: str, force: bool, as_json: bool, **options: Any
) -> None:
    """Build a channel's image with the Docker engine.

    CHANNEL is nightly by default. If it has no lock file (exact package versions) yet, that is written first.

    \b
    launcher image build
    launcher image build stable --arch arm64 -o /data
    launcher image build stable --arch all --push registry.example.com/titan:stable
    """
    channel_of(channel)
    reference = options.pop("reference")
    engine = docker_engine.connect()
    arches = building.arches(arch or "", engine)
    if len(arches) > 1 and (options["tag"] or options["lock_file"] or (output and not os.path.isdir(output))):
        raise click.UsageError("With --arch all, --tag and --lock cannot be used, and -o must be a directory.")
    files = {}
    if output:  # a build takes minutes: what would stop it at its end stops it here
        need("mksquashfs")
        need("unsquashfs")
        files = {arch: target_path(output, f"titan-{channel}-{arch}.sqsh", force) for arch in arches}
    built = []
    for arch in arches:
        image = building.build(channel, arch, engine=engine, **options)
        built.append(image)
        if arch in files:
            convert_image(image.tag, files[arch], engine=engine, fmt=FORMATS[purpose])
    pushed = _push(built, reference, engine) if reference else None
    if as_json:
        names = {arch: click.format_filename(path) for arch, path in files.items()}
        images = [asdict(image) | {"squashfs": names.get(image.arch)} for image in built]
        return print_json({"images": images, "pushed": pushed})
    for image in built:
        echo(str(files.get(image.arch, image.tag)))
    if pushed:
        echo(f"{pushed['reference']}@{pushed['digest']}")
    for path in files.values():
        say(f"  next: launcher submit --image {quoted(path)}")


def _push(built: list[Built], reference: str, engine: Engine) -> dict[str, Any]:
    pushed = [registry.push(image.tag, reference, engine=engine) for image in built]
    digest = registry.manifest_list(reference, pushed, engine=engine)
    return {"reference": reference, "digest": digest, "images": [asdict(one) for one in pushed]}


@image.command("convert")
@click.argument("image", callback=image_name)
@_output("The file, or a directory for it.  [default: titan-CHANNEL-ARCH.sqsh]")
@_purpose
@gone("--with", "leave it out: the conversion needs no enroot")
@_force
@as_json
def convert_command(image: str, output: str | None, purpose: str, force: bool, as_json: bool) -> None:
    """Convert a Docker image to a squashfs for Pyxis.

    Needs no enroot, no root and no space to unpack. Also writes FILE.json, which says what is in the image.

    \b
    launcher image convert titan:stable-arm64
    launcher image convert titan:stable-arm64 -o /data/titan.sqsh --for mount
    """
    engine = docker_engine.connect()
    about = docker_engine.inspect(engine, image)
    path = target_path(output, file_name(about), force)
    convert_image(image, path, engine=engine, fmt=FORMATS[purpose])
    if as_json:
        print_json({"path": click.format_filename(path), **(read_json(sidecar_path(path)) or {})})
    else:
        echo(str(path))


@image.command("inspect")
@_squashfs()
@click.option(
    "--gpu",
    metavar="PROFILE",
    shell_complete=_completing(lambda: names_of("profiles")),
    help="Also check whether it runs on these nodes.",
)
@click.option("--driver", metavar="VERSION", help="Also check whether it runs with this driver, such as 580.95.05.")
@as_json
def inspect_command(file: Path, gpu: str | None, driver: str | None, as_json: bool) -> None:
    """Show what is in a squashfs image, whatever tool made it.

    With --gpu or --driver, also says whether it would run there. Exit code 3: it would not.

    \b
    launcher image inspect titan-stable-arm64.sqsh
    launcher image inspect titan-stable-arm64.sqsh --gpu gb200 --driver 570.124.06
    """
    if driver is not None and not re.fullmatch(r"\d+(\.\d+)*", driver):
        raise click.BadParameter(f"{driver[:40]!r} is not a version such as 580.95.05", param_hint="--driver")
    profile: Mapping[str, Any] = {}
    if gpu:
        profile = read_layer(find("profiles", gpu), f"profile {gpu}").values
    facts = inspect(file)
    found = []
    if gpu or driver:
        nodes = [str(profile.get(f"profile.{key}", "")) for key in ("arch", "device", "driver")]
        found = problems(facts, nodes[0], nodes[1] or "cuda", driver or nodes[2])
    if as_json:
        value = asdict(facts) | {"path": click.format_filename(facts.path)}
        print_json(value | {"problems": [{"what": what, "fix": fix} for what, fix in found]})
    else:
        _print_facts(facts)
        for what, fix in found:
            echo(f"{style('problem:', fg='red')} {what}", f"  try: {fix}")
        if (gpu or driver) and not found:
            echo("nothing known keeps it from running on these nodes")
    if found:
        sys.exit(ExitStatus.INVALID)


def _print_facts(facts: ImageFacts) -> None:
    sources = {"sidecar": f"{Path(facts.path).name}.json", "image": "the image's own /etc/titan-image.json"}
    rows = {
        "architecture": facts.arch or "unknown",
        "channel": facts.channel,
        **{name: value or "none" for name, value in facts.versions.items()},
        "driver": f"{facts.driver_min} or newer" if facts.driver_min else "",
        "GPUs": " ".join(facts.sm),
        "quantization": " ".join(facts.quantization),
        "known from": sources.get(facts.source, "the files in it"),
    }
    echo(f"{facts.path}: squashfs, {facts.compressor}, {facts.bytes / 1e6:,.1f} MB")
    echo(*(f"  {name:13} {value}" for name, value in rows.items() if value), *(f"  {note}" for note in facts.notes))


@image.command("check")
@click.argument("image", metavar="IMAGE|FILE.sqsh", type=FilePath(), callback=file_or_image)
@click.option("--timeout", type=click.IntRange(min=1), default=900, metavar="SECONDS", show_default=True)
@as_json
def check_command(image: str, timeout: int, as_json: bool) -> None:
    """Test an image from inside, without a GPU.

    Checks that the versions match the lock, that there is one NCCL, and that torchtitan builds a model. Exit code 3: a
    check failed.

    \b
    launcher image check titan:stable-arm64
    launcher image check ./titan-stable-arm64.sqsh --json
    """
    say(f"running the checks in {image}")
    results = checking.check(image, timeout_s=timeout)
    failed = any(result.status == "failed" for result in results)
    if as_json:
        checks = [asdict(result) for result in results]
        print_json({"image": click.format_filename(image), "ok": not failed, "checks": checks})
    else:
        width = max((len(result.name) for result in results), default=0)
        for result in results:
            status = style(f"{result.status:7}", fg=_STATUS_COLOURS.get(result.status))
            echo(f"{status}  {result.name:{width}}  {result.found}")
    if failed:
        sys.exit(ExitStatus.INVALID)


@image.command("lock", cls=_WithChannels)
@_channel
@_arch("all", "all")
@_torch_index
@_output("Lock file.  [default: containers/locks/CHANNEL-ARCH.txt]", directory=False)
@as_json
def lock_command(channel: str, arch: str, torch_index: str | None, output: str | None, as_json: bool) -> None:
    """Pin the newest packages of a channel, with hashes.

    Takes the newest packages that CHANNEL (default: nightly) allows, and replaces the old lock.

    \b
    launcher image lock stable
    launcher image lock nightly --arch arm64
    """
    arches = list(ARCHES) if arch == "all" else [arch]
    if output and len(arches) > 1:
        raise click.UsageError(f"-o names one file, so it needs --arch {' or '.join(ARCHES)}.")
    rows = []
    for arch in arches:
        path = locking.lock(channel, arch, torch_index=torch_index, output=Path(output) if output else None)
        packages = pinned(path.read_text(encoding="utf-8"))
        rows.append({"channel": channel, "arch": arch, "path": click.format_filename(path), "packages": packages})
    if as_json:
        print_json(rows)
    else:
        echo(*(str(row["path"]) for row in rows))


@image.command("sif")
@_squashfs(ExitStatus.USAGE)
@_output("The file, or a directory for it.  [default: titan-CHANNEL-ARCH.sif]")
@_force
@gone("--recipe", "make a squashfs where Docker is, then: launcher image sif FILE.sqsh", is_flag=True)
@as_json
def sif_command(file: Path, output: str | None, force: bool, as_json: bool) -> None:
    """Convert a squashfs image to a SIF for Apptainer.

    For clusters without Pyxis.

    \b
    launcher image sif titan-stable-amd64.sqsh
    launcher submit --image titan-stable-amd64.sif --runtime apptainer
    """
    made = sif(file, target_path(output, f"{file.stem}.sif", force))
    if as_json:
        print_json({"path": click.format_filename(made), "bytes": made.stat().st_size})
    else:
        echo(str(made))
