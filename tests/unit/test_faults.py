"""The table of faults names tests that exist, and the page is made of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import faults
from tests.cluster.campaign import Case, Seen, note
from tests.conftest import ROOT


def test_every_fault_has_its_test_and_its_row() -> None:
    text = faults.PAGE.read_text(encoding="utf-8")
    rows = [row for table in faults.faults().values() for row in table]
    for row in rows:
        path, _, name = row["test"].partition("::")
        defined = {node.name for node in ast.parse((ROOT / path).read_text("utf-8")).body if hasattr(node, "name")}
        assert name in defined, row["test"]
        assert f"| {row['fault']} | {row['how']} | {row['promise']} | held | [{name}]" in text, row["fault"]
    assert text.count("| held |") == len(rows)


def test_the_campaign_counts_each_step_once_and_sees_what_is_repeated() -> None:
    first = tuple((step, 9.0 - step) for step in range(1, 7))
    second = tuple((step, 8.0 - step) for step in range(5, 9))
    seen = Seen("COMPLETED", ("killed", "requeued", ""), (), "", (first, (), second), 60)
    assert seen.kept == [*first[:4], *second]
    assert seen.repeated == 2


def test_the_campaign_writes_a_row_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setenv("LAUNCHER_TEST_FAULTS_TABLE", str(page))
    whole = Seen("COMPLETED", ("",), (), "", (((1, 8.0),),), 60)
    case = Case(lambda _: None, "killed|crashed", what="a fault")
    note("a", case, whole, whole, ["state FAILED"])
    note("b", case, whole, whole, [])
    assert "**state FAILED**" in page.read_text()
    note("a", case, whole, whole, [])
    assert page.read_text().splitlines()[2:] == [
        f"| {name} | a fault | COMPLETED after killed or crashed | COMPLETED | 1 | 0 | 0 |" for name in ("a", "b")
    ]
