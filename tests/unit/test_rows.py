"""Results rows: the published form, medians after warm-up, and what makes a run less than a result."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.results.rows import (
    Row,
    after_warmup,
    deduplicate,
    indicators,
    markdown_header,
    markdown_row,
    mfu_text,
    peak_of,
    row_as_dict,
    summarise,
    summary_line,
)
from launcher.titan.log import StepRecord, parse_line

# Published rows: GPU, nodes, GPUs, batch size, step, loss, grad norm, memory GiB and %, tokens/s, TFLOP/s, MFU.
PUBLISHED = [
    ("GB200", 17, 68, 5, 100, 6.4277, 2.9062, 158.61, 86.20, 17581, 1018.20, 45.25),
    ("GB200", 9, 36, 5, 100, 8.2954, 29.3788, 159.31, 86.58, 17975, 1040.99, 46.27),
    ("GB200", 3, 12, 5, 100, 6.5572, 3.6680, 161.65, 87.85, 18284, 1058.93, 47.06),
    ("B200", 2, 16, 5, 10, 9.9256, 9.2181, 161.51, 90.56, 17441, 1010.08, 44.89),
    ("B200", 2, 16, 5, 100, 6.1751, 1.4532, 161.51, 90.56, 17500, 1013.53, 45.05),
    ("B200", 1, 8, 5, 100, 6.3314, 4.0237, 165.16, 92.60, 17469, 1011.68, 44.96),
    ("H200", 16, 128, 4, 100, 7.2984, 5.6297, 128.17, 91.66, 9044, 523.76, 52.96),
    ("H200", 8, 64, 4, 100, 6.14398, 1.8245, 128.79, 92.11, 8844, 512.21, 51.79),
    ("H200", 4, 32, 4, 100, 6.15755, 1.5348, 129.80, 92.84, 8895, 515.14, 52.09),
    ("H100", 16, 128, 2, 100, 6.3626, 5.2285, 66.38, 83.83, 7169, 415.21, 41.98),
    ("H100", 4, 32, 2, 100, 6.35632, 4.4844, 67.96, 85.82, 7582, 439.14, 44.40),
    ("H100", 2, 16, 2, 100, 6.47847, 2.8199, 69.85, 88.21, 8714, 504.69, 51.03),
]
# The first four as the page shows them, to the byte.
ON_THE_PAGE = [
    "|GB200   |17 (68 GPU)                  |5         |step: 100  loss:  6.4277  grad_norm:  2.9062  "
    "memory: 158.61GiB(86.20%)  tps: 17,581  tflops: 1,018.20  mfu: 45.25%|",
    "|GB200   |9 (36 GPU)                   |5         |step: 100  loss:  8.2954  grad_norm: 29.3788  "
    "memory: 159.31GiB(86.58%)  tps: 17,975  tflops: 1,040.99  mfu: 46.27%|",
    "|GB200   |3 (12 GPU)                   |5         |step: 100  loss:  6.5572  grad_norm:  3.6680  "
    "memory: 161.65GiB(87.85%)  tps: 18,284  tflops: 1,058.93  mfu: 47.06%|",
    "|B200    |2 (16 GPU)                   |5         |step: 10  loss:  9.9256  grad_norm:  9.2181  "
    "memory: 161.51GiB(90.56%)  tps: 17,441  tflops: 1,010.08  mfu: 44.89%|",
]
unhurried = settings(deadline=None)  # a busy machine is no defect
Published = tuple[str, int, int, int, int, float, float, float, float, int, float, float]


def published_row(row: Published) -> Row:
    gpu, nodes, gpus, batch = row[:4]
    record = StepRecord(*row[4:])
    return summarise(
        {"n": [record]}, gpu=gpu, nodes=nodes, gpus_per_node=gpus // nodes, local_batch_size=batch, steps=record.step,
        log_freq=10,
    )  # fmt: skip


def record(step: int, tps: float = 17581.0, **changes: float | int | None) -> StepRecord:
    usual = StepRecord(
        step, 6.4277, 2.9062, 158.61, 86.2, tps, round(tps * 0.057914, 2), 45.25, 1000.0 + step, 0
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def summary(nodes: dict[str, list[StepRecord]], steps: int = 100, finished: bool = True) -> Row:
    return summarise(
        nodes, gpu="GB200", nodes=len(nodes) or 1, gpus_per_node=4, local_batch_size=5, steps=steps, log_freq=10,
        finished=finished,
    )  # fmt: skip


STEPS = [1, *range(10, 101, 10)]


@pytest.mark.parametrize(("row", "line"), list(zip(PUBLISHED, ON_THE_PAGE, strict=False)))
def test_published_rows_in_the_published_form(row: Published, line: str) -> None:
    assert markdown_row(published_row(row)) == line


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_rows_are_read_back_from_the_table(row: Published) -> None:
    found = parse_line(markdown_row(published_row(row)).encode())
    assert found is not None
    _, _, _, _, step, loss, grad_norm, memory_gib, memory_pct, tps, tflops, mfu = row
    assert found == StepRecord(step, round(loss, 4), grad_norm, memory_gib, memory_pct, tps, tflops, mfu)


def test_the_header_fits_the_rows() -> None:
    first, second = markdown_header().splitlines()
    edges = [at for at, char in enumerate(first) if char == "|"][:4]
    assert [at for at, char in enumerate(second) if char == "|"][:4] == edges
    assert [at for at, char in enumerate(ON_THE_PAGE[0]) if char == "|"][:4] == edges


@pytest.mark.parametrize(
    ("row", "peak"), [(row, 2250.0 if row[0] in ("GB200", "B200") else 989.0) for row in PUBLISHED]
)
def test_the_peak_behind_a_published_mfu(row: Published, peak: float) -> None:
    assert published_row(row).peak_tflops == peak


@pytest.mark.parametrize(
    ("tflops", "mfu", "text"),
    [
        (1018.20, 45.25, "45.25% of 2250 TFLOP/s"),
        (1018.20, 40.73, "40.73% of 2500 TFLOP/s"),
        (1018.20, 41.56, "41.56% of 2450 TFLOP/s"),
        (50.0, 2.01, "2.01% of about 2488 TFLOP/s"),  # near 2500, but not within what rounding allows
        (50.0, 12.0, "12.00% of about 417 TFLOP/s"),
        (0.03, 0.01, "0.01% of an unknown peak"),  # anything from 166 to 700 rounds to these
        (0.01, 0.0, "0.00% of an unknown peak"),
        (math.nan, math.nan, "nan% of an unknown peak"),
        (None, 33.57, "33.57% of an unknown peak"),
        (1018.20, None, "N/A"),
    ],
)
def test_mfu_always_has_its_peak(tflops: float | None, mfu: float | None, text: str) -> None:
    assert mfu_text(mfu, peak_of(tflops, mfu)) == text


@unhurried
@given(peak=st.sampled_from([312.0, 989.0, 2250.0, 2500.0]), mfu=st.floats(5, 95))
def test_the_peak_is_found_from_rounded_figures(peak: float, mfu: float) -> None:
    assert peak_of(round(mfu * peak / 100, 2), round(mfu, 2)) == peak


def test_warm_up_is_left_out_of_the_median() -> None:
    records = [record(1, 900.0), record(10, 9000.0), *(record(step, 17000.0 + step) for step in STEPS[2:])]
    assert [r.step for r in after_warmup(records, 10)] == STEPS[2:]
    row = summary({"n": records})
    assert (row.median_tps, row.records_used) == (17060.0, 9)


def test_short_runs_keep_what_they_have() -> None:
    assert [r.step for r in after_warmup([record(1), record(10), record(20)], 10)] == [10, 20]
    assert after_warmup([record(1)], 10) == []
    row = summary({"n": [record(1)]}, steps=5)
    assert not row.incomplete and row.median_tps is None
    assert "no step after warm-up" in summary_line(row)


def test_the_spread_over_nodes_names_the_slowest() -> None:
    nodes = {f"gpu-{n:03}": [record(s, 17000.0 + 100 * n) for s in STEPS] for n in (3, 1, 2, 4)}
    nodes["gpu-007"] = [record(s, 16000.0) for s in STEPS]
    row = summary(nodes)
    assert (row.slowest_node, row.slowest_tps, row.median_tps, row.fastest_tps) == (
        "gpu-007", 16000.0, 17200.0, 17400.0,
    )  # fmt: skip
    assert summary_line(row) == (
        "median 17,200 tokens/s per GPU over 9 logged steps (nodes 16,000..17,400, slowest gpu-007), "
        "mfu 45.25% of about 2214 TFLOP/s"
    )
    assert row.last is nodes["gpu-003"][-1]  # the first of the job, not of the alphabet


def test_one_node_has_no_spread() -> None:
    text = summary_line(published_row(PUBLISHED[5]))
    assert text == "median 17,469 tokens/s per GPU over 1 logged step, mfu 44.96% of 2250 TFLOP/s"


def test_an_incomplete_run_says_so_everywhere() -> None:
    row = summary({"n": [record(step) for step in (1, 10, 20, 30, 40)]})
    assert row.incomplete
    assert "|step 40 of 100  loss:  6.4277" in markdown_row(row) and "step: 40" not in markdown_row(row)
    assert summary_line(row).startswith("incomplete: step 40 of 100, ")
    assert row_as_dict(row)["incomplete"] is True


def test_a_run_that_ended_badly_after_its_last_logged_step_is_incomplete() -> None:
    records = {"n": [record(step) for step in STEPS]}
    assert not summary(records, steps=105).incomplete  # step 105 is never logged
    assert "|step 100 of 105  " in markdown_row(summary(records, steps=105, finished=False))


def test_a_run_without_a_step() -> None:
    silent: list[dict[str, list[StepRecord]]] = [{}, {"n": []}]
    for nodes in silent:
        row = summary(nodes)
        assert row.incomplete and row.last is None
        assert markdown_row(row).endswith("|no step of 100 was logged|")
        assert summary_line(row) == "no step of 100 was logged"
        assert row_as_dict(row)["tps"] is None


def test_a_missing_node_is_counted() -> None:
    row = replace(summary({"a": [record(s) for s in STEPS], "b": [record(s) for s in STEPS]}), nodes=3)
    assert "only 2 of 3 nodes logged" in summary_line(row)


def test_a_restart_repeats_steps_and_the_last_counts() -> None:
    before = [record(step, 10000.0) for step in (1, 10, 20, 30)]
    after = [record(step, 18000.0, time=9000.0 + step) for step in (20, 30, 40, 50, 60, 70, 80, 90, 100)]
    after[0] = replace(after[0], tps=500.0)  # compiles and loads its checkpoint in this one
    row = summary({"n": before + after})
    assert row.restarted and "restarted" in summary_line(row)
    assert (row.median_tps, row.records_used) == (18000.0, 8)
    unique, again = deduplicate(before + after)
    assert [r.step for r in unique] == STEPS and again == {20}


def test_ranks_that_share_a_log_are_no_restart() -> None:
    records = [record(s, 17000.0 + rank, rank=rank, time=s + rank / 10) for s in STEPS for rank in range(4)]
    assert not summary({"n": records}).restarted
    assert not summary({"n": [replace(r, time=None) for r in records]}).restarted
    again = [record(10), record(10, time=2000.0)]
    assert summary({"n": again}).restarted


def test_nan_anywhere_is_seen() -> None:
    for bad in (record(30, loss=math.nan), record(30, grad_norm=math.inf)):
        records = [record(s) for s in STEPS]
        records[3] = bad
        row = summary({"n": records})
        assert row.non_finite and "NaN or infinity" in summary_line(row)
    row = summary({"n": [record(s, loss=math.nan) for s in STEPS]})
    assert "loss:     nan" in markdown_row(row)
    assert json.loads(json.dumps(row_as_dict(row), allow_nan=False))["loss"] is None


def test_a_pipeline_stage_that_does_not_know_the_loss_is_not_the_result() -> None:
    row = summary({"a": [record(100, loss=-1.0)], "b": [record(100, loss=6.1)]})
    assert row.last is not None and row.last.loss == 6.1


def test_earlier_and_quantised_forms() -> None:
    old = record(10, grad_norm=None, tflops=None)
    assert indicators(old) == "loss:  6.4277  memory: 158.61GiB(86.20%)  tps: 17,581  mfu: 45.25%"
    assert indicators(record(10, mfu_pct=None)).endswith("  mfu: N/A")


@unhurried
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "gpu-007"]),
        st.lists(
            st.builds(
                record,
                step=st.integers(1, 120),
                tps=st.floats(0, 1e6),
                loss=st.floats(),
                time=st.none() | st.floats(0, 1e9),
                mfu_pct=st.none() | st.floats(),
            ),
            max_size=12,
        ),
        max_size=4,
    )
)
def test_any_records_give_a_row(nodes: dict[str, list[StepRecord]]) -> None:
    row = summary(nodes)
    assert markdown_row(row).count("|") == 5
    assert "\n" not in summary_line(row)
    json.dumps(row_as_dict(row), allow_nan=False)
    if row.median_tps is not None:
        assert row.slowest_tps is not None and row.fastest_tps is not None
        assert row.slowest_tps <= row.median_tps <= row.fastest_tps
    furthest = max((r.step for records in nodes.values() for r in records), default=0)
    assert row.incomplete == (furthest < 100)
