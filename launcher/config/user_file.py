"""The user's file of defaults: where it is, and setting a value in it without touching the rest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.base.files import filesystem_error, read_bytes, unreadable, write_text
from launcher.base.values import parse_toml

OPTION = "--config FILE, and the same with submit"


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    base = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    return base / "titan-launcher" / "config.toml"


def save(path: Path, section: str, values: Mapping[str, str]) -> None:
    """Sets `values` in the table `section` of `path`, whose comments and other keys stay as they are.

    The new text is read back before it is written: where it does not say what was meant (a table in a form that this
    does not edit), LauncherError names the lines to write by hand, and the file stays as it is.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        text = read_bytes(path).decode("utf-8") if path.exists() else ""
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise LauncherError(f"{path}: not UTF-8 text (byte {error.start})") from error
    lines = {key: f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()}
    new = _with(text, section, lines)
    try:
        before = parse_toml(text)
    except ValueError as error:
        raise LauncherError(f"{path}: TOML syntax: {error}", "correct that line") from error
    table = before.get(section, {})
    wanted = before | {section: {**(table if isinstance(table, dict) else {}), **values}}
    try:
        understood = parse_toml(new) == wanted
    except ValueError:
        understood = False
    if not understood:
        raise LauncherError(
            f"{path}: its table [{section}] is in a form that cannot be edited without changing more",
            f"write in it by hand, under [{section}]: {'; '.join(lines.values())}",
        )
    if new == text:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    except OSError as error:
        raise filesystem_error(path, error, OPTION) from error
    write_text(path, new, mode, OPTION)


def _with(text: str, section: str, lines: Mapping[str, str]) -> str:
    """`text` with each of `lines` in place of the key's own, or behind the table's header, or in a new table."""
    header = re.search(rf"^[ \t]*\[[ \t]*{section}[ \t]*\][^\n]*(\n|\Z)", text, re.MULTILINE)
    if header is None:
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}[{section}]\n" + "".join(f"{line}\n" for line in lines.values())
    end = re.compile(r"^[ \t]*\[", re.MULTILINE).search(text, header.end())
    body = text[header.end() : end.start() if end else len(text)]
    missing = []
    for key, line in lines.items():
        old = re.search(rf'^[ \t]*{key}[ \t]*=[ \t]*("[^"\n]*"|\'[^\'\n]*\')', body, re.MULTILINE)
        if old:
            body = body[: old.start()] + line + body[old.end() :]
        else:
            missing.append(f"{line}\n")
    head = text[: header.end()] + ("" if header[0].endswith("\n") else "\n")
    return head + "".join(missing) + body + (text[end.start() :] if end else "")
