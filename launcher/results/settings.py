"""What was asked of a run, from its directory: `run.toml` and `job/node.json`, either of which may be damaged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.base.files import read_bytes
from launcher.base.output import some
from launcher.base.secret import looks_secret
from launcher.base.values import parse_toml
from launcher.runs.directory import Run

_MOST = 10**9  # steps, nodes, sequences: more is damage, and Python refuses to print what is far longer
_LONGEST = 1 << 20  # bytes of run.toml, which has some 6,000; more takes seconds to parse, and is damage
_SECTIONS = ("job", "profile", "recipe", "env", "titan")


def settings_of(run: Run) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Every setting by its dotted key, without the run's own name, and what is wrong with the two files.

    The job reads `job/node.json`, so that one counts; `run.toml` knows more. Of an older launcher's, whatever is
    there is taken, known or not.
    """
    problems, written, told = [], _run_toml(run.path / "run.toml"), _flat(run.asked)
    if written is None:
        problems.append("run.toml is damaged: what was asked for is known in part")
        written = {}
    differ = sorted(key for key in told.keys() & written.keys() if not _same(told[key], written[key]))
    if differ:
        problems.append(f"edited: run.toml and job/node.json differ in {some(differ)}")
    asked = {**written, **told}
    return {key: "(hidden)" if looks_secret(key, asked[key]) else asked[key] for key in asked}, tuple(problems)


def count(settings: dict[str, Any], key: str) -> int | None:
    """A setting that counts something; None where it is no such number."""
    value = settings.get(key)
    return value if type(value) is int and 0 <= value <= _MOST else None


def words(settings: dict[str, Any], key: str, default: str = "") -> str:
    value = settings.get(key)
    return value if isinstance(value, str) else default


def _run_toml(path: Path) -> dict[str, Any] | None:
    """None where it is damaged; {} where there is none, as a copy without it is still a result by job/node.json."""
    if not os.path.lexists(path):
        return {}
    try:
        text = read_bytes(path, _LONGEST).decode()
        head, _, origins = text.partition("\n[origin]\n")  # half of the file, and of no use here
        tables = parse_toml(text if "\n[" in origins else head)
    except (OSError, ValueError):
        return None
    return _flat(tables)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section in _SECTIONS
        if isinstance(table := tables.get(section), dict)
        for key, value in table.items()
        if (section, key) != ("job", "name")
    }


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
