"""Submitting a run, telling its state, cancelling it: the same for Slurm and for this machine."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from launcher import runs
from launcher.cluster import local, slurm
from launcher.cluster.state import FAILED, UNKNOWN, JobState
from launcher.errors import ExitStatus, LauncherError
from launcher.files import filesystem_error, read_json, write_json
from launcher.runs import Run
from launcher.spec import RunSpec


def submit(spec: RunSpec, secrets: Mapping[str, str]) -> Run:
    """Creates the run directory and submits it; afterwards either both exist or, when refused, neither.

    Ctrl-C waits until the job's id is on disk. If this program is killed in between, the directory stays with
    intent.json alone, and `job_of` finds the job again by its name.
    """
    with _signals_deferred():
        run = runs.create(spec, secrets, time.time())
        script = run.path / "job.sbatch"
        with _submission_lock(run, wait=True) as lock_fd:
            try:
                local_job = spec.job.scheduler == "local"
                job = local.submit(script) if local_job else {"job_id": slurm.submit(script, lock_fd)}
            except slurm.Unsure as error:
                job = _after_doubt(run, error)
            except BaseException:
                runs.discard(run)
                raise
            runs.record_job(run, job)
    return run


def _after_doubt(run: Run, error: slurm.Unsure) -> dict[str, Any]:
    try:
        if job_id := _find_in_slurm(run):
            return {"job_id": job_id}
    except LauncherError:
        pass  # the controller is still silent: what the user needs to read is the first error
    raise LauncherError(
        f"{error.what}: Slurm may or may not have the job of {run.name}",
        f"launcher status {run.name} looks for it; launcher cancel {run.name} makes sure that it never runs",
        status=ExitStatus.CLUSTER,
        original=error.original,
    )


def job_of(run: Run) -> dict[str, Any] | None:
    """The run's job: from job.json, else found again by the claim in the run directory or by its name in Slurm."""
    if job := run.job:
        return job
    if (run.intent or {}).get("scheduler") == "local":
        job = local.find(run.path / "job.sbatch", run.claimed_by)
    elif job_id := (run.claimed_by if run.claimed_by.isdigit() else _find_in_slurm(run)):
        job = {"job_id": job_id}
    if job and os.access(run.path, os.W_OK):
        runs.record_job(run, job)
    return job


def _find_in_slurm(run: Run) -> str | None:
    name = (run.intent or {}).get("job_name")
    ids = [int(job_id) for job_id, (job_name, _) in slurm.queue().items() if name and job_name == name]
    return str(max(ids)) if ids else None


def state(run: Run, queue: Mapping[str, tuple[str, JobState]] | None = None) -> JobState:
    """How the run stands: the end that its script wrote, then squeue, then sacct; nothing found is UNKNOWN.

    `queue` spares a call of squeue where many runs are asked for. Raises LauncherError when Slurm is needed and
    does not answer.
    """
    if end := run.end:
        return _ended(run, end)
    if (run.path / "cancelled").exists() and not run.job and not run.claimed_by:
        return JobState("CANCELLED", "run directory", "before it was submitted")
    if _is_submitting(run):
        return JobState("SUBMITTING", "run directory")
    job = job_of(run)
    if job is None:
        return JobState(UNKNOWN, "", "its submission was cut off, and no job of its name is known")
    if (run.intent or {}).get("scheduler") == "local":
        found = local.state(job)
        # The script may have ended between the two looks.
        return _ended(run, end) if not found.known and (end := run.end) else found
    job_id = str(job.get("job_id", ""))
    listed = (slurm.queue() if queue is None else queue).get(job_id)
    if listed and listed[1].known and listed[1].name != "COMPLETED":
        return listed[1]
    if end := run.end:
        return _ended(run, end)
    if listed and listed[1].known:  # COMPLETED; the marker may be late on a network file system
        return listed[1]
    if recorded := slurm.accounting([job_id]).get(job_id):
        return recorded
    if (read_json(run.path / "cancelled") or {}).get("job_id") == job_id:
        # scancel took it; a script that had come as far as its first lines would have written an end.
        return JobState("CANCELLED", "launcher cancel")
    return JobState(UNKNOWN, "", f"Slurm no longer knows job {job_id}, and it wrote no end")


def _ended(run: Run, end: Mapping[str, Any]) -> JobState:
    """The state that the script's EXIT trap wrote."""
    code = end.get("exit_code")
    if not isinstance(code, int):
        return JobState(UNKNOWN, "end.json", "end.json is damaged")
    if code == 0:
        return JobState("COMPLETED", "end.json", exit_code=0)
    if end.get("signal") == "TERM" and (word := _why_terminated(run, str(end.get("slurm", "")))):
        return JobState(word, "end.json", exit_code=code)
    if end.get("signal"):
        return JobState("FAILED", "end.json", f"ended by SIG{end['signal']}", code)
    return JobState("FAILED", "end.json", exit_code=code)


def _why_terminated(run: Run, slurm_said: str) -> str:
    """Slurm's final state, from what scontrol said while the job was being ended ("JobState=... Reason=...")."""
    said = dict(part.split("=", 1) for part in slurm_said.split() if "=" in part)
    if said.get("JobState") in FAILED - {"FAILED"}:
        return said["JobState"]
    reasons = {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL", "None": "CANCELLED"}
    if said.get("JobState") == "COMPLETING" and said.get("Reason") in reasons:
        return reasons[said["Reason"]]
    return "CANCELLED" if (run.path / "cancelled").exists() else ""


def cancel(run: Run) -> JobState:
    """Cancels the run and returns the state it had. One that was cut off before Slurm answered can never start."""
    before = state(run)
    if before.known and not before.active:
        return before
    write_json(run.path / "cancelled", {"at": time.time()})
    with _submission_lock(run, wait=True):
        job = job_of(run)
    if job is None:
        if (run.intent or {}).get("scheduler") == "slurm":
            try:  # the script gives up where the claim is taken, should Slurm still have it
                (run.path / "claim").mkdir()
            except FileExistsError:
                return cancel(run) if job_of(run) else before
        (run.path / "secret.env").unlink(missing_ok=True)
        return before
    if (run.intent or {}).get("scheduler") == "local":
        local.cancel(job)
    else:
        slurm.cancel(str(job["job_id"]))
        write_json(run.path / "cancelled", {"at": time.time(), "job_id": str(job["job_id"])})
        if before.name == "PENDING":  # its script never runs, so nothing else would remove them
            (run.path / "secret.env").unlink(missing_ok=True)
    return before


def states(all_runs: Sequence[Run]) -> dict[str, JobState]:
    """State by run name, with one squeue call for all; without Slurm's answer, those that need it are UNKNOWN."""
    queue: Mapping[str, tuple[str, JobState]] | None = None
    found = {}
    silent = ""
    for run in all_runs:
        needs_slurm = run.end is None and (run.intent or {}).get("scheduler") == "slurm"
        if needs_slurm and queue is None and not silent:
            try:
                queue = slurm.queue()
            except LauncherError as error:
                silent = error.what
        if needs_slurm and silent:
            found[run.name] = JobState(UNKNOWN, "", silent)
        else:
            found[run.name] = state(run, queue)
    return found


@contextmanager
def _submission_lock(run: Run, wait: bool) -> Iterator[int]:
    """Held from the intention to the job's id, and by sbatch itself for as long as it lives."""
    path = run.path / "submit.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise filesystem_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)  # not LOCK_UN: that would release sbatch's share of the lock too


def _is_submitting(run: Run) -> bool:
    if run.job or not os.access(run.path, os.W_OK):
        return False
    try:
        with _submission_lock(run, wait=False):
            return False
    except BlockingIOError:
        return True


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Holds back Ctrl-C, SIGTERM and SIGHUP until the block is done, then lets them act."""
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: waiting.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in waiting[:1]:
            signal.raise_signal(signal.Signals(late))
