"""The run directory: made whole or not at all, read by every other command.

    run.toml  job.sbatch  job/ (node.json, node.py, titan/, check/)  data/ (the view)  logs/  intent.json  job.json
    claim/  end.json

`intent.json` is there before anything is submitted, `job.json` after; a directory with the first alone was cut
off in between, and the job is looked for by its name (launcher/runs/control.py).
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import (
    PACKAGE,
    data_dir,
    filesystem_error,
    lock,
    read_bytes,
    read_json,
    unreadable,
    write_json,
    write_text,
)
from launcher.base.output import warn
from launcher.base.values import guessed, whole
from launcher.config.hardware import of_gpu
from launcher.config.render import render
from launcher.config.spec import S3, PlacedRun, node_config
from launcher.config.user_file import runs_dir as saved_runs_dir
from launcher.config.write import run_toml
from launcher.runs.again import TRAVELS, archive, past_attempts
from launcher.runs.judged import count, records_in, texts

LOCK = "submit.lock"
SECRETS = "secret.env"  # until the job has read it, or can never start
LEFT_OVER = re.compile(r"\.[A-Za-z0-9][\w.-]*\.([0-9a-f]{8}|[1-9][0-9]{0,9})\.(tmp|refused)", re.ASCII)
# Installed, as far as Python can see: how fsspec finds a file system that is not its own.
S3_PACKAGE = {
    "METADATA": "Metadata-Version: 2.1\nName: titan-s3\nVersion: 1\n",
    "entry_points.txt": "[fsspec.specs]\ns3 = titan.s3:S3FileSystem\n",
}


@dataclass(frozen=True)
class Run:
    """A run directory on disk; its small files are read when asked for."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def reference(self) -> str:
        """How to name the run in a command typed here: its name where commands look for it, else its path."""
        below = Path("runs")
        with suppress(LauncherError):  # a file that is damaged by now is no reason to fail here
            below = saved_runs_dir()
        below = below.resolve()
        return self.name if self.path.parent == below and self.name[:1] != "-" else str(self.path)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """`job/node.json`, what was asked of the nodes: its tables, all empty where the file is missing or damaged."""
        found = read_json(self.path / "job" / "node.json") or {}
        tables = found if "placed" in found else _of_schema_1(found)
        return {name: table if isinstance(table := tables.get(name), dict) else {} for name in TABLES}

    @property
    def steps(self) -> int:
        """How many training steps were asked for; 0 where the run directory does not say."""
        return count(self.asked["recipe"].get("steps"))

    @property
    def nodes(self) -> int:
        """How many were asked for; 0 where the run directory does not say."""
        return count(self.asked["job"].get("nodes"))

    @property
    def ranks_per_node(self) -> int:
        """GPUs used on a node, or its processes on CPUs; 0 where the run directory does not say."""
        return count(self.asked["profile"].get("gpus_per_node"))

    @property
    def on_cpu(self) -> bool:
        return self.asked["profile"].get("device") == "cpu"

    @property
    def intent(self) -> dict[str, Any] | None:
        found = read_json(self.path / "intent.json")
        at = (found or {}).get("at")
        return found if isinstance(at, (int, float)) and math.isfinite(at) else None

    @property
    def submission(self) -> object:
        """Another one once the run was submitted again, or has ended."""
        return self.intent, self.job, self.end

    @property
    def is_local(self) -> bool:
        return (self.intent or {}).get("scheduler") == "local"

    @property
    def job(self) -> dict[str, Any] | None:
        found = read_json(self.path / "job.json")
        return found if whole(str((found or {}).get("job_id", ""))) is not None else None

    @property
    def made_at(self) -> Path:
        """Where it was made, and its job has it."""
        return Path(str(self.asked["placed"].get("run_dir") or self.path))

    @property
    def is_copy(self) -> bool:
        """Whether this is a copy of a run directory, or one that was moved: it is not where it was made."""
        try:
            return not self.path.samefile(self.made_at)
        except (OSError, ValueError):
            return True

    @property
    def is_anothers(self) -> bool:
        """Whether its job is another directory's, of which it is a copy. A run that was moved keeps its job."""
        return self.is_copy and os.path.lexists(self.made_at)

    @property
    def end(self) -> dict[str, Any] | None:
        return read_json(self.path / "end.json")

    @property
    def node_records(self) -> list[dict[str, Any]]:
        """What the nodes wrote about their own check, in the job's order."""
        return records_in(self.path)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The nodes that train, where the check chose them of more; empty where all of the job's train."""
        return texts((read_json(self.path / "nodes" / "check.json") or {}).get("chosen"))

    @property
    def hang(self) -> dict[str, Any]:
        """Why nothing moves, once the nodes have found that."""
        return read_json(self.path / "nodes" / "hang.json") or {}

    @property
    def earlier_jobs(self) -> set[str]:
        """Numbers of the jobs that it had before it was resumed."""
        found = (read_json(path / "job.json") or {} for path in past_attempts(self.path))
        return {str(job["job_id"]) for job in found if "job_id" in job}

    def forget_secrets(self) -> None:
        with suppress(OSError):
            (self.path / SECRETS).unlink(missing_ok=True)

    @property
    def claimed_by(self) -> str:
        """The job id that the script itself wrote when it began; empty before that."""
        try:
            return read_bytes(self.path / "claim" / "job_id").decode("utf-8", "replace").strip()
        except OSError:
            return ""


TABLES = ("job", "profile", "recipe", "env", "titan", "placed", "hardware")
_SCHEMA_1 = {
    "job": {"nodes": "nodes", "gpu": "profile", "init_from": "init_from"},
    "profile": {"gpu": "gpu", "device": "device", "gpus_per_node": "gpus_per_node", "scratch": "scratch"},
    "placed": {"run_dir": "run_dir", "data": "data", "data_source": "data_source", "tokenizer": "tokenizer"},
}


def _of_schema_1(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node.json as version 0.1 wrote it, under today's keys."""
    tables = {table: {key: node[old] for key, old in keys.items() if old in node} for table, keys in _SCHEMA_1.items()}
    recipe = node.get("recipe")
    if isinstance(recipe, dict):
        tables["recipe"] = {key: value for key, value in recipe.items() if key != "name"}
        tables["job"] |= {"recipe": recipe["name"]} if "name" in recipe else {}
    return {**tables, "titan": node.get("titan")}


@contextmanager
def making(spec: PlacedRun, secrets: Mapping[str, str], now_s: float) -> Iterator[tuple[Path, int]]:
    """The run directory under a temporary name, for the block to write more into; renamed at its end: all or nothing.

    With it comes a file descriptor that holds its submission lock: nobody ever sees the directory unlocked before the
    caller closes it. Raises LauncherError when the name is taken or nothing can be written there.
    """
    final = Path(spec.run_dir)
    fix = "choose another with --name, or leave --name out for one with the time in it"
    what = f"a run named {spec.job.name} exists: {final}"
    taken = LauncherError("run-exists", what, fix, status=ExitStatus.EXISTS)
    if os.path.lexists(final):
        raise taken
    temporary = final.parent / f".{spec.job.name}.{os.urandom(4).hex()}.tmp"
    remove_left_over(final.parent)
    try:
        temporary.mkdir(parents=True)  # what was there before is not ours to remove
        try:
            lock_fd = os.open(temporary / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            lock(lock_fd, fcntl.LOCK_EX)
            (temporary / "logs").mkdir()
            _fill(temporary, spec, now_s)
            yield temporary, lock_fd
            _write_secrets(temporary, spec, secrets)  # last of all: a directory that is unlocked may be removed
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except (OSError, LauncherError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.ENOTEMPTY, errno.EEXIST):  # made by somebody else in the same moment
            raise taken from error
        raise filesystem_error(final, cause, "--runs-dir DIR") from error


OF_A_JOB = ("job.json", "claim", "cancelled")
REWRITTEN = ("intent.json", "run.toml", "job.sbatch", "job/node.json")  # by the next submission


@contextmanager
def remaking(run: Run, before: object, spec: PlacedRun, secrets: Mapping[str, str], now_s: float) -> Iterator[int]:
    """The directory of a run that has ended, made ready for its next job, with its submission lock for the block.

    What the last job left, and what it was asked, is put away as an attempt. Raises LauncherError where somebody else
    is submitting the run, or has since its `submission` was `before`.
    """
    try:
        lock_fd = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            lock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run.submission != before:
                raise BlockingIOError
            archive(run.path, OF_A_JOB)
            try:
                for name in REWRITTEN:
                    copy = past_attempts(run.path)[-1] / name
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copy2(run.path / name, copy)
                _fill(run.path, spec, now_s)
                _write_secrets(run.path, spec, secrets)
            except BaseException:
                restore(run)
                raise
        except BaseException:
            os.close(lock_fd)
            raise
    except BlockingIOError as error:
        what = f"{run.name} is being submitted by somebody else"
        raise LauncherError("run-active", what, quoted("launcher", "status", run.reference)) from error
    except OSError as error:
        raise filesystem_error(run.path, error) from error
    yield lock_fd


def restore(run: Run) -> None:
    """Takes back what `remaking` did: the last attempt is in the root again."""
    run.forget_secrets()
    last = past_attempts(run.path)[-1]
    for folder in (last / "logs", last / "job", last):
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if entry.name not in ("logs", "job"):
                os.replace(entry.path, run.path / Path(entry.path).relative_to(last))
    shutil.rmtree(last)


def _write_secrets(directory: Path, spec: PlacedRun, secrets: Mapping[str, str]) -> None:
    # With Apptainer, a variable of the image's wins unless the job's comes with a prefix, too.
    prefixes = ("", "APPTAINERENV_") if spec.job.runtime == "apptainer" else ("",)
    named = [(p + name, value) for name, value in sorted(secrets.items()) for p in prefixes]
    if lines := [f"export {name}={shlex.quote(value)}\n" for name, value in named]:
        write_text(directory / SECRETS, "".join(lines), 0o600)


def remove_left_over(runs_dir: Path) -> None:
    """Removes directories that a killed launcher was making or discarding: our own, with a lock that nobody holds."""
    with suppress(OSError):
        for entry in list(os.scandir(runs_dir)):
            is_dir = LEFT_OVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            about = entry.stat(follow_symlinks=False)
            # One without secrets may be so new that its maker does not hold the lock yet.
            is_old = time.time() - about.st_mtime > 60 or os.path.lexists(f"{entry.path}/{SECRETS}")
            if is_dir and is_old and about.st_uid == os.geteuid():
                with suppress(OSError):
                    os.rmdir(entry.path)  # one that was killed before it made its lock
                with suppress(OSError), open(os.open(f"{entry.path}/{LOCK}", os.O_RDWR | os.O_NOFOLLOW), "rb") as held:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)


def _fill(directory: Path, spec: PlacedRun, now_s: float) -> None:
    job, slurm = directory / "job", data_dir("slurm")
    copied = [(slurm, ("node.py", "check/*.py"), job), (PACKAGE, ("titan/*.py",), job)]
    if spec.begins_anew:
        copied += [(slurm, ("again.py",), job), (PACKAGE, TRAVELS, job / "launcher")]
    for folder, names, to in copied:
        for source in (path for name in names for path in folder.glob(name)):
            target = to / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if spec.job.data.startswith(S3):
        package = job / "titan_s3-1.dist-info"
        package.mkdir(exist_ok=True)
        for name, text in S3_PACKAGE.items():
            write_text(package / name, text)
    known = of_gpu(spec.profile.gpu)
    limits = {"peak_tflops": known.peak_tflops, "max_uptime_days": known.max_uptime_days} if known else {}
    write_json(job / "node.json", {**node_config(spec), "hardware": limits})
    write_text(directory / "run.toml", run_toml(spec))

    write_text(directory / "job.sbatch", render(spec), 0o755)
    # A run directory may be committed: the secrets that it holds until the job ends may not.
    write_text(directory / ".gitignore", f"{SECRETS}\n")
    intent = {"scheduler": spec.job.scheduler, "job_name": spec.job_name, "at": now_s, "host": os.uname().nodename}
    write_json(directory / "intent.json", intent | {"runtime": spec.job.runtime})


def discard(run: Run) -> None:
    """Removes a run directory whose submission was refused: nothing of it ever ran."""
    run.forget_secrets()
    doomed = run.path.with_name(f".{run.name}.{os.urandom(4).hex()}.refused")
    try:
        os.rename(run.path, doomed)
    except OSError:
        doomed = run.path
    shutil.rmtree(doomed, ignore_errors=True)


def record_job(run: Run, job: Mapping[str, Any]) -> None:
    write_json(run.path / "job.json", dict(job))


def all_runs(runs_dir: Path) -> list[Run]:
    """Every run below `runs_dir`, newest first; directories that are no runs are passed over."""
    try:
        entries = [e for e in os.scandir(runs_dir.resolve()) if not e.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(runs_dir, error, "--runs-dir DIR") from error
    folders = [Path(entry.path) for entry in entries if os.path.isdir(entry)]
    for folder in folders:
        if not os.access(folder, os.R_OK | os.X_OK):
            warn(f"{folder}: skipped, because it cannot be read: Permission denied")
    found = [(run, intent["at"]) for run in map(Run, folders) if (intent := run.intent)]
    return [run for run, _ in sorted(found, key=lambda pair: (pair[1], pair[0].name), reverse=True)]


def open_run(reference: str, runs_dir: Path) -> Run:
    """The run that `reference` names: a name below `runs_dir`, a path to a run directory, or "" for the newest."""
    if not reference:
        if runs := all_runs(runs_dir):
            return runs[0]
        fix = "launcher submit --local --recipe debug, or name another folder: --runs-dir DIR"
        raise LauncherError("run-missing", f"there are no runs in {runs_dir}", fix, status=ExitStatus.NOT_FOUND)
    paths = [Path(reference)] if "/" in reference else [runs_dir / reference, Path(reference)]
    for path in paths:
        try:
            path = path.parent if path.name == "run.toml" and path.is_file() else path
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                raise unreadable(path, PermissionError(errno.EACCES, "Permission denied"))
            if Run(path).intent is not None:
                return Run(path.resolve())
        except (OSError, ValueError, RuntimeError):  # too long, not a name at all, a link to itself
            continue

    near = guessed(reference, [run.name for run in all_runs(runs_dir)])
    what = f"there is no run {reference[:80]!r} in {runs_dir}"
    fix = f"did you mean {near[0]}?" if near else quoted("launcher", "list", "--runs-dir", runs_dir)
    raise LauncherError("run-missing", what, fix, status=ExitStatus.NOT_FOUND)


def age_s(run: Run) -> float:
    """Seconds since the run was submitted; 0 where its intent is damaged."""
    return max(0.0, time.time() - intent["at"]) if (intent := run.intent) else 0.0
