"""Results rows: the published form, and what makes a run less than a result."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.mfu import mfu_text, peak_of
from launcher.logs.steps import StepRecord, parse_line
from launcher.results.columns import as_dict
from launcher.results.outcome import NON_FINITE, RESTARTED, NodeResult, Outcome
from launcher.results.published import published
from launcher.results.rows import escape, indicators, markdown_row, median_mfu_pct, mfu_at_other_peaks, summary_line
from tests.unit.outcomes import nodes, outcome, point, problems, silent, spread

# The published rows as runs that logged one step.
PUBLISHED = [
    replace(
        row,
        state="COMPLETED",
        series=(
            replace(
                point(row.step, row.loss, row.tps.median, row.tflops.median),
                grad_norm=row.grad_norm,
                memory_gib=row.memory_gib.median,
            ),
        ),
        by_node=(NodeResult("n", row.tps.median),),
    )
    for row in published()
    if row.tps and row.tflops and row.memory_gib and row.step and row.loss
]
# Two as the page shows them, to the byte.
ON_THE_PAGE = [
    "|GB200   |17 (68 GPU)                  |5         |step: 100  loss:  6.4277  grad_norm:  2.9062  "
    "memory: 158.61GiB(86.20%)  tps: 17,581  tflops: 1,018.20  mfu: 45.25%|",
    "|B200    |2 (16 GPU)                   |5         |step: 10  loss:  9.9256  grad_norm:  9.2181  "
    "memory: 161.51GiB(90.56%)  tps: 17,441  tflops: 1,010.08  mfu: 44.89%|",
]


def test_published_rows_in_the_published_form() -> None:
    assert set(ON_THE_PAGE) <= {markdown_row(row) for row in PUBLISHED}


@pytest.mark.parametrize("row", PUBLISHED, ids=[row.run for row in PUBLISHED])
def test_published_rows_are_read_back_from_the_table(row: Outcome) -> None:
    found = parse_line(markdown_row(row).encode())
    (last,) = row.series
    loss = round(last.loss, 4)
    assert found == StepRecord(
        last.step, loss, last.grad_norm, last.memory_gib, row.memory_pct or 0.0, last.tps, last.tflops, row.mfu_pct
    )


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
        (1018.20, None, "n/a"),
    ],
)
def test_mfu_always_has_its_peak(tflops: float | None, mfu: float | None, text: str) -> None:
    assert mfu_text(mfu, peak_of(tflops, mfu)) == text


@given(peak=st.sampled_from([312.0, 989.0, 2250.0, 2500.0]), mfu=st.floats(5, 95))
def test_the_peak_is_found_from_rounded_figures(peak: float, mfu: float) -> None:
    assert peak_of(round(mfu * peak / 100, 2), round(mfu, 2)) == peak


def test_mfu_at_the_other_usual_peaks() -> None:
    first = PUBLISHED[0]
    assert mfu_at_other_peaks(first) == pytest.approx({2450: 41.56, 2500: 40.73}, abs=0.005)
    assert mfu_at_other_peaks(PUBLISHED[-1]) == {}  # 989 is all there is for an H100
    assert mfu_at_other_peaks(replace(first, mfu_pct=None)) == {}  # quantised: a bf16 peak is not its own
    assert mfu_at_other_peaks(replace(first, gpu="TPU")) == mfu_at_other_peaks(replace(first, tflops=None)) == {}


def test_the_mfu_beside_a_median_is_not_the_last_steps() -> None:
    """One slow step at the end would halve it."""
    slow_end = outcome(mfu_pct=22.96, tflops=spread(1018.2))
    assert median_mfu_pct(slow_end) == pytest.approx(45.25, abs=0.01)
    assert "MFU 45.25% of 2250 TFLOP/s" in summary_line(slow_end) and "22.96" not in summary_line(slow_end)
    assert (as_dict(slow_end)["mfu_pct"], round(as_dict(slow_end)["median_mfu_pct"], 2)) == (22.96, 45.25)
    assert median_mfu_pct(replace(slow_end, peak_tflops=None)) == 22.96  # as printed, where the peak is not known
    assert median_mfu_pct(replace(slow_end, mfu_pct=None)) is None  # quantised


def test_the_summary_names_the_slowest_node() -> None:
    medians = nodes(17000.0, 17400.0, 16000.0, 17200.0, 17300.0)
    whole = outcome(by_node=medians, tps=spread(17200.0, count=45), tflops=spread(1018.2))
    assert summary_line(whole) == (
        "median 17,200 tokens/s per GPU over 9 logged steps (nodes 16,000..17,400, slowest gb200-003), "
        "MFU 45.25% of 2250 TFLOP/s"
    )
    expected = {"slowest_node": "gb200-003", "slowest_tps": 16000.0, "fastest_tps": 17400.0, "records_used": 9}
    assert expected.items() <= as_dict(whole).items()


def test_an_incomplete_run_says_so_everywhere() -> None:
    whole = PUBLISHED[0]
    short = replace(whole, steps=200, problems=problems("step 100 of 200"))
    assert "|step 100 of 200  loss:  6.4277" in markdown_row(short) and "step: " not in markdown_row(short)
    assert summary_line(short).startswith("incomplete: step 100 of 200, median ")
    assert (as_dict(short)["incomplete"], as_dict(short)["complete"]) == (True, False)
    failed = replace(whole, state="FAILED", steps=105, problems=problems("FAILED (ended by SIGKILL)"))
    assert "|step 100 of 105 (FAILED (ended by SIGKILL))  loss:" in markdown_row(failed)
    assert as_dict(failed)["incomplete"] is True


@pytest.mark.parametrize("problem", [RESTARTED.text, NON_FINITE.text, "only 2 of 3 nodes logged", "mixed driver: 1, 2"])
def test_any_other_problem_is_beside_the_figures(problem: str) -> None:
    less = replace(PUBLISHED[0], problems=problems(problem))
    assert f"|step 100 of 100 ({problem})  loss:" in markdown_row(less) and "step: " not in markdown_row(less)
    assert summary_line(less).startswith(f"{problem}, median ")
    found = as_dict(less)
    assert (found["complete"], found["incomplete"], found["problems"]) == (False, False, [problem])
    assert (found["restarted"], found["non_finite"]) == (problem == RESTARTED.text, problem == NON_FINITE.text)


def test_a_run_without_a_step() -> None:
    found = silent(state="FAILED", problems=("no step of 100 was logged", "FAILED"))
    assert markdown_row(found).endswith("|no step of 100 was logged|")
    assert summary_line(found) == "no step of 100 was logged, FAILED"
    values = as_dict(found)
    assert values["tps"] is values["median_tps"] is values["slowest_node"] is None and values["records_used"] == 0


def test_no_step_counts() -> None:
    short = outcome(series=(point(1, 9.0, 100.0),), step=1, steps=1, tps=None)
    assert summary_line(short).startswith("no step after warm-up, MFU ")


def test_nan_is_null() -> None:
    whole = PUBLISHED[0]
    last = replace(whole.series[0], loss=math.nan)
    less = replace(whole, loss=math.nan, series=(last,), settings={"recipe.lr": math.inf}, problems=(NON_FINITE,))
    assert "loss:     nan" in markdown_row(less)
    found = json.loads(json.dumps(as_dict(less), allow_nan=False))
    assert found["loss"] is None and found["settings"]["recipe.lr"] is None and found["non_finite"] is True


def test_earlier_and_quantised_forms() -> None:
    whole = PUBLISHED[0]
    old = replace(whole, series=(replace(whole.series[0], grad_norm=None, tflops=None),))
    assert indicators(old, old.series[0]) == "loss:  6.4277  memory: 158.61GiB(86.20%)  tps: 17,581  mfu: 45.25%"
    assert indicators(replace(whole, mfu_pct=None), whole.series[0]).endswith("  mfu: N/A")


def test_markup_and_html_are_words() -> None:
    assert escape("a|b <script>&`x` [l](u) *b*\n") == "a\\|b &lt;script&gt;&amp;\\`x\\` \\[l\\](u) \\*b\\*?"
