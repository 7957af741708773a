"""The table of faults names tests that exist, and the page is made of it."""

from __future__ import annotations

import ast

from tests import faults
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
