"""The attempts of a run: what each trained on, for how long, why it ended. The root of a run directory is the last one.

attempts/N/   an earlier one, with its own logs/, nodes/, attempt.json, and end.json where its job ended with it
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.files import read_json
from launcher.base.output import some
from launcher.logs.known_errors import known_errors
from launcher.runs.again import QUEUED, past_attempts
from launcher.runs.directory import Run
from launcher.runs.judged import number, text_of, texts

WHY_NOT = {  # no further attempt follows
    "cause": "the next one would end in the same way",
    "no-progress": "three in a row wrote no new checkpoint",
    "max-restarts": "--max-restarts is reached",
    "too-few-nodes": "too few healthy nodes are left",
    "too-few-in-blocks": "too few healthy nodes are left in the blocks that --segment needs",
    "requeue-refused": "Slurm did not queue the job again",
}


@dataclass(frozen=True)
class Attempt:
    """One start of the trainer; None and empty where something is not known."""

    number: int
    path: str  # has logs/ and nodes/
    hosts: tuple[str, ...] = ()  # that trained, as far as it is known
    began_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    cause: str = ""  # a code of known_errors.toml, or QUEUED
    culprits: tuple[str, ...] = ()  # hosts that are left out because of it
    step: int | None = None  # the last complete checkpoint at its end
    again: bool | None = None  # whether another one follows
    why_not: str = ""
    queued: bool = False  # whether what follows it had to wait in the queue
    # What its logs say, where they were read (launcher/results/read.py):
    first_step: int | None = None  # logged
    last_step: int | None = None
    kept_step: int | None = None  # the last one that counts: the next attempt trained on from it
    tps: float | None = None  # the median of its steps that count, after warm-up

    @property
    def logs(self) -> Path:
        return Path(self.path, "logs")


def attempts_of(run: Run) -> list[Attempt]:
    """All attempts, oldest first; the last is the root's, and has no end while the run goes on."""
    found: list[Attempt] = []
    for path in past_attempts(run.path):
        found.append(_attempt(int(path.name), path, found, None))
    claimed = None
    if run.end is None and not run.is_copy:  # copying changes the times of files
        with suppress(OSError):
            claimed = (run.path / "claim" / "job_id").stat().st_mtime
    return [*found, _attempt(found[-1].number + 1 if found else 1, run.path, found, claimed)]


def _attempt(number: int, path: Path, before: Sequence[Attempt], claimed: float | None) -> Attempt:
    """`claimed`: when its job began, where only a file's time tells it."""
    said, end = read_json(path / "attempt.json") or {}, read_json(path / "end.json") or {}
    last = before[-1].ended_at if before else None
    starts = [at for at in (moment(end.get("began_at")), claimed) if at]
    code, step = (said if "exit_code" in said else end).get("exit_code"), said.get("step")
    return Attempt(
        number,
        str(path),
        Run(path).chosen or texts(said.get("hosts")),
        moment(said.get("began_at")) or max([*starts, *([last] if last else [])], default=None),
        moment(said.get("ended_at")) or moment(end.get("ended_at")),
        code if type(code) is int else None,
        cause := text_of(said.get("cause")),
        texts(said.get("culprits")),
        step if type(step) is int and 0 <= step <= 10**9 else None,
        again if isinstance(again := said.get("again"), bool) else None,
        text_of(said.get("why_not")),
        said.get("requeue") is True or cause in (QUEUED, "time-limit") or bool(end),
    )


def ended_by(attempt: Attempt) -> str:
    """Why an attempt ended, in a few words: `node n2 lost`."""
    nodes = f"node{'s' if len(attempt.culprits) > 1 else ''} {some(attempt.culprits)}" if attempt.culprits else "a node"
    if attempt.cause == "node-failure":
        return f"{nodes} lost"
    if attempt.cause == QUEUED:
        return "queued again by Slurm or an administrator"
    cause = next((known.cause for known in known_errors() if known.code == attempt.cause), attempt.cause)
    for name, word in (("node {host}", nodes), ("{node}", nodes), ("{who}", "a rank")):
        cause = cause.replace(name, word)
    cause = cause.partition(": {")[0]  # what only the log's own line tells
    return attempt.cause if "{" in cause else cause


def moment(value: Any) -> float | None:
    """Seconds since 1970 that can be a time of this launcher's: from 2017 to 2103."""
    return found if (found := number(value)) and 1.5e9 < found < 4.2e9 else None
