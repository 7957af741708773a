"""The lowest click that pyproject.toml allows does as the newest, which every other test has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TESTS = ("tests/unit/test_commands.py", "tests/unit/test_exit_status.py", "tests/unit/test_terminal.py", "tests/golden")


def test_the_lowest_click(tmp_path: Path) -> None:
    found = re.search(r'"click>=([\d.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--target", str(tmp_path), f"click=={found[1]}.0"], check=True)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
