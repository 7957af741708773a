"""Why a run failed: looks for the known errors of known_errors.toml in its logs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launcher.base.errors import quoted
from launcher.base.secret import masked
from launcher.logs.files import error_logs, last_lines
from launcher.logs.first_error import FailedRank, begins_with_exception, find_errors, fixed_texts, is_stop
from launcher.logs.steps import open_log, parse_line, plain_text

HEAD_BYTES = 1 << 16  # of each log: what starts a container is said at the beginning
TAIL_BYTES = 1 << 18
LINE_CHARS = 4096
SMALLER = "--batch-size N   (smaller)"
RAISED, PRINTED, VICTIM = "raised", "printed", "victim"  # where a known error may be found: see known_errors.toml


@dataclass(frozen=True)
class Known:
    """One entry of known_errors.toml, which says what the keys mean."""

    code: str
    family: str
    where: str
    cause: str
    fix: str
    pattern: str = ""
    fault: str = ""
    again: bool = False
    node: bool = False
    ended: Sequence[Mapping[str, Any]] = ()
    example: Sequence[str] = ()
    cases: Sequence[Mapping[str, str]] = ()


_NOT_KNOWN = Known("", "", "", "", "")


@dataclass(frozen=True)
class Ended:
    """How a job ended: Slurm's word and the first one of its reason, the script's exit code, whether anything was
    logged.
    """

    state: str
    reason: str = ""
    exit: int | None = None
    logged: bool = True

    @property
    def by_slurm(self) -> bool:
        """Whether Slurm or a user ended it: what its ranks said then is no cause."""
        return self.state in ("CANCELLED", "REVOKED", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL")

    def is_like(self, one: Mapping[str, Any]) -> bool:
        return all(getattr(self, name) == value for name, value in one.items())


@cache
def known_errors() -> tuple[Known, ...]:
    text = Path(__file__).with_name("known_errors.toml").read_text(encoding="utf-8")
    return tuple(Known(**entry) for entry in tomllib.loads(text)["error"])


@cache
def _hints() -> frozenset[bytes]:
    """A line of either end of a log is matched only if it holds one of these: asking for words is quick."""
    patterns = [known.pattern for known in known_errors() if known.where == PRINTED and known.pattern]
    return frozenset(text.encode() for pattern in patterns for text in fixed_texts(pattern))


# First errors that leave open what came before them; any other exception is a cause, known or not.
_TELLS_LITTLE = re.compile(
    r"srun: error|slurmstepd|pyxis:|^\[ERROR\]|^enroot|exitcode|ChildFailedError|SignalException|NCCL WARN"
    r"|KeyboardInterrupt|SystemExit|CANCELLED AT|killed by signal"
)


@dataclass(frozen=True)
class Failure:
    """Why a run failed, as far as its logs tell: `code`, `cause` and `fix` are empty where the error is not known."""

    code: str
    cause: str
    fix: str
    path: Path | None  # the log that `lines` are from
    lines: Sequence[str]
    is_error: bool  # False where the lines are only the last ones
    rank: FailedRank | None = None  # that failed first, as torchrun saw it
    completed: bool = False  # training had reached its last step
    fault: str = ""  # "run": what was asked for caused it
    host: str = ""  # where it happened, as Slurm writes one or more nodes; "" where the logs do not tell

    def as_json(self) -> dict[str, object]:
        return {
            "known_error": self.code or None,
            "cause": self.cause or None,
            "fix": self.fix or None,
            "log": str(self.path) if self.path else None,
            "lines": list(map(masked, self.lines)),
            "rank": {"rank": self.rank.rank, "host": self.rank.host, "exit_code": self.rank.exit_code}
            if self.rank
            else None,
            "completed": self.completed,
        }

    def as_text(self) -> list[str]:
        """What is printed below a run's state: the cause, the fix, then the log's own lines."""
        said = [f"cause: {self.cause}", f"try: {self.fix}"] if self.code else []
        if self.rank:
            said.append(f"first to fail: {_who(self.rank)}, with exit code {self.rank.exit_code}")
        if self.completed:
            said.append("training had already reached its last step")
        if self.lines:
            if self.is_error:
                title = "from" if self.code else "first error, in"
            else:
                title = "the last lines, in" if self.code else "no known error; the last lines, in"
            said += [f"{title} {self.path}:", *(f"| {masked(line)}" for line in self.lines)]
        return said


def explain(
    log_dir: Path, ended: Ended, reference: str, run_dir: Path, smaller: str = SMALLER, is_local: bool = False
) -> Failure:
    """Finds the cause of a failed run in its logs and in how it ended.

    `reference` names the run in a command; `smaller`: options with which it would need less of a GPU's memory. The
    first error of the rank that failed first decides; both ends of the logs are searched only where it leaves the
    cause open. Of a run that `is_local` no command goes to Slurm's nodes. Memory doesn't grow with the logs. Raises
    LauncherError when the directory of the logs cannot be read.
    """
    paths = error_logs(log_dir)
    seen = find_errors(paths, ended.by_slurm)
    error = seen.lines
    shown: tuple[Path | None, Sequence[str], bool] = (seen.path, error, bool(error))
    found = _of_error(error)
    if not found and (not error or seen.last_words or _leaves_open(error[0])):
        ends = [path for path in paths if "ranks" not in path.relative_to(log_dir).parts]
        if printed := _printed(ends, ended):
            found, (path, lines) = printed[:2], printed[2:]
            shown = (path, lines, True) if path else shown
        elif error:
            found = _match(error[0], VICTIM)
    if not shown[1]:
        shown = (*last_lines(paths, 5), False)
    if not (found or error):
        victims = (one for one in known_errors() if one.where == VICTIM)
        found = next(((one, None) for one in victims if any(map(ended.is_like, one.ended))), None)
    names = {"run": quoted(reference), "run_dir": quoted(run_dir), "again": quoted(run_dir / "run.toml")}
    names |= {"smaller": smaller, "srun": "" if is_local else "srun -N1 "}
    known, match = found or (_NOT_KNOWN, None)
    return replace(_failure(known, match, names, seen.rank, *shown), rank=seen.rank, completed=seen.completed)


def how_it_ended(state: str, reason: str, exit_code: int | None, log_dir: Path) -> Ended:
    """From the job's state and what its logs hold."""
    try:
        logged = any(path.stat().st_size for path in log_dir.glob("*.log"))
    except OSError:
        logged = True
    return Ended(state, reason.split(" ")[0], exit_code, logged)


Found = tuple[Known, re.Match[str] | None]


def _of_error(lines: Sequence[str]) -> Found | None:
    code = False  # of a traceback's last frame: what it would say is not what was said
    for line in lines:
        code = code and not begins_with_exception(line)  # there is none of what runs without its source
        is_frame, code = code or line.startswith('File "'), line.startswith('File "')
        if not is_frame and (found := _match(line, RAISED, PRINTED)):
            return found
    return None


def _match(line: str, *where: str) -> Found | None:
    for known in known_errors():
        if known.pattern and known.where in where and (match := re.search(known.pattern, line)):
            return known, match
    return None


def _leaves_open(line: str) -> bool:
    return bool(_TELLS_LITTLE.search(line)) or _match(line, VICTIM) is not None


def _printed(paths: Sequence[Path], ended: Ended) -> tuple[Known, re.Match[str] | None, Path | None, list[str]] | None:
    """The most telling of the lines at either end of the logs, with what follows it, and of how the job ended; of
    equals the first one.
    """
    best: tuple[tuple[int, bool], re.Match[str] | None, Path | None, list[str]] | None = None
    following, stopped = 0, None
    for path, line in ((one, line) for one in paths for line in _ends(one)):
        if path == stopped and b"Node failure on " not in line:
            continue
        if ended.by_slurm and is_stop(line):
            stopped = path
        if b"Traceback (most" in line:
            following = 0
        if best and following and path == best[2] and b"[titan]" not in line:
            best[3].append(plain_text(line[:LINE_CHARS]))
            following -= 1
        if not _hinted(line):
            continue
        text = plain_text(line[:LINE_CHARS])
        found = _match(text, PRINTED)
        if found and found[1]:  # of two lines that say the same, one that names something says more
            order = (known_errors().index(found[0]), not any(found[1].groupdict().values()))
            if best is None or order < best[0]:
                best, following = (order, found[1], path, [text]), 4
    for rank, known in enumerate(known_errors()):
        if (best is None or rank < best[0][0]) and known.where == PRINTED and any(map(ended.is_like, known.ended)):
            best = (rank, False), None, None, []
    return (known_errors()[best[0][0]], *best[1:3], list(filter(None, best[3]))) if best else None


def _hinted(text: bytes) -> bool:
    return any(hint in text for hint in _hints())


def _ends(path: Path) -> Iterator[bytes]:
    """The lines at the beginning and the end of a file, or none where it cannot be read; without those after which
    training went on.
    """
    try:
        if (handle := open_log(path)) is None:
            return
        with handle:
            size = handle.seek(0, 2)
            blocks = [(0, HEAD_BYTES), (size - TAIL_BYTES, TAIL_BYTES)]
            if size <= HEAD_BYTES + TAIL_BYTES:
                blocks = [(0, size)]
            for start, length in blocks:
                handle.seek(start)
                block = handle.read(length)
                if _hinted(block):
                    lines = block.split(b"\n")
                    steps = [number for number, line in enumerate(lines) if b"step:" in line and parse_line(line)]
                    yield from lines[steps[-2] if len(steps) > 1 else 0 :]
    except OSError:
        return


def _failure(
    known: Known,
    match: re.Match[str] | None,
    names: dict[str, str],
    rank: FailedRank | None,
    path: Path | None,
    lines: Sequence[str],
    is_error: bool,
) -> Failure:
    text = "\n".join(lines)
    named = match.groupdict() if match else {}
    cause, fix = "", ""
    for case in known.cases:
        if told := re.search(case["pattern"], text):
            named = {name: value for name, value in named.items() if value} | told.groupdict()
            cause, fix = cause or case.get("cause", ""), fix or case.get("fix", "")
    groups = {name: _unescaped(masked((value or "").strip())[:600]) for name, value in named.items()}
    # What a log says is quoted in a command; a fix that node.py proposes is one already.
    safe = {name: value if name == "fix" else quoted(value) for name, value in groups.items()}
    node = groups.pop("node", "") or (_node(path) if is_error else "")  # the last lines are of any node
    where = f"node {node}" if node else "a node"
    local = re.search(r"local_rank: (\d+)", text)
    who = _who(rank) if rank else (f"local rank {local[1]}" if local else "a process") + f" on {where}"
    fix = fix or known.fix
    on_node = "-w {node} " if node and names["srun"] else ""  # otherwise any node of the partition must do
    fix = fix.replace("srun -N1 ", names["srun"] + on_node)
    fix = fix.format(**(names | safe | {"node": quoted(node or "NODE")}))
    cause = (cause or known.cause).format(**groups, node=where, who=who)
    return Failure(known.code, cause, fix, path, lines, is_error, fault=known.fault, host=node)


def _who(rank: FailedRank) -> str:
    return f"rank {'?' if rank.rank is None else rank.rank} on {rank.host}"


def _unescaped(text: str) -> str:
    """node.py writes its sentences as JSON strings."""
    return text.replace('\\"', '"').replace("\\\\", "\\")


def _node(path: Path | None) -> str:
    """The node whose log it is, or ""; a rank's own log lies in a directory with its node's name."""
    for part in reversed((*path.parts[:-1], path.stem)) if path else ():
        if match := re.fullmatch(r"\d{4,}-([\w.-]+)", part):
            return match[1]
    return ""
