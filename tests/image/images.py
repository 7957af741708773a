"""Real images for tests of every folder: a Docker engine, base images, and the channel cpu as a squashfs.

    from tests.image.images import cpu_squashfs

`cpu_squashfs()` costs three minutes the first time and nothing afterwards. Whatever a machine lacks skips the test.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image import engine as docker_engine
from launcher.image.build import Built, build, dockerfile
from launcher.image.channels import lock_path
from launcher.image.engine import Engine
from launcher.image.squashfs_file import sidecar_path
from tests.image.dockerd import missing_packages, pip_setting, running_engine, served

ROOT = Path(__file__).parent.parent.parent
CACHE = Path(os.environ.get("LAUNCHER_TEST_CACHE") or "/var/tmp/launcher-test-cache")  # ordinary users read it, too
EPOCH = "1700000000"  # what the images of the tests are dated
SUITE = "bookworm"  # Python 3.11, as the channel cpu wants
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
FOREIGN_PACKAGES = (  # what the Dockerfile installs, so that none of it has to be done under emulation
    *("apt", "bash", "ca-certificates", "debian-archive-keyring", "gpgv", "g++", "gcc", "ibverbs-providers"),
    *("libc6-dev", "libibverbs1", "libpython3-dev", "librdmacm1", "pciutils", "python3"),
    "python3-pip-whl",
)
# What decides the bytes of the squashfs besides the Dockerfile and the lock.
SOURCES = (
    *("containers/check.py", "containers/describe.py", "containers/channels.toml", "launcher/image/build.py"),
    *("launcher/image/convert.py", "launcher/image/export.py", "launcher/image/squashfs_tools.py"),
)

_running: Engine | None = None
_served: dict[str, str] = {}  # pip's find-links of this machine -> address for the builds, while an engine runs


def cpu_squashfs() -> Path:
    """The channel cpu of this checkout, built from the Dockerfile and its lock, and converted. Kept in the cache."""
    if platform.machine() != "x86_64":
        pytest.skip("the channel cpu has a lock for amd64 only")
    digest = hashlib.sha256(SUITE.encode())
    for path in (dockerfile(), lock_path("cpu", "amd64"), *(ROOT / name for name in SOURCES)):
        digest.update(path.read_bytes())
    target = CACHE / f"titan-cpu-amd64-{digest.hexdigest()[:12]}.sqsh"
    if complete(target):
        return target
    with kept_engine() as engine:
        if not complete(target):  # another process may have been faster
            index = [] if torch_index() is None else ["--torch-index", ""]
            places = ["--base", cpu_base(engine), "--network", "host", *index, "--output", target]
            command = ["image", "build", "cpu", *places]  # what `make image CHANNEL=cpu` runs
            environment = os.environ | {"PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": EPOCH}
            done = subprocess.run(
                [sys.executable, "-m", "launcher", *map(str, command)], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            for old in set(CACHE.glob("titan-cpu-amd64-*.sqsh*")) - {target, sidecar_path(target)}:
                old.unlink(missing_ok=True)
    return target


def complete(path: Path) -> bool:
    return path.exists() and sidecar_path(path).exists()


@contextmanager
def kept_engine() -> Iterator[Engine]:
    """An engine of the tests' own whose images stay in the cache; with LAUNCHER_TEST_DOCKER=1 the one that is there.

    Used again within: the same one. Another process waits until this one is done with it.
    """
    global _running
    if _running:
        yield _running
        return
    pytest.importorskip("docker")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if os.environ.get("LAUNCHER_TEST_DOCKER") != "1" and os.geteuid() != 0:
            pytest.skip("starting a Docker engine needs root; LAUNCHER_TEST_DOCKER=1 uses an existing one")
        CACHE.mkdir(parents=True, exist_ok=True)
        only = stack.enter_context((CACHE / "docker.lock").open("w"))
        fcntl.flock(only, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        if os.environ.get("LAUNCHER_TEST_DOCKER") != "1":
            if missing_packages():
                pytest.skip(f"missing Debian packages: apt install {' '.join(missing_packages())}")
            patch.setenv("DOCKER_HOST", stack.enter_context(running_engine(CACHE / "docker")))
        for place in pip_setting("find-links").split():
            if Path(place).is_dir():
                _served[place] = stack.enter_context(served(Path(place)))
        _running = docker_engine.connect()
        stack.callback(_forget)
        yield _running


def _forget() -> None:
    global _running
    _running = None
    _served.clear()


def cpu_base(engine: Engine) -> str:
    """Debian as mmdebstrap makes it, in the place of the registry's."""
    return make_base(engine, "amd64", rootfs("amd64"))


def built(name: str, arch: str, engine: Engine, base: str, **options: Any) -> Built:
    """`build` for these base images; when it fails, the test's report shows the last lines of the build."""
    options.setdefault("torch_index", torch_index())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", EPOCH)
        try:
            return build(name, arch, engine=engine, base=base, network="host", **options)
        except LauncherError as error:
            pytest.fail(f"{error.what}\n{error.original}")


def rootfs(arch: str) -> Path:
    """A tar file of a small Debian for `arch`: native in a minute, foreign in half of one."""
    # apt's lists of descriptions would be half of what every `apt-get update` in a build reads.
    options, name = ['--aptopt=Acquire::Languages "none"'], f"rootfs-{SUITE}-{arch}"
    if arch == "amd64":
        return debian(name, SUITE, arch, *options, "--variant=minbase", "--include=ca-certificates")
    hook = Path(__file__).with_name("foreign_rootfs.py")
    options += ["--variant=extract", "--include=?essential", f"--include={','.join(FOREIGN_PACKAGES)}"]
    options += [f'--extract-hook=python3 {shlex.quote(str(hook))} "$1"']
    return debian(name, SUITE, arch, *options, recipe=hook.read_text())


def debian(name: str, suite: str, arch: str, *options: str, recipe: str = "") -> Path:
    """What mmdebstrap makes, as a tar file: once, and then kept in the cache. `recipe`: what decides it, too."""
    if not shutil.which("mmdebstrap") or os.geteuid() != 0:
        pytest.skip("needs root and a Debian package: apt install mmdebstrap")
    key = hashlib.sha256("\0".join([suite, arch, *options, recipe]).encode()).hexdigest()[:10]
    target = CACHE / f"{name}-{key}.tar"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="debian-", dir=CACHE) as folder:
            made = Path(folder) / "made.tar"
            command = ["mmdebstrap", "--quiet", "--mode=root", f"--arch={arch}", *options, suite, str(made)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                pytest.skip(f"Debian {suite} cannot be had here: {done.stderr[-500:]}")
            made.replace(target)
    return target


def torch_index() -> str | None:
    """None: the channel's own. It cannot be reached where its wheels lie on the machine."""
    return "" if any(list(Path(place).glob("torch-*.whl")) for place in _served) else None


def make_base(engine: Engine, arch: str, tar: Path) -> str:
    """The image of a root directory plus this machine's pip settings, of which the Dockerfile knows nothing:
    certificates, index, wheels that lie here."""
    config = ["[global]", "cert = /etc/titan-test-ca.crt"]
    if index := pip_setting("index-url"):
        config.append(f"index-url = {index}")
    config += [f"find-links = {address}" for address in _served.values()]
    files = {
        "Dockerfile": b"FROM scratch\nADD rootfs.tar /\nCOPY ca.crt /etc/titan-test-ca.crt\nCOPY pip.conf /etc/\n",
        "pip.conf": "\n".join([*config, ""]).encode(),
        "ca.crt": CERTIFICATES.read_bytes(),
    }
    tag = f"titan-test-base:{tar.stem}-{hashlib.sha256(b''.join(files.values())).hexdigest()[:10]}"
    if not engine.client.api.images(tag):  # of an earlier run
        with tempfile.TemporaryDirectory(prefix="base-", dir=CACHE) as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            shutil.copyfile(tar, Path(folder, "rootfs.tar"))
            # FROM scratch with a platform: `docker import` would mark every root directory as this machine's.
            command = ["build", f"--tag={tag}", f"--platform=linux/{arch}", folder]
            code, output = docker_engine.command(engine, command)
            assert code == 0, output
    return tag
