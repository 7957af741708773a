"""Time to know a cluster of 10,000 nodes: `launcher cluster show` and its parts.

    python benchmarks/cluster.py

Slurm's own commands are replaced by files, so this is the launcher's share of the time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from launcher.scheduler.detect import detect
from tests.cluster_fixtures import FakeNode, answering, cluster, install, partition_line

ROOT = Path(__file__).resolve().parent.parent
NODES = 10_000
RUNS = 5


def ten_thousand() -> dict[str, str]:
    """Racks of 18 GB200 nodes in two partitions; every 50th node is drained with a reason of its own."""
    nodes = [
        FakeNode(
            f"batch-compute-node-{n:05d}",
            "IDLE+DRAIN" if n % 50 == 0 else "MIXED+PLANNED" if n % 3 == 0 else "IDLE",
            "gpu:gb200:4(S:0-1)",
            "aarch64",
            144,
            870000,
            "nvl72",
            "batch,all",
            f"NVLink [GPU {n % 4}] node {n}" if n % 50 == 0 else "",
        )
        for n in range(NODES)
    ]
    names = f"batch-compute-node-[00000-{NODES - 1:05d}]"
    blocks = [
        f"BlockName=rack{n // 18} BlockIndex={n // 18} "
        f"Nodes=batch-compute-node-[{n:05d}-{min(n + 17, NODES - 1):05d}] BlockSize=18"
        for n in range(0, NODES, 18)
    ]
    lines = [partition_line("batch", names, default=True), partition_line("all", names)]
    return cluster("25.05.3", nodes, lines, topology="\n".join(blocks) + "\n", plugin="topology/block")


def main() -> None:
    answers = ten_thousand()
    print(f"{NODES} nodes, {len(answers['nodes']) / 1e6:.1f} MB of `scontrol -o show node`; median of {RUNS}")
    _report("detect", lambda: detect(answering(answers), lambda path: ""))
    with tempfile.TemporaryDirectory() as folder:
        commands = Path(folder)

        def fake(command: str, script: str) -> Path:
            path = commands / command
            path.write_text(f"#!/bin/bash\n{script}\n")
            path.chmod(0o755)
            return path

        install(answers, fake)
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        for options in ([], ["--json"]):
            command = [sys.executable, "-m", "launcher", "cluster", "show", *options]
            run = partial(subprocess.run, command, env=env, stdout=subprocess.DEVNULL, check=True)
            _report(" ".join(command[2:]), run)


def _report(name: str, work: Callable[[], object]) -> None:
    """Seconds on the clock, and of processors, which a busy machine does not change."""
    clock, processors = [], []
    for _ in range(RUNS):
        start, used = time.perf_counter(), sum(os.times()[:4])
        work()
        clock.append(time.perf_counter() - start)
        processors.append(sum(os.times()[:4]) - used)
    print(f"{name}: {statistics.median(clock):.2f} s, of processors {statistics.median(processors):.2f} s")


if __name__ == "__main__":
    main()
