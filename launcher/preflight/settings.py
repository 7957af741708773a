"""Are the settings of torchtitan's that a run names settings of the release that trains it?

launcher/titan/settings.json has them by release; `python -m tests.titan_settings` writes it from an installed one.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from launcher import titan
from launcher.base.finding import Finding, error, warning
from launcher.config.layers import FIELDS
from launcher.config.options import KEYS
from launcher.config.spec import OWNED, RunSpec

FILE = Path(titan.__file__).with_name("settings.json")
# Settings that name a module of the user's, which may add others.
EXTENDING = ("job.custom_config_module", "experimental.custom_args_module")


@cache
def releases() -> dict[str, list[str]]:
    """Release -> its settings."""
    lists: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return lists


def unknown_settings(spec: RunSpec, version: str) -> list[Finding]:
    """Settings that torchtitan `version` does not have; of one that is not listed, those that no listed one has."""
    lists = {version: releases()[version]} if version in releases() else releases()
    known = {name for names in lists.values() for name in names}
    sure, found = len(lists) == 1 and not any(key in spec.titan for key in EXTENDING), []
    for key in spec.titan:
        section, dot, name = key.replace("-", "_").rpartition(".")
        if not {f"{section}{dot}{name}", f"{section}{dot}{name.removeprefix('no_')}"} & known:
            # One without a section is meant to be ours.
            refuse = error if sure or not section else warning
            origin = spec.origin.get(f"titan.{key}", "a file")
            found.append(
                refuse("setting-unknown", _nearest(key, known), key=key, origin=origin, versions=tuple(sorted(lists)))
            )
    return found


def _nearest(key: str, known: set[str]) -> str:
    """What to type instead of a setting that does not exist: the option, or the setting, whose name is nearest."""
    ours = {field.partition(".")[2]: f"--set {field}=..." for field in FIELDS if not field.startswith("job.")}
    for option, field in KEYS.items():
        typed, name = f"--{option.replace('_', '-')} ...", field.partition(".")[2]
        ours[name] = typed if field.startswith("job.") else f"--set {field}=..., or {typed}"
    section, _, name = key.replace("-", "_").rpartition(".")
    if not section or (name in ours and (section == "job" or f"recipe.{name}" in FIELDS)):
        near = get_close_matches(name, ours, 1, 0.6)
        return ours[near[0]] if near else "launcher config show lists ours"
    near = get_close_matches(f"{section}.{name}", known, 1, 0.6)
    if near and near[0] in OWNED:
        return f"{OWNED[near[0]]}, which is {near[0]}"
    return f"--set {near[0]}=..." if near else "--set SECTION.KEY=VALUE, as torchtitan writes it"
