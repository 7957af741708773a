"""Two results side by side: what differs, what is noise, and what may not be compared."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.results.columns import as_dict as result_as_dict
from launcher.results.compare import Comparison, Figure, Verdict, as_dict, as_text, compare, noise
from launcher.results.outcome import Outcome, Spread
from launcher.results.published import PUBLISHED, TABLE, best_match, described, published, rows_of
from launcher.results.sides import outcome_from, results_in
from tests.conftest import ROOT, Launch
from tests.unit.outcomes import nodes, outcome, spread, write_run

HEADER = "gpu,nodes,gpus,local_batch_size,step,tps\n"


def with_median(value: float | None) -> str:
    spread = {"median": value, "q1": 1, "q3": 1, "low": 1, "high": 1, "count": 1}
    return json.dumps(result_as_dict(outcome()) | {"spread": {"tps": spread}})


def figure(found: Comparison, name: str) -> Figure:
    return next(figure for figure in found.figures if figure.name.startswith(name))


def published_beside(result: Outcome) -> Outcome:
    row = best_match(result, published()).row
    assert row is not None
    return row


# --- noise --------------------------------------------------------------------------------------------------


def test_the_noise_is_the_half_width_of_a_medians_95_percent_interval() -> None:
    """Of 81 values with quartiles at 90 and 110: 1.96 x 1.2533 x (20 / 1.349) / 9."""
    assert noise(Spread(100.0, 90.0, 110.0, 70.0, 130.0, 81), nodes=1) == pytest.approx(4.0465, abs=1e-3)


def test_nodes_that_wait_for_each_other_add_no_evidence() -> None:
    of_one, of_nine = noise(spread(100.0, count=9), 1), noise(spread(100.0, count=81), 9)
    assert of_one == of_nine != noise(spread(100.0, count=81), 1)


@pytest.mark.parametrize("made", [None, spread(100.0, count=2), spread(math.nan)])
def test_too_few_values_have_no_noise(made: Spread | None) -> None:
    assert noise(made, 1) is None


# --- what is shown ------------------------------------------------------------------------------------------


def test_a_difference_within_the_noise_and_one_beyond() -> None:
    a = outcome()
    small, large = compare(a, outcome(tps=spread(17950.0))), compare(a, outcome(tps=spread(17000.0)))
    tps = figure(small, "tokens/s")
    assert (tps.difference, tps.beyond, tps.remark) == (20.0, False, "")
    tps = figure(large, "tokens/s")
    assert (tps.difference, tps.beyond) == (-930.0, True)
    assert tps.noise == pytest.approx(math.hypot(noise(a.tps, 9) or 0, noise(spread(17000.0), 9) or 0))
    assert (small.verdict, large.verdict) == (Verdict.SAME, Verdict.SLOWER)
    assert as_text(small)[-1] == "SAME: the difference of +0.1% in tokens/s is within noise"
    assert as_text(large)[-1] == "SLOWER: B has 5.2% fewer tokens/s than A, which exceeds noise"
    assert compare(outcome(tps=spread(17000.0)), a).verdict is Verdict.FASTER
    none = compare(outcome(tps=spread(0.0)), a)
    assert none.verdict is Verdict.CANNOT_SAY and as_text(none)[-1].endswith("A has no tokens/s")
    wide = Spread(600.0, 400.0, 800.0, 300.0, 900.0, 81)
    unsure = compare(outcome(tps=wide), outcome(tps=wide))
    assert unsure.verdict is Verdict.CANNOT_SAY and "the noise of ±57% is too large to tell" in as_text(unsure)[-1]
    assert compare(outcome(tps=wide), a).verdict is Verdict.FASTER  # by far more than the noise
    assert "-930 (-5.2%)" in "\n".join(as_text(large)) and "* tokens/s per GPU" in "\n".join(as_text(large))


def test_what_is_the_same_in_every_step_has_no_noise() -> None:
    found = figure(compare(outcome(), outcome(memory_gib=spread(150.0, 0.0))), "peak memory")
    assert (found.noise, found.beyond, found.remark) == (None, None, "")


def test_a_published_row_has_one_value() -> None:
    found = compare(outcome(), published_beside(outcome()))
    tps = figure(found, "tokens/s")
    assert (tps.b, tps.remark) == (17975.0, "a published value is a single run, so its variance is unknown")
    assert tps.beyond is False
    a = outcome()
    assert a.tps is not None and tps.noise is not None
    assert tps.noise > 1.96 * (a.tps.q3 - a.tps.q1) / 1.349  # a single step's scatter, not a median's
    assert not found.settings and not found.warnings  # what a row does not say is no difference
    assert "  a published value is a single run, so its variance is unknown" in as_text(found)


def test_settings_and_versions_that_differ() -> None:
    a = outcome(settings={"job.name": "a", "titan.training.max_norm": "2"})
    b = outcome(
        settings={"job.name": "b", "recipe.compile": True}, compile=True, versions={"torch": "2.13.0", "driver": "580"}
    )
    found = compare(a, b)
    assert found.settings == (("recipe.compile", False, True), ("titan.training.max_norm", "2", None))
    assert found.versions == (("torch", "2.14.1", "2.13.0"),)  # 580 and 580.95.05 are the same driver
    text = "\n".join(as_text(found))
    assert "recipe.compile" in text and "job.name" not in text and "(not set)" in text
    assert "not the same work (A against B): compile false, not true" in found.warnings


def test_an_incomplete_run_is_shown_and_not_compared() -> None:
    found = compare(outcome(), outcome(problems=("step 40 of 100", "restarted")))
    tps = figure(found, "tokens/s")
    assert (tps.a, tps.b, tps.difference, tps.beyond) == (17930.0, 17930.0, None, None)
    assert tps.why_not == "B is not complete"
    assert "B is not complete: step 40 of 100; restarted" in found.warnings
    assert "not comparable: B is not complete" in "\n".join(as_text(found))
    assert (found.verdict, as_text(found)[-1]) == (Verdict.CANNOT_SAY, "CANNOT SAY which is faster: B is not complete")


def test_different_gpus_are_warned_of_and_still_shown() -> None:
    found = compare(outcome(), outcome(gpu="B200"))
    assert found.warnings[0].startswith("different GPUs: GB200 and B200")
    assert figure(found, "tokens/s").difference == 0.0 and found.verdict is Verdict.CANNOT_SAY


def test_mfu_of_different_peaks_and_losses_of_different_steps_are_not_compared() -> None:
    found = compare(outcome(), outcome(peak_tflops=2500.0, mfu_pct=41.5, step=1000, steps=1000))
    assert figure(found, "MFU").why_not == "divided by 2250 and 2500 TFLOP/s"
    assert figure(found, "loss").why_not == "at step 100 and 1000"
    assert figure(found, "tokens/s").why_not == ""


@given(
    st.builds(
        outcome,
        tps=st.none() | st.builds(spread, st.floats(0.1, 1e6), st.floats(0, 1), st.integers(1, 99)),
        loss=st.none() | st.floats(),
        mfu_pct=st.none() | st.floats(),
        gpu=st.sampled_from(["GB200", "B200"]),
        problems=st.sampled_from([(), ("restarted",)]),
        peak_tflops=st.none() | st.just(2250.0),
        by_node=st.sampled_from([(), nodes(1.0), nodes(1.0, None)]),
    )
)
def test_any_two_results_compare(other: Outcome) -> None:
    for found in (compare(outcome(), other), compare(other, outcome())):
        json.dumps(as_dict(found), allow_nan=False)
        assert all("\n" not in line for line in as_text(found))
        for one in found.figures:
            if not (found.a.complete and found.b.complete):
                assert one.difference is None and one.beyond is None
            assert one.beyond is None or (one.noise is not None and one.difference is not None)


# --- the rows ----------------------------------------------------------------------------------------------


with (ROOT / "slurm" / "reference-results.csv").open(newline="") as _file:
    CELLS = list(csv.DictReader(_file))


def test_published_rows_say_what_they_are() -> None:
    rows = published()
    assert {row.state for row in rows} == {PUBLISHED} and all(row.source and row.median_tps for row in rows)
    assert len({(row.run, row.date, tuple(sorted(described(row).items()))) for row in rows}) == len(rows)
    for row in rows:  # `parallelism` is for readers: the degrees are what is compared
        degree, is_async = (row.settings[f"recipe.{name}tensor_parallel"] for name in ("", "async_"))
        (cells,) = (
            cells for cells in CELLS if (cells["source"], cells["tps"]) == (row.source, f"{row.median_tps:.0f}")
        )
        assert (f"TP {degree}" in cells["parallelism"], "async TP" in cells["parallelism"]) == (degree > 1, is_async)
    counted_flop = [row for row in rows if row.tflops is not None]
    assert len(counted_flop) == 12
    for row in counted_flop:
        assert (row.seq_len, row.precision, row.compile) == (8192, "bfloat16", False)
        assert row.tflops is not None and row.tps is not None
        # The FLOP of one token of Llama-3-8B at 8192, as torchtitan counts them: that is what was trained.
        assert row.tflops.median / row.tps.median * 1e3 == pytest.approx(57.914, abs=0.006)
        assert row.peak_tflops == (2250.0 if "B200" in row.gpu else 989.0)  # of bf16, unquantised


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, 36),
        ({"nodes": 17}, 68),
        ({"nodes": 6}, 36),  # 24 GPUs are 1.5 times fewer; 12 are 2 times fewer
        ({"nodes": 18}, 68),
        ({"gpu": "B200", "nodes": 2, "per_node": 8}, 16),
        ({"gpu": "H100", "nodes": 8, "per_node": 8, "local_batch_size": 2}, 128),  # as far from 32: the larger
    ],
)
def test_the_row_that_matches_best(changes: dict[str, Any], gpus: int) -> None:
    made = outcome(**changes)
    row = published_beside(made)
    assert (row.gpu, row.gpus) == (made.gpu, gpus)
    if made.gpu == "B200":
        assert row.step == 100


# --- files -------------------------------------------------------------------------------------------------


def test_a_result_comes_back_from_its_json(tmp_path: Path) -> None:
    file = tmp_path / "accepted.json"
    file.write_text(json.dumps(result_as_dict(outcome()), allow_nan=False))
    (found,) = results_in(str(file), tmp_path)
    lost = {
        field.name
        for field in dataclasses.fields(Outcome)
        if getattr(found, field.name) != getattr(outcome(), field.name)
    }
    assert lost <= {"series", "by_node"}  # single steps are not in that file
    assert best_match(outcome(), [found]).row == found


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text((ROOT / "slurm" / "reference-results.csv").read_text())
    assert [row.tps for row in results_in(str(file), tmp_path)] == [row.tps for row in published()]
    assert {row.state for row in results_in(str(file), tmp_path)} == {TABLE}
    bare = rows_of("\ufeff" + HEADER + 'GB200,9,36,5,100,"17,975"\n', "x.csv")[0]
    assert bare.tps is not None and bare.tps.median == 17975
    why = best_match(outcome(), [bare]).why_not
    said = "model, size of the model, sequence length, precision, quantisation, compile"
    assert f"does not say its {said}" in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("garbage\n", "no column gpu, nodes"),
        (HEADER, "has no complete result"),
        (HEADER + "GB200,9,36,5,100,=1+2\n", "x:2: column tps: '=1+2' is not a number"),
        (HEADER + "GB200,9,36,5,100,nan\n", "x:2: column tps: 'nan' is not a number"),
        (HEADER + "GB200,9,36,5,100,inf\n", "column tps"),
        (HEADER + "GB200,9,36,5,100,-1\n", "column tps"),
        (HEADER + "GB200,9,36,5,100,0\n", "column tps is empty or 0"),
        (HEADER + "GB200,9,36,5,100\n", "column tps is empty or 0"),
        (HEADER + "GB200,9,36,5,100,1_000\n", "column tps"),
        (HEADER + "GB200,0,36,5,100,17975\n", "column nodes is empty or 0"),
        (HEADER + "GB200,9,35,5,100,17975\n", "35 GPUs cannot be divided evenly among 9 nodes"),
        (HEADER + f"GB200,9,{10**30},5,100,17975\n", "column gpus"),
        (HEADER + ",9,36,5,100,17975\n", "column gpu is empty"),
        (HEADER + '"GB200,9\n', "not a CSV file"),
        ("{", "not JSON"),
        ("[]", "holds no results"),
        ("[1]", "not a result of this launcher"),
        ("{}", "not a result of this launcher"),
        ('{"spread": {}}', "has no nodes"),
        (with_median(None), "tps.median: nan is no speed"),
        (with_median(0), "tps.median: 0.0 is no speed"),
        (HEADER[:-1] + ",loss\nGB200,9,36,5,100,17975,-6\n", "column loss: '-6' is not a number"),
        ('{"spread": {}, "nodes": "nine"}', "nodes: 'nine' is not a whole number"),
        ('{"spread": {}, "nodes": ' + "9" * 5000 + "}", "nodes: 'None' is not a whole number"),
        ("[" * 100000, "not JSON"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(LauncherError) as error:
        results_in(str(tmp_path / "x"), tmp_path)
    assert said in error.value.what.replace(str(tmp_path / "x"), "x")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"gpu\xff")
    with pytest.raises(LauncherError, match="not UTF-8"):
        results_in(str(tmp_path / "x"), tmp_path)
    with pytest.raises(LauncherError, match="no run"):
        results_in(str(tmp_path), tmp_path)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(sorted(result_as_dict(outcome()))), ANY_JSON)
@example("prediction", {"of": {"another": None}})
@example("settings", {"huge": [1e301]})
def test_a_damaged_result_is_refused_or_read(key: str, value: object) -> None:
    whole = json.loads(json.dumps(result_as_dict(outcome())))
    try:
        found = outcome_from(whole | {key: value}, "x")
    except LauncherError as error:
        assert error.what.startswith("x: ")
    else:
        assert found.tps is None or found.tps.median > 0
        as_text(compare(outcome(), found))


@given(st.text(max_size=60) | st.just(HEADER).flatmap(lambda h: st.text(max_size=40).map(lambda t: h + t)))
def test_any_text_is_a_table_or_refused(text: str) -> None:
    try:
        rows = rows_of(text, "x")
    except LauncherError:
        return
    assert all(row.tps is not None and row.tps.median > 0 for row in rows)


# --- the command -------------------------------------------------------------------------------------------


def test_the_command(launch: Launch, workplace: Path) -> None:
    write_run(workplace / "runs" / "a")
    write_run(workplace / "runs" / "b", (17000.0, 17010.0), compile=True)
    done = launch("compare", "a", "b")
    assert done.returncode == 0 and "recipe.compile  false  true" in done.stdout
    assert "which exceeds noise, but it did not do the same work" in done.stdout
    codes = [launch("compare", *sides, "--exit-code").returncode for sides in (("a", "b"), ("b", "a"), ("a", "a"))]
    assert codes == [ExitStatus.BELOW, 0, 0]
    values = json.loads(launch("compare", "a", "published", "--json").stdout)
    assert values["b"]["gpus"] == 12 and values["figures"][0]["remark"].startswith("a published value")
    table = ROOT / "slurm" / "reference-results.csv"
    assert launch("compare", str(table), "runs/b").returncode == 0
    assert "\x1b" not in done.stdout


def test_what_the_command_refuses(launch: Launch, workplace: Path) -> None:
    write_run(workplace / "runs" / "a", gpu="B300")
    write_run(workplace / "runs" / "<b>\x1b[31m", steps_logged=40, end='{"exit_code": 1}')
    done = launch("compare", "a", "published")
    assert done.returncode == 4 and "published has no result for B300" in done.stderr
    assert launch("compare", "published", "published").returncode == 3
    assert launch("compare", "a", "none").returncode == 4
    assert launch("compare", "a").returncode == 2
    done = launch("compare", "a", "<b>\x1b[31m")
    assert done.returncode == 0 and "\x1b" not in done.stdout and "step 40 of 100" in done.stdout
