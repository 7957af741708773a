"""How long the launcher takes to answer, as ratios to `python -c "import click"` in the same run.

    python benchmarks/startup.py

Each command runs in turn with the others, so that a machine whose speed drifts gives the same ratios. Limits that
the project sets itself: --help at most 1.5, submit --dry-run at most 3. Also checks that neither path imports torch,
docker, rich or huggingface_hub.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.conftest import ROOT, say_it_trains, squashfs_head

HEAVY = ("torch", "docker", "rich", "huggingface_hub", "spython", "matplotlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "titan.sqsh"
        image.write_bytes(squashfs_head(4096).ljust(4096, b"\0"))
        say_it_trains(image)
        dry_run = ["submit", "--gpu", "gb200", "--nodes", "9", "--image", str(image), "--dry-run"]
        call = "from launcher.cli import main; main()"
        commands = {
            "python -c 'import click'": ["-c", "import click"],
            "launcher --help": ["-c", call, "--help"],
            "launcher submit --dry-run": ["-c", call, *dry_run],
        }
        # As where it is installed: compiled once, also where this variable forbids it here.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}

        def run(arguments: list[str]) -> float:
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder, env=environment)
            return time.perf_counter() - begin

        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs + 1):
            for name, arguments in commands.items():
                times[name].append(run(arguments))
        base = statistics.median(times["python -c 'import click'"][1:])
        print(f"{'command':28} {'ratio':>6}   (median of {runs})")
        for name, measured in times.items():
            print(f"{name:28} {statistics.median(measured[1:]) / base:6.2f}")
        for name in list(commands)[1:]:
            script = (
                f"import sys\ntry:\n    {call}\nexcept SystemExit:\n    pass\nfinally:\n    "
                "print(*sys.modules, file=sys.stderr)"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, *commands[name][2:]],
                capture_output=True,
                text=True,
                check=True,
                cwd=folder,
                env=environment,
            )
            loaded = {module.split(".")[0] for module in done.stderr.split()}
            print(f"{name} imports of {', '.join(HEAVY)}: {sorted(loaded & set(HEAVY)) or 'none'}")


if __name__ == "__main__":
    main()
