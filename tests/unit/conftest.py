"""What the unit tests share: a login node, which has no torchtitan."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a login node, wherever the tests run. With it `plan` builds the model, which tests/train looks at."""
    monkeypatch.setitem(sys.modules, "torchtitan", None)
