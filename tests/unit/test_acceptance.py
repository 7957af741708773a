"""`launcher accept --report`: one page to hand over, what is on it, and what it never overwrites."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.base.output import plain
from launcher.report.acceptance import acceptance
from launcher.results.accept import judge
from launcher.results.outcome import NodeCheck, Outcome
from launcher.results.published import published
from launcher.results.read import node_checks
from launcher.runs.directory import Run
from tests.browser.sample_runs import MARKUP
from tests.conftest import Launch
from tests.unit.outcomes import INPUTS, nodes, outcome, write_run
from tests.unit.test_report import Parsed


def made(result: Outcome | None, checks: dict[str, NodeCheck] | None = None, **inputs: Any) -> str:
    verdict = judge(result, published(), losses=published(), state="CANCELLED")
    name = result.run if result else "gone"
    return acceptance(name, name, result, verdict, INPUTS | inputs, checks or {})


def rows(text: str, section: str) -> list[list[str]]:
    part = re.search(rf'<section aria-labelledby="{section}">.*?</section>', text, re.DOTALL)
    assert part, section
    cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in part[0].split("<tr>")[1:])
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_what_was_measured_under_which_conditions_against_what() -> None:
    text = made(outcome(versions={**outcome().versions, "digest": "sha256:ab"}))
    assert "<h1>Acceptance of crusoe: 9 x 4 GB200, 2026-11-22</h1>" in text and ">PASS</span>" in text
    conditions = dict(rows(text, "conditions"))
    assert conditions["Image SHA-256"] == "sha256:ab" and conditions["NVIDIA driver"] == "580.95.05"
    assert conditions["Limits"] == "at least 95% of the baseline; a node at most 5% slower than the others"
    assert conditions["Nodes"] == "9 x 4 GB200, cluster crusoe"
    assert rows(text, "figures")[:2] == [
        ["Figure", "This run", "published (Crusoe, 9 x GB200)"],
        ["Tokens/s per GPU", "17,930 ±0.4%", "17,975 step 100"],
    ]
    assert '<a href="https://github.com/crusoecloud/torchtitan">' in text
    assert "recipe.flavor" in text and "<dt>job.data" not in text, "where somebody keeps things is not handed over"


def test_each_node_has_its_speed_and_what_its_check_found_failed_ones_first() -> None:
    checks = {
        "gb200-002": NodeCheck(True, ("little space",), {"product_tflops": 1650.25}),
        "gb200-003": NodeCheck(False, ("GPU 2: ECC errors",)),
        "gb200-009": NodeCheck(None),
    }
    assert rows(made(outcome(by_node=nodes(100.0, 90.0, 101.0)), checks), "nodes")[1:] == [
        ["gb200-003", "101", "+6.3%", "", "failed; GPU 2: ECC errors"],
        ["gb200-002", "90", "−10.4%", "1,650", "passed; little space"],
        ["gb200-001", "100", "+4.7%", "", "not recorded"],
        ["gb200-009", "", "", "", "not recorded"],
    ]


def test_the_commands_repeat_the_question_as_it_was_asked() -> None:
    usual, other = made(outcome()), made(outcome(), threshold=0.9, max_spread=0.1, baseline="a b")
    assert "<code>launcher accept titan-llama3-8b-0930</code>" in usual
    assert "run.toml --name titan-llama3-8b-0930-again</code>" in usual
    assert "--gpu gb200 --nodes 9 --recipe llama3-8b</code>" in usual
    local = made(outcome(cluster="local", settings={"job.image": ""}))
    assert "<code>launcher accept --local --data /data/c4 --gpu gb200 --nodes 9 --recipe llama3-8b</code>" in local
    assert other.count("--threshold 90% --max-spread 10% --baseline &#39;a b&#39;</code>") == 3


def test_a_run_without_a_result_has_a_report_all_the_same() -> None:
    text = made(None)
    assert "CANNOT SAY" in text and "Acceptance of gone" in text and 'id="nodes"' not in text


def test_no_name_is_markup() -> None:
    def named(name: str) -> Parsed:
        own = outcome(run=name, cluster=name, versions={"image": name}, settings={"env.A": name, "job.image": name})
        return Parsed(made(own, {name: NodeCheck(True, (name,))}, baseline=name))

    assert named(MARKUP).elements == named("NAME").elements
    assert plain(MARKUP) in "".join(named(MARKUP).text)


def test_a_check_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    record = {
        "ok": "yes",
        "problems": [{"what": "a"}, {"why": 1}, 3],
        "warnings": 5,
        "speed": [{"product_tflops": 5.0}, {"product_tflops": 4.0, "copy_gbs": "fast"}, None],
        "allreduce_node_gbs": 1e99,
    }
    run = write_run(tmp_path / "a")
    (run / "nodes" / "0000-gb200-001.json").write_text(json.dumps(record))
    assert node_checks(Run(run))["gb200-001"] == NodeCheck(None, ("a",), {"product_tflops": 4.0})


def test_the_command_writes_it_and_overwrites_only_its_own(launch: Launch, workplace: Path) -> None:
    write_run(workplace / "runs" / "good", (17930.0,) * 3)
    done = launch("accept", "good", "--report", "handed.html")
    assert done.returncode == 0 and done.stdout.startswith("PASS") and "report: handed.html" in done.stderr
    done = launch("accept", "good", "--report", "handed.html", "--threshold", "99%", "--json")
    assert done.returncode == 12 and json.loads(done.stdout)["report"] == "handed.html"
    text = (workplace / "handed.html").read_text()
    assert ">FAIL</span>" in text and "<dt>try</dt><dd><code>launcher compare good published</code>" in text
    launch("report", "-o", "page.html")
    (workplace / "newest.html").symlink_to("handed.html")
    assert launch("accept", "good", "--report", "newest.html").returncode == 0
    assert (workplace / "newest.html").is_symlink() and ">PASS</span>" in (workplace / "handed.html").read_text()
    for file in ("page.html", "runs"):
        assert launch("accept", "good", "--report", file).returncode == 5
    assert 'content="titan-launcher report"' in (workplace / "page.html").read_text()


@pytest.mark.parametrize("before", ["submitting", "judging"])
def test_a_report_that_cannot_be_written_is_told_first(launch: Launch, workplace: Path, before: str) -> None:
    write_run(workplace / "runs" / "good")
    asked = ["good"] if before == "judging" else ["--local", "--recipe", "debug", "--gpu", "cpu", "--name", "b"]
    done = launch("accept", *asked, "--report", "no/such.html")
    assert done.returncode == 7 and "mkdir -p no" in done.stderr and not done.stdout
    assert not (workplace / "runs" / "b").exists() and not (workplace / "runs" / "good" / "accept.json").exists()
