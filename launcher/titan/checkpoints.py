"""Checkpoints of a run: where they lie, which are whole, whose they are, and whether the next ones fit.

torchtitan goes on from the highest `step-N` that has a .metadata, whatever else is wrong with it, and takes a folder
whose name holds `step-N` anywhere for one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import read_text

INDEX = "model.safetensors.index.json"
RECORD = "launcher.json"  # in the folder: whose checkpoints these are
ASIDE = "damaged"  # in the folder, too: torchtitan looks no deeper
STEP = re.compile(r"step-(\d+)", re.ASCII)  # as torchtitan looks for it
MOST_METADATA = 1 << 30  # bytes; 70B on 1024 GPUs has about 0.3 GB
CPU_S = 120  # for one of them
WATCH_S = 10


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that training cannot go on from."""

    step: int
    path: Path
    why: str  # "__0_0.distcp is cut: 12 of 40 bytes"


def folder_of(node: Mapping[str, Any]) -> Path:
    """Where the run of this node.json has its checkpoints."""
    if shared := node["job"].get("checkpoint_dir"):
        return Path(shared, node["job"]["name"])
    named = {key.replace("-", "_"): value for key, value in node["titan"].items()}
    return Path(node["placed"]["run_dir"]) / "titan" / str(named.get("checkpoint.folder", "checkpoint"))


def look(folder: Path) -> tuple[list[int], list[Damaged]]:
    """The steps of whole checkpoints, the lowest first, and the others. While a run writes one, it is among those.

    Raises OSError for a file system that fails: then nothing is known of any.
    """
    whole, damaged = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    for entry in entries:
        match = STEP.search(entry.name)
        if not match or not (entry.is_symlink() or entry.is_dir(follow_symlinks=False)):
            continue
        step, path = int(match[1]), Path(entry.path)
        why = "it is a link" if entry.is_symlink() else _problem(path)
        if entry.name != f"step-{step}":
            why = f"torchtitan would take it for step-{step}"
        if why:
            damaged.append(Damaged(step, path, why))
        else:
            whole.append(step)
    return sorted(whole), damaged


def _problem(path: Path) -> str:
    """Why the checkpoint is not whole; empty when it is."""
    metadata = path / ".metadata"
    if not os.path.lexists(metadata):  # written last, under another name
        return "" if (path / INDEX).is_file() else "it was not finished"
    if not (sizes := _sizes(metadata)):
        return ".metadata cannot be read"
    for name, size in sorted(sizes.items()):
        shown = ascii(name)[1:-1][:100]
        try:
            found = (path / name).lstat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"{shown} is missing"
        if "/" in name or not stat.S_ISREG(found.st_mode):
            return f"{shown} is not a file of it"
        if found.st_size < size:
            return f"{shown} is cut: {found.st_size:,} of {size:,} bytes"
    return ""


def _sizes(metadata: Path) -> dict[str, int]:
    """How long the files of a checkpoint must be; empty where .metadata does not say."""
    from .checkpoint_sizes import NO_METADATA  # here, as is ctypes below, for commands that read no checkpoints

    found = metadata.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_METADATA:
        return {}
    program = Path(__file__).with_name("checkpoint_sizes.py")
    done = subprocess.run([sys.executable, "-I", str(program), str(metadata), str(CPU_S)], capture_output=True)
    if done.returncode in (NO_METADATA, -signal.SIGXCPU, -signal.SIGSEGV):
        return {}
    if done.returncode:  # nothing is known of it
        raise OSError(f"{metadata} cannot be read: exit code {done.returncode} of {program}")
    return dict(json.loads(done.stdout))


def set_aside(folder: Path, damaged: list[Damaged]) -> None:
    """Moves them to where torchtitan neither finds nor deletes them. Nothing is deleted here, either."""
    for one in damaged:
        (folder / ASIDE).mkdir(exist_ok=True)
        os.rename(one.path, _unused(folder / ASIDE / one.path.name))


def make_way(folder: Path) -> bool:
    """Whether torchtitan 0.2 starts from other weights, as it does without a folder. Ours alone is set aside whole."""
    if folder.is_dir() and set(os.listdir(folder)) <= {RECORD, ASIDE}:
        os.rename(folder, _unused(folder.with_name(f"{folder.name}-{ASIDE}")))
    return not os.path.lexists(folder)


def _unused(path: Path) -> Path:
    paths = (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 10_000)))
    return next(one for one in paths if not os.path.lexists(one))


def origin(node: Mapping[str, Any], titan_version: str) -> dict[str, Any]:
    """What a run's checkpoints fit, as RECORD says it."""
    recipe, ranks = node["recipe"], node["job"]["nodes"] * node["profile"]["gpus_per_node"]
    return {
        "schema": 1,
        "run": node["placed"]["run_dir"],
        "model": f"{recipe['model']} {recipe['flavor']}",
        "data_parallel": ranks // math.prod(recipe[f"{kind}_parallel"] for kind in ("tensor", "context", "pipeline")),
        "torchtitan": ".".join(titan_version.split(".")[:2]),
    }


def record_of(folder: Path) -> dict[str, Any]:
    """RECORD; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_text(folder / RECORD))
        return found if isinstance(found, dict) else {}
    return {}


def foreign(record: Mapping[str, Any], node: Mapping[str, Any], titan_version: str = "") -> list[str]:
    """In what checkpoints with this record are of another kind than the run; empty where it can go on from them.

    Of another run are those that lie where this one's own belong; `checkpoint.folder` may name another's to go on from.
    `titan_version` empty: not known.
    """
    mine = origin(node, titan_version)
    words = {"model": "the model", "data_parallel": "data-parallel degree"}
    words |= {"run": "the run"} if node["job"].get("checkpoint_dir") else {}
    words |= {"torchtitan": "torchtitan"} if titan_version else {}
    wrong = [key for key in words if record.get(key, mine[key]) != mine[key]]
    return [f"{words[key]} {record[key]}, not {mine[key]}" for key in wrong]


def to_come(recipe: Mapping[str, Any], whole: list[int]) -> int:
    """How many checkpoints the run writes before it begins to delete those it has: for a moment it has keep + 1."""
    interval, left = recipe["checkpoint_interval"], recipe["steps"] - max(whole, default=0)
    if interval <= 0 or left <= 0:
        return 0
    return int(min(-(-left // interval), max(1, recipe.get("checkpoint_keep", 2) + 1 - len(whole))))


def free_bytes(folder: Path) -> int | None:
    """In its file system, or that of the nearest folder above that exists; None where it does not count."""
    space = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    return space.f_bavail * space.f_frsize if space.f_blocks else None


def watch(folder: Path, say: Callable[[str], None], every_s: float = WATCH_S) -> None:
    """Starts a process that lives as long as this one, whatever this one becomes, and looks at each new checkpoint."""
    import ctypes

    last = _newest(folder)
    if os.fork():
        return
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        while True:
            time.sleep(every_s)
            with contextlib.suppress(OSError):  # a file system that fails is the trainer's to tell
                if (newest := _newest(folder)) == last:
                    continue
                size = sum(file.stat().st_size for file in (folder / f"step-{newest}").iterdir())
                last, free = newest, free_bytes(folder)
                if free is not None and free < size:
                    what = f"the next of {size / 1e9:.3g} GB does not fit: {free / 1e9:.3g} GB are free in {folder}"
                    say(f"titan-checkpoint: warn step={newest} why={json.dumps(what)}")
    finally:
        os._exit(0)


def _newest(folder: Path) -> int:
    """By its .metadata alone, as torchtitan finds it; 0 where there is none."""
    steps = (STEP.fullmatch(path.parent.name) for path in folder.glob("step-*/.metadata"))
    return max((int(step[1]) for step in steps if step), default=0)
