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
from launcher.image import ARCHES
from launcher.image import engine as docker_engine
from launcher.image.channels import Channel, channel, lock_path
from launcher.image.convert import source_date
from launcher.image.engine import Engine
from launcher.image.lock import lock, need_lock, pinned
from launcher.image.squashfs_tools import TAIL, run

_IN_IMAGE = ("check.py", "describe.py", "channels.toml")

# What a failed build says -> what it means and what to do. The first that matches is reported.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"THESE PACKAGES DO NOT MATCH THE HASHES|\[sha256:[0-9a-f]+\] do not match|Hashes are required",
        "a file is not the one that the lock {lock} names: {package}",
        "if the lock was edited by hand, or the file was replaced on purpose: launcher image lock {channel} "
        "--arch {arch}; "
        "otherwise do not use that index",
    ),
    (
        r"No matching distribution found for (?P<package>\S+)|HTTP error 404 .*?(?P<address>https?://\S+)",
        "{package} of the lock {lock} is not to be had any more, or not for the base image's Python",
        "launcher image lock {channel} --arch {arch}",
    ),
    (r"no space left on device", "the disk of the Docker engine is full", "docker system df; docker system prune"),
    (
        r"Cannot connect to the Docker daemon|error during connect|unexpected EOF",
        "the Docker engine stopped answering",
        "sudo systemctl status docker; df -h /var/lib/docker",
    ),
    (
        r"qemu: uncaught target signal",
        "the emulator of {arch} crashed; Debian 12's, qemu 7.2, does so when torch is imported",
        "qemu 10 where the engine runs, as Debian 13 has it: sudo apt-get install qemu-user-static; or an engine on a "
        "machine of that architecture: DOCKER_HOST=ssh://...",
    ),
    (
        r"exec format error",
        "the engine cannot run the programs of {base}: it is not for {arch}, or nothing there emulates {arch}",
        "another base image: --base IMAGE; an emulator where the engine runs: sudo apt-get install qemu-user-static",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "a server's certificate is not trusted inside the build",
        "a base image that holds your site's certificates: --base IMAGE",
    ),
    (
        r"pull access denied|manifest unknown|manifest for \S+ not found|not found: manifest|repository \S+ not found",
        "there is no base image {base} to be had",
        "choose another: --base IMAGE",
    ),
    (
        # The last is the Dockerfile's: the lock is chosen by the architecture that the base image is made of. With the
        # file's name: an engine that prints a failed step's command prints these words with a variable behind them.
        r"does not match the specified platform|no match(?:ing manifest)? for (?:platform|linux/)|"
        r"no lock: containers/locks/\w",
        "the base image {base} is not for {arch}",
        "choose another: --base IMAGE",
    ),
    (
        r"Temporary failure (?:in name resolution|resolving)|Could not resolve|lookup \S+|i/o timeout|"
        r"connection refused|Network is unreachable|Client\.Timeout",
        "the build cannot reach the network",
        "docker run --rm {base} cat /etc/resolv.conf; with the host's network: --network host; where torch's own index "
        "is out of reach, a channel that needs PyPI alone: make image CHANNEL=stable",
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


def arches(value: str, engine: Engine) -> list[str]:
    """The architectures that `--arch` asks for: "all", one of them, or empty for the engine's own.

    Raises LauncherError where the engine cannot run one of them, before anything is built.
    """
    chosen = list(ARCHES) if value == "all" else [value or engine.arch]
    for arch in chosen:
        if arch not in ARCHES:
            what, fix = f"there is no architecture {arch!r}", f"one of {', '.join(ARCHES)}"
            raise LauncherError("name-unknown", what, fix, status=ExitStatus.USAGE)
        docker_engine.need_arch(engine, arch)
    return chosen


def build(
    name: str,
    arch: str,
    *,
    engine: Engine,
    tag: str = "",
    base: str = "",
    lock_file: Path | None = None,
    torch_index: str | None = None,
    index_url: str = "",
    network: str = "",
    no_cache: bool = False,
) -> Built:
    """Builds channel `name` for `arch`, one of `arches`, and returns what came out.

    `base` replaces the channel's base image, `lock_file` its lock, `torch_index` (empty: none) and `index_url`
    the places that packages come from, `network` is Docker's word for the network of the build's steps.
    Where there is no lock yet, it is made first. What will be done is said, then every line of the build.
    Raises LauncherError with the cause, when it is a known one, and the last lines of the build.
    """
    chosen = channel(name)
    tag = tag or f"titan:{name}-{arch}"
    base = base or chosen.base
    locked = lock_file or lock_path(name, arch)
    if lock_file:
        need_lock(lock_file, f"launcher image lock {name} --arch {arch}")
    elif not locked.is_file():
        say(f"channel {name} has no lock for {arch} yet")
        locked = lock(name, arch, torch_index=torch_index)
    arguments = build_arguments(chosen, base=base, index=torch_index, index_url=index_url)
    packages = len(pinned(locked.read_text(encoding="utf-8")))
    emulated = "" if arch == engine.arch else " (emulated: 6 to 13 times slower)"
    say(f"building {tag} for {arch}{emulated} on {base}, {packages} packages of {locked}")
    say(f"Docker engine {engine.version} at {engine.host}")
    if emulated and engine.host.startswith("unix://") and 0 < (qemu := docker_engine.emulator_version(arch)) < 10:
        say(f"warning: the emulator of {arch} is qemu {qemu}: 7.2 crashes when torch is imported, 10 does not")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="titan-build-") as folder:
        _fill(Path(folder), locked, f"{name}-{arch}.txt")
        command = ["build", "--force-rm", f"--tag={tag}"]
        command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
        command += [f"--label={key}={value}" for key, value in labels(base, locked).items()]
        command += [f"--network={network}"] if network else []
        command += ["--no-cache"] if no_cache else []
        # Not said where it goes without saying: `docker import` may have written the wrong architecture.
        command += [] if arch == engine.arch else [f"--platform=linux/{arch}"]
        code, output = docker_engine.command(engine, [*command, folder], say)
    if code:
        raise _explain("\n".join(output.splitlines()[-60:]), name, arch, base, locked)
    found = docker_engine.inspect(engine, tag)
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


def labels(base: str, locked: Path) -> dict[str, str]:
    """What the image says of itself beside the Dockerfile's labels; for `build` and .github/workflows/image.yml."""
    name, _, digest = base.partition("@")
    found = {"base.name": name, "base.digest": digest, "version": version(locked)}
    if repository := os.environ.get("GITHUB_REPOSITORY"):  # a checkout's own address may hold a password
        found["source"] = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
    return {f"org.opencontainers.image.{key}": value for key, value in found.items() if value}


def created() -> str:
    """The time that the image carries, as RFC 3339: SOURCE_DATE_EPOCH, else the commit's; empty without both."""
    seconds = source_date()
    if seconds is None:
        seconds = whole(_git("log", "-1", "--format=%ct"))
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


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
    found = pinned(locked.read_text(encoding="utf-8"))
    return f"{found.get('torchtitan', 'none')}-torch{found.get('torch', 'none')}".replace("+", "_")


def _fill(folder: Path, locked: Path, lock_name: str) -> None:
    """Only what the Dockerfile copies, so that nothing else of the checkout is sent or spoils the cache."""
    try:
        (folder / "containers" / "locks").mkdir(parents=True)
        shutil.copyfile(dockerfile(), folder / "Dockerfile")
        shutil.copyfile(locked, folder / "containers" / "locks" / lock_name)
        for file in _IN_IMAGE:
            shutil.copyfile(data_dir("containers") / file, folder / "containers" / file)
    except OSError as error:
        what, fix = f"cannot put together what the build needs: {error}", "check TMPDIR and the checkout"
        raise LauncherError("build-context", what, fix, status=ExitStatus.FILESYSTEM) from error


def _explain(text: str, channel: str, arch: str, base: str, lock: Path) -> LauncherError:
    """The error of a failed build: the first known cause in its last lines, and those lines."""
    what, fix = "the build of channel {channel} for {arch} failed", "read the last lines below"
    package = ""
    for pattern, cause, remedy in _CAUSES:
        if match := re.search(pattern, text, re.IGNORECASE):
            what, fix = cause, remedy
            # Of a hash that does not match pip prints the requirement, then the one that was expected.
            printed = re.search(r"^\s*(\S+) from \S+:?\s*(?:\(from .*\))?:?\s*$", text, re.MULTILINE)
            package = next(filter(None, match.groupdict().values()), printed[1] if printed else "see below")
            break
    values = {"channel": channel, "arch": arch, "base": base, "lock": lock, "package": package}
    tail = "\n".join(text.splitlines()[-25:])
    return LauncherError(
        "build-failed", what.format(**values), fix.format(**values), status=ExitStatus.ERROR, original=tail
    )
