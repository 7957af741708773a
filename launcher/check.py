"""What one look at something that a run needs has found."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import LauncherError

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at before anything was submitted. `what` is in the cluster's own words."""

    name: str
    status: str  # OK, WARNING or ERROR
    what: str
    why: str = ""
    fix: str = ""
    certain: bool = False  # of an error: it cannot work, so --force does not go past it
    not_found: bool = False  # of an error: something that was named does not exist
    error: LauncherError | None = None  # of an error: the one that stopped the look, in its own words
