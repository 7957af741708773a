"""The channels of containers/channels.toml, and where their locks lie."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import data_dir


@dataclass(frozen=True)
class Channel:
    """What an image is made from; containers/channels.toml explains each value."""

    name: str
    about: str
    base: str
    python: str  # "3.12"
    packages: list[str]
    max_gb: float  # 10^9 bytes, unpacked
    torch_index: str = ""
    from_torch_index: list[str] = field(default_factory=list)
    record_urls: bool = False
    quantization: list[str] = field(default_factory=list)
    cuda: str = ""  # "13.0"; empty: no CUDA


def channels() -> dict[str, Channel]:
    """All of them, in the order of the file."""
    tables = tomllib.loads((data_dir("containers") / "channels.toml").read_text(encoding="utf-8"))
    return {name: Channel(name, **table) for name, table in tables.items()}


def channel(name: str) -> Channel:
    """The channel of that name. Raises LauncherError with the list where there is none."""
    known = channels()
    if name not in known:
        fix = f"one of {', '.join(known)}"
        raise LauncherError("name-unknown", f"there is no channel {name!r}", fix, status=ExitStatus.NOT_FOUND)
    return known[name]


def lock_path(name: str, arch: str) -> Path:
    """The file that pins channel `name` for `arch` (Docker's word)."""
    return data_dir("containers") / "locks" / f"{name}-{arch}.txt"
