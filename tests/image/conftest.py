"""Fixtures of the tests that need a real Docker engine, and the images that it builds from the Dockerfile."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LauncherError
from launcher.image import engine as docker_engine
from launcher.image.build import Built, build
from launcher.image.engine import Engine
from tests.image.dockerd import missing_packages, pip_setting, running_engine, served

ROOT = Path(__file__).parent.parent.parent
CACHE = Path(os.environ.get("LAUNCHER_TEST_CACHE") or ROOT / ".cache")
SUITE = "bookworm"  # Python 3.11, as the channel cpu wants
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
FOREIGN_PACKAGES = (  # what the Dockerfile installs, so that little of it has to be done under emulation
    *("apt", "bash", "ca-certificates", "debian-archive-keyring", "gpgv", "g++", "gcc", "ibverbs-providers"),
    *("libc6-dev", "libibverbs1", "libpython3-dev", "librdmacm1", "pciutils", "python3"),
)
TINY_LOCK = """\
idna==3.10 \\
    --hash=sha256:946d195a0d259cbba61165e88e65941f16e9b36ea6ddb97f00452bae8b1287d3
packaging==25.0 \\
    --hash=sha256:29572ef2b1f17581046b3a2227d5c611fb25ec70ca1ba8554b24b0e69331a484
"""


@dataclass(frozen=True)
class Base:
    """A base image for builds on this machine, with what its network asks for; the Dockerfile knows nothing of it."""

    tag: str
    torch_index: str | None  # None: the channel's own


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine of the tests' own; with LAUNCHER_TEST_DOCKER=1 the one that is there.

    LAUNCHER_TEST_DOCKER_DATA names a directory for its images that is kept: the next run builds from its cache.
    """
    pytest.importorskip("docker")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if os.environ.get("LAUNCHER_TEST_DOCKER") != "1":
            if os.geteuid() != 0:
                pytest.skip(
                    "starting a Docker engine needs root; LAUNCHER_TEST_DOCKER=1 uses an existing one"
                )
            if missing_packages():
                pytest.skip(f"missing Debian packages: apt install {' '.join(missing_packages())}")
            CACHE.mkdir(parents=True, exist_ok=True)
            data_root = os.environ.get("LAUNCHER_TEST_DOCKER_DATA") or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="docker-", dir=CACHE, ignore_cleanup_errors=True)
            )
            patch.setenv("DOCKER_HOST", stack.enter_context(running_engine(Path(data_root))))
        yield docker_engine.connect()


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> Iterator[Base]:
    """Debian as mmdebstrap makes it, in the place of the registry's."""
    with ExitStack() as stack:
        yield make_base(engine, "amd64", rootfs("amd64"), stack)


@pytest.fixture(scope="session")
def cpu_image(engine: Engine, base_image: Base) -> Built:
    """The channel cpu, built from the Dockerfile and its lock as a user builds it. 2 to 3 minutes."""
    return built("cpu", "amd64", engine, base_image)


@pytest.fixture(scope="session")
def tiny_lock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small packages of pure Python: what a build does besides installing torch."""
    path = tmp_path_factory.mktemp("lock") / "tiny.txt"
    path.write_text(TINY_LOCK)
    return path


@pytest.fixture(scope="session")
def tiny_image(engine: Engine, base_image: Base, cpu_image: Built, tiny_lock: Path) -> Built:
    """The same Dockerfile with the tiny lock; after `cpu_image` only the last layers are new."""
    return built("cpu", "amd64", engine, base_image, lock_file=tiny_lock, tag="titan:tiny-amd64")


def rootfs(arch: str) -> Path:
    """A tar file of a small Debian for `arch`: made once (native 1 minute, foreign half), kept in the cache."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("missing Debian package: apt install mmdebstrap")
    options = ["--variant=minbase", "--include=ca-certificates"]
    recipe = ""
    if arch != "amd64":
        hook = Path(__file__).with_name("foreign_rootfs.py")
        recipe = hook.read_text()
        options = ["--variant=extract", "--include=?essential", f"--include={','.join(FOREIGN_PACKAGES)}"]
        options.append(f'--extract-hook=python3 {shlex.quote(str(hook))} "$1"')
    key = hashlib.sha256("\0".join([SUITE, arch, *options, recipe]).encode()).hexdigest()[:10]
    target = CACHE / f"rootfs-{SUITE}-{arch}-{key}.tar"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rootfs-", dir=CACHE) as folder:
            made = Path(folder) / "rootfs.tar"
            command = [
                "mmdebstrap",
                "--quiet",
                "--mode=root",
                f"--arch={arch}",
                *options,
                SUITE,
                str(made),
            ]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, done.stderr[-2000:]
            made.replace(target)
    return target


def built(name: str, arch: str, engine: Engine, base: Base, **options: Any) -> Built:
    """`build` for these base images; when it fails, the test's report shows the last lines of the build."""
    options.setdefault("torch_index", base.torch_index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        try:
            return build(name, arch, engine=engine, base=base.tag, network="host", **options)
        except LauncherError as error:
            pytest.fail(f"{error.what}\n{error.original}")


def make_base(engine: Engine, arch: str, tar: Path, stack: ExitStack) -> Base:
    """The image of a root directory plus this machine's pip settings: certificates, index, wheels that lie here."""
    config = ["[global]", "cert = /etc/titan-test-ca.crt"]
    if index := pip_setting("index-url"):
        config.append(f"index-url = {index}")
    torch_index = None
    for place in pip_setting("find-links").split():
        if Path(place).is_dir():
            config.append(f"find-links = {stack.enter_context(served(Path(place)))}")
            # The channel's own index cannot be reached where its wheels lie on the machine.
            torch_index = "" if list(Path(place).glob("torch-*.whl")) else None
    files = {
        "Dockerfile": b"FROM scratch\nADD rootfs.tar /\nCOPY ca.crt /etc/titan-test-ca.crt\nCOPY pip.conf /etc/\n",
        "pip.conf": "\n".join([*config, ""]).encode(),
        "ca.crt": CERTIFICATES.read_bytes(),
    }
    tag = f"titan-test-base:{tar.stem}-{hashlib.sha256(b''.join(files.values())).hexdigest()[:10]}"
    if engine.client.api.images(tag):
        return Base(tag, torch_index)  # in a data root that was kept
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        archive.add(tar, "rootfs.tar")
    context.seek(0)
    # FROM scratch with a platform: `docker import` would mark every root directory as this machine's.
    answers = engine.client.api.build(
        fileobj=context,
        custom_context=True,
        decode=True,
        rm=True,
        forcerm=True,
        tag=tag,
        platform=f"linux/{arch}",
    )
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert not errors, errors
    return Base(tag, torch_index)
