"""What follows an attempt of a run: its cause, whether there is another one, and on which nodes.

The root of a run directory holds the last attempt; those before it lie in attempts/1, attempts/2, ... This module
travels with the run: the job script asks it (slurm/restarts.sh.j2) on the job's first node, so it needs nothing but the
standard library and what `TRAVELS` names. `launcher resume` uses it, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.files import read_json, write_json
from launcher.logs.files import JOB_LOG, node_logs
from launcher.logs.known_errors import Ended, explain, known_errors
from launcher.logs.steps import LogReader
from launcher.runs.judged import count, culprit_of, texts, unfit_in
from launcher.scheduler.parse import expand
from launcher.titan import checkpoints

# What of the package is copied beside the job for it.
TRAVELS = (
    *("__init__.py", "base/*.py", "logs/*.py", "logs/*.toml", "scheduler/*.py", "titan/*.py"),
    *("runs/__init__.py", "runs/again.py", "runs/judged.py"),
)
WITHOUT_PROGRESS = 3  # attempts in a row without a new checkpoint, after which the run stops
LOST, HANG = "node-failure", "hang"
UNFIT, QUEUED, TIME = "node-unfit", "requeued", "time-limit"  # causes that are treated in their own way


@dataclass(frozen=True)
class Limits:
    """What was asked for: nodes that train, how often to begin anew after a failure, and after a time limit."""

    nodes: int
    restarts: int
    continues: int
    is_local: bool = False
    nodelist: frozenset[str] = frozenset()  # nodes that the job must have


@dataclass(frozen=True)
class Ending:
    """Why an attempt ended, and whether another one makes sense after it."""

    cause: str  # a code of known_errors.toml, QUEUED, TIME; "" where none is known
    makes_sense: bool = True
    step: int = 0  # the last complete checkpoint's; 0: none
    culprits: tuple[str, ...] = ()  # nodes that are left out from now on
    alive: tuple[str, ...] = ()  # nodes of the allocation that answer
    completed: bool = False  # all was done


@dataclass(frozen=True)
class Next:
    """`word`: "again" in this job on `hosts`, "requeue" without `hosts`, or "stop" because of `why_not`."""

    word: str
    hosts: tuple[str, ...] = ()
    why_not: str = ""


def decide(now: Ending, past: Sequence[Mapping[str, Any]], limits: Limits) -> Next:
    """What follows. `past`: the attempt.json of this job's earlier attempts, oldest first."""
    causes = [str(one.get("cause", "")) for one in past]
    if now.cause == TIME:
        if causes.count(TIME) >= limits.continues:
            return Next("stop", why_not="cause")
    elif not (now.makes_sense or now.culprits):
        return Next("stop", why_not="cause")
    elif sum(cause != TIME for cause in causes) >= limits.restarts:
        return Next("stop", why_not="max-restarts")
    if _without_progress(now, past) >= WITHOUT_PROGRESS:
        return Next("stop", why_not="no-progress")
    bad = {*now.culprits, *(host for one in past for host in texts(one.get("culprits")))}
    if now.cause == TIME:
        return Next("requeue", tuple(sorted(bad)))
    left = tuple(host for host in now.alive if host not in bad)
    if len(left) >= limits.nodes:
        return Next("again", left)
    if limits.is_local or limits.nodelist & bad:
        return Next("stop", why_not="too-few-nodes")
    return Next("requeue", tuple(sorted(bad)))


def _without_progress(now: Ending, past: Sequence[Mapping[str, Any]]) -> int:
    """How many attempts in a row, this one included, trained and left no new checkpoint behind."""
    ends = [*((str(one.get("cause", "")), count(one.get("step"))) for one in past), (now.cause, now.step)]
    before = [0, *(step for _, step in ends[:-1])]
    found = 0
    for (cause, step), start in reversed(list(zip(ends, before, strict=True))):
        if step > start:
            break
        found += cause not in (UNFIT, QUEUED)
    return found


# --- the run directory --------------------------------------------------------------------------------------


def past_attempts(run_dir: Path) -> list[Path]:
    """The directories of the attempts before the one in the root, oldest first."""
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(run_dir / "attempts") if entry.name.isdecimal()]
        return [run_dir / "attempts" / name for name in sorted(names, key=int)]
    return []


def _number(run_dir: Path) -> int:
    """Of the attempt in the root; somebody may have removed earlier ones."""
    return max((int(path.name) for path in past_attempts(run_dir)), default=0) + 1


def archive(run_dir: Path, more: Sequence[str] = ()) -> None:
    """Moves the root's attempt to attempts/N, with the files that are named. A move that was cut off goes on."""
    number = _number(run_dir)
    half = run_dir / "attempts" / f".{number}"
    (half / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("nodes", "attempt.json", "end.json", *more):  # an administrator may queue again what had ended
        if os.path.lexists(run_dir / name):
            os.rename(run_dir / name, half / name)
    for entry in sorted(os.scandir(run_dir / "logs"), key=lambda entry: entry.name):
        if entry.name != JOB_LOG:
            os.rename(entry.path, half / "logs" / entry.name)
    with suppress(FileNotFoundError), open(run_dir / "logs" / JOB_LOG, "r+b") as log:
        with open(half / "logs" / JOB_LOG, "ab") as copy:
            shutil.copyfileobj(log, copy)
        log.truncate(0)  # Slurm holds it open and appends
    os.rename(half, run_dir / "attempts" / str(number))


def _leaves(run_dir: Path) -> bool:
    """Whether the root holds anything of an attempt."""
    return any(os.path.lexists(run_dir / name) for name in ("nodes", "attempt.json")) or bool(_logs(run_dir))


def _logs(run_dir: Path) -> list[Path]:
    try:
        return list(node_logs(run_dir / "logs").values())
    except LauncherError:
        return []


def checkpoint_step(run_dir: Path, node: Mapping[str, Any]) -> int:
    """The last complete checkpoint's step; 0 where there is none."""
    complete, _ = checkpoints.look(checkpoints.folder_of(dict(node)))
    return complete[-1] if complete else 0


# --- the cause ----------------------------------------------------------------------------------------------


def ending_of(run_dir: Path, code: int, lost: Sequence[str], nodes: int) -> Ending:
    """From the logs and records in the root, and the nodes that do not answer any more."""
    unfit = unfit_in(run_dir, nodes)
    culprits = [one.host for one in unfit if one.own]
    trained = any(next(LogReader(path).read(), None) for path in _logs(run_dir))
    if unfit and not trained and not lost:
        return Ending(UNFIT, bool(culprits), culprits=tuple(culprits))
    failure = explain(run_dir / "logs", Ended("FAILED", exit=code), "RUN", run_dir)
    known = next((one for one in known_errors() if one.code == failure.code), None)
    if known and known.node:
        with suppress(ValueError):
            culprits += expand(failure.host)
    if failure.code == HANG and (culprit := culprit_of(run_dir)):
        culprits.append(culprit["host"])
    # A rank that ended without a word was ended from outside: torchrun and srun tell no more than that.
    cause, makes_sense = failure.code, known.again if known else not failure.is_error
    if lost and not (known and known.fault):
        cause, makes_sense = (cause if makes_sense else "") or LOST, True
        culprits += lost
    return Ending(cause, makes_sense, culprits=tuple(dict.fromkeys(culprits)), completed=failure.completed)


# --- what the job script asks -------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`begin`: prints the number of the attempt that begins, and its nodes. `refused`: it could not be queued again.

    `end`: prints what follows the attempt that has ended, as "again HOST...", "requeue HOST,...", "stop", or "done"
    where training had reached its end.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("what", choices=("begin", "end", "refused"))
    for name in ("attempt", "began", "code"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("job", "allocated", "alive", "started", "why"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--time-is-up", action="store_true")
    asked = parser.parse_args(arguments)
    run_dir: Path = asked.run_dir
    if asked.what == "refused":
        said = read_json(run_dir / "attempt.json") or {}
        write_json(run_dir / "attempt.json", said | {"again": False, "why_not": asked.why})
        return 0
    return _begin(run_dir, asked) if asked.what == "begin" else _end(run_dir, asked)


def _end(run_dir: Path, asked: argparse.Namespace) -> int:
    # In Slurm's order: the first is the node where the others meet, and srun sorts what it is given.
    alive = tuple(host for host in asked.allocated.split() if host in asked.alive.split())
    lost, started = tuple(sorted({*asked.allocated.split()} - {*alive})), asked.started.split()
    ending = ending_of(run_dir, asked.code, lost, len(started))
    if ending.completed:  # while the step ended, a node was lost, or failed
        print("done")
        return 0
    if asked.time_is_up:
        ending = Ending(TIME, culprits=lost)
    following = _concluded(run_dir, asked, replace(ending, alive=alive), asked.attempt, started, asked.began)
    if following.word == "again":
        archive(run_dir)
    print(following.word, (" " if following.word == "again" else ",").join(following.hosts))
    return 0


def _past(run_dir: Path, job: str) -> list[dict[str, Any]]:
    """The attempt.json of a job's earlier attempts, oldest first."""
    records = (read_json(path / "attempt.json") or {} for path in past_attempts(run_dir))
    return [record for record in records if record.get("job_id") == job]


def _node(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / "job" / "node.json") or {}


def _limits(node: Mapping[str, Any]) -> Limits:
    """From job/node.json."""
    job, placed = node.get("job", {}), node.get("placed", {})
    nodes, restarts, continues = map(count, (job.get("nodes"), placed.get("restarts"), job.get("continues")))
    nodelist = frozenset(expand(str(job.get("nodelist", ""))))
    return Limits(nodes, restarts, continues, job.get("scheduler") == "local", nodelist)


def _begin(run_dir: Path, asked: argparse.Namespace) -> int:
    """Puts an attempt away that Slurm cut off, or that this job queued itself again after."""
    number = _number(run_dir)
    cut_off_while_put_away = (run_dir / "attempts" / f".{number}").exists()
    if cut_off_while_put_away or _leaves(run_dir):
        said = read_json(run_dir / "attempt.json") or {}
        had_ended = said.get("again") is False and said.get("job_id") == asked.job
        if had_ended:  # and an administrator queued it again
            write_json(run_dir / "attempt.json", said | {"again": True, "requeue": True, "why_not": ""})
        elif not cut_off_while_put_away and said.get("again") is not True:
            hosts = [name for log in _logs(run_dir) if (name := log.stem.partition("-")[2])]
            began = min([asked.began, *(int(path.stat().st_mtime) for path in (run_dir / "nodes").glob("*.json"))])
            if _concluded(run_dir, asked, Ending(QUEUED), number, hosts, began).word == "stop":
                return 1
        archive(run_dir)
    # Slurm may give a node that was left out to the job again; where too few others are left, the check decides.
    bad = {host for record in _past(run_dir, asked.job) for host in texts(record.get("culprits"))}
    hosts = asked.allocated.split()
    left = [host for host in hosts if host not in bad]
    print(_number(run_dir), *(left if len(left) >= _limits(_node(run_dir)).nodes else hosts))
    return 0


def _concluded(
    run_dir: Path, asked: argparse.Namespace, ending: Ending, number: int, hosts: Sequence[str], began: int
) -> Next:
    """Decides what follows, and writes it down; says it for job.log, as stdout is the job script's."""
    node = _node(run_dir)
    ending = replace(ending, step=checkpoint_step(run_dir, node))
    following = decide(ending, _past(run_dir, asked.job), _limits(node))
    if ending.cause == QUEUED and following.word == "requeue":  # that no node is known to be alive is no reason
        following = Next("again")
    goes_on = following.word != "stop"
    record = {
        "schema": 1,
        "attempt": number,
        "job_id": asked.job,
        "hosts": list(hosts),
        "began_at": began,
        "ended_at": int(time.time()),
        "exit_code": asked.code,
        "cause": ending.cause,
        "culprits": list(ending.culprits),
        "step": ending.step,
        "again": goes_on,
        "requeue": following.word == "requeue" or ending.cause == QUEUED,
        "why_not": following.why_not,
    }
    write_json(run_dir / "attempt.json", record)
    without = f" without {', '.join(ending.culprits)}" if ending.culprits else ""
    where = f"from step {ending.step}" if ending.step else "from the beginning"
    then = f"again {where}{without}" if goes_on else f"no further attempt ({following.why_not})"
    print(f"launcher: attempt {number} ended: {ending.cause or 'for no known reason'}; {then}", file=sys.stderr)
    return following
