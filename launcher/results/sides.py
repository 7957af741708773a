"""What a person names as a result: a run, a file, or `published`. The one place here that reads what others wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import read_bytes, unreadable
from launcher.base.values import parse_json
from launcher.results.outcome import Outcome, Problem
from launcher.results.published import published, rows_of
from launcher.results.read import outcome_of
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState

_LARGEST = 64 << 20  # bytes; a result of 1,000 nodes and 10,000 logged steps has fewer
_MOST = 10**9
_MAKE = "launcher results RUN --format json > FILE"
_Value = TypeVar("_Value")


def results_in(reference: str, runs_dir: Path) -> list[Outcome]:
    """The results that `reference` names: `published`, a file, else a run by name or path; never none.

    Raises LauncherError for what does not exist, cannot be read or is no result, and for a run that has none yet.
    """
    if reference == "published":
        return published()
    if not reference.strip():  # an unset variable in a script would otherwise mean the newest run
        raise LauncherError("value", "a result without a name", "name a run, a file, or: published")
    path = Path(reference).expanduser()
    try:
        if path.is_file() and path.name != "run.toml":
            return _of_file(path)
    except (OSError, ValueError):  # too long, or no path at all
        pass
    run = runs.open_run(reference, runs_dir)
    state = control.states([run])[run.name]
    found = outcome_of(run, state)
    if found is None:
        raise nothing_logged(run, state)
    return [found]


def nothing_logged(run: Run, state: JobState) -> LauncherError:
    """The error where a result is asked for of a run that has none yet."""
    return LauncherError(
        "no-steps",
        f"{run.name} ({state.name}) has logged no step yet",
        quoted("launcher", "watch" if state.active else "logs", run.reference),
        status=ExitStatus.NO_DATA,
    )


def _of_file(path: Path) -> list[Outcome]:
    try:
        text = read_bytes(path, _LARGEST, wait=True).decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise LauncherError("not-text", f"{path}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise _damaged(str(path), "is empty", _MAKE)
    if text.lstrip()[0] not in "[{":
        return rows_of(text, str(path))
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _damaged(str(path), f"not JSON: {str(error)[:120]}") from error
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise _damaged(str(path), "holds no results")
    return [outcome_from(item, str(path)) for item in listed]


def outcome_from(value: object, where: str) -> Outcome:
    """An Outcome from the JSON object that `launcher results --format json` wrote of it; unknown keys are ignored.

    A null where a number belongs is NaN, which JSON lacks. Raises LauncherError naming the key that is wrong.
    """
    spread = value.get("spread") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(spread, dict):
        raise _damaged(where, "not a result of this launcher", _MAKE)
    # There, these three names are the last step's values, and the medians with their spreads stand apart.
    medians = {name: spread.get(name) for name in ("tps", "tflops", "memory_gib")}
    found = _object(Outcome, value | medians, where)
    if found.nodes < 1 or found.gpus < 1:
        raise _damaged(where, f"a result of {found.nodes} nodes and {found.gpus} GPUs")
    if found.tps is not None and not found.tps.median > 0:
        raise _damaged(where, f"tps.median: {found.tps.median} is no speed")
    return found


def _object(kind: type[_Value], value: object, where: str) -> _Value:
    if not isinstance(value, dict):
        raise _damaged(where, f"{_short(value)} is not an object")
    made: dict[str, Any] = {}
    types = get_type_hints(kind)
    for part in fields(kind):  # type: ignore[arg-type]  # always one of the dataclasses of outcome.py
        if part.name in value:
            made[part.name] = _read(types[part.name], value[part.name], f"{where}: {part.name}")
        elif part.default is MISSING and part.default_factory is MISSING:
            raise _damaged(where, f"has no {part.name}")
    return kind(**made)


def _read(kind: Any, value: object, where: str) -> Any:
    """The value as outcome.py declares its field. Raises LauncherError, naming the field, for any other."""
    if kind is Any:
        return value
    if isinstance(kind, UnionType):
        return None if value is None else _read(get_args(kind)[0], value, where)
    if kind is Problem:  # of which its words alone were written
        return Problem(_read(str, value, where))
    if isinstance(kind, type) and is_dataclass(kind):
        return _object(kind, value, where)
    if kind is float and value is None:
        return math.nan
    outer, inner = get_origin(kind) or kind, get_args(kind)
    expected, called = _KINDS[outer]
    if not isinstance(value, expected) or (isinstance(value, bool) and outer in (int, float)):
        raise _damaged(where, f"{_short(value)} is not {called}")
    if isinstance(value, (int, float)) and abs(value) > (_MOST if outer is int else 1e300):
        raise _damaged(where, f"{_short(value)} is too large")
    if isinstance(value, (list, tuple)):
        kinds = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(kinds) != len(value):
            raise _damaged(where, f"{_short(value)} is not a list of {len(kinds)}")
        return tuple(_read(one, item, where) for one, item in zip(kinds, value, strict=True))
    if isinstance(value, dict):
        return {key: _read(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return float(value) if isinstance(value, int) and outer is float else value


def _short(value: object) -> str:
    return "a huge number" if isinstance(value, (int, float)) and abs(value) > _MOST else repr(str(value)[:40])


def _damaged(where: str, what: str, fix: str = "") -> LauncherError:
    return LauncherError("result-damaged", f"{where}: {what}", fix)


_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "a string"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    tuple: ((list, tuple), "a list"),
    Mapping: (dict, "an object"),
}
