"""Values out of foreign text: JSON, TOML and numbers, so that whatever is read can be computed with and printed."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

DEEPEST = 64  # objects and lists in each other; nothing of ours has ten
# Parts of a key, as they are written: bare, "…" or '…'.
_LONG_KEY = re.compile(r"""(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
_Item = TypeVar("_Item")
_Key = TypeVar("_Key")
LARGEST = 2**63 - 1  # of a whole number; Python refuses to print those of 4,300 digits, and float() those of 310


def whole(text: object) -> int | None:
    """A whole number from its decimal digits (ASCII, 15 at most), or None for anything else."""
    return int(text) if isinstance(text, str) and re.fullmatch("[0-9]{1,15}", text) else None


def by(key: Callable[[_Item], _Key], items: Iterable[_Item]) -> dict[_Key, list[_Item]]:
    """The items under their keys, both in the order in which they come."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def guessed(word: str, known: Collection[str], most: int = 1) -> list[str]:
    """Which of the known words a mistyped one may mean: only what is near, or what it is the beginning of."""
    from difflib import get_close_matches

    begun = [name for name in known if len(word) > 2 and name.startswith(word)]
    return begun[:most] or get_close_matches(word, known, most, 0.65)


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text; NaN, infinity and whole numbers above LARGEST become None, as nothing can use them,
    and half a character, which no file takes, becomes a question mark.

    Raises ValueError for what is not JSON or is nested too deeply.
    """
    try:
        value = json.loads(data, parse_int=_whole, parse_float=_finite, parse_constant=lambda _: None)
        _refuse_absurd(value)
        # Only where there may be one: most records have no escapes.
        escaped = (b"\\u" in data) if isinstance(data, bytes) else ("\\u" in data or not data.isascii())
        return _json_value(value) if escaped else value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError: for keys of more parts than anybody types, as tomllib's time grows
    with their square; TOMLDecodeError for the syntax, and for numbers above LARGEST."""
    if _LONG_KEY.search(text):
        raise ValueError("a key of too many parts")
    try:
        tables = tomllib.loads(text)
        _refuse_absurd(tables)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return tables


def _refuse_absurd(value: Any) -> None:
    """Raises ValueError above DEEPEST, as later code walks through the value by recursion, and for whole numbers above
    LARGEST: of TOML's 0xfff... no limit of digits holds back.
    """
    level = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        if not (level := [item for items in inner for item in items]):
            return
        if any(isinstance(item, int) and abs(item) > LARGEST for item in level):
            raise ValueError("the number has too many digits")
    raise ValueError("nested too deeply")


def _whole(text: str) -> int | None:
    return value if len(text) <= 20 and abs(value := int(text)) <= LARGEST else None


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None for NaN and infinity at any depth: JSON lacks them, and many of its readers refuse them."""
    return {_json_value(str(key)): _json_value(value) for key, value in values.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half a character, of a file's name
    if isinstance(value, Mapping):
        return json_values(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value if value is None or isinstance(value, (bool, int)) else str(value)
