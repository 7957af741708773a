"""A .sif for clusters that have Apptainer and no Pyxis, through spython.

Needs the extra `apptainer` and Apptainer 1.4 (`--mksquashfs-args`); neither root nor an entry in /etc/subuid.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.base.output import say
from launcher.image.convert import beside
from launcher.image.inspect import inspect
from launcher.image.squashfs_tools import FORMATS, Tree

INSTALL = "https://apptainer.org/docs/admin/latest/installation.html, or: sudo apt-get install apptainer"


def sif(squashfs: Path, output: Path) -> Path:
    """Writes `output`, a SIF, from a squashfs of `launcher image convert`.

    The image's environment, which the squashfs keeps in /etc/environment, becomes the SIF's; its versions become
    labels. Nothing stands under the final name before Apptainer has built it, shown its labels and run `true` in it.
    Raises LauncherError for no spython, no Apptainer, no squashfs, and for what Apptainer refuses, in its words.
    """
    with _spython() as client, tempfile.TemporaryDirectory(prefix="titan-sif-") as folder, beside(output) as target:
        definition = Path(folder) / "titan.def"
        definition.write_text(_definition(squashfs.absolute()), encoding="utf-8", errors="surrogateescape")
        say(f"apptainer build {output}")
        _build(client, definition, target)
        _verify(client, target)
        os.replace(target, output)
    say(f"{output}: {output.stat().st_size / 1e6:,.0f} MB")
    return output


def _definition(squashfs: Path) -> str:
    """Apptainer's definition of the same image. A plain squashfs brings neither environment nor labels."""
    facts = inspect(squashfs)
    lines = ["Bootstrap: localimage", f"From: {squashfs}", "", "%environment"]
    environment = Tree(squashfs).read("etc/environment", 1 << 20) or b""
    for line in environment.decode("utf-8", "surrogateescape").splitlines():
        name, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_]\w*", name):
            lines.append(f"export {name}={shlex.quote(value)}")
    labels = {"arch": facts.arch, "channel": facts.channel, **facts.versions}
    # On one line each: a version with a line break in it could begin a section of commands.
    lines += ["", "%labels", *(" ".join(f"titan.{name} {value}".split()) for name, value in labels.items() if value)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------- spython


@contextlib.contextmanager
def _spython() -> Iterator[Any]:
    """spython's client, which calls Apptainer by its old name `singularity`, whatever it is called here."""
    try:
        from spython.main import Client
    except ImportError as error:
        what = "Apptainer is driven through spython, which is not installed"
        raise LauncherError("package-missing", what, install("apptainer"), status=ExitStatus.ERROR) from error
    program = shutil.which("apptainer")
    if not program:
        raise LauncherError("program-missing", "apptainer: no such program", INSTALL, status=ExitStatus.ERROR)
    path = os.environ["PATH"]
    with tempfile.TemporaryDirectory(prefix="titan-apptainer-") as folder:
        (Path(folder) / "singularity").symlink_to(program)
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
        try:
            yield Client
        finally:
            os.environ["PATH"] = path


def _build(client: Any, definition: Path, target: Path) -> None:
    options = ["--mksquashfs-args", shlex.join(FORMATS["unpack"].options())]
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):  # where spython prints what Apptainer said, and nowhere else
            how = {"options": options, "force": True, "sudo": False, "stream": True, "quiet": True}
            _, lines = client.build(recipe=str(definition), image=str(target), **how)
            for _ in lines:
                pass
    except subprocess.CalledProcessError as error:
        raise _refused("apptainer build", error.returncode, words.getvalue()) from None


def _refused(what: str, code: int, words: str) -> LauncherError:
    fix = "apptainer --version: 1.4 or newer; then: unshare --user true"
    if "no space left" in words.lower() or "disk quota" in words.lower():
        fix = "it unpacks the image into a directory of its own; one with room: export APPTAINER_TMPDIR=DIR"
    what = f"{what} failed with code {code}"
    return LauncherError("apptainer-failed", what, fix, status=ExitStatus.ERROR, original=words[-2000:])


def _verify(client: Any, target: Path) -> None:
    """The file that was made tells what is in it, and a program starts in it."""
    found = client.inspect(str(target), quiet=True)
    if not isinstance(found.get("attributes"), Mapping):  # otherwise spython's record of what failed
        raise _refused("apptainer inspect", found["return_code"], "".join(found["message"]))
    arch = found["attributes"]["labels"].get("titan.arch", os.uname().machine)
    if arch != os.uname().machine:
        return  # nothing of it runs here
    done = client.execute(str(target), ["true"], return_result=True, quiet=True)
    if done["return_code"]:
        raise _refused("apptainer exec", done["return_code"], "".join(done["message"]))
