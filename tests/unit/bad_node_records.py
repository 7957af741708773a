"""What nodes write of themselves, as failed checks leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Fake = Callable[[str, str], Path]
NOW = 1_800_000_000.0
ECC = {"name": "ecc", "what": "GPU 2 has ECC errors", "fix": "reset it", "fault": "node"}
MOUNT = {"name": "data", "what": "/data is not mounted", "fix": "mount it", "fault": "node"}
NO_DATA = {"name": "data", "what": "/data/c5: no such directory", "fix": "--data DIR", "fault": "run"}


def record(host: str, *problems: Mapping[str, str], **values: Any) -> dict[str, Any]:
    first = problems[0] if problems else {}
    return {
        "host": host,
        "ok": not problems,
        "why": first.get("what", ""),
        "fix": first.get("fix", ""),
        "problems": list(problems),
        **values,
    }


def told(*entries: Mapping[str, str], **values: Any) -> dict[str, Any]:
    """The first node's verdict, once it has compared all."""
    return {"unfit": list(entries), **values}


def one(host: str, why: str, fault: str = "node", **values: str) -> dict[str, str]:
    return {"host": host, "why": why, "fault": fault, **values}


OLD = {"host": "n1", "ok": False, "why": "no GPUs", "fix": ""}  # of a launcher that named no fault
BOTH = [record("n0", MOUNT), record("n1", MOUNT)]
GOOD = record("n0")
JUDGED = {  # records, verdict, nodes, and who is to blame
    "one of three": ([GOOD, record("n1", ECC), record("n2")], None, 3, ["n1"]),
    "before the others could write": ([record("n1", ECC)], None, 3, ["n1"]),
    "the run's own fault": ([GOOD, record("n1", NO_DATA)], None, 2, []),
    "the same on every node": (BOTH, None, 2, []),
    "the same on every node, and more on one": ([BOTH[0], record("n1", MOUNT, ECC)], None, 2, ["n1"]),
    "the same on two of three, of which two train": (BOTH, {"nodes": 3}, 2, ["n0", "n1"]),
    "two different ones": ([record("n0", ECC), record("n1", MOUNT)], None, 2, ["n0", "n1"]),
    "one node alone": ([record("n0", ECC)], None, 1, ["n0"]),
    "no fault named": ([GOOD, OLD], None, 2, []),
    "told by comparing": ([GOOD, record("n1")], told(one("n1", "another clique")), 2, ["n1"]),
    "cleared by comparing": ([GOOD, record("n1", MOUNT)], told(one("n1", "x", "run")), 2, []),
    "compared, and all the same": ([], told(*(one(f"n{i}", f"at {i}", name="slow") for i in range(3))), 3, []),
    "compared, with two problems": (
        *([GOOD, record("n1", NO_DATA)], told(one("n1", "x", "run", name="data"), one("n1", "y", name="slow"))),
        *(2, ["n1"]),
    ),
    "damaged": ([{"ok": False, "host": 3, "problems": "x"}], {"unfit": [7, {}]}, 2, []),
}
