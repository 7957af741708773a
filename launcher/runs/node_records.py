"""What the nodes of a run wrote about their check: RUN/nodes, one record each, and whether one of them failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.base.files import read_json

CHECK_FAILED = 20  # the job's exit code: slurm/node.py's
# What srun makes of it where it ended the other nodes' tasks first: 128 + SIGTERM, 128 + SIGKILL.
HIDDEN_BY = (143, 137)
REASON = "a node failed its check before training"


def ended_unfit(exit_code: int, path: Path) -> bool:
    """Whether a job that ended with this code stopped because a node of it failed its check."""
    if exit_code == CHECK_FAILED:
        return True
    return exit_code in HIDDEN_BY and any(record.get("ok") is False for record in records(path))


def records(path: Path) -> list[dict[str, Any]]:
    """The nodes' own records, in the job's order."""
    files = sorted((path / "nodes").glob("[0-9]*-*.json"))
    return [record for file in files if (record := read_json(file))]
