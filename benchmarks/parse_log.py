"""How fast step records are read from a large log, and whether memory stays constant.

    python benchmarks/parse_log.py --mib 1024

For each share of step lines, a log of that size is written to a temporary folder and read in plain blocks without
looking at them, by LogReader, and for the first error; the latter also with a log of which every line says "error".
Each of these runs in a process of its own, at a quarter of the size and at the full size, so that its peak memory is
its own. The file is removed at the end. Speeds of a machine only mean something beside the plain reading in the same
line.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that isn't installed

from launcher.logs.first_error import find_errors
from launcher.logs.steps import LogReader

MIB = 1 << 20
STEP = (
    b"[rank0]:[titan] 2026-11-22 07:%02d:%02d,413 - root - INFO - \x1b[31mstep: %2d  \x1b[32mloss:  6.42771  "
    b"\x1b[38;2;180;60;0mgrad_norm:  2.9062  \x1b[38;2;54;234;195mmemory: 158.61GiB(86.20%%)  "
    b"\x1b[34mtps: 17,581  \x1b[36mtflops: 1,018.20  \x1b[35mmfu: 45.25%%\x1b[39m\n"
)
OTHER = (
    b"[rank0]:gpu001:4711:4750 [0] NCCL INFO Channel 03/0 : 0[0] -> 1[1] via P2P/CUMEM/read comm 0x7f5c nRanks 36\n",
    b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - Saving the checkpoint (or staging if async is on).\n",
    b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - \x1b[33mvalidate step:  1  \x1b[32mloss:  "
    b"7.9794\x1b[39m\n",
)
ERROR = b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - WARNING - error while reading a file: ValueError: again\n"


def write_log(path: Path, size: int, share: float, other: tuple[bytes, ...] = OTHER) -> int:
    """Writes about `size` bytes of which `share` are step lines; returns how many of these."""
    written, steps, of_steps, others = 0, 0, 0, 0
    chunk: list[bytes] = []
    with path.open("wb") as handle:
        while written < size:
            if of_steps <= share * written:
                line = STEP % (steps // 60 % 60, steps % 60, steps + 1)
                steps += 1
                of_steps += len(line)
            else:
                others += 1
                line = other[0 if others % 100 else others // 100 % len(other)]
            written += len(line)
            chunk.append(line)
            if len(chunk) == 10_000:
                handle.write(b"".join(chunk))
                chunk.clear()
        handle.write(b"".join(chunk))
    return steps


def read_plain(path: Path) -> int:
    """Blocks of a mebibyte, thrown away."""
    with path.open("rb") as handle:
        return sum(1 for _ in iter(lambda: handle.read(MIB), b""))


def read_records(path: Path) -> int:
    return sum(1 for _ in LogReader(path).read())


def find_error(path: Path) -> int:
    return len(find_errors([path]).lines)


def measured(work: Callable[[Path], int], path: Path) -> tuple[float, float, int]:
    """CPU seconds of the fastest of three readings, peak resident MiB and the result, in a fresh process."""
    parent, child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(work, path, child))
    process.start()
    child.close()
    try:
        seconds, peak, result = parent.recv()
    finally:
        process.join()
    return seconds, peak, result


def _measure(work: Callable[[Path], int], path: Path, pipe: Connection) -> None:
    seconds = math.inf
    for _ in range(3):
        began = time.process_time()  # the file is in the page cache, and the machine may be shared
        result = work(path)
        seconds = min(seconds, time.process_time() - began)
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the full log (default 1024)")
    parser.add_argument(
        "--share", type=float, action="append", help="share of step lines by bytes (default 0.1, 0.5 and 1)"
    )
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs; MiB per CPU second, peak RSS in MiB, and time as a multiple of plain block reads")
    print(f"{'step lines':>10} {'size':>6} {'plain':>7} {'records':>17} {'first error':>19} {'count':>9}")
    with tempfile.TemporaryDirectory(prefix="parse-log-") as folder:
        path = Path(folder) / "0000-gpu001.log"
        for share in options.share or (0.1, 0.5, 1.0):
            for mib in (max(1, options.mib // 4), options.mib):
                written = write_log(path, mib * MIB, share)
                read_plain(path)  # so that every reading finds the file in the page cache
                plain, _, _ = measured(read_plain, path)
                seconds, peak, count = measured(read_records, path)
                if count != written:
                    raise SystemExit(f"{written} step lines were written, {count} were read")
                error_seconds, error_peak, _ = measured(find_error, path)
                print(
                    f"{share:>10.0%} {mib:>6} {mib / plain:>7.0f}"
                    f" {mib / seconds:>4.0f} {peak:>4.0f} {seconds / plain:>6.0f}x"
                    f" {mib / error_seconds:>6.0f} {error_peak:>4.0f} {error_seconds / plain:>6.0f}x {count:>9}",
                    flush=True,
                )
        write_log(path, options.mib // 4 * MIB, -1, (ERROR,))
        plain, _, _ = measured(read_plain, path)
        seconds, _, _ = measured(find_error, path)
        print(f"every line says error: first error {options.mib // 4 / seconds:.0f} MiB/s, {seconds / plain:.0f}x")


if __name__ == "__main__":
    main()
