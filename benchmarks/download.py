"""What staging costs against parallel curl of the same files from the same loopback server; prints a Markdown table.

    python benchmarks/download.py [--size-mb 256] [--files 4] [--jobs 4] [--rounds 3]

Limits that the project sets itself: at least half of curl's bytes per second, although staging also hashes every byte;
less than 500 MB of memory; less than 1 s to plan and verify a manifest of 1,024 files without reading them. Server and
clients share this machine's cores. Needs curl, and twice the size of all files in --work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from launcher.stage import sample
from launcher.stage.c4 import plan_c4
from launcher.stage.fetch import fetch
from launcher.stage.inventory import verify
from launcher.stage.manifest import Manifest, StagedFile, write_manifest
from launcher.stage.target import at_work

ROOT = Path(__file__).parent.parent
MIN_RATIO, MAX_MEMORY_MB, MAX_PLAN_S = 0.5, 500, 1.0
TRAIN_FILES = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size-mb", type=int, default=512, help="of one file")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=4, help="files at once, of both")
    parser.add_argument("--rounds", type=int, default=3, help="of each; the best one counts")
    parser.add_argument("--work", type=Path, help="where the files go (default: a temporary directory)")
    parser.add_argument("--child", nargs=3, metavar=("DIR", "FILES", "JOBS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(Path(options.child[0]), int(options.child[1]), int(options.child[2]))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        os.environ["HF_HOME"] = str(work / "huggingface")
        source = make_c4(work / "source", options.files, options.size_mb)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        with server(source):
            curls, checked, stages, memory = [], [], [], 0.0
            for _ in range(options.rounds):  # in turns: what else the machine does meets both
                seconds = curl(source, work / "curl", options.jobs)
                curls.append(size / seconds)
                checked.append(size / (seconds + sha256sum(work / "curl", options.jobs)))
                seconds, used = stage(work / "staged", options.files, options.jobs)
                stages.append(size / seconds)
                memory = max(memory, used)
            planned = plan_seconds(work / "many")
    ratio = max(stages) / max(curls)
    print(f"\n{options.files} files of {options.size_mb} MB, {options.jobs} at once, best of {options.rounds}\n")
    print("| what | measured | limit |\n|---|---|---|")
    print(f"| curl --parallel | {max(curls) / 1e6:,.0f} MB/s | |")
    print(f"| curl --parallel, then sha256sum of as many files at once | {max(checked) / 1e6:,.0f} MB/s | |")
    print(
        f"| launcher stage c4, hashed and synced | {max(stages) / 1e6:,.0f} MB/s, {ratio:.0%} of curl | ≥ "
        f"{MIN_RATIO:.0%} |"
    )
    print(f"| its memory at most | {memory:,.0f} MB | < {MAX_MEMORY_MB} MB |")
    print(f"| plan and verify {TRAIN_FILES:,} files | {planned:.2f} s | < {MAX_PLAN_S:.0f} s |")
    if ratio < MIN_RATIO or memory > MAX_MEMORY_MB or planned > MAX_PLAN_S:
        sys.exit("a limit is not kept")


def make_c4(folder: Path, files: int, size_mb: int) -> Path:
    """C4's layout with incompressible bytes, as gzip files are; the other train files exist, and are empty."""
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(sample.README, encoding="utf-8")
    block = os.urandom(1 << 20)
    for index in range(TRAIN_FILES):
        with open(folder / "en" / f"c4-train.{index:05d}-of-{TRAIN_FILES:05d}.json.gz", "wb") as stream:
            for part in range(size_mb if index < files else 0):
                stream.write(part.to_bytes(4, "little") + index.to_bytes(4, "little") + block[8:])
    return folder


@contextlib.contextmanager
def server(source: Path) -> Iterator[None]:
    """The tests' Hub in a process of its own, its address in HF_ENDPOINT."""
    command = [sys.executable, "-m", "tests.stage.hub_server", str(source)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            os.environ["HF_ENDPOINT"] = process.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
            yield
        finally:
            process.terminate()


def curl(source: Path, target: Path, jobs: int) -> float:
    """Seconds for the files, through the same redirects."""
    shutil.rmtree(target, ignore_errors=True)
    paths = [path for path in sorted(source.rglob("*")) if path.is_file() and path.stat().st_size]
    command = [
        "curl",
        "--silent",
        "--fail",
        "--location",
        "--parallel",
        "--parallel-max",
        str(jobs),
        "--create-dirs",
    ]
    for path in paths:
        name = path.relative_to(source)
        url = f"{os.environ['HF_ENDPOINT']}/datasets/allenai/c4/resolve/main/{name}"
        command += ["--output", str(target / name), url]
    began = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began


def sha256sum(folder: Path, jobs: int) -> float:
    """Seconds to check what curl brought: staging has done that, too, when it ends."""
    paths = "\0".join(str(path) for path in folder.rglob("*") if path.is_file())
    began = time.monotonic()
    command = ["xargs", "-0", "-n", "1", "-P", str(jobs), "sha256sum"]
    subprocess.run(command, input=paths.encode(), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def stage(target: Path, files: int, jobs: int) -> tuple[float, float]:
    """Seconds from an empty directory to a verified one without the interpreter's start, and its memory in MB."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(target), str(files), str(jobs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    return result["seconds"], result["memory_mb"]


def import_hub() -> None:
    """Its import is part of every command's start, not of the work. It resolves names when they are asked for."""
    hub = import_module("huggingface_hub")
    assert hub.get_token and hub.constants


def child(target: Path, files: int, jobs: int) -> None:
    import_hub()
    began = time.monotonic()
    plan = plan_c4(target, files=files)
    fetch(target, plan.repo, plan.files, "c4", jobs, plan.train_files_in_all)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": seconds, "memory_mb": peak}))


def plan_seconds(target: Path) -> float:
    """A complete directory of 1,024 files: choose among them for a run, and hold all against the manifest."""
    import_hub()

    (target / "en").mkdir(parents=True)
    files = {}
    for index in range(TRAIN_FILES):
        name = f"en/c4-train.{index:05d}-of-{TRAIN_FILES:05d}.json.gz"
        (target / name).write_bytes(b"")
        files[name] = StagedFile(0, "0" * 64, (target / name).stat().st_mtime_ns)
    manifest = Manifest("c4", "hf://datasets/allenai/c4", "a" * 40, files, tuple(files), TRAIN_FILES)
    with at_work(target, print) as work:
        write_manifest(work, manifest)
    began = time.monotonic()
    plan_c4(target, everything=True)
    assert not verify(target).problems
    return time.monotonic() - began


if __name__ == "__main__":
    main()
