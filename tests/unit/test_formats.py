"""Results as a terminal, a README, a spreadsheet and torchtitan's repository get them."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.report.page import page
from launcher.results import columns
from launcher.results.columns import Column, as_dict
from launcher.results.formats import csv_text, markdown, one_run, table
from launcher.results.outcome import Outcome, Startup
from launcher.results.published import rows_of, unlike
from launcher.results.submission import file_name, submissions
from tests.conftest import Launch
from tests.unit.outcomes import outcome
from tests.unit.test_read import Made, log

LAST = replace(outcome().series[-1], tflops=1038.4)
WHOLE = outcome(series=(*outcome().series[:-1], LAST))
SHORT = outcome(run="cut", step=40, state="FAILED", problems=("FAILED", "step 40 of 100"))


def test_one_run_has_its_row_and_below_it_the_rest() -> None:
    said = {"tps": 17000.0, "memory_gib": 150.0, "wall_s": 400.0, "node_hours": 1.0}
    shown = one_run(replace(WHOLE, prediction=said, wall_s=480.0, notes=("a note",))).splitlines()
    assert shown[2].startswith("|GB200   |9 (36 GPU)                   |5         |step: 100  loss:  6.6542")
    below = {line[:12].strip(): line[14:] for line in shown[6:]}
    assert all(len(line) <= 100 for line in shown[5:]), shown
    assert below["run"] == "titan-llama3-8b-0930, COMPLETED, 2026-11-20T09:30:00Z, crusoe"
    assert below["asked"] == "llama3-8b, 9 x 4 GB200, batch 5 x 8192 tokens (global 180), bfloat16, eager"
    assert below["tokens/s"] == "17,930 per GPU, quartiles 17,858..18,002, all 17,715..18,145, 81 values"
    assert below["MFU"] == "46.15% of 2250 TFLOP/s; also 42.38% of 2450, 41.54% of 2500"
    assert below["data"] == "1.2% of a step is waiting for data"
    assert below["start-up"] == "queue 12 s, container 38 s, node check 10 s, first step 95 s"
    assert below["slowest"] == "gb200-001: 17,890 tokens/s per GPU, 0.2% below the median"
    assert below["versions"].startswith("torch 2.14.1, torchtitan 0.2.2, CUDA 13.0, NCCL 2.28.9, driver 580")
    assert below["predicted"] == "1.00 node-hours, reached 1.20 (+20.0%)"  # the last of four
    assert {
        "  predicted   17,000 tokens/s per GPU, reached 17,930 (+5.5%)",
        "  predicted   150.0 GiB of memory, reached 159.3 (+6.2%)",
        "  predicted   400 s after the queue, reached 480 (+20.0%)",
    } <= set(shown)
    assert below["note"] == "a note"


def test_what_is_not_known_is_not_there() -> None:
    bare = outcome(versions={}, data_share=None, startup=Startup(), by_node=WHOLE.by_node[:1], tflops=None)
    names = {line[:12].strip() for line in one_run(bare).splitlines()[6:]}
    assert names == {"run", "asked", "tokens/s", "memory"}
    some = one_run(outcome(startup=Startup(queue_s=3.0)))
    assert "queue 3 s (container, node check, first step not known)" in some


def test_a_prediction_is_not_judged_by_half_a_run() -> None:
    shown = one_run(replace(SHORT, prediction={"tps": 17000.0, "memory_gib": True, "node_hours": 3}))
    assert "predicted   17,000 tokens/s per GPU\n" in shown and "reached" not in shown
    assert "problem     step 40 of 100" in shown


def test_several_runs_are_a_line_each() -> None:
    lines = table([WHOLE, SHORT, outcome(gpu="H100", mfu_pct=None)]).splitlines()
    assert len(lines[0]) <= len(lines[1]) <= 100
    shown = "titan-llama3-8b-0930 9 x 4 GB200 5 x 8,192 17,930 ±0.4% 46.15% of 2250 159.3 GiB 6.6542"
    assert " ".join(lines[1].split()) == shown
    assert lines[2].endswith("  FAILED; step 40 of 100") and "17,930" not in lines[2]


def shape(**changes: Any) -> Outcome:
    return outcome(**{"series": WHOLE.series, **changes})


def test_markdown_has_the_published_columns_first() -> None:
    lines = markdown([WHOLE, SHORT]).splitlines()
    assert lines[0].startswith("|GPU Type|Compute nodes in training job|Batch size|Performance indicators at the last")
    assert {line.count("|") for line in lines} == {8}
    assert "|17,930 ±0.4%|46.15% of 2250|" in lines[2]
    assert "|step 40 of 100 (FAILED)  loss:" in lines[3] and "|not a result|not a result|" in lines[3]


@given(st.text(max_size=40), st.text(max_size=40))
def test_names_cannot_break_a_table(name: str, problem: str) -> None:
    for runs in ([shape(run=name, gpu=name)], [shape(run=name, problems=(problem,))]):
        lines = markdown(runs).splitlines()
        assert len(lines) == 3 and lines[2].replace("\\\\", "").replace("\\|", "").count("|") == 8
        assert "<" not in lines[2]
        assert len(table(runs).splitlines()) == 2
        rows = list(csv.reader(io.StringIO(csv_text(runs))))
        assert len(rows) == 2 and len(rows[0]) == len(rows[1])
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in rows[1])
        assert "\x1b" not in one_run(runs[0])


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1+1", '=HYPERLINK("http://x","y")'])
def test_a_spreadsheet_runs_nothing(name: str) -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text([shape(run=name, versions={"driver": name})])))
    assert row["run"] == row["driver"] == f"'{name}"


def test_a_csv_of_ours_is_a_baseline() -> None:
    """It says what was trained, so that like can be told from unlike."""
    (row,) = rows_of(csv_text([WHOLE]), "x.csv")
    assert unlike(WHOLE, row) == [] and row.tps is not None and row.tps.median == 17930.0
    for changes, why in (
        ({"settings": {"recipe.tensor_parallel": 2}, "global_batch_size": 90}, "tensor parallel degree 1, not 2"),
        ({"global_batch_size": 360}, "1 batches a step and GPU, not 2"),
        ({"settings": {"recipe.async_tensor_parallel": True}}, "async tensor parallel false, not true"),
        ({"settings": {"recipe.like_for_like": False}}, "like_for_like true, not false"),
    ):
        other = shape(**changes)
        (row,) = rows_of(csv_text([other]), "x.csv")
        assert unlike(other, row) == [] and any(why in reason for reason in unlike(WHOLE, row)), why
    (row,) = rows_of(csv_text([shape(settings={"job.init_from": "/data/models/x"})]), "x.csv")
    assert row.settings["job.init_from"] == "/data/models/x"


def test_csv_has_every_figure_as_a_number() -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text([WHOLE])))
    expected = {"complete": "true", "problems": "", "tps_median": "17930.0", "tps_q1": "17858.28", "tps": "17930.0"}
    expected |= {"queue_s": "12.0", "torch": "2.14.1", "mfu_pct_at": "42.38 of 2450; 41.54 of 2500"}
    assert expected.items() <= row.items()
    (row,) = csv.DictReader(io.StringIO(csv_text([shape(problems=("a", "b"), data_share=None)])))
    assert (row["complete"], row["problems"], row["data_share"]) == ("false", "a; b", "")
    assert csv_text([]) == "\n"


# --- a column ------------------------------------------------------------------------------------------------


def test_one_entry_is_a_column_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Column("watts", lambda o: 1000.0 * o.nodes, title="Power", unit=" W")
    monkeypatch.setattr(columns, "COLUMNS", (*columns.COLUMNS, made))
    assert as_dict(WHOLE)["watts"] == 9000.0
    (row,) = csv.DictReader(io.StringIO(csv_text([WHOLE])))
    assert row["watts"] == "9000.0"
    assert "Power" in table([WHOLE]).splitlines()[0] and "9,000 W" in table([WHOLE])
    assert "|Power|" in markdown([WHOLE]) and "|9,000 W|" in markdown([WHOLE])
    shown = page([WHOLE], [], made="now", version="1")
    assert '<th scope="col" class="n">Power</th>' in shown and 'data-v="9000.0">9,000 W</td>' in shown


# --- torchtitan's benchmarks folder ------------------------------------------------------------------------------


def test_a_submission_says_what_its_readme_asks_for() -> None:
    titan, job = {"titan.training.max_norm": "2.0"}, {"job.account": "secret-project", "job.runs_dir": "/home/u"}
    whole = shape(settings={**titan, **job, "env.X": "`"})
    ((name, text),) = submissions([whole], "My Team_1").items()
    assert name == "llama3-8b_36xgb200_202611_my-team-1.md"
    assert "My Team_1" in text and "36 GB200, 4 in each of 9 nodes" in text and "580.95.05" in text
    assert "| 17,930 ±0.4% | 46.15% of 2250 | 159.3 GiB |" in text and "42.38% of 2450 TFLOP/s" in text
    for version in whole.versions.values():
        assert version in text
    found = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert found["recipe"]["activation_checkpoint"] == "selective" and found["env"]["X"] == "`"
    assert found["titan"]["training"]["max_norm"] == "2.0" and found["job"]["nodes"] == 9
    assert "secret-project" not in text and "/home/u" not in text and "/data/" not in text
    assert "own sample of text" not in text
    assert "own sample of text" in submissions([shape(settings={"job.data": "sample"})], "me").popitem()[1]


def test_runs_on_the_same_hardware_share_a_file() -> None:
    again = shape(run="again", date="2026-11-30T09:30:00Z")
    files = submissions([WHOLE, again, shape(run="small", nodes=3)], "me")
    assert "on 2026-11-20, 2026-11-30." in files["llama3-8b_36xgb200_202611_me.md"]
    assert {name: text.count("```toml") for name, text in files.items()} == {
        "llama3-8b_36xgb200_202611_me.md": 2,
        "llama3-8b_12xgb200_202611_me.md": 1,
    }


def test_what_is_not_a_result_is_not_submitted() -> None:
    with pytest.raises(LauncherError, match=r"cut cannot be submitted.*FAILED; step 40 of 100") as caught:
        submissions([WHOLE, SHORT], "me")
    assert caught.value.status == ExitStatus.NO_DATA
    for entity in ("", "  ", "/"):
        with pytest.raises(LauncherError, match="needs the name"):
            submissions([WHOLE], entity)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=20))
def test_a_file_name_is_one(model: str, gpu: str, entity: str) -> None:
    name = file_name(shape(gpu=gpu, date="", settings={"recipe.model": model}), entity)
    assert name.count("_") == 3 and name.endswith(".md") and "/" not in name and not name.startswith(".")


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def runs(workplace: Path) -> Path:
    for number, name in enumerate(("gb200-a", "gb200-b", "other")):
        made = Made(workplace / "runs" / name)
        made.change("intent.json", at=1795331400.0 + number)
    return workplace / "runs"


def test_which_runs(launch: Launch, runs: Path) -> None:
    assert json.loads(launch("results", "--json").stdout)["run"] == "other"  # the newest
    every = json.loads(launch("results", "--all", "--json").stdout)
    assert [row["run"] for row in every] == ["other", "gb200-b", "gb200-a"]
    both = launch("results", "other", str(runs / "gb200-a"), "other", "--json").stdout
    assert [row["run"] for row in json.loads(both)] == ["other", "gb200-a"]
    assert len(launch("results", "--all").stdout.splitlines()) == 4
    assert "step: 100" in launch("results").stdout
    by_pattern = json.loads(launch("results", "gb200-*", "--format", "json").stdout)
    assert [row["run"] for row in by_pattern] == ["gb200-b", "gb200-a"]
    for arguments in ("x*", "other none"):
        assert launch("results", *arguments.split()).returncode == ExitStatus.NOT_FOUND
    for arguments in ("--all other", "-o .", "--update x"):
        assert launch("results", *arguments.split()).returncode == ExitStatus.USAGE


def test_runs_of_the_same_name_are_told_apart(launch: Launch, runs: Path, workplace: Path) -> None:
    again = Made(workplace / "more" / "other")
    again.write("end.json", {"exit_code": 1})
    found = json.loads(launch("results", "other", str(again.path), "--json").stdout)
    assert [row["state"] for row in found] == ["COMPLETED", "FAILED"]


def test_damaged_runs_are_left_out_aloud(launch: Launch, runs: Path) -> None:
    (runs / "other" / "job" / "node.json").unlink()
    (runs / "other" / "run.toml").unlink()
    done = launch("results", "--all", "--format", "csv")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert "state unknown: other (COMPLETED)" in done.stderr
    assert launch("results", "other").returncode == ExitStatus.NO_DATA


def test_a_submission_is_written_but_not_over_another(launch: Launch, runs: Path, workplace: Path) -> None:
    submit = ("results", "other", "--format", "torchtitan")
    assert "--entity" in launch(*submit).stderr
    shown = launch(*submit, "--entity", "me")
    assert shown.stderr == "llama3-8b_8xgb200_202611_me.md:\n" and shown.stdout.startswith("This was run by me")
    for _ in range(2):
        done = launch(*submit, "--entity", "me", "-o", "out")
        assert done.stdout == "out/llama3-8b_8xgb200_202611_me.md\n"
    path = workplace / "out" / "llama3-8b_8xgb200_202611_me.md"
    assert path.read_text() == shown.stdout
    path.write_text("edited")
    assert launch(*submit, "--entity", "me", "-o", "out").returncode == ExitStatus.EXISTS
    assert path.read_text() == "edited"


def test_a_name_that_no_terminal_can_show(launch: Launch, runs: Path) -> None:
    made = Made(runs / "evil\x1b[31m|<b>\udc80")
    made.change("job/node.json", profile={"gpu": "=cmd|<script>", "gpus_per_node": 4}, job={"recipe": "\x1b]0;x\x07"})
    made.write("logs/0000-a.log", log())
    for form in ("text", "markdown", "csv", "json"):
        for which in (("--all",), ()):
            done = launch("results", *which, "--format", form)
            assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
            assert form != "markdown" or "<script>" not in done.stdout
            assert form != "csv" or ",=" not in done.stdout
