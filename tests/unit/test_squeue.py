"""What squeue's lines say of a job, whole or cut off: a job that is there is never taken for one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.scheduler import slurm

Fake = Callable[[str, str], Path]


def listed(fake_slurm: Fake, said: str) -> slurm.Listed:
    answer = fake_slurm("squeue", ":").with_name("squeue.txt")
    answer.write_text(said)
    fake_slurm("squeue", f"cat {answer}")
    return slurm.queue()


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        ("101|PENDING|mine|Priority", "mine", "Priority"),
        ("101|PENDING|mine|a|reason with | and spaces", "mine", "a|reason with | and spaces"),
        ("101|PENDING|mine|", "mine", ""),
        ("101|RUNNING|mine|None", "mine", ""),
    ],
)
def test_a_line(fake_slurm: Fake, line: str, name: str, reason: str) -> None:
    ((found, state),) = listed(fake_slurm, f"slurm: warning: x\n{line}\n").values()
    assert (found, state.reason) == (name, reason)


@pytest.mark.parametrize("line", ["101|PENDING|Prio", "101|PEND", "101", "101|PENDING|mine"])
def test_a_line_that_is_cut_off(fake_slurm: Fake, line: str) -> None:
    with pytest.raises(LauncherError, match="squeue's answer cannot be read") as raised:
        listed(fake_slurm, f"100|RUNNING|other|None\n{line}")
    assert line in raised.value.original


@pytest.mark.parametrize("line", ["101_7|RUNNING|array|None", "101+0|RUNNING", "slurm: warning: a|b"])
def test_lines_of_something_else(fake_slurm: Fake, line: str) -> None:
    assert list(listed(fake_slurm, f"{line}\n100|RUNNING|other|None\n")) == ["100"]
