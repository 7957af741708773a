"""The page in a real Chromium: quiet, alone, usable by mouse, keyboard and screen reader, on a phone and on paper.

Screenshots are left in pytest's temporary directory (LAUNCHER_SCREENSHOTS=DIR puts them there) for people to look at.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.report import svg
from launcher.report.acceptance import acceptance
from launcher.report.page import page as make_page
from launcher.results.accept import judge
from launcher.results.outcome import NodeCheck
from launcher.results.published import published
from tests.browser.sample_runs import MARKUP, sample
from tests.unit.outcomes import INPUTS, nodes, outcome

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
ROWS = 24  # of the table: 12 runs, and the published ones of their GPUs, model and sequence length
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Chromium refuses to build its sandbox as root; the page is our own.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = os.environ.get("LAUNCHER_SCREENSHOTS")
    folder = Path(wanted) if wanted else tmp_path_factory.mktemp("page")
    folder.mkdir(parents=True, exist_ok=True)
    text = make_page(sample(), published(), made="2026-11-22 12:00 UTC", version="1", left_out=[("x<y", "RUNNING")])
    (folder / "page.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Open]:
    """Opens the page. Afterwards nothing may have been said on the console or asked from anywhere."""
    contexts, complaints, requests = [], [], []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": DESK, **options}))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((folder / "page.html").as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) <= {(folder / "page.html").as_uri()}


def column(tab: Any, name: str) -> list[str]:
    """What the visible rows of the table of runs have in a column, from top to bottom."""
    heads = [re.sub(r"\W+$", "", text) for text in tab.locator("#table thead th").all_inner_texts()]
    cells = tab.locator(f"#table tbody tr:visible > :nth-child({heads.index(name) + 1})")
    return [text.split("\n")[0].strip() for text in cells.all_inner_texts()]


def head(tab: Any, name: str) -> Any:
    return tab.get_by_role("columnheader").get_by_role("button", name=name, exact=True)


def test_it_is_quiet_alone_and_shows_names_as_text(opened: Open) -> None:
    tab = opened()
    assert tab.title() == "crusoe, 2026-11-22"
    assert MARKUP in tab.locator("#table tbody th").all_inner_texts()
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1


def test_the_policy_stops_what_would_run_or_be_fetched(browser: Any, folder: Path) -> None:
    """Should markup ever get through, it still could not do anything."""
    tab = browser.new_context().new_page()
    failed: dict[str, str] = {}
    tab.on("requestfailed", lambda request: failed.update({request.url: request.failure}))
    text = (folder / "page.html").read_text(encoding="utf-8")
    evil = (
        "<script>document.title='run'</script><img src=https://example.invalid/a.png onerror=\"document.title='run'\">"
    )
    (folder / "evil.html").write_text(text.replace("<header>", f"<header>{evil}"), encoding="utf-8")
    tab.goto((folder / "evil.html").as_uri())
    assert tab.title() == "crusoe, 2026-11-22"
    assert failed == {"https://example.invalid/a.png": "csp"}
    tab.context.close()


def test_a_click_sorts_numbers_as_numbers_and_says_so(opened: Open) -> None:
    tab = opened()
    head(tab, "Tokens/s per GPU").click()
    rates = [float(text.replace(",", "")) for text in column(tab, "Tokens/s per GPU") if text]
    assert rates == sorted(rates, reverse=True) and len(rates) == ROWS - 1
    assert column(tab, "Tokens/s per GPU")[-1] == "", "a run without a figure comes last"
    assert tab.get_by_role("columnheader", name="Tokens/s per GPU").get_attribute("aria-sort") == "descending"
    head(tab, "Tokens/s per GPU").click()
    rates = [float(text.replace(",", "")) for text in column(tab, "Tokens/s per GPU") if text]
    assert rates == sorted(rates) and column(tab, "Tokens/s per GPU")[-1] == ""
    assert tab.get_by_role("status").inner_text() == f"{ROWS} of {ROWS} rows, sorted by Tokens/s per GPU, ascending"
    head(tab, "Run").click()
    assert column(tab, "Run").index("gb200-3n-1116") < column(tab, "Run").index("gb200-17n-1121"), "3 is before 17"
    assert tab.locator("[aria-sort]").count() == 1


def test_the_filter_hides_rows_and_what_belongs_to_them(opened: Open) -> None:
    tab = opened()
    tab.get_by_label("Show rows that contain").fill("GB200 incomplete")
    assert column(tab, "Run") == ["gb200-9n-nan", "gb200-17n-cut-short", "gb200-17n-failed"]
    assert tab.get_by_role("status").inner_text() == f"3 of {ROWS} rows"
    drawn = tab.locator("figure").nth(1).locator("g[data-run]:visible, li[data-run]:visible")
    assert set(drawn.evaluate_all("all => all.map(one => one.dataset.run)")) == {"4", "5"}
    assert tab.locator("details.strip:visible").count() == 2
    tab.get_by_label("Show rows that contain").fill("no such run")
    assert column(tab, "Run") == [] and tab.get_by_role("status").inner_text() == f"0 of {ROWS} rows"
    tab.get_by_label("Show rows that contain").fill("")
    assert len(column(tab, "Run")) == ROWS and tab.locator("[data-run][hidden]").count() == 0


def test_the_keyboard_reaches_everything(opened: Open) -> None:
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to content"
    assert tab.locator(".skip").bounding_box()["x"] >= 0
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "filter"
    tab.keyboard.type("h100")
    assert len(column(tab, "Run")) == 11, "two runs, and the published rows of H100"
    tab.keyboard.press("Tab")  # the table's own scrolling
    assert tab.evaluate("document.activeElement.className") == "scroll"
    tab.keyboard.press("Tab")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    assert tab.locator("th[aria-sort]").inner_text().startswith("Run")
    tab.keyboard.press("Space")
    assert tab.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_what_a_screen_reader_hears(opened: Open) -> None:
    tab = opened()
    assert tab.locator("html").get_attribute("lang") == "en"
    assert [tab.locator(f"h{level}").count() for level in (1, 2)] == [1, 8]
    assert tab.get_by_role("img", name="Scaling of GB200, tokens/s per GPU over GPUs").count() == 1
    unnamed = "all => all.filter(one => !one.labels?.length && !one.textContent.trim()).length"
    assert tab.locator("button, input, a, summary").evaluate_all(unnamed) == 0
    ids = tab.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    named = "all => all.flatMap(one => one.getAttribute('aria-labelledby').split(' '))"
    assert set(tab.locator("[aria-labelledby]").evaluate_all(named)) <= set(ids)
    tab.locator("summary", has_text="As numbers").nth(1).click()
    assert tab.get_by_role(
        "region", name="Throughput of GB200, llama3-8b, batch 5, bfloat16, tokens/s per GPU, as numbers"
    ).is_visible()


def test_without_javascript_everything_is_there_and_nothing_is_dead(opened: Open) -> None:
    tab = opened(java_script_enabled=False)
    assert tab.locator("#table tbody tr").count() == ROWS
    assert tab.locator("button").count() == 0 and not tab.locator("input").is_visible()
    assert tab.locator("figure svg[role=img]").count() == 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened: Open, folder: Path, scheme: str) -> None:
    tab = opened(color_scheme=scheme)
    assert tab.evaluate(CONTRAST) == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    tab.screenshot(path=folder / f"{scheme}.png", full_page=True)


def test_a_phone_scrolls_tables_but_never_the_page(opened: Open, folder: Path) -> None:
    tab = opened(viewport=PHONE, device_scale_factor=2, has_touch=True)
    tab.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    size = tab.locator("figure svg .axes text").first.bounding_box()["height"]
    assert size >= 9, "a tick's text is large enough to be read"
    tab.screenshot(path=folder / "phone.png", full_page=True)


def test_on_paper(opened: Open, folder: Path) -> None:
    tab = opened(color_scheme="dark")
    paper = tab.pdf(path=folder / "page.pdf", prefer_css_page_size=True)
    assert paper.startswith(b"%PDF") and paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") >= 3
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "ink is not wasted"
    assert not tab.locator("#filter").is_visible()


def test_the_table_fits_a_usual_screen(opened: Open) -> None:
    tab = opened()
    of_scroll = "one => [one.scrollWidth, one.clientWidth]"
    needed, there = tab.locator("#table").locator("..").evaluate(of_scroll)
    assert needed <= there, "MFU, date and all else are seen at 1280 pixels"


def test_what_all_rows_share_is_still_found_by_the_filter(opened: Open) -> None:
    tab = opened()
    assert "Cluster" not in tab.locator("#table thead").inner_text()
    assert tab.locator("#common").inner_text() == "All rows: cluster crusoe."
    tab.get_by_label("Show rows that contain").fill("crusoe fail")
    assert len(column(tab, "Run")) == 4


def test_names_beside_a_chart_are_within_it_and_apart(browser: Any, tmp_path: Path) -> None:
    many = [replace(one, run=f"{one.run} {again}") for again in range(2) for one in sample()]
    (tmp_path / "page.html").write_text(make_page(many, published(), made="now", version="1"), encoding="utf-8")
    for viewport in (DESK, PHONE):
        tab = browser.new_page(viewport=viewport)
        tab.goto((tmp_path / "page.html").as_uri())
        for chart in tab.locator("figure > svg").all():
            boxes = chart.locator("text.mark").evaluate_all(
                "all => all.map((one) => one.getBBox()).map((b) => [b.x, b.y, b.width])"
            )
            assert all(x + width <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y, width in boxes), boxes
        tab.close()


def test_a_pointer_on_a_point_shows_its_value(opened: Open) -> None:
    tab = opened()
    chart = tab.locator("figure", has_text="Loss of GB200").locator("> svg")
    dot = chart.locator("circle.dot.new").nth(3)
    under = """one => {
      const box = one.getBoundingClientRect();
      return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).textContent;
    }"""
    dot.scroll_into_view_if_needed()
    assert re.search(r", step 30: \d\.\d{4}$", dot.evaluate(under))


def test_runs_are_cards_on_a_phone(opened: Open) -> None:
    tab = opened(viewport=PHONE)
    scroll = tab.locator("#table").locator("..")
    assert scroll.evaluate("one => one.scrollWidth <= one.clientWidth"), "nothing to be pushed aside"
    first = tab.locator("#table tbody tr").first
    assert first.bounding_box()["height"] > 100 and first.locator("td").nth(1).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_acceptance_report_is_read_anywhere(opened: Open, folder: Path, scheme: str) -> None:
    checks = {node.host: NodeCheck(True, ("words of its own",), {"copy_gbs": 3100.0}) for node in sample()[3].by_node}
    verdict = judge(sample()[3], published(), losses=published())
    text = acceptance("a", "a", sample()[3], verdict, INPUTS, checks)
    tab = opened(color_scheme=scheme, viewport=PHONE)
    (folder / "acceptance.html").write_text(text, encoding="utf-8")
    tab.set_content(text)
    assert tab.evaluate(CONTRAST) == []
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    paper = tab.pdf(path=folder / "acceptance.pdf", prefer_css_page_size=True)
    assert re.search(rb"/MediaBox \[0 0 59\d[.\d]* 84\d", paper), "A4, upright"


def test_a_thousand_nodes_fit(browser: Any, tmp_path: Path) -> None:
    many = outcome(by_node=nodes(*(17000.0 + number for number in range(1000))), nodes=1000)
    (tmp_path / "page.html").write_text(make_page([many], published(), made="now", version="1"), encoding="utf-8")
    tab = browser.new_page(viewport=PHONE)
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert tab.locator(".heat li").count() == 60
    tab.close()


# Texts whose contrast with what is behind them is below 4.5 (WCAG's AA for text), or 3 for large letters.
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = new Set();
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.getClientRects().length || one.closest("script, style, desc, title")) continue;
    const style = getComputedStyle(one);
    const front = light(rgb(one instanceof SVGElement ? style.fill : style.color));
    const back = light(behind(one));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) low.add(`${one.tagName}.${one.getAttribute("class")} ${ratio.toFixed(2)}`);
  }
  return [...low];
}"""
