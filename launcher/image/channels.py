"""The channels of containers/channels.toml, and where their locks lie."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import data_dir
from launcher.image import ARCHES


@dataclass(frozen=True)
class Channel:
    """What an image is made from; containers/channels.toml explains each value."""

    name: str
    about: str
    base: str
    python: str  # "3.12"
    packages: tuple[str, ...]
    max_gb: float  # 10^9 bytes, unpacked
    torch_index: str = ""
    from_torch_index: tuple[str, ...] = ()
    record_urls: bool = False
    quantization: tuple[str, ...] = ()
    cuda: str = ""  # "13.0"; empty: no CUDA


def channels() -> dict[str, Channel]:
    """All of them, in the order of the file."""
    with (data_dir("containers") / "channels.toml").open("rb") as stream:
        tables = tomllib.load(stream)
    found = {}
    for name, table in tables.items():
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        found[name] = Channel(name, **values)
    return found


def channel(name: str) -> Channel:
    """The channel of that name. Raises LauncherError with the list where there is none."""
    known = channels()
    if name not in known:
        raise LauncherError(
            "name-unknown",
            f"there is no channel {name!r}",
            f"one of {', '.join(known)}",
            status=ExitStatus.NOT_FOUND,
        )
    return known[name]


def docker_arch(name: str) -> str:
    """Docker's word for an architecture, from Docker's or uname's. Raises LauncherError for any other."""
    for docker, uname in ARCHES.items():
        if name in (docker, uname):
            return docker
    raise LauncherError(
        "name-unknown", f"there is no architecture {name!r}", f"one of {', '.join(ARCHES)}", status=ExitStatus.USAGE
    )


def lock_path(name: str, arch: str) -> Path:
    """The file that pins channel `name` for `arch` (Docker's word)."""
    return data_dir("containers") / "locks" / f"{name}-{arch}.txt"
