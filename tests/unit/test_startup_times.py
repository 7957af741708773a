"""Where the time before the first step went: clocks of several machines, logs in a time zone of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.results.outcome import Startup
from tests.unit.test_read import RECORD, RUNNING, Made, log, said
from tests.unit.titan_log import STEPS, T0
from tests.unit.titan_log import step as line


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "r")


def test_the_log_is_in_the_nodes_own_time_zone(made: Made) -> None:
    for node, offset in (("a", 19800), ("b", 19800)):
        number = "0000" if node == "a" else "0001"
        made.change(f"nodes/{number}-{node}.json", utc_offset_s=offset)
        made.write(f"logs/{number}-{node}.log", line(1, at=T0 + 101 + offset) + log(steps=STEPS[1:]))
    assert made.outcome().startup.first_step_s == 33.5


@pytest.mark.parametrize(
    ("file", "changes", "lost"),
    [
        ("intent.json", {"at": T0 + 300}, "queue_s"),  # before it was submitted
        ("intent.json", {"at": T0 - 1e8}, "queue_s"),
        ("intent.json", {"at": "x"}, "queue_s"),
        ("nodes/0001-b.json", {"time": int(T0) - 3600}, ""),  # the other node's is the last
        ("nodes/0000-a.json", {"time": "x"}, "container_s check_s first_step_s"),
        ("nodes/0000-a.json", {"time": 10**400}, "container_s check_s first_step_s"),
        ("nodes/0000-a.json", {"time": int(T0) + 10**6}, "container_s first_step_s"),
        ("nodes/0000-a.json", {"check_s": -1}, "check_s first_step_s"),
        ("nodes/0000-a.json", {"check_s": None}, "check_s first_step_s"),
        ("nodes/0001-b.json", {"check_s": 4000}, "first_step_s"),
        ("end.json", {"began_at": int(T0) + 60}, "container_s"),
        ("end.json", {"began_at": True}, "queue_s container_s"),
    ],
)
def test_absurd_times_are_not_told(made: Made, file: str, changes: dict[str, Any], lost: str) -> None:
    made.change(file, **changes)
    startup = made.outcome().startup
    known = {"queue_s", "container_s", "check_s", "first_step_s"} - set(lost.split())
    assert {name for name in Startup.__dataclass_fields__ if getattr(startup, name) is not None} == known


def test_waiting_for_the_last_container_is_not_told_twice(made: Made) -> None:
    """The nodes meet in their check: the first to come waits in it for the others."""
    made.change("nodes/0000-a.json", time=T0 + 40, check_s=27.5)  # b comes at +55, and both end at +67.5
    assert made.outcome().startup == Startup(queue_s=30, container_s=25, check_s=12.5, first_step_s=33.5)


def test_clocks_that_differ_by_a_second_are_the_same(made: Made) -> None:
    made.change("intent.json", at=T0 + 30.9)
    assert made.outcome().startup.queue_s == 0.0


def test_without_every_nodes_record_or_with_a_log_that_was_cut_there_is_less(made: Made) -> None:
    (made.path / "nodes" / "0001-b.json").unlink()
    assert made.outcome().startup == Startup(queue_s=30)
    made.write("nodes/0001-b.json", "{")
    found = made.outcome()
    assert found.startup == Startup(queue_s=30) and said(found) == ("cannot read nodes/0001-b.json, or it is damaged",)
    made.write("nodes/0001-b.json", {**RECORD, "utc_offset_s": None})
    made.change("nodes/0000-a.json", utc_offset_s=None)
    assert made.outcome().startup.first_step_s is None


def test_before_the_end_the_claim_says_when_the_script_began(made: Made) -> None:
    (made.path / "end.json").unlink()
    made.write("claim/job_id", "7")
    os.utime(made.path / "claim" / "job_id", (T0 + 33, T0 + 33))
    assert made.outcome(RUNNING).startup.queue_s == 33
    made.change("job/node.json", placed={"run_dir": "/elsewhere"})  # a copy: its files have other times
    assert made.outcome(RUNNING).startup.queue_s is None
