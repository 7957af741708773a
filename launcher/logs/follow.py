"""Following a run by its logs: progress over all nodes, and all logs as one.

Each node writes `logs/NNNN-<node>.log`. All of them say `[rank0]`, so nodes are told apart by file only.
Time and sleeping are the caller's, and no state is kept beside what one run of a generator needs.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from launcher.config.mfu import peak_of
from launcher.logs.files import JOB_LOG, files_in, node_logs, reading
from launcher.logs.steps import LINE_BYTES, LogReader, StepRecord, line_time, parse_line, plain_text

# A poll that finds more than this many new steps (attaching to a long run) skips the oldest of them.
_CATCH_UP = 256
_RECENT = 8
_HELD_BYTES = 1 << 22  # of all logs that are merged: more of them than may be open, so none stays open


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Throughput is per GPU, from each node's newest step; the rest is the leading node's.

    `records` counts the step lines read so far, by node. `seconds_left` is None until two steps after the
    first have been seen.
    """

    step: int
    steps_total: int
    loss: float
    tps: float
    tps_min: float
    tps_max: float
    slowest_node: str
    tflops: float | None
    mfu_pct: float | None
    peak_tflops: float | None
    memory_gib: float
    memory_pct: float
    seconds_left: float | None
    records: Mapping[str, int]


@dataclass
class _Node:
    reader: LogReader
    fresh: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_CATCH_UP))
    latest: StepRecord | None = None
    count: int = 0


@dataclass
class _Pace:
    """Recent steps and when they were logged, by the log's own clock, or by ours where a log has no times."""

    marks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, step: int, moment: float) -> None:
        if self.marks and step == self.marks[-1][0]:
            return  # the same step, now with another node's figures
        if self.marks and step < self.marks[-1][0]:
            self.marks.clear()  # restarted
        if len(self.marks) == 1 and self.marks[0][0] == 1 and step > 1:
            self.marks.clear()  # what lies between step 1 and the next is start-up, too
        self.marks.append((step, moment))

    def seconds_left(self, steps_total: int) -> float | None:
        if len(self.marks) < 2:
            return None
        (first, began), (last, ended) = self.marks[0], self.marks[-1]
        if ended <= began:
            return None
        return max(0, steps_total - last) * (ended - began) / (last - first)


class Follower:
    """A run's progress by its logs, read on from where it stopped. Memory doesn't grow with them. `chosen` answers
    with the nodes that train, where the job has more.
    """

    def __init__(
        self,
        log_dir: Path,
        steps_total: int,
        clock: Callable[[], float] = time.time,
        chosen: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._chosen = chosen
        # The first step that was read, and the first line of the last step: the node, and its log's time.
        self.first: tuple[str, float] | None = None
        self.last: tuple[str, float] | None = None
        self._log_dir, self._steps_total, self._clock = log_dir, steps_total, clock
        self._nodes: dict[Path, _Node] = {}
        self._pace = _Pace()
        self._lead: StepRecord | None = None

    def read(self) -> Iterator[Progress]:
        """A snapshot for every step that was logged since the last call."""
        logs, chosen = node_logs(self._log_dir), self._chosen()
        logs = {name: path for name, path in logs.items() if not chosen or name in chosen}
        for name, path in logs.items():
            node = self._nodes.setdefault(path, _Node(LogReader(path)))
            with reading(path):
                for record in node.reader.read():
                    node.count += 1
                    node.fresh.append(record)
                    if record.time is not None:
                        self.first = self.first or (name, record.time)
                        if record.step >= self._steps_total:
                            self.last = self.last or (name, record.time)
        named = {name: self._nodes[path] for name, path in logs.items()}
        for record in _advance(list(named.values()), self._lead):
            self._lead = record
            self._pace.add(record.step, self._clock() if record.time is None else record.time)
            yield _snapshot(named, record, self._steps_total, self._pace.seconds_left(self._steps_total))


def _advance(nodes: list[_Node], lead: StepRecord | None) -> Iterator[StepRecord]:
    """Moves all nodes through their new records together, and yields the leading record after each step.

    The node with most new records sets the pace. Others follow up to its step and no further, so that a
    spread over nodes compares the same step. Only a node that goes back itself shows a restart: one that is
    merely behind (files arrive late over NFS) doesn't set the lead back.
    """
    while any(node.fresh for node in nodes):
        leader = max(nodes, key=lambda node: len(node.fresh))
        step = leader.fresh[0].step
        for node in (leader, *nodes):
            while node.fresh and node.fresh[0].step <= step:
                record = node.fresh.popleft()
                went_back = node.latest is not None and record.step <= node.latest.step
                node.latest = record
                better = lead is None or (record.step, record.knows_loss) > (lead.step, lead.knows_loss)
                if went_back or better:
                    lead = record
                if record.step == step:
                    break
        assert lead is not None  # the leader had a record
        yield lead


def _snapshot(nodes: Mapping[str, _Node], lead: StepRecord, steps_total: int, seconds_left: float | None) -> Progress:
    tps = {name: node.latest.tps for name, node in nodes.items() if node.latest}
    slowest = min(tps, key=lambda name: tps[name])
    return Progress(
        step=lead.step,
        steps_total=steps_total,
        loss=lead.loss,
        tps=median(tps.values()),
        tps_min=tps[slowest],
        tps_max=max(tps.values()),
        slowest_node=slowest,
        tflops=lead.tflops,
        mfu_pct=lead.mfu_pct,
        peak_tflops=peak_of(lead.tflops, lead.mfu_pct),
        memory_gib=lead.memory_gib,
        memory_pct=lead.memory_pct,
        seconds_left=seconds_left,
        records={name: node.count for name, node in nodes.items()},
    )


def merged_lines(
    logs_now: Callable[[], list[tuple[str, Path]]],
    *,
    follow: bool = False,
    is_finished: Callable[[], bool] = lambda: True,
    sleep: Callable[[float], None] = time.sleep,
    poll_seconds: float = 1.0,
) -> Iterator[tuple[str, str]]:
    """All lines of logs, by what each is called, as (name, plain text), as one log.

    A finished run is ordered by the times in its lines; a line without one stays behind the line before it,
    and what comes before a file's first time comes first, the job's own log ahead of the nodes'. With `follow`,
    lines come as they are seen to arrive, until `is_finished`. Memory doesn't grow with the logs.
    """
    if not follow:
        logs = logs_now()
        at_once = max(1 << 14, _HELD_BYTES // max(1, len(logs)))
        streams = [_timed(index, *log, at_once) for index, log in enumerate(logs)]
        for _, _, _, name, text in heapq.merge(*streams):
            yield name, text
        return
    readers: dict[Path, LogReader] = {}
    while True:
        finished = is_finished()
        for name, path in logs_now():
            reader = readers.setdefault(path, LogReader(path))
            with reading(path):
                for line in reader.lines():
                    if not (finished or line.endswith(b"\n") or len(line) == LINE_BYTES):
                        reader.unread(len(line))  # it waits for its end
                    else:
                        yield name, plain_text(line)
        if finished:
            return
        sleep(poll_seconds)


def logs_of(log_dir: Path, node: str = "", rank: int | None = None, per_node: int = 1) -> list[tuple[str, Path]]:
    """The logs that are there by now, of the job and its nodes, or of one of these, or of one rank of all."""
    if rank is not None:
        at, local = divmod(rank, max(1, per_node))
        return [(f"rank{rank}", path) for path in sorted(log_dir.glob(f"ranks/{at:04}-*/*/*/{local}/std*.log"))]
    job = [("job", path) for path in files_in(log_dir) if path.name == JOB_LOG]
    found = job + list(node_logs(log_dir).items())
    return [(name, path) for name, path in found if not node or name == node]


def ranks_of(log_dir: Path, per_node: int = 1) -> list[int]:
    """The ranks whose own logs are there by now."""
    logs = {path.parent for path in log_dir.glob("ranks/????-*/*/*/*/std*.log")}
    return sorted({int(path.parts[-4][:4]) * max(1, per_node) + int(path.name) for path in logs})


def folded(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Every step once, by the first node that logged it: all nodes log it, with the same loss."""
    seen: set[int] = set()
    latest: dict[str, int] = {}
    for name, line in lines:
        record = parse_line(line.encode() + b"\n") if "step:" in line else None
        if record:
            if record.step <= latest.get(name, 0):
                seen.clear()  # restarted
            latest[name] = record.step
            if record.step in seen:
                continue
            seen.add(record.step)
        yield name, line


def _lines_of(path: Path, at_once: int) -> Iterator[bytes]:
    """The lines of a log, each cut after LINE_BYTES. It is open only while `at_once` bytes of it are read."""
    reader, is_new = LogReader(path), True
    while True:
        held: list[bytes] = []
        seen = 0
        with reading(path), contextlib.closing(reader.lines()) as pieces:
            for piece in pieces:
                if is_new:
                    held.append(piece)
                is_new = piece.endswith(b"\n")
                seen += len(piece)
                if seen >= at_once:
                    break
        yield from held
        if not seen:
            return


def _timed(index: int, name: str, path: Path, at_once: int) -> Iterator[tuple[float, int, int, str, str]]:
    moment = -math.inf
    for number, line in enumerate(_lines_of(path, at_once)):
        # Never backwards: a merge needs sorted streams, and a file's own order is the truth about it.
        moment = max(moment, line_time(line[:512], moment if math.isfinite(moment) else None) or -math.inf)
        yield moment, index, number, name, plain_text(line)
