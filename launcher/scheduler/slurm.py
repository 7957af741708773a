"""The one module that talks to Slurm: sbatch, squeue, sacct, scancel, scontrol. Bounded, in plain text formats.

The formats used are the same from Slurm 22.05 to 25.11 and need no JSON support and no accounting database.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import whole
from launcher.scheduler.facts import NO_SLURM
from launcher.scheduler.parse import config, rows
from launcher.scheduler.state import JobState, from_slurm

ANSWER_S = 30  # bound on commands that only ask
SUBMIT_S = 90  # bound on sbatch: above Slurm's own MessageTimeout of 10 s and its retries
# Which of Slurm's own variables its commands get: what says which cluster it is and who asks. All others overrule the
# script, or filter and shape what is printed.
PASSED = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
OWN = re.compile(r"(SLURM|SBATCH|SRUN|SQUEUE|SINFO|SACCT|SCANCEL|SCONTROL)_")
UNSURE = ("timed out", "unable to contact", "zero bytes", "connection refused", "try again")
# What sbatch says -> what to type. For people alone: no decision hangs on it.
HINTS = (
    ("account", "--account NAME; sacctmgr show assoc user=$USER"),
    ("qos", "--qos NAME; sacctmgr show qos; squeue --me"),
    ("reservation", "--reservation NAME; scontrol show reservation"),
    ("node list|nodes? not in|node ?name|host ?name", "sinfo -N -o '%N %P'"),
    ("topology", "a smaller --segment, which divides --nodes"),
    ("generic resource|gres", "sinfo -o '%N %G'; set [profile] gres in a file for --config"),
    ("configuration is not available|node count|number of nodes|processors", "sinfo -o '%P %D %c %m %G %t'"),
    ("feature", "--constraint FEATURES; sinfo -o '%N %f'"),
    ("unrecognized option|unknown option", "leave it out of --sbatch; sbatch --help"),
    ("time", "--time; sinfo -o '%P %l'"),
    ("partition|permi|access|user", "another --partition; sinfo -s"),
    ("", "launcher preflight with the same options; launcher submit --dry-run prints the script"),
)


def submit(script: Path, lock_fd: int, after: str = "") -> str:
    """Submits `script` from its own directory and returns the job id. `after`: the job whose end it waits for.

    `lock_fd` is inherited by sbatch, so that its lock lasts as long as sbatch may still reach Slurm, even when
    this program is killed. Raises Unsure when it cannot be told whether Slurm took the job, LauncherError when
    Slurm refused it.
    """
    wait = [f"--dependency=afterany:{after}"] if after else []
    how = {"cwd": script.parent, "start_new_session": True, "pass_fds": (lock_fd,)}
    try:
        done = _run(("sbatch", "--parsable", *wait, str(script)), SUBMIT_S, **how)
    except subprocess.TimeoutExpired as error:
        raise Unsure(f"sbatch did not answer within {SUBMIT_S} s", "") from error
    out, err, code = done.stdout, done.stderr, done.returncode
    job_ids = re.findall(r"^\s*(\d+)(?:;\S*)?\s*$", out, re.MULTILINE)  # a site's sbatch may print more
    if code == 0 and len(job_ids) == 1:
        return str(job_ids[0])
    if code < 0:
        raise Unsure(f"sbatch was killed (signal {-code})", out + err)
    if code == 0:
        raise Unsure(f"sbatch answered with {len(job_ids) or 'no'} job ids", out + err)
    if any(words in err.lower() for words in UNSURE) or job_ids:
        raise Unsure(f"sbatch failed (exit code {code})", out + err)
    fix = next(fix for words, fix in HINTS if re.search(words, err or out, re.IGNORECASE))
    what = f"sbatch refused the job (exit code {code})"
    raise Refused("sbatch-refused", what, fix, status=ExitStatus.CLUSTER, original=err or out)


class Unsure(Exception):
    """sbatch ended in a way that leaves open whether Slurm has the job."""

    def __init__(self, what: str, original: str) -> None:
        super().__init__(what)
        self.what = what
        self.original = original


class Refused(LauncherError):
    """sbatch said no; its words alone do not tell that Slurm has no job: the queue is asked, too."""


class Missing(LauncherError):
    """There is no such Slurm command here."""


def missing(command: str) -> Missing:
    what = f"{command} is not installed here, or not in PATH"
    return Missing("slurm-missing", what, NO_SLURM, status=ExitStatus.CLUSTER)


Listed = Mapping[str, tuple[str, JobState]]  # job id -> (job name, state)
FORMAT = "--format=%i|%T|%j|%r"  # the reason is the last: it may hold any character


def queue() -> Listed:
    """All of the user's jobs that Slurm still remembers.

    Raises LauncherError when squeue is missing, hangs, fails or answers nonsense.
    """
    return _listed(ask(("squeue", "--noheader", f"--user={os.getuid()}", "--states=all", FORMAT)))


def job(job_id: str) -> Listed:
    """One job, anybody's; empty when Slurm does not remember it."""
    try:
        return _listed(ask(("squeue", "--noheader", "--states=all", f"--jobs={job_id}", FORMAT)))
    except LauncherError as error:
        if "invalid job id" in error.original.lower():
            return {}
        raise


def _listed(out: str) -> Listed:
    try:
        jobs = {number: (name, from_slurm(word, "squeue", why)) for number, word, name, why in rows(out, 4)}
        if out.strip() and not jobs and "|" not in out:
            raise ValueError(out)
        return jobs
    except ValueError as error:
        raise _failed("slurm-failed", "squeue's answer cannot be read", "squeue --me", str(error)[:500]) from error


def accounting(job_ids: Iterable[str]) -> Listed:
    """What the accounting database says of `job_ids`; empty where there is none, which is usual."""
    columns = "JobIDRaw,State,ExitCode,JobName"
    try:
        jobs = rows(ask(("sacct", "-n", "-X", "-P", "-j", ",".join(job_ids), "-o", columns)), 4)
    except (LauncherError, ValueError):
        return {}
    return {
        number: (name, from_slurm(word, "sacct", "", whole(code.split(":")[0]))) for number, word, code, name in jobs
    }


def cancel(job_id: str) -> None:
    """scancel; a job that is already gone is no error."""
    try:
        ask(("scancel", job_id))
    except LauncherError as error:
        if "Invalid job id" not in error.original:
            raise


def cluster_name() -> str:
    """Slurm's ClusterName. Raises LauncherError where it cannot be told."""
    said, name = ask(("scontrol", "show", "config")), ""
    with suppress(ValueError):  # nothing of it can be read
        name = config(said).get("ClusterName", "")
    if not name:
        what = "scontrol does not say the cluster's name"
        raise _failed("cluster-nameless", what, "scontrol show config", said[:500])
    return name


def plugstack(path: str) -> str:
    """plugstack.conf with the files that it includes (one level, as is usual); "" where this user cannot read it."""
    text = _text(path)
    patterns = re.findall(r"^\s*include\s+(\S+)\s*$", text, re.MULTILINE | re.IGNORECASE)
    names = [name for p in patterns for name in sorted(glob(os.path.join(os.path.dirname(path), p)))]
    return "\n".join([text, *map(_text, names)]).strip()


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def bin_dir() -> str:
    """The folder of sbatch, or "" where Slurm is not installed."""
    found = shutil.which("sbatch")
    return os.path.dirname(os.path.abspath(found)) if found else ""


def _environment() -> dict[str, str]:
    """That of every Slurm command: who submits and who asks sees the same cluster, and all of it."""
    env = {name: value for name, value in os.environ.items() if name in PASSED or not OWN.match(name)}
    if clusters := os.environ.get("SBATCH_CLUSTERS"):  # sbatch's name for it
        env["SLURM_CLUSTERS"] = clusters
    return env | {"LC_ALL": "C"}


def _failed(code: str, what: str, fix: str = "", original: str = "") -> LauncherError:
    return LauncherError(code, what, fix, status=ExitStatus.CLUSTER, original=original)


def _run(words: Sequence[str], limit_s: float, **how: Any) -> subprocess.CompletedProcess[str]:
    """Raises LauncherError where there is no such command or it cannot be started, and TimeoutExpired."""
    command, *arguments = words
    path = shutil.which(command)
    if path is None:
        raise missing(command)
    try:
        return subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=_environment(),
            **how,
        )
    except OSError as error:
        raise _failed("slurm-failed", f"cannot run {path}: {error.strerror}") from error


def ask(words: Sequence[str]) -> str:
    """Runs a Slurm command that changes nothing or can be repeated, and returns its standard output.

    Raises LauncherError when it is missing, hangs or fails.
    """
    try:
        done = _run(words, ANSWER_S)
    except subprocess.TimeoutExpired as error:
        raise _failed("slurm-silent", f"{words[0]} did not answer within {ANSWER_S} s", "scontrol ping") from error
    if done.returncode != 0:
        what = f"{words[0]} failed (exit code {done.returncode})"
        raise _failed("slurm-failed", what, "scontrol ping", done.stderr or done.stdout)
    return done.stdout
