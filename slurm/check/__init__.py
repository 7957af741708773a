"""Is this node fit to train? Facts about its GPUs, their speed, and what the nodes of a job find out together.

This folder is copied to `<run_dir>/job/check`, beside node.py, and runs in whatever Python the image has: standard
library only at import time, nothing newer than Python 3.10, relative imports only. torch is looked at by the workers
(speed.py) alone, so that a torch or a GPU that hangs can be left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def problem(name: str, what: str, fix: str, fault: str = "node") -> dict[str, str]:
    """Why a node cannot train. `fault` is "node" (its own: GPU, disk, mount) or "run" (would fail anywhere).

    Only what a node can be sure of alone is "node" here: a healthy node that is blamed for a setting is left out of
    what is submitted next. A comparison with the other nodes turns "run" into "node" where they are well (verdict.py).
    """
    return {"name": name, "what": " ".join(what.split()), "fix": " ".join(fix.split()), "fault": fault}


def warning(name: str, what: str) -> dict[str, str]:
    return {"name": name, "what": " ".join(what.split())}


@dataclass
class Findings:
    """What is wrong with a node. Problems stop the job, warnings do not; "name" is their code, the same for ever."""

    problems: list[dict[str, str]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)

    def problem(self, name: str, what: str, fix: str, fault: str = "node") -> None:
        self.problems.append(problem(name, what, fix, fault))

    def warning(self, name: str, what: str) -> None:
        self.warnings.append(warning(name, what))

    @contextlib.contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Turns what goes wrong inside into a problem; the next thing is looked at all the same.

        A setting may be wrong just as well as the node: a comparison with the others tells.
        """
        try:
            yield
        except Exception as error:  # whatever it is, the report names it
            self.error(name, error)

    def error(self, name: str, error: Exception) -> None:
        """One of ours has a `fix`. One that nobody foresaw, in any library, goes with its traceback."""
        if (fix := getattr(error, "fix", None)) is not None:
            self.problem(name, str(error), fix, "run")
        elif isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            fix = "check the mounts and permissions on this node"
            self.problem(name, f"{where}{error.strerror or error}", fix, "run")
        else:
            self.unexpected(error)

    def unexpected(self, error: Exception) -> None:
        fix = "report this with the traceback that follows in this log"
        self.problem("unexpected", f"unexpected: {type(error).__name__}: {error}", fix, "run")
        self.problems[-1]["traceback"] = traceback.format_exc()


def bounded(limit_s: float, calls: Sequence[Callable[[], Any]]) -> list[Future[Any] | None]:
    """Each call's result or error, all at once; None for what takes longer: it is left behind in its thread."""
    futures: list[Future[Any]] = [Future() for _ in calls]

    def run(future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            future.set_result(call())
        except Exception as error:  # the caller gets it with the result
            future.set_exception(error)

    for future, call in zip(futures, calls, strict=True):
        threading.Thread(target=run, args=(future, call), daemon=True).start()
    done = wait(futures, limit_s).done
    return [future if future in done else None for future in futures]


def read(path: Path) -> dict[str, Any]:
    """An object, or an empty one. Opened anew each time: that is how NFS shows what another node wrote."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def write(path: Path, value: Any) -> None:
    """A text, or a value as JSON. Through a temporary name: several nodes may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as stream:  # never through a link, never a file that was there
            stream.write(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
