"""`launcher image build`: one image of a channel for one architecture, from the Dockerfile at the top of the
checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import data_dir
from launcher.base.output import say
from launcher.base.values import whole
from launcher.image import engine as docker_engine
from launcher.image.channels import Channel, channel, lock_path
from launcher.image.lock import lock, pinned
from launcher.image.squashfs_tools import TAIL, run

_IN_IMAGE = ("check.py", "describe.py", "channels.toml")

# What the last lines of a failed build say -> what to do. The first that matches is told.
_FIXES = (
    (
        r"DO NOT MATCH THE HASHES|do not match|Hashes are required|No matching distribution found|HTTP error 404",
        "the lock {lock} names a file that the index does not have, or not with this content. A new lock: launcher "
        "image lock {channel} --arch {arch}; do not use an index that changes files",
    ),
    (r"no space left on device", "the disk of the Docker engine is full: docker system df; docker system prune"),
    (
        r"exec format error",
        "nothing there runs programs for {arch}: another base image (--base IMAGE), or an emulator where the engine "
        "runs: sudo apt-get install qemu-user-static",
    ),
    (
        # The last is the Dockerfile's: the lock is chosen by the architecture that the base image is made of.
        r"pull access denied|manifest unknown|not found: manifest|repository \S+ not found|manifest for \S+ not found|"
        r"does not match the specified platform|no match(?:ing manifest)? for (?:platform|linux/)|no lock: containers/",
        "there is no base image {base} for {arch}; choose another: --base IMAGE",
    ),
    (
        r"Temporary failure|Could not resolve|lookup \S+|i/o timeout|connection refused|unreachable|Client\.Timeout|"
        r"CERTIFICATE_VERIFY_FAILED",
        "the build does not reach the network. With the host's: --network host; without torch's own index: make image "
        "CHANNEL=stable; a base image that holds your site's certificates: --base IMAGE",
    ),
)


@dataclass(frozen=True)
class Built:
    """An image that the engine now has."""

    channel: str
    arch: str  # Docker's word
    tag: str  # titan:stable-amd64
    image_id: str
    bytes: int  # all layers, unpacked
    seconds: float


def build(
    name: str,
    arch: str,
    *,
    tag: str = "",
    base: str = "",
    lock_file: Path | None = None,
    torch_index: str | None = None,
    index_url: str = "",
    network: str = "",
) -> Built:
    """Builds channel `name` for `arch` and returns what came out.

    `base` replaces the channel's base image, `lock_file` its lock, `torch_index` (empty: none) and `index_url`
    the places that packages come from, `network` is Docker's word for the network of the build's steps.
    Where there is no lock yet, it is made first.
    Raises LauncherError with the last lines of the build and, where they say what is wrong, with what to do.
    """
    chosen = channel(name)
    own = docker_engine.own_arch()
    tag = tag or f"titan:{name}-{arch}"
    base = base or chosen.base
    locked = lock_file or lock_path(name, arch)
    if not locked.is_file():
        say(f"channel {name} has no lock for {arch} yet")
        locked = lock(name, arch, torch_index=torch_index)
    arguments = build_arguments(chosen, base=base, index=torch_index, index_url=index_url)
    emulated = "" if arch == own else " (emulated: 6 to 13 times slower)"
    say(f"building {tag} for {arch}{emulated} on {base}, {version(locked)} of {locked}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="titan-build-") as folder:
        _fill(Path(folder), locked, f"{name}-{arch}.txt")
        command = ["--force-rm", f"--tag={tag}"]
        command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
        command += [f"--label=org.opencontainers.image.base.name={base}"]
        command += [f"--label=org.opencontainers.image.version={version(locked)}"]
        command += [f"--network={network}"] if network else []
        # Not said where it goes without saying: `docker import` may have written the wrong architecture.
        command += [] if arch == own else [f"--platform=linux/{arch}"]
        code, output = docker_engine.build([*command, folder])
    if code:
        fixes = [fix for pattern, fix in _FIXES if re.search(pattern, output, re.IGNORECASE)]
        raise LauncherError(
            "build-failed",
            f"the build of channel {name} for {arch} failed",
            fixes[0].format(lock=locked, channel=name, arch=arch, base=base) if fixes else "read its last lines below",
            status=ExitStatus.ERROR,
            original="\n".join(output.splitlines()[-25:]),
        )
    found = docker_engine.inspect(tag)
    built = Built(name, arch, tag, str(found["Id"]), int(found["Size"]), time.monotonic() - started)
    say(f"built {tag}, {built.bytes / 1e9:.1f} GB, {built.seconds:.0f} s: {built.image_id}")
    return built


def build_arguments(
    chosen: Channel, *, base: str = "", index: str | None = None, index_url: str = "", sbom: str = ""
) -> dict[str, str]:
    """What the Dockerfile is told by --build-arg; `build` and .github/workflows/image.yml say the same."""
    return {
        "BASE_IMAGE": base or chosen.base,
        "CHANNEL": chosen.name,
        "EXTRA_INDEX_URL": chosen.torch_index if index is None else index,
        "INDEX_URL": index_url,
        "VISIBLE_DEVICES": "all" if chosen.cuda else "void",
        "SOURCE_REVISION": _git("rev-parse", "HEAD"),
        "SBOM": sbom,
        "CREATED": created(),
    }


def created() -> str:
    """The time that the image carries, as RFC 3339: SOURCE_DATE_EPOCH, else the commit's; empty without both."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "") or _git("log", "-1", "--format=%ct")
    if not epoch:
        return ""
    seconds = whole(epoch)
    if seconds is None or seconds >= 2**32:  # a squashfs holds no more
        what = f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds that a squashfs can hold"
        raise LauncherError("source-date-epoch", what, "export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)")
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _git(*arguments: str) -> str:
    """What git says about the checkout that the Dockerfile is in; empty outside one."""
    with suppress(LauncherError):
        ran = run(["git", f"--git-dir={dockerfile().with_name('.git')}", *arguments], TAIL)
        return "" if ran.code else ran.out.decode().strip()
    return ""


def dockerfile() -> Path:
    """The Dockerfile: beside `containers`, in a checkout and in an installed wheel."""
    return data_dir("containers").parent / "Dockerfile"


def version(locked: Path) -> str:
    """What the image is a version of: 0.3.0-torch2.14.1."""
    found = pinned(locked)
    return f"{found.get('torchtitan', 'none')}-torch{found.get('torch', 'none')}".replace("+", "_")


def _fill(folder: Path, locked: Path, lock_name: str) -> None:
    """Only what the Dockerfile copies, so that nothing else of the checkout is sent or spoils the cache."""
    containers = data_dir("containers")
    (folder / "containers" / "locks").mkdir(parents=True)
    shutil.copyfile(dockerfile(), folder / "Dockerfile")
    shutil.copyfile(locked, folder / "containers" / "locks" / lock_name)
    for file in _IN_IMAGE:
        shutil.copyfile(containers / file, folder / "containers" / file)
