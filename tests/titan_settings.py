"""torchtitan's own settings, as its command line takes them, for launcher/titan/settings.json.

    python -m tests.titan_settings            this Python's torchtitan into the file: one list for each release

Needs torch and torchtitan. The starting points of 0.3 that need torchao take the same settings.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from importlib.metadata import version
from typing import Any

from launcher.preflight.settings import FILE, releases


def settings() -> list[str]:
    """Names of all settings; of a switch, the name that switches it on."""
    try:
        from torchtitan.models.llama3 import config_registry
    except ImportError:  # 0.2
        from torchtitan.config import JobConfig

        return sorted(_options(JobConfig))
    points = (getattr(config_registry, f"llama3_{flavor}")() for flavor in ("debugmodel", "8b", "70b"))
    return sorted({name for point in points for name in _options(type(point), point)} | _checkpointing())


def _options(kind: Any, default: Any = None) -> set[str]:
    import tyro

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = tyro.extras.get_parser(kind, **({} if default is None else {"default": default}))
    # A switch has both its names in one action, the one that switches it on first.
    names = {action.option_strings[0] for action in parser._actions if action.option_strings}
    return {name.lstrip("-").replace("-", "_") for name in names - {"-h", "--help"}}


def _checkpointing() -> set[str]:
    """Of 0.3's subcommands activation-checkpoint:MODE, which no parser lists."""
    from torchtitan.distributed import activation_checkpoint as module

    kinds = [kind.Config for kind in vars(module).values() if hasattr(kind, "Config")]
    fields = (field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind))
    return {f"activation_checkpoint.{name}" for name in fields}


def main() -> None:
    found = {**releases(), version("torchtitan"): settings()}
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
