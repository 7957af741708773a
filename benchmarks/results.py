"""A thousand runs: `launcher list` and `launcher results --all`, as ratios to `python -c "import click"` in the same
run.

    python benchmarks/results.py
    python benchmarks/results.py --log-mib 1024      and how much memory the result of one long log takes

The runs are small: one node, eleven logged steps, an event file, everything that `submit` writes. What the project
asks of itself: the list of a thousand within a second on a login node; a result's memory does not grow with its log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from launcher.base.files import write_json, write_text
from launcher.config.layers import Layer, merge
from launcher.config.resolve import placed
from launcher.config.spec import node_config
from launcher.config.write import run_toml
from tests.unit.test_read import RECORD, log
from tests.unit.test_tensorboard import scalar

ROOT = Path(__file__).resolve().parent.parent
TAGS = (
    "loss_metrics/global_avg_loss",
    "throughput(tps)",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(%)",
    "memory/max_active(GiB)",
    "memory/max_reserved(GiB)",
    "mfu(%)",
    "tflops",
    "lr",
    "grad_norm",
)
CALL = "from launcher.cli import main; main()"


def make(runs_dir: Path, name: str, number: int) -> Path:
    """A run directory that ended well."""
    values = {
        "job.name": name,
        "job.runs_dir": str(runs_dir),
        "job.runtime": "bare",
        "profile.gpus_per_node": 4,
    }
    spec = placed(merge([Layer(values, dict.fromkeys(values, "benchmark"))]))
    run = runs_dir / name
    for folder in ("job", "logs", "nodes", "claim", "titan/tb/20261122-0710"):
        (run / folder).mkdir(parents=True)
    write_json(run / "job" / "node.json", node_config(spec))
    write_text(run / "run.toml", run_toml(spec))
    write_json(run / "intent.json", {"scheduler": "slurm", "job_name": spec.job_name, "at": 1795331400.0 + number})
    write_json(run / "job.json", {"job_id": str(1000 + number)})
    write_json(run / "end.json", {"exit_code": 0, "began_at": 1795331430})
    write_json(run / "nodes" / "0000-a.json", RECORD)
    write_text(run / "logs" / "0000-a.log", log())
    events = b"".join(scalar(step, tag, 1.0) for step in (1, *range(10, 101, 10)) for tag in TAGS)
    (run / "titan" / "tb" / "20261122-0710" / "events.out.tfevents.1.a.1.0").write_bytes(events)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--log-mib", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder) / "runs"
        for number in range(options.count):
            make(runs_dir, f"run-{number:04}", number)
        commands = {
            "python -c 'import click'": ["import click"],
            f"launcher list, {options.count}": [CALL, "list", "--runs-dir", str(runs_dir)],
            f"launcher results --all, {options.count}": [
                CALL,
                "results",
                "--all",
                "--runs-dir",
                str(runs_dir),
            ],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.turns + 1):
            for name, arguments in commands.items():
                begin = time.perf_counter()
                run(arguments)
                times[name].append(time.perf_counter() - begin)
        base = statistics.median(times["python -c 'import click'"][1:])
        print(f"{'command':32} {'ratio':>6}  seconds   (median of {options.turns})")
        for name, measured in times.items():
            middle = statistics.median(measured[1:])
            print(f"{name:32} {middle / base:6.1f}  {middle:7.2f}")
        if options.log_mib:
            memory(Path(folder) / "long", options.log_mib)


def memory(runs_dir: Path, mib: int) -> None:
    noise = b"gpu001:4711:4750 [0] NCCL INFO Channel 03/0 : 0[0] -> 1[1] via P2P/CUMEM/read comm 0x7f5c8c0d\n" * 10_000
    for size in (mib // 4, mib):
        path = make(runs_dir, f"log-{size}", size) / "logs" / "0000-a.log"
        with path.open("ab") as handle:
            while handle.tell() < size << 20:
                handle.write(noise)
        script = (
            f"{CALL.replace('main()', '')}import resource\ntry:\n    main()\nfinally:\n    "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        begin = time.perf_counter()
        shown = run([script, "results", f"log-{size}", "--runs-dir", str(runs_dir), "--json"])
        took, (text, peak) = time.perf_counter() - begin, shown.rsplit("\n", 2)[:2]
        assert json.loads(text)["complete"]
        print(f"result of a log of {size} MiB: {size / took:.0f} MiB/s, peak memory {int(peak) / 1024:.0f} MiB")


def run(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout


if __name__ == "__main__":
    main()
