"""Reading torchtitan's logs: step records, line by line, and the first error of a run that failed.

The format is that of torchtitan's `MetricsProcessor.log` from 0.2.1 to 0.3.0, and of its ancestors that wrote
`wps:` and had no gradient norm.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

BLOCK_BYTES = 1 << 18
LINE_BYTES = 1 << 16  # longer lines come in pieces; the trainer writes none
RECORD_BYTES = 2048  # no match of _STEP is longer (a test asks the regex engine)
PREFIX_BYTES = 256  # what stands before `step:`: srun's label, torchrun's rank, the time, the logger's name


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step as a rank logged it; tokens/s and TFLOP/s are per device, since its last such line.

    `time` is seconds since 1970 if the log's clock were UTC. Logs carry no time zone, so only differences
    between times of one run mean anything. `rank` is the local rank that torchrun printed: each node has a 0.
    """

    step: int
    loss: float
    grad_norm: float | None
    memory_gib: float
    memory_pct: float
    tps: float
    tflops: float | None
    mfu_pct: float | None
    time: float | None = None
    rank: int | None = None

    @property
    def knows_loss(self) -> bool:
        """False for a pipeline stage that isn't the last: torchtitan has it print a sum of -1."""
        return not self.loss < 0


# Every repetition has a bound, and no gap may hold words: a line that was cut and glued to the next one must
# not make a record out of two, and the longest match must be known to carry it from one piece to the next.
# Numbers are matched loosely and left to float(), which is faster than spelling them out.
_GAP = rb"[ \t\x1b][ \t\x1b\[0-9;m]{0,60}"  # blanks and colours
_NUMBER = rb"[ \t]{0,12}([-+]?[0-9][0-9,.]{0,60}|[-+]?(?:[nN]a[nN]|[iI]nf))"
_STEP = re.compile(
    rb"step:[ \t]{0,12}([0-9]{1,12})"
    + (_GAP + rb"loss:" + _NUMBER)
    + (rb"(?:" + _GAP + rb"grad_norm:" + _NUMBER + rb")?")
    + (_GAP + rb"memory:" + _NUMBER + rb"GiB\(" + _NUMBER + rb"%\)")
    + (_GAP + rb"[tw]ps:" + _NUMBER)
    + (rb"(?:" + _GAP + rb"tflops:" + _NUMBER + rb")?")
    + (_GAP + rb"mfu:(?:" + _NUMBER + rb"%|[ \t]{0,12}N/A)")
)
_MOMENT = rb"([0-9]{4}-[0-9]{2}-[0-9]{2}[ _][0-9]{2}:[0-9]{2}):([0-9]{2}(?:[,.][0-9]{1,6})?)"
_TIME = re.compile(_MOMENT)
_RANK = re.compile(rb"\[[A-Za-z_]{1,24}([0-9]{1,6})\]:")
# The whole line as torchrun prints it, for speed; any other beginning takes the longer way round _STEP.
_USUAL = re.compile(
    (_RANK.pattern + rb"\[titan\] " + _MOMENT + rb" - root - INFO - (?:\x1b\[[0-9;]{0,24}m)?") + _STEP.pattern
)


def parse_line(line: bytes) -> StepRecord | None:
    """The training step that a line reports, or None; a validation line and a line cut short report none."""
    records, _ = _scan(line)
    return records[0] if records else None


def line_time(text: bytes) -> float | None:
    """The last date and time in a line, in the seconds of `StepRecord.time`."""
    found = _TIME.findall(text)
    return _seconds(*found[-1]) if found else None


def plain_text(line: bytes) -> str:
    """A log line as text that cannot drive a terminal: without escape sequences, control and direction marks.

    After a carriage return only the last text is kept, as a terminal would show it.
    """
    text = line.rstrip(b"\r\n").decode("utf-8", errors="replace")
    shown = text.rpartition("\r")[2]
    return _CONTROLS.sub("", _ESCAPES.sub("", shown)).rstrip()


_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # titles, clipboard
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def open_log(path: str | os.PathLike[str]) -> BufferedReader | None:
    """The file, or None where there is no regular one (yet, or any more on NFS). Never waits for a pipe's writer."""
    try:
        handle = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 the caller closes it
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.EISDIR, errno.ENXIO):  # ENXIO: a socket
            return None
        raise
    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        return handle
    handle.close()
    return None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class LogReader:
    """Reads one growing file from where it stopped, line by line.

    The file is opened anew at every reading: on NFS that is what makes another node's writes visible. A file
    that became shorter or was replaced is read from its start; one that doesn't exist yet has no lines. A
    file that was cut and has grown past the old offset between two readings can't be told from one that grew.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.offset = 0
        self._identity: tuple[int, int] | None = None
        self._reached = 0  # what of the file was seen, `unread` or not
        self._unread = 0

    def lines(self) -> Generator[bytes, None, None]:
        """The lines that were appended since the last call, in pieces of at most LINE_BYTES, the last maybe without its
        end. What is `unread` of a piece without one comes again, with what follows it.
        """
        return self._appended(lambda handle: handle.readline(LINE_BYTES))

    def unread(self, count: int) -> None:
        self._unread = count

    def read(self) -> Iterator[StepRecord]:
        """The records that were appended since the last call; take all of it, each is handed out once."""
        for lines in self._appended(_many_lines):
            records, end = _scan(lines)
            if not lines.endswith(b"\n"):  # a record may have begun, and is whole with what follows
                self.unread(min(len(lines) - end, RECORD_BYTES + PREFIX_BYTES))
            yield from records

    def _appended(self, piece_of: Callable[[BufferedReader], bytes]) -> Generator[bytes, None, None]:
        if (handle := open_log(self.path)) is None:
            return
        with handle:
            status = os.fstat(handle.fileno())
            identity = (status.st_dev, status.st_ino)
            if status.st_size < self._reached or self._identity not in (None, identity):
                self.offset = self._reached = 0
            self._identity = identity
            handle.seek(self.offset)
            try:
                while piece := piece_of(handle):
                    yield piece
                    if not piece.endswith(b"\n"):
                        self._reached = handle.tell()
                        is_last = not handle.peek(1)
                        handle.seek(-self._unread, os.SEEK_CUR)
                        self._unread = 0
                        if is_last:
                            return
            finally:
                self.offset = handle.tell()
                self._reached = max(self._reached, self.offset)


def _many_lines(handle: BufferedReader) -> bytes:
    """Whole lines, as far as they have an end within LINE_BYTES: asking much of a block at once is quick."""
    block = handle.read(BLOCK_BYTES)
    return block if not block or block.endswith(b"\n") else block + handle.readline(LINE_BYTES)


def _scan(lines: bytes) -> tuple[list[StepRecord], int]:
    """The records of lines, and where the last of them ends (0 if there is none)."""
    records: list[StepRecord] = []
    end = 0
    hit = lines.find(b"step:")
    while hit >= 0:
        begin = max(end, hit - PREFIX_BYTES)
        begin = max(begin, lines.rfind(b"\n", begin, hit) + 1, lines.rfind(b"\r", begin, hit) + 1)
        match = _USUAL.match(lines, begin) or _STEP.match(lines, hit)
        if match and (record := _record(match, lines[begin:hit])):
            records.append(record)
            end = match.end()
        hit = lines.find(b"step:", max(hit + 5, end))
    return records, end


def _record(match: re.Match[bytes], prefix: bytes) -> StepRecord | None:
    *usual, step, loss, grad_norm, memory_gib, memory_pct, tps, tflops, mfu = match.groups()
    if usual:
        rank, moment = usual[0], _seconds(usual[1], usual[2])
    elif prefix.endswith(b"validate "):
        return None
    else:
        rank = found[-1] if (found := _RANK.findall(prefix)) else None
        moment = line_time(prefix)
    try:
        return StepRecord(
            int(step),
            float(loss),
            float(grad_norm) if grad_norm else None,
            float(memory_gib),
            float(memory_pct),
            float(tps.replace(b",", b"")),
            float(tflops.replace(b",", b"")) if tflops else None,
            float(mfu) if mfu else None,
            moment,
            int(rank) if rank else None,
        )
    except ValueError:  # a number with two points, or a comma where torchtitan writes none
        return None


def _seconds(minute: bytes, seconds: bytes) -> float | None:
    start = _minute_start(minute)
    return None if start is None else start + float(seconds.replace(b",", b"."))


@lru_cache(maxsize=256)
def _minute_start(text: bytes) -> float | None:
    try:
        moment = datetime.strptime(text.decode().replace("_", " "), "%Y-%m-%d %H:%M")
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC).timestamp()


# --- the first error of a failed run ----------------------------------------------------------------------

_CAUSE, _PEER, _AFTERMATH, _GOODBYE = range(4)
# A rank that dies takes its peers with it: NCCL or gloo complains there, torchrun and srun report the exit,
# and whoever outlives the head node finds its rendezvous gone. A later grade is a cause only when nothing of
# an earlier one was printed anywhere.
_HINTS = (
    b"rror",
    b"ERROR",
    b"FAIL",
    b"Traceback",
    b"CANCELLED",
    b"nrecognized",
    b" fault",
    b"oom_kill",
    b"NCCL WARN",
    b"NCCL failure",
    b"Watchdog",
    b"pyxis:",
)
_LABELS = re.compile(r"(?:[0-9]{1,5}: ?)?(?:\[[A-Za-z_]{1,24}[0-9]{1,6}\]: ?)*")
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Unsupported|Timeout)(?:: |:?$)")
_ENDS_TRACEBACK = re.compile(r"[A-Za-z_][\w.]*(?:: |:?$)")
_CAUSES = re.compile(
    r"titan-node: FAIL|CUDA out of memory|oom_kill|DUE TO [A-Z]|error: pyxis:"
    r"|pyxis: .*(?:fail|not exist|must be)|^\[ERROR\]|^enroot[\w-]*: |FATAL ERROR|Exec format error"
    r"|nrecognized (?:option|argument)|error: execve|Segmentation fault|Bus error|Illegal instruction|CUDA error"
)
_PEERS = re.compile(
    r"NCCL (?:error|failure)|nccl\w*Error|Watchdog caught collective|Dist(?:Backend|Network|Store)Error"
    r"|Connection (?:closed|reset|refused)|Broken pipe|[Tt]imed out"
)
_AFTERMATHS = re.compile(
    r"srun: error|slurmstepd: error|\(exitcode: |ChildFailedError|SignalException|NCCL WARN"
    r"|KeyboardInterrupt|SystemExit"
)
_GOODBYES = re.compile(r"Rendezvous\w*(?:Error|Exception)|rendezvous\b.*\bclosed|TCPStore")


@dataclass
class _Found:
    grade: int
    labels: str
    lines: list[str]
    time: float = math.inf


@dataclass
class _Search:
    """What is remembered while one file is read: open tracebacks by their labels, and the best error."""

    tracebacks: dict[str, deque[str]] = field(default_factory=dict)
    best: _Found | None = None
    following: int = 0  # how many more lines may belong to the best error

    @property
    def undated(self) -> bool:
        return self.best is not None and self.best.time == math.inf

    @property
    def quiet(self) -> bool:
        """Whether only a line with a hint can matter."""
        return not (self.tracebacks or self.following or self.undated)


def first_error(paths: Iterable[Path]) -> tuple[Path, list[str]] | None:
    """Where a failed run went wrong: the file, and the error's line followed by what was printed with it.

    Among files the most telling error wins (an exception or a container's failure before a lost connection,
    that before what srun and torchrun report of it, a closed rendezvous last), then the earliest, then the
    order of `paths`. Within a file the first of its kind wins. For failed runs only: a good one also ends with
    warnings.
    """
    found: list[tuple[int, float, int, Path, list[str]]] = []
    for index, path in enumerate(paths):
        search = _Search()
        try:
            if (handle := open_log(path)) is None:
                continue
            with handle:
                while block := _many_lines(handle):
                    # Most blocks have nothing to say, and asking that of a block is quick.
                    if not search.quiet or any(hint in block for hint in _HINTS):
                        for line in block.split(b"\n"):
                            _look(search, line[:4096])
        except OSError:
            continue
        if best := search.best:
            found.append((best.grade, best.time, index, Path(path), best.lines))
    if not found:
        return None
    _, _, _, path, lines = min(found, key=lambda entry: entry[:3])
    return path, lines


def _look(search: _Search, line: bytes) -> None:
    if search.quiet and not any(hint in line for hint in _HINTS):
        return
    best = search.best
    text = plain_text(line)
    labels = _LABELS.match(text)
    label = labels.group() if labels else ""
    text = text[len(label) :]
    moment = line_time(line)
    if best is not None and search.undated and moment is not None:
        best.time = moment  # torchrun's report says when; it comes after the traceback that it speaks of
    if text.startswith("Traceback (most recent call last)"):
        search.following = 0
        if len(search.tracebacks) < 64:
            search.tracebacks[label] = deque(maxlen=2)
        return
    frames = search.tracebacks.get(label)
    if frames is not None and text[:1].isspace():
        if text.strip(" ^~"):
            frames.append(text.strip())
        return
    if (frames is not None and _ENDS_TRACEBACK.match(text)) or _EXCEPTION.match(text):
        search.tracebacks.pop(label, None)
        _offer(search, _Found(_grade_exception(text), label, [text, *(frames or ())], moment or math.inf))
    elif (grade := _grade(text)) is not None and (best is None or grade < best.grade):
        _offer(search, _Found(grade, label, [text], moment or math.inf))
    elif best is not None and search.following and label == best.labels:
        search.following -= 1
        if text and not text.startswith("[titan]"):
            best.lines.append(text)


def _offer(search: _Search, found: _Found) -> None:
    if search.best is None or found.grade < search.best.grade:
        search.best, search.following = found, 4


def _grade_exception(text: str) -> int:
    for grade, pattern in ((_GOODBYE, _GOODBYES), (_AFTERMATH, _AFTERMATHS), (_PEER, _PEERS)):
        if pattern.search(text):
            return grade
    return _CAUSE


def _grade(text: str) -> int | None:
    # Frames of a C++ backtrace name exception classes without being one.
    if text.startswith(("frame #", "Exception raised from")):
        return None
    for grade, pattern in ((_CAUSE, _CAUSES), (_GOODBYE, _GOODBYES), (_PEER, _PEERS), (_AFTERMATH, _AFTERMATHS)):
        if pattern.search(text):
            return grade
    return None
