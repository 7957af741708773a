"""What failed runs have printed is explained: who is to blame, and what is no cause."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.logs import first_error, known_errors, steps
from launcher.logs.known_errors import Ended, Failure, Known, explain, how_it_ended
from tests.conftest import ROOT

FAILED = Ended("FAILED", exit=1)
STEP = (
    "[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - step:  5  loss:  5.53478  grad_norm:  2.5933  "
    "memory:  0.70GiB(2.98%)  tps: 137  tflops: 0.01  mfu: 0.00%\n"
)
# A rank's traceback as torchrun and torch's excepthook print it.
RANK = """\
[rank0]:[rank2]: Traceback (most recent call last):
[rank0]:[rank2]:   File "/opt/train.py", line 9, in <module>
[rank0]:[rank2]:     main()
"""
# What Pyxis prints around enroot's own words (NVIDIA/pyxis issues 101, 122).
PYXIS = """\
slurmstepd: error: pyxis: container start failed with error code: 1
slurmstepd: error: pyxis: printing enroot log file:
%sslurmstepd: error: pyxis: couldn't start container
slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1
slurmstepd: error: Failed to invoke spank plugin stack
"""
ERRORS_PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KNOWN = known_errors.known_errors()


def example(code: str) -> str:
    return next(known.example[0] for known in KNOWN if known.code == code) + "\n"


def failure(folder: Path, ended: Ended = FAILED, **logs: str) -> Failure:
    """What is said of a run with these logs: `job`, `node0`, ..., and `rank1`, ...: a rank's own on that node."""
    for name, text in logs.items():
        node = f"000{name[-1]}-gpu00{name[-1]}"
        file = f"ranks/{node}/12_ab/attempt_0/1/stderr.log" if name.startswith("rank") else f"{node}.log"
        path = folder / ("job.log" if name == "job" else file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return explain(folder, ended, "my-run", folder.parent / "my run")


MY_BUG = RANK + "[rank0]:[rank2]: ValueError: my own bug, at 2026-11-22 14:50:52,000\n"
VICTIM = (
    "[rank0]:[titan] 2026-11-22 14:50:40,000 - root - INFO - Training starts at step 1\n" + RANK
) + "[rank0]:[rank2]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18345.\n"
OUT_OF_MEMORY = RANK + "[rank0]:[rank2]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
GOODBYE = example("rendezvous-gone")
TORCHRUN = example("killed").replace("-9", "1")
SRUN = "srun: error: gpu001: task 0: Exited with exit code 1\n"
REPORT = """\
E1122 14:50:52.956000 5552 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) \
local_rank: 1 (pid: 5686) of binary: python3
Traceback (most recent call last):
  File "/usr/local/bin/torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
torchtitan.train FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_14:50:{second}
  host      : {host}
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 5686)
  error_file: <N/A>
============================================================
"""
WATCHDOG = (
    "[rank{rank}]:[E101 00:{time} ProcessGroupNCCL.cpp:683] [Rank {rank}] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=482, OpType=_ALLGATHER_BASE, NumelIn=1, Timeout(ms)={wait}) ran for {wait} ms\n"
)
NCCL = "[rank0]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:317, %s, NCCL version 2.21.5\n"


def report(code: int, rank: int = 9, host: str = "gpu001", second: int = 52) -> str:
    return REPORT.format(code=code, rank=rank, host=host, second=second)


@pytest.mark.parametrize("log", ["job", "node0"])
@pytest.mark.parametrize(
    ("known", "text"),
    [pytest.param(known, text, id=f"{known.code}-{i}") for known in KNOWN for i, text in enumerate(known.example)],
)
def test_each_example_is_explained_by_its_own_entry(tmp_path: Path, known: Known, text: str, log: str) -> None:
    lines = text.splitlines()
    ended = replace(FAILED, **known.ended[0]) if known.ended else FAILED
    printed = "".join(f"{line}\n" for line in lines)
    if re.match(r"(\w+\.)+\w+|\w+Error", printed):
        printed = RANK + re.sub("^", "[rank0]:[rank2]: ", printed.rstrip(), flags=re.MULTILINE) + "\n"
    elif printed.startswith("slurmstepd: error: pyxis:     "):
        printed = PYXIS % printed
    other = STEP + VICTIM if known.where == known_errors.PRINTED else STEP  # nobody else is to blame
    found = failure(tmp_path, ended, node9=other, **{log: printed})
    assert found.code == known.code
    assert found.cause and found.fix and "{" not in found.cause + found.fix
    if any(re.search(known.pattern, line) for line in lines):
        assert any(re.search(known.pattern, line) for line in found.lines), found.lines
        assert found.path is not None and found.path.name == {"job": "job.log", "node0": "0000-gpu000.log"}[log]


@pytest.mark.parametrize(
    ("known", "end"), [pytest.param(known, end, id=f"{known.code}-{end}") for known in KNOWN for end in known.ended]
)
def test_how_the_job_ended_is_explained(tmp_path: Path, known: Known, end: dict[str, Any]) -> None:
    found = failure(tmp_path, replace(FAILED, **end), **({"node0": STEP} if end.get("logged", True) else {}))
    assert found.code == known.code


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_each_entry_is_sound(known: Known) -> None:
    """That it has all keys and no others, the table's reader has seen to."""
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", known.code)
    assert [other.code for other in KNOWN].count(known.code) == 1
    assert f"of {known.family}," in ERRORS_PAGE, "a family is a section of the page"
    assert known.where in (known_errors.RAISED, known_errors.PRINTED, known_errors.VICTIM)
    assert known.example if known.pattern else known.ended
    assert not known.ended or known.where in (known_errors.PRINTED, known_errors.VICTIM)
    assert all(case.keys() <= {"pattern", "cause", "fix"} for case in known.cases)
    names = {*re.compile(known.pattern).groupindex, "node"}
    for case in ({"cause": known.cause, "fix": known.fix}, *known.cases):
        names |= re.compile(case.get("pattern", "")).groupindex.keys()
        for key, more in (("cause", {"who"}), ("fix", {"run", "again", "run_dir", "smaller"})):
            assert {name for _, name, _, _ in Formatter().parse(case.get(key, "")) if name is not None} <= names | more
    if (
        known.where == known_errors.PRINTED and known.pattern
    ):  # lines are looked at that hold one of these: for speed no short ones
        assert all(len(text) >= 8 for text in first_error.fixed_texts(known.pattern))
        assert "(?i" not in known.pattern


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"one|two \(a|b\)", ["one", "two (a", "b)"]),
        (r"x (?:a|b) longer[st]?|^no.*thing$", [" longer", "thing"]),
        (r"colou?r|ab{0,2}c|\d+\s[|(]*", ["colo", "a", ""]),
    ],
)
def test_what_stands_in_all_matches_of_a_pattern(pattern: str, texts: list[str]) -> None:
    assert list(first_error.fixed_texts(pattern)) == texts


# --- who is to blame ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A failed run's logs, and what is said of it. Without a code, neither a cause nor a command is made up."""

    logs: dict[str, str]
    code: str = ""
    first: str = ""  # in the first line that is shown
    last: str = ""  # in the last one
    cause: str = ""
    fix: str = ""
    log: str = ""  # whose lines are shown
    absent: str = ""  # from lines and command
    rank: int | None = None
    ended: Ended = FAILED


def of_rank(text: str, label: str = "[rank0]:") -> str:
    """As a rank's lines stand in its node's log; behind the label of an empty line no blank is left."""
    return re.sub("^", label, text.rstrip("\n"), flags=re.MULTILINE) + "\n"


@cache
def printed_by(program: str) -> str:
    """What Python prints of an exception, with the labels that a rank's lines have."""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr
    return STEP + of_rank(said, "[rank0]:[rank3]: ")


def in_container(said: str, before: str = "") -> str:
    return PYXIS % f"{before}slurmstepd: error: pyxis:     {said}\n"


def timeout(wait: int, option: str) -> Case:
    closed = "[rank0]:[E101 00:06:01.5 TCPStore.cpp:1] error: Connection closed by peer [10.0.0.1]:18345.\n"
    late = WATCHDOG.format(rank=0, time="07:01.0", wait=wait).replace("SeqNum=482", "SeqNum=500")
    logs = {"node0": closed, "node1": closed, "node2": STEP + late}
    logs["rank1"] = WATCHDOG.format(rank=9, time="06:01.0", wait=wait)
    return Case(logs, "nccl-timeout", cause="(_ALLGATHER_BASE, number 482)", fix=option)


def misused(said: str) -> str:
    return RANK + of_rank((NCCL % "x").partition(": ")[2] + said, "[rank0]:[rank2]: ")


def of_srun(said: str, code: str, before: str = "", ended: Ended = FAILED) -> Case:
    job = f"{before}srun: error: {said}\nsrun: error: Timed out waiting for job step to complete\n"
    return Case({"node0": STEP, "job": job}, code, said, cause="n7", fix="--exclude n7", ended=ended)


def of_enroot(said: str, code: str, cause: str) -> Case:
    return Case({"node1": in_container(said, CHATTER), "job": SRUN}, code, cause=cause)


FULL, FULL_X = (
    "cp: error writing '/scratch/x': No space left on device",
    "OSError: [Errno 28] No space left on device: '/x'",
)
FUSE = "fuse: failed to open /dev/fuse: Permission denied\n"
DISK = RANK + of_rank(FULL_X, "[rank0]:[rank2]: ")
LATE_MEMORY = OUT_OF_MEMORY + "  time      : 2026-11-22_14:51:52\n"
EARLY = MY_BUG.replace("my own bug", "BuilderConfig 'en' not found. Available: ['default']")
WARNED = "W1122 14:00:00.000000 1 hub.py:1] 429 Too Many Requests. Retrying in 1 s. No space left on device\n"
COMPLETED = STEP.replace("step:  5", "Training completed")
GOES_ON = STEP.replace("step:  5", "step:  6") + STEP.replace("step:  5", "step:  7")
ECC = "Traceback (most recent call last):\ntorch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n"
UNFIT = r'titan-node: FAIL node=0 host=gpu001 why="3 \"GPUs\" of 4" fix="launcher submit --exclude gpu001"' + "\n"
USED_WRONGLY = misused("ncclInvalidUsage: bad.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0\n")
INTERNAL = misused("ncclInternalError: bad.\nLast error:\nNo path : rank 1 and rank 0\n").replace(
    "x,", "internal error,"
)
NO_HELPER = "/data/bin/prepare: line 3: /data/bin/tool: cannot execute binary file: Exec format error\n"
BAD_HELPER = MY_BUG.replace("ValueError: my own bug", "OSError: [Errno 8] Exec format error: '/data/bin/ptxas'")
QUOTED = MY_BUG.replace("main()", 'advise("CUDA out of memory")').replace("/opt", "/No space left on device")
CRASH = 'Fatal Python error: Segmentation fault\n\nCurrent thread 0x7f (most recent call first):\n  File "x.py" in f\n'
THROWN = "terminate called after throwing an instance of 'c10::DistBackendError'\n"
TORN = 'Traceback (most recent call last):\n  File "/x/torchrun", line 8\n    main()\nKeyboardInterrupt\n'
SIGNAL = RANK + "[rank0]:[rank2]: RuntimeError: DataLoader worker (pid 7) is killed by signal: Terminated. \n"
NODE_FAILED = (
    "slurmstepd: error: *** STEP 5.0 ON n0 CANCELLED AT 2026-11-22T14:50:52 DUE TO NODE FAILURE, SEE LOG ***\n"
)
CHATTER = "".join(f"slurmstepd: error: pyxis:     chatter of a hook, line {number}\n" for number in range(99))
SURVIVABLE = "no key of config.json, 429 Too Many Requests, trying again\n"
BOGUS = "Unrecognized options"
BROKEN = "a GPU of node gpu003, or its link, is broken"
NO_SHELL = "enroot-switchroot: failed to execute: /bin/sh: No such file or directory"
OWN = "ValueError: my own bug"
TIMEOUT = example("nccl-timeout")
LATE_REPORT = report(1, 3, "gpu000", 58)
TOOL = "slurmstepd: error: pyxis:     nvidia-container-cli: error\n"
BY_SIGINT, BY_SIGTERM = Ended("FAILED", exit=130), Ended("FAILED", exit=143)
ENROOT = {
    "no image": ("[ERROR] Invalid argument: /x.sqsh", "image-invalid", "/x.sqsh is missing on node gpu001"),
    "a hook": ("[ERROR] /etc/enroot/hooks.d/10-x.sh exited with return code 1", "enroot-hook", "10-x.sh failed on"),
    "a container's error": ("[ERROR] A thing", "container-not-started", "node gpu001: A thing"),
    "a mount": ("enroot-mount: failed to mount: /d at /r/d: Not permitted", "enroot-mount", "/d on node gpu001: N"),
    "no directory": ("mkdir: cannot create directory '/run/u': No", "enroot-directory", "/run/u on node gpu001: No"),
    "nothing of note": ("[INFO] nothing", "container-not-started", "only slurmd.log on that node says why"),
}
CASES = {
    "the rank that failed, not its victims": Case(
        {"node0": STEP + VICTIM + TORCHRUN, "node1": OUT_OF_MEMORY, "node2": GOODBYE, "node3": TIMEOUT, "job": SRUN},
        *("gpu-memory", "torch.OutOfMemoryError"),
        log="0001-gpu001.log",
    ),
    "the earlier of two": Case({"node0": LATE_MEMORY, "node1": EARLY}, "builder-config"),
    "the first of a log": Case({"node0": f"ValueError: one\nKeyError: two\n{OUT_OF_MEMORY}"}, "", "ValueError: one"),
    # Known texts all around it: a warning that was survived, victims, the ends that torchrun and srun tell.
    "one that is not known": Case(
        {"node0": VICTIM + GOODBYE, "node1": WARNED + MY_BUG + TORCHRUN, "node2": VICTIM, "job": SRUN}, "", OWN
    ),
    "a library for another architecture": Case({"node0": BAD_HELPER}, "", "Exec format error"),
    "a helper for another architecture": Case({"node0": NO_HELPER + STEP, "job": SRUN}),
    "what a rank may survive": Case({"node0": STEP + SURVIVABLE + STEP, "job": SRUN}, "", SRUN.strip()),
    "the more telling line": Case(
        {"node0": STEP + FUSE, "node1": f"{STEP}{FULL}\nafter it\n{STEP}", "job": SRUN}, "disk-full", FULL, "after it"
    ),
    "the less telling line": Case({"node0": FUSE, "node1": STEP, "job": SRUN}, "dev-fuse"),
    "the code that failed is not what it said": Case({"node0": QUOTED}, "", OWN),
    "a lost peer, where that is all": Case({"node0": VICTIM, "node1": GOODBYE, "job": SRUN}, "peer-gone"),
    "a lost peer and a kill": Case({"node0": VICTIM, "node1": example("killed"), "job": SRUN}, "killed"),
    "a closed rendezvous, alone": Case({"node0": GOODBYE, "node1": "all is well\n"}, "rendezvous-gone"),
    "srun before a closed rendezvous": Case({"node0": GOODBYE, "job": SRUN}, "", SRUN.strip()),
    "NCCL before srun": Case({"node0": NCCL % "unhandled system error", "job": SRUN}, "nccl-system", "NCCL error in"),
    "a rank's own log": Case(
        {"node0": VICTIM, "rank3": ECC}, "gpu-broken", "", "", BROKEN, "--exclude gpu003;", "stderr.log"
    ),
    "a setting": Case(
        {"node0": f"╭── {BOGUS} ─╮\n│ {BOGUS}: --a.b=1   │\n"}, "unknown-setting", cause=f": {BOGUS}: --a.b=1"
    ),
    "the check speaks for itself": Case(
        {"node0": UNFIT}, "node-unfit", cause='not fit to train: 3 "GPUs" of 4', fix="launcher submit --exclude gpu001"
    ),
    "NCCL's last error": Case(
        {"node0": VICTIM, "node1": USED_WRONGLY}, "nccl-misuse", cause="invalid way: Duplicate GPU"
    ),
    "NCCL's own check": Case(
        {"node0": GOODBYE, "node1": INTERNAL}, "nccl-internal", cause="an internal check of NCCL failed: No path : rank"
    ),
    "NCCL lost its peer": Case({"node0": STEP + NCCL % "remote process exited" + THROWN}, "nccl-peer-gone"),
    "a timeout at the start": timeout(300000, "comm.init_timeout_seconds="),
    "a timeout later": timeout(100000, "comm.train_timeout_seconds="),
    "no credential": of_srun(
        "Task launch for StepId=1.0 failed on node n7: Invalid job credential", "step-not-started"
    ),
    "no address": of_srun("fwd_tree_thread: can't find address for host n7, check slurm.conf", "step-not-started"),
    "not ready": of_srun("Nodes n7 are still not ready", "node-not-booted"),
    "node failed": of_srun("Node failure on n7", "node-failure", NODE_FAILED, Ended("NODE_FAIL", exit=1)),
    "nodes failed": Case(
        *({"job": "srun: error: Node failure on n[7-8]\n"}, "node-failure"),
        *("", "", "node n[7-8] failed", "--exclude 'n[7-8]'"),
        ended=Ended("NODE_FAIL", exit=1),
    ),
    "the lines of one rank": Case({"node0": STEP + of_rank(CRASH)}, "crashed", last='File "x.py" in f'),
    "torchrun saw it first": Case({"node0": VICTIM + LATE_REPORT, "node1": MY_BUG + report(1)}, "", OWN, rank=9),
    "torchrun saw it alone": Case({"node0": report(1), "node1": LATE_REPORT}, "", "(exitcode: 1)", rank=9),
    "interrupted in torchrun": Case({"node0": STEP, "job": TORN}, "interrupted", absent="File", ended=BY_SIGINT),
    "interrupted, with victims": Case({"job": "KeyboardInterrupt\n" + VICTIM}, "interrupted", ended=BY_SIGINT),
    "interrupted, silent": Case({"node0": STEP}, "interrupted", ended=BY_SIGINT),
    "terminated": Case({"node0": STEP}, "terminated", ended=BY_SIGTERM),
    "terminated, srun says": Case({"job": "srun: error: gpu1: task 0: Terminated\n"}, "terminated", ended=BY_SIGTERM),
    "not terminated": Case({"job": SRUN.replace("code 1", "code 42")}, ended=BY_SIGTERM),
    "a worker terminated": Case({"node0": STEP, "job": SIGNAL}, "terminated", absent="File"),
    **{name: of_enroot(*case) for name, case in ENROOT.items()},
    "an error behind chatter": Case(
        {"node1": in_container("[ERROR] at last", TOOL + CHATTER)}, "container-cli", last="[ERROR] at last"
    ),
    "an image without a shell": Case({"node0": in_container(NO_SHELL)}, "command-missing", absent="--python"),
    "a node's full disk": Case({"node3": f"{FULL}\n", "job": SRUN}, "disk-full", fix="-w gpu003 df -h /scratch"),
    "a full disk": Case({"job": FULL_X + "\n"}, "disk-full", fix="srun -N1 df -h"),
    "another rank's": Case(
        {"node0": printed_by("raise ValueError('1')") + OUT_OF_MEMORY}, "", "ValueError: 1", "<module>"
    ),
    **{
        f"no last words after {code}": Case(
            {"rank1": "loading\n", "node1": STEP + report(code)}, name, absent="loading"
        )
        for code, name in ((-2, ""), (-15, "terminated"), (143, ""))
    },
    "last words of a lost peer": Case({"rank1": of_rank(VICTIM, "") + "bye\n", "node1": STEP + report(1)}, "peer-gone"),
    "known before last words": Case({"rank1": "giving up\n", "node1": f"{FULL}\n{STEP}{report(1)}"}, "disk-full"),
    "training goes on": Case({"node0": DISK + GOES_ON + MY_BUG}, "", OWN),
    "training goes on to its end": Case({"node0": DISK + STEP + COMPLETED + MY_BUG}, "", OWN),
    "training goes on, srun fails": Case({"node0": DISK + GOES_ON, "job": SRUN}, "", SRUN.strip(), SRUN.strip()),
    "the step of a rank that was ahead": Case({"node0": DISK + STEP + MY_BUG}, "disk-full"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_to_blame(case: Case, tmp_path: Path) -> None:
    found = failure(tmp_path, case.ended, **case.logs)
    shown = found.lines or [""]
    assert found.code == case.code and (found.code or found.is_error), found
    assert case.first in shown[0] and case.last in shown[-1], shown
    assert case.cause in found.cause and case.fix in found.fix and bool(found.cause and found.fix) is bool(case.code)
    assert not case.log or (found.path is not None and found.path.name == case.log)
    assert not case.absent or case.absent not in "\n".join([*shown, found.fix])
    assert case.rank is None or (found.rank is not None and found.rank.rank == case.rank)


def test_the_last_frame_comes_with_the_error(tmp_path: Path) -> None:
    assert failure(tmp_path, node0=OUT_OF_MEMORY).lines == [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        'File "/opt/train.py", line 9, in <module>',
        "main()",
    ]


def test_what_a_log_says_cannot_add_to_a_command(tmp_path: Path) -> None:
    line = "slurmstepd: error: pyxis: --container-mounts: source path does not exist: /d; rm -rf ~ {run}\n"
    found = failure(tmp_path, job=line)
    assert found.cause == "the node has no /d; rm -rf ~ {run} to mount into the container"
    assert shlex.split(found.fix)[:4] == ["srun", "-N1", "ls", "-ld"]
    assert shlex.split(found.fix)[4] == "/d; rm -rf ~ {run};"


def test_a_node_is_named_only_where_its_log_says_why(tmp_path: Path) -> None:
    killed = Ended("FAILED", exit=137)
    assert failure(tmp_path, killed, node0=STEP, node1=STEP).fix.startswith("srun -N1 dmesg ")
    found = failure(tmp_path, killed, node1=STEP + example("killed"))
    assert found.cause.startswith("local rank 1 on node gpu001 was killed by SIGKILL")
    assert found.fix.startswith("srun -N1 -w gpu001 dmesg ")
    here = explain(tmp_path, killed, "my-run", tmp_path, is_local=True)
    assert here.fix.startswith("dmesg ")


def test_a_time_without_a_year_is_near_the_others(tmp_path: Path) -> None:
    near = steps.line_time(b"2026-12-31 23:59:00,000")
    for text, date in (
        (b"[E101 00:06:01.5 x", b"2027-01-01 00:06:01.5"),
        (b"E1231 23:58:00.5", b"2026-12-31 23:58:00.5"),
    ):
        assert steps.line_time(text, near) == steps.line_time(date)
    assert steps.line_time(b"[E230 00:06:01.5 x", near) is None


@pytest.mark.parametrize(
    ("code", "name"),
    [(-11, "SIGSEGV"), (-7, "SIGBUS"), (-4, "SIGILL"), (-8, "SIGFPE"), (-6, "SIGABRT"), (-9, "SIGKILL")],
)
def test_a_rank_that_a_signal_killed_is_named_with_its_host(tmp_path: Path, code: int, name: str) -> None:
    found = failure(tmp_path, node0=VICTIM, node1=STEP + report(code), node2=report(1, 17, "gpu002", 55), job=SRUN)
    assert name in found.cause and ("rank 9 on gpu001" in found.cause or code == -9)
    assert f"exitcode: {code}" in found.lines[0]
    assert ("-w gpu001 df -h /dev/shm" in found.fix) == (code == -7)
    assert found.as_json()["rank"] == {"rank": 9, "host": "gpu001", "exit_code": code}
    assert f"first to fail: rank 9 on gpu001, with exit code {code}" in found.as_text()


def test_an_abort_after_the_last_step_is_said_to_be_one(tmp_path: Path) -> None:
    done = STEP.replace("step:  5", "Training completed")
    found = failure(tmp_path, node0=STEP + done + "terminate called without an active exception\n" + report(-6))
    assert (found.code, found.completed) == ("aborted", True)
    assert "training had already reached its last step" in found.as_text()


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "NODE_FAIL"])
@pytest.mark.parametrize("dated", [True, False])
def test_what_ranks_print_after_the_job_was_ended_is_no_cause(tmp_path: Path, state: str, dated: bool) -> None:
    ended = "slurmstepd: error: *** STEP 5.0 ON gpu000 CANCELLED AT 2026-11-22T14:50:30 ***\n"
    shot = "[rank0]:Fatal Python error: Bus error\nRuntimeError: DataLoader worker (pid 1) is killed by signal: Bus.\n"
    shot += "OSError: [Errno 28] No space left on device: '/x'\nsrun: error: gpu000: task 0: Segmentation fault\n"
    logs = {"node0": STEP + ended + shot} | ({"node1": STEP + MY_BUG + report(-7)} if dated else {})
    found = failure(tmp_path, Ended(state, exit=143), job=ended + shot, **logs)
    assert found.code in ("cancelled", "time-limit", "node-failure") and found.rank is None
    before = OUT_OF_MEMORY + "  time      : 2026-11-22_14:50:00\n"
    assert failure(tmp_path, Ended(state, exit=143), node2=before).code == "gpu-memory"


CHAINS = {
    "a cause": (
        "class HTTPStatusError(Exception): pass\nclass GatedRepoError(Exception): pass\n"
        "try:\n raise HTTPStatusError(\"Client error '403 Forbidden' for url\")\n"
        "except Exception as error:\n raise GatedRepoError('Cannot access gated repo for url x') from error",
        ("hub-gated", "GatedRepoError"),
    ),
    "another while it is handled": (
        "class OutOfMemoryError(Exception): pass\n"
        "try:\n {}['x']\nexcept KeyError:\n raise OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        ("gpu-memory", "OutOfMemoryError"),
    ),
    "three": (
        "try:\n try:\n  raise OSError(28, 'No space left on device', '/data/x')\n"
        " except OSError as error:\n  raise ValueError('cannot write') from error\n"
        "except ValueError as error:\n raise RuntimeError('checkpoint failed') from error",
        ("disk-full", "RuntimeError: checkpoint failed"),
    ),
    "an error that quotes another": (
        "class CheckpointException(Exception): pass\n"
        "raise CheckpointException('''ranks:dict_keys([0])\nTraceback (most recent call last): (RANK 0)\n"
        "  File \"x.py\", line 3, in save\n    write()\nOSError: [Errno 28] No space left on device: '/data/x'\n''')",
        ("disk-full", "CheckpointException"),
    ),
    "a worker's": (
        "raise OSError('''Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File \"x.py\", line 3, in read\n    read()\nOSError: [Errno 28] No space left on device: '/data/x'\n''')",
        ("disk-full", "OSError: Caught OSError in DataLoader worker"),
    ),
}


@pytest.mark.parametrize("how", CHAINS)
def test_of_errors_that_led_to_each_other_all_are_read_and_the_last_is_shown_first(how: str, tmp_path: Path) -> None:
    program, (code, first) = CHAINS[how]
    found = failure(tmp_path, node0=printed_by(program) + "[rank1]:[rank3]: KeyError: 'another rank'\n")
    assert found.code == code and first in found.lines[0], found.lines


ENDINGS = {
    "libgomp": (1, "\nlibgomp: Thread creation failed: Resource temporarily unavailable", "threads"),
    "OpenBLAS": (
        3,
        "OpenBLAS blas_thread_init: pthread_create failed for thread 9 of 64: Resource temporarily unavailable\n"
        "OpenBLAS blas_thread_init: RLIMIT_NPROC 512 current, 512 max\nOpenBLAS blas_thread_init: calling exit(3)",
        "threads",
    ),
    "an OpenBLAS that goes on": (
        -11,
        "OpenBLAS blas_thread_init: pthread_create failed for thread 9 of 64: Resource temporarily unavailable",
        "crashed",
    ),
    "the loader": (1, "python3: /lib/libc.so.6: version `GLIBC_2.38' not found (required by python3)", "c-library"),
    "argparse": (2, "usage: t.py [-h]\nt.py: error: argument --steps: invalid int value: 'x'", "unknown-setting"),
    "a library of the user's": (7, "[W1122 14:00:00.1 x.cpp:1] slow\nthe licence server\nsays no", ""),
    "glibc": (-6, "double free or corruption (!prev)", "aborted"),
}


@pytest.mark.parametrize("own_files", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("how", ENDINGS)
def test_what_a_rank_printed_last_is_why_it_ended(how: str, own_files: bool, tmp_path: Path) -> None:
    code, said, name = ENDINGS[how]
    rank, started = "[rank1]:", "a note\n" + STEP.removeprefix("[rank0]:")
    logs = {"node0": VICTIM, "node1": STEP + of_rank(started + ("" if own_files else said), rank) + report(code)}
    logs |= {"node2": report(1, 3, "gpu002", 58), "job": SRUN} | ({"rank1": f"{started}{said}\n"} if own_files else {})
    found = failure(tmp_path, FAILED, **logs)
    assert (found.code, found.is_error) == (name, True)
    last = ENDINGS[how][1].splitlines()[-1]
    assert last in found.lines and not any("note" in line or "slow" in line for line in found.lines), found.lines
    assert found.rank is not None and found.rank.rank == 9
    if how == "an OpenBLAS that goes on":
        assert "too few processes or threads" in found.cause


@cache
def survived(program: str) -> str:
    """A real survivor: Python's own words of an error after which it goes on."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert "Traceback" in done.stderr
    return of_rank(done.stderr)


SURVIVED = {
    "ignored": "class A:\n def __del__(self): raise ValueError('x')\nA()",
    "ignored, with a cause": "class A:\n def __del__(self):\n  try: {}['x']\n"
    "  except KeyError: raise ValueError('x')\nA()",
    "logging": "import logging\nlogging.warning('%d', 'x')",
    "warned": "import traceback, warnings\ntry: {}['x']\n"
    "except KeyError: warnings.warn('it failed, and we go on:\\n' + traceback.format_exc())",
    "warned, in one line": "import traceback, warnings\ntry: {}['x']\n"
    "except KeyError: warnings.warn(traceback.format_exc())",
}


@pytest.mark.parametrize("end", [MY_BUG, "[rank0]:terminate called without an active exception\n", TORCHRUN])
@pytest.mark.parametrize("how", SURVIVED)
def test_an_exception_that_ended_nothing_does_not_hide_the_one_that_did(how: str, end: str, tmp_path: Path) -> None:
    text = survived(SURVIVED[how])
    found = failure(tmp_path, node0=STEP + text + STEP + end, node1=STEP, job=SRUN)
    said = {MY_BUG: "my own bug", TORCHRUN: ""}.get(end, "terminate called")
    assert said in found.lines[0]


def test_what_stands_before_a_traceback_is_known_where_a_block_of_the_file_begins(tmp_path: Path) -> None:
    text = survived(SURVIVED["ignored"])
    for before in range(steps.BLOCK_BYTES - len(text) - 100, steps.BLOCK_BYTES, 31):
        found = failure(tmp_path, node0="x" * before + "\n" + text + "y\n" * 9 + MY_BUG)
        assert found.lines[0].startswith("ValueError: my own bug"), before


def test_lines_that_say_error_are_passed_over_quickly() -> None:
    """What is looked for stands in no line that only says that there was one."""
    line = b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - WARNING - error while reading a file: ValueError: again\n"
    assert first_error._signs(first_error._NONE, line) == [first_error._BEGINS_WITH_EXCEPTION]
    assert not first_error._BEGINS_WITH_EXCEPTION.search(b"\n" + line)


@pytest.mark.parametrize("text", [text for known in KNOWN for text in known.example])
def test_each_line_that_has_a_grade_is_found_where_it_stands_alone(tmp_path: Path, text: str) -> None:
    """Most lines are never looked at: none that matters is among them."""
    for line in text.strip().splitlines():
        found = failure(tmp_path, node0=f"one\n{line}\ntwo\n").lines
        assert first_error._grade(line) is None or line.endswith(found[0])


@pytest.mark.parametrize("colour", ["", "\x1b[31m"])
@pytest.mark.parametrize("begin", ["", "0: ", "[rank0]:[rank3]: ", " 30%|###\r"])
def test_an_exception_is_found_among_many_lines_with_the_word_error(tmp_path: Path, begin: str, colour: str) -> None:
    noise = "[titan] an error, again: caught ValueError: x\nerror: Connection is fine\n" * 5000
    said = f"{noise}{begin}{colour}KeyError: 'x'\n{noise}ValueError: late\n"
    assert failure(tmp_path, node0=said, node1=noise).lines[0] == "KeyError: 'x'"


@given(st.binary(max_size=600))
def test_the_search_for_errors_never_raises(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "0000-a.log").write_bytes(
        b"RuntimeError: \n" + data + b"\n[rank1]: Traceback (most recent call last)\n" + data
    )
    explain(tmp_path, FAILED, "r", tmp_path)


# --- logs that hold none of it ------------------------------------------------------------------------------

HARMLESS = (
    STEP,
    GOODBYE,  # a good run ends so, too; without another error of a failed one it is the last resort
    'titan-node: ok node=0 host=gpu001 device=cuda gpus=4 gpu="GB200" torch=2.14.1 cuda=13.0\n',
    "[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - CUDA capacity: NVIDIA GB200 with 184.00GiB memory\n",
    "[rank0]:[titan] 2026-11-22 07:10:31,413 - root - WARNING - 2 CUDA memory allocation retries.\n",
    "gpu001:5:5 [0] NCCL INFO NET/IB : No device found.\n",
    "[rank0]:[W1122 14:50:52.3 ProcessGroupNCCL.cpp:1] Warning: destroy_process_group() was not called\n",
    "pyxis: imported docker image: ./titan.sqsh\n",
    "launcher: job 12 on gpu[001-002], rendezvous 10.0.0.1:20012\n",
    "no errors so far; the time limit is one hour; the disk holds enough space\n",
)


TEXTS = st.text(max_size=60).filter(lambda text: not any(map(first_error.begins_with_exception, text.splitlines())))


@given(st.lists(st.sampled_from(HARMLESS) | TEXTS.map(lambda text: text + "\n"), max_size=12))
def test_a_log_without_them_never_gets_a_cause(tmp_path: Path, lines: list[str]) -> None:
    """Whatever else a rank wrote before it raised something of its own."""
    text = "".join(lines).encode("utf-8", "replace").decode()
    found = failure(tmp_path, node0=text + "\n" + MY_BUG)
    assert found.code == ""
    assert found.lines and "my own bug" in found.lines[0]


def test_a_failed_run_with_harmless_logs_shows_their_end_and_no_cause(tmp_path: Path) -> None:
    quiet = "".join(line for line in HARMLESS if line != GOODBYE)
    found = failure(tmp_path, node0=quiet)
    assert (found.code, found.is_error) == ("", False)
    assert found.lines[-1] == HARMLESS[-1].strip()


def test_an_empty_run_has_nothing_to_say(tmp_path: Path) -> None:
    assert failure(tmp_path) == Failure("", "", "", None, [], False)
    assert explain(tmp_path / "absent", FAILED, "r", tmp_path).lines == []


def test_how_it_ended_tells_whether_anything_was_logged(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("")
    ended = how_it_ended("FAILED", "JobLaunchFailure", None, tmp_path)
    assert ended == Ended("FAILED", "JobLaunchFailure", None, logged=False)
    (tmp_path / "job.log").write_text("x")
    assert how_it_ended("FAILED", "ended by SIGTERM", 143, tmp_path) == Ended("FAILED", "ended", 143, logged=True)


def test_memory_is_bounded_and_both_ends_of_a_huge_log_are_read(tmp_path: Path) -> None:
    """What stands first or last is found, and the log is never in memory as a whole."""
    lines = {"head": "fuse: failed to open /dev/fuse: Permission denied\n", "tail": SRUN}
    path = tmp_path / "0000-gpu000.log"
    for first, last in (("head", "tail"), ("tail", "head")):
        path.write_text(lines[first])
        os.truncate(path, 20 << 20)
        with path.open("a") as handle:
            handle.write("\n" + lines[last])
        tracemalloc.start()
        try:
            found = explain(tmp_path, FAILED, "r", tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
        finally:
            tracemalloc.stop()
        assert found.code == "dev-fuse"
