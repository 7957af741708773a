"""From step records to figures: pure functions, no files and no clock. The one place where a median is computed.

Step 1 and the steps up to the first regular log line are warm-up; the rest of every node's steps make a spread.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import harmonic_mean, median, quantiles

from launcher.logs.steps import StepRecord
from launcher.results.outcome import NodeResult, Spread

SAME_STEP_SECONDS = 2.0
ENDLESS = 10**12  # no log has so many steps


@dataclass(frozen=True, slots=True)
class NodeSteps:
    """One node's records, each step once and in the order of steps."""

    records: list[StepRecord]
    restarts: frozenset[int]  # the steps that were the first to be logged after a restart
    began: float | None  # when step 1 was first logged, in the log's own clock
    is_finite: bool  # no NaN or infinity in any record, repeated ones included


@dataclass(frozen=True, slots=True)
class Measured:
    """What the logs of all nodes say. `series` is the leading node's: of those that got furthest and know the loss,
    the first in the job's order.

    `overall_tps` is the harmonic mean of that node's steps after warm-up: each figure is of as many tokens, so that
    this is tokens over time, and steps that were slow, or stood still, weigh as much as they lasted.
    """

    series: tuple[StepRecord, ...]
    warm_steps: frozenset[int]  # the leading node's steps whose figures count
    by_node: tuple[NodeResult, ...]  # those that logged a step
    tps: Spread | None
    overall_tps: float | None
    tflops: Spread | None
    memory_gib: Spread | None
    began: dict[str, float]  # by node: when it first logged step 1, in its log's own clock
    restarted: bool
    is_finite: bool
    by_attempt: tuple[float | None, ...]  # the median tokens/s of each
    ends: list[dict[str, tuple[int, int]]]  # of each attempt, by node: the last step that counts, and how many do

    @property
    def last(self) -> StepRecord | None:
        return self.series[-1] if self.series else None


def measure(logs: Iterable[tuple[str, Iterable[StepRecord]]], log_freq: int, kept: Sequence[int] = ()) -> Measured:
    """The figures of a run from each node's records in the order of its log; only one node's are held at a time.

    `kept`: the last step that counts of each attempt but the last; records then have no others. An attempt's first
    logged step does not count for its speed, since it pays for the start, as step 1 does.
    """
    ranges = [*pairwise((-1, *kept, ENDLESS))]
    tps, tflops, memory = [array("d") for _ in ranges], array("d"), array("d")
    leads: list[list[StepRecord]] = [[] for _ in ranges]
    warm_of: list[list[StepRecord]] = [[] for _ in ranges]  # of the leading nodes
    by_node: list[NodeResult] = []
    began: dict[str, float] = {}
    ends: list[dict[str, tuple[int, int]]] = [{} for _ in ranges]
    restarted, is_finite = False, True
    for host, records in logs:
        node = deduplicate(records)
        restarted |= bool(node.restarts)
        is_finite &= node.is_finite
        if not node.records:
            continue
        parts = [[r for r in node.records if low < r.step <= high] for low, high in ranges]
        fresh = {part[0].step for part in parts[1:] if part}
        used = [r for r in node.records if not kept or (r.step > log_freq and r.step not in fresh)] or node.records
        warm = [r for r in after_warmup(used, log_freq, node.restarts) if math.isfinite(r.tps)]
        tflops.extend(r.tflops for r in warm if r.tflops is not None and math.isfinite(r.tflops))
        memory.extend(r.memory_gib for r in warm if math.isfinite(r.memory_gib))
        rate = median(r.tps for r in warm) if warm else None
        by_node.append(NodeResult(host, rate))
        if node.began is not None:
            began[host] = node.began
        for place, ((low, high), part) in enumerate(zip(ranges, parts, strict=True)):
            mine = [r for r in warm if low < r.step <= high]
            tps[place].extend(r.tps for r in mine)
            if not part:
                continue
            ends[place][host] = part[-1].step, len(part)
            if not leads[place] or _furthest(part) > _furthest(leads[place]):
                leads[place], warm_of[place] = part, mine
    rates = [r.tps for r in chain(*warm_of)]
    return Measured(
        series=tuple(chain(*leads)),
        warm_steps=frozenset(r.step for r in chain(*warm_of)),
        by_node=tuple(by_node),
        tps=spread(array("d", chain(*tps))),
        overall_tps=harmonic_mean(rates) if rates and min(rates) > 0 else None,
        tflops=spread(tflops),
        memory_gib=spread(memory),
        began=began,
        restarted=restarted,
        is_finite=is_finite,
        by_attempt=tuple(median(rates) if rates else None for rates in tps),
        ends=ends,
    )


def _furthest(records: Sequence[StepRecord]) -> tuple[int, bool]:
    return records[-1].step, records[-1].knows_loss


@dataclass(frozen=True, slots=True)
class Against:
    """A node's median tokens/s, and that of the run's other nodes."""

    host: str
    tps: float
    others: float

    @property
    def behind(self) -> float:
        """As a share of the others', negative where it is faster."""
        return 1 - self.tps / self.others if self.others > 0 else 0.0


def against_others(nodes: Iterable[NodeResult]) -> list[Against]:
    """Every node that has a median, the slowest first; none where there are fewer than two to compare."""
    known = sorted((node.tps, at, node.host) for at, node in enumerate(nodes) if node.tps is not None)
    known = [found for found in known if math.isfinite(found[0])]
    rates, rest = [tps for tps, _, _ in known], len(known) - 1
    if rest < 1:
        return []
    found = []
    for place, (tps, _, host) in enumerate(known):  # the middle of those without it, without a list for each
        low, high = (middle + (middle >= place) for middle in ((rest - 1) // 2, rest // 2))
        found.append(Against(host, tps, (rates[low] + rates[high]) / 2))
    return found


def spread(values: Sequence[float]) -> Spread | None:
    """Median, quartiles (interpolated between values, as numpy does) and ends; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], values[0], values[0], 1)
    q1, _, q3 = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), q1, q3, min(values), max(values), len(values))


def deduplicate(records: Iterable[StepRecord]) -> NodeSteps:
    """One record per step. A restart goes back to a checkpoint and logs steps again: a step's last record counts.

    Equal steps within two seconds are no restart but several ranks or nodes that share one log.
    """
    by_step: dict[int, StepRecord] = {}
    again: set[int] = set()
    began: float | None = None
    is_finite = True
    previous: StepRecord | None = None
    for record in records:
        if previous is not None and _went_back(previous, record):
            again.add(record.step)
        elif previous is None and record.step == 1:
            began = record.time
        is_finite &= finite(record)
        by_step[record.step] = record
        previous = record
    return NodeSteps([by_step[step] for step in sorted(by_step)], frozenset(again), began, is_finite)


def after_warmup(
    records: Sequence[StepRecord], log_freq: int, restarts: frozenset[int] = frozenset()
) -> list[StepRecord]:
    """The records whose tokens/s count, of one node's records without repetitions.

    Step 1 never counts: it pays for start-up, and torchtitan divides its time wrongly. Where at least three
    records remain, those up to step `log_freq` don't either, since caches, allocator and clocks still settle
    there, nor does the first after a restart, for the same reasons.
    """
    rest = [record for record in records if record.step > 1]
    if len(rest) < 3:
        return rest
    return [record for record in rest if record.step > log_freq and record.step not in restarts] or rest


def logged_steps(steps: int, log_freq: int) -> int:
    """How many steps torchtitan logs of so many: step 1 and the multiples of `log_freq`."""
    return steps // log_freq + (log_freq > 1 and steps > 0)


def last_logged(steps: int, log_freq: int) -> int:
    """The last step that it logs; 0 where there is none."""
    return steps // log_freq * log_freq or min(steps, 1)


def finite(record: StepRecord) -> bool:
    return (
        math.isfinite(record.loss)
        and math.isfinite(record.tps)
        and (record.grad_norm is None or math.isfinite(record.grad_norm))
    )


def _went_back(previous: StepRecord, record: StepRecord) -> bool:
    if record.step != previous.step:
        return record.step < previous.step
    if record.time is None or previous.time is None:
        return record.rank == previous.rank
    return record.time - previous.time > SAME_STEP_SECONDS
