"""Writes what code knows best into the docs: known errors, commands, settings, keys of --json. `make docs` runs it.

`<!-- KIND of WHAT, ... -->` in a page says where. tests/unit/test_docs.py fails when a page is out of date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that isn't installed

from launcher import cli
from launcher.config.help import ALL
from launcher.config.layers import SECTIONS
from launcher.config.options import KEYS
from launcher.config.spec import CHOICES, LEAST, MOST
from launcher.logs.known_errors import SMALLER, Known, known_errors

DOCS = Path(__file__).parent
PAGES = tuple(DOCS / name for name in ("errors.md", *(f"reference/{n}.md" for n in ("commands", "settings", "json"))))
ANSWERS = DOCS.parent / "tests" / "compat" / "v0.1" / "answers.json"  # what is promised to stay
MARKED = re.compile(r"(<!-- (\w+) of (\w+), .*?-->\n\n).*?(?=<!-- end -->)", re.DOTALL)
PLACES = {"again": "RUN/run.toml", "run_dir": "RUN", "smaller": SMALLER}  # any other name: in capitals
TYPES = {"tuple[str, ...]": "list of texts", "str": "text", "int": "whole number", "float": "number"}
JSON_TYPES = {str: "text", bool: "true or false", int: "number", float: "number", type(None): "null", list: "list"}


def page(text: str) -> str:
    """A page, which reads `text`, with everything written here as it should be."""
    return MARKED.sub(lambda marked: f"{marked[1]}{WRITERS[marked[2]](marked[3])}\n", text)


def table(*rows: tuple[str, ...]) -> str:
    rule = ("---",) * len(rows[0])
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows[1:])
    return "".join(
        f"{line}\n" for line in (f"| {' | '.join(rows[0])} |", f"|{'|'.join(rule)}|", *map("| {} |".format, lines))
    )


def _errors(family: str) -> str:
    rows = (_error(known) for known in known_errors() if known.family == family)
    return table(("name", "what is printed", "cause", "try"), *rows)


def _error(known: Known) -> tuple[str, ...]:
    examples = "\n".join(known.example).splitlines() if known.pattern else []
    lines = (line for line in examples if re.search(known.pattern, line))
    ended = ", ".join(f"{name} {value}" for name, value in (known.ended[0] if known.ended else {}).items())
    printed = next(lines, ended)
    texts = (re.sub(r"{(\w+)}", lambda m: PLACES.get(m[1], m[1].upper()), text) for text in (known.cause, known.fix))
    return f"`{known.code}`", f"`{printed.strip()}`", *texts


def all_commands() -> list[click.Context]:
    """Every command and group that --help shows, in its order, the outermost first."""

    def below(parent: click.Context) -> Iterator[click.Context]:
        yield parent
        if isinstance(group := parent.command, click.Group):
            for name in group.list_commands(parent):
                if (command := group.get_command(parent, name)) and not command.hidden:
                    yield from below(click.Context(command, parent, name, terminal_width=100))

    top = click.Context(cli.launcher, info_name="launcher", terminal_width=100, **cli.launcher.context_settings)
    top.meta[ALL] = True  # of the contexts below it, too
    return list(below(top))


def _commands(_all: str) -> str:
    def section(context: click.Context) -> str:
        depth = len(context.command_path.split())
        return f"{'#' * max(2, depth)} {context.command_path}\n\n```text\n{context.get_help().rstrip()}\n```\n"

    return "\n".join(map(section, all_commands()))


def _settings(section: str) -> str:
    options = {key: f"--{name.replace('_', '-')}" for name, key in KEYS.items()} | {"job.scheduler": "--local"}
    comments = dict(
        re.findall(r"^    (\w+): [^#\n]*(?:  # (.*))?$", inspect.getsource(SECTIONS[section]), re.MULTILINE)
    )
    rows = []
    for field in dataclasses.fields(SECTIONS[section]):
        key = f"{section}.{field.name}"
        kind = ", ".join(f"`{choice}`" for choice in CHOICES.get(key, ())) or TYPES.get(
            str(field.type), "true or false"
        )
        if key in LEAST:
            kind += f", {LEAST[key]} to {MOST[key]:,}" if key in MOST else f", at least {LEAST[key]}"
        default = field.default if not isinstance(field.default, tuple) else list(field.default)
        option = options.get(key) or ("" if section == "job" else f"--set {key}=VALUE")
        rows.append(
            (f"`{field.name}`", kind, f"`{json.dumps(default)}`", option and f"`{option}`", comments[field.name])
        )
    return table(("key", "type", "default", "option", "what"), *rows)


def _keys(_all: str) -> str:
    runs = [c for c in all_commands() if not isinstance(c.command, click.Group) or c.command.invoke_without_command]
    names = [context.command_path.removeprefix("launcher ") for context in runs]
    found: dict[str, dict[str, set[str]]] = {}
    for answer in json.loads(ANSWERS.read_text(encoding="utf-8")):
        command = max((name for name in names if f"{answer['command']} ".startswith(f"{name} ")), key=len, default="")
        said = answer["said"] if isinstance(answer["said"], list) else [answer["said"]]
        for key, kind in (pair for value in said for pair in _key(value)):
            found.setdefault(command, {}).setdefault(key, set()).add(kind)
    found.pop("", None)  # a command that has another name now
    sections = []
    for command, keys in sorted(found.items()):
        rows = ((f"`{key}`", " or ".join(sorted(kinds, key=_null_last))) for key, kinds in sorted(keys.items()))
        sections.append(f"## launcher {command}\n\n{table(('key', 'type'), *rows)}")
    return "\n".join(sections)


def _null_last(kind: str) -> tuple[bool, str]:
    return kind == "null", kind


def _key(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every key in an answer, with the type of its value."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from _key(item, f"{where}[]")
    elif isinstance(value, dict):
        for name, below in value.items():
            # Names of files, packages and settings are no keys of ours.
            ours = re.fullmatch(r"[a-z][a-z0-9_]*", name) and where.rpartition(".")[2] not in ("versions", "settings")
            yield from _key(below, f"{where}.{name if ours else 'NAME'}".lstrip("."))
    else:
        yield where, JSON_TYPES[type(value)]


WRITERS = {"errors": _errors, "commands": _commands, "settings": _settings, "keys": _keys}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
