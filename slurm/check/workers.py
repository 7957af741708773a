"""The workers of one node (speed.py), as the process that starts them sees them: ask all, wait, never for ever."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import bounded

PRINTED_BYTES = 20_000
END_S = 10  # a worker that reads the end of its input ends in milliseconds


@dataclass
class Worker:
    rank: int
    process: subprocess.Popen[bytes]
    errors: Path  # its standard error: what libraries print


def start(count: int, device: str, scratch: Path, env: Mapping[str, str]) -> list[Worker]:
    """Starts `count` workers, which begin to import torch at once. In a process group each, to be killed whole.

    Their files are in a directory of their own: nodes that are made up on one machine share `scratch`.
    """
    place = Path(tempfile.mkdtemp(prefix="check-", dir=scratch))
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parent), env.get("PYTHONPATH", "")]))
    more = {"PYTHONPATH": path} | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    workers = []
    for rank in range(count):
        errors = place / f"{rank}.err"
        with open(errors, "wb") as stream:
            process = subprocess.Popen(
                # The same Python with the same switches, such as -S or -I, that decide what it can import.
                [sys.executable, *_switches(), "-m", f"{here.name}.speed", device, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**env, **more},
                start_new_session=True,
            )
        workers.append(Worker(rank, process, errors))
    return workers


def ask(workers: Sequence[Worker], command: Mapping[str, Any], limit_s: float) -> list[dict[str, Any]]:
    """Each worker's answer to the command, in order; {"problem": ...} from one that ended or said nothing in time.

    One of those is killed, so that no later answer is taken for this one's.
    """

    def talk(worker: Worker) -> Any:
        assert worker.process.stdin is not None and worker.process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended: its output says so below
            worker.process.stdin.write(json.dumps(command).encode() + b"\n")
            worker.process.stdin.flush()
        line = worker.process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        return {"problem": f"{command['do']}: the worker ended{_end_of(worker)}{_last_words(worker)}"}

    answers = []
    said = bounded(limit_s, [partial(talk, worker) for worker in workers])
    for worker, answer in zip(workers, said, strict=True):
        if answer is None:
            _kill(worker)
            late = f"{command['do']}: no answer within {limit_s:.0f} s"
            answers.append({"problem": late + _last_words(worker)})
        else:
            answers.append(answer.result())
    return answers


def stop(workers: Sequence[Worker]) -> None:
    """Ends them all: when this returns, their GPU memory is free, or the kernel does not let go of a process."""
    for worker in workers:
        with contextlib.suppress(OSError):
            if worker.process.stdin is not None:
                worker.process.stdin.close()
    for force in (False, True):
        deadline = time.monotonic() + END_S
        for worker in workers:
            if force:
                _kill(worker)
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        shutil.rmtree(worker.errors.parent, ignore_errors=True)


def printed(workers: Sequence[Worker]) -> str:
    """What they and their libraries printed, the end of it: with NCCL_DEBUG=INFO, why an all-reduce failed."""
    found = []
    for worker in workers:
        with contextlib.suppress(OSError), open(worker.errors, "rb") as stream:
            stream.seek(max(0, worker.errors.stat().st_size - PRINTED_BYTES))
            if text := stream.read().decode("utf-8", "replace").strip():
                found.append(f"titan-check: printed by worker {worker.rank}:\n{text}")
    return "\n".join(found)


def _kill(worker: Worker) -> None:
    if worker.process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(worker.process.pid, signal.SIGKILL)


def _last_words(worker: Worker) -> str:
    """The last line that it or its libraries printed, for a message."""
    with contextlib.suppress(OSError):
        if text := worker.errors.read_text(encoding="utf-8", errors="replace").strip():
            return f": {text.splitlines()[-1][:300]}"
    return ""


def _end_of(worker: Worker) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):  # it has only closed its output
        code = worker.process.wait(1)
        return f" by signal {-code}" if code < 0 else f" with {code}"
    return ""


def _switches() -> list[str]:
    flags = {"-S": sys.flags.no_site, "-s": sys.flags.no_user_site}
    return [switch for switch, given in flags.items() if given]
