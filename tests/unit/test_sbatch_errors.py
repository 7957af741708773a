"""What sbatch says when it refuses a job, in plain words. The lines are those of Slurm 22.05's slurm_errno.c and
sbatch.
"""

from __future__ import annotations

import pytest

from launcher.base.errors import ExitStatus
from launcher.scheduler.slurm import SBATCH_ERRORS, Refused

FAILED = "sbatch: error: Batch job submission failed: "
SAID = {
    "sbatch: error: invalid partition specified: gpu\n"
    + FAILED
    + "Invalid partition name specified": "no such partition",
    FAILED + "Required partition not available (inactive or drain)": "takes no jobs now",
    FAILED + "Invalid account or account/partition combination specified": "account may not use this partition",
    FAILED + "Invalid qos specification": "no such QOS",
    FAILED + "Requested reservation is invalid": "no such reservation",
    FAILED + "Access denied to requested reservation": "may not use that reservation",
    "sbatch: error: invalid number of nodes (-N 9-4)": "that number of nodes",
    'sbatch: error: "9-" is not a valid node count': "that number of nodes",
    "sbatch: error: Invalid node count": "that number of nodes",
    FAILED + "Invalid node count specification": "that number of nodes",
    FAILED + "Node count specification invalid": "more nodes, GPUs per node or CPUs than it has",
    FAILED + "More processors requested than permitted": "more nodes, GPUs per node or CPUs than it has",
    FAILED + "Requested node configuration is not available": "more nodes, GPUs per node or CPUs than it has",
    FAILED + "Requested topology configuration is not available": "no block of the topology",
    FAILED + "Requested nodes not in this partition": "not in the partition",
    FAILED + "Invalid node name specified": "does not exist",
    FAILED + "Invalid generic resource (gres) specification": "no GPUs under that name",
    FAILED + "Invalid feature specification": "no node has those features",
    "sbatch: unrecognized option '--cons'": "it has no such option",
    FAILED + "Requested time limit is invalid (missing or exceeds some limit)": "time limit is above",
    FAILED
    + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)": "limit of your account",
    FAILED + "Access/permission denied": "you may not submit there",
}


@pytest.mark.parametrize("text", SAID)
def test_what_it_means(text: str) -> None:
    refused = Refused(text, 1)
    assert SAID[text] in refused.what, refused.what
    assert refused.fix and refused.original == text
    expected = ExitStatus.NOT_FOUND if "no such partition" in SAID[text] else ExitStatus.CLUSTER
    assert refused.status is expected


def test_every_row_has_its_line() -> None:
    assert {Refused(text, 1).what.partition(": ")[2] for text in SAID} == {what for _, what, _ in SBATCH_ERRORS}


def test_other_words_are_shown_as_they_are() -> None:
    assert "exit code 3" in Refused("sbatch: error: something new", 3).what
