"""How long a checkpoint's files must be: `checkpoint_sizes.py STEP/.metadata CPU_SECONDS` prints {name: bytes} as JSON.

torch writes that file as a pickle. Here a pickle runs nothing: every class that it names is a stub. A process of its
own reads it, with bounds, because a few damaged bytes can make Python's reader ask for 64 GB or compute for ever.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import sys
from typing import Any

NO_METADATA = 3  # exit code: the file was read, and is none


class Stub:
    """Stands for whatever a pickle names: takes everything and does nothing with it."""

    __slots__ = ("state",)

    def __new__(cls, *_arguments: Any) -> Stub:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> type[Stub]:
        return Stub


def sizes(path: str) -> dict[str, int]:
    """By file, where the last of its entries ends. Raises an exception of any kind where it is no such pickle."""
    found: dict[str, int] = {}
    with open(path, "rb") as stream:
        entries = Reader(stream).load().state["storage_data"].values()
    for entry in entries:
        name, offset, length = (entry.state[key] for key in ("relative_path", "offset", "length"))
        if not (type(name) is str and type(offset) is type(length) is int and offset >= 0 and length >= 0):
            raise ValueError("not an entry")
        found[name] = max(found.get(name, 0), offset + length)
    return found


if __name__ == "__main__":
    for what, most in ((resource.RLIMIT_AS, 16 << 30), (resource.RLIMIT_CPU, int(sys.argv[2]))):
        with contextlib.suppress(ValueError):  # the limit here is lower
            resource.setrlimit(what, (most, most))
    try:
        print(json.dumps(sizes(sys.argv[1])))
    except OSError:  # of the file nothing is known
        raise
    except Exception:  # a damaged pickle may raise anything
        sys.exit(NO_METADATA)
