"""Checkpoints as torch.distributed.checkpoint lays them out, without torch."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

MODULE = "torch.distributed.checkpoint.metadata"


class Entry:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def metadata(files: Mapping[str, int]) -> bytes:
    """A pickle of the shape that torch's has: objects of classes that are not here, keys that are objects."""
    module = ModuleType(MODULE)
    kinds = {name: type(name, (Entry,), {"__module__": MODULE}) for name in ("Metadata", "MetadataIndex", "Info")}
    vars(module).update(kinds)
    with mock.patch.dict(sys.modules, {"torch": module, MODULE: module}):  # the real one takes seconds
        stored = {}
        for name, size in files.items():
            half = size // 2
            for offset, length in ((0, half), (half, size - half)):
                key = kinds["MetadataIndex"](fqn=f"{name}.{offset}", offset=(offset,), index=None)
                stored[key] = kinds["Info"](relative_path=name, offset=offset, length=length)
        return pickle.dumps(kinds["Metadata"](state_dict_metadata={}, planner_data=None, storage_data=stored))


def write_checkpoint(folder: Path, step: int, files: Mapping[str, int] | None = None) -> Path:
    """A whole one; its folder."""
    files = files or {"__0_0.distcp": 40, "__1_0.distcp": 30}
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    for name, size in files.items():
        (path / name).write_bytes(bytes(size))
    (path / ".metadata").write_bytes(metadata(files))
    return path
