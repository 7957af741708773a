"""The user's own file of defaults: where it is, and where it says that runs are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launcher.config.layers import Layer, read_layer


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the file is, unless an option or LAUNCHER_CONFIG names another."""
    base = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    return base / "titan-launcher" / "config.toml"


def user_layer(config: Path | None, environ: Mapping[str, str], gpu: str = "") -> Layer:
    """--config, else LAUNCHER_CONFIG, else ~/.config/titan-launcher/config.toml where that exists."""
    path = config or Path(environ.get("LAUNCHER_CONFIG") or default_path(environ))
    if not (config or environ.get("LAUNCHER_CONFIG") or os.path.isfile(path)):
        return Layer({}, {})
    return read_layer(path, f"file {path}", gpu)


def runs_dir() -> Path:
    """Where runs are: LAUNCHER_RUNS_DIR, else what the file says, else ./runs. Raises LauncherError for a bad file."""
    said = os.environ.get("LAUNCHER_RUNS_DIR") or user_layer(None, os.environ).values.get("job.runs_dir")
    return Path(str(said or "runs"))
