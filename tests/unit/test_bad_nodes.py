"""Who is to blame, what is remembered, and what is left out of the next job: pure rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from launcher.base.finding import ERROR, WARNING
from launcher.config.render import render
from launcher.config.write import run_toml
from launcher.nodes import bad_nodes
from launcher.nodes.bad_nodes import DAY_S, KEEP_S, BadNode
from launcher.nodes.judged import judge
from launcher.preflight.cluster import preflight
from launcher.preflight.text import sentence
from launcher.scheduler.facts import ClusterFacts
from tests.unit.bad_node_records import JUDGED, NOW
from tests.unit.test_preflight import FOUR, cluster, found, run


@pytest.mark.parametrize(("records", "verdict", "nodes", "own"), JUDGED.values(), ids=JUDGED.keys())
def test_who_is_to_blame(
    records: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any] | None, nodes: int, own: list[str]
) -> None:
    assert [unfit.host for unfit in judge(records, verdict, nodes) if unfit.own] == own


def bad(host: str, at: float = NOW, released: float = 0.0, **values: Any) -> BadNode:
    known = {"reason": "ECC", "run": "/runs/a", "at": at, "until": at + KEEP_S, "released": released, **values}
    return BadNode(host, **known)


ADDED: dict[str, tuple[list[BadNode], BadNode, bool]] = {
    "a new one": ([], bad("n1"), True),
    "beside another": ([bad("n0")], bad("n1"), True),
    "seen before": ([bad("n1", reason="known")], bad("n1"), False),
    "a later failure": ([bad("n1", NOW - DAY_S)], bad("n1"), True),
    "released after it": ([bad("n1", NOW - DAY_S, NOW + 1)], bad("n1"), False),
    "released before it": ([bad("n1", NOW - DAY_S, NOW - 1)], bad("n1"), True),
    "an older one than what expired": ([bad("n1", NOW - KEEP_S - 1)], bad("n1"), True),
}


@pytest.mark.parametrize(("old", "new", "taken"), ADDED.values(), ids=ADDED.keys())
def test_what_is_remembered(old: list[BadNode], new: BadNode, taken: bool) -> None:
    after = bad_nodes.added(old, [new], NOW)
    assert (new in after) == taken
    assert len({node.host for node in after}) == len(after)


def test_a_longer_exclusion_stays_and_an_expired_one_goes() -> None:
    by_hand = bad("n1", NOW - DAY_S, until=NOW + 30 * DAY_S, run="")
    (after,) = bad_nodes.added([by_hand, bad("n0", NOW - KEEP_S)], [bad("n1")], NOW)
    assert (after.run, after.until) == ("/runs/a", by_hand.until)


def test_left_out_of_the_job_and_shown() -> None:
    spec, checks = bad_nodes.without(run(nodes=3, exclude="n0"), cluster(*FOUR), [bad("n2", NOW - 2 * DAY_S)], NOW)
    assert "#SBATCH --exclude=n0,n2\n" in render(spec)
    assert sentence(found(checks, "bad-nodes")) == "n2 (ECC, 2 d ago); launcher cluster nodes"
    nodes = found(preflight(spec, cluster(*FOUR)), "nodes-too-few")
    assert nodes.status == ERROR
    assert "has 2, without those of --exclude and those that failed their check" in sentence(nodes)
    assert "launcher cluster nodes release n2" in nodes.fix


def test_a_repeated_run_keeps_no_exclusion_but_the_users() -> None:
    text = run_toml(bad_nodes.without(run(exclude="n0"), cluster(*FOUR), [bad("n2")], NOW)[0])
    assert '\nexclude = "n0"\n' in text and "\n[placed]\n" in text and '\nexclude = ["n2"]\n' in text


NOT_LEFT_OUT = {
    "asked for by name": (run(nodelist="n[1-2]"), cluster(*FOUR), WARNING),
    "excluded already": (run(exclude="n[2-3]"), cluster(*FOUR), ""),
    "gone from Slurm": (run(), cluster(*FOUR[:2]), ""),
    "of another partition": (run(partition="small"), cluster(*FOUR), ""),
}


@pytest.mark.parametrize(("spec", "facts", "status"), NOT_LEFT_OUT.values(), ids=NOT_LEFT_OUT.keys())
def test_not_left_out(spec: Any, facts: ClusterFacts, status: str) -> None:
    """Slurm refuses a job that excludes a node which it does not know."""
    after, checks = bad_nodes.without(spec, facts, [bad("n2")], NOW)
    assert (after.avoid, [check.status for check in checks]) == ((), [status] if status else [])


def test_no_node_left_is_an_error() -> None:
    spec, _ = bad_nodes.without(run(), cluster(*FOUR[:1]), [bad("n0")], NOW)
    check = found(preflight(spec, cluster(*FOUR[:1])), "nodes-too-few")
    assert (check.status, "release n0" in check.fix) == (ERROR, True)
