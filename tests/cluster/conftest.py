"""Fixtures of the tests that need a real Slurm, and images that it can run."""

import compileall
import contextlib
import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm_cluster import Cluster, User, existing_cluster, missing_packages, running_cluster, slurm_run
from tests.cluster.squashfs import build_small_image, missing_image_packages
from tests.conftest import ROOT, say_it_trains
from tests.image.images import CACHE, cpu_squashfs

USER = "launcher-test"
DEBIAN_13 = "slurmctld,slurmd,slurm-client,slurm-wlm-basic-plugins,iproute2"


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


@dataclass(frozen=True)
class Launch:
    """`launcher ...` on the cluster, as one user, in a directory that all nodes see. `cpu.toml` is for CPU ranks."""

    slurm: Cluster
    user: User | None  # None: root
    directory: Path
    command: tuple[str, ...]

    def __call__(self, *arguments: str | Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *map(str, arguments)]
        done = slurm_run(self.slurm, command, self.user, self.directory, timeout, self.variables() | env)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr + done.stdout
        return done

    def variables(self) -> dict[str, str]:
        # Nodes that a test makes unfit are remembered for that test alone.
        return {"PYTHONPATH": f"{self.directory}/app", "XDG_CONFIG_HOME": f"{self.directory}/config"}

    def account(self) -> dict[str, Any]:
        """For subprocess: the user, where that is another."""
        if self.user is None or self.user.uid == os.getuid():
            return {}
        return {"user": self.user.uid, "group": self.user.gid, "extra_groups": []}

    def run(self, name: str) -> Path:
        return self.directory / "runs" / name

    def status(self, run: str) -> dict[str, Any]:
        return dict(json.loads(self("status", run, "--json").stdout))

    def state(self, run: str) -> str:
        return str(self.status(run)["state"])

    def wait_for(self, run: str, *states: str, seconds: float = 120) -> str:
        end = time.monotonic() + seconds
        while (found := self.state(run)) not in states:
            assert time.monotonic() < end, f"{run} is still {found}: {self('logs', run).stdout[-3000:]}"
            time.sleep(0.3)
        return found

    def script(self, name: str, text: str | bytes) -> Path:
        """A program in the directory."""
        path = self.directory / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o755)
        return path


@pytest.fixture(params=["root", "ordinary user"])
def launch(
    request: pytest.FixtureRequest, slurm: Cluster, ordinary_user: User, app: Path, user_dir: Path
) -> Iterator[Launch]:
    user = None if request.param == "root" else ordinary_user
    if user is None and os.geteuid() != 0:
        pytest.skip("not root")
    (user_dir / "app").symlink_to(app)
    made = Launch(slurm, user, user_dir, ())
    made = replace(made, command=(_python(made), "-m", "launcher"))
    # CPU ranks, but the made-up GPUs are asked for.
    gres = 'gres = "gpu"\n' if slurm.gpus_per_node else ""
    (user_dir / "cpu.toml").write_text(f'[profile]\narch = "{os.uname().machine}"\n{gres}')
    yield made
    if slurm.record:
        slurm_run(slurm, ["scancel", "--user", user.name if user else "root"])
        return
    for run in json.loads(made("list", "--json").stdout):
        if run["state"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            made("cancel", run["run"])


AS_ROOT = pytest.mark.parametrize("launch", ["root"], indirect=True)
AS_USER = pytest.mark.parametrize("launch", ["ordinary user"], indirect=True)


@pytest.fixture
def own_cluster(slurm: Cluster) -> None:
    if slurm.record is None:
        pytest.skip("only on a cluster of the tests' own: it breaks nodes, or knows their number and their limits")


def _python(launch: Launch) -> str:
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        look = [python, "-c", "import sys; print(sys.version_info[1])"]
        with contextlib.suppress(OSError):
            probe = subprocess.run(look, capture_output=True, **launch.account())
            if probe.returncode == 0 and int(probe.stdout) >= 11:
                return python
    pytest.skip("no Python 3.11 that the ordinary user can run: apt install python3")


def stand_in(image: Path, path: Path) -> Path:
    """The image under another name, with a sidecar that says that it can train on any node."""
    if image.stat().st_dev == path.parent.stat().st_dev:
        os.link(image, path)
    else:
        shutil.copy(image, path)
    path.chmod(0o644)
    say_it_trains(path)
    return path


def _account(name: str) -> User:
    entry = pwd.getpwnam(name)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("starting a Slurm and building images need root; LAUNCHER_TEST_SLURM=1 uses an existing Slurm")


def _need_packages(packages: list[str]) -> None:
    if packages:
        pytest.skip(f"missing Debian packages: apt install {' '.join(packages)}")


def debian_13() -> Path:
    """A root directory with Slurm 24.11, made once and kept beside the tests' images. Skips where it cannot be had."""
    if os.geteuid() != 0 or not shutil.which("mmdebstrap") or missing_packages():
        pytest.skip("needs root, mmdebstrap and the packages of the other Slurm tests")
    root = CACHE / "debian-13-slurm"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "debian-13-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            making = Path(tempfile.mkdtemp(dir=CACHE, prefix="debian-13-"))
            about = ("--quiet", "--variant=essential", f"--include={DEBIAN_13}")
            command = ["mmdebstrap", *about, "trixie", str(making)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                shutil.rmtree(making, ignore_errors=True)
                pytest.skip(f"Debian 13's packages cannot be had: {done.stderr.strip()[-200:]}")
            (making / "etc" / "hosts").touch()  # the nodes' own is mounted over it
            making.rename(root)
    return root
