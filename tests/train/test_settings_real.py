"""The lists of torchtitan's settings are those of the installed releases."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from launcher.preflight.settings import releases
from tests.conftest import ROOT
from tests.train.test_real_trainer import PYTHONS, versions

LIST = "import json; from tests.titan_settings import settings; print(json.dumps(settings()))"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_list_is_the_installed_releases(python: str) -> None:
    installed = versions(python)
    if installed is None or installed[0] not in releases():
        pytest.skip(f"{python} has no torchtitan that is listed: set LAUNCHER_TRAIN_PYTHON to an interpreter that has")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", LIST], capture_output=True, text=True, env=env, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == releases()[installed[0]], "python -m tests.titan_settings"
