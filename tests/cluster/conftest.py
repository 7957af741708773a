"""Fixtures of the tests that need a real Slurm, and images that it can run."""

import compileall
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Cluster, User, existing_cluster, missing_packages, running_cluster
from tests.cluster.squashfs import build_small_image, missing_image_packages
from tests.conftest import ROOT, say_it_trains
from tests.image.images import CACHE, cpu_squashfs

USER = "launcher-test"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A Slurm of four nodes with four made-up GPUs each; with LAUNCHER_TEST_SLURM=1 the one that is there."""
    # Not pytest's tmp_path: that is closed to the ordinary users who submit jobs here.
    with tempfile.TemporaryDirectory(prefix="launcher-slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        if os.environ.get("LAUNCHER_TEST_SLURM") == "1":
            yield existing_cluster(Path(name))
            return
        _need_root()
        _need_packages(missing_packages())
        with running_cluster(Path(name)) as cluster:
            yield cluster


@pytest.fixture(scope="session")
def small_image() -> Path:
    """A squashfs image with sh, the core utilities and Python."""
    _need_root()
    _need_packages(missing_image_packages())
    image = build_small_image(CACHE)
    say_it_trains(image)  # the jobs in it run programs of the tests, not torchtitan
    return image


@pytest.fixture(scope="session")
def train_image() -> Path:
    """The channel cpu, built by a real Docker engine from the Dockerfile and converted: what users run."""
    _need_root()
    return cpu_squashfs()


@pytest.fixture(scope="session")
def ordinary_user() -> User:
    """An account without privileges, made for these tests and kept for the next; else whoever runs them."""
    if os.geteuid() != 0:
        return _account(pwd.getpwuid(os.getuid()).pw_name)
    try:
        return _account(USER)
    except KeyError:
        _need_packages([] if shutil.which("useradd") else ["passwd"])
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
        return _account(USER)


@pytest.fixture(scope="session")
def app(ordinary_user: User) -> Iterator[Path]:
    """The launcher and the packages that it needs, where every user and node can read them, with their bytecode.

    An ordinary user could not keep it, and would compile all of it at each command.
    """
    import click
    import jinja2

    site = Path(click.__file__).parent.parent
    assert site == Path(jinja2.__file__).parent.parent
    ours = [ROOT / name for name in ("launcher", "slurm", "containers")]
    theirs = ("click", "jinja2", "markupsafe", "tomlkit", "rich", "pygments", "markdown_it", "mdurl")
    with tempfile.TemporaryDirectory(prefix="app-", dir=ordinary_user.home, ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        for folder in (*ours, *(site / package for package in theirs)):
            shutil.copytree(folder, Path(name) / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(name, quiet=1)
        yield Path(name)


@pytest.fixture
def user_dir(ordinary_user: User) -> Iterator[Path]:
    """An empty directory of the ordinary user, the same on every node."""
    with tempfile.TemporaryDirectory(prefix="test-", dir=ordinary_user.home, ignore_cleanup_errors=True) as name:
        os.chown(name, ordinary_user.uid, ordinary_user.gid)
        yield Path(name)


def _account(name: str) -> User:
    entry = pwd.getpwnam(name)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("starting a Slurm and building images need root; LAUNCHER_TEST_SLURM=1 uses an existing Slurm")


def _need_packages(packages: list[str]) -> None:
    if packages:
        pytest.skip(f"missing Debian packages: apt install {' '.join(packages)}")
