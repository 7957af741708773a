"""What all tests share: the launcher as a user calls it, with an environment of its own."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import pytest
from hypothesis import HealthCheck, settings

from launcher.cli import main
from launcher.image.squashfs_file import sidecar_path, superblock
from launcher.scheduler.detect import detected

ROOT = Path(__file__).parent.parent
Launch = Callable[..., subprocess.CompletedProcess[str]]

# A shell that starts the suite in the background lets it ignore Ctrl-C, and so everything that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# LAUNCHER_TEST_THOROUGH=1: more examples of each property, and kills at every moment instead of one of a kind.
THOROUGH = os.environ.get("LAUNCHER_TEST_THOROUGH") == "1"
EXAMPLES = 500 if THOROUGH else 25
settings.register_profile("usual", deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
settings.load_profile("usual")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many of the tests on a real Slurm really ran: a suite that skips them all is green, too."""
    ran: set[str] = set()
    skipped: set[str] = set()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.nodeid.startswith("tests/cluster/"):
                (skipped if outcome == "skipped" else ran).add(report.nodeid)
    terminalreporter.write_line(f"cluster tests: {len(ran)} ran, {len(skipped)} skipped")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> None:
    """No test survives a power cut, so none waits until the disk has its files."""
    os.fsync = lambda fd: None


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory and home, without any configuration of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith(("LAUNCHER_", "SBATCH_", "SLURM_", "XDG_")) and name != "LAUNCHER_TRAIN_PYTHON":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def launch(workplace: Path) -> Launch:
    """Runs `launcher ...` and returns what it did; never leaves a traceback unnoticed.

    In this process, since starting Python is what takes the time. In a copy of it with `alone`, for what kills it, and
    in one that starts afresh where a variable is read while modules are imported.
    """

    def run(*arguments: str, timeout: float = 120, alone: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        if alone:
            done = forked(*arguments, **env).end()
        elif any(name.startswith(("PYTHON", "HF_HUB")) for name in env):
            done = subprocess.run(
                [sys.executable, "-m", "launcher", *arguments],
                capture_output=True,
                text=True,
                timeout=timeout,
                stdin=subprocess.DEVNULL,
                env=os.environ | env,
            )
        else:
            done = in_process(arguments, env)
        assert "Traceback" not in done.stderr + done.stdout, done.stderr + done.stdout
        return done

    return run


def in_process(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What a process `launcher ...` would return: with its own descriptors 0 to 2 and environment."""
    before = dict(os.environ)
    detected.cache_clear()  # a process asks Slurm once
    streams = sys.stdin, sys.stdout, sys.stderr, sys.argv
    saved = [os.dup(number) for number in range(3)]
    with TemporaryFile() as out, TemporaryFile() as err:
        try:
            os.environ.update(env)
            code = _run(main, ["launcher", *arguments], out, err)
        finally:
            sys.stdin, sys.stdout, sys.stderr, sys.argv = streams
            for number, one in enumerate(saved):
                os.dup2(one, number)
                os.close(one)
            os.environ.clear()
            os.environ.update(before)
        return subprocess.CompletedProcess(sys.argv, code, _text(out), _text(err))


def _run(program: Callable[[], object], argv: Sequence[str], out: IO[bytes], err: IO[bytes]) -> int:
    """The exit status of a program that is called with these descriptors 1 and 2 and these arguments."""
    code = 0
    with open(os.devnull) as nothing:
        for number, descriptor in enumerate((nothing.fileno(), out.fileno(), err.fileno())):
            os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False, encoding="utf-8") for number, mode in enumerate("rww")
    )
    sys.argv = list(argv)
    try:
        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


class Forked:
    """A process of its own that need not start Python and import everything again: a copy of this one.

    It can be killed, limited and sent signals, and what it does to itself ends with it.
    """

    def __init__(self, program: Callable[[], object], argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._out, self._err = TemporaryFile(), TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self.pid = os.fork()
        if self.pid:
            return
        try:
            variables = dict(env)
            os.environ.clear()
            os.environ.update(variables)
            tempfile.tempdir = None  # TMPDIR is read once
            detected.cache_clear()  # and Slurm is asked once
            os._exit(_run(program, argv, self._out, self._err))
        finally:
            os._exit(70)  # never back into the tests

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def said(self) -> str:
        """What it has printed so far."""
        return os.pread(self._out.fileno(), 1 << 20, 0).decode()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Once it has ended. A returncode of -9 is SIGKILL, as subprocess says it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with self._out, self._err:
            return subprocess.CompletedProcess([], code, _text(self._out), _text(self._err))


def forked(*arguments: str, **env: str) -> Forked:
    """`launcher ...` in a copy of this process."""
    return Forked(main, ["launcher", *arguments], {**os.environ, **env})


@pytest.fixture
def image(workplace: Path) -> Path:
    """A file that begins like a squashfs and is as long as it says: enough until a container starts."""
    path = workplace / "titan.sqsh"
    path.write_bytes(squashfs_head(4096).ljust(4096, b"\0"))
    say_it_trains(path)
    return path


def squashfs_head(bytes_used: int) -> bytes:
    """A squashfs 4.0 superblock of 96 bytes: zstd, blocks of 128 KiB, one inode, four tables."""
    tables = (bytes_used - 8, 2**64 - 1, 96, 100, 104, 2**64 - 1)
    return struct.pack("<4sIIIIHHHHHHQQQQQQQQ", b"hsqs", 1, 0, 1 << 17, 0, 6, 17, 0, 1, 4, 0, 0, bytes_used, *tables)


def say_it_trains(path: Path, arch: str = "", titan: str = "0.3.0") -> None:
    """A sidecar by which `submit` takes a stand-in for an image that can train, for any architecture by default."""
    block = superblock(path)
    recorded = {
        "bytes": block.file_size,
        "entries": block.inodes,
        "compressor": block.compressor,
        "block_kib": block.block_size // 1024,
    }
    versions = {"torch": "2.14.1", "torchtitan": titan}
    about = {"schema": 1, "arch": arch, "versions": versions, "squashfs": recorded}
    sidecar_path(path).write_text(json.dumps(about))


@pytest.fixture
def fake_slurm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script in the place of a Slurm command: `fake_slurm("sbatch", "echo 42")`."""
    folder = workplace / "slurm-bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(command: str, script: str) -> Path:
        path = folder / command
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    for command in ("sbatch", "squeue", "sacct", "scancel", "sinfo", "scontrol", "srun"):
        add(command, "exit 1")
    add("squeue", ":")
    return add
