"""The states a job can be in: Slurm's words, and what they mean for a run."""

from __future__ import annotations

from dataclasses import dataclass

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
GOING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "SUBMITTING"}
SUCCEEDED = {"COMPLETED"}
FAILED = {
    *("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
}
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class JobState:
    """A job's state, where it was read, and what else was said there."""

    name: str  # one of Slurm's words, SUBMITTING or UNKNOWN
    source: str = ""  # "end.json", "squeue", "sacct", "process", "" for nothing
    reason: str = ""
    exit_code: int | None = None
    unfit: bool = False  # a node failed its check, and nothing was trained
    gone: bool = False  # UNKNOWN, and everything that would know of a job was asked: there is none

    @property
    def active(self) -> bool:
        return self.name in WAITING or self.name in GOING

    @property
    def failed(self) -> bool:
        return self.name in FAILED

    @property
    def known(self) -> bool:
        return self.active or self.failed or self.name in SUCCEEDED


def from_slurm(word: str, source: str, reason: str = "", exit_code: int | None = None) -> JobState:
    """`word` as squeue, scontrol or sacct print it ("CANCELLED by 1000", "COMPLETED+"); never guessed."""
    plain = word.strip().split(" ")[0].rstrip("+*").upper()
    known = plain in WAITING | GOING | SUCCEEDED | FAILED
    if not known:
        return JobState(UNKNOWN, source, f"{source} says {word.strip()[:40]!r}", exit_code)
    return JobState(plain, source, "" if reason in ("None", "(null)") else reason, exit_code)
