"""What follows an attempt: another one in the job, the job queued again, or the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.runs import again
from launcher.runs.again import Ending, Limits, Next, archive, decide, past_attempts

TWO = Limits(nodes=2, restarts=10, continues=1)
NAMED = Limits(nodes=2, restarts=3, continues=0, nodelist=frozenset({"n2"}))  # the job must have n2
LOCAL = Limits(nodes=2, restarts=3, continues=0, is_local=True)


def past(cause: str, step: int = 0, *culprits: str) -> dict[str, Any]:
    return {"cause": cause, "step": step, "culprits": list(culprits)}


class Case(NamedTuple):
    cause: str
    then: str  # the word, and the hosts or why not
    past: Sequence[dict[str, Any]] = ()
    bad: str = ""
    alive: str = "n1 n2"
    step: int = 5
    makes_sense: bool = True
    limits: Limits = TWO


CASES = {
    "a lost node, and a spare": Case("node-failure", "again n1 n3", bad="n2", alive="n1 n3"),
    "a lost node, and none to replace it": Case("node-failure", "requeue n2", bad="n2", alive="n1"),
    "that the job must have": Case("node-failure", "stop too-few-nodes", bad="n2", alive="n1", limits=NAMED),
    "a machine alone": Case("killed", "stop too-few-nodes", alive="n1", limits=LOCAL),
    "a rank was killed on a healthy node": Case("killed", "again n1 n2"),
    "left out before": Case("killed", "again n1 n3", [past("node-unfit", 0, "n2")], alive="n1 n2 n3"),
    "out of memory": Case("gpu-memory", "stop cause", makes_sense=False),
    "not known": Case("", "stop cause", makes_sense=False),
    "all nodes failed their check, the run's fault": Case("node-unfit", "stop cause", step=0, makes_sense=False),
    "the time limit, and it may go on": Case("time-limit", "requeue"),
    "the time limit, as often as it may": Case("time-limit", "stop cause", [past("time-limit", 5)], step=9),
    "restarts are used up, continuations do not count": Case(
        "killed", "stop max-restarts", [past("time-limit", 1), *(past("killed", n) for n in range(2, 12))], step=99
    ),
    "three in a row without a new checkpoint": Case("killed", "stop no-progress", [past("killed", 5)] * 3),
    "the first of the three had made progress": Case("killed", "again n1 n2", [past("killed", 5)] * 2),
    "checks that failed and preemptions are no crash loop": Case(
        *("node-unfit", "again n1 n2", [past("requeued"), past("node-unfit", 0, "n4"), past("requeued")]),
        *("n3", "n1 n2 n3", 0),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decided(case: Case) -> None:
    ending = Ending(case.cause, case.makes_sense, case.step, tuple(case.bad.split()), tuple(case.alive.split()))
    word, *rest = case.then.split()
    expected = Next("stop", why_not=rest[0]) if word == "stop" else Next(word, tuple(rest))
    assert decide(ending, case.past, case.limits) == expected


causes = st.sampled_from(["killed", "node-failure", "requeued", "time-limit", "node-unfit", ""])
hosts = st.sets(st.sampled_from([f"n{i}" for i in range(6)])).map(lambda found: tuple(sorted(found)))
records = st.builds(lambda cause, step, bad: past(cause, step, *bad), causes, st.integers(0, 9), hosts)


@given(
    st.builds(Ending, causes, st.booleans(), st.integers(0, 9), hosts, hosts),
    st.lists(records, max_size=14),
    st.integers(0, 12),
)
def test_no_run_begins_anew_without_end_or_on_a_bad_node(
    ending: Ending, before: list[dict[str, Any]], restarts: int
) -> None:
    found = decide(ending, before, Limits(2, restarts, 2))
    if found.word == "again":
        bad = {*ending.culprits, *(host for one in before for host in one["culprits"])}
        assert len(found.hosts) >= 2 and not bad & {*found.hosts} and {*found.hosts} <= {*ending.alive}
    if found.word != "stop":
        times = sum(one["cause"] == "time-limit" for one in before)
        assert times < 2 if ending.cause == "time-limit" else len(before) - times < restarts
    assert (found.word == "stop") == bool(found.why_not)


# --- the run directory --------------------------------------------------------------------------------------

Ask = Callable[..., str]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for folder in ("logs/ranks", "nodes", "job"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "nodes/0000-n1.json").write_text("{}")
    (tmp_path / "logs/0000-n1.log").write_text("one\n")
    (tmp_path / "logs/job.log").write_text("first\n")
    node_json(tmp_path, nodes=1)
    return tmp_path


def node_json(run_dir: Path, nodes: int) -> None:
    node = {"job": {"nodes": nodes, "name": "r"}, "placed": {"run_dir": str(run_dir), "restarts": 2}, "titan": {}}
    (run_dir / "job/node.json").write_text(json.dumps(node))


@pytest.fixture
def ask(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What the job script of job 7 gets for an answer."""

    def answer(what: str, *words: str, **attempt: object) -> str:
        if attempt:
            (run_dir / "attempt.json").write_text(json.dumps(attempt))
        assert again.main([str(run_dir), what, "--job", "7", *words]) == 0
        return capsys.readouterr().out

    return answer


def kept(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("attempts/1/**/*") if path.is_file())


ALL = [f"attempts/1/{name}" for name in ("logs/0000-n1.log", "logs/job.log", "nodes/0000-n1.json")]


def test_an_attempt_is_put_away(run_dir: Path) -> None:
    with open(run_dir / "logs/job.log", "a") as slurms:  # as Slurm holds it open
        archive(run_dir)
        slurms.write("second\n")
    assert [path.name for path in past_attempts(run_dir)] == ["1"] and kept(run_dir) == ALL
    assert [path.name for path in (run_dir / "logs").iterdir()] == ["job.log"] and not (run_dir / "nodes").exists()
    assert (run_dir / "logs/job.log").read_text() == "second\n"
    assert (run_dir / "attempts/1/logs/job.log").read_text() == "first\n"


def test_a_move_that_was_cut_off_goes_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        archive(run_dir)
    monkeypatch.undo()
    assert past_attempts(run_dir) == []
    archive(run_dir)
    assert kept(run_dir) == ALL


def test_what_slurm_cut_off_is_put_away_when_the_job_begins_again(run_dir: Path, ask: Ask) -> None:
    assert ask("begin", "--began", "2000000000") == "2\n"
    record = json.loads((run_dir / "attempts/1/attempt.json").read_text())
    assert (record["cause"], record["again"], record["hosts"]) == ("requeued", True, ["n1"])
    assert record["began_at"] < 2_000_000_000  # as the node's record says
    (run_dir / "attempts/1").rename(run_dir / "attempts/3")  # somebody has removed others
    assert ask("begin") == "4\n"  # nothing has run: nothing is put away


def test_a_job_that_is_queued_again_after_its_end_begins_without_it(run_dir: Path, ask: Ask) -> None:
    (run_dir / "end.json").write_text("{}")
    ask("begin", "--began", "2000000000", again=False, attempt=1)
    assert not (run_dir / "end.json").exists() and (run_dir / "attempts/1/end.json").exists()


def test_what_ended_and_is_queued_again_keeps_its_cause_and_its_bad_nodes(run_dir: Path, ask: Ask) -> None:
    """By an administrator, who may do so more often than --max-restarts allows."""
    ended = {"job_id": "7", "cause": "gpu-broken", "culprits": ["n2"], "again": False, "why_not": "max-restarts"}
    for attempt in range(2, 6):
        (run_dir / "nodes").mkdir(exist_ok=True)
        assert ask("begin", "--allocated", "n1 n2 n3", **ended) == f"{attempt} n1 n3\n"
        record = json.loads((run_dir / f"attempts/{attempt - 1}/attempt.json").read_text())
        assert record == ended | {"again": True, "requeue": True, "why_not": ""}


@pytest.mark.parametrize(("allocated", "hosts"), [("n1 n2 n3", "n1 n3"), ("n2", "n2")])
def test_a_job_that_gets_a_bad_node_again_leaves_it_out_where_it_can(allocated: str, hosts: str, ask: Ask) -> None:
    """Queued again by an administrator, say."""
    assert ask("begin", "--allocated", allocated, again=True, culprits=["n2"], job_id="7") == f"2 {hosts}\n"


def test_a_move_that_was_cut_off_at_its_very_end(run_dir: Path, ask: Ask) -> None:
    (run_dir / "attempt.json").write_text(json.dumps({"cause": "killed", "again": True}))
    archive(run_dir)
    (run_dir / "attempts/1").rename(run_dir / "attempts/.1")
    assert ask("begin") == "2\n"
    assert json.loads((run_dir / "attempts/1/attempt.json").read_text())["cause"] == "killed"


def test_the_nodes_stay_in_slurms_order(run_dir: Path, ask: Ask) -> None:
    """They answer in any: the first one's address is where the others meet, and srun starts them in order."""
    node_json(run_dir, nodes=2)
    (run_dir / "logs/job.log").write_text("srun: error: n2: task 1: Killed\n")
    words = ("--allocated", "n1 n2 n3", "--alive", "n3 n1", "--started", "n1 n2 n3", "--code", "137")
    assert ask("end", *words) == "again n1 n3\n"
