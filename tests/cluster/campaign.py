"""What the campaign of faults does with a run: starts it, breaks something at an exact moment, and judges what came.

The trainer is the real one on CPU ranks. A sitecustomize.py (orders.py) lets it wait at a step, so that a fault falls
where it is meant to on any machine; it changes no figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.logs.files import node_logs
from launcher.logs.steps import LogReader
from launcher.scheduler.parse import expand
from launcher.titan import checkpoints
from tests.cluster.daemons import in_network_of, processes, spawn, wait_for
from tests.cluster.slurm_cluster import Cluster, slurm_run, start_controller, start_node
from tests.conftest import ROOT

STEPS, EVERY = 12, 4  # a checkpoint after 4, 8 and 12
AT = 6  # the step after which most faults come: two steps are repeated
PATIENCE_S = 420.0  # for a start of the trainer; as long as this only where the machine does much else
SETTINGS = {
    "SlurmdTimeout": "15",
    "KillWait": "5",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "PartitionName": "urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP",
}
PROGRAM = """\
#!/bin/sh
# The Python of the tests, which obeys orders.
export FAULT_ORDERS="{directory}/orders/$(basename "${{1%/job/*}}")" PYTHONPATH="{directory}/site:$PYTHONPATH"
[ -e "$FAULT_ORDERS.sick.$SLURMD_NODENAME" ] && export TITAN_SCRATCH="{directory}/tiny"
exec {python} "$@"
"""


@dataclass(frozen=True)
class Case:
    """A fault and what is expected. `causes`: a word for each attempt that failed, alternatives divided by |."""

    fault: Callable[[Scene], None]
    causes: str = ""
    state: str = "COMPLETED"
    why_not: str = ""
    nodes: int = 1
    spares: int = 0
    options: tuple[str, ...] = ()
    orders: tuple[str, ...] = (f"{AT} hold",)
    repeats: int = EVERY  # at most
    leaves_out: bool = False  # what is in Scene.victims, and nothing else
    reaches: int = STEPS
    other_losses: bool = False  # the fault changes them
    always: bool = False  # part of `make test`
    what: str = ""  # for the table

    @property
    def words(self) -> tuple[str, ...]:
        """Of each attempt; "" is one that completed."""
        return (*self.causes.split(), *([""] if self.state == "COMPLETED" else []))


@dataclass(frozen=True)
class Seen:
    """What came of a run. `steps`: (step, loss) of each attempt, in the order they were logged."""

    state: str
    causes: tuple[str, ...]
    culprits: tuple[str, ...]
    why_not: str
    steps: tuple[tuple[tuple[int, float], ...], ...]
    seconds: float | None  # from the start of the first attempt to the end of the last, where that is known

    @property
    def kept(self) -> list[tuple[int, float]]:
        """The steps that count: of each attempt those before the next one's first."""
        found: list[tuple[int, float]] = []
        for attempt in self.steps:
            if attempt:
                found = [one for one in found if one[0] < attempt[0][0]] + list(attempt)
        return found

    @property
    def repeated(self) -> int:
        """The most steps that one attempt trained again."""
        logged = [attempt for attempt in self.steps if attempt]
        pairs = pairwise(logged)
        return max((before[-1][0] - after[0][0] + 1 for before, after in pairs), default=0)


@dataclass
class Scene:
    """A run on the cluster, and the hands that break it."""

    cluster: Cluster
    directory: Path
    run: str
    nodes: int
    victims: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / "runs" / self.run

    @property
    def orders(self) -> Path:
        return self.directory / "orders" / self.run

    @property
    def checkpoints(self) -> Path:
        return checkpoints.folder_of(json.loads((self.path / "job/node.json").read_text()))

    # --- the launcher and Slurm ---

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(ROOT), "SECRET_WORD": "hidden"}
        env["XDG_CONFIG_HOME"] = str(self.directory / "config" / self.run)  # bad nodes are remembered for it alone
        command = [sys.executable, "-m", "launcher", *arguments]
        done = slurm_run(self.cluster, command, cwd=self.directory, timeout=300, env=env)
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done

    def submit(self, *options: str) -> None:
        done = self.launch(
            *("submit", "--gpu", "cpu", "--runtime", "bare", "--python", str(self.directory / "python")),
            *("--recipe", "debug", "--gpus-per-node", "1", "--data", "sample", "--yes", "--name", self.run),
            *("--set", "profile.gres=", "--set", "debug.deterministic=true", "--set", "recipe.log_freq=1"),
            *("--set", "recipe.seq_len=64", "--set", "recipe.local_batch_size=1", "--nodes", str(self.nodes)),
            *("--steps", str(STEPS), *options),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def state(self) -> str:
        return str(json.loads(self.launch("status", self.run, "--json").stdout)["state"])

    def set_time_limit(self, near: bool) -> None:
        """To a minute or two from now, or to what was asked for."""
        hours, minutes, _ = (int(part) for part in self.of_job("RunTime").split(":"))
        limit = 60 * hours + minutes + 2 if near else 20
        self.slurm("scontrol", "update", f"JobId={self.job}", f"TimeLimit={limit}")

    def slurm(self, *command: str) -> str:
        done = slurm_run(self.cluster, command)
        return (done.stdout + done.stderr).strip()

    @property
    def job(self) -> str:
        return (self.path / "claim/job_id").read_text().strip()

    def of_job(self, name: str) -> str:
        words = self.slurm("scontrol", "-o", "show", "job", self.job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def hosts(self) -> list[str]:
        """The nodes that train, in the order of their ranks."""
        with contextlib.suppress(OSError, KeyError):
            return list(json.loads((self.path / "nodes/check.json").read_text())["chosen"])
        return list(expand(self.of_job("NodeList")))

    def other(self) -> str:
        """Of the nodes that train the last on which the job's script does not run; the only one where there is one."""
        first = self.of_job("BatchHost")
        return next((host for host in reversed(self.hosts()) if host != first), first)

    def lose(self, *hosts: str) -> None:
        self.victims += hosts
        for host in hosts:
            os.kill(self.namespaces(host), signal.SIGKILL)

    # --- moments ---

    def order(self, *lines: str) -> None:
        temporary = self.orders.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        temporary.replace(self.orders)

    def held(self, when: str | int = AT, count: int | None = None) -> None:
        """Until all ranks wait there, and the checkpoint before is whole. What is ordered next is up to the caller."""
        pattern = f"{self.run}.held.{when}.*"

        def waiting() -> bool:
            self.stop_if_over()
            return len(list(self.orders.parent.glob(pattern))) >= (self.nodes if count is None else count)

        wait_for(waiting, f"step {when} of {self.run}", PATIENCE_S)
        if isinstance(when, int) and when > EVERY:
            last = (when - 1) // EVERY * EVERY
            wait_for(lambda: last in checkpoints.look(self.checkpoints)[0], f"checkpoint {last}", PATIENCE_S)
        for mark in self.orders.parent.glob(pattern):
            mark.unlink()

    def release(self) -> None:
        self.order()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
        def met() -> bool:
            self.stop_if_over()
            return condition()

        wait_for(met, what, seconds)

    def said(self, words: str) -> bool:
        """Whether job.log has it."""
        return words in (self.path / "logs/job.log").read_text(errors="replace")

    def stop_if_over(self) -> None:
        assert not (self.path / "end.json").exists(), f"{self.run} has ended:\n{self.story()}"

    def finished(self) -> None:
        end = self.path / "end.json"
        wait_for(end.exists, f"the end of {self.run}", PATIENCE_S)

    def story(self) -> str:
        """What a person would look at first."""
        files = [*self.path.glob("attempts/*/logs/job.log"), self.path / "logs/job.log"]
        files += [*self.path.glob("attempts/*/attempt.json"), self.path / "attempt.json"]
        files += sorted(self.path.glob("logs/0*.log"))
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.exists())

    # --- processes ---

    def processes(self, kind: str, host: str = "") -> list[int]:
        """Of this run: "rank", "torchrun", "node.py" or "any", on a node or on all of them."""
        found = []
        for pid, command, variables in processes():
            if f"FAULT_ORDERS={self.orders}" not in variables or (host and f"SLURMD_NODENAME={host}" not in variables):
                continue
            is_rank = any(one.startswith("LOCAL_RANK=") for one in variables)
            is_torchrun, is_node = "torch.distributed.run\0" in command, "/job/node.py\0" in command
            runs = "rank" if is_rank else "torchrun" if is_torchrun else "node.py" if is_node else ""
            if kind in (runs, "any"):
                found.append(pid)
        return sorted(found)

    def kill(self, kind: str, host: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.processes(kind, host)[0], number)

    def batch_script(self) -> int:
        """Its process on the first node, of which there are copies."""
        words = f"{self.cluster.directory}/spool/", f"job{int(self.job):05d}/slurm_script"
        return min(pid for pid, command, _ in processes() if all(word in command for word in words))

    def namespaces(self, host: str) -> int:
        """The process whose end is that of the node."""
        return self._recorded(f"/node.sh\0{host}\0")

    def _recorded(self, words: str) -> int:
        assert self.cluster.record
        for pid, _ in reversed(json.loads(self.cluster.record.read_text())["processes"]):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_text():
                    return int(pid)
        raise LookupError(words)

    def inside(self, host: str) -> int:
        """Process 1 of a node."""
        pid = self.namespaces(host)
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def kill_slurmd(self, host: str) -> None:
        """The node lives on, with what runs on it."""
        (self.cluster.directory / f"run/{host}.alone").touch()
        name = f"slurmd\0-D\0-N\0{host}\0-f\0{self.cluster.slurm_conf}"
        for pid, command, _ in processes():
            if command.startswith(name):
                os.kill(pid, signal.SIGKILL)

    def start_slurmd(self, host: str) -> None:
        assert self.cluster.record
        root = ("chroot", str(self.cluster.root)) if self.cluster.root else ()
        enter = ("nsenter", f"--target={self.inside(host)}", "--net", "--pid", "--mount", "--uts", *root)
        log = self.cluster.directory / f"log/{host}.out"
        spawn(self.cluster.record, log, *enter, "slurmd", "-D", "-N", host, "-f", str(self.cluster.slurm_conf))

    def stop_controller(self) -> None:
        os.kill(self._recorded("/head.sh\0"), signal.SIGKILL)

    def start_controller(self) -> None:
        start_controller(self.cluster)
        wait_for(lambda: "is UP" in self.slurm("scontrol", "ping"), "slurmctld", 60)

    def cut(self, host: str) -> None:
        """Its cable."""
        self.victims.append(host)
        in_network_of(self.namespaces(host), "ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """All cables that were cut."""
        for host in self.cluster.nodes:
            with contextlib.suppress(LookupError):
                in_network_of(self.namespaces(host), "ip", "link", "set", "eth0", "up")

    # --- afterwards ---

    def mend(self) -> None:
        """The cluster as it was, with nothing of this run on it."""
        self.plug_in()
        self.slurm("scancel", "--user", "root")
        lines = (self.cluster.directory / "hosts").read_text().splitlines()
        addresses = {name: address for address, name in map(str.split, lines)}
        for host in self.cluster.nodes:
            alone = self.cluster.directory / f"run/{host}.alone"
            with contextlib.suppress(LookupError):
                pid = self.namespaces(host)
                if not alone.exists():
                    self.slurm("scontrol", "update", f"NodeName={host}", "State=RESUME")
                    continue
                os.kill(pid, signal.SIGKILL)
                wait_for(partial(_is_gone, pid), f"the end of {host}")
            alone.unlink(missing_ok=True)
            start_node(self.cluster, host, self._recorded("/bridge.out\0"), addresses[host])
        for folder in (self.path / "titan", self.directory / "config", *(self.directory / "small").iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.unlink(missing_ok=True) if folder.is_file() else None
        wait_for(self._all_idle, "four idle nodes", 120)

    def _all_idle(self) -> bool:
        states = self.slurm("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").splitlines()
        time.sleep(0.5)
        return states == [f"{host} idle" for host in self.cluster.nodes]

    def seen(self) -> Seen:
        folders = [*sorted(self.path.glob("attempts/[0-9]*"), key=lambda path: int(path.name)), self.path]
        records = [_json(folder / "attempt.json") for folder in folders]
        state = self.state()
        for record in records[: -1 if state == "COMPLETED" else None]:
            record.setdefault("cause", "?")
        ends = [value for folder in folders if (value := _json(folder / "end.json"))]
        began = records[0].get("began_at") or _json(folders[0] / "end.json").get("began_at")
        return Seen(
            state,
            tuple(str(one.get("cause", "")) for one in records),
            tuple(dict.fromkeys(host for one in records for host in one.get("culprits", []))),
            str(records[-1].get("why_not", "")),
            tuple(tuple(_steps(folder / "logs")) for folder in folders),
            ends[-1]["ended_at"] - began if ends and began else None,
        )


def _is_gone(pid: int) -> bool:
    """Or waits to be collected."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except OSError:
        return {}


def _steps(logs: Path) -> Iterator[tuple[int, float]]:
    """Each step once; all nodes log the same."""
    found: dict[int, float] = {}
    for log in node_logs(logs).values():
        for record in LogReader(log).read():
            assert found.setdefault(record.step, record.loss) == record.loss, f"nodes differ at step {record.step}"
    yield from sorted(found.items())


def judge(case: Case, scene: Scene, seen: Seen, whole: Seen) -> list[str]:
    """What is not as expected; empty where all is."""
    wrong = []
    if seen.state != case.state:
        wrong.append(f"state {seen.state}, not {case.state}")
    alike = [cause in wanted.split("|") for cause, wanted in zip(seen.causes, case.words, strict=False)]
    if len(seen.causes) != len(case.words) or not all(alike):
        wrong.append(f"causes {seen.causes}, not {case.words}")
    if seen.why_not != case.why_not:
        wrong.append(f"why_not {seen.why_not!r}, not {case.why_not!r}")
    if sorted(seen.culprits) != sorted(scene.victims if case.leaves_out else []):
        wrong.append(f"left out {seen.culprits}; broken were {scene.victims}")
    if seen.repeated > case.repeats:
        wrong.append(f"{seen.repeated} steps repeated, not at most {case.repeats}")
    numbers = [step for step, _ in seen.kept]
    if numbers != list(range(1, len(numbers) + 1)):
        wrong.append(f"steps that count: {numbers}")
    if (numbers[-1] if numbers else 0) < case.reaches:
        wrong.append(f"step {numbers[-1:]} reached, not {case.reaches}")
    losses = dict(whole.kept)
    if not case.other_losses and (other := [step for step, loss in seen.kept if losses[step] != loss]):
        wrong.append(f"another loss at steps {other}")
    return wrong + _left_behind(scene, seen)


def _left_behind(scene: Scene, seen: Seen) -> list[str]:
    """What must be gone, and what the launcher says of the run."""
    wrong = []
    if (scene.path / "secret.env").exists():
        wrong.append("secret.env is still there")
    if listed := scene.slurm("squeue", "-h", "-n", scene.run, "-t", "PD,R,CF", "-o", "%i %T"):
        wrong.append(f"still in the queue: {listed}")
    try:
        scene.plug_in()  # Slurm ends what runs on a node once it reaches it
        wait_for(lambda: not scene.processes("any"), "the end of all processes", 120)
    except TimeoutError:
        wrong.append(f"processes {scene.processes('any')} still run")
    scene.launch("status", scene.run)
    result = json.loads(scene.launch("results", scene.run, "--json").stdout)
    numbers = [step for step, _ in seen.kept]
    if numbers and result["step"] != numbers[-1]:
        wrong.append(f"results say step {result['step']}, not {numbers[-1]}")
    if len(result["attempts"]) != len(seen.causes):
        wrong.append(f"results say {len(result['attempts'])} attempts")
    return wrong


def note(name: str, case: Case, seen: Seen, whole: Seen, wrong: list[str]) -> None:
    """The case's row of the table that ends the page LAUNCHER_TEST_FAULTS_TABLE names."""
    if not (table := os.environ.get("LAUNCHER_TEST_FAULTS_TABLE")):
        return
    page = Path(table)
    expected = _words(case.state, case.words, case.why_not)
    came = f"**{'; '.join(wrong)}**" if wrong else _words(seen.state, seen.causes, seen.why_not)
    lost = "?" if seen.seconds is None else f"{max(0.0, seen.seconds - (whole.seconds or 0)):.0f}"
    numbers = f"{len(seen.causes)} | {max(0, seen.repeated)} | {lost}"
    row = f"| {name} | {case.what} | {expected} | {came} | {numbers} |"
    lines = page.read_text().splitlines() if page.exists() else [*HEAD]
    places = [place for place, line in enumerate(lines) if line.startswith(f"| {name} |")]
    lines[places[0] if places else len(lines) : places[0] + 1 if places else len(lines)] = [row]
    page.write_text("\n".join(lines) + "\n")


HEAD = (
    "| case | fault | expected | seen | attempts | steps repeated | seconds lost |",
    "|---|---|---|---|---:|---:|---:|",
)


def _words(state: str, causes: Sequence[str], why_not: str) -> str:
    """`COMPLETED after killed`, `FAILED (no-progress) after killed, killed, killed`."""
    named = ", ".join(cause.strip("|").replace("|", " or ").replace("?", "no word") for cause in causes if cause)
    return state + (f" ({why_not})" if why_not else "") + (f" after {named}" if named else "")
