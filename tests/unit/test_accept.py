"""PASS, FAIL and CANNOT SAY: what provokes each, what can never happen, and the command."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.results.accept import About, Verdict, Word, as_dict, headline, judge
from launcher.results.columns import as_dict as result_as_dict
from launcher.results.outcome import Outcome
from launcher.results.published import published, rows_of, unlike
from launcher.scheduler import local
from tests.conftest import ROOT, Launch
from tests.unit.outcomes import LOSSES, nodes, outcome, point, points, problems, spread, write_run

PASS, FAIL, CANNOT_SAY = Word.PASS, Word.FAIL, Word.CANNOT_SAY
ROWS = published()


def verdict(result: Outcome | None, **options: Any) -> Verdict:
    return judge(result, options.pop("rows", ROWS), losses=ROWS, **options)


def with_losses(*losses: float) -> Outcome:
    return outcome(series=points(losses))


def ended(state: str, *said: str) -> Outcome:
    return outcome(state=state, problems=said or (state,))


def set_to(**recipe: Any) -> Outcome:
    return outcome(settings={f"recipe.{key}": value for key, value in recipe.items()})


HALF_SPEED = outcome(overall_tps=16137.0, series=(*points()[:-1], point(100, 6.65, 8965.0)))
JUST_BELOW = outcome(tps=spread(0.9496 * 17975))
SLOW_NODE = outcome(by_node=nodes(17900.0, 17950.0, 16000.0), tps=spread(17930.0, count=27))
FAILS: dict[str, tuple[Outcome, str]] = {
    "slow": (outcome(tps=spread(17000.0)), "17,000 tokens/s per GPU is 94.5% of 17,975, below the required 95%"),
    "never rounded up to the limit": (JUST_BELOW, "is 94.9% of 17,975, below the required 95%"),
    "no speed at all": (outcome(tps=spread(0.0), overall_tps=17900.0), "is 0.0% of 17,975"),
    "one slow node": (SLOW_NODE, "gb200-003 16,000 tokens/s, 10.7% below the others' 17,925 (limit 5%)"),
    "NaN in the loss": (with_losses(*LOSSES[:5], math.nan), "loss: nan at step 50"),
    "infinity in the gradients": (outcome(grad_norm=math.inf), "gradient norm: inf at step 100"),
    "a loss that rises": (with_losses(6.0, 7.0, 8.0, 9.0, 9.5), "it should be at most 6.00 by then"),
    "a loss that does not learn": (with_losses(12.25, 12.0, 11.9, *[11.8] * 8), "it should be at most 11.03 by then"),
    "failed by itself": (ended("FAILED", "FAILED", "step 40 of 100"), "ended FAILED: step 40 of 100"),
    "killed": (
        ended("FAILED", "mixed gpu: a", "FAILED (by SIGKILL)"),
        "the run ended FAILED (by SIGKILL): mixed gpu: a",
    ),
    "out of time": (ended("TIMEOUT"), "the run ended TIMEOUT"),
    "a node died": (ended("NODE_FAIL"), "the run ended NODE_FAIL"),
    "an interval at half speed": (HALF_SPEED, "10.0% below the median (limit 5%); slow up to step 100"),
    "a loss that explodes at once": (with_losses(12.0, 10.0, 22.0), "22.00 at step 20, the last one: it exploded"),
    "a loss that explodes at last": (with_losses(12.0, *[6.0] * 9, 30.0), "at step 100, the last one: it exploded"),
    "a loss of nothing": (with_losses(12.25, *[0.001] * 10), "at that step others had 6.14 to 8.30; a loss this low"),
}
UNSAID: dict[str, tuple[Outcome, str]] = {
    "still going": (outcome(state="RUNNING", problems=("still RUNNING",), tps=None), "still RUNNING"),
    "cancelled": (ended("CANCELLED"), "the run ended CANCELLED"),
    "its end is not known": (ended("UNKNOWN", "its end is UNKNOWN (why)"), "its end is UNKNOWN (why)"),
    "restarted": (outcome(problems=("restarted",)), "restarted"),
    "the wrong GPU": (outcome(problems=("the profile says GB200, a has B200",)), "the profile says GB200"),
    "a loss that jumped": (with_losses(12.0, 10.0, 30.0, *[7.0] * 8), "30.00 at step 20: it jumped, and came back"),
    "no step after warm-up": (outcome(tps=None), "no step after warm-up"),
    "too few steps": (outcome(tps=spread(17930.0, count=36)), "4 logged after warm-up, 5 are needed"),
    "no row": (outcome(gpu="B300"), "no result for B300 to compare with, only for B200, GB200, GB300, H100, H200"),
    "few steps, and no row": (outcome(gpu="B300", tps=spread(17930.0, count=36)), "no result for B300"),
    "another model": (set_to(flavor="70B"), "size of the model 70B, not 8B"),
    "another length": (outcome(seq_len=4096), "sequence length 4096, not 8192"),
    "another batch": (outcome(local_batch_size=4), "local batch size 4, not 5"),
    "accumulated batches": (outcome(global_batch_size=360), "2 batches a step and GPU, not 1"),
    "compiled": (outcome(compile=True), "compile true, not false"),
    "fp32": (outcome(precision="float32"), "precision float32, not bfloat16"),
    "quantised": (outcome(precision="bfloat16 + mxfp8"), "quantisation mxfp8, not none"),
    "recomputing all": (set_to(activation_checkpoint="full"), "checkpointing full, not selective"),
    "tensor parallel": (set_to(tensor_parallel=2), "tensor parallel degree 2, not 1"),
    "another framework's": (outcome(gpu="GB300"), "not like with like, against published (NVIDIA, 2 x GB300)"),
    "with what 0.3 adds": (set_to(like_for_like=False), "like_for_like false, not true"),
    "of an older launcher": (replace(outcome(), settings={}), "does not say its model, size of the model"),
    "a quarter of a GB200 rack's row": (outcome(nodes=1), "on 12 GPUs and this run had 4, 3.0 times fewer"),
    "slow on far more GPUs": (outcome(nodes=72, tps=spread(16000.0, count=81)), "this run had 288, 4.2 times more"),
}


@pytest.mark.parametrize("name", [*FAILS, *UNSAID])
def test_what_fails_and_what_cannot_be_said(name: str) -> None:
    (result, why), word = (FAILS[name], FAIL) if name in FAILS else (UNSAID[name], CANNOT_SAY)
    found = verdict(result)
    assert (found.word, int(found.exit)) == (word, 12 if word is FAIL else 13)
    assert why in found.reasons[0].what


def h100(nodes: int, speed: float, **changes: Any) -> Outcome:
    """A compiled run of the 8B model at batch 2, on nodes of 8 GPUs."""
    whole = {"gpu": "H100", "per_node": 8, "local_batch_size": 2, "compile": True, "tps": spread(speed, count=27)}
    return outcome(**{**whole, **changes}, nodes=nodes, by_node=())


@pytest.mark.parametrize(
    ("tensor", "is_async", "precision", "tps"),
    [
        (8, False, "bfloat16", 597),
        (8, True, "bfloat16", 652),
        (8, False, "bfloat16 + float8", 829),
        (8, True, "bfloat16 + float8", 942),  # of 2025; 876 in 2024
        (1, False, "bfloat16", None),
        (4, True, "bfloat16 + float8", None),
        (8, True, "bfloat16 + mxfp8", None),
    ],
)
def test_70b_is_measured_by_the_row_of_its_parallelism(
    tensor: int, is_async: bool, precision: str, tps: float | None
) -> None:
    settings = {
        "recipe.flavor": "70B",
        "recipe.activation_checkpoint": "full",
        "recipe.tensor_parallel": tensor,
        "recipe.async_tensor_parallel": is_async,
    }
    run = h100(32, 400.0, settings=settings, local_batch_size=16, precision=precision)
    for rows in (ROWS, ROWS[::-1]):
        found = verdict(replace(run, global_batch_size=16 * 256 // tensor), rows=rows)
        assert (found.baseline and found.baseline.median_tps) == tps
        assert found.word is (CANNOT_SAY if tps is None else FAIL)


def test_gpus_of_limited_power_prove_no_run_fast() -> None:
    """H100s of 500 W: less than their 95% is slow on any; as much says nothing about GPUs that may draw 700 W."""
    assert verdict(h100(1, 6000.0)).word is FAIL
    found = verdict(h100(1, 6700.0))
    assert found.word is CANNOT_SAY and found.share and found.share > 1
    assert "those GPUs had limited power (published (torchtitan, 500 W, 1 x H100))" in found.reasons[0].what
    short = h100(1, 8700.0, compile=False, steps=60)
    assert (row := verdict(short).baseline) and row.median_tps == 8714  # of full power, before the one of 8 GPUs


ROW = "gpu,nodes,gpus,local_batch_size,step,tps,model,flavor,seq_len,precision,compile,framework\n"


@pytest.mark.parametrize(
    ("framework", "step", "word"), [("torchtitan", 100, PASS), ("Megatron", 100, CANNOT_SAY), ("", "", PASS)]
)
def test_a_row_of_ones_own(framework: str, step: object, word: Word) -> None:
    """Of another framework it is not like with like; it need not say its step."""
    (row,) = rows_of(f"{ROW}GB200,9,36,5,{step},17975,llama3,8B,8192,bfloat16,false,{framework}\n", "x")
    found = verdict(outcome(), rows=[row])
    assert found.word is word
    if word is PASS:
        assert row.step == (step or None) and found.baseline is row and not unlike(outcome(), row)
        assert as_dict("x", outcome(), found, {})["baseline"]["step"] == row.step
    else:
        assert found.reasons[0].what.endswith("framework torchtitan, not Megatron")


def test_far_more_or_fewer_gpus_decide_one_way_only() -> None:
    """Each of few GPUs is faster: few that are slow, and many that are fast, are certain."""
    fast, slow = spread(17950.0, count=81), spread(16000.0, count=81)
    assert verdict(outcome(nodes=1, tps=fast)).word is CANNOT_SAY and verdict(outcome(nodes=1, tps=slow)).word is FAIL
    assert verdict(outcome(nodes=72, tps=fast)).word is PASS and verdict(outcome(nodes=72, tps=slow)).word is CANNOT_SAY
    near = verdict(outcome(nodes=12, tps=fast))
    assert near.word is PASS
    assert "the nearest published result is of 9 nodes (36 GPUs), this run had 12 nodes (48 GPUs)" in near.notes


def test_unfit_nodes_fail_even_without_any_result() -> None:
    fault = "node gb200-003 is not fit to train: 3 of 4 GPUs are there"
    for result in (None, outcome(state="FAILED", problems=("FAILED", "no step of 100"), tps=None, step=None)):
        found = verdict(result, faults=[fault], state="FAILED")
        assert found.word is FAIL and found.reasons[0].what == fault
    assert verdict(None, state="RUNNING").word is CANNOT_SAY
    assert verdict(None, state="COMPLETED").word is CANNOT_SAY
    assert verdict(None).word is CANNOT_SAY


def test_a_steady_run_says_its_pace() -> None:
    assert any("pace: 17,900 tokens/s" in r.what for r in verdict(outcome(overall_tps=17900.0)).reasons)
    assert verdict(outcome(overall_tps=None)).word is PASS  # a table's row, or an older result


def test_the_pace_names_no_step_of_the_warm_up_and_lets_checkpoints_be() -> None:
    series = tuple(replace(p, tps=9000.0 if p.step in (10, 50) else p.tps) for p in points())
    slow = outcome(overall_tps=16000.0, series=series)
    assert verdict(slow).reasons[0].what.endswith("; slow up to step 50")
    saving = replace(slow, settings={**slow.settings, "recipe.checkpoint_interval": 50})
    found = verdict(saving)
    assert found.word is CANNOT_SAY and "this includes checkpoints every 50 steps" in found.reasons[0].what
    on_cpu = replace(slow, settings={**slow.settings, "profile.device": "cpu"})
    assert not any(reason.about is About.PACE for reason in verdict(on_cpu).reasons)


def test_of_two_rows_as_near_the_same_driver_counts() -> None:
    other, same = (outcome(run=d, run_dir=d, versions={"driver": d}) for d in ("570.1", "580.95.05"))
    assert (row := verdict(outcome(), rows=[other, same]).baseline) and row.run == "580.95.05"


def test_waiting_for_data_is_named() -> None:
    assert not any("waiting for data" in note for note in verdict(outcome(data_share=0.012)).notes)
    found = verdict(outcome(data_share=0.09, tps=spread(16500.0)))
    assert found.word is FAIL and any(
        note.startswith("9.0% of a step is spent waiting for data") for note in found.notes
    )


def test_a_row_of_the_same_driver_comes_first() -> None:
    """H100s were published with two drivers: 8,714 tokens/s on 16 GPUs with one, 7,582 on 32 with the other."""
    run = replace(h100(3, 7256.0, compile=False), by_node=nodes(7250.0, 7256.0, 7260.0))
    new, old = (verdict(replace(run, versions={"driver": driver})) for driver in ("580.95.05", "570.172.08"))
    assert (new.word, new.baseline and new.baseline.gpus) == (FAIL, 16)
    assert (old.word, old.baseline and old.baseline.gpus) == (PASS, 32)
    assert verdict(replace(run, versions={})).baseline == old.baseline  # unknown: the nearest number
    same = replace(run, nodes=2, gpus=16, global_batch_size=32, versions={"driver": "570.172.08"})
    assert (row := verdict(same).baseline) and row.gpus == 16  # the same number, though of the other driver


def test_weights_that_were_trained_before_are_not_asked_to_fall() -> None:
    tuned = outcome(settings={"job.init_from": "/data/models/x"}, series=points((2.1, *[2.15] * 10)), loss=2.15)
    assert verdict(tuned).word is PASS  # and the published losses are no reference for it
    assert verdict(replace(tuned, series=points((2.1, *[3.0] * 10)))).word is FAIL
    of_own_kind = replace(tuned, run="before", run_dir="before", loss=3.3, series=points((3.4, *[3.3] * 10)))
    assert verdict(tuned, rows=[of_own_kind]).word is PASS  # a lower loss than before is no fault here


def test_generated_text_is_judged_by_its_speed_and_its_loss_only_by_itself() -> None:
    made = outcome(
        settings={"job.data": "sample", "job.tokenizer": "sample"}, loss=1.5, series=points((12.2, *[1.5] * 10))
    )
    found = verdict(made)
    assert found.word is PASS and found.share and found.baseline and found.baseline.state == "PUBLISHED"
    assert "not comparable with others'" in next(r.what for r in found.reasons if r.about == "loss")
    before = replace(made, run="before", run_dir="before", loss=4.0)
    assert verdict(made, rows=[before]).word is FAIL, "of the same text, a much lower loss is a fault"
    slow = verdict(replace(made, tps=spread(14000.0)))
    assert slow.word is FAIL and [r.about for r in slow.reasons if r.word is FAIL] == ["speed"]


@pytest.mark.parametrize("loss", [5.0, 9.5])  # more than 1.35 times from one end of what is published, not from all
def test_a_loss_is_held_against_all_that_others_had(loss: float) -> None:
    found = verdict(outcome(series=points((12.25, *[loss] * 10)), loss=loss))
    assert found.word is PASS and "others had 6.14 to 8.30" in next(r.what for r in found.reasons if r.about == "loss")


def test_a_baseline_of_ones_own() -> None:
    """For GPUs without a published row, and for a closer limit than another cluster's table gives."""
    mine = outcome(gpu="B300", run="accepted", loss=6.6)
    again = replace(mine, tps=spread(17000.0), run="again", run_dir="/home/user/runs/again")
    assert verdict(mine).word is CANNOT_SAY
    assert verdict(again, rows=[mine]).word is FAIL and verdict(again, rows=[mine], threshold=0.94).word is PASS
    assert "94.8% of accepted's 17,930" in headline("again", again, verdict(again, rows=[mine]))
    assert verdict(again, rows=[replace(mine, problems=problems("restarted"))]).word is CANNOT_SAY
    assert verdict(again, rows=[]).word is CANNOT_SAY
    bad = replace(again, series=points((12.25, *[9.5] * 10)), settings={**again.settings, "recipe.flavor": "70B"})
    other = replace(mine, settings=bad.settings)
    assert "more than 1.35 times that" in verdict(bad, rows=[other], threshold=0.9).reasons[0].what


def test_a_shortfall_within_the_noise_is_told() -> None:
    short = outcome(tps=spread(17070.0, 0.004))
    assert any("repeat it" in note for note in verdict(short).notes)
    assert not any("repeat it" in note for note in verdict(outcome(tps=spread(15000.0))).notes)


def test_what_may_have_changed_the_speed_is_told() -> None:
    found = verdict(outcome(settings={"titan.training.max_norm": "2", "recipe.checkpoint_interval": 50}))
    assert any("titan.training.max_norm" in note for note in found.notes)
    assert any("checkpoints every 50 steps" in note for note in found.notes)
    found = verdict(outcome(versions={"driver": "570.1", "cuda": "13.0"}))
    assert "driver 570.1, 580 in published (Crusoe, 9 x GB200)" in found.notes
    assert not any(note.startswith("cuda") for note in found.notes)
    row = outcome(settings={"profile.gpus_per_node": 8}, versions={"cuda": "12.8"})
    row = replace(row, settings={key: row.settings[key] for key in row.settings if "checkpoint" not in key})
    found = verdict(outcome(settings={"profile.gpus_per_node": 4}), rows=[row])
    assert {note.partition(" in ")[0] for note in found.notes} >= {"4 GPUs a node, 8", "cuda 13.0, 12.8"}
    assert f"activation checkpointing of {row.run} is not known" in found.notes


# --- what can never happen ----------------------------------------------------------------------------------

RESULTS = st.builds(
    outcome,
    state=st.sampled_from(["COMPLETED", "FAILED", "CANCELLED", "RUNNING", "UNKNOWN", "PENDING"]),
    gpu=st.sampled_from(["GB200", "B200", "H100", "H200", "A100", "CPU", "?"]),
    nodes=st.just(1),
    gpus=st.integers(1, 300),
    local_batch_size=st.sampled_from([2, 4, 5]),
    global_batch_size=st.sampled_from([-1, 180]),
    settings=st.fixed_dictionaries(
        {}, optional={"recipe.local_batch_size": st.sampled_from([2, 4, 5]), "recipe.compile": st.booleans()}
    ),
    tps=st.none() | st.builds(spread, st.floats(1, 30000), st.floats(0, 0.5), st.integers(1, 200)),
    loss=st.none() | st.floats(),
    series=st.builds(lambda losses: points(tuple(losses)), st.lists(st.floats(0, 20) | st.just(math.nan), max_size=11)),
    by_node=st.builds(lambda tps: nodes(*tps), st.lists(st.none() | st.floats(0, 30000), max_size=4)),
    problems=st.lists(st.sampled_from(["restarted", "step 40 of 100"]), max_size=1).map(tuple),
)
RANK = {FAIL: 0, CANNOT_SAY: 1, PASS: 2}


@given(RESULTS, st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0, 1))
def test_the_rules_hold_for_any_result(result: Outcome, low: float, high: float, limit: float) -> None:
    low, high = sorted((low, high))
    easy, hard = (verdict(result, threshold=low, max_spread=limit), verdict(result, threshold=high, max_spread=limit))
    assert RANK[easy.word] >= RANK[hard.word]  # asking for more never turns a verdict to the better
    if easy.word is PASS:
        assert result.complete and result.state == "COMPLETED" and easy.baseline is not None
        assert result.tps is not None and easy.baseline.tps is not None
        assert result.tps.median >= low * easy.baseline.tps.median
        assert all(math.isfinite(point.loss) for point in result.series)
    if easy.baseline is not None:
        assert easy.baseline.gpu == result.gpu and easy.baseline.local_batch_size == result.local_batch_size
    assert easy.reasons and "\n" not in headline("x", result, easy)
    kept = json.dumps(as_dict("x", result, easy, {}), allow_nan=False)
    assert json.loads(kept)["exit_code"] == {PASS: 0, FAIL: 12, CANNOT_SAY: 13}[easy.word]


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_and_keeps_its_verdict(launch: Launch, workplace: Path) -> None:
    run = write_run(workplace / "runs" / "good", (17930.0,) * 3)
    done = launch("accept", "good")
    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert first == "PASS  good: 17,930 tokens/s per GPU, 98.0% of the published 18,284 (GB200, 3 nodes)"
    kept = json.loads((run / "accept.json").read_text())
    assert (kept["verdict"], kept["exit_code"], kept["inputs"]["threshold"]) == ("PASS", 0, 0.95)
    assert kept["baseline"]["published"] and kept["inputs"]["date"] and kept["reasons"]
    again = launch("accept", str(run / "run.toml"), "--threshold", "99%", "--json")  # the last verdict counts
    assert again.returncode == 4  # that file is not there; the directory itself names the run
    again = launch("accept", str(run), "--threshold", "99%", "--json")
    assert again.returncode == 12 and json.loads(again.stdout) == json.loads((run / "accept.json").read_text())


def test_every_verdict_has_its_exit_code(launch: Launch, workplace: Path) -> None:
    runs = workplace / "runs"
    write_run(runs / "slow", (15000.0,) * 3)
    write_run(runs / "node", (17950.0, 17960.0, 15000.0))
    write_run(runs / "nan", loss=math.nan)
    write_run(runs / "fast", compile=True)
    write_run(runs / "b300", gpu="B300")
    write_run(runs / "failed", steps_logged=40, end='{"exit_code": 1}')
    write_run(runs / "gone", steps_logged=40, end="")
    found = {run.name: launch("accept", run.name).returncode for run in sorted(runs.iterdir())}
    assert found == {"b300": 13, "failed": 12, "fast": 13, "gone": 13, "nan": 12, "node": 12, "slow": 12}
    assert launch("accept", "node", "--max-spread", "20%").returncode == 0


def test_unfit_nodes_are_named(launch: Launch, workplace: Path) -> None:
    run = write_run(workplace / "runs" / "unfit", steps_logged=0, end='{"exit_code": 20}')
    for number, ok in enumerate((True, False)):
        host = f"gb200-{number + 1:03}"
        record = {"ok": ok, "host": host, "why": "" if ok else "3 of 4 GPUs are there", "fix": ""}
        (run / "nodes" / f"{number:04}-{host}.json").write_text(json.dumps(record))
    done = launch("accept", "unfit")
    assert done.returncode == 12
    assert "node gb200-002 is not fit to train: 3 of 4 GPUs are there" in done.stdout.splitlines()[0]


def test_who_cannot_say_names_the_next_command(launch: Launch, workplace: Path) -> None:
    runs = workplace / "runs"
    write_run(runs / "b300", gpu="B300")
    assert launch("accept", "b300").stdout.endswith("  try         launcher accept b300 --baseline RUN (or FILE)\n")
    write_run(runs / "going", steps_logged=20, end="")
    (runs / "going" / "job.json").write_text(json.dumps(local.identity(os.getpid())))
    assert "  try         launcher accept going --follow\n" in launch("accept", "going").stdout


def test_an_accepted_run_is_a_baseline(launch: Launch, workplace: Path) -> None:
    runs = workplace / "runs"
    write_run(runs / "before", gpu="B300")
    write_run(runs / "after", (17000.0, 17000.0), gpu="B300")
    file = workplace / "accepted.json"
    file.write_text(json.dumps(result_as_dict(outcome(gpu="B300", nodes=2))))
    for baseline in ("before", str(file)):
        assert launch("accept", "after", "--baseline", baseline).returncode == 12
        assert launch("accept", "after", "--baseline", baseline, "--threshold", "0.9").returncode == 0
    done = launch("accept", "before", "--baseline", "before")
    assert done.returncode == 13 and "the baseline is this run itself" in done.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--threshold", value) for value in ("0", "-1", "nan", "inf", "95", "201%", "x", "", "-5%")),
        *(("--max-spread", value) for value in ("5", "101%", "-1%", "nan")),  # with 5, for 5%, every node would pass
    ],
)
def test_thresholds_that_are_none(launch: Launch, workplace: Path, option: str, value: str) -> None:
    write_run(workplace / "runs" / "a")
    done = launch("accept", "a", option, value)
    assert done.returncode == 2 and "0.95 or 95%" in done.stderr
    assert not (workplace / "runs" / "a" / "accept.json").exists()


def test_what_the_command_refuses(launch: Launch, workplace: Path) -> None:
    write_run(workplace / "runs" / "a")
    (workplace / "empty").write_text("")
    assert launch("accept").returncode == 2
    assert launch("accept", "none").returncode == 4
    assert launch("accept", "a", "--baseline", "empty").returncode == 3
    assert launch("accept", "a", "--baseline", "none").returncode == 4
    # An unset variable in a script: not the newest run, which may be the one that is judged.
    assert launch("accept", "a", "--baseline", "").returncode == 3
    done = launch("accept", "a", "--nodes", "9")
    assert done.returncode == 2 and "options of submit need a RUN.toml" in done.stderr
    # A baseline of no use is told before anything is submitted.
    done = launch("accept", "--local", "--recipe", "debug", "--gpu", "cpu", "--baseline", "empty", "--name", "b")
    assert done.returncode == 3 and not (workplace / "runs" / "b").exists()


def test_a_verdict_that_cannot_be_kept_is_printed(launch: Launch, workplace: Path) -> None:
    run = write_run(workplace / "runs" / "a")
    (run / "accept.json").mkdir()
    done = launch("accept", "a")
    assert done.returncode == 0 and done.stdout.startswith("PASS") and "could not be saved" in done.stderr
    assert not list(run.glob(".accept*"))


def test_the_page_shows_what_is_printed(launch: Launch, workplace: Path) -> None:
    page = (ROOT / "docs" / "accept.md").read_text(encoding="utf-8")
    speeds = [17930.0 + 10 * n for n in range(-4, 5)]
    write_run(workplace / "runs" / "nightly", speeds)
    write_run(workplace / "runs" / "after-driver", (*speeds[:-1], 16100.0))
    for command in ("accept nightly", "accept after-driver", "compare nightly after-driver"):
        assert f"$ launcher {command}\n{launch(*command.split()).stdout}" in page


def test_submitting_warns_where_nothing_compares(launch: Launch, workplace: Path) -> None:
    """The submission itself: a local run with a Python that has no torch, so that it fails its check at once."""
    done = launch("accept", "--local", "--recipe", "debug", "--gpu", "cpu", "--python", "/bin/false", "--name", "a")
    assert "no result for CPU to compare with" in done.stderr and "a: job " in done.stderr
    assert done.returncode == 12 and done.stdout.startswith("FAIL  a: ")
    assert json.loads((workplace / "runs" / "a" / "accept.json").read_text())["verdict"] == "FAIL"
