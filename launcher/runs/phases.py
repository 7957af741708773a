"""In which phase a run is, and since when: from its directory alone, which the job script and the nodes write.

claim/job_id           the script has begun
nodes/NNNN-host.doing  the node's container runs, and what its check is at; gone when its record is there
nodes/NNNN-host.json   the node's own record: its check is over
logs/NNNN-host.log     training, as soon as one holds a step
attempts/N             an earlier attempt is over, and all of these begin anew
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from launcher.base.files import read_json
from launcher.logs.follow import Follower, Progress
from launcher.runs.again import past_attempts
from launcher.runs.attempts import Attempt, attempts_of
from launcher.runs.directory import Run
from launcher.runs.judged import number
from launcher.scheduler.state import WAITING, JobState


class Phase(StrEnum):
    """In the order in which a run goes through them."""

    QUEUED = "queued"
    STARTING = "starting"
    CHECKING = "checking"
    LOADING = "loading"
    TRAINING = "training"
    ENDING = "ending"


@dataclass(frozen=True)
class Standing:
    """How a run stands at one moment."""

    phase: Phase
    began: Mapping[Phase, float]  # when each phase began, as far as that is known, by this machine's clock
    state: JobState | None  # None while Slurm does not answer
    at: float  # the moment
    nodes: int
    started: int = 0  # nodes whose container runs
    fit: int = 0  # nodes that have passed their check
    doing: Mapping[str, int] = field(default_factory=dict)  # what is checked just now, and on how many nodes
    progress: Progress | None = None
    before: Attempt | None = None  # the attempt that it trains on from
    hang: str = ""  # why nothing moves, once the nodes have found that

    @property
    def attempt(self) -> int:
        return self.before.number + 1 if self.before else 1


class Watcher:
    """Looks at one run again and again, and remembers when it was first seen in a phase."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._earlier: list[Path] = []
        self._last: Attempt | None = None
        self._renew()

    def _renew(self) -> None:
        """An attempt begins with empty logs/ and nodes/."""
        self._follower = Follower(self._run.logs, self._run.steps, chosen=lambda: self._run.chosen)
        self._began: dict[Phase, float] = {}
        self._now = Standing(Phase.STARTING, {}, None, 0.0, self._run.nodes, before=self._last)

    def look(self, state: JobState | None) -> list[Standing]:
        """One standing for each step that was logged since the last look, or one for none."""
        if (paths := past_attempts(self._run.path)) != self._earlier:
            self._earlier, self._last = paths, next(iter(attempts_of(self._run)[-2::-1]), None)
            self._renew()
        end = self._run.end or {}
        at = number(end.get("ended_at")) or time.time()
        times = number((self._run.intent or {}).get("at")), self._last.ended_at if self._last else None
        since = max(filter(None, times), default=None)  # a run that was resumed has waited since then only
        self._begin(Phase.QUEUED, since, at)
        began = number(end.get("began_at"))
        with suppress(OSError):
            began = began or (self._run.path / "claim" / "job_id").stat().st_mtime
        if self._last and since and began and began < since:  # of an earlier attempt's job
            began = None if state and state.name in WAITING else since
        now = replace(self._now, state=state, at=at, hang="")
        if began is None and (state is None or state.name in (*WAITING, "SUBMITTING")):
            return [replace(now, phase=Phase.QUEUED, began=dict(self._began))]
        self._begin(Phase.STARTING, began, at)
        if Phase.TRAINING not in self._began:  # from then on the records stay as they are
            now = self._checked(now)
        steps: list[Progress | None] = [*self._follower.read()]
        *seen, self._now = [self._at_step(now, one) for one in steps or [now.progress]]
        return [*seen, replace(self._now, hang=str(self._run.hang.get("why", "")))]

    def _at_step(self, now: Standing, progress: Progress | None) -> Standing:
        phase = now.phase
        if progress:
            phase = Phase.TRAINING
            self._begin(phase, self._moment(self._follower.first), now.at)
            if progress.step >= progress.steps_total:
                phase = Phase.ENDING
                self._begin(phase, self._moment(self._follower.last), now.at)
        return replace(now, phase=phase, began=dict(self._began), progress=progress)

    def _checked(self, now: Standing) -> Standing:
        """How far the nodes' check is."""
        records = self._run.node_records
        marks = [mark for path in (self._run.path / "nodes").glob("*.doing") if (mark := read_json(path))]
        started = [moment for one in (*records, *marks) if (moment := number(one.get("time")))]
        fit = [record for record in records if record.get("ok") is True and not record.get("spare")]
        phase = Phase.STARTING
        if now.nodes and len(started) >= now.nodes:
            phase = Phase.CHECKING
            self._begin(phase, max(started), now.at)
        if now.nodes and len(fit) >= now.nodes:
            phase = Phase.LOADING
            ends = [(number(record.get("time")) or 0.0) + (number(record.get("check_s")) or 0.0) for record in fit]
            self._begin(phase, max(ends), now.at)
        doing = Counter(str(mark.get("doing")) for mark in marks)
        return replace(now, phase=phase, started=len(started), fit=len(fit), doing=doing)

    def _moment(self, logged: tuple[str, float] | None) -> float | None:
        """When a node logged a step. By its own clock, whose zone its record says: logs carry none."""
        host, moment = logged or ("", 0.0)
        offsets = [number(r.get("utc_offset_s")) for r in self._run.node_records if r.get("host") == host]
        return moment - offsets[0] if offsets and offsets[0] is not None else None

    def _begin(self, phase: Phase, moment: float | None, at: float) -> None:
        """Where no moment is known, or one that cannot be, it is the first at which it was seen."""
        if phase not in self._began:
            last = max(self._began.values(), default=0.0)
            self._began[phase] = max(last, moment) if moment and moment <= at else at
