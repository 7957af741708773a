"""Is this node fit to train? Facts about its GPUs, their speed, and what the nodes of a job find out together.

This folder is copied to `<run_dir>/job/check`, beside node.py, and runs in whatever Python the image has: standard
library only at import time, nothing newer than Python 3.10, relative imports only. torch is looked at by the workers
(speed.py) alone, so that a torch or a GPU that hangs can be left behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
