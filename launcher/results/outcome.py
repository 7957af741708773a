"""What a run was and what it reached: the one value that tables, comparisons, acceptance and pages are made from.

launcher/results/read.py makes an Outcome from a run directory. Nothing here reads files or clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launcher.logs.steps import StepRecord
from launcher.runs.attempts import Attempt


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over logged steps after warm-up: median, quartiles, ends, and how many values there were."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node: its host, and its median tokens/s per GPU after warm-up (None: it logged none)."""

    host: str
    tps: float | None


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """What a node's check found: whether it passed (None: not known), its words, and what its slowest GPU reached."""

    passed: bool | None
    said: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Startup:
    """Where the time before the first step went, in seconds; None where a moment is not known."""

    queue_s: float | None = None  # from submission to the start of the job's script
    container_s: float | None = None  # to the beginning of the last node's check
    check_s: float | None = None  # from there to the end of the last node's check
    first_step_s: float | None = None  # from there to the first logged step


# The spans of a start-up in their order: a field of Startup, and what it is called.
PHASES = (("queue_s", "queue"), ("container_s", "container"), ("check_s", "node check"), ("first_step_s", "first step"))


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the time of all of a run's attempts went, in seconds: the parts sum to `allocation_s`."""

    allocation_s: float  # from the beginning of the script to the end, without the queue
    kept_s: float  # steps that count, without what checkpoints held them up
    start_s: float  # to the first step of each attempt, without the check
    check_s: float
    lost_s: float  # steps after the checkpoint from which the next attempt trained on
    checkpoints_s: float
    ending_s: float  # from the last logged step to the end of each attempt: a hang is here
    queue_s: float | None = None  # beside it


class Lack(StrEnum):
    """Kinds of problems that something follows from; all others only make a result less than one."""

    STATE = "state"  # it did not complete
    SHORT = "short"  # it did not get to its last step, or past it
    RESTARTED = "restarted"
    NON_FINITE = "non-finite"
    NO_STEP_COUNTS = "no step counts"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Problem:
    """What makes a result less than one: what is said of it, and its kind."""

    text: str
    kind: Lack = Lack.OTHER


RESTARTED = Problem("restarted", Lack.RESTARTED)
NON_FINITE = Problem("NaN or infinity in loss, grad_norm or tokens/s", Lack.NON_FINITE)
NO_STEP_COUNTS = Problem("no step after warm-up", Lack.NO_STEP_COUNTS)


def short_of(step: int | None, steps: int) -> Problem:
    """Of a run that did not get to its last step, or past it."""
    return Problem(f"no step of {steps} was logged" if step is None else f"step {step} of {steps}", Lack.SHORT)


VERSIONS = ("torch", "torchtitan", "cuda", "nccl", "driver", "python", "image", "digest")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """With any of `problems` the figures must never be shown as complete; `notes` take nothing from a result."""

    run: str = ""  # its name
    run_dir: str = ""
    state: str = ""  # JobState's name
    date: str = ""  # of submission, ISO 8601 in UTC, to the second; "" where it is not known
    cluster: str = ""  # Slurm's ClusterName, "local", or ""
    gpu: str = ""  # as the results table writes it
    nodes: int
    gpus: int
    recipe: str = ""  # its name
    local_batch_size: int  # sequences per GPU and step
    global_batch_size: int  # sequences per step
    seq_len: int  # tokens
    precision: str = ""  # "bfloat16", "float32", "bfloat16 + float8", "bfloat16 + mxfp8"
    compile: bool
    steps: int  # asked for
    step: int | None = None  # last logged
    loss: float | None = None  # at that step; may be NaN
    grad_norm: float | None = None
    memory_pct: float | None = None
    tps: Spread | None = None  # tokens/s per GPU, over the nodes' steps
    tflops: Spread | None = None  # per GPU
    memory_gib: Spread | None = None
    mfu_pct: float | None = None  # at the last step, as the trainer printed it
    peak_tflops: float | None = None  # what it divided by
    data_share: float | None = None  # of a step's time spent waiting for data, 0 to 1
    startup: Startup = field(default_factory=Startup)
    overall_tps: float | None = None  # tokens per second of all the time after warm-up, per GPU
    wall_s: float | None = None  # from the start of the job's script to its end
    series: tuple[StepRecord, ...] = ()  # the logged steps of the leading node
    by_node: tuple[NodeResult, ...] = ()
    attempts: tuple[Attempt, ...] = ()  # one, where it was never started again
    goodput: Goodput | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)  # of VERSIONS, as far as they are known
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key of run.toml -> value; no name of the run
    prediction: Mapping[str, Any] = field(default_factory=dict)  # what `launcher plan` said before it ran
    source: str = ""  # who published it
    own_fault: str = ""  # why it failed by what was asked of it, and not by the cluster; "" elsewhere

    @property
    def complete(self) -> bool:
        """Whether the figures may stand beside published ones."""
        return not self.problems and self.tps is not None

    @property
    def lacks(self) -> str:
        """Why it is not complete, in words; "" where it is."""
        if self.problems:
            return "; ".join(problem.text for problem in self.problems)
        return "" if self.complete else NO_STEP_COUNTS.text

    @property
    def per_node(self) -> int:
        """GPUs a node."""
        return self.gpus // max(1, self.nodes)

    @property
    def on_cpu(self) -> bool:
        return self.settings.get("profile.device") == "cpu"

    @property
    def unit(self) -> str:
        """What a tokens/s is per."""
        return "rank" if self.on_cpu else "GPU"

    @property
    def goodput_pct(self) -> float | None:
        spent = self.goodput
        return 100 * spent.kept_s / spent.allocation_s if spent and spent.allocation_s > 0 else None

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)

    @property
    def has_spent(self) -> bool:
        """Whether its goodput says something: of a short run without both, the start is most of the time."""
        return bool(self.restarts or (self.goodput and self.goodput.checkpoints_s))

    def has(self, kind: Lack) -> bool:
        return any(problem.kind is kind for problem in self.problems)

    @property
    def last(self) -> StepRecord | None:
        """The last logged step."""
        return self.series[-1] if self.series else None

    @property
    def median_tps(self) -> float | None:
        return self.tps.median if self.tps else None

    @property
    def measured(self) -> list[NodeResult]:
        """The nodes that have a median, the slowest first."""
        return sorted((node for node in self.by_node if node.tps is not None), key=lambda node: node.tps or 0.0)

    @property
    def measured_at_once(self) -> int:
        """How many nodes a step has figures of; more have some where one took another's place."""
        return max(1, min(len(self.measured), self.nodes))

    @property
    def slowest(self) -> NodeResult | None:
        """The node with the lowest median, None where fewer than two have one."""
        return self.measured[0] if len(self.measured) > 1 else None


def per_unit(text: str, outcomes: Collection[Outcome]) -> str:
    """A heading that says "per GPU", as "per rank" where all the results are of CPUs."""
    return text.replace("per GPU", "per rank") if outcomes and all(one.on_cpu for one in outcomes) else text
