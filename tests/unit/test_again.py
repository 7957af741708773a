"""What follows an attempt: another one in the job, the job queued again, or the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.runs import again
from launcher.runs.again import Ending, Limits, Next, archive, decide, past_attempts

TWO = Limits(nodes=2, restarts=10, continues=1)


def past(cause: str, step: int = 0, culprits: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"cause": cause, "step": step, "culprits": list(culprits)}


CASES = {
    "a lost node, and a spare": (
        Ending("node-failure", True, 5, ("n2",), ("n1", "n3")),
        [],
        Next("again", ("n1", "n3")),
    ),
    "a lost node, and none to replace it": (
        Ending("node-failure", True, 5, ("n2",), ("n1",)),
        [],
        Next("requeue", ("n2",)),
    ),
    "a rank was killed on a healthy node": (
        Ending("killed", True, 5, (), ("n1", "n2")),
        [],
        Next("again", ("n1", "n2")),
    ),
    "a node that was left out before is left out again": (
        Ending("killed", True, 5, (), ("n1", "n2", "n3")),
        [past("node-unfit", 0, ("n2",))],
        Next("again", ("n1", "n3")),
    ),
    "out of memory": (Ending("gpu-memory", False, 5, (), ("n1", "n2")), [], Next("stop", why_not="cause")),
    "not known": (Ending("", False, 5, (), ("n1", "n2")), [], Next("stop", why_not="cause")),
    "all nodes failed their check, for a reason of the run's": (
        Ending("node-unfit", False, 0, (), ("n1", "n2")),
        [],
        Next("stop", why_not="cause"),
    ),
    "the time limit, and it may go on": (Ending("time-limit", True, 5, (), ("n1", "n2")), [], Next("requeue")),
    "the time limit, as often as it may": (
        Ending("time-limit", True, 9, (), ("n1", "n2")),
        [past("time-limit", 5)],
        Next("stop", why_not="cause"),
    ),
    "restarts are used up, continuations do not count": (
        Ending("killed", True, 99, (), ("n1", "n2")),
        [past("time-limit", 1), *(past("killed", step) for step in range(2, 12))],
        Next("stop", why_not="max-restarts"),
    ),
    "three in a row without a new checkpoint": (
        Ending("killed", True, 5, (), ("n1", "n2")),
        [past("killed", 5), past("killed", 5), past("killed", 5)],
        Next("stop", why_not="no-progress"),
    ),
    "the first of the three had made progress": (
        Ending("killed", True, 5, (), ("n1", "n2")),
        [past("killed", 5), past("killed", 5)],
        Next("again", ("n1", "n2")),
    ),
    "checks that failed and preemptions are no crash loop": (
        Ending("node-unfit", True, 0, ("n3",), ("n1", "n2", "n3")),
        [past("requeued"), past("node-unfit", 0, ("n4",)), past("requeued")],
        Next("again", ("n1", "n2")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_decided(case: str) -> None:
    ending, before, expected = CASES[case]
    assert decide(ending, before, TWO) == expected


def test_a_job_that_must_have_the_bad_node_is_not_queued_again() -> None:
    named = Limits(nodes=2, restarts=3, continues=0, nodelist=frozenset({"n2"}))
    ending = Ending("node-failure", True, 0, ("n2",), ("n1",))
    assert decide(ending, [], named) == Next("stop", why_not="too-few-nodes")


def test_a_machine_alone_is_not_queued_again() -> None:
    alone = Limits(nodes=2, restarts=3, continues=0, is_local=True)
    assert decide(Ending("killed", True, 0, (), ("n1",)), [], alone) == Next("stop", why_not="too-few-nodes")


causes = st.sampled_from(["killed", "node-failure", "requeued", "time-limit", "node-unfit", ""])
hosts = st.sets(st.sampled_from([f"n{i}" for i in range(6)])).map(lambda found: tuple(sorted(found)))


@given(
    st.builds(Ending, causes, st.booleans(), st.integers(0, 9), hosts, hosts),
    st.lists(st.builds(past, causes, st.integers(0, 9), hosts), max_size=14),
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


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs/ranks").mkdir(parents=True)
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes/0000-n1.json").write_text("{}")
    (tmp_path / "logs/0000-n1.log").write_text("one\n")
    (tmp_path / "logs/job.log").write_text("first\n")
    (tmp_path / "job").mkdir()
    node = {"job": {"nodes": 1, "name": "r"}, "placed": {"run_dir": str(tmp_path), "restarts": 2}, "titan": {}}
    (tmp_path / "job/node.json").write_text(json.dumps(node))
    return tmp_path


def test_an_attempt_is_put_away(run_dir: Path) -> None:
    with open(run_dir / "logs/job.log", "a") as slurms:  # as Slurm holds it open
        archive(run_dir)
        slurms.write("second\n")
        slurms.flush()
        assert (run_dir / "logs/job.log").read_text() == "second\n"
    assert [path.name for path in past_attempts(run_dir)] == ["1"]
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["job.log"]
    assert (run_dir / "attempts/1/logs/job.log").read_text() == "first\n"
    assert (run_dir / "attempts/1/nodes/0000-n1.json").exists() and not (run_dir / "nodes").exists()


def test_a_move_that_was_cut_off_goes_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        archive(run_dir)
    monkeypatch.undo()
    assert past_attempts(run_dir) == []
    archive(run_dir)
    kept = sorted(str(path.relative_to(run_dir)) for path in run_dir.glob("attempts/1/**/*") if path.is_file())
    names = ("logs/0000-n1.log", "logs/job.log", "nodes/0000-n1.json")
    assert kept == [f"attempts/1/{name}" for name in names]


def test_what_slurm_cut_off_is_put_away_when_the_job_begins_again(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again.main([str(run_dir), "begin", "--job", "7", "--began", "2000000000"]) == 0
    assert capsys.readouterr().out == "2\n"
    record = json.loads((run_dir / "attempts/1/attempt.json").read_text())
    assert (record["cause"], record["again"], record["hosts"]) == ("requeued", True, ["n1"])
    shutil.rmtree(run_dir / "attempts/1")
    (run_dir / "attempts/3/logs").mkdir(parents=True)
    assert again.main([str(run_dir), "begin", "--job", "7"]) == 0  # nothing has run: nothing is put away
    assert capsys.readouterr().out == "4\n"


def test_a_job_that_is_queued_again_after_its_end_begins_without_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "end.json").write_text("{}")
    (run_dir / "attempt.json").write_text(json.dumps({"again": False, "attempt": 1}))
    assert again.main([str(run_dir), "begin", "--job", "7", "--began", "2000000000"]) == 0
    assert not (run_dir / "end.json").exists() and (run_dir / "attempts/1/end.json").exists()


@pytest.mark.parametrize(("allocated", "hosts"), [("n1 n2 n3", "n1 n3"), ("n2", "n2")])
def test_a_job_that_gets_a_bad_node_again_leaves_it_out_where_it_can(
    allocated: str, hosts: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queued again by an administrator, say."""
    (run_dir / "attempt.json").write_text(json.dumps({"again": True, "culprits": ["n2"], "job_id": "7"}))
    assert again.main([str(run_dir), "begin", "--job", "7", "--allocated", allocated]) == 0
    assert capsys.readouterr().out == f"2 {hosts}\n"


def test_a_move_that_was_cut_off_at_its_very_end(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "attempt.json").write_text(json.dumps({"cause": "killed", "again": True}))
    archive(run_dir)
    (run_dir / "attempts/1").rename(run_dir / "attempts/.1")
    assert again.main([str(run_dir), "begin", "--job", "7"]) == 0
    assert capsys.readouterr().out == "2\n"
    assert json.loads((run_dir / "attempts/1/attempt.json").read_text())["cause"] == "killed"


def test_the_nodes_stay_in_slurms_order(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They answer in any: the first one's address is where the others meet, and srun starts them in order."""
    (run_dir / "job").mkdir(exist_ok=True)
    node = {"job": {"nodes": 2, "name": "r"}, "placed": {"run_dir": str(run_dir), "restarts": 2}, "titan": {}}
    (run_dir / "job/node.json").write_text(json.dumps(node))
    (run_dir / "logs/job.log").write_text("srun: error: n2: task 1: Killed\n")
    words = ["--allocated", "n1 n2 n3", "--alive", "n3 n1", "--started", "n1 n2 n3", "--code", "137", "--job", "7"]
    assert again.main([str(run_dir), "end", *words]) == 0
    assert capsys.readouterr().out == "again n1 n3\n"
