"""Attaching to a run: waiting for its start, following it to its end, reading its logs. Nothing here changes it."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import json_values
from launcher.logs.follow import Follower, Progress, logs_of, merged_lines
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.runs.phases import Standing, Watcher
from launcher.scheduler import slurm
from launcher.scheduler.state import JobState

T = TypeVar("T")

ASK_EVERY_S = 5.0  # of the scheduler; the run directory is looked at more often
LOOK_EVERY_S = 1.0
SILENCE_S = 600.0  # a controller that restarts is back by then


def standings(run: Run) -> Iterator[Standing]:
    """How the run stands, every second and at every logged step, until it has ended and its logs are read."""
    watcher, ask = Watcher(run), _asking(run)
    while True:
        yield from watcher.look(state := ask())
        if state is not None and not state.active:
            return
        time.sleep(LOOK_EVERY_S)


def progress_of(run: Run) -> Iterator[Progress]:
    """A snapshot for every newly logged step, until the run has ended."""
    last = None
    for standing in standings(run):
        if standing.progress is not None and standing.progress is not last:
            yield (last := standing.progress)


def progress_now(run: Run) -> Progress | None:
    """How far the run is, by what its logs hold now; None before its first step."""
    newest = deque(Follower(run.logs, run.steps, chosen=lambda: run.chosen).read(), maxlen=1)
    return newest[0] if newest else None


def log_lines(
    run: Run, until_end: bool, node: str = "", rank: int | None = None, log_dir: Path | None = None
) -> Iterator[tuple[str, str]]:
    """(node, line) of the run's logs, or of those of one node or rank; with `until_end` goes on reading until the run
    has ended. `log_dir`: of an earlier attempt.
    """
    logs, ask = partial(logs_of, log_dir or run.logs, node, rank, run.ranks_per_node), _asking(run)

    def has_ended() -> bool:
        return (state := ask()) is not None and not state.active

    return merged_lines(logs, follow=until_end, is_finished=has_ended, sleep=time.sleep)


def as_dict(progress: Progress) -> dict[str, Any]:
    """A snapshot as JSON values; NaN and infinity become null."""
    return json_values(dataclasses.asdict(progress))


def patient(ask: Callable[[], T]) -> Callable[[], T | None]:
    """What `ask` answers, or None while Slurm does not: a restart is no reason to stop watching.

    The error is raised after SILENCE_S without an answer, and at once where waiting cannot help.
    """
    silent_since: float | None = None

    def answer() -> T | None:
        nonlocal silent_since
        try:
            found = ask()
        except LauncherError as error:
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            may_return = error.status is ExitStatus.CLUSTER and not isinstance(error, slurm.Missing)
            if not may_return or now - silent_since > SILENCE_S:
                raise
            return None
        silent_since = None
        return found

    return answer


def _asking(run: Run) -> Callable[[], JobState | None]:
    """The run's state: asked every ASK_EVERY_S, and as soon as its script has ended; in between the last answer."""
    ask = patient(lambda: control.state(run))
    asked_at, state = -ASK_EVERY_S, None

    def answer() -> JobState | None:
        nonlocal asked_at, state
        if run.end is not None or time.monotonic() - asked_at >= ASK_EVERY_S:
            asked_at, state = time.monotonic(), ask()
        return state

    return answer
