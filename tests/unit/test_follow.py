"""Following a run by files that appear, grow, come late and start again. No test sleeps."""

from __future__ import annotations

import errno
import io
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.logs import steps as log
from launcher.logs.files import error_logs, last_lines, node_logs
from launcher.logs.first_error import find_errors
from launcher.logs.follow import Follower, Progress, logs_of, merged_lines
from tests.conftest import Forked
from tests.unit.titan_log import T0, step


class Run:
    """A run that writes something after every look, then ends."""

    def __init__(self, folder: Path, *polls: Callable[[], None]) -> None:
        self.folder = folder
        self.polls = list(polls)

    def write(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as handle:
            handle.write(text)

    def replace(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def sleep(self, _seconds: float = 0) -> None:
        if self.polls:
            self.polls.pop(0)()

    def is_finished(self) -> bool:
        return not self.polls

    def follow(self, steps_total: int = 100) -> list[Progress]:
        follower = Follower(self.folder, steps_total, clock=lambda: 0.0)
        seen = list(follower.read())
        while self.polls:
            self.sleep()
            seen += follower.read()
        return seen


def test_nodes_are_named_by_their_files(tmp_path: Path) -> None:
    for name in ("0001-gpu-a.log", "0000-gpu-b.log", "job.log", "0002-gpu-c.txt", "events.jsonl", "x-y.log"):
        (tmp_path / name).touch()
    (tmp_path / "0003-bad\x1b[2J.log").touch()
    assert list(node_logs(tmp_path)) == ["gpu-b", "gpu-a"]
    (tmp_path / "0005-gpu-a.log").touch()
    assert list(node_logs(tmp_path)) == ["gpu-b", "0001-gpu-a", "0005-gpu-a"]
    assert node_logs(tmp_path / "absent") == {}


def test_the_cause_may_stand_in_the_log_of_a_rank_that_is_not_shown(tmp_path: Path) -> None:
    hidden = tmp_path / "ranks/0001-b/42_x1/attempt_0/3/stderr.log"
    hidden.parent.mkdir(parents=True)
    hidden.write_text("torch.OutOfMemoryError: CUDA out of memory.\n")
    (tmp_path / "0000-a.log").write_text("[rank0]: RuntimeError: Connection closed by peer\n")
    (tmp_path / "job.log").write_text("srun: error: b: task 1: Exited with exit code 1\n")
    found = find_errors(error_logs(tmp_path))
    assert (found.path, list(found.lines)) == (hidden, ["torch.OutOfMemoryError: CUDA out of memory."])


def test_files_appear_and_grow(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    run = Run(folder)
    run.polls = [
        lambda: folder.mkdir(),
        lambda: run.write("0000-a.log", "starting\n" + step(1, 900)),
        lambda: run.write("0001-b.log", step(1, 800)),
        lambda: run.write("0000-a.log", step(10, 17000)),
        lambda: run.write("0001-b.log", step(10, 17200)[:90]),
        lambda: run.write("0001-b.log", step(10, 17200)[90:]),
        lambda: None,
    ]
    seen = run.follow()
    assert [(p.step, p.tps_min, p.tps_max, p.slowest_node) for p in seen] == [
        (1, 900, 900, "a"),
        (1, 800, 900, "b"),
        (10, 800, 17000, "b"),
        (10, 17000, 17200, "a"),
    ]
    assert seen[-1].records == {"a": 2, "b": 2}
    last = seen[-1]
    assert (last.tps, last.loss, last.tflops, last.mfu_pct, last.peak_tflops) == (17100, 6.4277, 1018.2, 45.25, 2250)
    assert (last.memory_gib, last.memory_pct, last.steps_total) == (158.61, 86.2, 100)


def test_a_run_that_is_over_is_read_in_one_go(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write("0000-a.log", "".join(step(n) for n in (1, 10, 20, 30)))
    run.write("0001-b.log", "".join(step(n, 17000 + n) for n in (1, 10, 20, 30)))
    seen = run.follow()
    assert [p.step for p in seen] == [1, 10, 20, 30]
    assert [p.tps_min for p in seen] == [17001, 17010, 17020, 17030]  # each step beside itself


def test_time_left_comes_from_the_steps_after_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path)
    # One minute of start-up before step 10 must not count; ten steps then take 20 seconds.
    run.write("0000-a.log", "".join(step(n, at=T0 + s) for n, s in ((1, 0), (10, 60), (20, 80), (30, 100), (100, 240))))
    assert [p.seconds_left for p in run.follow()] == [None, None, 160.0, 140.0, 0.0]


def test_a_step_of_several_nodes_is_one(tmp_path: Path) -> None:
    """The second node's lines come when the first's have been read: start-up must not count for that."""
    run = Run(tmp_path)
    for n, second in ((1, 0), (10, 60), (20, 80)):
        for name, late in (("0000-a.log", 0), ("0001-b.log", 1)):
            run.polls.append(partial(run.write, name, step(n, at=T0 + second + late)))
    assert run.follow()[-1].seconds_left == 160.0


def test_lines_without_a_time_use_our_clock(tmp_path: Path) -> None:
    times = iter([0.0, 100.0, 110.0, 120.0])
    (tmp_path / "0000-a.log").write_text("".join(step(n).partition("INFO - ")[2] for n in (1, 10, 20)))
    seen = list(Follower(tmp_path, 40, clock=lambda: next(times)).read())
    assert [p.seconds_left for p in seen] == [None, None, 20.0]


def test_a_restart_goes_back_and_estimates_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("0000-a.log", "0001-b.log"):
        run.write(name, "".join(step(n) for n in (1, 10, 20, 30)))
        run.write(name, "".join(step(n, 18000, at=T0 + 900 + n) for n in (20, 30, 40)))
    seen = run.follow()
    assert [p.step for p in seen] == [1, 10, 20, 30, 20, 30, 40]
    assert [p.seconds_left is None for p in seen] == [True, True, False, False, True, False, False]
    assert seen[-1].tps_min == 18000


def test_a_file_that_comes_late_does_not_set_the_run_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.polls = [
        lambda: run.write("0000-a.log", step(1) + step(10) + step(20)),
        lambda: run.write("0001-b.log", step(1, 100) + step(10, 17000)),
        lambda: run.write("0001-b.log", step(20, 17200) + step(30, 17300)),
    ]
    seen = run.follow()
    assert [p.step for p in seen] == [1, 10, 20, 20, 20, 20, 30]
    assert (seen[-1].tps_min, seen[-1].tps_max) == (17300, 17581)


def test_a_stage_that_does_not_know_the_loss_does_not_lead(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write("0000-a.log", step(10, loss=-1.0))
    run.write("0001-b.log", step(10, loss=6.1))
    assert [p.loss for p in run.follow()] == [6.1]


def test_attaching_to_a_long_run_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0000-a.log"
    with path.open("w") as handle:
        for n in range(20_000):
            handle.write(step(n + 1, at=T0 + n % 3600))
    tracemalloc.start()
    try:
        steps = [p.step for p in Follower(tmp_path, 20_000).read()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert steps[-1] == 20_000 and 1 < len(steps) <= 256
    assert peak < 12 << 20, f"{peak} bytes for a log of {path.stat().st_size}"


# --- all logs as one ----------------------------------------------------------------------------------------


def test_a_finished_run_is_merged_by_time(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("job starts\n")
    (tmp_path / "0000-a.log").write_text("titan-node: ok a\n" + step(1) + "  detail of 1\n" + step(20))
    (tmp_path / "0001-b.log").write_text("titan-node: ok b\n" + step(10) + step(5) + step(30))
    lines = list(merged_lines(partial(logs_of, tmp_path)))
    assert [(name, text.partition("step:")[2][:4].strip() or text) for name, text in lines] == [
        ("job", "job starts"),
        ("a", "titan-node: ok a"),
        ("b", "titan-node: ok b"),
        ("a", "1"),
        ("a", "  detail of 1"),
        ("b", "10"),
        ("b", "5"),  # a file's own order is never changed
        ("a", "20"),
        ("b", "30"),
    ]


def test_merged_lines_cannot_drive_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "0000-a.log").write_bytes(b"\x1b[2J\x1b]0;owned\x07red\x1b[0m \xff\n")
    for following in (False, True):
        assert list(merged_lines(partial(logs_of, tmp_path), follow=following)) == [("a", "red \ufffd")]


def test_following_all_logs_gives_whole_lines_as_they_come(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.polls = [
        lambda: run.write("job.log", "job starts\n"),
        lambda: run.write("0000-a.log", "one\ntw"),
        lambda: run.write("0001-b.log", "first, a long line\n"),
        lambda: run.write("0000-a.log", "o\nthree"),
        lambda: run.replace("0001-b.log", "new\n"),
        lambda: None,
    ]
    lines = list(merged_lines(partial(logs_of, tmp_path), follow=True, is_finished=run.is_finished, sleep=run.sleep))
    assert lines == [
        *(("job", "job starts"), ("a", "one"), ("b", "first, a long line"), ("a", "two")),
        *(("b", "new"), ("a", "three")),
    ]


@pytest.mark.parametrize("following", [False, True])
def test_merging_huge_lines_is_bounded(tmp_path: Path, following: bool) -> None:
    (tmp_path / "0000-a.log").write_bytes(b"x" * (16 << 20) + b"\nlast\n")
    tracemalloc.start()
    try:
        lengths = [len(text) for _, text in merged_lines(partial(logs_of, tmp_path), follow=following)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths[-1] == 4 and max(lengths) <= 1 << 16
    assert peak < 2 << 20


# --- logs that cannot be read, and more of them than may be open ---------------------------------------------


READERS: list[Callable[[Path], Iterable[object]]] = [
    lambda folder: list(Follower(folder, 9).read()),
    lambda folder: list(merged_lines(partial(logs_of, folder))),
    lambda folder: list(merged_lines(partial(logs_of, folder), follow=True)),
]


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_logs(tmp_path: Path, read: Callable[[Path], Iterable[object]]) -> None:
    (tmp_path / "0000-a.log").write_text(step(1))
    (tmp_path / "0001-b.log").mkdir()
    (tmp_path / "0002-c.log").symlink_to("0002-c.log")
    (tmp_path / "0003-d.log").symlink_to("nowhere")
    os.mkfifo(tmp_path / "0004-e.log")
    (tmp_path / "0005-f.log").symlink_to("0000-a.log")
    os.mkfifo(tmp_path / "job.log")
    (tmp_path / "ranks/0000-a").mkdir(parents=True)
    os.mkfifo(tmp_path / "ranks/0000-a/stderr.log")
    assert list(node_logs(tmp_path)) == ["a", "f"]
    assert read(tmp_path)
    assert find_errors(error_logs(tmp_path)).path is None
    assert last_lines(error_logs(tmp_path)[::-1], 1)[0] == tmp_path / "0005-f.log"


def test_a_log_that_turns_into_something_else_while_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    assert [log.open_log(tmp_path / name) for name in ("directory", "fifo", "absent")] == [None] * 3
    assert find_errors([tmp_path / "directory", tmp_path / "fifo"]).path is None


class _Damaged(io.BytesIO):
    """A file whose disk fails, or whose server forgot it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def fileno(self) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def seek(self, *_: int) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Iterable[object]], number: int
) -> None:
    (tmp_path / "0000-a.log").write_text(step(1))

    def refuse(_: object) -> io.BytesIO:
        if number == errno.EACCES:
            raise OSError(number, os.strerror(number))
        return _Damaged(number)

    monkeypatch.setattr("launcher.logs.steps.open_log", refuse)
    with pytest.raises(LauncherError) as caught:
        read(tmp_path)
    assert caught.value.what == f"cannot read {tmp_path}/0000-a.log: {os.strerror(number)}"
    assert caught.value.fix.startswith("ls -l") and caught.value.status is ExitStatus.FILESYSTEM


@pytest.mark.parametrize("read", READERS)
def test_a_log_directory_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Iterable[object]]
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "file").touch()
    with pytest.raises(LauncherError, match="Not a directory"):
        read(tmp_path / "file")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LauncherError) as caught:
        read(tmp_path)
    assert caught.value.what == f"cannot read {tmp_path}: Permission denied"
    assert caught.value.status is ExitStatus.FILESYSTEM


def test_more_nodes_than_files_may_be_open(tmp_path: Path) -> None:
    for node in range(100):
        with (tmp_path / f"{node:04}-n{node}.log").open("w") as handle:
            handle.write("early\n" + step(1, at=T0 + node) + "x" * 200_000 + "\n" + "detail\n" * 500)
            handle.write(step(2, at=T0 + 200 + node))

    def merge() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        for name, text in merged_lines(partial(logs_of, tmp_path)):
            print(name, text[:1000])

    done = Forked(merge, [], os.environ).end()
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 100 * (4 + 500)
    nodes = [f"n{node}" for node in range(100)]
    for number in (1, 2):
        assert [line.split()[0] for line in lines if f"step:  {number}" in line] == nodes
