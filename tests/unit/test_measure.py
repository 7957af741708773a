"""From step records to figures: warm-up, restarts, ranks that share a log, and the same statistics as numpy's."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.logs.steps import StepRecord
from launcher.results.measure import Measured, after_warmup, deduplicate, last_logged, logged_steps, measure, spread

STEPS = [1, *range(10, 101, 10)]


def record(step: int, tps: float = 17581.0, **changes: float | int | None) -> StepRecord:
    usual = StepRecord(step, 6.4277, 2.9062, 158.61, 86.2, tps, round(tps * 0.057914, 2), 45.25, 1000.0 + step, 0)
    return replace(usual, **changes)  # type: ignore[arg-type]


def measured(nodes: dict[str, list[StepRecord]]) -> Measured:
    return measure(nodes.items(), log_freq=10)


def test_warm_up_is_left_out() -> None:
    records = [record(1, 900.0), record(10, 9000.0), *(record(step, 17000.0 + step) for step in STEPS[2:])]
    assert [r.step for r in after_warmup(records, 10)] == STEPS[2:]
    found = measured({"n": records})
    assert found.tps is not None and found.tflops is not None and found.memory_gib is not None
    assert (found.tps.median, found.tps.low, found.tps.high, found.tps.count) == (17060, 17020, 17100, 9)
    assert (found.tflops.count, found.memory_gib.count, found.memory_gib.high) == (9, 9, 158.61)
    assert found.warm_steps == set(STEPS[2:]) and [point.step for point in found.series] == STEPS


def test_short_runs_keep_what_they_have() -> None:
    assert spread([]) is None
    assert [r.step for r in after_warmup([record(1), record(10), record(20)], 10)] == [10, 20]
    assert after_warmup([record(1)], 10) == []
    found = measured({"n": [record(1)]})
    assert found.tps is None and found.by_node[0].tps is None and found.last == record(1)


def test_every_node_has_its_median_and_all_their_steps_make_the_spread() -> None:
    nodes = {f"gpu-{n:03}": [record(s, 17000.0 + 100 * n) for s in STEPS] for n in (3, 1, 2, 4)}
    nodes["silent"] = []
    found = measured(nodes)
    assert {node.host: node.tps for node in found.by_node} == {
        "gpu-003": 17300,
        "gpu-001": 17100,
        "gpu-002": 17200,
        "gpu-004": 17400,
    }
    assert found.tps is not None and (found.tps.median, found.tps.count) == (17250, 36)
    assert found.last is nodes["gpu-003"][-1]  # the first of the job, not of the alphabet


def test_a_restart_repeats_steps_and_the_last_counts() -> None:
    before = [record(step, 10000.0) for step in (1, 10, 20, 30)]
    after = [record(step, 18000.0, time=9000.0 + step) for step in (20, 30, 40, 50, 60, 70, 80, 90, 100)]
    after[0] = replace(after[0], tps=500.0)  # compiles and loads its checkpoint in this one
    found = measured({"n": before + after})
    assert found.restarted and found.tps is not None
    assert (found.tps.median, found.tps.low, found.tps.count) == (18000, 18000, 8)
    node = deduplicate(before + after)
    assert [r.step for r in node.records] == STEPS and node.restarts == {20} and node.began == 1001.0


def test_ranks_that_share_a_log_are_no_restart() -> None:
    records = [record(s, 17000.0 + rank, rank=rank, time=s + rank / 10) for s in STEPS for rank in range(4)]
    found = measured({"n": records})
    assert not found.restarted and found.began == {"n": 1.0}
    assert not measured({"n": [replace(r, time=None) for r in records]}).restarted
    assert measured({"n": [record(10), record(10, time=2000.0)]}).restarted


def test_the_start_is_the_first_time_of_step_1_and_nothing_else() -> None:
    again = [record(1), record(10), record(1, time=5000.0), record(10, time=5010.0)]
    assert measured({"a": again, "b": [record(10), record(20)]}).began == {"a": 1001.0}
    assert measured({"a": [record(1, time=None)]}).began == {}


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"grad_norm": math.inf}, {"tps": math.nan}, {"tps": math.inf}])
def test_nan_anywhere_is_seen_and_no_part_of_a_figure(bad: dict[str, float]) -> None:
    records = [record(s) for s in STEPS]
    assert measured({"n": records}).is_finite
    records[3] = record(30, **bad)
    found = measured({"n": records})
    assert not found.is_finite and found.tps is not None and found.tps.median == 17581
    assert math.isfinite(found.tps.high)
    again = [*records, *(record(s, time=9000.0 + s) for s in STEPS)]  # even where a later attempt went well
    assert not measured({"n": again}).is_finite


def test_a_pipeline_stage_that_does_not_know_the_loss_does_not_lead() -> None:
    found = measured({"a": [record(100, loss=-1.0)], "b": [record(100, loss=6.1)]})
    assert found.last is not None and found.last.loss == 6.1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_the_spread_is_numpys(values: list[float]) -> None:
    numpy = pytest.importorskip("numpy")
    found = spread(values)
    assert found is not None and found.count == len(values)
    expected = numpy.percentile(values, [0, 25, 50, 75, 100])
    assert (found.low, found.q1, found.median, found.q3, found.high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("log_freq", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 10, 11, 100, 105])
def test_which_steps_torchtitan_logs(steps: int, log_freq: int) -> None:
    logged = [step for step in range(1, steps + 1) if step == 1 or step % log_freq == 0]
    assert (logged_steps(steps, log_freq), last_logged(steps, log_freq)) == (len(logged), max(logged, default=0))


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "gpu-007"]),
        st.lists(
            st.builds(
                record,
                step=st.integers(1, 120),
                tps=st.floats(0, 1e60) | st.sampled_from([math.nan, math.inf]),  # the parser takes no longer number
                loss=st.floats(),
                time=st.none() | st.floats(0, 1e9),
                tflops=st.none() | st.floats(0, 1e60),
            ),
            max_size=12,
        ),
        max_size=4,
    )
)
def test_any_records_give_figures(nodes: dict[str, list[StepRecord]]) -> None:
    found = measured(nodes)
    medians = [node.tps for node in found.by_node if node.tps is not None]
    if found.tps is not None:
        assert found.tps.low <= found.tps.q1 <= found.tps.median <= found.tps.q3 <= found.tps.high
        assert min(medians) <= found.tps.median <= max(medians)
    furthest = max((r.step for records in nodes.values() for r in records), default=None)
    assert (found.last.step if found.last else None) == furthest


def test_memory_does_not_grow_with_repeated_steps_and_nodes() -> None:
    def endless() -> Iterator[StepRecord]:
        for turn in range(50):
            yield from (record(step, time=turn * 1000.0 + step) for step in range(1, 101))

    tracemalloc.start()
    try:
        found = measure(((f"n{n}", endless()) for n in range(3)), log_freq=1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()
    assert found.restarted and len(found.series) == 100
