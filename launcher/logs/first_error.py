"""The first error of a run that failed: which line of which log says best why, and what was printed with it."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from launcher.logs.steps import CLOCK, TIME, last_bytes, line_time, many_lines, open_log, parse_line, plain_text

_CAUSE, _BANNER, _CRASH, _NCCL, _ABORT, _PEER, _SURVIVED, _AFTERMATH, _GOODBYE, _NONE = range(10)
# A rank that dies takes its peers with it: NCCL or gloo complains there, torchrun and srun report the exit,
# and ranks that outlive the head node find their rendezvous gone. A later grade is a cause only when nothing of
# an earlier one was printed anywhere. A banner says that a container failed, and other lines why. A rank whose
# NCCL lost a peer aborts, too, so an abort is a cause only where NCCL said nothing. What a rank was about to say
# before it ended without an exception comes before what its peers say: see `_last_words`.
# Lines are looked at that hold a text of an alternative, so each alternative needs a telling one.
_PATTERNS = {
    _BANNER: r"pyxis: (?:container start failed|couldn't start container|failed to create container filesystem"
    r"|child \d+ failed|printing enroot log)|error: pyxis:  +(?!.*(?:\[ERROR\]|FATAL ERROR|[Cc]annot|[Ff]ailed"
    r"|failure|[Cc]ould not|enroot-|nvidia-container-cli:|not permitted|denied|No space|wrong trying|compression))",
    _CAUSE: r"titan-node: FAIL|titan-hang: |CUDA out of memory|oom_kill|DUE TO (?!NODE)[A-Z]|error: pyxis:"
    r"|pyxis: .*(?:fail|not exist|must be)|^\[ERROR\]|^enroot[\w-]*: |FATAL ERROR|Exec format error"
    r"|nrecognized (?:option|argument)|error: execve|CUDA error|CUDA driver error|CUBLAS_STATUS_"
    r"|NCCL error.* invalid (?:usage|argument)|Task launch for |t find address for host|Node failure on "
    r"|are still not ready|wrong with the boot of the nodes|^FATAL: |invalid choice .* for argument|Error parsing --"
    r"|libgomp: Thread creation failed|: version `GLIBC|: error: argument |: error: the following arguments ",
    _CRASH: r"Watchdog caught collective|\(exitcode: -(?!2\b|6\b|15\b)|Fatal Python error: (?!Aborted)|Caught signal \d"
    r"|Segmentation fault|Bus error|Illegal instruction",
    _NCCL: r"NCCL error|NCCL failure|nccl(?:System|Internal|Remote|UnhandledCuda|Invalid)"
    r"|signal due to a collective timeout|watchdog got stuck for",
    _ABORT: r"terminate called|Fatal Python error|\(exitcode: -6\)",
    _GOODBYE: r"Rendezvous\w*(?:Error|Exception)|rendezvous\b.*\bclosed|TCPStore",
    _PEER: r"DistBackendError|DistNetworkError|DistStoreError|Connection (?:closed|reset|refused)|Broken pipe"
    r"|(?<!srun: error: )[Tt]imed out",
    _AFTERMATH: r"srun: error|slurmstepd: error|\(exitcode: |ChildFailedError|SignalException|NCCL WARN"
    r"|KeyboardInterrupt|SystemExit|[Dd]ataLoader worker .* killed by signal: (?:Terminated|Interrupt)",
}
_GRADES = [(grade, re.compile(pattern)) for grade, pattern in _PATTERNS.items()]
# Wanted whatever was found. Two lines of progress after an error show that it was survived.
_MILESTONES = b"Root Cause (first|Training completed|CANCELLED AT|death signal|Node failure on |[ERROR]".split(b"|")
_LABELS = re.compile(r"(?:[0-9]{1,5}: ?)?(?:\[[A-Za-z_]{1,24}[0-9]{1,6}\]: ?)*")
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Unsupported|Timeout)(?:: |:?$)")
_COLOURS = rb"(?:\x1b\[[0-9;]{0,24}m)*"
_BEGINS_WITH_EXCEPTION = re.compile(
    (rb"\n" + _COLOURS + _LABELS.pattern.encode() + _COLOURS)
    + _EXCEPTION.pattern.encode().replace(b"(?:: |:?$)", rb"(?:: |:?[\s\x1b]|:?\Z)")
)
_RETURN = re.compile(rb"\r\n?")
# What stands between the tracebacks of one error, the last of which ended the rank; and errors that quote others.
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
_WRAPS = re.compile(r"CheckpointException|SubprocException|in DataLoader worker")
_ENDS_TRACEBACK = re.compile(r"[A-Za-z_][\w.]*(?:: |:?$)")
# Stands right before an exception that Python, or who warns of it, goes on after.
_GOES_ON = re.compile(r"Exception ignored |--- Logging error ---|\w+Warning: ")
_REPORTED = re.compile(r"\s*(time|host|rank|exitcode)\s*: (\S+)(?: \(local_rank: (\d+)\))?")
_INTERRUPTED = (-2, -15, 130, 143)  # exit codes of SIGINT and SIGTERM
WORDS = 8  # of the lines that a rank printed last
_NO_WORDS = re.compile(r"\[?[WI]\d{3,4} |\w*Warning: |  warnings\.warn\(|.*NCCL INFO ")

_TOKENS = re.compile(r"\\.|\[(?:\\.|[^]\\])+\]|\{[\d,]+\}|.")


def fixed_texts(pattern: str) -> Iterator[str]:
    """Of each alternative of a pattern the longest text that stands in all its matches; "" where none does."""
    texts, depth = [""], 0
    for token in _TOKENS.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            yield max(texts, key=len)
            texts = [""]
        elif token[0] in "?*+{":  # the letter before it may be missing
            texts += [texts.pop()[:-1], ""]
        elif depth or token in ").^$" or token[0] == "[" or re.match(r"\\\w", token):
            texts.append("")
        else:
            texts[-1] += token[-1]
    yield max(texts, key=len)


@cache
def _texts(below: int) -> list[bytes]:
    """What the lines hold that are looked at when only an error of a lower grade would count."""
    wanted = {text.encode() for grade, pattern in _PATTERNS.items() if grade < below for text in fixed_texts(pattern)}
    wanted.update(_MILESTONES, [b"Traceback (most"] if below > _CAUSE else [], [b"step:"] if below < _NONE else [])
    return sorted(text for text in wanted if not any(other in text for other in wanted - {text}))


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
    local_rank: str = ""


@dataclass(frozen=True)
class Errors:
    """What the logs of a failed run say about its end."""

    path: Path | None = None
    lines: Sequence[str] = ()  # the first error and what was printed with it
    rank: FailedRank | None = None
    completed: bool = False  # training had reached its last step
    last_words: bool = False  # the lines are of the rank that failed first, and have no form that is known


@dataclass
class _Found:
    grade: int
    labels: str
    lines: list[str]
    time: float = math.inf
    is_stop: bool = False  # it says itself that Slurm ended the run
    progress: int = 0  # lines after it that show that the run went on

    @property
    def is_undated_cause(self) -> bool:
        return (self.grade, self.time) == (_CAUSE, math.inf)


@dataclass
class _Search:
    """What is remembered while one file is read: open tracebacks by their labels, and the best error."""

    near: float = 0  # a moment of the run
    stops: bool = False  # whether Slurm ended the run: then what comes after it said so does not count
    tracebacks: dict[str, deque[str]] = field(default_factory=dict)
    survived: set[str] = field(default_factory=set)  # labels of those open tracebacks that did not end their process
    before: bytes = b""  # the last line of the block before
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
    order of `paths`. Within a file the first of its kind wins that the run did not go on after. Where all that was
    found are consequences, the last words of the rank that failed first are its error. For failed runs only: a good
    one also ends with warnings. Of a run that was `stopped` by Slurm nothing counts that came after Slurm said so.
    """
    found: list[tuple[Path, _Search]] = []
    near: float | None = None
    for path in paths:
        try:
            if (handle := open_log(path)) is None:
                continue
            with handle:
                search = _Search(near or os.fstat(handle.fileno()).st_mtime, stopped)
                while block := many_lines(handle):
                    if near is None and (match := TIME.search(block)):
                        near = search.near = line_time(match.group()) or search.near
                    _look_through(search, block)
        except OSError:
            continue
        found.append((Path(path), search))
    ranks = [(rank, path) for path, search in found for rank in search.ranks]
    errors = [(best, path) for path, search in found if (best := search.best)]
    ends = [search.stopped for _, search in found if search.stopped is not None]
    if ends:  # what has no date may have come before
        ranks = [one for one in ranks if one[0].time < min(ends)]
        errors = [one for one in errors if one[0].time < min(ends) or one[0].is_stop or one[0].is_undated_cause]
    rank, log = min(ranks, key=lambda one: one[0].time, default=(None, None))
    completed = any(search.completed for _, search in found)
    nothing = _Found(_NONE, "", []), None
    best, where = min(errors, key=lambda one: (one[0].grade, one[0].time), default=nothing)
    if rank and log and not ends and rank.exit_code not in _INTERRUPTED:
        if best.grade > _ABORT and (words := _last_words(found, log, rank.local_rank))[1]:
            return Errors(*words, rank, completed, True)
        if where == log and "(exitcode: -" in best.lines[0]:  # torchrun says which signal, and the rank maybe why
            best.lines += _last_words(found, log, rank.local_rank)[1]
    return Errors(where, best.lines, rank, completed)


def _last_words(found: Sequence[tuple[Path, _Search]], log: Path, rank: str) -> tuple[Path, list[str]]:
    """What a rank printed after its last line of progress, where none of it is an error whose form is known: in its
    own files, or among the lines of its node's log that have its label.
    """
    own = [path for path, _ in found if log.stem in path.parts and path.parent.name == rank]
    searches = dict(found)
    for path, begin in (
        *((file, "") for one in own for file in (one, one.with_name("stdout.log"))),
        (log, f"[rank{rank}]:"),
    ):
        best = searches[path].best if path in searches else None
        is_exception = best and best.grade != _SURVIVED and begins_with_exception(best.lines[0])
        if best and best.labels.startswith(begin) and (best.grade <= _PEER or is_exception):
            break
        words: deque[str] = deque(maxlen=WORDS)
        for line in last_bytes(path).splitlines():
            text = plain_text(line[:4096])
            if text.startswith(begin):
                text = text[len(begin) :]
                if text.startswith("[titan]"):
                    words.clear()
                elif text.strip() and not _NO_WORDS.match(text):
                    words.append(text)
        if words:
            return path, list(words)
    return log, []


def _look_through(search: _Search, block: bytes) -> None:
    at, below, dated = len(search.before) + 1, -1, False
    # Now each line has a beginning that can be searched for, and so has what a bar of progress stands before.
    block = search.before + b"\n" + (_RETURN.sub(b"\n", block) if b"\r" in block else block)
    search.before = block[-4096:].rstrip(b"\n").rpartition(b"\n")[2]
    ahead: dict[re.Pattern[bytes], int] = {}  # where each is found next
    while at < len(block):
        start = at
        if search.quiet:
            if below != (below := search.best.grade if search.best else _NONE):
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
        before = block[block.rfind(b"\n", 0, start - 1) + 1 : start - 1]
        _look(search, block[start : min(end, start + 4096)], before[:4096])
        at = end + 1


def _next_time(block: bytes, at: int, near: float) -> float:
    """torchrun's report says when; it comes after the traceback that it speaks of."""
    clocks = CLOCK.finditer(block, at)
    moments = (line_time(block[max(at, clock.start() - 14) : clock.end() + 10], near) for clock in clocks)
    return next((moment for moment in moments if moment is not None), math.inf)


def _look(search: _Search, line: bytes, before: bytes = b"") -> None:
    best = search.best
    text, label = _unlabelled(line)
    if search.stopped is not None and "Node failure on " not in text:
        return
    stops = search.stops and is_stop(line)
    if stops:
        search.tracebacks.clear()
        search.stopped = _time_or_never(line, search)
    search.completed |= "Training completed" in text
    if best and ("Training completed" in text or (b"step:" in line and parse_line(line))):
        best.progress += 1
        if best.progress > 1:
            search.best, search.following = None, 0
        return
    _read_report(search, text)
    if best and search.undated:
        best.time = _time_or_never(line, search)
    mine = best is not None and search.following > 0 and label == best.labels
    if mine and text.startswith(_CHAINED):
        search.chained = True
        return
    warned = "Traceback (most" in text and _GOES_ON.search(text)
    if warned or text.startswith(("Traceback (most recent call last)", "Original Traceback (most")):
        search.linked = label if mine and best and (search.chained or _WRAPS.search(best.lines[0])) else None
        search.following = 0
        if len(search.tracebacks) < 64:
            search.tracebacks[label] = deque(maxlen=2)
            (search.survived.add if warned or _goes_on(before, label) else search.survived.discard)(label)
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
        if (label in search.survived) if frames is not None else _goes_on(before, label):
            grade = _SURVIVED
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


def _unlabelled(line: bytes) -> tuple[str, str]:
    """The text of a line, and the labels before it, without blanks: behind those of an empty line is none."""
    text = plain_text(line)
    labels = _LABELS.match(text)
    prefix = labels.group() if labels else ""
    return text[len(prefix) :], prefix.replace(" ", "")


def _goes_on(before: bytes, label: str) -> bool:
    text, of = _unlabelled(before)
    return of == label and bool(_GOES_ON.search(text))


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
            search.report |= {match[1]: match[2]} | ({"local": match[3]} if match[3] else {})
        if "exitcode" in search.report or len(text) > 200 or not text.startswith((" ", "[")):
            told, search.report = search.report, None
            moment = line_time(told.get("time", "").encode()) or math.inf
            rank, code = told.get("rank", ""), told.get("exitcode", "")
            if re.fullmatch(r"-?\d+", code):
                named = int(rank) if rank.isdigit() else None
                search.ranks.append(FailedRank(moment, told.get("host", ""), named, int(code), told.get("local", "")))


def begins_with_exception(text: str) -> bool:
    return bool(_EXCEPTION.match(text))


@lru_cache(maxsize=256)  # some errors are said again and again
def _grade(text: str) -> int | None:
    # Frames of a C++ backtrace name exception classes without being one.
    if text.startswith(("frame #", "Exception raised from")):
        return None
    grade = next((grade for grade, pattern in _GRADES if pattern.search(text)), None)
    return None if grade in (_PEER, _GOODBYE) and "rror" not in text else grade
