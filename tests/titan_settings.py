"""torchtitan's own settings, as its command line takes them, for launcher/titan/settings.json.

    python -m tests.titan_settings            this Python's torchtitan into the file: one list for each release

Needs torch and torchtitan. The starting points of 0.3 that need torchao take the same settings.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from launcher.preflight.settings import FILE, releases


def settings() -> dict[str, str]:
    """All settings, and what each takes, as launcher/preflight/settings.py reads it: "" where that cannot be told. Of a
    switch the name that switches it on.
    """
    try:
        from torchtitan.models.llama3 import config_registry
    except ImportError:  # 0.2
        from torchtitan.config import JobConfig

        return _options(JobConfig)
    points = (getattr(config_registry, f"llama3_{flavor}")() for flavor in ("debugmodel", "8b", "70b"))
    found: dict[str, str] = {}
    for point in points:
        for name, kind in _options(type(point), point).items():
            found[name] = kind if found.get(name, kind) == kind else ""
    return found


def parser(kind: Any, default: Any = None) -> Any:
    import tyro

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tyro.extras.get_parser(kind, **({} if default is None else {"default": default}))


def _options(kind: Any, default: Any = None) -> dict[str, str]:
    return dict(_of_parser(parser(kind, default)))


def _of_parser(parser: Any) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action.choices, Mapping):  # subparsers: 0.3's activation-checkpoint:MODE
            for below in action.choices.values():
                yield from _of_parser(below)
        elif action.option_strings and "-h" not in action.option_strings:
            # A switch has both its names in one action, the one that switches it on first.
            name = action.option_strings[0].lstrip("-").replace("-", "_")
            if action.nargs == 0:
                yield name, "switch"
            else:
                single = action.nargs in (None, 1) and "[" not in str(action.metavar)
                yield name, str(action.metavar) if single else ""


def main() -> None:
    found = {**releases(), version("torchtitan"): settings()}
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
