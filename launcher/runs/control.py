"""Submitting a run, its state, whether it can go on, cancelling it: the same for Slurm and for this machine."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import filesystem_error, lock, locked, read_json, write_json
from launcher.base.values import whole
from launcher.config.spec import RunSpec
from launcher.runs import directory as runs
from launcher.runs.again import checkpoint_step
from launcher.runs.directory import Run
from launcher.scheduler import local, slurm
from launcher.scheduler.state import FAILED, UNKNOWN, WAITING, JobState
from launcher.titan import checkpoints

CHECK_FAILED = 20  # the exit code of a job with a node that failed its check: slurm/node.py's
HIDDEN_BY = (143, 137)  # what srun makes of it where it ended the other nodes' tasks first: 128 + SIGTERM, SIGKILL
UNFIT = "a node failed its check before training"


def submit(run: Run, lock_fd: int, after: str = "", undo: Callable[[Run], None] = runs.discard) -> str:
    """Submits a run whose directory has just been made, and closes its lock; returns the number of the job.

    When refused, `undo`: usually the directory is gone again. If this program is killed before the number is on disk,
    the directory stays with intent.json alone, and `job_of` finds the job by its name. `after`: number of the Slurm
    job whose end, however it ends, the new one waits for.
    """
    try:
        return str(_start(run, lock_fd, after)["job_id"])
    except InDoubt:
        raise
    except BaseException:
        undo(run)
        raise
    finally:
        os.close(lock_fd)  # not LOCK_UN: that would release sbatch's share of the lock too


DOUBT_S = 3600  # by then a controller that answers has dealt with every submission that it ever received


class InDoubt(LauncherError):
    """There may be a job: the run directory stays."""


def _start(run: Run, lock_fd: int, after: str) -> dict[str, Any]:
    """Hands the script over and notes the job. Raises InDoubt, or whatever says that nothing was submitted."""
    script = run.path / "job.sbatch"
    try:
        job = local.submit(script) if run.is_local else {"job_id": slurm.submit(script, lock_fd, after)}
    except (slurm.Unsure, slurm.Refused) as error:
        try:
            # Of some jobs that it refuses Slurm keeps a record, as failed.
            job_id = _named(run, slurm.queue(), without_failed=isinstance(error, slurm.Refused))
        except LauncherError:
            job_id = None  # the controller is still silent: what the user needs to read is the first error
        else:
            if job_id is None and isinstance(error, slurm.Refused):
                raise
        if job_id is None:
            with suppress(LauncherError):
                write_json(run.path / "intent.json", {**(run.intent or {}), "in_doubt": True})
            raise InDoubt(
                "in-doubt",
                f"{error.what}: Slurm may or may not have the job of {run.name}",
                f"{quoted('launcher', 'status', run.reference)} looks for it; "
                f"{quoted('launcher', 'cancel', run.reference)} makes sure that it never runs",
                status=ExitStatus.CLUSTER,
                original=error.original,
            ) from error
        job = {"job_id": job_id}
    try:
        runs.record_job(run, job)
    except LauncherError as error:
        raise InDoubt(
            "in-doubt",
            f"submitted as job {job['job_id']}, but {error.what}",
            f"{quoted('launcher', 'status', run.reference)}; do not submit it again",
            status=error.status,
        ) from error
    return job


def job_of(run: Run) -> dict[str, Any] | None:
    """The run's job: from job.json, else found again by the claim in the run directory or by its name in Slurm."""
    if job := run.job:
        return job
    if run.is_local:
        job = local.find(run.path / "job.sbatch", run.claimed_by)
    elif job_id := (run.claimed_by if whole(run.claimed_by) is not None else _named(run, slurm.queue())):
        job = {"job_id": job_id}
    if job:
        _note(run, job)
    return job


def _note(run: Run, job: Mapping[str, Any]) -> None:
    if os.access(run.path, os.W_OK):
        runs.record_job(run, job)


def _named(run: Run, queue: slurm.Listed, without_failed: bool = False, active: bool = False) -> str | None:
    """The newest job with the run's name."""
    name = (run.intent or {}).get("job_name")
    earlier = run.earlier_jobs
    ids = [
        whole(job_id) or 0
        for job_id, (job_name, state) in queue.items()
        if name
        and job_name == name
        and job_id not in earlier
        and not (without_failed and state.failed)
        and (state.active or not active)
    ]
    return str(max(ids)) if ids else None


def _ours(run: Run, listed: slurm.Listed, job_id: str) -> JobState | None:
    """The state of the run's job; None when Slurm has no such job or has given its number to another one."""
    name, found = listed.get(job_id, ("", None))
    return found if name == (run.intent or {}).get("job_name") else None


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What Slurm said of many jobs at once, so that a list of runs costs two commands and not two per run."""

    queue: slurm.Listed
    accounting: slurm.Listed


def state(run: Run, known: Slurm | None = None) -> JobState:
    """How the run stands: the end that its script wrote, then squeue, then sacct; nothing found is UNKNOWN.

    Raises LauncherError when Slurm is needed and does not answer.
    """
    found = _state(run, known)
    # A script that never began, or was killed before it had read them, leaves its secrets.
    if (
        not found.active
        and (run.path / runs.SECRETS).exists()
        and (found.known or (found.gone and _can_never_start(run)))
    ):
        run.forget_secrets()
    return found


def forget_secrets_in(runs_dir: Path) -> None:
    """Secrets of earlier runs that no job needs any more, as far as that is known."""
    with suppress(LauncherError, OSError):
        states([Run(path.parent) for path in runs_dir.glob(f"*/{runs.SECRETS}")])


def _can_never_start(run: Run) -> bool:
    """Makes sure of it, in a run of one's own of which no job is known, by taking the claim."""
    intent = run.intent or {}
    try:
        if (run.path / runs.SECRETS).lstat().st_uid != os.geteuid():
            return False
        if not run.is_anothers:
            # Another host may ask another Slurm; and what a controller has not answered it may still do.
            if intent.get("host") != os.uname().nodename or (intent.get("in_doubt") and runs.age_s(run) < DOUBT_S):
                return False
            (run.path / "claim").mkdir()
    except FileExistsError:  # by a job that is over, or by one that has begun in this moment
        return bool(run.job or (run.claimed_by and job_of(run) is None))
    except OSError:
        return False
    return True


def _state(run: Run, known: Slurm | None) -> JobState:
    if end := run.end:
        return _ended(run, end)
    if run.is_anothers:
        return JobState(UNKNOWN, "", f"a copy of another run directory; ask there: {run.made_at}", gone=True)
    cancelled = (run.path / "cancelled").exists()
    never_begins = cancelled and not run.claimed_by and (run.path / "claim").is_dir()
    if never_begins and not run.job:
        return JobState("CANCELLED", "run directory", "before it was submitted")
    if _is_submitting(run):
        return JobState("SUBMITTING", "run directory")
    job = job_of(run)
    if job is None:
        return JobState(UNKNOWN, "", "its submission was interrupted, and no job of its name is known", gone=True)
    if run.is_local:
        found = local.state(job, run.made_at)
        if not found.known and (end := run.end):  # the script may have ended between the two looks
            return _ended(run, end)
        if found.gone and cancelled:
            return JobState("CANCELLED", "launcher cancel")
        return found
    job_id = str(job["job_id"])
    queue = slurm.queue() if known is None else known.queue
    listed = _ours(run, queue, job_id)
    if listed is None and (other := _named(run, queue, active=True)):  # the number that sbatch printed is another's
        _note(run, {"job_id": other})
        return queue[other][1]
    if known is None and listed is None:
        listed = _ours(run, slurm.job(job_id), job_id)  # somebody else's run
    if listed and listed.name != "COMPLETED":
        return listed
    if end := run.end:
        return _ended(run, end)
    if listed:  # COMPLETED; the marker may be late on a network file system
        return listed
    if recorded := _ours(run, slurm.accounting([job_id]) if known is None else known.accounting, job_id):
        return recorded
    if never_begins:
        return JobState("CANCELLED", "run directory", "before it began")
    if (read_json(run.path / "cancelled") or {}).get("job_id") == job_id:
        # scancel took it; a script that had come as far as its first lines would have written an end.
        return JobState("CANCELLED", "launcher cancel")
    return JobState(UNKNOWN, "", f"Slurm no longer knows job {job_id}, and it wrote no end", gone=True)


def _ended(run: Run, end: Mapping[str, Any]) -> JobState:
    """The state that the script's EXIT trap wrote."""
    code = end.get("exit_code")
    if type(code) is not int:
        return JobState(UNKNOWN, "end.json", "end.json is damaged")
    # srun answers 0 when a lost node ends its step before any task has ended: Slurm's word comes first.
    if word := _slurm_ended(str(end.get("slurm", ""))):
        return JobState(word, "end.json", exit_code=code)
    name = "COMPLETED" if code == 0 else "FAILED"
    if code and end.get("signal") == "TERM" and (run.path / "cancelled").exists():
        name = "CANCELLED"
    elif code == CHECK_FAILED or (
        code in HIDDEN_BY and not run.chosen and any(node.get("ok") is False for node in run.node_records)
    ):
        return JobState("FAILED", "end.json", UNFIT, code, unfit=True)
    why = f"ended by SIG{end['signal']}" if name == "FAILED" and end.get("signal") else ""
    return JobState(name, "end.json", why, code)


def _slurm_ended(slurm_said: str) -> str:
    """Why Slurm was ending the job while its script ended ("JobState=... Reason=..."); "" when it was not."""
    said = dict(part.split("=", 1) for part in slurm_said.split() if "=" in part)
    if said.get("JobState") in FAILED - {"FAILED"}:
        return said["JobState"]
    reasons = {"TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL", "None": "CANCELLED"}
    return reasons.get(said.get("Reason", ""), "") if said.get("JobState") == "COMPLETING" else ""


def cancel(run: Run) -> tuple[JobState, bool]:
    """The state that the run had, and whether it is cancelled.

    One that has not begun, and that Slurm does not show or has not answered for, can never begin afterwards: its
    claim is taken. One that has begun and that Slurm does not know cannot be cancelled.
    """
    before = state(run)
    if (before.known and not before.active) or run.is_anothers:
        return before, False
    lock = run.path / runs.LOCK
    try:  # waits until nobody, not even a left-over sbatch, is submitting the run, and keeps it so
        with locked(lock, fcntl.LOCK_SH):  # the submission alone has it for itself: who looks disturbs nobody
            job = job_of(run)
    except OSError as error:
        raise filesystem_error(lock, error) from error
    job_id = str(job["job_id"]) if job else ""
    if job and run.is_local:
        if not before.active:  # nothing to end, so nothing is said of its end
            return before, False
        write_json(run.path / "cancelled", {"at": time.time()})
        local.cancel(job, run.made_at)
    elif job and _ours(run, slurm.job(job_id), job_id):
        slurm.cancel(job_id)
        write_json(run.path / "cancelled", {"at": time.time(), "job_id": job_id})
        if before.name not in WAITING:
            return before, True
    else:
        try:  # the script gives up where the claim is taken, should Slurm have it all the same
            (run.path / "claim").mkdir()
        except FileExistsError:  # by the script, or so that its secrets could be removed
            if job:
                return before, False
            if not run.is_local and job_of(run):
                return cancel(run)
        write_json(run.path / "cancelled", {"at": time.time()})
    run.forget_secrets()  # its script never runs, or is over, so nothing else would remove them
    return before, True


def states(all_runs: Sequence[Run]) -> dict[str, JobState]:
    """State by run name, at the price of one squeue and one sacct; without an answer of Slurm's, UNKNOWN."""
    asking = {run.name for run in all_runs if run.end is None and not run.is_local}
    known, silent = Slurm({}, {}), ""
    if asking:
        try:
            queue = slurm.queue()
            gone = [str(job["job_id"]) for run in all_runs if run.name in asking and (job := run.job)]
            gone = [job_id for job_id in gone if job_id not in queue]
            known = Slurm(queue, slurm.accounting(gone) if gone else {})
        except LauncherError as error:
            silent = error.what
    return {
        run.name: JobState(UNKNOWN, "", silent) if silent and run.name in asking else state(run, known)
        for run in all_runs
    }


def _is_submitting(run: Run) -> bool:
    if run.job:
        return False
    try:
        descriptor = os.open(run.path / runs.LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Without locks, a submission has the time that it may take.
        return not lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB) and runs.age_s(run) < 2 * slurm.SUBMIT_S
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


# Of the recipe, what may differ between two attempts: with another model, batch or degree it would be another run.
MAY_CHANGE = {"steps", "log_freq", "tensorboard", "checkpoint_interval", "checkpoint_keep"}


def check_resumable(run: Run, asked: RunSpec) -> int:
    """The step after which it goes on; 0: from the beginning. Raises LauncherError where it cannot go on as `asked`."""
    anew = quoted("launcher", "submit", run.path / "run.toml", "--name", "NAME")
    if run.is_copy:
        what = f"{run.path} is a copy, or was moved: its job would write to {run.made_at}"
        raise LauncherError("run-copied", what, anew)
    ended, node = check_ended(run), run.asked
    now = {"recipe": dataclasses.asdict(asked.recipe), "titan": dict(asked.titan)}
    now |= {"job": {"nodes": asked.job.nodes}, "profile": {"gpus_per_node": asked.profile.gpus_per_node}}
    for table, settings in now.items():
        for key, value in settings.items():
            if key not in MAY_CHANGE and node[table].get(key, value) != value:
                what = f"{table}.{key} was {node[table][key]!r}, is {value!r} now: that is another run"
                raise LauncherError("resume-changed", what, anew)
    if ended.name == "COMPLETED" and asked.recipe.steps <= run.steps:
        more = quoted("launcher", "resume", run.reference, "--steps", 2 * run.steps)
        raise LauncherError("resume-complete", f"{run.name} has done all of its {run.steps} steps", more)
    folder = checkpoints.folder_of(node)
    if wrong := checkpoints.foreign(checkpoints.record_of(folder), node):
        raise LauncherError("resume-changed", f"the checkpoints in {folder} are of {'; '.join(wrong)}", anew)
    return checkpoint_step(run.path, node)


def check_ended(run: Run) -> JobState:
    """How it ended. Raises LauncherError where it goes on, or nobody knows: then another job would train it twice."""
    found = state(run)
    if found.active:
        fix = quoted("launcher", "watch", run.reference)
        raise LauncherError("run-active", f"{run.name} has not ended: it is {found.name}", fix)
    if not (found.known or found.gone):
        what = f"nobody knows whether {run.name} has ended: {found.reason}"
        raise LauncherError("run-active", what, "scontrol ping", status=ExitStatus.JOB_UNKNOWN)
    if (run.intent or {}).get("in_doubt") and not (run.job or run.claimed_by) and runs.age_s(run) < DOUBT_S:
        what = f"Slurm may still have the job of {run.name}: it did not answer when it was submitted"
        raise LauncherError("in-doubt", what, "wait for an hour", status=ExitStatus.CLUSTER)
    return found


@contextmanager
def signals_deferred() -> Iterator[None]:
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
