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


def test_whole_lines_and_those_of_something_else(fake_slurm: Fake) -> None:
    for said, reason in (("Priority", "Priority"), ("a|reason with |", "a|reason with |"), ("", ""), ("None", "")):
        ((name, state),) = listed(fake_slurm, f"slurm: warning: x\n101|PENDING|mine|{said}\n").values()
        assert (name, state.reason) == ("mine", reason)
    for other in ("101_7|RUNNING|array|None", "101+0|RUNNING", "slurm: warning: a|b"):
        assert list(listed(fake_slurm, f"{other}\n100|RUNNING|other|None\n")) == ["100"]


def test_a_line_that_is_cut_off(fake_slurm: Fake) -> None:
    for line in ("101|PENDING|Prio", "101|PEND", "101", "101|PENDING|mine"):
        with pytest.raises(LauncherError, match="squeue's answer cannot be read") as raised:
            listed(fake_slurm, f"100|RUNNING|other|None\n{line}")
        assert line in raised.value.original
