"""A dozen runs such as a cluster's first weeks bring: three sizes, two GPU types, failures, and names that are
markup.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from launcher.results.outcome import Goodput, NodeResult, Outcome, Startup
from launcher.runs.attempts import Attempt
from tests.unit.outcomes import outcome, point, spread

MARKUP = '<img src=x onerror=alert(1)></script><b>"q"\'&amp;'
LONG = "h100-2n-a-name-that-is-rather-long-because-somebody-put-everything-into-it"
CUT_SHORT, NEVER_STARTED = ("TIMEOUT", "step 40 of 100"), ("FAILED (exit code 1)", "no step of 100 was logged")
VERSIONS = {"torch": "2.14.1", "torchtitan": "0.2.2", "cuda": "13.0", "image": "titan-stable-arm64.sqsh"}

HOSTS = ("gb200-001", "gb200-002", "gb200-003")
FIRST = Attempt(1, "", HOSTS, 0, 900, 1, "node-failure", HOSTS[2:], 20, True, "", True, 1, 30, 20, 18270.0)
ATTEMPTS = (FIRST, Attempt(2, "", (*HOSTS[:2], "gb200-004"), 905, 4000, 0, first_step=30, last_step=100, kept_step=100))
GOODPUT = Goodput(4000.0, 3321.0, 290.0, 21.0, 204.0, 12.4, 151.6, 12.0)


def sample() -> list[Outcome]:
    """Newest first, as the command has them."""
    return [
        run("gb200-17n-1121", 17, 17590, "2026-11-21T08:00:00Z", queue_s=5400.0),
        run("gb200-9n-1120", 9, 17960, "2026-11-20T09:30:00Z"),
        replace(run("gb200-3n-1120", 3, 18260, "2026-11-20T08:10:00Z"), attempts=ATTEMPTS, goodput=GOODPUT),
        run("gb200-9n-slow-node", 9, 16900, "2026-11-19T15:00:00Z", slow=0.93),
        run("gb200-9n-nan", 9, 17900, "2026-11-19T11:00:00Z", nan_from=60, problems=("NaN in the loss",)),
        run("gb200-17n-cut-short", 17, 17500, "2026-11-18T20:00:00Z", steps=40, state="TIMEOUT", problems=CUT_SHORT),
        run(MARKUP, 3, 18210, "2026-11-18T10:00:00Z"),
        run("gb200-9n-compiled", 9, 19240, "2026-11-17T10:00:00Z", compile=True),
        run("gb200-3n-1116", 3, 18190, "2026-11-16T10:00:00Z"),
        run("gb200-17n-failed", 17, None, "2026-11-15T10:00:00Z", steps=0, state="FAILED", problems=NEVER_STARTED),
        run("h100-4n", 4, 7610, "2026-11-12T10:00:00Z", gpu="H100", per_node=8, batch=2),
        run(LONG, 2, 8690, "2026-11-11T10:00:00Z", gpu="H100", per_node=8, batch=2),
    ]


def run(
    name: str,
    nodes: int,
    tps: float | None,
    date: str,
    *,
    gpu: str = "GB200",
    per_node: int = 4,
    batch: int = 5,
    steps: int = 100,
    slow: float = 1.0,
    nan_from: int = 0,
    queue_s: float = 12.0,
    compile: bool = False,
    state: str = "COMPLETED",
    problems: tuple[str, ...] = (),
    log_freq: int = 10,
) -> Outcome:
    """A run whose nodes and steps scatter by about half a percent, always in the same way for the same name."""
    rnd = random.Random(name)
    logged = [step for step in range(1, steps + 1) if step == 1 or step % log_freq == 0]
    rate = tps or 0.0
    series = tuple(
        point(
            step,
            math.nan if nan_from and step >= nan_from else 5.9 + 6.4 * math.exp(-step / 35) + rnd.gauss(0, 0.03),
            rate * (0.22 if step == 1 else rnd.gauss(1, 0.004)),
        )
        for step in logged
    )
    medians = [rate * rnd.gauss(1, 0.002) * (slow if number == 4 else 1) for number in range(nodes)]
    by_node = tuple(NodeResult(f"{gpu.lower()}-{number:03}", value) for number, value in enumerate(medians, 1))
    return outcome(
        run=name,
        run_dir=f"/home/user/runs/{name}",
        state=state,
        date=date,
        gpu=gpu,
        nodes=nodes,
        per_node=per_node,
        local_batch_size=batch,
        compile=compile,
        step=logged[-1] if logged else None,
        loss=series[-1].loss if series else None,
        tps=spread(rate, count=9 * nodes) if logged else None,
        tflops=spread(rate * 0.0579) if logged else None,
        series=series,
        by_node=by_node if logged else (),
        problems=problems,
        mfu_pct=100 * rate * 0.0579 / 2250 if logged else None,
        memory_pct=86.58 if logged else None,
        startup=Startup(queue_s, 30 + nodes + rnd.random(), 9.5 + rnd.random(), 80 + 2 * nodes if logged else None),
        own_fault="the job reached its time limit" if state == "TIMEOUT" else "",
        versions={**VERSIONS, "driver": "580.95.05" if date > "2026-11-17" else "570.86.15"},
    )
