"""What the user's file can say of this cluster: each value, the evidence for it, and what speaks against it."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.base.output import counted
from launcher.config.propose import Proposal, contradictions, propose
from launcher.scheduler import slurm
from launcher.scheduler.facts import ClusterFacts
from launcher.stage import inventory
from launcher.stage.view import look
from launcher.titan import Refused
from launcher.titan.caches import filesystem_of
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
    seen = ", ".join(e.what for e in proposal.evidence) or "Slurm names no GPUs"
    found = {"gpu": (proposal.profile, seen), "partition": partition, **given}
    find = {"account": lambda: _account(facts), "runs_dir": _runs_dir}
    found |= {key: find[key]() if key in find else _first(key) for key in ABOUT if key not in found}
    chosen = []
    for key in ABOUT:
        value, evidence = found[key]
        said, is_good = _look(key, value) if value.startswith("/") else ("", True)
        against: Sequence[str] = () if is_good else (f"{value}: {said}",)
        if key == "gpu":
            against = contradictions(value, nodes) if "gpu" in given else proposal.contradictions
        chosen.append(Choice(key, value, evidence, tuple(against)))
    return chosen, proposal


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
    ask, name = (
        ("sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser(), "format=DefaultAccount"),
        "",
    )
    with suppress(LauncherError):
        name = slurm.ask(ask).strip().partition("\n")[0] if facts.accounting else ""
    return name, "your default account in Slurm" if name else "Slurm names no default account of yours"


def _runs_dir() -> tuple[str, str]:
    own, home = f"/data/{getpass.getuser()}", os.path.expanduser("~")
    place = own if os.access(own, os.W_OK | os.X_OK) else home
    return f"{place}/runs", f"{place} is on {filesystem_of(Path(place)) or 'one of unknown kind'}"


def _first(key: str) -> tuple[str, str]:
    """The first of the usual places that has what is looked for."""
    c4, tokenizers, models, images = inventory.PLACES
    places = {"data": [c4, *inventory.staged_below([c4.parent])], "image_dir": [images]}.get(key) or [
        tokenizers / "Llama-3.1-8B",
        *(path for place in (tokenizers, models) for path in sorted(place.glob("*"))),
    ]
    for place in places:
        said, is_good = _look(key, str(place))
        if is_good:
            return str(place), said
    return "", f"not in {places[0].parent if key == 'tokenizer' else places[0]}"


def _look(key: str, value: str) -> tuple[str, bool]:
    """What is found there, and whether it is what a run needs."""
    place = Path(value)
    try:
        if key == "data":
            count = len(look(place)[0].train)
            return counted(count, "train file"), count > 0
        if key == "tokenizer":
            check_tokenizer(place)
            return "tokenizer.json and tokenizer_config.json can be read", True
        if key == "image_dir":
            return counted(sum(path.suffix == ".sqsh" for path in place.iterdir()), "image"), True
        if key == "runs_dir":
            there = next(path for path in (place, *place.parents) if path.exists())
            if not os.access(there, os.W_OK | os.X_OK):
                return f"you cannot write in {there}", False
            kind = filesystem_of(there) or "one of unknown kind"
            return f"on {kind}, which other machines may not see: every node must", kind not in OF_ONE_MACHINE
    except Refused as error:
        return error.why, False
    except OSError as error:
        return error.strerror or str(error), False
    return "", True
