"""Runs beside torchrun on every node, and ends with it: ends a run that hangs, after it has said whose fault that is.
On the first node it says after each checkpoint whether the next one fits, too.

    python3 RUN_DIR/job/check/watch.py RUN_DIR/job/node.json NODE_ID HOST PID_OF_TORCHRUN

Below RUN_DIR/nodes: hang/board.json is what the first node's watcher asks of the others; hang/NNNN-host.json what one
of them has found; hang.json the verdict. hang.py judges. Nothing here may harm a run: what goes wrong ends the watcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # RUN_DIR/job

from titan import checkpoints
from titan.command import STARTUP, hang_s
from titan.recorder import ASK, FOLDER, read_dump

from check import read, write
from check.hang import Pace, moves, name
from check.smi import ask_smi, run_bounded

LOOK_S = 2  # the shortest look at the ranks
ROUND_S = 8  # the longest wait for the ranks' answers, of which there are two rounds
OTHERS_S = 40  # and for the other nodes'
GIVES_UP = "titan-watch: nobody watches for a hang any more"
SAVES_S = 10  # between two looks for a new checkpoint
RAS_PORT = 28028
PIPES = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
KERNEL = re.compile(r"NVRM: Xid|SXid|NVRM: .*(?:NVLink|fallen off)")
_STEP = re.compile(rb"(?<!validate )step:[ \t]*(\d+)\b.*loss:")


def asked_through(run_dir: Path, node_id: int, host: str, env: Mapping[str, str]) -> dict[str, str]:
    """Variables by which the ranks can be asked."""
    pipes = f"{tempfile.gettempdir()}/titan-{os.getuid()}-{os.getpid()}-"  # on NFS a pipe has no other end
    # The last: ranks that are ended by SIGABRT log their stacks.
    wanted = {FOLDER: str(folder_of(run_dir, node_id, host)), PIPES: pipes, "PYTHONFAULTHANDLER": "1"}
    return {key: value for key, value in wanted.items() if not env.get(key)}


def folder_of(run_dir: Path, node_id: int, host: str) -> Path:
    return run_dir / "nodes" / "hang" / f"{node_id:04d}-{host}"


class Watch:
    """One node's watcher. `board`: {"ask": the attempt and the number of its question, "end": whether all is said}."""

    def __init__(self, node: dict[str, Any], node_id: int, host: str, torchrun: int) -> None:
        self.node, self.host, self.torchrun = node, host, torchrun
        self.run_dir, self.on_gpu = Path(node["placed"]["run_dir"]), node["profile"]["device"] == "cuda"
        self.folder = folder_of(self.run_dir, node_id, host)
        self.board = self.folder.parent / "board.json"
        self.log = self.run_dir / "logs" / f"{self.folder.name}.log"
        self.chosen = read(self.run_dir / "nodes" / "check.json").get("chosen") or []  # of a job with spare nodes
        self.leads = host == self.chosen[0] if self.chosen else node_id == 0
        self.attempt = f"{os.environ.get('TITAN_JOB_ID')}/"
        self.offset = self.sizes = self.number = 0
        self.answered = ""
        pauses = any(re.fullmatch(r"valid\w*\.enable=true", f"{k}={v}".lower()) for k, v in node["titan"].items())
        least_s = hang_s(os.environ)
        often = node["recipe"]["log_freq"], node["recipe"]["checkpoint_interval"]
        self.pace = Pace(time.monotonic(), node["recipe"]["steps"], least_s, least_s * STARTUP, pauses, *often)
        self.every_s = min(2.0, least_s / 5) or 2.0  # 0: hangs are not looked for
        self.saves = checkpoints.folder_of(node) if self.leads and node["recipe"]["checkpoint_interval"] else None
        self.saved = checkpoints.newest(self.saves) if self.saves else 0
        self.kernel: list[str] = []

    def run(self) -> None:
        try:
            if self.leads and self.pace.least_s:
                write(self.board, {"ask": "", "end": False})
        except OSError as error:
            self.give_up(error)
        self.kernel = kernel_lines() if self.on_gpu else []
        before = looked = saved = patience = time.monotonic()
        while os.getppid() == self.torchrun:
            time.sleep(self.every_s)
            now = time.monotonic()
            if self.saves and now - saved > SAVES_S:
                saved = now
                self.look_for_room(self.saves)
            if not self.pace.least_s:
                continue
            try:
                if now - before > 5 * self.every_s + 5:
                    self.pace.slept(now - before)
                self.read(now)
                if self.on_gpu and now - looked > 60:
                    looked = now
                    self.say_kernel()
                if self.leads and now > patience and self.pace.is_silent(now):
                    self.judge(now)
                    patience = time.monotonic() + self.pace.least_s
                board = read(self.board)
                asked = str(board.get("ask", ""))
                if asked.startswith(self.attempt) and board.get("end"):
                    return self.end()
                if asked.startswith(self.attempt) and asked != self.answered:
                    self.answer(asked)
            except Exception as error:  # a full disk, perhaps: the look at checkpoints must go on
                self.give_up(error)
            before = time.monotonic()

    def give_up(self, error: Exception) -> None:
        """Looks for hangs no more, and says so in one line: a traceback in the log would be taken for the run's."""
        print(f"{GIVES_UP}: {type(error).__name__}: {error}", flush=True)
        self.pace.least_s = 0.0

    def look_for_room(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # a file system that fails is the trainer's to tell
            if (step := checkpoints.newest(folder)) == self.saved:
                return
            size = sum(file.stat().st_size for file in (folder / f"step-{step}").iterdir())
            self.saved, free = step, checkpoints.free_bytes(folder)
            if free is not None and free < size:
                what = f"the next of {size / 1e9:.3g} GB does not fit: {free / 1e9:.3g} GB are free in {folder}"
                print(f"titan-checkpoint: warn step={step} why={json.dumps(what)}", flush=True)

    def logs(self) -> list[Path]:
        return [self.log, *self.run_dir.glob(f"logs/ranks/*-{self.host}/*/attempt_*/*/std*.log")]

    def read(self, now: float) -> None:
        """What this node's logs have got since the last time: their sizes, and the steps in the first one."""
        sizes = sum(path.stat().st_size for path in self.logs() if path.exists())
        if sizes != self.sizes:
            self.sizes = sizes
            self.pace.saw(now)
        with contextlib.suppress(OSError), open(self.log, "rb") as stream:
            stream.seek(self.offset)
            block = stream.read(1 << 20)
            whole = block[: block.rfind(b"\n") + 1] or (block if len(block) == 1 << 20 else b"")
            self.offset += len(whole)
            for line in whole.splitlines():
                if step := _STEP.search(line):
                    self.pace.saw(now, int(step[1]))

    def judge(self, now: float) -> None:
        """Asks all nodes; ends the run if it hangs."""
        self.number += 1
        asked, silence_s = f"{self.attempt}{self.number}", now - self.pace.stepped
        write(self.board, {"ask": asked, "end": False})
        self.answer(asked)
        records = map(read, self.run_dir.glob("nodes/[0-9]*.json"))
        hosts = self.chosen or [one["host"] for one in records if "host" in one]
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + OTHERS_S
        while len(found) < self.node["job"]["nodes"] and time.monotonic() < deadline:
            time.sleep(0.5)
            found = [said for said in map(read, self.folder.parent.glob("*-*.json")) if said.get("ask") == asked]
        self.read(time.monotonic())
        if os.getppid() != self.torchrun or moves(found, self.pace.bound_s, silence_s, self.on_gpu):
            return
        culprit, at = name(found, hosts), ""
        why = f"no step came for {silence_s:.0f} s, and no rank can be blamed"
        if culprit:
            why = culprit.why(self.on_gpu)
            host = f"host={culprit.host} " if "SLURM_JOB_ID" in os.environ else ""  # else there is no other
            at = f"rank={culprit.rank} {host}gpu={culprit.local_rank} "
        verdict = {"schema": 1, "at": time.time(), "silence_s": round(silence_s), "step": self.pace.step, "why": why}
        verdict |= {"culprit": vars(culprit) if culprit else None, "nodes": found}
        write(self.run_dir / "nodes" / "hang.json", verdict)
        print(f"titan-hang: {at}why={json.dumps(why)}", flush=True)
        write(self.board, {"ask": asked, "end": True})
        time.sleep(2 * self.every_s)  # the others read it, and their ranks log their stacks

    def answer(self, asked: str) -> None:
        """This node's evidence, beside the other nodes'."""
        self.folder.mkdir(parents=True, exist_ok=True)
        says: dict[str, Any] = {"ask": asked, "host": self.host, "quiet_s": round(time.monotonic() - self.pace.moved)}
        pids = dict(sorted(ranks_of(self.torchrun)))
        before = {rank: process(pid)[1] for rank, (pid, _) in pids.items()}
        time.sleep(LOOK_S)
        cpu = {rank: (process(pid)[1] - before[rank]) / LOOK_S for rank, (pid, _) in pids.items()}
        states: dict[int, set[str]] = {rank: set() for rank in pids}
        first, last = (self.ask(f"{asked}.{turn}", pids, states) for turn in range(2))
        says["ranks"] = [
            {
                "rank": rank,
                "local_rank": local,
                "state": "/".join(sorted(states[rank])),
                "cpu": round(cpu[rank], 2),
                "kernel_wait": text(Path(f"/proc/{pid}/wchan")),
                "last": self.last_line(local),
                "groups": (groups := last.get(rank, {}).get("groups")),
                "moved": groups is not None and groups != first.get(rank, {}).get("groups", groups),
                "stack": last.get(rank, {}).get("stack", []),
            }
            for rank, (pid, local) in pids.items()
        ]
        says["reaches_head"] = reaches_head()
        if self.on_gpu:
            says["gpus"] = ask_smi()[0] if shutil.which("nvidia-smi") else []
            says |= {"kernel": self.say_kernel(), "ras": ras() if self.leads else ""}
        write(self.folder.with_suffix(".json"), says)
        self.answered = asked

    def ask(self, asked: str, pids: Mapping[int, tuple[int, int]], states: dict[int, set[str]]) -> dict[int, Any]:
        """What the ranks answer. Meanwhile their states are noted."""
        began = time.monotonic()
        told: dict[int, dict[str, Any]] = {}
        (self.folder / ASK).write_text(asked)
        for rank in pids:
            with contextlib.suppress(OSError):
                self.dump(rank).unlink(missing_ok=True)
                pipe = os.open(f"{os.environ.get(PIPES, '')}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, b"1")
                os.close(pipe)
        while (took := time.monotonic() - began) < LOOK_S or (
            len(told) < sum(one != {"T"} for one in states.values()) and took < ROUND_S
        ):
            time.sleep(0.25)
            for rank, (pid, _) in pids.items():
                states[rank].add(process(pid)[0])
                if rank not in told and (said := self.said(rank, asked)):
                    told[rank] = said
        return told

    def dump(self, rank: int) -> Path:
        return self.run_dir / "titan" / "comm_traces" / f"rank_{rank}"

    def said(self, rank: int, asked: str) -> dict[str, Any] | None:
        """A rank's answer: its own thread's on CPUs, the dump that torch writes on GPUs."""
        answer: dict[str, Any] = read(self.folder / f"{rank}.json")
        if answer.get("asked") == asked:
            return answer
        with contextlib.suppress(OSError, ValueError):
            return {"groups": read_dump(self.dump(rank))} if self.on_gpu else None
        return None

    def last_line(self, local_rank: int) -> str:
        files = [path for path in self.logs()[1:] if path.parent.name == str(local_rank)]
        latest = max(files, key=lambda path: path.stat().st_mtime, default=self.log)
        with contextlib.suppress(OSError, IndexError), open(latest, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4096))
            return stream.read().decode("utf-8", "replace").strip().splitlines()[-1][:300]
        return ""

    def say_kernel(self) -> list[str]:
        """The driver's new lines in the kernel's log, where it may be read: also into this node's log."""
        seen, self.kernel = self.kernel, kernel_lines()
        for line in (line for line in self.kernel if line not in seen):
            print(f"titan-kernel: {line}", flush=True)
        return self.kernel

    def end(self) -> None:
        """Ends this node's ranks, those that are stopped, too; on their way they log their stacks."""
        pids = [pid for _, (pid, _) in ranks_of(self.torchrun)]
        os.kill(self.torchrun, signal.SIGSTOP)  # what it would say of their ends is no cause
        for number, wait_s in ((signal.SIGABRT, LOOK_S), (signal.SIGKILL, 0)):
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            time.sleep(wait_s)
        os.kill(self.torchrun, signal.SIGKILL)


def ranks_of(torchrun: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(rank, (pid, local rank)) of torchrun's children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        if text(path).rpartition(")")[2].split()[1:2] == [str(torchrun)]:
            env = dict(item.partition("=")[::2] for item in text(path.parent / "environ").split("\0"))
            if "LOCAL_RANK" in env:
                yield int(env["RANK"]), (int(path.parent.name), int(env["LOCAL_RANK"]))


def process(pid: int) -> tuple[str, float]:
    """Its main thread's state, and the CPU seconds of all its threads; "X" where it is gone."""
    fields = text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["X", *"0" * 12]
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kernel_lines() -> list[str]:
    said, _ = run_bounded([["dmesg"]], 5)[0] if shutil.which("dmesg") else (None, "")
    return [line.strip()[:300] for line in (said or "").splitlines() if KERNEL.search(line)][-50:]


def reaches_head() -> bool | None:
    """Whether torchrun's meeting point on the first node can be reached; None where there is none to try."""
    port = int(os.environ.get("TITAN_HEAD_PORT") or 0)
    with contextlib.suppress(OSError):
        if port:
            socket.create_connection((os.environ["TITAN_HEAD_ADDR"], port), 5).close()
        return True if port else None
    return False


def ras() -> str:
    """What NCCL's RAS service says of the job (NCCL 2.24 and later); empty where there is none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", RAS_PORT), 3) as service:
        service.sendall(b"verbose status\n")
        service.settimeout(10)
        return service.makefile("rb").read(1 << 15).decode("utf-8", "replace")
    return ""


def text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def main(file: str, node_id: str, host: str, torchrun: str) -> None:
    try:
        Watch(json.loads(Path(file).read_text(encoding="utf-8")), int(node_id), host, int(torchrun)).run()
    except Exception as error:  # without a watcher the run still trains
        print(f"{GIVES_UP}: {type(error).__name__}: {error}", flush=True)
    for pipe in Path(tempfile.gettempdir()).glob(f"titan-{os.getuid()}-{torchrun}-*.pipe"):
        pipe.unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
