"""What the options and arguments of `launcher image ...` accept, checked before anything is asked or made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.config.options import FilePath
from launcher.image import ARCHES
from launcher.image.check import is_file

_WORD = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?/)?{_WORD}(?:/{_WORD})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)


def is_reference(name: str) -> bool:
    """Whether an engine's image can be called so: registry/path:tag@digest, in Docker's grammar, or an id."""
    return _REFERENCE.fullmatch(name) is not None


class TargetPath(FilePath):
    """Where a file is written. With a slash at its end it has to be a directory: a Path forgets that slash."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        path = super().convert(value, parameter, context)
        if str(value).endswith("/") and not os.path.isdir(path):
            raise LauncherError(
                f"{value}: not a directory" if os.path.lexists(path) else f"{value}: no such directory",
                f"mkdir -p {quoted(path)}, or a file's name without the slash",
                status=ExitStatus.FILESYSTEM,
            )
        return path


class ImageName(FilePath):
    """An image of the engine, or (`file`) a squashfs. The engine would take ../../containers/json for a request."""

    def __init__(self, *, file: bool) -> None:
        super().__init__()
        self._file = file

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if self._file and value and is_file(path := os.path.expanduser(value)):
            return super().convert(path, parameter, context)
        if not is_reference(value):
            self.fail(f"{value[:200]!r} is not the name of an image, such as titan:stable-amd64", parameter, context)
        return value


def image_reference(_context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """ "" where none is given; to push to one that is empty is an error."""
    given = value or (value is not None and parameter.name == "reference")
    if given and (not is_reference(value or "") or ("@" in (value or "") and parameter.name != "base")):
        raise click.BadParameter(
            f"{(value or '')[:200]!r} is not the name of an image, such as registry/path:tag", param=parameter
        )
    return value or ""


def no_password(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Build arguments stay readable in the image's history, and in the process list while it is built."""
    if value and re.match(r"[^/]*//[^/]*@", value):
        raise click.BadParameter(
            "an address with a user or password would stay in the image; put it into the base image's pip.conf",
            param=parameter,
        )
    return value


def file_name(about: Mapping[str, Any], suffix: str) -> str:
    """titan-stable-arm64.sqsh for an image that `build` made; "" for any other."""
    labels = (about.get("Config") or {}).get("Labels") or {}
    title = str(labels.get("org.opencontainers.image.title", ""))
    known = re.fullmatch(r"titan-[A-Za-z0-9][A-Za-z0-9._-]*", title) and about.get("Architecture") in ARCHES
    return f"{title}-{about['Architecture']}{suffix}" if known else ""


def target_path(output: Path | None, name: str, force: bool) -> Path:
    """`output`, or in it `name` where it is a directory; the working directory by default.

    Raises LauncherError where nothing could be written, and for a file that exists unless `force`.
    """
    path = output or Path()
    if path.is_dir():
        if not name:
            raise click.UsageError("The image does not say which channel it is: name the file with -o FILE.")
        path /= name
    folder = path.parent
    if not folder.is_dir():
        fix = f"mkdir -p {quoted(folder)}"
        raise LauncherError(f"{folder}: no such directory", fix, status=ExitStatus.FILESYSTEM)
    if not os.access(folder, os.W_OK | os.X_OK):
        what = f"{folder}: this user cannot write there"
        raise LauncherError(what, "another place: -o PATH", status=ExitStatus.FILESYSTEM)
    if os.path.lexists(path) and not (path.is_file() or path.is_symlink()):
        raise LauncherError(f"{path} is not a file", "another name: -o FILE")
    if os.path.lexists(path) and not force:
        raise LauncherError(f"{path} exists", "replace it: --force; or another name: -o FILE")
    return path
