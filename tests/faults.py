"""Runs the test of every fault in faults.toml and writes what came of it into docs/faults.md: python -m tests.faults

The cluster's need a Docker engine and root, as `make test` does; without them they are not run, and the table says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
TITLES = {"submitting": "Submitting and asking", "running": "While a run goes on", "staging": "Staging"}
Faults = Mapping[str, list[dict[str, str]]]


def faults() -> Faults:
    return tomllib.loads(Path(__file__).with_name("faults.toml").read_text(encoding="utf-8"))


def outcomes(tests: list[str]) -> dict[str, str]:
    """What came of each test, all its cases together: "held", "not run" or "FAILED"."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT)
        cases = xml.parse(report).getroot().iter("testcase")
        found: dict[str, Any] = {}
        for case in cases:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
            failed = case.find("failure") is not None or case.find("error") is not None
            word = "FAILED" if failed else "not run" if case.find("skipped") is not None else "held"
            found.setdefault(name, []).append(word)
    order = ("FAILED", "held", "not run")
    return {test: next((word for word in order if word in found.get(test, [])), "not run") for test in tests}


def page(rows: Faults, came: Mapping[str, str], day: str) -> str:
    lines = ["# Faults", ""]
    lines += [
        "What was broken on purpose, what is promised then, and whether it held. `python -m tests.faults` runs the"
    ]
    lines += [f"tests named here and writes this page; this one is of {day}.", ""]
    lines += ["Runs that are broken in the middle of training have [a page of their own](fault-campaign.md).", ""]
    for key, title in TITLES.items():
        lines += [
            f"## {title}",
            "",
            "| fault | how it is injected | promised | outcome | test |",
            "|---|---|---|---|---|",
        ]
        for row in rows[key]:
            name = row["test"].partition("::")[2]
            link = f"[{name}](../{row['test'].partition('::')[0]})"
            lines.append(f"| {row['fault']} | {row['how']} | {row['promise']} | {came[row['test']]} | {link} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    rows = faults()
    came = outcomes([row["test"] for table in rows.values() for row in table])
    PAGE.write_text(page(rows, came, datetime.now(UTC).date().isoformat()), encoding="utf-8")
    sys.exit("FAILED" in came.values())
