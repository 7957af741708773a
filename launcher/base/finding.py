"""What one look at something that a run needs has found, and what all of them together stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.base.errors import ExitStatus, LauncherError

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


def sentence(check: Check) -> str:
    """A check in one line: what, why, fix."""
    text = check.what + (f": {check.why}" if check.why else "")
    return text + (f"; {check.fix}" if check.fix else "")


def refusal(checks: Sequence[Check], force: bool) -> LauncherError | None:
    """Why the run is not submitted; None where nothing stops it. `force` passes errors that are not certain."""
    errors = [check for check in checks if check.status == ERROR and (check.certain or not force)]
    if not errors:
        return None
    first = next((check for check in errors if check.certain), errors[0])
    if first.error:
        return first.error
    others = [f"{check.name}: {sentence(check)}" for check in errors if check is not first]
    fix = first.fix
    if not any(check.certain for check in errors):
        fix = f"{fix}; --force submits it all the same" if fix else "--force submits it all the same"
    return LauncherError(
        first.what + (f": {first.why}" if first.why else ""),
        fix,
        status=ExitStatus.NOT_FOUND if first.not_found else ExitStatus.INVALID,
        original="\n".join(others),
    )
