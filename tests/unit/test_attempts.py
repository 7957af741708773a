"""A run of several attempts is one run: its steps are counted once, and it is said what each attempt came to."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.commands.watching import started_again
from launcher.logs.known_errors import explain, how_it_ended, known_errors
from launcher.logs.steps import LogReader
from launcher.report.page import page
from launcher.results.accept import judge
from launcher.results.columns import as_dict, as_flat
from launcher.results.formats import one_run
from launcher.results.goodput import Trace, goodput, kept_steps
from launcher.results.outcome import Goodput, Outcome
from launcher.results.published import published
from launcher.results.read import outcome_of, results_of
from launcher.results.sides import outcome_from
from launcher.runs.attempts import Attempt, attempts_of, ended_by
from launcher.runs.directory import Run
from launcher.runs.phases import Phase, Watcher
from launcher.scheduler.state import JobState
from tests.conftest import Launch
from tests.unit.test_read import NODE, RECORD, RUN_TOML, said
from tests.unit.titan_log import T0
from tests.unit.titan_log import step as line

DONE, RUNNING = JobState("COMPLETED", "end.json"), JobState("RUNNING", "squeue")
AT = int(T0)
SAVED = {  # as both releases print it
    "0.2": "Finished saving the checkpoint (or staging if async is enabled)in 4.00 seconds.",
    "0.3": "Finished staging the checkpoint in 4.00 seconds.",
}


def log(first: int, last: int, began: int, tps: int = 17500, saves: tuple[int, ...] = (), release: str = "0.3") -> str:
    """Steps of 2 s, a line every 10; each first line of an attempt is slow. A checkpoint takes 4 s behind its step."""
    text, at = "", began
    for step in range(first, last + 1):
        at += 2
        if step == 1 or step % 10 == 0:
            text += line(step, 900 if at - began < 22 else tps, at=T0 + at, loss=12 - step / 20)
        if step in saves:
            at += 4
            moment = f"2026-11-22 07:{10 + at // 60}:{at % 60:02},000"
            text += f"[rank0]:[titan] {moment} - root - INFO - {SAVED[release]}\n"
    return text


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def attempt(folder: Path, hosts: str, began: int, logs: dict[str, str], **more: Any) -> None:
    """An attempt of two nodes as its job leaves it; a check of 10 s that begins after 5."""
    for number, host in enumerate(hosts):
        record = RECORD | {"host": host, "time": AT + began + 5, "check_s": 10.0}
        write(folder / "nodes" / f"000{number}-{host}.json", record)
        write(folder / "logs" / f"000{number}-{host}.log", logs.get(host, ""))
    said = {"schema": 1, "hosts": list(hosts), "began_at": AT + began, "job_id": "7", **more}
    if "ended_at" in more:
        write(folder / "attempt.json", said)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Node b was lost after step 34, behind the checkpoint of step 20; c took its place."""
    path = tmp_path / "runs" / "r"
    write(path / "job" / "node.json", {**NODE, "placed": {"run_dir": str(path)}})
    write(path / "run.toml", RUN_TOML.replace("{image}", ""))
    write(path / "intent.json", {"scheduler": "slurm", "job_name": "r", "at": T0})
    write(path / "job.json", {"job_id": "7"})
    write(path / "claim" / "job_id", "7")
    first = log(1, 34, 60, saves=(20,))
    ended = {"ended_at": AT + 150, "exit_code": 1, "cause": "node-failure", "culprits": ["b"], "step": 20}
    attempt(path / "attempts" / "1", "ab", 30, {"a": first, "b": first}, attempt=1, again=True, **ended)
    again = log(21, 100, 190, 17600)
    attempt(path, "ac", 153, {"a": again, "c": again}, attempt=2, ended_at=AT + 360, exit_code=0, again=False)
    write(path / "end.json", {"exit_code": 0, "began_at": AT + 30, "ended_at": AT + 361})
    return Run(path)


def log_again(run: Run, text: str) -> None:
    """What both nodes of the last attempt logged."""
    for name in ("0000-a", "0001-c"):
        write(run.path / f"logs/{name}.log", text)


def outcome(run: Run, state: JobState = DONE) -> Outcome:
    found = outcome_of(run, state)
    assert found is not None
    json.dumps(as_dict(found), allow_nan=False)
    return found


def test_a_run_that_lost_a_node_is_whole(run: Run) -> None:
    found = outcome(run)
    assert (said(found), found.notes, found.complete) == ((), (), True)
    assert [point.step for point in found.series] == [1, *range(10, 101, 10)]
    first, second = found.attempts
    assert (first.hosts, first.first_step, first.last_step, first.kept_step) == (("a", "b"), 1, 30, 20)
    assert (second.hosts, second.first_step, second.last_step, second.kept_step) == (("a", "c"), 30, 100, 100)
    assert (first.tps, second.tps, ended_by(first), ended_by(second)) == (17500, 17600, "node b lost", "")
    assert found.tps is not None and (found.tps.low, found.tps.high) == (17500, 17600)  # no first line of an attempt
    assert [node.host for node in found.by_node] == ["a", "b", "c"]
    assert found.restarts == 1 and not as_dict(found)["restarted"]


@pytest.mark.parametrize("release", SAVED)
def test_where_its_time_went(run: Run, release: str) -> None:
    """Attempt 1: 30 s to 150 s, first step at 62, step 20 at 100, its checkpoint until 104, step 30 at 124.
    Attempt 2: from 150, as one job went on, to 360, step 30 at 210, step 100 at 350; steps 22 to 30 are 9 of 2 s.
    """
    for name in ("0000-a", "0001-b"):
        write(run.path / f"attempts/1/logs/{name}.log", log(1, 34, 60, saves=(20,), release=release))
    spent = outcome(run).goodput
    assert spent == Goodput(
        allocation_s=120 + 210,
        kept_s=38 + 18 + 140,
        start_s=(62 - 30 - 10) + (210 - 18 - 150 - 10),
        check_s=20,
        lost_s=20,
        checkpoints_s=4,
        ending_s=26 + 10,
        queue_s=30,
    )
    assert outcome(run).goodput_pct == pytest.approx(100 * 196 / 330) and outcome(run).wall_s == 330


def test_the_last_checkpoint_of_a_run(tmp_path: Path) -> None:
    write(
        tmp_path / "log",
        line(1) + "[titan] 2026-11-22 07:10:31,500 - root - INFO - Last step checkpoint completed in 2.50s\n",
    )
    reader = LogReader(tmp_path / "log")
    assert len(list(reader.read())) == 1 and reader.saves == [(T0 + 31.5, 2.5)]


@pytest.mark.parametrize("how", ["end.json", "requeue", "time-limit"])
def test_time_in_the_queue_is_no_allocation(run: Run, how: str) -> None:
    """A job that ended, and one that queued itself again."""
    before, path = outcome(run).goodput, run.path / "attempts" / "1"
    assert before is not None
    about = json.loads((path / "attempt.json").read_text())
    cause = how if how == "time-limit" else "killed"
    write(path / "attempt.json", about | {"requeue": how == "requeue", "cause": cause})
    if how == "end.json":
        write(path / how, {"exit_code": 1, "began_at": AT + 30, "ended_at": AT + 150})
    spent = outcome(run).goodput
    assert spent is not None and (spent.allocation_s, spent.queue_s) == (before.allocation_s - 3, 33)


def test_an_attempt_that_was_cut_off_ends_with_its_last_line(run: Run) -> None:
    """Its attempt.json is written when the job begins again."""
    path = run.path / "attempts" / "1"
    about = json.loads((path / "attempt.json").read_text())
    write(path / "attempt.json", about | {"cause": "requeued", "ended_at": AT + 153, "culprits": []})
    spent = outcome(run).goodput
    assert spent is not None and (spent.allocation_s, spent.ending_s, spent.queue_s) == (94 + 207, 10, 30 + 29)
    for name in ("0000-a", "0001-b"):
        write(path / "logs" / f"{name}.log", "")
    log_again(run, log(1, 100, 190))
    spent = outcome(run).goodput
    assert spent is not None and (spent.allocation_s, spent.queue_s) == (207, 30 + 123)


def test_what_the_next_attempt_did_not_reach_is_lost(run: Run) -> None:
    log_again(run, log(21, 29, 190))
    found = outcome(run, RUNNING)
    assert found.step == 20 and "step 20 of 100" in said(found)
    write(run.path / "attempts" / "1" / "attempt.json", "{")  # not known: nothing is taken from it
    assert outcome(run, RUNNING).step == 30


def test_a_checkpoint_that_was_passed_over(run: Run) -> None:
    """The next attempt began before the last checkpoint of the one before."""
    log_again(run, log(11, 100, 190, 17600))
    found = outcome(run)
    assert found.complete and [one.kept_step for one in found.attempts] == [19, 100]


@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        ("logs/0001-c.log", None, ("only 1 of 2 nodes logged",)),
        ("logs/0002-d.log", log(21, 100, 190), ("3 nodes logged, asked for 2",)),
        ("logs/0001-c.log", log(21, 44, 190), ("the log of c ends at step 40 of 100",)),
        ("attempts/1/logs/0001-b.log", log(1, 12, 60), ()),  # it was lost: its log may lack a part
        ("attempts/1/logs/0001-b.log", None, ()),
        ("attempts/1/logs/0000-a.log", log(1, 12, 60), ("the log of a ends at step 10 of 20",)),
    ],
)
def test_missing_nodes_are_told_of_each_attempt(
    run: Run, name: str, text: str | None, problems: tuple[str, ...]
) -> None:
    (run.path / name).unlink(missing_ok=True)
    if text:
        write(run.path / name, text)
    assert said(outcome(run)) == problems


def test_spares_log_no_step_and_are_no_part_of_the_result(run: Run) -> None:
    for folder in ("logs", "nodes"):
        shutil.rmtree(run.path / folder)
    attempt(run.path, "abc", 153, {"a": log(21, 100, 190), "c": log(21, 100, 190)}, ended_at=AT + 360, again=False)
    write(run.path / "nodes" / "0001-b.json", RECORD | {"host": "b", "ok": False})
    write(run.path / "nodes" / "check.json", {"ok": True, "chosen": ["a", "c"], "spare": []})
    found = outcome(run)
    assert found.complete and found.attempts[1].hosts == ("a", "c")


def test_nan_in_a_lost_step_is_seen(run: Run) -> None:
    text = (run.path / "attempts" / "1" / "logs" / "0000-a.log").read_text()
    write(run.path / "attempts" / "1" / "logs" / "0000-a.log", "nan".join(text.rsplit("10.50000", 1)))
    assert said(outcome(run)) == ("NaN or infinity in loss, grad_norm or tokens/s",)


def test_every_format_and_back(run: Run) -> None:
    found = outcome(run)
    values = as_dict(found)
    assert (values["restarts"], round(values["goodput_pct"]), values["attempts"][0]["cause"]) == (1, 59, "node-failure")
    assert outcome_from(values, "x").goodput == found.goodput and outcome_from(values, "x").attempts == found.attempts
    assert as_flat(found)["goodput_lost_s"] == 20 and as_flat(found)["restarts"] == 1
    shown = one_run(found)
    assert "goodput     59% of 5 min 30 s: kept 3 min 16 s, start 54 s, check 20 s, lost 20 s" in shown
    assert "attempt 1   a, b, steps 1 to 30 (to 20 count), 17,500 tokens/s per GPU, node b lost" in shown
    verdict = judge(found, [replace(found, run_dir="/before")])
    assert verdict.word == "PASS"
    assert "2 attempts: node b lost; goodput 59%" in verdict.notes
    assert any("17,600 tokens/s" in reason.what for reason in verdict.reasons)
    text = page([found], published(), made="2026-11-22", version="1")
    assert "59%" in text and "a, b, steps 1 to 30 (to 20 count), 17,500 tokens/s per GPU, node b lost" in text


# --- the directory -------------------------------------------------------------------------------------------


def test_one_attempt_has_its_times_from_what_is_there(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert attempts_of(run) == [Attempt(1, str(tmp_path))]
    write(tmp_path / "job" / "node.json", {"placed": {"run_dir": str(tmp_path)}})
    write(tmp_path / "claim" / "job_id", "7")
    os.utime(tmp_path / "claim" / "job_id", (T0, T0))
    assert attempts_of(run) == [Attempt(1, str(tmp_path), (), T0)]
    write(tmp_path / "end.json", {"began_at": AT + 1, "ended_at": AT + 9, "exit_code": 3})
    assert attempts_of(run) == [Attempt(1, str(tmp_path), (), AT + 1, AT + 9, 3, queued=True)]


def test_the_last_attempt_begins_where_the_one_before_ended_or_its_job_began(run: Run) -> None:
    (run.path / "attempt.json").unlink()
    (run.path / "end.json").unlink()
    os.utime(run.path / "claim" / "job_id", (T0 + 30, T0 + 30))
    last = attempts_of(run)[-1]
    assert (last.number, last.began_at, last.ended_at) == (2, AT + 150, None)
    os.utime(run.path / "claim" / "job_id", (T0 + 500, T0 + 500))
    last = attempts_of(run)[-1]
    assert last.began_at == AT + 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        '{"hosts": 3, "began_at": "x", "ended_at": 1e300, "exit_code": true, "cause": [], "step": -1}',
        '{"culprits": {"a": 1}, "again": 1, "why_not": 4, "step": 1.5, "hosts": [1, null, [], ""]}',
    ],
)
def test_a_damaged_attempt_is_a_gap(run: Run, text: str) -> None:
    path = run.path / "attempts" / "1"
    write(path / "attempt.json", text)
    write(run.path / "attempts" / "x" / "attempt.json", text)
    first, last = attempts_of(run)
    assert first == Attempt(1, str(path)) and last.began_at == AT + 153
    found = outcome(run)
    assert found.complete and found.goodput is None  # when it began is not known
    assert found.attempts[0].kept_step == 29


def test_words_for_every_cause() -> None:
    for known in known_errors():
        for culprits in ((), ("n1", "n2")):
            words = ended_by(Attempt(1, "", cause=known.code, culprits=culprits))
            assert words and "{" not in words
    assert ended_by(Attempt(1, "", cause="node-unfit", culprits=("n1",))) == "node n1 is not fit to train"
    assert ended_by(Attempt(1, "", cause="requeued")) == "queued again by Slurm or an administrator"
    assert (ended_by(Attempt(1, "")), ended_by(Attempt(1, "", cause="new"))) == ("", "new")


def test_an_earlier_attempt_is_explained_by_its_own_logs(run: Run) -> None:
    path = run.path / "attempts" / "1"
    write(path / "logs" / "job.log", "srun: error: Node failure on b\n")
    write(path / "logs" / "ranks" / "0001-b" / "x" / "attempt_0" / "0" / "stderr.log", "")
    found = explain(path / "logs", how_it_ended("FAILED", "", 1, path / "logs"), "r", run.path)
    assert (found.code, found.path) == ("node-failure", path / "logs" / "job.log")


# --- the commands --------------------------------------------------------------------------------------------


def test_status_and_logs_name_attempts(run: Run, launch: Launch) -> None:
    shown = launch("status", "r", "--runs-dir", str(run.path.parent)).stdout
    assert "  attempt 1: a, b, steps 1 to 30 (to 20 count), 17,500 tokens/s per GPU, node b lost\n" in shown
    assert "  attempt 2: a, c, steps 30 to 100, 17,600 tokens/s per GPU\n" in shown
    values = json.loads(launch("status", "r", "--json", "--runs-dir", str(run.path.parent)).stdout)
    assert [one["number"] for one in values["attempts"]] == [1, 2]
    write(run.path / "attempts" / "1" / "logs" / "0000-a.log", "the first\n")
    for options, words in (((), "step: 100"), (("--attempt", "1"), "the first"), (("--attempt", "2"), "step: 100")):
        assert words in launch("logs", "r", *options, "--runs-dir", str(run.path.parent)).stdout
    refused = launch("logs", "r", "--attempt", "3", "--runs-dir", str(run.path.parent))
    assert refused.returncode == 2 and "2 attempts" in refused.stderr


def test_status_says_why_no_further_attempt_follows(run: Run, launch: Launch) -> None:
    about = json.loads((run.path / "attempt.json").read_text())
    write(run.path / "attempt.json", about | {"exit_code": 1, "cause": "oom-kill", "why_not": "cause", "step": 80})
    write(run.path / "end.json", {"exit_code": 1, "began_at": AT + 30, "ended_at": AT + 361})
    shown = launch("status", "r", "--runs-dir", str(run.path.parent)).stdout
    assert "  no further attempt: the next one would end in the same way\n" in shown
    assert f"  to go on from step 80: launcher resume {run.reference}\n" in shown


def test_how_far_attempts_came_is_told_while_they_go_on(run: Run) -> None:
    assert [(one.last_step, one.kept_step) for one in results_of(attempts_of(run))] == [(30, 20), (100, 100)]


def test_the_phases_begin_anew_with_each_attempt(run: Run, tmp_path: Path) -> None:
    (later := run.path / "attempts").rename(tmp_path / "kept")
    for name in ("attempt.json", "end.json"):
        (run.path / name).unlink()
    os.utime(run.path / "claim" / "job_id", (T0 + 30, T0 + 30))
    watcher = Watcher(run)
    seen = watcher.look(RUNNING)[-1]
    assert (seen.phase, seen.attempt, seen.before) == (Phase.ENDING, 1, None)
    for name in ("logs", "nodes"):
        (run.path / name).rename(tmp_path / name)
        (run.path / name).mkdir()
    (tmp_path / "kept").rename(later)
    (seen,) = watcher.look(RUNNING)
    assert (seen.phase, seen.attempt, seen.progress) == (Phase.STARTING, 2, None)
    assert started_again(seen) == "attempt 2: node b lost, from step 20"
    assert [seen.began[phase] - AT for phase in (Phase.QUEUED, Phase.STARTING)] == [150, 150]
    assert watcher.look(JobState("PENDING", "squeue"))[-1].phase is Phase.QUEUED  # Slurm queued it again
    (run.path / "logs").rmdir()
    (tmp_path / "logs").rename(run.path / "logs")
    assert [one.progress.step for one in watcher.look(RUNNING) if one.progress] == [*range(30, 101, 10)]


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resumed", "first", "kept"),
    [
        ([None], [1], ()),
        ([20, None], [1, 30], (20,)),
        ([20, None], [1, None], (20,)),
        ([0, None], [1, 1], (0,)),
        ([None, None], [1, 30], (29,)),
        ([20, 10, None], [1, 30, 20], (10, 10)),  # the second found the checkpoint of step 20 damaged
        ([20, 20, 40, None], [1, None, 30, 50], (20, 20, 40)),
    ],
)
def test_which_steps_count(resumed: list[int | None], first: list[int | None], kept: tuple[int, ...]) -> None:
    assert kept_steps(resumed, first) == kept


@st.composite
def several(draw: st.DrawFn) -> tuple[list[Trace], list[int]]:
    """Attempts as clocks that differ by seconds and logs that were cut would have them."""
    traces, resumed, now, step = [], [], 1.7e9, 0
    for _ in range(draw(st.integers(1, 4))):
        began = now + draw(st.floats(-5, 500))
        times = sorted(draw(st.lists(st.floats(0, 500), max_size=6)))
        points = [(step + 1 + 10 * at, began + time) for at, time in enumerate(times)]
        ended = max([began, *(at for _, at in points)]) + draw(st.floats(-5, 300))
        saves = draw(st.lists(st.tuples(st.floats(began - 50, began + 900), st.floats(0, 100)), max_size=4))
        queued, check_s = draw(st.booleans()), draw(st.floats(0, 300))
        end = draw(st.sampled_from([ended, None]))
        traces.append(Trace(Attempt(1, "", (), began, end, queued=queued), check_s, points, saves))
        step = draw(st.integers(step, points[-1][0] + 1 if points else step))
        resumed.append(step)
        now = ended
    return traces, resumed


@given(several())
def test_the_parts_sum_to_the_allocation(found: tuple[list[Trace], list[int]]) -> None:
    traces, resumed = found
    kept = kept_steps(resumed, [one.points[0][0] if one.points else None for one in traces])
    assert list(kept) == sorted(kept) and len(kept) == len(traces) - 1
    spent = goodput(traces, kept, 1.7e9 - 60)
    if spent is None:
        return
    parts = [spent.kept_s, spent.start_s, spent.check_s, spent.lost_s, spent.checkpoints_s, spent.ending_s]
    assert all(part >= -1e-3 for part in parts) and sum(parts) == pytest.approx(spent.allocation_s)
    assert spent.queue_s is not None and spent.queue_s >= 0
    if len(traces) == 1:
        assert spent.lost_s == 0
