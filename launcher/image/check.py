"""`launcher image check`: runs containers/check.py inside an image of the Docker engine, or inside a squashfs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.base.files import data_dir
from launcher.base.values import parse_json
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine
from launcher.image.squashfs_file import superblock
from launcher.image.squashfs_tools import TAIL, Ran, Tree, run

# The first half prepares the root directory $1, the second half runs what stands on standard input in it. All of it in
# namespaces of its own: nothing stays mounted, whatever happens, and there is no network.
# An ordinary user's PATH may lack chroot and mount.
_ENTER = r"""
PATH=$PATH:/usr/sbin:/sbin
mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" || exit 126
exec chroot "$1" /usr/bin/env -i /bin/sh -c '
while IFS= read -r line; do
  case $line in [A-Za-z_]*=*) export "$line" ;; esac
done </etc/environment
export HOME=/tmp
exec python3 -B - --json'
"""
_NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child")


STATUSES = {"ok", "failed", "skipped"}


@dataclass(frozen=True)
class Checked:
    """One thing that was looked at inside the image."""

    name: str
    status: str  # of STATUSES
    found: str


def check(image: str, *, engine: Engine | None = None, timeout_s: float = 900) -> list[Checked]:
    """Every check, in the order of containers/check.py.

    `image` is the path of a squashfs (it holds a slash, ends in .sqsh, or exists) or an image of the engine.
    Raises LauncherError where the checks could not be run at all; a failed check is no error here.
    """
    program = (data_dir("containers") / "check.py").read_text(encoding="utf-8")
    if is_file(image):
        ran = _in_squashfs(Path(image), program.encode(), timeout_s)
    else:
        command = ["python3", "-B", "-c", program, "--json"]
        ran = docker_engine.run(engine or docker_engine.connect(), image, command, timeout_s=timeout_s)
    results = _read(ran.out)
    if results is None or ran.cut:
        more = f"it printed more than {docker_engine.OUTPUT >> 20} MiB" if ran.cut else f"code {ran.code}"
        words = ran.err or ran.out[-2000:].decode(errors="replace")
        fix = "an image that `launcher image build` made has Python 3.11 or newer"
        raise LauncherError("image-check", f"the checks did not run in {image} ({more})", fix, original=words)
    return results


def is_file(image: str) -> bool:
    """Whether a squashfs is meant, as opposed to an image of the engine (which may hold slashes, too)."""
    return image.endswith((".sqsh", ".squashfs")) or image.startswith(("/", "./", "../")) or os.path.isfile(image)


def _read(stdout: bytes) -> list[Checked] | None:
    """The last line, if it is what containers/check.py prints: an image may hold any other program of that name."""
    try:
        checks = parse_json(stdout.strip().split(b"\n")[-1])["checks"]
        found = [(item["name"], item["status"], item["found"]) for item in checks]
    except (ValueError, LookupError, TypeError):
        return None
    sound = all(isinstance(word, str) for item in found for word in item) and {item[1] for item in found} <= STATUSES
    return [Checked(*item) for item in found] if found and sound else None


def _in_squashfs(path: Path, program: bytes, timeout_s: float) -> Ran:
    """Unpacked into TMPDIR: an ordinary user may not mount it."""
    superblock(path)  # says it better than unsquashfs where the file is missing, empty or cut off
    tree = Tree(path.resolve())
    namespaces = _NAMESPACES if os.geteuid() == 0 else (*_NAMESPACES, "--map-root-user")
    _need_namespaces(namespaces)
    with tempfile.TemporaryDirectory(prefix="titan-check-") as folder:
        root = Path(folder) / "root"
        try:
            tree.unpack(root, timeout_s)
            command = [*namespaces, "sh", "-c", _ENTER, "sh", str(root)]
            return run(command, docker_engine.OUTPUT, stdin=program, timeout_s=timeout_s)
        finally:
            with suppress(OSError):  # no chmod must not hide what went wrong before
                subprocess.run(["chmod", "-R", "u+rwX", str(root)], capture_output=True)


def _need_namespaces(command: tuple[str, ...]) -> None:
    """Before gigabytes are unpacked. Ubuntu 24.04 lets ordinary users make the namespaces, but not mount in them."""
    ran = run([*command, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], TAIL)
    if ran.code:
        raise LauncherError(
            "image-check",
            "the checks need user namespaces, which this machine does not let you create",
            "sudo launcher image check FILE; or, until the next start: "
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), kernel.unprivileged_userns_clone=1 "
            "(Debian)",
            original=ran.err,
        )
