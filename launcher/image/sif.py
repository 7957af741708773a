"""A .sif for clusters that have Apptainer and no Pyxis.

Needs Apptainer 1.4 (`--mksquashfs-args`); neither root nor an entry in /etc/subuid.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import say
from launcher.image.convert import beside
from launcher.image.inspect import inspect
from launcher.image.squashfs_tools import FORMATS, TAIL, Tree, run

ENVIRONMENT_BYTES = 1 << 20
BUILD_S = 4 * 3600


def sif(squashfs: Path, output: Path) -> Path:
    """Writes `output`, a SIF, from a squashfs of `launcher image convert`.

    The image's environment, which the squashfs keeps in /etc/environment, becomes the SIF's; its versions become
    labels. Nothing stands under the final name before Apptainer has built it.
    Raises LauncherError for no Apptainer, no squashfs, and for what Apptainer refuses, in its words.
    """
    with tempfile.TemporaryDirectory(prefix="titan-sif-") as folder, beside(output) as target:
        definition = Path(folder) / "titan.def"
        definition.write_text(_definition(squashfs.absolute()), encoding="utf-8", errors="surrogateescape")
        say(f"apptainer build {output}")
        options = ["--force", "--mksquashfs-args", shlex.join(FORMATS["unpack"].options())]
        ran = run(["apptainer", "build", *options, str(target), str(definition)], TAIL << 10, timeout_s=BUILD_S)
        if ran.code:
            fix = "apptainer --version: 1.4 or newer; then: unshare --user true"
            if "no space left" in ran.err.lower() or "disk quota" in ran.err.lower():
                fix = "it unpacks the image into a directory of its own; one with room: export APPTAINER_TMPDIR=DIR"
            what = f"apptainer build failed with code {ran.code}"
            raise LauncherError("apptainer-failed", what, fix, status=ExitStatus.ERROR, original=ran.err)
        os.replace(target, output)
    say(f"{output}: {output.stat().st_size / 1e6:,.0f} MB")
    return output


def _definition(squashfs: Path) -> str:
    """Apptainer's definition of the same image. A plain squashfs brings neither environment nor labels."""
    facts = inspect(squashfs)
    lines = ["Bootstrap: localimage", f"From: {squashfs}", "", "%environment"]
    environment = Tree(squashfs).read("etc/environment", ENVIRONMENT_BYTES) or b""
    for line in environment.decode("utf-8", "surrogateescape").splitlines():
        name, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[A-Za-z_]\w*", name):
            lines.append(f"export {name}={shlex.quote(value)}")
    labels = {"arch": facts.arch, "channel": facts.channel, **facts.versions}
    # On one line each: a version with a line break in it could begin a section of commands.
    lines += ["", "%labels", *(" ".join(f"titan.{name} {value}".split()) for name, value in labels.items() if value)]
    return "\n".join(lines) + "\n"
