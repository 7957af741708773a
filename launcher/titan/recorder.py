"""What a rank waits in, from torch's flight recorder: it holds the collectives that the rank has entered.

On CPUs a thread of the trainer answers, with its Python stack; on GPUs torch writes a pickle when its pipe is written
to.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "TITAN_HANG_DIR"  # the variable that names where a node's watcher asks its ranks
ASK = "ask"  # the file there; another text is another question
FRAMES = 12


def groups_of(dump: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Process group -> the number of the last collective that the rank has entered, and the first that it waits in:
    "waits": [number, operation, whether it has begun], or None. Sends and receives are passed over: a rank's partner
    is not in them.
    """
    groups: dict[str, dict[str, Any]] = {}
    for entry in dump.get("entries") or []:
        if entry.get("is_p2p"):
            continue
        group = groups.setdefault(" ".join(map(str, entry["process_group"])), {"entered": 0, "waits": None})
        number = int(entry["collective_seq_id"])
        group["entered"] = max(group["entered"], number)
        waits = not (entry.get("retired") or entry["state"] == "completed")
        if waits and (group["waits"] is None or number < group["waits"][0]):
            group["waits"] = [number, str(entry["profiling_name"]).partition(":")[2], entry["state"] == "started"]
    return groups


class _Plain(pickle.Unpickler):
    """Numbers, texts, lists and tables alone: a pickle of another kind could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def read_dump(path: Path) -> dict[str, dict[str, Any]]:
    """`groups_of` a file that torch wrote. Raises ValueError for what is none, or not whole yet."""
    try:
        with open(path, "rb") as stream:
            return groups_of(_Plain(stream).load())
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: no flight recorder dump: {error}") from error


def stack_of(thread: int | None) -> list[str]:
    """Where a thread of this process is, the innermost call first."""
    frames = traceback.extract_stack(sys._current_frames().get(thread or 0))
    return [f"{Path(one.filename).name}:{one.lineno} in {one.name}" for one in reversed(frames[-FRAMES:])]


def listen() -> None:
    """Answers the watcher, from a thread: the main one may wait in a collective."""
    folder, main = os.environ.get(FOLDER), threading.get_ident()
    if folder:
        threading.Thread(target=_answer, args=(Path(folder), main), daemon=True).start()


def _answer(folder: Path, main: int) -> None:
    answered = ""
    said: dict[str, Any]
    while True:
        time.sleep(0.5)
        with contextlib.suppress(Exception):  # training goes on, whatever is wrong here
            if (asked := (folder / ASK).read_text()) and asked != answered:
                answered, said = asked, {"asked": asked, "stack": stack_of(main)}
                with contextlib.suppress(Exception):  # not every torch has it
                    c10d: Any = importlib.import_module("torch._C._distributed_c10d")
                    said["groups"] = groups_of(json.loads(c10d._dump_fr_trace_json()))
                file = folder / f"{os.environ['RANK']}.json"
                file.with_suffix(".tmp").write_text(json.dumps(said))
                os.replace(file.with_suffix(".tmp"), file)
