"""Attaching to a run: waiting for its start, following it to its end, reading its logs. Nothing here changes it."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.values import json_values
from launcher.logs.follow import Progress, follow, merged_lines
from launcher.logs.watch import watch
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler import slurm
from launcher.scheduler.state import WAITING, JobState

T = TypeVar("T")

ASK_EVERY_S = 5.0  # of the scheduler; the run directory is looked at more often
SILENCE_S = 600.0  # a controller that restarts is back by then


def wait_for_start(run: Run, say: Callable[[JobState | None], None] | None) -> None:
    """Returns when the run is no longer waiting; tells `say` each new reason for which it does, None where Slurm does
    not answer.
    """
    said: object = ()
    ask = patient(lambda: control.state(run))
    while (state := ask()) is None or state.name in (*WAITING, "SUBMITTING"):
        reason = (state.name, state.reason) if state else None
        if say and reason != said:
            say(state)
            said = reason
        time.sleep(ASK_EVERY_S)


def waiting_text(run: Run, state: JobState | None) -> str:
    return f"{run.name}: " + (
        f"{state.name} {state.reason}".strip() if state else "Slurm does not answer; trying again"
    )


def progress_of(run: Run) -> Iterator[Progress]:
    """A snapshot for every newly logged step, until the run has ended."""
    return follow(run.logs, steps_total=run.steps, is_finished=_finished(run), sleep=time.sleep, clock=time.time)


def progress_now(run: Run) -> Progress | None:
    """How far the run is, by what its logs hold now; None before its first step."""
    seen = follow(run.logs, steps_total=run.steps, is_finished=lambda: True, sleep=lambda _: None)
    newest = deque(seen, maxlen=1)
    return newest[0] if newest else None


def show(run: Run, stream: TextIO) -> None:
    """`progress_of` on a terminal or as plain lines."""
    watch(progress_of(run), stream, is_terminal=stream.isatty())


def log_lines(run: Run, until_end: bool) -> Iterator[tuple[str, str]]:
    """(node, line) of all the run's logs; with `until_end` goes on reading until the run has ended."""
    return merged_lines(run.logs, follow=until_end, is_finished=_finished(run), sleep=time.sleep)


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


def _finished(run: Run) -> Callable[[], bool]:
    asked_at = -ASK_EVERY_S
    ask = patient(lambda: control.state(run))

    def finished() -> bool:
        nonlocal asked_at
        if run.end is not None:
            return True
        if time.monotonic() - asked_at < ASK_EVERY_S:
            return False
        asked_at = time.monotonic()
        state = ask()
        return state is not None and not state.active

    return finished
