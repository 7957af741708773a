"""Writing TOML: a run's run.toml, and a value in the user's own file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import tomlkit

from launcher.base.errors import LauncherError
from launcher.base.files import filesystem_error, read_bytes, write_text
from launcher.config.layers import RUN_FILE_FORMAT, read_tables
from launcher.config.spec import PlacedRun, tables_of

OPTION = "--config FILE, and the same with submit"


def run_toml(run: PlacedRun) -> str:
    """The whole run as TOML; `launcher submit RUN/run.toml` reads what was asked for back to the same values."""
    document = tomlkit.document()
    document.add(tomlkit.comment("Written by launcher submit: every value of this run, and where each came from."))
    again = f"launcher submit {run.run_dir}/run.toml --name another-name"
    document.add(tomlkit.comment(f"{again}    repeats what was asked for"))
    document.update({"run": RUN_FILE_FORMAT, "secret_env": list(run.secret_env)})
    for title, table in {**tables_of(run), "origin": run.origin}.items():
        document.add(tomlkit.nl())
        document[title] = {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
    return tomlkit.dumps(document)


def save(path: Path, values: Mapping[str, str], about: Mapping[str, str]) -> None:
    """Sets `values` in the table [job] of `path`, whose comments and other keys stay as they are. A key that is new
    there gets its comment of `about`.

    Raises LauncherError where the file is not TOML, or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    is_there = path.exists()
    if is_there and not isinstance(read_tables(path).get("job", {}), dict):  # bounded, which the other parser is not
        raise LauncherError("value", f"{path}: job must be a table", "[job]")
    text = read_bytes(path).decode() if is_there else ""
    document = tomlkit.parse(text)
    table = document.setdefault("job", tomlkit.table())
    new_keys = [key for key in values if key not in table]
    table.update(values)
    for key in new_keys if isinstance(table, tomlkit.items.Table) else ():
        table.value.item(key).comment(about[key])
    new = tomlkit.dumps(document)
    if new == text:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if text else 0o644
    except OSError as error:
        raise filesystem_error(path, error, OPTION) from error
    write_text(path, new, mode, OPTION)
