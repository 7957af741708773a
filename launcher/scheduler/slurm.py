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

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import whole
from launcher.scheduler.parse import config, rows
from launcher.scheduler.state import JobState, from_slurm

ANSWER_S = 30  # bound on commands that only ask
SUBMIT_S = 90  # bound on sbatch: above Slurm's own MessageTimeout of 10 s and its retries
# Which of Slurm's own variables its commands get: what says which cluster it is and who asks. All others overrule the
# script, or filter and shape what is printed.
PASSED = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
OWN = re.compile(r"(SLURM|SBATCH|SRUN|SQUEUE|SINFO|SACCT|SCANCEL|SCONTROL)_")
UNSURE = ("timed out", "unable to contact", "zero bytes", "connection refused", "try again")

NO_PARTITION = "Slurm has no such partition"
# What sbatch says, what it means, what to type. The first that matches is shown above the original words.
SBATCH_ERRORS = (
    (r"invalid partition", NO_PARTITION, "list them: sinfo -s"),
    (r"required partition not available", "the partition takes no jobs now", "another --partition: sinfo -s"),
    (r"invalid account", "the account may not use this partition", "--account NAME; sacctmgr show assoc user=$USER"),
    (r"invalid qos", "there is no such QOS, or this account may not use it", "--qos NAME; sacctmgr show qos"),
    (r"access denied to requested reservation", "you may not use that reservation", "scontrol show reservation"),
    (
        r"reservation.*(invalid|not found)|invalid reservation",
        "no such reservation of yours",
        "scontrol show reservation",
    ),
    (r"invalid number of nodes|valid node count", "that number of nodes is none", "--nodes N; compare with: sinfo -s"),
    (r"requested nodes? not in this partition", "a node of --nodelist is not in the partition", "sinfo -N -o '%N %P'"),
    (r"invalid (node|host) ?name", "a node of --nodelist or --exclude does not exist", "list them: sinfo -N -h -o %N"),
    (
        r"topology configuration",
        "no block of the topology has that many free nodes",
        "a smaller --segment, which divides --nodes",
    ),
    (
        r"requested node configuration is not available|node count specification invalid|more processors requested",
        "no node set of this partition fits: more nodes, GPUs per node or CPUs than it has",
        "compare with: sinfo -o '%P %D %c %m %G %t'",
    ),
    (
        r"invalid generic resource|invalid gres",
        "the nodes have no GPUs under that name",
        "sinfo -o '%N %G'; set [profile] gres in a file for --config",
    ),
    (
        r"job violates accounting/qos policy|assocmax|qosmax",
        "a limit of your account or QOS is reached",
        "squeue --me; sacctmgr show assoc user=$USER",
    ),
    (r"invalid feature", "no node has those features", "--constraint FEATURES; list them: sinfo -o '%N %f'"),
    (r"unrecognized option|unknown option", "it has no such option", "leave it out of --sbatch; sbatch --help"),
    (r"time limit|invalid time", "the time limit is above the partition's", "--time; sinfo -o '%P %l'"),
    (r"permission denied|not permitted|invalid user", "you may not submit there", "another --partition or --account"),
)


def submit(script: Path, lock_fd: int, after: str = "") -> str:
    """Submits `script` from its own directory and returns the job id. `after`: the job whose end it waits for.

    `lock_fd` is inherited by sbatch, so that its lock lasts as long as sbatch may still reach Slurm, even when
    this program is killed. Raises Unsure when it cannot be told whether Slurm took the job, LauncherError when
    Slurm refused it.
    """
    wait = [f"--dependency=afterany:{after}"] if after else []
    command = [_find("sbatch"), "--parsable", *wait, str(script)]
    try:
        process = subprocess.Popen(
            command,
            cwd=script.parent,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=(lock_fd,),
        )
    except OSError as error:
        raise LauncherError(
            "slurm-failed", f"cannot run {command[0]}: {error.strerror}", status=ExitStatus.CLUSTER
        ) from error
    try:
        out, err = process.communicate(timeout=SUBMIT_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise Unsure(f"sbatch did not answer within {SUBMIT_S} s", "") from error
    job_ids = re.findall(r"^\s*(\d+)(?:;\S*)?\s*$", out, re.MULTILINE)  # a site's sbatch may print more
    if process.returncode == 0 and len(job_ids) == 1:
        return str(job_ids[0])
    if process.returncode <= 0:
        how = f"answered with {len(job_ids) or 'no'} job ids"
        if process.returncode < 0:
            how = f"was killed (signal {-process.returncode})"
        raise Unsure(f"sbatch {how}", out + err)
    if any(words in err.lower() for words in UNSURE) or job_ids:
        raise Unsure(f"sbatch failed (exit code {process.returncode})", out + err)
    raise Refused(err or out, process.returncode)


class Unsure(Exception):
    """sbatch ended in a way that leaves open whether Slurm has the job."""

    def __init__(self, what: str, original: str) -> None:
        super().__init__(what)
        self.what = what
        self.original = original


class Missing(LauncherError):
    """There is no such Slurm command here."""


class Refused(LauncherError):
    """sbatch said no; its words alone do not tell that Slurm has no job: the queue is asked, too."""

    def __init__(self, text: str, exit_code: int) -> None:
        known = [(what, fix) for pattern, what, fix in SBATCH_ERRORS if re.search(pattern, text, re.IGNORECASE)]
        unknown = (f"exit code {exit_code}", "look at the script: launcher submit --dry-run ...")
        what, fix = known[0] if known else unknown
        code = "partition-unknown" if what == NO_PARTITION else "sbatch-refused"
        status = ExitStatus.NOT_FOUND if what == NO_PARTITION else ExitStatus.CLUSTER
        super().__init__(code, f"sbatch refused the job: {what}", fix, status=status, original=text)


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
        what, said = "squeue answered nonsense", str(error)[:500]
        raise LauncherError("slurm-failed", what, "squeue --me", status=ExitStatus.CLUSTER, original=said) from error


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
    question = ("scontrol", "show", "config")
    said = ask(question)
    with suppress(ValueError):  # nothing of it can be read
        if name := config(said).get("ClusterName", ""):
            return name
    raise LauncherError(
        "cluster-nameless",
        "scontrol does not say the cluster's name",
        " ".join(question),
        status=ExitStatus.CLUSTER,
        original=said[:500],
    )


def plugstack(path: str) -> str:
    """plugstack.conf with the files that it includes (one level, as is usual); "" where this user cannot read it."""
    text = _text(path)
    lines = [line.split() for line in text.splitlines()]
    patterns = [words[1] for words in lines if len(words) == 2 and words[0].lower() == "include"]
    names = [name for p in patterns for name in sorted(glob(os.path.join(os.path.dirname(path), p)))]
    return "\n".join([text, *map(_text, names)]).strip()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
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


def _find(command: str) -> str:
    path = shutil.which(command)
    if path is None:
        raise Missing(
            "slurm-missing",
            f"{command} is not installed here, or not in PATH",
            "go to the cluster's login node; without Slurm: launcher submit --local",
            status=ExitStatus.CLUSTER,
        )
    return path


def ask(words: Sequence[str]) -> str:
    """Runs a Slurm command that changes nothing or can be repeated, and returns its standard output.

    Raises LauncherError when it is missing, hangs or fails.
    """
    command, *arguments = words
    path = _find(command)
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            env=_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise LauncherError(
            "slurm-silent", f"{command} did not answer within {ANSWER_S} s", "scontrol ping", status=ExitStatus.CLUSTER
        ) from error
    except OSError as error:
        raise LauncherError(
            "slurm-failed", f"cannot run {path}: {error.strerror}", status=ExitStatus.CLUSTER
        ) from error
    if done.returncode != 0:
        raise LauncherError(
            "slurm-failed",
            f"{command} failed (exit code {done.returncode})",
            "scontrol ping",
            status=ExitStatus.CLUSTER,
            original=done.stderr or done.stdout,
        )
    return done.stdout
