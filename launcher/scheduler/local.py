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


def state(job: dict[str, Any]) -> JobState:
    """RUNNING while the process lives; otherwise UNKNOWN, since an end that was not written is not known."""
    if job.get("host") != os.uname().nodename:
        return JobState(UNKNOWN, "", f"it was started on {job.get('host')}: ask there")
    if is_alive(job):
        return JobState("RUNNING", "process")
    why = "its process is gone and wrote no end: killed, or the machine was restarted"
    return JobState(UNKNOWN, "", why, gone=True)


def is_alive(job: dict[str, Any]) -> bool:
    pid = whole(str(job.get("job_id", ""))) or 0
    ticks = _start_ticks(pid) if pid else None
    return ticks is not None and ticks == job.get("start_ticks")


def cancel(job: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> None:
    """SIGTERM to the script, which ends torchrun and writes the end; SIGKILL to all that is left after GRACE_S."""
    if not is_alive(job):
        return
    family = _family(job)
    _signal(job, signal.SIGTERM)
    _wait(job, GRACE_S, sleep)
    if is_alive(job):
        family = _family(job)
    for member in reversed(family[1:]):
        _signal(member, signal.SIGKILL)
    _wait(job, 2.0, sleep)  # the script writes the end, once its step is gone
    _signal(job, signal.SIGKILL)


def _wait(job: dict[str, Any], seconds: float, sleep: Callable[[float], None]) -> None:
    while is_alive(job) and seconds > 0:
        sleep(0.2)
        seconds -= 0.2


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


def _family(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The job's process and every one below it, parents first (torchrun's ranks are sessions of their own)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    family = [int(job["job_id"])]
    for pid in family:
        family += children.get(pid, [])
    return [identity(pid) for pid in family]


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5): field 3, state, comes first here)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
