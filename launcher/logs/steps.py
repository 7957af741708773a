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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
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
    # Forks print no MFU; the end of the line then shows that nothing was cut.
    + (rb"(?:" + _GAP + rb"mfu:(?:" + _NUMBER + rb"%|[ \t]{0,12}N/A)|(?=[ \t\x1b\[0-9;m]{0,60}\r?\n))")
)
_MOMENT = rb"([0-9]{4}-[0-9]{2}-[0-9]{2}[ _T][0-9]{2}:[0-9]{2}):([0-9]{2}(?:[,.][0-9]{1,6})?)"
_TIME = re.compile(_MOMENT)
_CLOCK = re.compile(rb":[0-9]{2}:[0-9]{2}")  # stands in each time, and is found quickly
# torch's C++ (`[E101 00:06:01.0`) and Python (`E0101 00:06:01.000000`) name no year.
_TIME_OF_YEAR = re.compile(rb"[IWEF]([0-9]{1,2})([0-9]{2}) ([0-9]{2}:[0-9]{2}):([0-9]{2}\.[0-9]{1,9})")
_RANK = re.compile(rb"\[[A-Za-z_]{1,24}([0-9]{1,6})\]:")
# The whole line as torchrun prints it, for speed; any other beginning takes the longer way round _STEP.
_USUAL = re.compile(
    (_RANK.pattern + rb"\[titan\] " + _MOMENT + rb" - root - INFO - (?:\x1b\[[0-9;]{0,24}m)?") + _STEP.pattern
)


def parse_line(line: bytes) -> StepRecord | None:
    """The training step that a line reports, or None; a validation line and a line cut short report none."""
    records, _ = _scan(line)
    return records[0] if records else None


def line_time(text: bytes, near: float | None = None) -> float | None:
    """The last date and time in a line, in the seconds of `StepRecord.time`. One without a year is read as the nearest
    to `near`.
    """
    if found := _TIME.findall(text):
        return _seconds(*found[-1])
    if near is None or not (short := _TIME_OF_YEAR.search(text)):
        return None
    month, day, minute, seconds = short.groups()
    year = datetime.fromtimestamp(near, UTC).year
    dates = [b"%d-%b-%b %b" % (year + past, month.zfill(2), day, minute) for past in (-1, 0, 1)]
    moments = [moment for date in dates if (moment := _seconds(date, seconds)) is not None]
    return min(moments, key=lambda moment: abs(moment - near), default=None)


def plain_text(line: bytes) -> str:
    """A log line as text that cannot drive a terminal: without escape sequences, control and direction marks.

    After a carriage return only the last text is kept, as a terminal would show it.
    """
    text = line.rstrip(b"\r\n").decode("utf-8", errors="replace")
    if text.isascii() and text.isprintable():  # most lines
        return text.rstrip()
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
        moment = datetime.strptime(re.sub("[_T]", " ", text.decode()), "%Y-%m-%d %H:%M")
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC).timestamp()


# --- the first error of a failed run ----------------------------------------------------------------------

_CAUSE, _BANNER, _CRASH, _NCCL, _ABORT, _PEER, _AFTERMATH, _GOODBYE = range(8)
# A rank that dies takes its peers with it: NCCL or gloo complains there, torchrun and srun report the exit,
# and whoever outlives the head node finds its rendezvous gone. A later grade is a cause only when nothing of
# an earlier one was printed anywhere. A banner says that a container failed, and other lines why. A rank whose
# NCCL lost a peer aborts, too, so an abort is a cause only where NCCL said nothing.
_PATTERNS = {
    _BANNER: r"pyxis: (?:container start failed|couldn't start container|failed to create container filesystem"
    r"|child \d+ failed|printing enroot log)|error: pyxis:  +(?!.*(?:\[ERROR\]|FATAL ERROR|[Cc]annot|[Ff]ailed"
    r"|failure|[Cc]ould not|enroot-|nvidia-container-cli:|not permitted|denied|No space|wrong trying))",
    _CAUSE: r"titan-node: FAIL|CUDA out of memory|oom_kill|DUE TO (?!NODE)[A-Z]|error: pyxis:"
    r"|pyxis: .*(?:fail|not exist|must be)|^\[ERROR\]|^enroot[\w-]*: |FATAL ERROR|Exec format error"
    r"|nrecognized (?:option|argument)|error: execve|CUDA (?:driver )?error|CUBLAS_STATUS_ALLOC_FAILED"
    r"|NCCL error.* invalid (?:usage|argument)|Task launch for |t find address for host|Node failure on "
    r"|are still not ready|wrong with the boot of the nodes|^FATAL: |invalid choice .* for argument|Error parsing --",
    _CRASH: r"Watchdog caught collective|\(exitcode: -(?!2\b|6\b|15\b)|Fatal Python error: (?!Aborted)|Caught signal \d"
    r"|Segmentation fault|Bus error|Illegal instruction",
    _NCCL: r"NCCL (?:error|failure)|nccl\w*Error",
    _ABORT: r"terminate called|Fatal Python error|\(exitcode: -6\)",
    _GOODBYE: r"Rendezvous\w*(?:Error|Exception)|^(?=.*rror).*(?:rendezvous\b.*\bclosed|TCPStore)",
    _PEER: r"Dist(?:Backend|Network|Store)Error|^(?=.*rror)(?!srun: error: Timed out waiting for job step)"
    r".*(?:Connection (?:closed|reset|refused)|Broken pipe|[Tt]imed out)",
    _AFTERMATH: r"srun: error|slurmstepd: error|\(exitcode: |ChildFailedError|SignalException|NCCL WARN"
    r"|KeyboardInterrupt|SystemExit|[Dd]ataLoader worker .* killed by signal: (?:Terminated|Interrupt)",
}
_GRADES = [(grade, re.compile(pattern)) for grade, pattern in _PATTERNS.items()]
# What any line of a grade holds, unless it begins with an exception. Milestones are wanted whatever was found.
_SIGNS = {
    _CAUSE: b"Traceback (most|titan-node: FAIL|CUDA |oom_kill|DUE TO |pyxis: |enroot|FATAL ERROR|Exec format error"
    b"|nrecognized |error: execve|CUBLAS_STATUS|NCCL error|Task launch for |find address for|are still not ready"
    b"|boot of the nodes|FATAL: |invalid choice |Error parsing --",
    _CRASH: b"Watchdog caught|(exitcode: -|Fatal Python|Caught signal|Segmentation fault|Bus error|Illegal instruction",
    _NCCL: b"NCCL failure|nccl",
    _ABORT: b"terminate called",
    _PEER: b"Connection |Broken pipe|imed out|Dist",
    _AFTERMATH: b"srun: error|slurmstepd: error|(exitcode: |SignalException|NCCL WARN|KeyboardInterrupt"
    b"|killed by signal",
    _GOODBYE: b"endezvous|TCPStore",
}
_MILESTONES = b"Root Cause (first|Training completed|CANCELLED AT|death signal|Node failure on |[ERROR]"
_LABELS = re.compile(r"(?:[0-9]{1,5}: ?)?(?:\[[A-Za-z_]{1,24}[0-9]{1,6}\]: ?)*")
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Unsupported|Timeout)(?:: |:?$)")
_COLOURS = rb"(?:\x1b\[[0-9;]{0,24}m)*"
_BEGINS_WITH_EXCEPTION = re.compile(
    (rb"[\n\r]" + _COLOURS + _LABELS.pattern.encode() + _COLOURS)
    + _EXCEPTION.pattern.encode().replace(b"(?:: |:?$)", rb"(?:: |:?[\s\x1b]|:?\Z)")
)
# What stands between the tracebacks of one error, the last of which ended the rank; and errors that quote others.
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
_WRAPS = re.compile(r"CheckpointException|SubprocException|in DataLoader worker")
_ENDS_TRACEBACK = re.compile(r"[A-Za-z_][\w.]*(?:: |:?$)")
_REPORTED = re.compile(r"\s*(time|host|rank|exitcode)\s*: (\S+)")


# Few, so that a block without any is passed over quickly. Each of the texts above, or its line, holds one.
_HINTS = (
    b"rror|ERROR|FAIL|Traceback|CANCELLED|DUE TO |nrecognized| fault|Illegal instr|oom_kill|"
    b"NCCL WARN|NCCL failure|Watchdog|pyxis:|enroot|exitcode: |terminate called| signal|Root Cause|"
    b"KeyboardInterrupt|Training completed|Node failure|FATAL: |invalid choice |Error parsing --"
).split(b"|")


@cache
def _texts(below: int) -> list[bytes]:
    """What is looked for when only an error of a lower grade would count."""
    return b"|".join((_MILESTONES, *(signs for grade, signs in _SIGNS.items() if grade < below))).split(b"|")


@lru_cache(maxsize=64)
def _any_of(texts: tuple[bytes, ...]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(map(re.escape, texts)))


def _signs(below: int, block: bytes) -> list[re.Pattern[bytes]]:
    """Asking a block first which texts it holds at all is several times as fast as to look for any of them."""
    texts = tuple(text for text in _texts(below) if text in block)
    found = [_any_of(texts)] if texts else []
    return [*found, _BEGINS_WITH_EXCEPTION] if below > _CAUSE and b"Error" in block else found


@dataclass(frozen=True)
class FailedRank:
    """The rank that torchrun saw fail first on one node: its "Root Cause (first observed failure)"."""

    time: float
    host: str
    rank: int | None
    exit_code: int


@dataclass(frozen=True)
class Errors:
    """What the logs of a failed run say about its end."""

    path: Path | None = None
    lines: Sequence[str] = ()  # the first error and what was printed with it
    rank: FailedRank | None = None
    completed: bool = False  # training had reached its last step


@dataclass
class _Found:
    grade: int
    labels: str
    lines: list[str]
    time: float = math.inf
    is_stop: bool = False  # it says itself that Slurm ended the run


@dataclass
class _Search:
    """What is remembered while one file is read: open tracebacks by their labels, and the best error."""

    near: float = 0  # a moment of the run
    stops: bool = False  # whether Slurm ended the run: then what comes after it said so does not count
    tracebacks: dict[str, deque[str]] = field(default_factory=dict)
    best: _Found | None = None
    following: int = 0  # how many more lines may belong to the best error
    chained: bool = False  # whether the next traceback is of what the best error led to
    linked: str | None = None  # the labels of an open traceback that belongs to the best error
    stopped: float | None = None  # when Slurm said so
    report: dict[str, str] | None = None  # torchrun's, while it is read
    ranks: list[FailedRank] = field(default_factory=list)
    completed: bool = False

    @property
    def quiet(self) -> bool:
        """Whether only a line with a sign can matter."""
        return not (self.tracebacks or self.following or self.report is not None)

    @property
    def undated(self) -> bool:
        return self.best is not None and self.best.time == math.inf


def find_errors(paths: Iterable[Path], stopped: bool = False) -> Errors:
    """Where a failed run went wrong: the file, and the error's line followed by what was printed with it.

    Among files the most telling error wins (an exception or a container's failure before a lost connection,
    that before what srun and torchrun report of it, a closed rendezvous last), then the earliest, then the
    order of `paths`. Within a file the first of its kind wins. For failed runs only: a good one also ends with
    warnings. Of a run that was `stopped` by Slurm nothing counts that came after Slurm said so.
    """
    found: list[tuple[Path, _Search]] = []
    near: float | None = None
    for path in paths:
        try:
            if (handle := open_log(path)) is None:
                continue
            with handle:
                search = _Search(near or os.fstat(handle.fileno()).st_mtime, stopped)
                while block := _many_lines(handle):
                    if near is None and (match := _TIME.search(block)):
                        near = search.near = _seconds(*match.groups()) or search.near
                    _look_through(search, block)
        except OSError:
            continue
        found.append((Path(path), search))
    ranks = [rank for _, search in found for rank in search.ranks]
    errors = [(best.grade, best.time, path, best) for path, search in found if (best := search.best)]
    ends = [search.stopped for _, search in found if search.stopped is not None]
    if ends:  # what has no date may have come before
        ranks = [rank for rank in ranks if rank.time < min(ends)]
        errors = [one for one in errors if one[1] < min(ends) or one[3].is_stop or one[:2] == (_CAUSE, math.inf)]
    rank = min(ranks, key=lambda rank: rank.time, default=None)
    completed = any(search.completed for _, search in found)
    if not errors:
        return Errors(None, (), rank, completed)
    _, _, path, best = min(errors, key=lambda error: error[:2])
    return Errors(path, best.lines, rank, completed)


def _look_through(search: _Search, block: bytes) -> None:
    if search.quiet and not search.undated and not any(hint in block for hint in _HINTS):
        return
    block = b"\n" + block  # now each line has a beginning that can be searched for
    at, below, dated = 1, -1, False
    ahead: dict[re.Pattern[bytes], int] = {}  # where each is found next
    while at < len(block):
        start = at
        if search.quiet:
            if below != (below := search.best.grade if search.best else _GOODBYE + 1):
                ahead, dated = dict.fromkeys(_signs(below, block), 0), False
            if search.best and search.undated and not dated:
                search.best.time, dated = _next_time(block, at, search.near), True
            for sign, hit in ahead.items():
                if hit < at:
                    ahead[sign] = match.end() - 1 if (match := sign.search(block, at - 1)) else len(block)
            if (hit := min(ahead.values(), default=len(block))) == len(block):
                return
            start = max(at, block.rfind(b"\n", at - 1, hit) + 1)
        end = block.find(b"\n", start)
        end = len(block) if end < 0 else end
        _look(search, block[start : min(end, start + 4096)])
        at = end + 1


def _next_time(block: bytes, at: int, near: float) -> float:
    """torchrun's report says when; it comes after the traceback that it speaks of."""
    clocks = _CLOCK.finditer(block, at)
    moments = (line_time(block[max(at, clock.start() - 14) : clock.end() + 10], near) for clock in clocks)
    return next((moment for moment in moments if moment is not None), math.inf)


def _look(search: _Search, line: bytes) -> None:
    best = search.best
    text = plain_text(line)
    labels = _LABELS.match(text)
    prefix = labels.group() if labels else ""
    text, label = text[len(prefix) :], prefix.replace(" ", "")  # an empty line has no blank behind its label
    if search.stopped is not None and "Node failure on " not in text:
        return
    stops = search.stops and is_stop(line)
    if stops:
        search.tracebacks.clear()
        search.stopped = _time_or_never(line, search)
    search.completed |= "Training completed" in text
    _read_report(search, text)
    if best and search.undated:
        best.time = _time_or_never(line, search)
    mine = best is not None and search.following > 0 and label == best.labels
    if mine and text.startswith(_CHAINED):
        search.chained = True
        return
    if text.startswith(("Traceback (most recent call last)", "Original Traceback (most")):
        search.linked = label if mine and best and (search.chained or _WRAPS.search(best.lines[0])) else None
        search.following = 0
        if len(search.tracebacks) < 64:
            search.tracebacks[label] = deque(maxlen=2)
        return
    frames = search.tracebacks.get(label)
    if frames is not None and text[:1].isspace():
        if text.strip(" ^~"):
            frames.append(text.strip())
        return
    grade = None
    if (frames is not None and _ENDS_TRACEBACK.match(text)) or _EXCEPTION.match(text):
        search.tracebacks.pop(label, None)
        grade = _grade(text) or _CAUSE
        if grade == _AFTERMATH:
            frames = None  # of torchrun, or of what was interrupted
        if best and search.linked == label:
            search.linked, link = None, [text, *(frames or ())]
            if grade != _AFTERMATH and len(best.lines) < 24:
                best.lines = [*link, *best.lines] if search.chained else [*best.lines, *link]
                search.chained, search.following = False, 4
                return
    elif best is None or best.grade > _CAUSE:
        grade, frames = _grade(text), None
    if grade is not None and (best is None or grade < best.grade):
        is_stop_itself = stops or search.stopped is not None
        search.best = _Found(grade, label, [text, *(frames or ())], _time_or_never(line, search), is_stop_itself)
        search.following = 4
    elif best is not None and label == best.labels:
        if search.following:
            search.following -= 1
            if text.strip("=- ") and not text.startswith("[titan]"):
                best.lines.append(text)
        elif "[ERROR]" in text and "pyxis: " in best.lines[0] and len(best.lines) < 8:
            best.lines.append(text)


def _time_or_never(line: bytes, search: _Search) -> float:
    moment = line_time(line, search.near)
    return math.inf if moment is None else moment


def is_stop(line: bytes) -> bool:
    """Whether slurmstepd or torchrun says that the job is being ended."""
    return b"CANCELLED AT" in line or b"death signal" in line


def _read_report(search: _Search, text: str) -> None:
    """torchrun's report on the rank that failed first: a line for each of time, host, rank and exit code."""
    if text.startswith("Root Cause (first"):
        search.report = {}
    elif search.report is not None:
        if match := _REPORTED.match(text):
            search.report[match[1]] = match[2]
        if "exitcode" in search.report or len(text) > 200 or not text.startswith((" ", "[")):
            told, search.report = search.report, None
            moment = line_time(told.get("time", "").encode()) or math.inf
            rank, code = told.get("rank", ""), told.get("exitcode", "")
            if re.fullmatch(r"-?\d+", code):
                search.ranks.append(
                    FailedRank(moment, told.get("host", ""), int(rank) if rank.isdigit() else None, int(code))
                )


def begins_with_exception(text: str) -> bool:
    return bool(_EXCEPTION.match(text))


@lru_cache(maxsize=256)  # some errors are said again and again
def _grade(text: str) -> int | None:
    # Frames of a C++ backtrace name exception classes without being one.
    if text.startswith(("frame #", "Exception raised from")):
        return None
    return next((grade for grade, pattern in _GRADES if pattern.search(text)), None)
