"""What a person names as a result: a run, a file, or `published`. The one place here that reads what others wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_bytes, unreadable
from launcher.base.values import parse_json
from launcher.results.outcome import NodeResult, Outcome, Point, Spread, Startup
from launcher.results.published import published, rows_of
from launcher.results.read import outcome_of
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState

KEYWORD = "published"
_LARGEST = 64 << 20  # bytes; a result of 1,000 nodes and 10,000 logged steps has fewer
_MOST = 10**9
_Value = TypeVar("_Value")


def results_in(reference: str, runs_dir: Path) -> list[Outcome]:
    """The results that `reference` names: `published`, a file, else a run by name or path; never none.

    Raises LauncherError for what does not exist, cannot be read or is no result, and for a run that has none yet.
    """
    if reference == KEYWORD:
        return published()
    if not reference.strip():  # an unset variable in a script would otherwise mean the newest run
        raise LauncherError("a result without a name", "name a run, a file, or: published")
    path = Path(reference).expanduser()
    try:
        if path.is_file() and path.name != "run.toml":
            return _of_file(path)
    except (OSError, ValueError):  # too long, or no path at all
        pass
    return [of_run(reference, runs_dir)]


def of_run(reference: str, runs_dir: Path) -> Outcome:
    """Raises LauncherError where there is no such run, or it has logged nothing yet."""
    run = runs.open_run(reference, runs_dir)
    state = control.states([run])[run.name]
    found = outcome_of(run, state)
    if found is None:
        raise nothing_logged(run, state)
    return found


def nothing_logged(run: Run, state: JobState) -> LauncherError:
    """The error where a result is asked for of a run that has none yet."""
    return LauncherError(
        f"{run.name} ({state.name}) has logged no step yet",
        quoted("launcher", "watch" if state.active else "logs", run.reference),
        status=ExitStatus.NO_DATA,
    )


def _of_file(path: Path) -> list[Outcome]:
    try:
        data = read_bytes(path, _LARGEST, wait=True)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LauncherError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise LauncherError(f"{path}: is empty", "launcher results RUN --format json > FILE")
    return _of_json(text, str(path)) if text.lstrip()[0] in "[{" else rows_of(text, str(path))


def _of_json(text: str, where: str) -> list[Outcome]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise LauncherError(f"{where}: not JSON: {str(error)[:120]}") from error
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise LauncherError(f"{where}: holds no results")
    return [outcome_from(item, where) for item in listed]


def outcome_from(value: object, where: str) -> Outcome:
    """An Outcome from the JSON object that `launcher results --format json` wrote of it; unknown keys are ignored.

    A null where a number belongs is NaN, which JSON lacks. Raises LauncherError naming the key that is wrong.
    """
    spread = value.get("spread") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(spread, dict):
        raise LauncherError(f"{where}: not a result of this launcher", "launcher results RUN --format json > FILE")
    # There, these three names are the last step's values, and the medians with their spreads stand apart.
    medians = {name: spread.get(name) for name in ("tps", "tflops", "memory_gib")}
    found = _object(Outcome, value | medians, where)
    if found.nodes < 1 or found.gpus < 1:
        raise LauncherError(f"{where}: a result of {found.nodes} nodes and {found.gpus} GPUs")
    if found.tps is not None and not found.tps.median > 0:
        raise LauncherError(f"{where}: tps.median: {found.tps.median} is no speed")
    return found


def _object(kind: type[_Value], value: object, where: str) -> _Value:
    if not isinstance(value, dict):
        raise LauncherError(f"{where}: {str(value)[:40]!r} is not an object")
    made: dict[str, Any] = {}
    for part in fields(kind):  # type: ignore[arg-type]  # always one of the dataclasses of outcome.py
        read = _READERS[str(part.type)]
        if part.name in value:
            made[part.name] = read(value[part.name], f"{where}: {part.name}")
        elif part.default is MISSING and part.default_factory is MISSING:
            if str(part.type).endswith("| None"):
                made[part.name] = None
            elif part.type == "str":
                made[part.name] = ""
            else:
                raise LauncherError(f"{where}: has no {part.name}")
    return kind(**made)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise LauncherError(f"{where}: {str(value)[:40]!r} is not a string")
    return value


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST:
        raise LauncherError(f"{where}: {_short(value)} is not a whole number, or too large")
    return value


def _float(value: object, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise LauncherError(f"{where}: {_short(value)} is not a number")
    return float(value)


def _short(value: object) -> str:
    return "a huge number" if isinstance(value, (int, float)) and abs(value) > _MOST else repr(str(value)[:40])


def _boolean(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise LauncherError(f"{where}: {_short(value)} is neither true nor false")
    return value


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise LauncherError(f"{where}: {_short(value)} is not an object")
    return value


def _words(value: object, where: str) -> Mapping[str, str]:
    return {key: _string(word, f"{where}.{key}") for key, word in _mapping(value, where).items()}


def _or_none(read: Callable[[object, str], _Value]) -> Callable[[object, str], _Value | None]:
    return lambda value, where: None if value is None else read(value, where)


def _all(read: Callable[[object, str], _Value]) -> Callable[[object, str], tuple[_Value, ...]]:
    def each(value: object, where: str) -> tuple[_Value, ...]:
        if not isinstance(value, (list, tuple)):
            raise LauncherError(f"{where}: {_short(value)} is not a list")
        return tuple(read(item, where) for item in value)

    return each


def _step(value: object, where: str) -> tuple[int, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise LauncherError(f"{where}: {_short(value)} is not a step with its tokens/s")
    return _integer(value[0], where), _float(value[1], where)


# By the words in which outcome.py declares its fields.
_READERS: dict[str, Callable[[object, str], Any]] = {
    "str": _string,
    "int": _integer,
    "int | None": _or_none(_integer),
    "float": _float,
    "float | None": _or_none(_float),
    "bool": _boolean,
    "Spread | None": _or_none(lambda value, where: _object(Spread, value, where)),
    "Startup": lambda value, where: _object(Startup, value, where),
    "tuple[Point, ...]": _all(lambda value, where: _object(Point, value, where)),
    "tuple[NodeResult, ...]": _all(lambda value, where: _object(NodeResult, value, where)),
    "tuple[tuple[int, float], ...]": _all(_step),
    "tuple[str, ...]": _all(_string),
    "Mapping[str, str]": _words,
    "Mapping[str, Any]": _mapping,
}
