"""What the user's file can say of this cluster: each value, the evidence for it, and what speaks against it."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.base.output import counted
from launcher.config.propose import Proposal, contradictions, propose
from launcher.config.spec import HUB, S3, SAMPLE
from launcher.scheduler import slurm
from launcher.scheduler.facts import ClusterFacts
from launcher.stage import inventory
from launcher.stage.view import look
from launcher.titan import Refused
from launcher.titan.data import check_tokenizer

# Key of [job] -> what the file's comment says of it, and the columns of the proposal are in this order.
ABOUT = {
    "gpu": "profile of the nodes' GPUs",
    "partition": "Slurm partition",
    "account": "Slurm account",
    "runs_dir": "where run directories are made, and looked for",
    "data": "C4, as launcher stage c4 brings it",
    "tokenizer": "directory with tokenizer.json",
    "image_dir": "where launcher stage image puts images, and --image NAME is looked for",
}
OF_ONE_MACHINE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay"}


@dataclass(frozen=True)
class Choice:
    """`value` is "" where nothing can be proposed; `evidence` then says why."""

    key: str
    value: str
    evidence: str
    against: tuple[str, ...] = ()


def choices(facts: ClusterFacts, given: Mapping[str, tuple[str, str]]) -> tuple[list[Choice], Proposal]:
    """A choice for each key of ABOUT, and the proposal of a GPU profile. `given`: value and origin of what is settled.

    `facts` are empty where Slurm was silent.
    """
    partition = given.get("partition") or _partition(facts)
    nodes = facts.nodes_of(partition[0])
    proposal = propose(nodes)
    seen = ", ".join(e.what for e in proposal.evidence)
    found = {
        "gpu": given.get("gpu") or (proposal.profile, seen or "Slurm names no GPUs"),
        "partition": partition,
        "account": given.get("account") or _account(facts),
        "runs_dir": given.get("runs_dir") or _runs_dir(),
        "data": given.get("data") or _first((inventory.PLACES[0], *inventory.staged_below(inventory.PLACES)), _data),
        "tokenizer": given.get("tokenizer") or _first(_below(inventory.PLACES[1:3]), _tokenizer),
        "image_dir": given.get("image_dir") or _first(inventory.PLACES[3:], _images),
    }
    if "gpu" not in given:
        against = {"gpu": proposal.contradictions}
    else:
        against = {"gpu": tuple(contradictions(found["gpu"][0], nodes))}
    against["runs_dir"] = _against_runs_dir(found["runs_dir"][0])
    for key, look_at in (("data", _data), ("tokenizer", _tokenizer), ("image_dir", _images)):
        value = found[key][0]
        if key in given and value not in (SAMPLE, HUB) and not value.startswith(S3):
            said, is_good = look_at(Path(value))
            against[key] = () if is_good else (f"{value}: {said}",)
    return [Choice(key, *found[key], against.get(key, ())) for key in ABOUT], proposal


def _partition(facts: ClusterFacts) -> tuple[str, str]:
    """The default one; where that has no GPUs, the only one that has."""
    with_gpus = [p.name for p in facts.partitions if any(node.gpus for node in facts.nodes_of(p.name))]
    default = facts.partition()
    if default and (default.name in with_gpus or len(with_gpus) != 1):
        return default.name, "Slurm's default" if default.default else "the only one"
    if len(with_gpus) == 1:
        return with_gpus[0], "the only one with GPUs"
    return "", f"none is the default; there are {', '.join(p.name for p in facts.partitions) or 'none'}"


def _account(facts: ClusterFacts) -> tuple[str, str]:
    if facts.accounting is not True:
        return "", "Slurm keeps no accounts" if facts.accounting is False else "not known"
    with suppress(LauncherError):
        ask = ("sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser(), "format=DefaultAccount")
        if name := slurm.ask(ask).strip().partition("\n")[0]:
            return name, "your default account in Slurm"
    return "", "Slurm names no default account of yours"


def _runs_dir() -> tuple[str, str]:
    home = os.path.expanduser("~")
    for place, name in ((f"/data/{getpass.getuser()}", "runs"), (home, "runs")):
        if os.access(place, os.W_OK | os.X_OK):
            return f"{place}/{name}", f"you can write in {place} ({_file_system(place)})"
    return "", f"you can write neither in /data/{getpass.getuser()} nor in {home}"


def _against_runs_dir(value: str) -> tuple[str, ...]:
    if not value:
        return ()
    there = next(str(path) for path in (Path(value), *Path(value).parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return (f"{value}: you cannot write in {there}",)
    kind = _file_system(there)
    return (f"{value} is on {kind}, which other machines may not see: every node must",) * (kind in OF_ONE_MACHINE)


def _file_system(path: str) -> str:
    """The kind of file system that `path` is on, in the kernel's word."""
    real, best = os.path.realpath(path), ("", "of unknown kind")
    with suppress(OSError, IndexError):
        for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
            _, point, kind = line.split(" ")[:3]
            if f"{real}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(best[0]):
                best = point, kind
    return best[1]


def _first(places: Sequence[Path], look_at: Callable[[Path], tuple[str, bool]]) -> tuple[str, str]:
    for place in places:
        said, is_good = look_at(place)
        if is_good:
            return str(place), said
    return "", f"none in {', '.join(dict.fromkeys(str(place.parent) for place in places)) or 'the usual places'}"


def _below(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        with suppress(OSError):
            found += sorted(place.iterdir(), key=lambda path: (path.name != "Llama-3.1-8B", path.name))
    return found or [place / "Llama-3.1-8B" for place in places[:1]]


def _data(place: Path) -> tuple[str, bool]:
    try:
        count = len(look(place)[0].train)
    except OSError as error:
        return error.strerror or str(error), False
    return (counted(count, "train file"), True) if count else ("no train file of C4", False)


def _tokenizer(place: Path) -> tuple[str, bool]:
    try:
        check_tokenizer(place)
    except (Refused, OSError) as error:
        return getattr(error, "why", str(error)), False
    return "tokenizer.json and tokenizer_config.json can be read", True


def _images(place: Path) -> tuple[str, bool]:
    try:
        return counted(sum(path.suffix == ".sqsh" for path in place.iterdir()), "image"), True
    except OSError as error:
        return error.strerror or str(error), False
