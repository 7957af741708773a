"""`launcher image check`: runs containers/check.py inside an image of the Docker engine, or inside a squashfs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import data_dir
from launcher.base.values import parse_json
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine
from launcher.image.squashfs_file import superblock

# The first half prepares the root directory $1, the second half runs what stands on standard input in it. All of it in
# namespaces of its own: nothing stays mounted, whatever happens, and there is no network.
_PATH = "PATH=$PATH:/usr/sbin:/sbin\n"  # an ordinary user's may lack chroot and mount
_ENTER = r"""
mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" || exit 126
exec chroot "$1" /usr/bin/env -i /bin/sh -c '
while IFS= read -r line; do
  case $line in [A-Za-z_]*=*) export "$line" ;; esac
done </etc/environment
export HOME=/tmp
exec python3 -B - --json'
"""
_NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child")


@dataclass(frozen=True)
class Checked:
    """One thing that was looked at inside the image."""

    name: str
    status: str  # "ok", "failed", "skipped"
    found: str


def check(
    image: str,
    *,
    engine: Engine | None = None,
    timeout_s: float = 900,
) -> list[Checked]:
    """Every check, in the order of containers/check.py.

    `image` is the path of a squashfs (it holds a slash, ends in .sqsh, or exists) or an image of the engine.
    Raises LauncherError where the checks could not be run at all; a failed check is no error here.
    """
    program = (data_dir("containers") / "check.py").read_bytes()
    if is_file(image):
        code, stdout, stderr = _in_squashfs(Path(image), program, timeout_s)
    else:
        command = ["python3", "-B", "/tmp/titan-check.py", "--json"]
        code, stdout, stderr = docker_engine.run(
            engine or docker_engine.connect(),
            image,
            command,
            files={"titan-check.py": program},
            timeout_s=timeout_s,
        )
    results = _read(stdout)
    if results is None:
        raise LauncherError(
            f"the checks did not run in {image} (code {code})",
            "an image that `launcher image build` made has Python 3.11 or newer",
            original=(stderr or stdout)[-2000:],
        )
    return results


def is_file(image: str) -> bool:
    """Whether a squashfs is meant, as opposed to an image of the engine (which may hold slashes, too)."""
    return image.endswith((".sqsh", ".squashfs")) or image.startswith(("/", "./", "../")) or os.path.isfile(image)


def _read(stdout: str) -> list[Checked] | None:
    try:
        value = parse_json(stdout.strip().splitlines()[-1])
        return [Checked(item["name"], item["status"], item["found"]) for item in value["checks"]]
    except (ValueError, LookupError, TypeError):
        return None


def _in_squashfs(path: Path, program: bytes, timeout_s: float) -> tuple[int, str, str]:
    """Unpacked into TMPDIR: an ordinary user may not mount it."""
    superblock(path)  # says it better than unsquashfs where the file is missing, empty or cut off
    with tempfile.TemporaryDirectory(prefix="titan-check-") as folder:
        root = Path(folder) / "root"
        try:
            _unpack(path.resolve(), root)
            namespaces = _NAMESPACES if os.geteuid() == 0 else (*_NAMESPACES, "--map-root-user")
            done = _run([*namespaces, "sh", "-c", _PATH + _ENTER, "sh", root], program, timeout_s)
            return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        finally:
            with suppress(OSError):  # no chmod must not hide what went wrong before
                subprocess.run(["chmod", "-R", "u+rwX", str(root)], capture_output=True)


def _run(command: list[str | Path], program: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run([str(word) for word in command], input=program, capture_output=True, timeout=timeout_s)
    except FileNotFoundError as error:
        raise LauncherError(
            f"{error.filename} is missing", "sudo apt-get install util-linux", status=ExitStatus.ERROR
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LauncherError(f"the checks did not end within {timeout_s:.0f} s", status=ExitStatus.ERROR) from error


def _unpack(path: Path, root: Path) -> None:
    unsquashfs = shutil.which("unsquashfs")
    if not unsquashfs:
        raise LauncherError("unsquashfs is missing", "sudo apt-get install squashfs-tools", status=ExitStatus.ERROR)
    command = [unsquashfs, "-quiet", "-no-progress", "-no-xattrs", "-force", "-dest", str(root), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LauncherError(
            f"{path} cannot be unpacked into {root.parent}",
            "is the file complete? (launcher image inspect); is there room? another place: export TMPDIR=DIR",
            original=done.stderr + done.stdout,
        )
