"""What the unit tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a login node, `plan` builds no model of torchtitan's. tests/train counts with it."""
    monkeypatch.setattr("launcher.commands.plan.count", lambda flavor: None)
