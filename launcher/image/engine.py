"""The one place that talks to a Docker engine: the docker command, which knows contexts, ssh, logins and BuildKit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import say
from launcher.base.values import parse_json
from launcher.image.squashfs_tools import Ran, missing, run

OUTPUT = 1 << 20  # bytes of what a program in an image prints, and of what the engine says of an image
# Colours, and the step and the time that BuildKit puts before what a program says: #8 12.34 Collecting torch
_NOISE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^#\d+ \d+\.\d+ ")


def own_arch() -> str:
    """Docker's word for what the engine runs without emulation: that of DOCKER_HOST, else of the docker context.

    Raises LauncherError where the docker command, the engine or the permission is missing.
    """
    ran = ask("version", "--format", "{{.Server.Arch}}")
    if ran.code:
        raise _refused("docker version", ran.err)
    return ran.out.decode().strip()


def ask(*arguments: str, stdin: bytes = b"", timeout_s: float = 60) -> Ran:
    """How `docker ARGUMENTS` ended. Raises LauncherError where no engine answers, and where this user may not ask."""
    ran = run(["docker", *arguments], OUTPUT, stdin=stdin, timeout_s=timeout_s)
    if ran.code and "permission denied while trying to connect" in ran.err:
        what, fix = "this user may not use the Docker engine", 'sudo usermod -aG docker "$USER" && newgrp docker'
        raise LauncherError("docker-denied", what, fix, status=ExitStatus.ERROR, original=ran.err)
    if ran.code and re.search("Cannot connect to the Docker daemon|error during connect", ran.err):
        fix = "sudo systemctl start docker; an engine elsewhere: export DOCKER_HOST=ssh://user@machine"
        raise LauncherError("docker-silent", "no Docker engine answers", fix, status=ExitStatus.ERROR, original=ran.err)
    return ran


def _refused(what: str, words: str) -> LauncherError:
    return LauncherError("docker-refused", f"{what} failed", status=ExitStatus.ERROR, original=words)


def build(arguments: list[str]) -> tuple[int, str]:
    """Runs `docker build ARGUMENTS`, says every line, and returns the exit code and the last 60 lines."""
    # An attestation would make the image a list. A builder of the user's own would keep the image for itself.
    environment = os.environ | {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    environment.pop("BUILDX_BUILDER", None)
    lines: deque[str] = deque(maxlen=60)
    try:
        process = subprocess.Popen(
            ["docker", "build", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise missing("docker", error) from None
    with process:
        assert process.stdout
        try:
            for text in process.stdout:
                lines.append(_NOISE.sub("", text).rstrip())
                say(lines[-1])
        except BaseException:
            process.terminate()  # the engine then stops the build, too
            raise
    return process.returncode, "\n".join(lines)


def inspect(image: str) -> dict[str, Any]:
    """What the engine knows of an image: Id, Architecture, Config, Size, … LauncherError where there is none."""
    ran = ask("image", "inspect", image)
    if "no such image" in ran.err.lower():
        fix = "docker images; or build it: launcher image build stable"
        what = f"the Docker engine has no image {image!r}"
        raise LauncherError("image-missing", what, fix, status=ExitStatus.NOT_FOUND)
    if ran.code:
        raise _refused(f"docker image inspect {image}", ran.err)
    found: dict[str, Any] = parse_json(ran.out)[0]
    return found


def export(image: str) -> Generator[bytes]:
    """The files of an image as one tar stream, in pieces. The container that it needs never runs."""
    # An image without a command needs one to be made.
    with _container(image, "/nothing") as name:
        pipe = subprocess.PIPE
        with subprocess.Popen(["docker", "export", name], stdout=pipe, stderr=pipe, start_new_session=True) as process:
            assert process.stdout and process.stderr
            try:
                while chunk := process.stdout.read(1 << 20):
                    yield chunk
            except BaseException:
                process.kill()
                raise
            words = process.stderr.read(OUTPUT).decode(errors="replace")
        if process.returncode:
            raise _refused(f"docker export of {image}", words)


def run_in(image: str, command: list[str], *, stdin: bytes, timeout_s: float) -> Ran:
    """How a command ended in a new container without a network and without the image's entrypoint."""
    # What it prints is not kept on the engine's disk.
    options = ["--interactive", "--network=none", "--log-driver=none", "--entrypoint="]
    with _container(*options, image, *command) as name:
        return ask("start", "--attach", "--interactive", name, stdin=stdin, timeout_s=timeout_s)


@contextmanager
def _container(*arguments: str) -> Iterator[str]:
    """A container, by a name that is known before the engine makes it: whatever comes between, it is removed."""
    name = f"titan-launcher-{os.urandom(8).hex()}"
    try:
        with _ctrl_c_waits():
            ran = ask("create", "--pull=never", f"--name={name}", *arguments)
        if ran.code:
            raise _refused("docker create", ran.err)
        yield name
    finally:
        with suppress(LauncherError), _ctrl_c_waits():  # an engine that is gone must not hide why
            ask("rm", "--force", "--volumes", name)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Lets a question to the engine end before Ctrl-C counts: a container that is still being made is not removed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
