"""A Docker engine for the tests: Debian's dockerd, started as root beside whatever else runs on the machine.

It lives in a PID and a mount namespace of its own: when it ends, or when the process that started it dies, the
containers and mounts that it made are gone. Its files are below one directory.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
START_TIMEOUT_S = 30
USUAL_PORT = 38471  # of the web server: the address is in the base image, and a new one would spoil a kept cache
DEBIAN_PACKAGES = {"dockerd": "docker.io", "containerd": "containerd", "setpriv": "util-linux"}


def missing_packages() -> list[str]:
    """Debian packages without which no engine starts."""
    return [package for program, package in DEBIAN_PACKAGES.items() if not shutil.which(program, path=PATH)]


@contextmanager
def running_engine(data_root: Path) -> Iterator[str]:
    """The address of an engine that has no network of its own: builds use the host's ("--network host")."""
    with tempfile.TemporaryDirectory(prefix="titan-docker-", dir="/run") as name:
        folder = Path(name)  # a socket's path must be short
        host = f"unix://{folder}/docker.sock"
        command = [
            # Both die with their parents, whatever ends those.
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("--mount-proc", "dockerd", f"--host={host}", f"--data-root={data_root}"),
            *(f"--exec-root={folder}/exec", f"--pidfile={folder}/docker.pid"),
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
        ]
        with daemon(command, folder / "dockerd.log", _ready):
            yield host


def _ready(log: bytes) -> bool:
    return b"API listen on" in log


@contextmanager
def daemon(command: list[str], log: Path, ready: Callable[[bytes], bool]) -> Iterator[None]:
    """Runs it, and goes on when `ready` says so, which sees its log."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={"PATH": PATH})
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready(log.read_bytes()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks dockerd itself first, a child: it then ends its containers and takes their control groups away."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        for child in children.read_text().split() or [str(process.pid)]:
            os.kill(int(child), signal.SIGTERM)
        process.wait(timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server for the files of a folder, on the loopback interface."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", USUAL_PORT), handler)
    except OSError:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@functools.cache
def pip_setting(name: str) -> str:
    """What pip on this machine would use: PIP_<NAME>, else its configuration; empty where nothing is set."""
    variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if variable is not None:
        return variable
    command = ["python3", "-m", "pip", "--disable-pip-version-check", "config", "get", f"global.{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
