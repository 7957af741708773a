"""What of a run's time was training that counts, over all its attempts, and where the rest went. Pure functions.

Times come from one node's log, which has a line every `log_freq` steps. Training after an attempt's last line counts as
its ending, and training after the last line that is kept counts as lost. So goodput may be too low by the time of
`log_freq` steps for each attempt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from launcher.results.measure import ENDLESS
from launcher.results.outcome import Goodput
from launcher.runs.again import QUEUED
from launcher.runs.attempts import Attempt

SKEW_S = 60.0  # clocks of a log and of the script that differ by more are not compared


@dataclass(frozen=True, slots=True)
class Trace:
    """An attempt's times, in seconds since 1970, and how long its check took."""

    attempt: Attempt
    check_s: float
    points: Sequence[tuple[int, float]] | None  # logged steps, ascending; None where it is not known when they were
    saves: Sequence[tuple[float, float]] = ()  # when checkpoints were saved, and how long each took


def kept_steps(resumed: Sequence[int | None], first: Sequence[int | None]) -> tuple[int, ...]:
    """Of each attempt but the last, the last step that counts: the next ones train on from there.

    `resumed`: the last complete checkpoint at the end of each attempt; `first`: the first step that it logged. A
    damaged checkpoint is passed over, so an attempt may start earlier than at the last one.
    """
    kept: list[int] = []
    last = ENDLESS
    for step, later in zip(reversed(resumed[:-1]), reversed(first[1:]), strict=True):
        last = min(one for one in (last, step, later and later - 1) if one is not None)
        kept.append(last)
    return tuple(reversed(kept))


def goodput(traces: Sequence[Trace], kept: Sequence[int], submitted: float | None) -> Goodput | None:
    """None where the beginning of the run, or when it logged, is not known. The parts sum to the allocation."""
    total = dict.fromkeys(("kept_s", "start_s", "check_s", "lost_s", "checkpoints_s", "ending_s"), 0.0)
    queue, before, queued = 0.0, submitted, True
    for place, trace in enumerate(traces):
        attempt, points = trace.attempt, trace.points or ()
        # One that Slurm cut off had nobody to note its end.
        ends = [None if attempt.cause == QUEUED else attempt.ended_at, *(at for _, at in points[-1:])]
        following = traces[place : place + 1] if attempt.queued else traces[place + 1 : place + 2]
        ends += [one.attempt.began_at for one in following]
        began, ended = attempt.began_at, next((at for at in ends if at is not None), None)
        if trace.points is None or began is None or ended is None or ended < began - SKEW_S:
            return None
        ended = max(began, ended)
        if queued:
            queue += max(0.0, began - before) if before else 0.0
        elif before is not None:  # what lies between two attempts of one job belongs to the later one's start
            began, ended = before, max(before, ended)
        if points and not (began - SKEW_S <= points[0][1] and points[-1][1] <= ended + SKEW_S):
            return None
        last = kept[place] if place < len(kept) else math.inf
        start = kept[place - 1] if place else 0
        for name, seconds in _shares(trace, began, ended, start, last).items():
            total[name] += seconds
        before, queued = ended, attempt.queued
    return Goodput(sum(total.values()), queue_s=None if submitted is None else queue, **total)


def _shares(trace: Trace, began: float, ended: float, start: int, last: float) -> dict[str, float]:
    """`start`: the step that it trained on from; `last`: the last one that counts."""
    points = trace.points or ()
    if not points:
        check = min(trace.check_s, ended - began)
        return {"check_s": check, "start_s": ended - began - check}
    steps = [step for step, _ in points]
    times = [*accumulate((min(max(at, began), ended) for _, at in points), max)]
    check = min(trace.check_s, times[0] - began)
    # The first step pays for the start. Those between it and the first line have the pace of the fastest lines.
    lines = pairwise(zip(times, steps, strict=True))
    pace = min(((after - at) / (later - step) for (at, step), (after, later) in lines), default=0.0)
    head = min(times[0] - began - check, pace * max(0, steps[0] - start - 1))
    reached = max((at for step, at in zip(steps, times, strict=True) if step <= last), default=times[0] - head)
    spans = {"kept_s": (times[0] - head, reached), "lost_s": (reached, times[-1]), "ending_s": (times[-1], ended)}
    found = {"check_s": check, "start_s": times[0] - head - check - began, "checkpoints_s": 0.0}
    for name, (low, high) in spans.items():
        saving, until = 0.0, low
        for at, seconds in sorted(trace.saves):
            if low < at <= high:  # ranks that share a log say the same
                saving += at - max(until, at - seconds)
                until = at
        found[name] = high - low - saving
        found["checkpoints_s"] += saving
    return found
