"""The channel stable for x86-64 as users have it: built with CUDA, converted, checked, and the debug recipe trained in
the squashfs. 3 GB from PyPI, 20 GB of disk, a quarter of an hour: only with LAUNCHER_TEST_CUDA=PREFIX, as root.

The base is a stand-in: Debian 12 and, below /usr/local, the Python 3.12 that stands below PREFIX on this machine.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launcher.image import engine as docker_engine
from launcher.image.check import check
from launcher.image.convert import convert_image
from launcher.image.inspect import inspect
from tests.image.dockerd import running_engine
from tests.image.images import built, make_base, rootfs
from tests.train.test_real_trainer import losses, make_run
from tests.unit.test_titan_command import changed, debug_node

PREFIX = os.environ.get("LAUNCHER_TEST_CUDA", "")
pytestmark = pytest.mark.skipif(not PREFIX, reason="LAUNCHER_TEST_CUDA=PREFIX: 3 GB from PyPI, 20 GB of disk")

NO_PIP = b"path-exclude=/usr/share/python-wheels/pip-*\n"

# What the job's container has, in namespaces that end with it; no network but loopback, and no GPU.
INSIDE = """
mount -o loop,ro "$1" "$2" && mount --bind "$3" "$2/mnt" && mount --rbind /dev "$2/dev" || exit 126
mount -t proc proc "$2/proc" && mount -t tmpfs tmpfs "$2/tmp" && ip link set lo up || exit 126
exec chroot "$2" /usr/bin/env -i HOME=/tmp OMP_NUM_THREADS=1 TITAN_HEAD_ADDR=127.0.0.1 PYTHONNOUSERSITE=1 \\
    PATH=/usr/local/bin:/usr/bin:/bin python3 "$4" "$5"
"""

# inductor writes C++ here: it needs the compiler, torch's headers and OpenMP.
COMPILE = """
import torch
layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
x = torch.randn(8, 64)
torch.testing.assert_close(torch.compile(layer)(x), layer(x))
"""


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The squashfs. The engine's storage and the file are removed afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titan-cuda-", dir="/var/tmp")))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DOCKER_HOST", stack.enter_context(running_engine(folder / "docker")))
        engine = docker_engine.connect()
        tar = folder / "python.tar"
        shutil.copyfile(rootfs("amd64"), tar)
        with tarfile.open(tar, "a") as archive:
            archive.add(PREFIX, "./usr/local", filter=only_python)
            # Debian 12's pip is too old for Python 3.12, whose own takes its place.
            (wheel,) = Path(PREFIX).glob("lib/python3.*/ensurepip/_bundled/pip-*.whl")
            archive.add(wheel, f"./usr/share/python-wheels/{wheel.name}", filter=only_python)
            entry = tarfile.TarInfo("./etc/dpkg/dpkg.cfg.d/no-pip")
            entry.size = len(NO_PIP)
            archive.addfile(entry, io.BytesIO(NO_PIP))
        image = built("stable", "amd64", engine, make_base(engine, "amd64", tar), torch_index="")
        print(f"image: {image.bytes / 1e9:.2f} GB with its base, built in {image.seconds:.0f} s")
        before = os.times()
        convert_image(image.tag, folder / "stable.sqsh", engine=engine)
        after = os.times()
        spent = after.user + after.system + after.children_user + after.children_system
        spent -= before.user + before.system + before.children_user + before.children_system
        size = (folder / "stable.sqsh").stat().st_size
        print(f"squashfs: {size / 1e9:.2f} GB in {spent:.0f} CPU s")
        yield folder / "stable.sqsh"


def only_python(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without what this machine installed, and what no release of Python has."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    left_out = ("/site-packages/", "/__pycache__", "/test/", "/idlelib/", "/ensurepip/")
    return None if any(word in f"{entry.name}/" for word in left_out) or entry.name.endswith(".a") else entry


def test_it_passes_every_check(stable: Path) -> None:
    results = {result.name: result for result in check(str(stable))}
    for result in results.values():
        print(f"{result.status:8} {result.name:18} {result.found}")
    # Of the stand-in: Debian's own Python beside the one that the image is made for.
    assert {name for name, result in results.items() if result.status != "ok"} == {"byte code"}
    assert "/usr/lib/python3.11/" in results["byte code"].found and "/usr/local/" not in results["byte code"].found
    found = inspect(stable)
    assert found.arch == "x86_64" and set(found.quantization) == {"none", "float8", "mxfp8", "nvfp4"}


def inside(stable: Path, folder: Path, *words: str) -> str:
    (folder / "root").mkdir(exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    command = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", INSIDE, "sh"]
    command += [*map(str, (stable, folder / "root", folder / "run")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_debug_recipe_trains_in_it(stable: Path, tmp_path: Path) -> None:
    node = debug_node(gpus_per_node=1)
    file = make_run(tmp_path / "run", changed(node, recipe=node["recipe"] | {"steps": 6}))
    file.write_text(file.read_text().replace(str(tmp_path / "run"), "/mnt"))
    found = losses(inside(stable, tmp_path, "/mnt/job/node.py", "/mnt/job/node.json"))
    print(found)
    assert found[6] < found[1]


def test_it_compiles(stable: Path, tmp_path: Path) -> None:
    inside(stable, tmp_path, "-c", COMPILE)
