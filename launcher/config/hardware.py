"""What each kind of GPU node is, from the tables `[hardware]` of slurm/profiles: memory, peaks, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType

from launcher.base.errors import LauncherError
from launcher.base.files import read_bytes
from launcher.base.values import parse_toml
from launcher.config.layers import find, names_of


@dataclass(frozen=True)
class Hardware:
    """A GPU and its node; the comments in slurm/profiles/gb200.toml say what each figure is."""

    gpu: str  # its name in a results table: GB200
    gpus_per_node: int
    arch: str  # uname's word
    memory_gib: float
    compute_capability: Sequence[int]
    cpus: int
    peak_tflops: float
    titan_peak_tflops: Mapping[str, float]  # by release of torchtitan
    nvlink_gpus: int
    max_uptime_days: int

    @property
    def peaks(self) -> tuple[float, ...]:
        """What MFU on this GPU is given against: torchtitan's own peaks and NVIDIA's, each once."""
        return tuple(sorted({float(peak) for peak in (*self.titan_peak_tflops.values(), self.peak_tflops) if peak}))


@cache
def hardware() -> Mapping[str, Hardware]:
    """By the name of its profile, every GPU that travels with the launcher. Raises LauncherError for a gap in one."""
    return MappingProxyType({name: found for name in names_of("profiles") if (found := _of(name)) is not None})


def of_gpu(gpu: str) -> Hardware | None:
    """The hardware of a GPU by its name in a results table; None for one that no profile describes."""
    return next((one for one in hardware().values() if one.gpu.casefold() == gpu.casefold()), None)


def _of(name: str) -> Hardware | None:
    path = find("profiles", name)
    tables = parse_toml(read_bytes(path).decode())
    profile = tables["profile"]
    if profile["device"] == "cpu":
        return None
    given = {key: profile.get(key) for key in ("gpu", "gpus_per_node", "arch")} | tables.get("hardware", {})
    wanted = {field.name for field in fields(Hardware)}
    if given.keys() != wanted or None in given.values():
        wrong = ", ".join(sorted(given.keys() ^ wanted)) or "gpu, gpus_per_node or arch"
        raise LauncherError(
            "profile-incomplete", f"{path}: [hardware]: missing or unknown: {wrong}", "compare it with gb200.toml"
        )
    return Hardware(**given)
