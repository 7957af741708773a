"""Building images of the channel cpu from the product's Dockerfile with a real engine, and every refusal before and
in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.base.errors import LauncherError
from launcher.image import build as building
from launcher.image import engine as docker_engine
from launcher.image.build import Built, build, created
from launcher.image.check import check
from launcher.image.convert import convert_image
from launcher.image.squashfs_tools import TAIL, Ran
from tests.image.conftest import TINY_LOCK
from tests.image.dockerd import running_engine
from tests.image.images import Base


def containers() -> bytes:
    return docker_engine.ask("ps", "--all", "--quiet").out


# ------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("form", ["image", "squashfs"])
def test_the_cpu_image_passes_its_checks(cpu_image: Built, cpu_sqsh: Path, form: str) -> None:
    mounts = Path("/proc/mounts").read_text()
    results = {result.name: result for result in check(cpu_image.tag if form == "image" else str(cpu_sqsh))}
    assert len(results) == 15
    assert {name for name, result in results.items() if result.status != "ok"} == {"blackwell", "quantization"}
    assert results["blackwell"].status == "skipped"
    assert "8,030,261,248 parameters, 57,914,449,920 FLOPs" in results["model"].found
    assert Path("/proc/mounts").read_text() == mounts


def test_the_cpu_image_says_what_it_is(cpu_image: Built) -> None:
    found = docker_engine.inspect(cpu_image.tag)
    assert found["Id"] == cpu_image.image_id and found["Architecture"] == "amd64"
    config = found["Config"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "void" and "DEBIAN_FRONTEND" not in environment
    assert environment["PATH"].startswith("/usr/local/sbin:/usr/local/bin:")
    assert not config["Entrypoint"] and config["Cmd"] == ["/bin/bash"] and not config["User"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "titan-cpu" and labels["version"] == "0.3.0-torch2.13.0_cpu"
    assert labels["created"] == "2023-11-14T22:13:20Z"
    ran = docker_engine.run_in(cpu_image.tag, ["cat", "/etc/titan-image.json"], stdin=b"", timeout_s=60)
    assert ran.code == 0, ran.err
    about = json.loads(ran.out)
    assert (about["schema"], about["channel"], about["arch"]) == (1, "cpu", "amd64")
    assert about["versions"]["torch"] == "2.13.0+cpu" and about["versions"]["cuda"] is None
    assert about["created"] == labels["created"] and about["driver_min"] is None and about["sm"] == []


def test_an_image_that_lacks_things_fails_the_checks_of_them_alone(
    tiny_image: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine, and as an ordinary user has it from the squashfs."""
    in_image = check(tiny_image.tag)
    results = {result.name: result for result in in_image}
    failed = {name for name, result in results.items() if result.status == "failed"}
    assert failed == {"torch", "blackwell", "triton", "nccl", "login shell", "model"}
    assert results["lock"].found.startswith("2 packages")
    assert "ModuleNotFoundError: No module named 'torch'" in results["torch"].found
    convert_image(tiny_image.tag, tmp_path / "tiny.sqsh")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    in_file = check(str(tmp_path / "tiny.sqsh"))
    assert [(one.name, one.status) for one in in_file] == [(one.name, one.status) for one in in_image]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("titan-check-")] == []


def test_a_command_in_an_image_and_its_export_leave_no_container(tiny_image: Built) -> None:
    def run(command: str, timeout_s: float = 60) -> Ran:
        return docker_engine.run_in(tiny_image.tag, ["sh", "-c", command], stdin=b"yes", timeout_s=timeout_s)

    before = containers()
    stream = docker_engine.export(tiny_image.tag)
    assert next(stream)[257:262] == b"ustar"
    stream.close()
    ran = run("cat; echo no >&2; exit 3")
    assert (ran.code, ran.out, ran.err, ran.cut) == (3, b"yes", "no\n", False)
    ran = run("head -c 3000000 /dev/zero | tr '\\0' x >&2; head -c 3000000 /dev/zero | tr '\\0' x")
    assert (len(ran.out), ran.cut, len(ran.err) <= TAIL) == (docker_engine.OUTPUT, True, True)
    missing = docker_engine.run_in(tiny_image.tag, ["nvidia-smi"], stdin=b"", timeout_s=60)
    assert missing.code and "nvidia-smi" in missing.err
    with pytest.raises(LauncherError, match="did not end within 1 s"):
        run("sleep 60", 1)
    assert containers() == before


# ------------------------------------------------------------------------------------- builds that fail


class Fails(NamedTuple):
    old: str
    new: str
    fix: str
    original: str
    base: str = ""


@pytest.mark.parametrize(
    "case",
    [
        Fails("sha256:946d", "sha256:0000", "launcher image lock cpu --arch amd64", "Expected sha256 0000195a0d"),
        Fails("idna==3.10", "idna==3.10.99", "launcher image lock cpu --arch amd64", "idna==3.10.99"),
        Fails("", "", "--base IMAGE", "no-such-base", base="titan-test/no-such-base:1"),
    ],
    ids=["hash", "version", "base"],
)
def test_builds_that_fail(base_image: Base, tiny_image: Built, tmp_path: Path, case: Fails) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(TINY_LOCK.replace(case.old, case.new) if case.old else TINY_LOCK)
    options = {"torch_index": "", "network": "host", "lock_file": path, "tag": "titan:broken-amd64"}
    with pytest.raises(LauncherError, match="the build of channel cpu for amd64 failed") as error:
        build("cpu", "amd64", base=case.base or base_image.tag, **options)  # type: ignore[arg-type]
    # There may be no network, and a registry of base images behind it.
    assert case.fix in error.value.fix and case.original in error.value.original
    with pytest.raises(LauncherError, match="has no image"):
        docker_engine.inspect("titan:broken-amd64")


def test_a_channel_without_a_lock_makes_it_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str, arch: str, **options: object) -> Path:
        raise LauncherError("index-silent", f"index of {name} for {arch} cannot be reached", "CHANNEL=stable")

    monkeypatch.setattr(docker_engine, "own_arch", lambda: "amd64")
    monkeypatch.setattr(building, "lock_path", lambda name, arch: tmp_path / f"{name}-{arch}.txt")
    monkeypatch.setattr(building, "lock", refuse)
    with pytest.raises(LauncherError, match="index of nightly for amd64") as error:
        build("nightly", "amd64")
    assert error.value.fix == "CHANNEL=stable"


# ------------------------------------------------------------------------------------ engines that are not


@pytest.mark.parametrize("host", ["unix:///nonexistent/docker.sock", "tcp://127.0.0.1:9"])
def test_no_engine_answers(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(LauncherError, match="no Docker engine answers") as error:
        docker_engine.own_arch()
    assert host in error.value.original


def test_an_engine_that_this_user_may_not_use(engine: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    try:
        os.seteuid(65534)
        with pytest.raises(LauncherError, match="this user may not use the Docker engine") as error:
            docker_engine.own_arch()
    finally:
        os.seteuid(0)
    assert error.value.fix == 'sudo usermod -aG docker "$USER" && newgrp docker'


def test_the_engine_dies_while_an_image_is_used(engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("LAUNCHER_TEST_DOCKER") == "1":
        pytest.skip("this engine is not ours to stop")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    with running_engine(tmp_path / "data") as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        assert docker_engine.build(["--tag=titan:x", str(tmp_path)])[0] == 0
        stream = docker_engine.export("titan:x")
        next(stream)
    for use in (lambda: docker_engine.inspect("titan:x"), lambda: list(docker_engine.export("titan:x"))):
        with pytest.raises(LauncherError, match="no Docker engine answers"):
            use()
    stream.close()


def test_the_disk_of_the_engine_is_full(
    engine: None, tiny_lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("LAUNCHER_TEST_DOCKER") == "1":
        pytest.skip("this engine has room")
    data = tmp_path / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(data)], check=True)
    try:
        with running_engine(data) as host:
            monkeypatch.setenv("DOCKER_HOST", host)
            usage = os.statvfs(data)
            (data / "filler").write_bytes(bytes(usage.f_bavail * usage.f_frsize - 2_000_000))
            (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY containers /\n")
            (tmp_path / "lock.txt").write_text(tiny_lock.read_text() + "#" * 3_000_000)
            monkeypatch.setattr(building, "dockerfile", lambda: tmp_path / "Dockerfile")
            with pytest.raises(LauncherError) as error:
                build("cpu", "amd64", lock_file=tmp_path / "lock.txt", tag="titan:x")
            assert "docker system prune" in error.value.fix
    finally:
        subprocess.run(["umount", str(data)], check=True)


def test_ctrl_c_stops_the_build(
    engine: None, base_image: Base, tiny_lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the container of the step nor a tag stays; the steps before are used by the next build."""
    recipe = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN echo begun $(cat /proc/uptime); sleep 300\n"
    (tmp_path / "Dockerfile").write_text(recipe)
    monkeypatch.setattr(building, "dockerfile", lambda: tmp_path / "Dockerfile")

    def say(line: str) -> None:
        if line.startswith("begun"):
            raise KeyboardInterrupt

    monkeypatch.setattr(docker_engine, "say", say)
    before = containers()
    with pytest.raises(KeyboardInterrupt):
        build("cpu", "amd64", base=base_image.tag, lock_file=tiny_lock, network="host", tag="titan:no")
    deadline = time.monotonic() + 30
    while containers() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert containers() == before
    with pytest.raises(LauncherError, match="has no image"):
        docker_engine.inspect("titan:no")


# ------------------------------------------------------------------------------------ the docker command


def test_what_the_docker_command_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell script stands in for it and writes that down."""
    docker = tmp_path / "docker"
    docker.write_text(
        '#!/bin/sh\n[ "$1" = version ] && echo amd64 && exit\n'
        f'printf "%s\\n" "$BUILDX_BUILDER" "$@" >{tmp_path}/asked\n'
        f'for last in "$@"; do :; done\ntar -cf {tmp_path}/context.tar -C "$last" .\n'
        "printf '#8 0.123 one\\rtwo\\033[0m\\n'; echo '#5 ERROR: no space left on device' >&2; exit 1\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("BUILDX_BUILDER", "mine")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with pytest.raises(LauncherError, match="failed"):
        build("cpu", "arm64", lock_file=tiny_lock, network="host")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == ["", "build"]
    for option in (
        "--platform=linux/arm64",
        "--tag=titan:cpu-arm64",
        "--network=host",
        "--build-arg=BASE_IMAGE=debian:12-slim",
        "--build-arg=CHANNEL=cpu",
        "--build-arg=VISIBLE_DEVICES=void",
        "--build-arg=EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu",
        "--build-arg=CREATED=2023-11-14T22:13:20Z",
        "--label=org.opencontainers.image.base.name=debian:12-slim",
    ):
        assert option in asked, option
    with tarfile.open(tmp_path / "context.tar") as context:
        names = sorted(entry.name for entry in context if entry.isfile())
    assert names == [
        "./Dockerfile",
        "./containers/channels.toml",
        "./containers/check.py",
        "./containers/describe.py",
        "./containers/locks/cpu-arm64.txt",
    ]
    assert capsys.readouterr().err.splitlines()[-3:] == ["one", "two", "#5 ERROR: no space left on device"]


@pytest.mark.parametrize("epoch", ["yesterday", "-1", str(2**32)])
def test_a_wrong_source_date_epoch(monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(LauncherError, match=f"SOURCE_DATE_EPOCH={epoch}: not a number"):
        created()
