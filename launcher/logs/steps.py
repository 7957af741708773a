"""Reading torchtitan's logs: step records, line by line.

The format is that of torchtitan's `MetricsProcessor.log` from 0.2.1 to 0.3.0, and of its ancestors that wrote
`wps:` and had no gradient norm.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
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
    # Forks print no MFU; the end of the line then shows that nothing was cut.
    + (rb"(?:" + _GAP + rb"mfu:(?:" + _NUMBER + rb"%|[ \t]{0,12}N/A)|(?=[ \t\x1b\[0-9;m]{0,60}\r?\n))")
)
_MOMENT = rb"([0-9]{4}-[0-9]{2}-[0-9]{2}[ _T][0-9]{2}:[0-9]{2}):([0-9]{2}(?:[,.][0-9]{1,6})?)"
TIME = re.compile(_MOMENT)
CLOCK = re.compile(rb":[0-9]{2}:[0-9]{2}")  # stands in each time, and is found quickly
# torch's C++ (`[E101 00:06:01.0`) and Python (`E0101 00:06:01.000000`) name no year.
_TIME_OF_YEAR = re.compile(rb"[IWEF]([0-9]{1,2})([0-9]{2}) ([0-9]{2}:[0-9]{2}):([0-9]{2}\.[0-9]{1,9})")
_RANK = re.compile(rb"\[[A-Za-z_]{1,24}([0-9]{1,6})\]:")
# The whole line as torchrun prints it, for speed; any other beginning takes the longer way round _STEP.
_USUAL = re.compile(
    (_RANK.pattern + rb"\[titan\] " + _MOMENT + rb" - root - INFO - (?:\x1b\[[0-9;]{0,24}m)?") + _STEP.pattern
)

# Of a checkpoint, the time for which training stood still: torchtitan 0.2, 0.3, and 0.3's last one. An asynchronous one
# is written while training goes on.
_SAVED = re.compile(
    rb"(?:Finished (?:saving|staging) the checkpoint[^\n]{0,48}?|Last step checkpoint completed )in "
    rb"([0-9]{1,9}\.[0-9]{2}) ?s"
)


def parse_line(line: bytes) -> StepRecord | None:
    """The training step that a line reports, or None; a validation line and a line cut short report none."""
    records, _ = _scan(line)
    return records[0] if records else None


def line_time(text: bytes, near: float | None = None) -> float | None:
    """The last date and time in a line, in the seconds of `StepRecord.time`. One without a year is read as the nearest
    to `near`.
    """
    if found := TIME.findall(text):
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


def last_bytes(path: Path, count: int = 1 << 15) -> bytes:
    """The end of a file, or nothing where it cannot be read."""
    try:
        if (handle := open_log(path)) is None:
            return b""
        with handle:
            handle.seek(max(0, handle.seek(0, 2) - count))
            return handle.read(count)
    except OSError:
        return b""


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
        self.saves: list[tuple[float, float]] = []  # as `read` comes by them: when, and how many seconds each took
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
        for lines in self._appended(many_lines):
            records, end = _scan(lines)
            for match in _SAVED.finditer(lines) if b"checkpoint" in lines else ():
                if at := line_time(lines[lines.rfind(b"\n", 0, match.start()) + 1 : match.start()]):
                    self.saves.append((at, float(match[1])))
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


def many_lines(handle: BufferedReader) -> bytes:
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
