"""In which phase a run is, and since when: from its directory alone, which the job script and the nodes write.

claim/job_id           the script has begun
nodes/NNNN-host.doing  the node's container runs, and what its check is at; gone when its record is there
nodes/NNNN-host.json   the node's own record: its check is over
logs/NNNN-host.log     training, as soon as one holds a step
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launcher.base.files import read_json
from launcher.logs.follow import Follower, Progress
from launcher.runs.directory import Run
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


class Watcher:
    """Looks at one run again and again, and remembers when it was first seen in a phase."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._follower = Follower(run.logs, run.steps)
        self._began: dict[Phase, float] = {}
        self._offsets: dict[str, float] = {}
        self._progress: Progress | None = None
        nodes = run.asked["job"].get("nodes")
        self._nodes = nodes if type(nodes) is int and nodes > 0 else 0

    def look(self, state: JobState | None) -> list[Standing]:
        """One standing for each step that was logged since the last look, or one for none."""
        began = self._script_began()
        self._began[Phase.QUEUED] = (self.run.intent or {}).get("at") or self._began.get(Phase.QUEUED) or self._now()
        if began is None and (state is None or state.name in (*WAITING, "SUBMITTING")):
            return [Standing(Phase.QUEUED, dict(self._began), state, self._now(), self._nodes)]
        self._began[Phase.STARTING] = began or self._now()
        seen = []
        for progress in self._follower.read():
            self._progress = progress
            seen.append(self._training(state))
        if seen:
            return seen
        return [self._training(state) if self._progress else self._before_training(state)]

    def _now(self) -> float:
        ended = _moment(self.run.end or {}, "ended_at")
        return time.time() if ended is None else ended

    def _script_began(self) -> float | None:
        if began := _moment(self.run.end or {}, "began_at"):
            return began
        with suppress(OSError):
            return (self.run.path / "claim" / "job_id").stat().st_mtime
        return self._began.get(Phase.STARTING)

    def _training(self, state: JobState | None) -> Standing:
        assert self._progress is not None
        is_done = self._progress.step >= self._progress.steps_total
        if Phase.TRAINING not in self._began:
            self._before_training(state)  # when the phases before it began, of a run that is watched from here on
            self._since(Phase.TRAINING, self._first_step())
        if is_done:
            self._since(Phase.ENDING, None)
        phase = Phase.ENDING if is_done else Phase.TRAINING
        count = self._nodes
        return Standing(phase, dict(self._began), state, self._now(), count, count, count, progress=self._progress)

    def _before_training(self, state: JobState | None) -> Standing:
        records = {str(record.get("host")): record for record in self.run.node_records}
        at_it = [mark for path in (self.run.path / "nodes").glob("*.doing") if (mark := read_json(path))]
        offsets = {host: _moment(record, "utc_offset_s") for host, record in records.items()}
        self._offsets = {host: offset for host, offset in offsets.items() if offset is not None}
        started = [moment for one in (*records.values(), *at_it) if (moment := _moment(one, "time"))]
        fit = [record for record in records.values() if record.get("ok") is True]
        phase = Phase.STARTING
        if self._nodes and len(started) >= self._nodes:
            phase = Phase.CHECKING
            self._since(phase, max(started))
        if self._nodes and len(fit) >= self._nodes:
            phase = Phase.LOADING
            ends = [(_moment(record, "time") or 0.0) + (_moment(record, "check_s") or 0.0) for record in fit]
            self._since(phase, max(ends))
        doing = Counter(str(mark.get("doing")) for mark in at_it)
        return Standing(phase, dict(self._began), state, self._now(), self._nodes, len(started), len(fit), doing)

    def _first_step(self) -> float | None:
        """By the node's own clock, whose zone its record says: logs carry none."""
        host, moment = self._follower.first or ("", 0.0)
        offset = self._offsets.get(host)
        return None if offset is None else moment - offset

    def _since(self, phase: Phase, moment: float | None) -> None:
        if phase not in self._began:
            last = max(self._began.values(), default=0.0)
            self._began[phase] = max(last, moment) if moment and moment <= self._now() else self._now()


def _moment(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e11:
        return float(value)
    return None
