"""The one place that talks to a Docker engine: by docker-py, of the extra `image`, which is imported when used, and by
the docker command, which knows BuildKit and lists of images.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.image import ARCHES
from launcher.image.export import PIECE
from launcher.image.squashfs_tools import TAIL, Ran

DEFAULT_HOST = "unix:///var/run/docker.sock"
OUTPUT = 1 << 20  # bytes of what a program in an image prints
LOG_MAX = "16m"  # of what the engine keeps of it
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# Colours, and the step and the time that BuildKit puts before what a program says: #8 12.34 Collecting torch
_NOISE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^#\d+ \d+\.\d+ ")


@dataclass(frozen=True)
class Engine:
    """An engine that answered. `client` is docker-py's."""

    client: Any
    host: str  # unix:///var/run/docker.sock
    version: str
    arch: str  # Docker's word; what it runs without emulation
    system: str  # "Docker Desktop", "Ubuntu 24.04.3 LTS"


def connect() -> Engine:
    """The engine that DOCKER_HOST names, else the current docker context's, else the one of this machine.

    Raises LauncherError that says whether docker-py, the engine or the permission is missing.
    """
    try:
        import docker
        import requests
    except ImportError as error:
        what = "building images needs docker-py, which is not installed"
        raise LauncherError("package-missing", what, install("image"), status=ExitStatus.ERROR) from error
    host = os.environ.get("DOCKER_HOST") or _context_host() or DEFAULT_HOST
    try:
        # ssh:// by the program ssh, which knows the user's keys, agent and jump hosts; docker-py knows few of them.
        environment, ssh = os.environ | {"DOCKER_HOST": host}, host.startswith("ssh://")
        client = docker.DockerClient.from_env(timeout=60, environment=environment, use_ssh_client=ssh)
        version = client.version()
        system = str(client.info().get("OperatingSystem", ""))
    except (docker.errors.DockerException, requests.exceptions.RequestException, ValueError, OSError) as error:
        raise _unreachable(host, str(error)) from error
    return Engine(client, host, version["Version"], version["Arch"], system)


def _context_host() -> str:
    """The address in the current docker context: where rootless Docker and Docker Desktop are found."""
    from docker.context import ContextAPI

    try:
        current = ContextAPI.get_current_context()
        return str(current.Host or "").removeprefix("http+") if current else ""
    except Exception:  # docker-py raises no narrower one for a damaged file there
        return ""  # an unreadable ~/.docker says nothing about an engine


def _unreachable(host: str, reason: str) -> LauncherError:
    if "Permission denied" in reason or "PermissionError" in reason:
        what = f"this user may not use the Docker engine at {host}"
        fix = 'sudo usermod -aG docker "$USER" && newgrp docker'
        return LauncherError("docker-denied", what, fix, status=ExitStatus.ERROR, original=reason)
    if "paramiko" in reason:  # docker-py imports it for every ssh:// address, also where it calls ssh
        what = f"the Docker engine at {host} needs docker-py's ssh support, which is not installed"
        return LauncherError("package-missing", what, "pip install 'docker[ssh]'", status=ExitStatus.ERROR)
    fix = "sudo systemctl start docker; an engine elsewhere: export DOCKER_HOST=ssh://user@machine"
    if os.environ.get("DOCKER_HOST"):
        fix = "check DOCKER_HOST (unix:///path, ssh://user@machine, tcp://machine:port), or: unset DOCKER_HOST"
    what = f"no Docker engine answers at {host}"
    return LauncherError("docker-silent", what, fix, status=ExitStatus.ERROR, original=reason)


# ------------------------------------------------------------------------------------ architectures


def need_arch(engine: Engine, arch: str) -> None:
    """Raises LauncherError unless the engine can run programs of `arch`, itself or emulated."""
    if engine.arch == arch or engine.system == "Docker Desktop" or not engine.host.startswith("unix://"):
        return  # another machine's engine is asked by trying
    if not emulator(arch):
        raise cannot_run(engine, arch)


def emulator_version(arch: str) -> int:
    """Its first number; 0 where that cannot be told, such as for a program that is in a container alone."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = [emulator(arch), "--version"]
        said = subprocess.run(asked, capture_output=True, stdin=subprocess.DEVNULL, timeout=10).stdout
        if found := re.search(rb"version ([0-9]{1,3})\.", said):
            return int(found[1])
    return 0


def emulator(arch: str) -> str:
    """What this machine's kernel runs programs of `arch` by, in containers, too: that is the flag F; "" without one."""
    # qemu-aarch64-static, or Debian's /usr/libexec/qemu-binfmt/aarch64-binfmt-P; not aarch64_be.
    entry = re.compile(rf"enabled\ninterpreter (\S*qemu\S*{ARCHES[arch]}(?!_be)\S*)\nflags: \S*F")
    with suppress(OSError):
        found = (entry.match(path.read_text(encoding="utf-8")) for path in BINFMT.glob("qemu-*"))
        return next((match[1] for match in found if match), "")
    return ""


def cannot_run(engine: Engine, arch: str) -> LauncherError:
    """The refusal, with the command that would enable the architecture."""
    return LauncherError(
        "emulator-missing",
        f"this machine is {engine.arch} and cannot run {arch} programs: no emulator with the flag F in {BINFMT}",
        "sudo apt-get install qemu-user-static   (or: docker run --privileged --rm tonistiigi/binfmt "
        f"--install {arch}); emulation is 6 to 13 times slower than a machine with {arch}",
        status=ExitStatus.ERROR,
    )


# ------------------------------------------------------------------------------------------ building


def command(engine: Engine, arguments: list[str], line: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
    """Runs `docker ARGUMENTS` for that engine. Each line of its output goes to `line`; all of them are returned with
    the exit code. Raises LauncherError where there is no docker command."""
    # `docker build` chooses the builder: BuildKit where it has one (buildx), else the engine's own. An attestation
    # would make each image a list, and a list holds no lists. 20.10 has `docker manifest` among its experiments.
    wanted = {"DOCKER_HOST": engine.host, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1", "DOCKER_CLI_EXPERIMENTAL": "enabled"}
    environment = os.environ | wanted
    environment.pop("BUILDX_BUILDER", None)  # a builder of the user's own would keep the image for itself
    try:
        process = subprocess.Popen(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        fix = "sudo apt-get install docker-cli    # or docker.io, docker-ce-cli"
        what = f"docker: {error.strerror}; building images and manifest lists needs the docker command"
        raise LauncherError("program-missing", what, fix, status=ExitStatus.ERROR) from None
    lines = []
    with process:
        assert process.stdout
        try:
            for text in process.stdout:
                lines.append(_NOISE.sub("", text).rstrip())
                line(lines[-1])
        except BaseException:
            process.terminate()  # the engine then stops the build, too
            raise
    return process.returncode, "\n".join(lines)


# --------------------------------------------------------------------------------------- using images


@contextmanager
def asking(engine: Engine, refusal: str, status: ExitStatus = ExitStatus.ERROR) -> Iterator[None]:
    """What the engine refuses is `refusal`, in its words; one that stops in the middle is an error, too."""
    import docker
    import requests

    try:
        yield
    except docker.errors.APIError as error:
        words = str(error.explanation or error)
        raise LauncherError("docker-refused", refusal, status=status, original=words) from error
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        what = f"the Docker engine at {engine.host} stopped answering"
        fix = "sudo systemctl status docker; df -h /var/lib/docker"
        raise LauncherError("docker-silent", what, fix, status=ExitStatus.ERROR, original=str(error)) from error


def inspect(engine: Engine, image: str) -> dict[str, Any]:
    """What the engine knows of an image: Id, Architecture, Config, Size, … LauncherError where there is none."""
    import docker

    with asking(engine, f"the Docker engine does not show {image!r}"):
        try:
            found: dict[str, Any] = engine.client.api.inspect_image(image)
        except docker.errors.ImageNotFound as error:
            what = f"the Docker engine at {engine.host} has no image {image!r}"
            fix = "docker images; or build it: launcher image build stable"
            raise LauncherError("image-missing", what, fix, status=ExitStatus.NOT_FOUND) from error
    return found


def export(engine: Engine, image: str) -> Generator[bytes]:
    """The files of an image as one tar stream. The container that it needs is made and removed; it never runs."""
    # An image without a command needs one to be made.
    with _container(engine, image, ["/nothing"]) as name, asking(engine, f"the Docker engine does not export {image}"):
        yield from engine.client.api.export(name, chunk_size=PIECE)


def run(engine: Engine, image: str, command: list[str], *, timeout_s: float = 900) -> Ran:
    """Runs a command in a new container without a network; of what it prints OUTPUT bytes at most are kept.

    The image's entrypoint is left out. Raises LauncherError where the command cannot start or does not end.
    """
    import requests

    api = engine.client.api
    refusal = f"{command[0]} does not start in {image}"
    try:
        with _container(engine, image, command) as name, asking(engine, refusal, ExitStatus.INVALID):
            api.start(name)
            try:
                code = int(api.wait(name, timeout=timeout_s)["StatusCode"])
            except requests.exceptions.RequestException as error:
                if not re.search("timed? ?out", str(error), re.IGNORECASE):
                    raise
                what = f"{command[0]} in {image} did not end within {timeout_s:.0f} s"
                raise LauncherError("program-slow", what, status=ExitStatus.ERROR) from error
            out, err = api.logs(name, stderr=False), api.logs(name, stdout=False)  # of LOG_MAX, both together
        ran = Ran(code, out[:OUTPUT], err[-TAIL:].decode(errors="replace"), len(out) > OUTPUT)
        if "exec format error" in ran.err.lower():
            raise LauncherError("docker-refused", refusal, original=ran.err)
    except LauncherError as error:
        if "exec format error" not in error.original.lower():
            raise
        arch = inspect(engine, image)["Architecture"]
        foreign = arch if arch != engine.arch else next(name for name in ARCHES if name != engine.arch)
        raise cannot_run(engine, foreign) from error
    return ran


@contextmanager
def _container(engine: Engine, image: str, command: list[str]) -> Iterator[str]:
    """A container, by a name that is known before the engine makes it: whatever comes between, it is removed."""
    import docker
    import requests

    inspect(engine, image)
    api, name = engine.client.api, f"titan-launcher-{os.urandom(8).hex()}"
    # What a container prints lies on the engine's disk until it is removed.
    log = docker.types.LogConfig(type="json-file", config={"max-size": LOG_MAX})
    try:
        with _ctrl_c_waits(), asking(engine, f"the Docker engine makes no container of {image!r}"):
            settings = api.create_host_config(network_mode="none", log_config=log)
            api.create_container(image, command, name=name, entrypoint=[], host_config=settings)
        yield name
    finally:
        # An engine that is gone, or a container that is, must not hide why.
        with suppress(docker.errors.DockerException, requests.exceptions.RequestException), _ctrl_c_waits():
            api.remove_container(name, force=True, v=True)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Lets a call to the engine end before Ctrl-C counts: one that is broken off may make its container later than
    that is removed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
