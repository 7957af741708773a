"""The local scheduler: runs job.sbatch with bash on this machine, detached from the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.base.values import whole
from launcher.scheduler.state import UNKNOWN, JobState

GRACE_S = 20.0  # from SIGTERM to SIGKILL: torchrun takes up to 15 s to end its ranks


def submit(script: Path) -> dict[str, Any]:
    """Starts `script` in a session of its own and returns what identifies its process later."""
    with open(script.parent / "logs" / "job.log", "ab") as log:
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=script.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return identity(process.pid)


def identity(pid: int) -> dict[str, Any]:
    """Process id, its start time in clock ticks since boot, and the host: ids are used again after a while."""
    return {"job_id": str(pid), "start_ticks": _start_ticks(pid), "host": os.uname().nodename}


def state(job: dict[str, Any], run_dir: Path) -> JobState:
    """RUNNING while a process of the run lives; otherwise UNKNOWN, since an end that was not written is not known."""
    if job.get("host") != os.uname().nodename:
        return JobState(UNKNOWN, "", f"it was started on {job.get('host')}: ask there")
    if is_alive(job):
        return JobState("RUNNING", "process")
    if left := members(run_dir):
        return JobState("RUNNING", "process", f"its script is gone, {len(left)} of its processes go on")
    why = "its process is gone and recorded no end: it was killed, or the machine restarted"
    return JobState(UNKNOWN, "", why, gone=True)


def is_alive(job: dict[str, Any]) -> bool:
    pid = whole(str(job.get("job_id", ""))) or 0
    ticks = _start_ticks(pid) if pid else None
    return ticks is not None and ticks == job.get("start_ticks")


def cancel(job: dict[str, Any], run_dir: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """SIGTERM to the script, which ends torchrun and writes the end, or to what outlived it; after GRACE_S SIGKILL."""
    for process in [job] if is_alive(job) else members(run_dir):
        _signal(process, signal.SIGTERM)
    _wait(lambda: is_alive(job) or bool(members(run_dir)), GRACE_S, sleep)
    for process in members(run_dir):
        _signal(process, signal.SIGKILL)
    _wait(lambda: is_alive(job), 2.0, sleep)  # the script writes the end, once its step is gone
    _signal(job, signal.SIGKILL)


def _wait(goes_on: Callable[[], bool], seconds: float, sleep: Callable[[float], None]) -> None:
    while goes_on() and seconds > 0:
        sleep(0.2)
        seconds -= 0.2


def members(run_dir: Path) -> list[dict[str, Any]]:
    """The processes that a run's script started here, found by the variable that it exports.

    Not by their parents: torchrun starts each rank in a session of its own, and a rank can outlive torchrun.
    """
    name, found = b"TITAN_SCRATCH=", []
    place = os.path.realpath(os.fsencode(run_dir))
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                scratch = line.removeprefix(name)
                if line != scratch and os.path.realpath(os.path.dirname(scratch)) == place:
                    found.append(identity(int(entry)))
    return [process for process in found if process["start_ticks"] is not None]


def find(script: Path, claimed_pid: str) -> dict[str, Any] | None:
    """The job of a run directory whose job.json was never written: the process that claimed it, if it still is one."""
    if (pid := whole(claimed_pid)) is None:
        return None
    try:
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    named = [os.path.realpath(os.fsdecode(word)) for word in command_line if word.endswith(b"/job.sbatch")]
    return identity(pid) if os.path.realpath(script) in named else None


def _signal(process: dict[str, Any], number: int) -> None:
    """To this very process: a process id that was given away again is left alone."""
    if is_alive(process):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(int(process["job_id"]), number)


def _start_ticks(pid: int) -> int | None:
    """From /proc/PID/stat (proc(5)): field 22; None for a process that has ended, whose state, field 3, is Z."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] != "Z" else None
