"""Results rows: the published form, and what makes a run less than a result."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.mfu import mfu_text, peak_of
from launcher.logs.steps import StepRecord, parse_line
from launcher.results.outcome import NON_FINITE, RESTARTED, NodeResult, Outcome, Point, Spread
from launcher.results.rows import (
    as_dict,
    escape,
    indicators,
    markdown_header,
    markdown_row,
    median_mfu_pct,
    mfu_at_other_peaks,
    summary_line,
)
from tests.unit.outcomes import nodes, outcome, problems, spread

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
Published = tuple[str, int, int, int, int, float, float, float, float, int, float, float]


def published_row(row: Published) -> Outcome:
    gpu, nodes, gpus, batch, step, loss, grad_norm, memory_gib, memory_pct, tps, tflops, mfu_pct = row
    return outcome(
        gpu=gpu,
        nodes=nodes,
        gpus=gpus,
        local_batch_size=batch,
        steps=step,
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        memory_pct=memory_pct,
        mfu_pct=mfu_pct,
        peak_tflops=peak_of(tflops, mfu_pct),
        tflops=spread(tflops, 0.0),
        series=(Point(step, loss, grad_norm, tps, memory_gib, tflops),),
        tps=Spread(tps, tps, tps, tps, tps, 1),
        by_node=(NodeResult("n", tps),),
    )


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


@given(peak=st.sampled_from([312.0, 989.0, 2250.0, 2500.0]), mfu=st.floats(5, 95))
def test_the_peak_is_found_from_rounded_figures(peak: float, mfu: float) -> None:
    assert peak_of(round(mfu * peak / 100, 2), round(mfu, 2)) == peak


def test_mfu_at_the_other_usual_peaks() -> None:
    first = published_row(PUBLISHED[0])
    assert {peak: round(mfu, 2) for peak, mfu in mfu_at_other_peaks(first).items()} == {
        2450: 41.56,
        2500: 40.73,
    }
    assert mfu_at_other_peaks(published_row(PUBLISHED[-1])) == {}  # 989 is all there is for an H100
    assert mfu_at_other_peaks(replace(first, mfu_pct=None)) == {}  # quantised: a bf16 peak is not its own
    assert mfu_at_other_peaks(replace(first, gpu="TPU")) == mfu_at_other_peaks(replace(first, tflops=None)) == {}


def test_the_mfu_beside_a_median_is_not_the_last_steps() -> None:
    """One slow step at the end would halve it."""
    slow_end = outcome(mfu_pct=22.96, tflops=spread(1018.2))
    assert median_mfu_pct(slow_end) == pytest.approx(45.25, abs=0.01)
    assert "mfu 45.25% of 2250 TFLOP/s" in summary_line(slow_end) and "22.96" not in summary_line(slow_end)
    assert (as_dict(slow_end)["mfu_pct"], round(as_dict(slow_end)["median_mfu_pct"], 2)) == (22.96, 45.25)
    assert median_mfu_pct(replace(slow_end, peak_tflops=None)) == 22.96  # as printed, where the peak is not known
    assert median_mfu_pct(replace(slow_end, mfu_pct=None)) is None  # quantised


def test_the_summary_names_the_slowest_node() -> None:
    medians = nodes(17000.0, 17400.0, 16000.0, 17200.0, 17300.0)
    whole = outcome(by_node=medians, tps=spread(17200.0, count=45), tflops=spread(1018.2))
    assert summary_line(whole) == (
        "median 17,200 tokens/s per GPU over 9 logged steps (nodes 16,000..17,400, slowest gb200-003), "
        "mfu 45.25% of 2250 TFLOP/s"
    )
    found = as_dict(whole)
    assert (found["slowest_node"], found["slowest_tps"], found["fastest_tps"], found["records_used"]) == (
        "gb200-003",
        16000.0,
        17400.0,
        9,
    )


def test_one_node_has_no_spread() -> None:
    text = summary_line(published_row(PUBLISHED[5]))
    assert text == "median 17,469 tokens/s per GPU over 1 logged step, mfu 44.96% of 2250 TFLOP/s"


def test_an_incomplete_run_says_so_everywhere() -> None:
    whole = published_row(PUBLISHED[0])
    short = replace(whole, steps=200, problems=problems("step 100 of 200"))
    assert "|step 100 of 200  loss:  6.4277" in markdown_row(short) and "step: " not in markdown_row(short)
    assert summary_line(short).startswith("incomplete: step 100 of 200, median ")
    assert (as_dict(short)["incomplete"], as_dict(short)["complete"]) == (True, False)
    failed = replace(whole, state="FAILED", steps=105, problems=problems("FAILED (ended by SIGKILL)"))
    assert "|step 100 of 105 (FAILED (ended by SIGKILL))  loss:" in markdown_row(failed)
    assert as_dict(failed)["incomplete"] is True


@pytest.mark.parametrize("problem", [RESTARTED.text, NON_FINITE.text, "only 2 of 3 nodes logged", "mixed driver: 1, 2"])
def test_any_other_problem_is_beside_the_figures(problem: str) -> None:
    less = replace(published_row(PUBLISHED[0]), problems=problems(problem))
    assert f"|step 100 of 100 ({problem})  loss:" in markdown_row(less) and "step: " not in markdown_row(less)
    assert summary_line(less).startswith(f"{problem}, median ")
    found = as_dict(less)
    assert (found["complete"], found["incomplete"], found["problems"]) == (False, False, [problem])
    assert (found["restarted"], found["non_finite"]) == (problem == RESTARTED.text, problem == NON_FINITE.text)


def test_a_run_without_a_step() -> None:
    silent = outcome(
        series=(),
        step=None,
        tps=None,
        tflops=None,
        memory_gib=None,
        by_node=(),
        state="FAILED",
        problems=("no step of 100 was logged", "FAILED"),
    )
    assert markdown_row(silent).endswith("|no step of 100 was logged|")
    assert summary_line(silent) == "no step of 100 was logged, FAILED"
    found = as_dict(silent)
    assert found["tps"] is found["median_tps"] is found["slowest_node"] is None and found["records_used"] == 0


def test_no_step_counts() -> None:
    short = outcome(series=(Point(1, 9.0, None, 100.0, 1.0),), step=1, steps=1, tps=None)
    assert summary_line(short).startswith("no step after warm-up, mfu ")


def test_nan_is_null() -> None:
    whole = published_row(PUBLISHED[0])
    last = replace(whole.series[0], loss=math.nan)
    less = replace(whole, loss=math.nan, series=(last,), settings={"recipe.lr": math.inf}, problems=(NON_FINITE,))
    assert "loss:     nan" in markdown_row(less)
    found = json.loads(json.dumps(as_dict(less), allow_nan=False))
    assert found["loss"] is None and found["settings"]["recipe.lr"] is None and found["non_finite"] is True


def test_the_old_keys_are_still_there() -> None:
    assert set(as_dict(outcome())) >= {
        "run",
        "state",
        "gpu",
        "nodes",
        "gpus",
        "local_batch_size",
        "steps",
        "step",
        "loss",
        "grad_norm",
        "memory_gib",
        "memory_pct",
        "tps",
        "tflops",
        "mfu_pct",
        "peak_tflops",
        "median_tps",
        "records_used",
        "nodes_logged",
        "slowest_node",
        "slowest_tps",
        "fastest_tps",
        "incomplete",
        "restarted",
        "non_finite",
    }


def test_earlier_and_quantised_forms() -> None:
    whole = published_row(PUBLISHED[0])
    old = replace(whole, series=(replace(whole.series[0], grad_norm=None, tflops=None),))
    assert indicators(old) == "loss:  6.4277  memory: 158.61GiB(86.20%)  tps: 17,581  mfu: 45.25%"
    assert indicators(replace(whole, mfu_pct=None)).endswith("  mfu: N/A")


@given(st.text(max_size=60), st.text(max_size=60))
def test_words_of_others_stay_in_their_cell(name: str, problem: str) -> None:
    row = markdown_row(outcome(gpu=name, problems=(problem,)))
    assert "\n" not in row and "<" not in row and row.replace("\\\\", "").replace("\\|", "").count("|") == 5
    json.dumps(as_dict(outcome(gpu=name, run=name)), allow_nan=False).encode("utf-8")


def test_markup_and_html_are_words() -> None:
    assert escape("a|b <script>&`x` [l](u) *b*\n") == "a\\|b &lt;script&gt;&amp;\\`x\\` \\[l\\](u) \\*b\\*?"
