"""In which phase a run is, and since when, by what the job script and the nodes write."""

from __future__ import annotations

import json
import os
from pathlib import Path

from launcher.runs.directory import Run
from launcher.runs.phases import Phase, Standing, Watcher
from launcher.scheduler.state import JobState
from tests.unit.titan_log import T0, step

RUNNING = JobState("RUNNING", "squeue")


def look(watcher: Watcher, state: JobState | None = RUNNING) -> Standing:
    return watcher.look(state)[-1]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_run_of_two_nodes_goes_through_all_phases(tmp_path: Path) -> None:
    """The nodes' clocks are an hour east of UTC, which their logs do not say."""
    write(tmp_path / "job" / "node.json", {"job": {"nodes": 2}, "recipe": {"steps": 10}, "placed": {}})
    write(tmp_path / "intent.json", {"at": T0})
    watcher = Watcher(Run(tmp_path))
    for state in (JobState("PENDING"), None):
        assert look(watcher, state).phase is Phase.QUEUED
    write(tmp_path / "claim" / "job_id", "7")
    os.utime(tmp_path / "claim" / "job_id", (T0 + 10, T0 + 10))
    assert look(watcher, JobState("PENDING")).phase is Phase.STARTING  # Slurm was asked before it began
    for number, host in enumerate("ab"):
        write(tmp_path / "nodes" / f"000{number}-{host}.doing", {"doing": "speed", "time": T0 + 20 + number})
        seen = look(watcher)
        assert (seen.phase, seen.started) == ((Phase.STARTING, 1), (Phase.CHECKING, 2))[number]
    assert dict(seen.doing) == {"speed": 2} and seen.nodes == 2
    for number, host in enumerate("ab"):
        record = {"host": host, "ok": True, "time": T0 + 20 + number, "check_s": 5, "utc_offset_s": 3600}
        write(tmp_path / "nodes" / f"000{number}-{host}.json", record)
        (tmp_path / "nodes" / f"000{number}-{host}.doing").unlink()
    assert (seen := look(watcher)).phase is Phase.LOADING and seen.fit == 2 and not seen.doing
    write(tmp_path / "logs" / "0000-a.log", step(1, at=T0 + 3600 + 40))
    assert look(watcher).phase is look(watcher).phase is Phase.TRAINING
    write(tmp_path / "logs" / "0001-b.log", step(1, at=T0 + 3600 + 40) + step(10, at=T0 + 3600 + 50))
    assert [one.progress.step for one in watcher.look(RUNNING) if one.progress] == [1, 10]
    write(tmp_path / "end.json", {"began_at": T0 + 10, "ended_at": T0 + 70})
    for one in (watcher, Watcher(Run(tmp_path))):  # from the beginning, and by one who comes late
        seen = look(one, JobState("COMPLETED"))
        assert seen.phase is Phase.ENDING and seen.at == T0 + 70
        began = [seen.began[phase] - T0 for phase in Phase]
        assert began == [0, 10, 21, 26, 40, 50]


def test_a_run_without_records_goes_on(tmp_path: Path) -> None:
    """Of an older launcher, or damaged."""
    write(tmp_path / "logs" / "0000-a.log", step(1))
    write(tmp_path / "nodes" / "0000-a.json", {"host": 3, "ok": 1, "time": "x", "check_s": []})
    assert look(Watcher(Run(tmp_path))).progress


def test_a_run_with_a_spare_node(tmp_path: Path) -> None:
    """It has passed its check like the others, and is not waited for: in no phase, and with no step."""
    write(tmp_path / "job" / "node.json", {"job": {"nodes": 2}, "recipe": {"steps": 10}, "placed": {}})
    write(tmp_path / "claim" / "job_id", "7")
    watcher = Watcher(Run(tmp_path))
    verdict = {"nodes": 3, "ok": True, "unfit": [], "chosen": ["a", "c"], "spare": ["b"]}
    write(tmp_path / "nodes" / "check.json", verdict)
    for number, host in enumerate("abc"):
        assert look(watcher).fit == min(1, number) and look(watcher).phase is not Phase.LOADING
        more = {"spare": True} if host == "b" else {}
        write(tmp_path / "nodes" / f"000{number}-{host}.json", {"host": host, "ok": True, "time": T0, **more})
        write(tmp_path / "logs" / f"000{number}-{host}.log", "titan-check: spare")
    assert (seen := look(watcher)).phase is Phase.LOADING and seen.fit == 2
    for number, host in ((0, "a"), (2, "c")):
        write(tmp_path / "logs" / f"000{number}-{host}.log", step(1))
    progress = look(watcher).progress
    assert progress and progress.records == {"a": 1, "c": 1}
