"""When a run hangs, and whose fault it is: values in, values out. Flight recorder dumps as torch writes them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launcher.titan.recorder import groups_of, read_dump
from slurm.check import hang


def entry(number: int, state: str = "completed", name: str = "nccl:_all_gather_base", **more: Any) -> dict[str, Any]:
    """A collective as torch 2.13's flight recorder has it, without what nobody reads."""
    return {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "profiling_name": name,
        "state": state,
        "is_p2p": False,
        "retired": False,
    } | more


def test_a_dump_is_read_without_running_what_it_names(tmp_path: Path) -> None:
    dump = {"version": "2.10", "entries": [entry(1), entry(2, "started"), entry(3, "scheduled")]}
    (tmp_path / "rank_0").write_bytes(pickle.dumps(dump))
    waits = [2, "_all_gather_base", True]
    assert read_dump(tmp_path / "rank_0") == {"0 default_pg": {"entered": 3, "waits": waits}}
    (tmp_path / "rank_1").write_bytes(pickle.dumps(Path("/tmp")))
    (tmp_path / "rank_2").write_bytes(pickle.dumps(dump)[:40])
    for name in ("rank_1", "rank_2"):
        with pytest.raises(ValueError, match="no flight recorder dump"):
            read_dump(tmp_path / name)


def test_gloo_never_says_completed_but_retires() -> None:
    """Seen with torch 2.13 on CPU: all stay "scheduled"; what is done is "retired"."""
    done = [entry(n, "scheduled", "gloo:all_reduce", retired=True) for n in (4, 5)]
    assert groups_of({"entries": done})["0 default_pg"] == {"entered": 5, "waits": None}
    waits = groups_of({"entries": [*done, entry(6, "scheduled", "gloo:all_reduce")]})["0 default_pg"]["waits"]
    assert waits == [6, "all_reduce", False]
    assert groups_of({"entries": [entry(1, is_p2p=True)]}) == {}


def rank(number: int, entered: int = 8, waits: int | None = 8, begun: bool = False, **more: Any) -> dict[str, Any]:
    wait = None if waits is None else [waits, "all_reduce", begun]
    groups = {"0 default_pg": {"entered": entered, "waits": wait}}
    facts = {"rank": number, "local_rank": number % 2, "state": "S", "cpu": 0.0, "moved": False, "groups": groups}
    return facts | {"stack": []} | more


def on(host: str, *ranks: dict[str, Any], quiet_s: float = 50, **more: Any) -> dict[str, Any]:
    return {"host": host, "quiet_s": quiet_s, "ranks": list(ranks), **more}


def of_four(**third: Any) -> list[dict[str, Any]]:
    """Two nodes of two ranks, of which rank 2 is another than the others."""
    return [on("a", rank(0), rank(1)), on("b", rank(2, **third), rank(3))]


def reaching(**hosts: bool) -> list[dict[str, Any]]:
    return [on(host, rank(number), reaches_head=reaches) for number, (host, reaches) in enumerate(hosts.items())]


BEHIND: dict[str, Any] = {"entered": 7, "waits": None}


class Case(NamedTuple):
    nodes: list[dict[str, Any]]
    why: str | None
    hosts: tuple[str, ...] = ("a", "b")


CASES = {
    "behind": Case(of_four(**BEHIND), "rank 2 (b, GPU 0) has not entered all-reduce 8 that 3 others wait in"),
    "behind, in the loader": Case(
        of_four(**BEHIND, stack=["data.py:7 in __iter__", "train.py:9 in main"]),
        "rank 2 (b, GPU 0) has not entered all-reduce 8 that 3 others wait in; it is at data.py:7 in __iter__",
    ),
    "stopped": Case(
        of_four(groups=None, state="T"),
        "rank 2 (b, GPU 0) is stopped by a signal or a debugger; 3 others wait in all-reduce 8",
    ),
    "a limit that stops it now and then": Case(of_four(state="R/T"), None),
    "disk": Case(
        of_four(**BEHIND, state="D"),
        "rank 2 (b, GPU 0) waits in the kernel for a disk, a file system or a device; 3 others wait in all-reduce 8",
    ),
    "says nothing": Case(
        of_four(groups=None),
        "rank 2 (b, GPU 0) does not answer, as if a library call never returned; 3 others wait in all-reduce 8",
    ),
    "queued on its GPU, begun by the others": Case(
        [on("a", rank(0, begun=True), rank(1, begun=True)), on("b", rank(2), rank(3, begun=True))],
        "rank 2 (b, GPU 0) has not entered all-reduce 8 that 3 others wait in",
    ),
    "all have entered": Case(of_four(), None),
    "all wait for a file system": Case(
        [on("a", rank(0, state="D"), rank(1)), on("b", rank(2, state="D"), rank(3))], None
    ),
    "behind on two nodes": Case([on("a", rank(0, **BEHIND), rank(1)), on("b", rank(2, **BEHIND), rank(3))], None),
    "nobody answers": Case([on("a", rank(0, groups=None)), on("b", rank(1, groups=None))], None),
    "a silent node": Case([on("a", rank(0), rank(1))], "node b does not answer"),
    "two silent nodes": Case([on("a", rank(0), rank(1))], None, ("a", "b", "c")),
    "a node without a way to the first": Case(
        reaching(a=True, b=False, c=True),
        "node b cannot reach the first node over the network; 3 others wait in all-reduce 8",
        ("a", "b", "c"),
    ),
    "the first node itself": Case(
        reaching(a=True, b=False, c=False),
        "node a cannot reach the first node over the network; 3 others wait in all-reduce 8",
        ("a", "b", "c"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_who_is_named(case: Case) -> None:
    found = hang.name(case.nodes, case.hosts)
    assert (found.why(True) if found else None) == case.why


def test_of_two_groups_the_rank_that_waits_in_neither_is_the_root() -> None:
    """Rank 1 is late for the one because it waits for rank 2 in the other."""
    ranks = [rank(0), rank(1, 7, None), rank(2, 8, None)]
    ranks[1]["groups"]["1 tp"] = {"entered": 5, "waits": [5, "all_gather", False]}
    ranks[2]["groups"] = {"1 tp": {"entered": 4, "waits": None}}
    found = hang.name([on("a", *ranks[:2]), on("b", ranks[2])], ("a", "b"))
    assert found and (found.rank, found.operation, found.number) == (2, "all-gather", 5)


def test_what_moves_is_no_hang() -> None:
    assert not hang.moves(of_four(**BEHIND), 45, 46, False)
    assert hang.moves([*of_four(), on("c", rank(4), quiet_s=3)], 45, 46, True), "another node's log grows"
    assert not hang.moves([*of_four(), on("c", rank(4), quiet_s=3)], 45, 181, True), "but no step comes"
    assert hang.moves(of_four(moved=True), 45, 46, True), "collectives go on"
    assert hang.moves(of_four(cpu=0.9), 45, 46, False), "a rank computes"
    assert not hang.moves(of_four(cpu=0.9), 45, 136, False), "but not for ever"
    assert not hang.moves(of_four(cpu=0.9), 45, 46, True), "on GPUs a rank that waits computes, too"


def test_the_bound_is_learned_from_the_run() -> None:
    pace = hang.Pace(0.0, steps=100)
    assert pace.bound_s == 900 and not pace.is_silent(899) and pace.is_silent(901), "start-up"
    for number in range(1, 5):
        pace.saw(number * 2.0, number)
    assert pace.bound_s == 45, "fast steps"
    assert not pace.is_silent(52) and pace.is_silent(54)
    pace.saw(20.0, 5)
    pace.slept(1000.0)
    assert not pace.is_silent(1060) and pace.is_silent(1070), "a job that Slurm had suspended"
    pace.saw(1190.0)
    assert not pace.is_silent(1199) and pace.is_silent(1020 + 4 * 45 + 1), "other lines alone do not save it for ever"
    slow = hang.Pace(0.0, steps=100)
    for number in range(1, 5):
        slow.saw(number * 100.0, number * 10)
    assert slow.bound_s == 100 + 10 * 10, "ten steps, and those that are logged at once"
    slow.saw(500.0, 100)
    assert slow.bound_s == 900, "after the last step"
    assert hang.Pace(0.0, pauses=True).bound_s == 900


@pytest.mark.parametrize(
    ("log_every", "save_every", "slow"),
    [(1, 0, []), (1, 10, [10, 20]), (5, 20, [20]), (5, 8, [5, 15, 20]), (5, 5, [5, 10, 15, 20, 25])],
)
def test_after_a_step_with_a_checkpoint_it_may_take_longer(log_every: int, save_every: int, slow: list[int]) -> None:
    """Until the next step is logged: a checkpoint comes after its step's line."""
    pace = hang.Pace(0.0, log_every=log_every, save_every=save_every)
    pace.intervals = [(1.0, log_every)] * 3
    found = []
    for number in range(log_every, 26, log_every):
        pace.step = number
        found += [number] if pace.bound_s == 900 else []
    assert found == slow


def test_the_evidence_can_be_written() -> None:
    assert json.dumps(vars(hang.name(of_four(**BEHIND), ("a", "b"))))
