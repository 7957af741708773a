"""What the page says of the cluster, and what its charts and plots must show for that."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from launcher.report.charts import of_gpu
from launcher.report.health import Answer, answers, health
from launcher.report.page import page
from launcher.report.table import table
from launcher.results.accept import Word, judge
from launcher.results.outcome import Outcome
from launcher.results.published import published
from tests.browser.sample_runs import run, sample
from tests.unit.outcomes import nodes, problems, spread

GOOD = [
    run("17n", 17, 17590, "2026-11-21T08:00:00Z"),
    run("9n", 9, 17960, "2026-11-20T08:00:00Z"),
    run("3n", 3, 18260, "2026-11-19T08:00:00Z"),
]


def answer(*outcomes: Outcome) -> Answer:
    (found,) = answers(health(outcomes, published()))
    return found


def finding(found: Answer, name: str) -> tuple[str, str]:
    (one,) = (one for one in found.findings if one.name == name)
    return one.word, " | ".join(one.texts)


def cells(*outcomes: Outcome, name: str) -> list[Any]:
    made = table(health(outcomes, published()), published())
    at = [title for title, _, _ in made.columns].index(name)
    return [row.cells[at] for row in made.rows if row.run is not None]


def rendered(*outcomes: Outcome) -> str:
    return page(outcomes, published(), made="now", version="1")


# --- the answer on top --------------------------------------------------------------------------------------


def test_a_good_cluster() -> None:
    found = answer(*GOOD)
    assert found.word is Word.PASS
    assert (found.headline, found.fix) == ("99.8 to 100% of published on 3, 9 and 17 nodes.", ("", ""))
    assert {one.word for one in found.findings} == {"ok"}


def test_a_slow_size_is_named_with_what_to_do() -> None:
    found = answer(replace(GOOD[0], tps=spread(15800.0, count=153)), *GOOD[1:])
    assert found.word is Word.FAIL and "Only 89.8% of published on 17 nodes." in found.headline
    assert found.headline.endswith("Otherwise 99.8 to 99.9% of published on 3 and 9 nodes.")
    assert found.fix == ("See what differs", "launcher compare 17n published")
    word, text = finding(found, "Speed")
    assert word == "FAIL" and "17 nodes: 89.8% of published" in text
    assert "slow only on more nodes" in text and "99.8 to 99.9% of published on 3 and 9 nodes" in text


def test_a_slow_node_is_named_until_a_newer_run_clears_it() -> None:
    slow = run("slow", 9, 17960, "2026-11-20T08:00:00Z", slow=0.9)
    found = answer(slow)
    assert found.word is Word.FAIL and found.headline.startswith("gb200-005 is 10% slower than its peers.")
    exclude = "launcher cluster nodes add gb200-005 --reason '10% slower than its peers'"
    assert found.fix == ("Exclude it", exclude)
    assert finding(found, "Nodes")[1].startswith("gb200-005: 9.6%")
    others = replace(slow, run="others", date="2026-11-21T08:00:00Z", by_node=nodes(*[17960.0] * 9, host="b"))
    assert answer(slow, others).word is Word.FAIL, "a newer run without that node says nothing of it"
    cleared = replace(others, by_node=nodes(*[17960.0] * 9))
    assert answer(slow, cleared).word is Word.PASS and answer(cleared, slow).word is Word.PASS


def test_a_newer_run_that_cannot_be_judged_does_not_hide_an_older_fault() -> None:
    slow = run("slow", 9, 15000, "2026-11-19T08:00:00Z")
    going = run("going", 9, 17900, "2026-11-20T08:00:00Z", state="RUNNING", problems=("still RUNNING",))
    assert answer(going, slow).word is Word.FAIL
    assert answer(going, GOOD[1], slow).word is Word.PASS, "the newest that could be judged"


def test_an_older_run_that_failed_is_history_behind_one_that_did_not() -> None:
    """Also where nothing published says how fast it should be."""
    whole = replace(GOOD[1], gpu="B300")
    failed = replace(whole, run="old", date="2026-11-01T08:00:00Z", state="FAILED", problems=problems("FAILED"))
    assert answer(failed).word is Word.FAIL
    assert answer(whole, failed).word is Word.CANNOT_SAY
    assert answer(replace(failed, date="2026-11-30T08:00:00Z"), whole).word is Word.FAIL


def test_a_node_that_was_cleared_on_another_size_leaves_no_word_without_a_reason() -> None:
    """FAIL always has a line that says why."""
    slow = run("slow", 3, 18260, "2026-11-20T08:00:00Z", slow=1.0)
    slow = replace(slow, by_node=nodes(16000.0, 18260.0, 18270.0))
    cleared = replace(GOOD[1], run="cleared", date="2026-11-21T08:00:00Z", by_node=nodes(*[17960.0] * 9))
    found = answer(cleared, slow)
    assert found.word is Word.PASS and {one.word for one in found.findings} == {"ok"}
    assert "on 3 and 9 nodes" in found.headline


def test_nodes_are_judged_by_runs_that_accept_judges() -> None:
    """Five logged steps are the fewest that say anything, and a cancelled run says nothing."""
    slow = run("x", 9, 17960, "2026-11-20T08:00:00Z", slow=0.9)
    for one in (
        replace(slow, tps=spread(17960.0, count=18)),
        replace(slow, state="CANCELLED", problems=problems("CANCELLED")),
    ):
        found = answer(one)
        assert found.word is Word.CANNOT_SAY and finding(found, "Nodes")[0] == "not measured"
        assert "of published on" not in finding(found, "Speed")[1]


def test_without_a_comparable_row_nothing_is_said() -> None:
    other = replace(GOOD[1], gpu="B300")
    found = answer(other)
    assert found.word is Word.CANNOT_SAY and "there is no result for B300" in found.headline
    assert finding(found, "Speed")[0] == "not measured"
    again = answer(other, replace(other, run="3n", nodes=3))
    assert finding(again, "Speed")[1].startswith("not judged: 3n, 9n: there is no result for B300")
    assert finding(again, "Ends and loss") == ("ok", "nothing wrong in 2 runs, the newest of each kind and size")
    assert not [text for one in found.findings for text in one.texts if "of published" in text]
    compiled = run("compiled", 9, 25000, "2026-11-20T08:00:00Z", compile=True)
    assert answer(compiled).word is Word.CANNOT_SAY
    assert "not judged: compiled: not like with like" in finding(answer(*GOOD, compiled), "Speed")[1]


def test_a_run_that_stood_still_is_slow_whatever_its_median() -> None:
    found = answer(replace(GOOD[1], overall_tps=15000.0))
    assert found.word is Word.FAIL and "Steps stood still in 9n." in found.headline
    word, text = finding(found, "Speed")
    assert word == "FAIL" and text.startswith("9n: 15,000 tokens/s per GPU over the whole time after warm-up")
    assert finding(found, "Ends and loss")[0] == "ok"


def test_a_failed_run_and_waiting_for_data_are_told() -> None:
    failed = run("failed", 9, 17900, "2026-11-21T08:00:00Z", state="FAILED", problems=("FAILED (exit code 1)",))
    found = answer(failed, *GOOD[::2])
    assert found.word is Word.FAIL and "Failed: failed." in found.headline
    assert found.fix == ("See why", "launcher logs failed")
    assert finding(found, "Ends and loss") == ("FAIL", "failed: the run ended FAILED (exit code 1)")
    hungry = replace(GOOD[1], data_share=0.063)
    assert answer(hungry).headline.endswith("on 9 nodes. Steps wait for data.")
    assert finding(answer(hungry), "Data")[0] == "look" and "6.3%" in finding(answer(hungry), "Data")[1]
    assert finding(answer(replace(hungry, data_share=None)), "Data")[0] == "not measured"


def test_a_run_that_failed_by_what_was_asked_of_it_is_not_held_against_the_cluster() -> None:
    own = run("own", 9, 17900, "2026-11-22T08:00:00Z", state="TIMEOUT", problems=("TIMEOUT",))
    found = answer(own, *GOOD)
    assert found.word is Word.PASS and found.headline.endswith("on 3, 9 and 17 nodes.")
    assert finding(found, "Runs that failed") == ("not counted", "own: the job reached its time limit")
    alone = answer(own)
    assert (alone.word, alone.headline) == (Word.CANNOT_SAY, "Not measured. Runs that failed: own.")
    assert alone.fix == ("See why", "launcher logs own") and "own" not in finding(alone, "Speed")[1]
    slow = replace(GOOD[1], tps=spread(15000.0))
    assert answer(own, slow).word is Word.FAIL, "it hides no older fault"
    unknown = replace(own, own_fault="")
    assert answer(unknown, *GOOD).word is Word.FAIL, "what is not known to be the run's fault may be the cluster's"


def test_clusters_have_an_answer_each() -> None:
    found = answers(
        health([GOOD[0], replace(GOOD[1], cluster="other", state="FAILED", problems=problems("FAILED"))], published())
    )
    assert [(one.name, one.word) for one in found] == [("GB200 on crusoe", "PASS"), ("GB200 on other", "FAIL")]


# --- the table ----------------------------------------------------------------------------------------------


def test_every_run_has_accepts_verdict_and_its_reason() -> None:
    runs = sample()
    rows = [row for row in table(health(runs, published()), published()).rows if row.run is not None]
    for row, one in zip(rows, runs, strict=True):
        verdict = judge(one, published(), losses=published())
        assert row.tags[0][1] == str(verdict.word)
        assert verdict.word is Word.PASS or verdict.reasons[0].what in row.why
    assert {row.name: row.brief for row in rows if row.brief} == {
        "gb200-9n-slow-node": "94.0% of published, 1 slow node",
        "gb200-9n-nan": "NaN or infinity",
        "gb200-17n-cut-short": "timeout, step 40 of 100",
        "gb200-9n-compiled": "nothing to compare with",
        "gb200-17n-failed": "failed, no step of 100 was logged",
    }
    text = rendered(*runs)
    assert text.count('class="tag fail">FAIL<') == 4 and 'class="tag cannot">CANNOT SAY<' in text
    assert 'class="tag complete"' not in text


def test_shares_slow_nodes_and_data_stand_in_columns() -> None:
    slow = run("slow", 9, 16180, "2026-11-20T08:00:00Z", slow=0.9)
    hungry = replace(slow, run="hungry", data_share=0.021, nodes=6, gpus=24, global_batch_size=120)
    assert [(cell.text, cell.more) for cell in cells(slow, hungry, name="Of published")] == [
        ("90.0%", "of 17,975"),
        ("90.0%", "of 17,975 on 9 nodes"),
    ]
    assert (
        cells(slow, name="Slowest node")[0].flag == "slow" and cells(slow, name="Slowest node")[0].more == "gb200-005"
    )
    assert [cell.flag for cell in cells(slow, hungry, name="Data wait")] == ["", "high"]
    assert 'class="tag flag">high<' in rendered(hungry)


def test_what_all_rows_share_is_said_once() -> None:
    made = table(health(GOOD, published()), published())
    names = [title for title, _, _ in made.columns]
    assert "Recipe" not in names and "Cluster" not in names and "Nodes" in names
    assert dict(made.common) == {"Recipe": "llama3-8b bfloat16", "Batch": "5 x 8,192", "Cluster": "crusoe"}
    runs = health([*GOOD, run("compiled", 9, 19000, "2026-11-18T08:00:00Z", compile=True)], published())
    other = table(runs, published())
    assert "Recipe" in [title for title, _, _ in other.columns] and "Recipe" not in dict(other.common)
    bare = [replace(one, mfu_pct=None, data_share=None) for one in GOOD]
    assert "Data wait" not in [title for title, _, _ in table(health(bare, published()), published()).columns]


def test_only_a_strip_with_a_slow_node_is_open_and_says_so() -> None:
    text = rendered(GOOD[1], run("old", 9, 17960, "2026-10-20T08:00:00Z", slow=0.9))
    strips = re.findall(r'<details class="strip"[^>]*?( open)?><summary><span class="run">([^<]*)</span>(.*?):', text)
    assert strips[-2] == ("", "9n", "")
    assert strips[-1][:2] == (" open", "old") and "slow node" in strips[-1][2]


def test_nodes_of_several_runs_stand_beside_each_other() -> None:
    """The slowest first, so that one sees since when a node is slow."""
    text = rendered(GOOD[1], run("old", 9, 17960, "2026-10-20T08:00:00Z", slow=0.9))
    matrix = re.search(r'<table class="matrix">.*?</table>', text, re.DOTALL)
    assert matrix and re.findall(r'title="(\w+)"', matrix[0]) == ["9n", "old"]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*)</tr>', matrix[0])
    assert rows[0][0] == "gb200-005" and re.findall(r'class="h(\d)"', rows[0][1]) == ["3", "0"]
    assert 'class="matrix"' not in rendered(GOOD[1])


# --- charts -------------------------------------------------------------------------------------------------


FAST = replace(run("fast", 9, 24000, "2026-11-18T08:00:00Z", compile=True), precision="bfloat16 + mxfp8")


def test_each_kind_of_run_has_its_own_throughput_chart_with_what_it_is_measured_by() -> None:
    figures = of_gpu([*GOOD, FAST], published(), "GB200", 0)
    usual, fast = (figure for figure in figures if figure.title.startswith("Throughput"))
    assert "fast" not in " ".join(row[0] for row in usual.rows) and fast.rows[0][0] == "fast"
    assert [entry.text for entry in usual.legend if "published" in entry.text] == [
        "published (Crusoe, 3 x GB200): 18,284",
        "published (Crusoe, 9 x GB200): 17,975",
        "published (Crusoe, 17 x GB200): 17,581",
    ]
    assert usual.chart.count('class="line published"') == 3 and "published" not in fast.chart


def test_every_axis_that_does_not_start_at_0_says_so() -> None:
    for gpu in ("GB200", "H100"):
        for figure in of_gpu(sample(), published(), gpu, 0):
            lowest = re.search(r'<path class="grid"[^>]*/><text[^>]*>([^<]*)<', figure.chart)
            assert lowest is not None and lowest[1] != "0"
            assert f"The vertical axis starts at {lowest[1]}, not at 0." in figure.notes
    from_0 = replace(GOOD[0], series=tuple(replace(point, loss=12.0 / point.step) for point in GOOD[0].series))
    (loss,) = (figure for figure in of_gpu([from_0], [], "GB200", 0) if figure.title.startswith("Loss"))
    assert not [note for note in loss.notes if "axis" in note]


def test_a_size_that_was_run_twice_has_two_dots() -> None:
    twice = [FAST, replace(FAST, run="again", tps=spread(23000.0))]
    scaling = of_gpu([*GOOD, *twice], published(), "GB200", 0)[-1].chart
    assert len(re.findall(r'<circle class="dot c1"', scaling)) == 2, "and none at their median"


def test_only_columns_that_are_there_are_explained() -> None:
    whole, lone = rendered(*GOOD), rendered(replace(GOOD[1], by_node=(), data_share=None, gpu="B300"))
    assert "Slowest node: against" in whole and "Data wait: the part" in whole and "Of published: as a share" in whole
    assert not any(
        text in lone for text in ("Slowest node: against", "Data wait: the part", "Of published: as a share")
    )
