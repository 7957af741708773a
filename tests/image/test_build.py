"""Building images of the channel cpu from the product's Dockerfile with a real engine, and every refusal before and
in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launcher.base.errors import LauncherError, install
from launcher.image import build as building
from launcher.image import engine as docker_engine
from launcher.image.build import Built, arches, build
from launcher.image.check import check
from launcher.image.convert import convert_image
from launcher.image.engine import Engine
from launcher.image.registry import push
from launcher.image.squashfs_tools import TAIL, Ran
from tests.image.conftest import TINY_LOCK
from tests.image.dockerd import running_engine

EMULATED = "enabled\ninterpreter /usr/bin/qemu-aarch64-static\nflags: OCF\noffset 0\nmagic 7f454c46\n"


def somewhere(host: str = "unix:///run/docker.sock", arch: str = "amd64", system: str = "Debian") -> Engine:
    """An engine that is only asked what it is."""
    return Engine(None, host, "28.0", arch, system)


# ------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("form", ["image", "squashfs"])
def test_the_cpu_image_passes_its_checks(engine: Engine, cpu_image: Built, cpu_sqsh: Path, form: str) -> None:
    mounts = Path("/proc/mounts").read_text()
    image = cpu_image.tag if form == "image" else str(cpu_sqsh)
    results = {result.name: result for result in check(image, engine=engine)}
    assert len(results) == 15
    assert {name for name, result in results.items() if result.status != "ok"} == {"blackwell", "quantization"}
    assert results["blackwell"].status == "skipped"
    assert "8,030,261,248 parameters, 57,914,449,920 FLOPs" in results["model"].found
    assert Path("/proc/mounts").read_text() == mounts


def test_the_cpu_image_says_what_it_is(engine: Engine, cpu_image: Built) -> None:
    found = docker_engine.inspect(engine, cpu_image.tag)
    assert found["Id"] == cpu_image.image_id and found["Architecture"] == "amd64"
    config = found["Config"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "void" and "DEBIAN_FRONTEND" not in environment
    assert environment["PATH"].startswith("/usr/local/sbin:/usr/local/bin:")
    assert not config["Entrypoint"] and config["Cmd"] == ["/bin/bash"] and not config["User"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "titan-cpu" and labels["version"] == "0.3.0-torch2.13.0_cpu"
    assert labels["created"] == "2023-11-14T22:13:20Z"
    ran = docker_engine.run(engine, cpu_image.tag, ["cat", "/etc/titan-image.json"])
    assert ran.code == 0, ran.err
    about = json.loads(ran.out)
    assert (about["schema"], about["channel"], about["arch"]) == (1, "cpu", "amd64")
    assert about["versions"]["torch"] == "2.13.0+cpu" and about["versions"]["cuda"] is None
    assert about["created"] == labels["created"] and about["driver_min"] is None and about["sm"] == []


def test_an_image_that_lacks_things_fails_the_checks_of_them_alone(
    engine: Engine, tiny_image: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine, and as an ordinary user has it from the squashfs."""
    in_image = check(tiny_image.tag, engine=engine)
    results = {result.name: result for result in in_image}
    failed = {name for name, result in results.items() if result.status == "failed"}
    assert failed == {"torch", "blackwell", "triton", "nccl", "login shell", "model"}
    assert results["lock"].found.startswith("2 packages")
    assert "ModuleNotFoundError: No module named 'torch'" in results["torch"].found
    convert_image(tiny_image.tag, tmp_path / "tiny.sqsh", engine=engine)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    in_file = check(str(tmp_path / "tiny.sqsh"))
    assert [(one.name, one.status) for one in in_file] == [(one.name, one.status) for one in in_image]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("titan-check-")] == []


def test_a_command_in_an_image_and_its_export_leave_no_container(engine: Engine, tiny_image: Built) -> None:
    def run(*command: str, timeout_s: float = 60) -> Ran:
        return docker_engine.run(engine, tiny_image.tag, list(command), timeout_s=timeout_s)

    before = engine.client.api.containers(all=True)
    stream = docker_engine.export(engine, tiny_image.tag)
    assert next(stream)[257:262] == b"ustar"
    stream.close()
    ran = run("sh", "-c", "printf yes; echo no >&2; exit 3")
    assert (ran.code, ran.out, ran.err, ran.cut) == (3, b"yes", "no\n", False)
    flood = "head -c 3000000 /dev/zero | tr '\\0' x"
    ran = run("sh", "-c", f"{flood}; {flood} >&2")
    assert (len(ran.out), ran.cut, len(ran.err) <= TAIL) == (docker_engine.OUTPUT, True, True)
    with pytest.raises(LauncherError, match="nvidia-smi does not start in titan:tiny-amd64"):
        run("nvidia-smi")
    with pytest.raises(LauncherError, match="did not end within 1 s"):
        run("sleep", "60", timeout_s=1)
    assert engine.client.api.containers(all=True) == before


# ------------------------------------------------------------------------------------- builds that fail


class Fails(NamedTuple):
    old: str
    new: str
    what: str
    fix: str
    original: str
    base: str = ""


LOCK_AGAIN = "launcher image lock cpu --arch amd64"


@pytest.mark.parametrize(
    "case",
    [
        Fails("sha256:946d", "sha256:0000", "not the one .*: idna==3.10$", LOCK_AGAIN, "Expected sha256 0000195a0d"),
        Fails("idna==3.10", "idna==3.10.99", "idna==3.10.99 of the lock", LOCK_AGAIN, "idna==3.10.99"),
        # There may be no network, and a registry of base images behind it.
        Fails("", "", "no base image titan-test/no-such-base:1|reach the network", "", "", "titan-test/no-such-base:1"),
    ],
    ids=["hash", "version", "base"],
)
def test_builds_that_fail(engine: Engine, base_image: str, tiny_image: Built, tmp_path: Path, case: Fails) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(TINY_LOCK.replace(case.old, case.new) if case.old else TINY_LOCK)
    options: dict[str, Any] = {"torch_index": "", "network": "host", "lock_file": path, "tag": "titan:broken-amd64"}
    with pytest.raises(LauncherError, match=case.what) as error:
        build("cpu", "amd64", engine=engine, base=case.base or base_image, **options)
    assert case.fix in error.value.fix and case.original in error.value.original
    with pytest.raises(LauncherError, match="has no image"):
        docker_engine.inspect(engine, "titan:broken-amd64")


def test_a_channel_without_a_lock_makes_it_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(building, "lock_path", lambda name, arch: tmp_path / f"{name}-{arch}.txt")

    def refuse(name: str, arch: str, **options: object) -> Path:
        raise LauncherError("index-silent", f"index of {name} for {arch} cannot be reached", "CHANNEL=stable")

    monkeypatch.setattr(building, "lock", refuse)
    with pytest.raises(LauncherError, match="index of nightly for amd64") as error:
        build("nightly", "amd64", engine=somewhere())
    assert error.value.fix == "CHANNEL=stable"


# ------------------------------------------------------------------------------------ engines that are not


class NoEngine(NamedTuple):
    host: str  # DOCKER_HOST; "" where there is none
    what: str
    fix: str = "unset DOCKER_HOST"
    context: str = "gone"  # the user's current one, in docker's words; there is one of the name "mine"


@pytest.mark.parametrize(
    "case",
    [
        *(
            NoEngine(host, f"no Docker engine answers at {host}")
            for host in ("unix:///nonexistent/docker.sock", "tcp://127.0.0.1:9", "http:/x", "nonsense")
        ),
        # By the program ssh, which knows the user's agent and jump hosts.
        NoEngine("ssh://user@machine", "ssh support, which is not installed", "docker[ssh]"),
        NoEngine("", "no Docker engine answers at unix:///nonexistent/default", "sudo systemctl start docker"),
        # Rootless Docker and Docker Desktop are only found there.
        NoEngine("", "answers at unix:///nonexistent/mine", "systemctl start", context="mine"),
    ],
    ids=lambda case: case.host or case.what,
)
def test_no_engine_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: NoEngine) -> None:
    docker = pytest.importorskip("docker")
    real = docker.DockerClient.from_env

    def from_env(*, use_ssh_client: bool, **options: Any) -> Any:
        assert use_ssh_client == case.host.startswith("ssh://")
        if use_ssh_client:
            raise docker.errors.DockerException("Install paramiko package to enable ssh:// support")
        return real(**options)

    monkeypatch.setattr(docker.DockerClient, "from_env", from_env)
    monkeypatch.setattr(docker_engine, "DEFAULT_HOST", "unix:///nonexistent/default.sock")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", case.host)
    (tmp_path / "config.json").write_text(json.dumps({"currentContext": case.context}))
    folder = tmp_path / "contexts" / "meta" / hashlib.sha256(b"mine").hexdigest()
    folder.mkdir(parents=True)
    endpoints = {"docker": {"Host": "unix:///nonexistent/mine.sock", "SkipTLSVerify": False}}
    (folder / "meta.json").write_text(json.dumps({"Name": "mine", "Metadata": {}, "Endpoints": endpoints}))
    with pytest.raises(LauncherError, match=re.escape(case.what)) as error:
        docker_engine.connect()
    assert case.fix in error.value.fix


def test_docker_py_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(LauncherError, match="docker-py, which is not installed") as error:
        docker_engine.connect()
    assert error.value.fix == install("image")


def test_an_engine_that_this_user_may_not_use(engine: Engine) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    try:
        os.seteuid(65534)
        with pytest.raises(LauncherError, match="this user may not use the Docker engine") as error:
            docker_engine.connect()
    finally:
        os.seteuid(0)
    assert error.value.fix == 'sudo usermod -aG docker "$USER" && newgrp docker'


def test_the_engine_dies_while_an_image_is_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("LAUNCHER_TEST_DOCKER") == "1":
        pytest.skip("this engine is not ours to stop")
    with running_engine(tmp_path / "data") as host:
        monkeypatch.setenv("DOCKER_HOST", host)
        other = docker_engine.connect()
        recipe = io.BytesIO(b"FROM scratch\nLABEL of=test\n")
        assert list(other.client.api.build(fileobj=recipe, decode=True, tag="titan:x"))
        stream = docker_engine.export(other, "titan:x")
        next(stream)
    for use in (
        lambda: docker_engine.inspect(other, "titan:x"),
        lambda: docker_engine.run(other, "titan:x", ["true"]),
        lambda: list(docker_engine.export(other, "titan:x")),
        lambda: push("titan:x", "127.0.0.1:9/x", engine=other),
    ):
        with pytest.raises(LauncherError, match=r"the Docker engine at .* stopped answering"):
            use()
    stream.close()


def test_ctrl_c_stops_the_build(
    engine: Engine, base_image: str, tiny_lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the container of the step nor a tag stays; the steps before are used by the next build."""
    recipe = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN echo begun $(cat /proc/uptime); sleep 300\n"
    (tmp_path / "Dockerfile").write_text(recipe)
    monkeypatch.setattr(building, "dockerfile", lambda: tmp_path / "Dockerfile")

    def say(line: str) -> None:
        if line.startswith("begun"):
            raise KeyboardInterrupt

    monkeypatch.setattr(building, "say", say)
    before = engine.client.api.containers(all=True)
    options: dict[str, Any] = {"lock_file": tiny_lock, "network": "host", "tag": "titan:stopped"}
    with pytest.raises(KeyboardInterrupt):
        build("cpu", "amd64", engine=engine, base=base_image, **options)
    deadline = time.monotonic() + 30
    while engine.client.api.containers(all=True) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine.client.api.containers(all=True) == before
    with pytest.raises(LauncherError, match="has no image"):
        docker_engine.inspect(engine, "titan:stopped")


# ---------------------------------------------------------------------------------------- architectures


class Asked(NamedTuple):
    found: list[str]  # empty: refused
    arch: str = "all"
    engine: Engine = somewhere()
    entry: str = ""  # the kernel's, of the emulator


BINFMT = EMULATED.replace("/usr/bin/qemu-aarch64-static", "/usr/libexec/qemu-binfmt/aarch64-binfmt-P")  # Debian 13's


@pytest.mark.parametrize(
    "case",
    [
        Asked(["arm64"], "", somewhere(arch="arm64")),
        Asked(["amd64", "arm64"], engine=somewhere(system="Docker Desktop")),
        Asked(["arm64"], "arm64", somewhere("ssh://user@machine")),
        Asked(["amd64", "arm64"], entry=EMULATED),
        Asked(["amd64", "arm64"], entry=BINFMT),
        Asked([], "arm64"),
        Asked([]),
        Asked([], entry=EMULATED.replace("enabled", "disabled")),
        Asked([], entry=EMULATED.replace("OCF", "OC")),
        Asked([], entry=EMULATED.replace("qemu-aarch64", "qemu-aarch64_be")),
    ],
)
def test_architectures_that_the_machine_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Asked) -> None:
    monkeypatch.setattr(docker_engine, "BINFMT", tmp_path)
    (tmp_path / "qemu-aarch64").write_text(case.entry)
    if case.found:
        assert arches(case.arch, case.engine) == case.found
        return
    with pytest.raises(LauncherError, match="this machine is amd64 and cannot run arm64 programs") as error:
        arches(case.arch, case.engine)
    assert "sudo apt-get install qemu-user-static" in error.value.fix


def test_an_engine_of_another_architecture() -> None:
    with pytest.raises(LauncherError, match="no architecture 'riscv64'"):
        arches("", somewhere(arch="riscv64"))


# ------------------------------------------------------------------------------------ the docker command


def test_what_the_docker_command_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell script stands in for it and writes that down."""
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$DOCKER_HOST$BUILDX_BUILDER" "$@" >{tmp_path}/asked\n'
        f'for last in "$@"; do :; done\ntar -cf {tmp_path}/context.tar -C "$last" .\n'
        "printf '#8 0.123 one\\rtwo\\033[0m\\n'; echo '#5 ERROR: no space left on device' >&2; exit 1\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("BUILDX_BUILDER", "mine")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with pytest.raises(LauncherError, match="the disk of the Docker engine is full"):
        build("cpu", "arm64", engine=somewhere("ssh://machine"), lock_file=tiny_lock, network="host")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == ["ssh://machine", "build"]
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


def test_there_is_no_docker_command_that_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_lock: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in ("No such file", "Permission denied"):
        with pytest.raises(LauncherError, match=f"docker: {words}.* the docker command") as error:
            build("cpu", "amd64", engine=somewhere(), lock_file=tiny_lock)
        assert "docker-cli" in error.value.fix
        (tmp_path / "docker").touch(0o644)
