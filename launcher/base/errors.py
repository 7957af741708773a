"""Exit codes and the one exception that becomes an error message."""

from __future__ import annotations

import re
import shlex
import sys
from enum import IntEnum


class ExitStatus(IntEnum):
    """What a command's exit code means; docs/exit-codes.md is checked against this list."""

    OK = 0  # done; for `watch` and `status`: the job completed, or is still going
    ERROR = 1  # something not listed below
    USAGE = 2  # an option or argument that the command does not take
    INVALID = 3  # a value, file or image that cannot work; nothing was submitted
    NOT_FOUND = 4  # no such run, profile, recipe or partition
    EXISTS = 5  # a run of that name exists
    CLUSTER = 6  # a Slurm command is missing, failed, hung or answered nonsense
    FILESYSTEM = 7  # a directory or file could not be read or written
    JOB_FAILED = 8  # the job ended in failure
    JOB_UNKNOWN = 9  # nothing knows how the job ended
    NO_DATA = 10  # the run has not logged a step yet
    NODES_UNFIT = 11  # a node failed its check, and the job stopped before training
    BELOW = 12  # `accept`: FAIL, the run is slower than it should be or not sane
    CANNOT_SAY = 13  # `accept`: CANNOT SAY, there is nothing to judge or nothing to judge it by
    INTERRUPTED = 130  # Ctrl-C; what was submitted before is printed, and goes on


def quoted(*words: object) -> str:
    """Words as a shell reads them back, in characters that `output.echo` prints."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in map(str, words))


def _escaped(word: str) -> str:
    """As $'...', which bash and zsh know: the bytes of a name, also of one that is not UTF-8."""
    data = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", word).encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"


def install(extra: str) -> str:
    """The command that adds the optional packages `extra` of pyproject.toml to this Python's."""
    return f"{quoted(sys.executable)} -m pip install 'titan-launcher[{extra}]'"


class LauncherError(Exception):
    """An error for the user: the thing, the cause, and what to type next.

    `code` names the kind of error: it stays when words change, and docs/exit-codes.md lists it. `what` names the thing
    and the cause in one or two lines; `fix` is a command or an action; `original` holds the words of another program,
    printed unchanged below.
    """

    def __init__(
        self, code: str, what: str, fix: str = "", *, status: ExitStatus = ExitStatus.INVALID, original: str = ""
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.fix = fix
        self.status = status
        self.original = original.strip()
