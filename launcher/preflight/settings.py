"""Has the release of torchtitan that trains a run the settings that the run names, and does it take their values?

launcher/titan/settings.json has them by release; `python -m tests.titan_settings` writes it from an installed one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from launcher import titan
from launcher.base.finding import Fact, Finding, error, warning
from launcher.base.values import guessed
from launcher.config.layers import FIELDS
from launcher.config.options import KEYS
from launcher.config.spec import OWNED, RunSpec

FILE = Path(titan.__file__).with_name("settings.json")
# Settings that name a module of the user's, which may add others.
EXTENDING = ("job.custom_config_module", "experimental.custom_args_module")


@cache
def releases() -> dict[str, dict[str, str]]:
    """Release -> its settings -> what each takes, as its own parser says: INT, FLOAT, STR, {choices}, with | between;
    "switch"; "" where it does not say.
    """
    lists: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return lists


def unknown_settings(spec: RunSpec, version: str) -> list[Finding]:
    """Settings that torchtitan `version` does not have, and values that it does not take; of a release that is not
    listed, what no listed one has or takes.
    """
    lists = {version: releases()[version]} if version in releases() else releases()
    known = {name for names in lists.values() for name in names}
    sure, found = len(lists) == 1 and not any(key in spec.titan for key in EXTENDING), []
    for key, value in spec.titan.items():
        section, dot, name = key.replace("-", "_").rpartition(".")
        names = {f"{section}{dot}{name}", f"{section}{dot}{name.removeprefix('no_')}"} & known
        facts: dict[str, Fact] = {
            "key": key,
            "origin": spec.origin.get(f"titan.{key}", "a file"),
            "versions": tuple(sorted(lists)),
        }
        kinds = [kind for kinds in lists.values() for name, kind in kinds.items() if name in names]
        if not names:
            # One without a section is meant to be ours.
            refuse = error if sure or not section else warning
            found.append(refuse("setting-unknown", _nearest(key, known), **facts))
        elif not any(_takes(kind, value) for kind in kinds):
            words = tuple(dict.fromkeys(word for kind in kinds for part in kind.split("|") for word in _words(part)))
            near = guessed(value, words)
            fix = f"--set {key}={near[0]}" if near else ""
            found.append((error if sure else warning)("setting-value", fix, value=value, takes=words, **facts))
    return found


def _takes(kind: str, value: str) -> bool:
    """Whether torchtitan's parser reads `value`. true and false reach it as a switch."""
    if kind and value.lower() in ("true", "false"):
        return kind == "switch"
    return any(part in ("", "STR") or value in _words(part) or _is_number(part, value) for part in kind.split("|"))


def _words(part: str) -> tuple[str, ...]:
    if part[:1] == "{":
        return tuple(part[1:-1].split(","))
    return {"switch": ("true", "false"), "INT": ("a whole number",), "FLOAT": ("a number",), "STR": ("any text",)}.get(
        part, ()
    )


def _is_number(part: str, value: str) -> bool:
    try:
        return part in ("INT", "FLOAT") and {"INT": int, "FLOAT": float}[part](value) is not None
    except ValueError:
        return False


def _nearest(key: str, known: set[str]) -> str:
    """What to type instead of a setting that does not exist: the option, or the setting, whose name is nearest."""
    ours = {field.partition(".")[2]: f"--set {field}=..." for field in FIELDS if not field.startswith("job.")}
    for option, field in KEYS.items():
        typed, name = f"--{option.replace('_', '-')} ...", field.partition(".")[2]
        ours[name] = typed if field.startswith("job.") else f"--set {field}=..., or {typed}"
    section, _, name = key.replace("-", "_").rpartition(".")
    if not section or (name in ours and (section == "job" or f"recipe.{name}" in FIELDS)):
        near = guessed(name, ours)
        return ours[near[0]] if near else "launcher config show lists ours"
    near = guessed(f"{section}.{name}", known)
    if near and near[0] in OWNED:
        return f"{OWNED[near[0]]}, which is {near[0]}"
    return f"--set {near[0]}=..." if near else "--set SECTION.SETTING=VALUE, as torchtitan writes it"
