"""The image for arm64, built by this machine under emulation from the product's Dockerfile; with a lock of two small
packages.

Everything but the packages is as in a real image: the same Dockerfile, stages, steps and description. torch for arm64
is 900 MB and slow to import under emulation, and shows nothing about this project that amd64 does not.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.image import engine as docker_engine
from launcher.image.build import Built, build
from launcher.image.check import check
from launcher.image.convert import convert_image
from launcher.image.engine import Engine
from launcher.image.inspect import inspect
from launcher.image.squashfs_file import sidecar_path
from tests.conftest import Launch
from tests.image.images import built, make_base, rootfs

QEMU = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")  # Debian's qemu-user-static: what is to be registered
ENTRY = docker_engine.BINFMT / "qemu-aarch64"


@pytest.fixture(scope="module")
def emulation() -> Iterator[None]:
    """Registers the emulator with the kernel unless it is, and takes away afterwards what was put there."""
    if os.uname().machine != "x86_64":
        pytest.skip("arm64 is not foreign here")
    with ExitStack() as stack:
        if not (docker_engine.BINFMT / "register").exists():
            mount = ["mount", "-t", "binfmt_misc", "binfmt_misc", str(docker_engine.BINFMT)]
            if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
                pytest.skip("emulation needs root and a kernel with binfmt_misc")
            stack.callback(subprocess.run, ["umount", str(docker_engine.BINFMT)], check=True)
        if not docker_engine.emulator("arm64"):
            if not QEMU.exists():
                pytest.skip("missing Debian package: apt install qemu-user-static")
            (docker_engine.BINFMT / "register").write_text(QEMU.read_text().strip())
            stack.callback(lambda: ENTRY.write_text("-1"))
        yield


@pytest.fixture(scope="module")
def base_arm64(engine: Engine, emulation: None) -> str:
    return make_base(engine, "arm64", rootfs("arm64"))


@pytest.fixture(scope="module")
def arm64_image(engine: Engine, base_arm64: str, tiny_lock: Path) -> Built:
    """About 2 minutes, most of it Python compiling its library under emulation."""
    return built("cpu", "arm64", engine, base_arm64, lock_file=tiny_lock)


def test_the_arm64_image_is_for_arm64(engine: Engine, arm64_image: Built) -> None:
    assert docker_engine.inspect(engine, arm64_image.tag)["Architecture"] == "arm64"
    ran = docker_engine.run(engine, arm64_image.tag, ["cat", "/etc/titan-image.json"])
    assert ran.code == 0 and json.loads(ran.out)["arch"] == "arm64", ran.err
    results = {result.name: result for result in check(arm64_image.tag, engine=engine)}
    failed = {name for name, result in results.items() if result.status == "failed"}
    assert failed == {"torch", "blackwell", "triton", "nccl", "login shell", "model"}, results


def test_the_arm64_squashfs_is_known_as_aarch64_and_refused_on_x86_64_nodes(
    engine: Engine, arm64_image: Built, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "titan-cpu-arm64.sqsh"
    convert_image(arm64_image.tag, path, engine=engine)
    assert "the engine calls this image" not in capsys.readouterr().err
    assert inspect(path).arch == "aarch64"
    done = launch("submit", "--gpu", "b200", "--image", str(path), "--dry-run")
    assert done.returncode == ExitStatus.INVALID, done.stderr
    assert "the image is for aarch64, the GPU profile for x86_64" in done.stderr
    sidecar_path(path).unlink()  # copied without it: from what the file holds itself
    assert (inspect(path).source, inspect(path).arch) == ("image", "aarch64")


def test_a_base_image_of_another_architecture(
    engine: Engine, arm64_image: Built, base_arm64: str, tiny_lock: Path
) -> None:
    options: dict[str, Any] = {"lock_file": tiny_lock, "network": "host", "tag": "titan:x"}
    with pytest.raises(LauncherError, match="is not for amd64") as error:
        build("cpu", "amd64", engine=engine, base=base_arm64, **options)
    assert "--base IMAGE" in error.value.fix


def test_an_image_that_this_machine_can_no_longer_run(engine: Engine, arm64_image: Built) -> None:
    if not ENTRY.exists():
        pytest.skip("the emulator is registered under another name")
    ENTRY.write_text("0")
    try:
        with pytest.raises(LauncherError, match="this machine is amd64 and cannot run arm64 programs"):
            docker_engine.run(engine, arm64_image.tag, ["true"])
    finally:
        ENTRY.write_text("1")
