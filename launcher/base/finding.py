"""What one look at something that a run needs has found, as values; launcher/preflight/text.py has the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.base.errors import LauncherError

OK, WARNING, ERROR = "ok", "warning", "error"
Fact = str | int | tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at before a run queues."""

    code: str  # stable: "time-limit"
    status: str  # OK, WARNING or ERROR
    facts: Mapping[str, Fact] = field(default_factory=dict)  # what was seen, by the names that the words use
    fix: str = ""  # what the user can type or do
    certain: bool = False  # of an error: it cannot work, so --force does not go past it
    error: LauncherError | None = None  # of an error: the one that stopped the look, in its own words


def ok(code: str, fix: str = "", /, **facts: Fact) -> Finding:
    return Finding(code, OK, facts, fix)


def warning(code: str, fix: str = "", /, **facts: Fact) -> Finding:
    return Finding(code, WARNING, facts, fix)


def error(code: str, fix: str = "", /, **facts: Fact) -> Finding:
    """What --force goes past: it may work all the same."""
    return Finding(code, ERROR, facts, fix)


def impossible(code: str, fix: str = "", /, **facts: Fact) -> Finding:
    return Finding(code, ERROR, facts, fix, certain=True)
