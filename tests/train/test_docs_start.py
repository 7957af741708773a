"""The commands of the docs' first page, typed as they stand, train for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_start_on_this_machine(workplace: Path) -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"(?:^    .+\n)+", page, re.MULTILINE) if "--local" in block)
    (workplace / "launcher").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
    (workplace / "launcher").chmod(0o755)
    env = os.environ | {"PATH": f"{workplace}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", block], cwd=workplace, env=env, capture_output=True, text=True, errors="backslashreplace"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 20/20" in done.stdout and "COMPLETED" in done.stdout and "|step: 20  loss:" in done.stdout
    assert (workplace / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
