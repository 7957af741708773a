"""What goes wrong while a node is looked at becomes a problem in its facts, and the next thing is looked at."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from titan import Refused  # type: ignore[import-not-found]

from . import problem


@contextlib.contextmanager
def noting(facts: dict[str, Any], name: str) -> Iterator[None]:
    """Turns what goes wrong inside into a problem of this node; the next thing is looked at all the same.

    A setting may be wrong just as well as the node: a comparison with the others tells.
    """
    try:
        yield
    except Refused as refused:
        facts["problems"].append(problem(name, refused.why, refused.fix, "run"))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        why = f"{where}{error.strerror or error}"
        facts["problems"].append(problem(name, why, "check the mounts and permissions on this node", "run"))
    except Exception as error:  # nobody foresaw it: the other things are looked at, and the record has the traceback
        facts["problems"].append(unexpected(error))


def unexpected(error: Exception) -> dict[str, Any]:
    why, fix = (
        f"unexpected: {type(error).__name__}: {error}",
        "report this with the traceback that follows in this log",
    )
    return {**problem("unexpected", why, fix, "run"), "traceback": traceback.format_exc()}


def within(seconds: float, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result. Raises Refused where it takes longer: it is left behind, nothing else can be done."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((function(*arguments), None))
        except Exception as error:  # of any kind: the caller's thread raises it again
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise Refused(f"{what} does not answer within {seconds:.0f} s", "look at its file system: df, mount, dmesg")
    value, error = result[0]
    if error is not None:
        raise error
    return value
