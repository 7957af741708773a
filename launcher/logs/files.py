"""The log files of a run: which there are, and whose they are.

Each node writes `logs/NNNN-<node>.log`. All of them say `[rank0]`, so nodes are told apart by file only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.base.files import unreadable
from launcher.logs.steps import last_bytes, plain_text

JOB_LOG = "job.log"
_NODE_LOG = re.compile(r"[0-9]{4,}-([\w.-]+)\.log")


def node_logs(log_dir: Path) -> dict[str, Path]:
    """The log of each node by its name, in the job's order; a name that occurs twice keeps its number.

    Raises LauncherError when the directory cannot be read; one that doesn't exist yet has no logs.
    """
    found = {path: match[1] for path in files_in(log_dir) if (match := _NODE_LOG.fullmatch(path.name))}
    names = list(found.values())
    ordered = sorted(found, key=lambda path: (int(path.name.split("-")[0]), path.name))
    return {found[path] if names.count(found[path]) == 1 else path.stem: path for path in ordered}


def files_in(log_dir: Path) -> list[Path]:
    """The regular files in a directory: nothing else is a log, and opening a FIFO would wait for a writer."""
    with reading(log_dir):
        try:
            with os.scandir(log_dir) as entries:
                return [log_dir / entry.name for entry in entries if _is_file(entry)]
        except FileNotFoundError:
            return []


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        return error.errno != errno.ELOOP  # any other error comes again when it is opened, and is reported then


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says of `path` into an error for the user."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def error_logs(log_dir: Path) -> list[Path]:
    """Where the cause of a failure may stand, for `launcher.logs.steps.find_errors`.

    A node's log shows one of its ranks. What the others wrote is in the files that torchrun keeps per rank.
    """
    with reading(log_dir):
        ranks = sorted(log_dir.glob("ranks/**/stderr.log"))
    return [*node_logs(log_dir).values(), *ranks, log_dir / JOB_LOG]


def last_lines(paths: Sequence[Path], count: int) -> tuple[Path | None, list[str]]:
    """The end of the first of `paths` that holds anything, for a failure whose error is not known."""
    for path in paths:
        lines = [plain_text(line)[:200] for line in last_bytes(path, 8192).splitlines() if line.strip()]
        if lines:
            return path, lines[-count:]
    return None, []
