"""Reading TOML layers and merging them: defaults < profile < recipe < SBATCH_* < user file < options.

A layer is a flat mapping of dotted keys ("job.nodes") to values. Every layer may set any key of `[job]`,
`[profile]`, `[recipe]`, `[env]` and `[titan]`, and hold `[gpu.NAME.SECTION]` tables, which apply to that GPU alone. A
run directory's run.toml is a complete layer: it says `run = 1` and replaces the first three.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import data_dir, read_bytes, unreadable
from launcher.base.values import LARGEST, guessed, parse_toml
from launcher.config import sbatch
from launcher.config.spec import HUB, REGISTRY_NAME, SAMPLE, Job, Profile, RunSpec, refuse
from launcher.titan.recipe import Recipe

SECTIONS = {"job": Job, "profile": Profile, "recipe": Recipe}
FREE_SECTIONS = ("env", "titan")  # any key, values become strings
_PATHS = ("image", "data", "tokenizer", "init_from", "checkpoint_dir", "runs_dir", "image_dir")
PATH_KEYS = tuple(f"job.{key}" for key in _PATHS)
NAME_OR_PATH = ("job.python", "job.gpu", "job.recipe")
FIELDS = {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
RUN_FILE_FORMAT = 1
LIST = "tuple[str, ...]"
# The type of a field -> how a refusal says it; "free": of the sections that take any key.
KINDS = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}
KINDS |= {LIST: "a list of strings", "free": "a string, a number or true/false"}


@dataclass(frozen=True)
class Layer:
    """Values by dotted key, each with the words that name its origin."""

    values: Mapping[str, Any]
    origin: Mapping[str, str]
    complete: bool = False  # a run.toml: neither profile nor recipe is consulted again
    secret_env: tuple[str, ...] = ()


def layer_of(found: Mapping[str, tuple[Any, str]]) -> Layer:
    """A layer from values with their origins."""
    return Layer({key: value for key, (value, _) in found.items()}, {key: origin for key, (_, origin) in found.items()})


def names_of(kind: str) -> list[str]:
    """Names of the profiles or recipes that travel with the launcher (`kind` is the folder's name)."""
    return sorted(p.stem for p in (data_dir("slurm") / kind).glob("*.toml"))


def find(kind: str, name: str, how: str = "") -> Path:
    """The file of a profile or recipe: one that travels with the launcher, or a path to the user's own.

    `how`: what to type before its name; the option of `submit` by default.
    """
    if "/" in name or name.endswith(".toml"):
        return Path(name).expanduser()
    known = names_of(kind)
    if name in known:
        return data_dir("slurm") / kind / f"{name}.toml"
    near = guessed(name, known)
    option = how or {"profiles": "--gpu", "recipes": "--recipe"}[kind]
    what = f"there is no {kind[:-1]} {name[:80]!r}; known: {', '.join(known)}"
    fix = f"{option} {near[0]}" if near else f"{option} {known[0]}, or {option} ./my.toml"
    raise LauncherError("name-unknown", what, fix, status=ExitStatus.NOT_FOUND)


def read_layer(path: Path, origin: str, gpu: str = "") -> Layer:
    """One TOML file as a layer. `gpu` picks the `[gpu.NAME]` tables of a recipe.

    Raises LauncherError with file, line and column for a syntax error, and with the nearest known keys for an
    unknown one.
    """
    tables = read_tables(path)
    run_format = tables.pop("run", None)
    if run_format is not None and run_format != RUN_FILE_FORMAT:
        what = f"{path}: written in run file format {run_format}; this launcher knows {RUN_FILE_FORMAT}"
        raise LauncherError("run-file-format", what)
    origin_of, job = tables.pop("origin", {}), tables.get("job")
    if run_format is not None and tables.pop("placed", None) is None and isinstance(job, dict):
        segment = origin_of.get("job.segment") if isinstance(origin_of, dict) else None
        if str(segment).startswith("chosen from the topology"):
            job.pop("segment", None)  # version 0.1 wrote the one that it had chosen as if it had been asked for
    tables.pop("hardware", None)  # facts, not settings: launcher/config/hardware.py
    secrets = tables.pop("secret_env", [])
    if not (isinstance(secrets, list) and all(isinstance(name, str) for name in secrets)):
        raise LauncherError("value", f"{path}: secret_env must be a list of names", 'secret_env = ["HF_TOKEN"]')
    per_gpu = tables.pop("gpu", {})
    values = _flatten(path, tables)
    origins = dict.fromkeys(values, origin)
    if not (isinstance(per_gpu, dict) and all(isinstance(sections, dict) for sections in per_gpu.values())):
        raise LauncherError("value", f"{path}: gpu must be tables", "[gpu.gb200.recipe]")
    for name, sections in per_gpu.items():
        if name not in (known := {*names_of("profiles"), gpu}):
            near = guessed(name, known) or ["gb200"]
            raise LauncherError("name-unknown", f"{path}: there is no profile {name[:80]!r}", f"[gpu.{near[0]}.recipe]")
        extra = _flatten(path, sections)
        if name == gpu:
            values |= extra
            origins |= dict.fromkeys(extra, f"{origin}, for {gpu}")
    base = path.resolve().parent
    values = {key: absolute(key, value, base) for key, value in values.items()}
    return Layer(values, origins, run_format is not None, tuple(secrets))


def absolute(key: str, value: Any, base: Path) -> Any:
    """A path made absolute against the folder that its author meant; every other value as it is."""
    if not isinstance(value, str) or not value or "://" in value:
        return value
    if key == "job.image" and REGISTRY_NAME.fullmatch(value) and not os.path.lexists(base / value):
        return value  # `validate` says how a file is made of it
    is_path = "/" in value or value.endswith(".toml") if key in NAME_OR_PATH else key in PATH_KEYS
    if is_path and value not in (SAMPLE, HUB):
        return os.path.normpath(base / os.path.expanduser(value))
    return value


def merge(layers: Sequence[Layer]) -> RunSpec:
    """Later layers win, key by key; `[env]` and `[titan]` merge by name, and `job.sbatch` by option."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {key: "default" for key in FIELDS}
    secrets: dict[str, str] = {}
    for layer in layers:
        for name in layer.secret_env:
            secrets[name] = layer.origin.get(f"secret_env.{name}", "file")
            values.pop(f"env.{name}", None)
        for key, value in layer.values.items():
            where, found = layer.origin[key], convert(key, value, layer.origin[key])
            if key == "job.sbatch" and (below := values.get(key)):
                where, found = f"{origin[key]}, {where}", sbatch.merged(below, found)
            values[key], origin[key] = found, where
            if key.startswith("env."):
                secrets.pop(key[4:], None)
    sections: dict[str, dict[str, Any]] = {name: {} for name in (*SECTIONS, *FREE_SECTIONS)}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return RunSpec(
        profile=Profile(**sections["profile"]),
        recipe=Recipe(**sections["recipe"]),
        job=Job(**sections["job"]),
        env=sections["env"],
        titan=sections["titan"],
        secret_env=tuple(sorted(secrets)),
        origin=origin | {f"secret_env.{name}": where for name, where in secrets.items()},
    )


def convert(key: str, value: Any, origin: str) -> Any:
    """`value` in the type of the field `key`; an int does for a float, anything else is refused."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise LauncherError("number-too-long", f"{key} (from {origin}): the number has too many digits")
    kind = str(FIELDS[key].type) if key in FIELDS else "free"
    if kind == "free" and isinstance(value, (str, int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if kind == "float" and type(value) is int:
        return float(value)
    if kind == LIST and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if type(value).__name__ != kind:
        fix = f'{key.rpartition(".")[2]} = "{value}"' if kind == "str" and isinstance(value, (int, float)) else ""
        raise refuse(key, value, f"must be {KINDS[kind]}", fix, origin)
    return value


def unknown_key(key: str, where: str) -> LauncherError:
    """A key that no section has, with the nearest ones that exist."""
    section, _, rest = key.partition(".")
    known = [k for k in FIELDS if k.startswith(f"{section}.")] if section in SECTIONS else list(FIELDS)
    near = guessed(key, known, 3)
    if section not in (*SECTIONS, *FREE_SECTIONS) and not near:
        near = [f"{s}.{rest}" for s in SECTIONS if f"{s}.{rest}" in FIELDS]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(k for k in known)}"
    return LauncherError("key-unknown", f"{where}: unknown key {key[:80]!r}", hint)


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, bounded. Raises LauncherError with file, line and column for a syntax error."""
    try:
        return parse_toml(read_bytes(path, wait=True).decode("utf-8"))
    except FileNotFoundError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise LauncherError("unreadable", what, f"ls -l {quoted(path)}", status=ExitStatus.NOT_FOUND) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise LauncherError("not-text", f"{path}: not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        place = f"{path}:{at[1]}:{at[2]}" if at else f"{path} (at its end)"
        reason = re.sub(r" \(at .*\)$", "", str(error))
        # The line is not shown: it may hold a secret.
        raise LauncherError("toml", f"{place}: TOML syntax: {reason}", "correct that line") from error
    except ValueError as error:  # nested too deeply, numbers without end
        raise LauncherError("toml", f"{path}: {error}", "correct that value") from error


def _flatten(path: Path, tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, content in tables.items():
        if section not in (*SECTIONS, *FREE_SECTIONS):
            raise unknown_key(section, str(path))
        if not isinstance(content, dict):
            raise LauncherError("value", f"{path}: {section} must be a table", f"[{section}]")
        pairs = _dotted(content) if section in FREE_SECTIONS else content.items()
        for key, value in pairs:
            if section in SECTIONS and f"{section}.{key}" not in FIELDS:
                raise unknown_key(f"{section}.{key}", str(path))
            flat[f"{section}.{key}"] = value
    return flat


def _dotted(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`[titan.training] max_norm = 2.0` means the same as `[titan] "training.max_norm" = 2.0`."""
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        pairs += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
