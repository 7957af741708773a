"""The page and the plots: what is drawn from which runs, what is never drawn as complete, and names that are markup."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.output import plain
from launcher.report import svg
from launcher.report.charts import of_gpu
from launcher.report.figures import MOST_LINES, MOST_POINTS, differences, gpu_types, lines, scaling, thin, trends, work
from launcher.report.page import MOST_NODES, page
from launcher.report.plots import write_plots
from launcher.results.formats import markdown
from launcher.results.outcome import NodeResult, Outcome, Startup
from launcher.results.published import beside, published
from launcher.runs.attempts import Attempt
from tests.browser.sample_runs import MARKUP, run, sample
from tests.unit.outcomes import nodes, outcome, points, silent, spread


def rendered(*outcomes: Outcome, rows: list[Outcome] | None = None) -> str:
    return page(outcomes, published() if rows is None else rows, made="2026-11-22 12:00 UTC", version="1")


class Parsed(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, ...]] = []
        self.values: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.values += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# --- axes and lines -----------------------------------------------------------------------------------------


def texts(axis: svg.Axis) -> list[str]:
    return [text for _, text in axis.ticks]


def test_ticks_are_round_numbers_around_the_values() -> None:
    assert texts(svg.linear([17510, 18290], "")) == ["17,400", "17,600", "17,800", "18,000", "18,200", "18,400"]
    assert texts(svg.linear([0.5, 12.2], "")) == ["0", "5", "10", "15"]
    assert texts(svg.linear([5.9, 6.05], "")) == ["5.90", "5.95", "6.00", "6.05"]
    assert texts(svg.linear([10, 100], "", whole=True)) == ["0", "20", "40", "60", "80", "100"]
    assert texts(svg.linear([3, 4], "", whole=True)) == ["3", "4"]
    assert texts(svg.linear([math.nan], "")) == texts(svg.linear([0, 1], ""))
    assert texts(svg.counts([12, 36, 68, 36], "")) == ["12", "36", "68"]
    assert texts(svg.counts([1000, 1004, 4000], "")) == ["1,000", "4,000"], "too near to each other"


def test_labels_are_moved_apart_and_stay_within() -> None:
    assert svg.spread_out([50, 10, 51], 14, 0, 100) == [50, 10, 64]
    assert svg.spread_out([99, 98, 97], 14, 0, 100) == [100, 86, 72]
    assert svg.spread_out([1, 2, 3], 14, 0, 100) == [1, 15, 29]


@given(st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=5), st.booleans())
def test_every_axis_holds_its_values_and_has_a_few_different_ticks(values: list[float], whole: bool) -> None:
    axis = svg.linear(values, "", whole=whole)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert 1 <= len(axis.ticks) <= 9 and len(set(texts(axis))) == len(axis.ticks)


@pytest.mark.parametrize("lost", [0.0, 0.01, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 401, 5000])
def test_a_long_line_keeps_its_extremes_and_its_breaks(length: int, lost: float) -> None:
    random = Random(length)
    values = [math.nan if random.random() < lost else random.gauss(0, 1) for _ in range(length)]
    line = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(line)
    finite = [value for value in values if not math.isnan(value)]
    left = [value for _, value in kept if not math.isnan(value)]
    assert len(kept) <= MOST_POINTS and [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert bool(finite) == bool(left) and any(map(math.isnan, values)) == (len(left) < len(kept))
    if finite:
        assert (min(left), max(left), left[0], left[-1]) == (min(finite), max(finite), finite[0], finite[-1])


def test_nan_breaks_the_line_and_is_marked() -> None:
    values = (5.0, 4.0, math.nan, math.nan, 3.0, 2.0, math.inf, 1.0)
    line = svg.Drawn(tuple(enumerate(values, 1)), "c0", "1")
    chart = svg.chart([line], svg.linear([1, 8], "step"), svg.linear([1, 5], ""), "{:.0f}: {}".format, "x", "T", "D")
    root = ElementTree.fromstring(chart)
    by_class = {kind: [e for e in root.iter() if f"{kind} " in e.get("class", "")] for kind in ("line", "lost", "dot")}
    assert by_class["line"][0].get("d", "").count("M") == 2
    assert [e[0].text for e in by_class["lost"]] == [", 3: nan", ", 7: inf"], "where it begins is enough"
    assert len(by_class["dot"]) == 1, "the single value after the last NaN"
    assert [e.text for e in root.iter() if e.text and ": " in e.text][:2] == [", 1: 5.0", ", 2: 4.0"]
    assert root.get("role") == "img" and root[0].text == "T" and root[1].text == "D"


def test_a_diverged_loss_is_no_number_to_draw() -> None:
    (line,) = lines([outcome(series=points((5.0, math.inf, 1e200, 4.0)))], "GB200", "loss")
    assert [math.isnan(value) for _, value in line.points] == [False, True, True, False]


def test_throughput_leaves_step_1_out_and_draws_the_newest_runs() -> None:
    many = [outcome(run=f"r{number}") for number in range(MOST_LINES + 3)]
    drawn = lines(many, "GB200", "tps")
    assert [line.outcome.run for line in drawn] == [f"r{number}" for number in range(MOST_LINES)]
    assert {line.points[0][0] for line in drawn} == {10}
    notes = next(one.notes for one in of_gpu(many, [], "GB200", 0) if one.title.startswith("Throughput"))
    assert any("3 are not" in note for note in notes)


def test_a_loss_that_exploded_is_marked_and_stretches_no_axis() -> None:
    (loss,) = (
        one
        for one in of_gpu([outcome(series=points((12.0, 9.0, 8.0, 4000.0, math.nan, math.nan)))], [], "GB200", 0)
        if one.title.startswith("Loss")
    )
    assert (
        loss.chart.count('class="lost') == 1 and "step 30: off the chart" in loss.chart and ">4,000" not in loss.chart
    )
    assert ">50<" not in loss.chart, "no room for steps that were NaN"


def test_fewer_than_three_points_are_no_chart() -> None:
    assert of_gpu([outcome(series=points()[:2])], [], "GB200", 0) == []


def test_speed_over_time_is_a_share_of_published_for_each_number_of_nodes() -> None:
    runs = [
        outcome(run="a", date="2026-11-01T12:00:00Z", tps=spread(17975.0)),
        outcome(run="b", date="2026-11-03T00:00:00Z", tps=spread(17975.0 * 0.9)),
        outcome(run="c", date="2026-11-02T00:00:00Z", nodes=3, tps=spread(18284.0)),
        outcome(run="cut", problems=("TIMEOUT",)),
        outcome(run="undated", date=""),
    ]
    found, relative = trends(runs, published(), "GB200")
    assert relative and [(one.label.rpartition(", ")[2], [dot.run for dot in one.dots]) for one in found] == [
        ("on 9 nodes", [0, 1]),
        ("on 3 nodes", [2]),
    ]
    assert [dot.value for dot in found[0].dots] == pytest.approx([100, 90])
    figure = of_gpu(runs, published(), "GB200", 0)[0]
    assert figure.title == "Speed of GB200 over time, percent of published tokens/s"
    assert (
        ">01 Nov<" in figure.chart and "a, 2026-11-01: 100.0%" in figure.chart and "accept&#39;s limit" in figure.chart
    )
    found, relative = trends(runs, [], "GB200")
    assert not relative and found[0].dots[0].value == 17975.0


# --- scaling ------------------------------------------------------------------------------------------------


def test_only_complete_and_like_runs_make_a_scaling_line() -> None:
    runs = sample()
    ours = [group for group in scaling(runs, [], "GB200")]
    assert [group.label for group in ours] == ["llama3-8b, batch 5, bfloat16", "llama3-8b, batch 5, bfloat16, compiled"]
    names = {dot.name for group in ours for dot in group.dots}
    assert names == {one.run for one in runs if one.gpu == "GB200" and one.complete}
    assert list(ours[0].medians) == [(12, 18210), (36, (17960 + 16900) / 2), (68, 17590)]
    figure = of_gpu(runs, published(), "GB200", 0)[-1]
    assert any("Left out as incomplete: 3 runs" in note for note in figure.notes)
    assert not [row for row in figure.rows if "cut-short" in row[-1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {"torch": "2.13.0", "torchtitan": "0.2.2"}},
        {"settings": {"recipe.activation_checkpoint": "none"}},
        {"settings": {"env.NCCL_ALGO": "Ring"}},
        {"settings": {"titan.training.x": "1"}},
        {"global_batch_size": 360},
    ],
    ids=str,
)
def test_what_differs_in_a_step_is_not_joined(changes: dict[str, Any]) -> None:
    base = {"torch": "2.14.1", "torchtitan": "0.2.2"}
    small = outcome(nodes=3, versions=base)
    assert len(scaling([small, outcome(versions=base)], [], "GB200")) == 1
    groups = scaling([small, outcome(**{"versions": base, **changes})], [], "GB200")
    assert len({group.label for group in groups}) == 2


def test_one_size_is_no_scaling_unless_published_rows_have_others() -> None:
    assert scaling([outcome(), outcome()], [], "GB200") == []
    rows = beside([outcome()], published())
    assert [group.published for group in scaling([outcome()], rows, "GB200")] == [False, True]


@pytest.mark.parametrize("gpu", gpu_types(published()))
def test_rows_of_different_settings_are_no_scaling_line(gpu: str) -> None:
    """8B eager, compiled and float8, and 70B with and without async TP: each is a line or a dot of its own."""
    rows = [row for row in published() if row.gpu == gpu]
    groups = scaling([], published(), gpu)
    assert len({group.label for group in groups}) == len(groups)
    for group in groups:
        own = [row for row in rows for dot in group.dots if (dot.at, dot.value) == (row.gpus, row.median_tps)]
        kinds = {(tuple(work(row).items()), row.source, row.date, row.versions.get("driver")) for row in own}
        assert len(kinds) == 1 and len(own) == len(group.dots)
    dots = sum(len(group.dots) for group in groups)
    assert dots == (len(rows) if gpu != "GB300" else 0)


def test_rows_of_other_models_do_not_stand_beside_a_run() -> None:
    """70B's 600 tokens/s and what another framework reached say nothing of an 8B run."""
    run = outcome(gpu="H100")
    shown = beside([run], published())
    assert {(row.gpu, row.settings["recipe.flavor"], row.settings["framework"]) for row in shown} == {
        ("H100", "8B", "torchtitan")
    }
    assert "70B" not in rendered(run) and "NVIDIA performance" not in rendered(run)
    big = outcome(gpu="h100", settings={"recipe.flavor": "70B"})
    assert {row.settings["recipe.flavor"] for row in beside([run, big], published())} == {"8B", "70B"}


# --- nodes, start-up, settings ------------------------------------------------------------------------------


def test_nodes_are_measured_by_the_others_and_the_slowest_are_named() -> None:
    text = rendered(outcome(by_node=(*nodes(100.0, 90.0, 101.0), NodeResult("silent", None))))
    assert re.findall(r'<li class="h(\d)"><b>([^<]*)</b> <span>([^<]*)', text) == [
        ("0", "−10.4%", "gb200-002"),
        ("5", "+4.7%", "gb200-001"),
        ("6", "+6.3%", "gb200-003"),
    ]
    assert "1 slow node</strong>: 4 nodes, slowest gb200-002 at 90 (−10.4%)" in text and "1 without a figure" in text
    assert 'class="heat"' not in rendered(outcome(by_node=nodes(100.0)))
    many = outcome(by_node=nodes(*(17000.0 + number for number in range(1000, 0, -1))), nodes=1000)
    text = rendered(many)
    assert text.count('<li class="h') == MOST_NODES and "here the 60 slowest" in text


def test_an_unknown_phase_of_the_start_makes_the_sum_a_bound() -> None:
    text = rendered(outcome(startup=Startup(7200.0, 30.0, 10.0, 60.0)), outcome(startup=Startup(None, 30.0, None)))
    shown = re.findall(r'<td class="n">([^<]*)</td>', text.partition('id="startup"')[2])
    assert shown == ["2 h 00 min", "30 s", "10 s", "1 min 00 s", "2 h 01 min", "", "30 s", "", "", "≥ 30 s"]


def test_settings_that_differ_stand_apart_from_those_that_do_not() -> None:
    differing, shared = differences([outcome(), outcome(settings={"recipe.lr": 1e-3, "env.NEW": "1"})])
    assert dict(differing) == {"recipe.lr": ("0.0003", "0.001"), "env.NEW": (None, "1")}
    assert ("recipe.compile", "false") in shared and ("version.torch", "2.14.1") in shared


# --- the page -----------------------------------------------------------------------------------------------


def test_incomplete_and_published_rows_say_so() -> None:
    text = rendered(*sample())
    rows = dict(re.findall(r'<tr class="(\w+)"[^>]*><th scope="row"><span class="run">(gb200-\w+-cut[^<]*)', text))
    assert rows == {"incomplete": "gb200-17n-cut-short"}
    assert text.count('<tr class="published"') == len(beside(sample(), published())) > 0
    assert "the run ended TIMEOUT: step 40 of 100" in text and "12 torchtitan runs, 3 of them incomplete" in text
    assert len(re.findall(r"gb200-9n-nan \(incomplete\)</li>", text)) == 2


def test_the_policy_names_the_one_script_and_the_one_style() -> None:
    text = rendered(*sample())
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    (policy,) = (value for tag, name, value in Parsed(text).values if name == "content" and "default-src" in value)
    for source in (script, style):
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    fetched = re.sub(r'<a href="https://[^"]+">', "", text)  # a link is followed by a reader alone
    assert not re.search(r"https?:|//[a-z]|url\(|@import", fetched), "nothing is fetched"


TREACHEROUS = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(
        [MARKUP, "</title>", "--><script>", "{{ 7 * 7 }}", "]]>", "\x00\x1b[31m", "\u202e", "' onload='", "&lt;"]
    ),
)


@cache
def named(name: str, value: str) -> Parsed:
    """A page on which all that others write is one of the two."""
    odd = outcome(problems=(value,), notes=(value,), settings={"env.A": value}, by_node=nodes(1.0, 2.0, host=name))
    ours: dict[str, Any] = {"run": name, "gpu": name, "recipe": name, "cluster": value, "precision": f"p{value}"}
    first = replace(odd, **ours, state=f"x{value}", versions={value: name})
    rows = [replace(published()[0], run=f"{value} (x)", source=value, gpu=name)]
    runs = [first, outcome(gpu=name, precision=f"p{value}")]
    text = page(runs, rows, made="now", version="1", left_out=[(name, value)])
    assert all(character.isprintable() or character == "\n" for character in text)
    return Parsed(text)


@given(TREACHEROUS, TREACHEROUS)
def test_no_name_is_ever_markup(name: str, value: str) -> None:
    found = named(name, value)
    assert found.elements == named("NAME", "VALUE").elements
    assert plain(name) in "".join(found.text)


def test_two_hundred_long_runs_are_a_page_that_can_be_mailed() -> None:
    runs = [run(f"run-{number}", 9, 17900 + number, "2026-11-01T00:00:00Z", steps=4000) for number in range(200)]
    assert len(rendered(*runs)) < 1_000_000


def test_one_run_and_a_run_without_anything() -> None:
    text = rendered(silent(startup=Startup()), rows=[])
    assert "There is one run" in text and "<svg" not in text and 'id="nodes"' not in text


def test_on_cpus_rates_are_per_rank() -> None:
    gpus = [run(f"run-{number}", nodes, 17900, "2026-11-01T00:00:00Z") for number, nodes in enumerate((3, 9, 18))]
    cpus = [replace(one, gpu="CPU", settings={**one.settings, "profile.device": "cpu"}) for one in gpus]
    for runs, unit, other in ((gpus, "GPU", "rank"), (cpus, "rank", "GPU"), ([*gpus, *cpus], "GPU", "rank")):
        text = "".join(Parsed(rendered(*runs)).text)
        assert f"okens/s per {unit}" in text and "per gpu" not in text
        assert (f"okens/s per {other}" in text) == (len(runs) == 6)
    assert "Scaling of CPU, tokens/s per rank over GPUs" in rendered(*cpus)
    assert "|Tokens/s per rank|" in markdown(cpus) and "|Tokens/s per GPU|" in markdown(gpus)


def test_a_chart_says_where_a_run_began_anew() -> None:
    attempts = (Attempt(1, "", kept_step=20), Attempt(2, "", kept_step=60), Attempt(3, "", kept_step=100))
    texts = [chart.notes for chart in of_gpu([outcome(run="stubborn", attempts=attempts)], [], "GB200", 0)]
    assert texts and all("stubborn began anew after step 20 and 60." in notes for notes in texts)
    assert "began anew" not in rendered(outcome())


# --- plots --------------------------------------------------------------------------------------------------


def test_each_chart_of_the_page_is_a_file_with_all_its_words_whatever_the_names(tmp_path: Path) -> None:
    runs = [replace(one, run=f"_{one.run} $x_{{$ \n <b>表") for one in sample()]
    files = write_plots(runs, published(), tmp_path / "plots")
    assert sorted((tmp_path / "plots").iterdir()) == sorted(files)
    assert {path.stem.split("-")[0] for path in files} == {"trend", "throughput", "loss", "scaling"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert ElementTree.parse(path).getroot().tag.endswith("svg") and "var(" not in text
        assert "&lt;b&gt;表" in text and "<b>" not in text
    shown = "".join(ElementTree.parse(files[0]).getroot().itertext())
    figure = of_gpu(runs, published(), "GB200", 0)[0]
    said = (figure.title, *figure.notes, *(entry.text for entry in figure.legend))
    assert all(plain(text) in shown for text in said)
