"""What failed runs have printed is explained: who is to blame, and what is no cause."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.logs import first_error, known_errors, steps
from launcher.logs.known_errors import Ended, Failure, Known, explain, how_it_ended

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
KNOWN = known_errors.known_errors()


def example(code: str) -> str:
    return next(known.example[0] for known in KNOWN if known.code == code) + "\n"


def failure(folder: Path, ended: Ended = FAILED, **logs: str) -> Failure:
    """What is said of a run with these logs: `job`, and `node0`, `node1`, ..."""
    for name, text in logs.items():
        file = "job.log" if name == "job" else f"000{name[-1]}-gpu00{name[-1]}.log"
        (folder / file).write_text(text)
    return explain(folder, ended, "my-run", folder.parent / "my run")


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
    found = failure(tmp_path, ended, node9=STEP, **{log: printed})  # node 9 did nothing wrong
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

MY_BUG = RANK + "[rank0]:[rank2]: ValueError: my own bug, at 2026-11-22 14:50:52,000\n"
VICTIM = (
    "[rank0]:[titan] 2026-11-22 14:50:40,000 - root - INFO - Training starts at step 1\n" + RANK
) + "[rank0]:[rank2]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18345.\n"
OUT_OF_MEMORY = RANK + "[rank0]:[rank2]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
GOODBYE = example("rendezvous-gone")
TORCHRUN = example("killed").replace("-9", "1")
SRUN = "srun: error: gpu001: task 0: Exited with exit code 1\n"


def test_the_rank_that_failed_is_to_blame_and_not_its_victims(tmp_path: Path) -> None:
    timeout = example("nccl-timeout")
    found = failure(
        tmp_path, node0=STEP + VICTIM + TORCHRUN, node1=OUT_OF_MEMORY, node2=GOODBYE, node3=timeout, job=SRUN
    )
    assert found.code == "gpu-memory"
    assert found.path is not None and found.path.name == "0001-gpu001.log"
    assert found.lines[0].startswith("torch.OutOfMemoryError")


def test_of_two_known_causes_the_earlier_one_is_named(tmp_path: Path) -> None:
    late = OUT_OF_MEMORY + "  time      : 2026-11-22_14:51:52\n"
    early = MY_BUG.replace("my own bug", "BuilderConfig 'en' not found. Available: ['default']")
    assert failure(tmp_path, node0=late, node1=early).code == "builder-config"


def test_an_error_that_is_not_known_is_shown_and_nothing_else_is_blamed(tmp_path: Path) -> None:
    """Known texts all around it: a warning that was survived, the victims, the ends that torchrun and srun tell."""
    warned = "W1122 14:00:00.000000 1 hub.py:1] 429 Too Many Requests. Retrying in 1 s. No space left on device\n"
    found = failure(tmp_path, node0=VICTIM + GOODBYE, node1=warned + MY_BUG + TORCHRUN, node2=VICTIM, job=SRUN)
    assert (found.code, found.cause, found.fix, found.is_error) == ("", "", "", True)
    assert found.lines[0].startswith("ValueError: my own bug")


def test_a_helper_program_of_another_architecture_says_nothing_of_the_image(tmp_path: Path) -> None:
    error = MY_BUG.replace("ValueError: my own bug", "OSError: [Errno 8] Exec format error: '/data/bin/ptxas'")
    assert failure(tmp_path, node0=error).code == ""
    helper = "/data/bin/prepare: line 3: /data/bin/tool: cannot execute binary file: Exec format error\n"
    assert failure(tmp_path, node0=helper + STEP, job=SRUN).code == ""


def test_what_a_rank_may_survive_is_no_cause_where_it_is_not_the_error(tmp_path: Path) -> None:
    """An exception counts as one only in the first error: a warning may say the same."""
    hint = next(hint for hint in sorted(known_errors._hints()) if first_error._grade(hint.decode()) is None)
    warned = f"{hint.decode()} 429 Too Many Requests, trying again\n"
    found = failure(tmp_path, node0=STEP + warned + STEP, job=SRUN)
    assert (found.code, found.lines[0]) == ("", SRUN.strip())


def test_of_what_is_printed_the_more_telling_line_is_named(tmp_path: Path) -> None:
    fuse, full = "fuse: failed to open /dev/fuse: Permission denied\n", "cp: No space left on device\n"
    found = failure(tmp_path, node0=STEP + fuse, node1=STEP + full + "after it\n" + STEP, job=SRUN)
    assert found.code == "disk-full"
    assert found.lines == [full.strip(), "after it"]
    assert failure(tmp_path, node0=fuse, node1=STEP, job=SRUN).code == "dev-fuse"


def test_the_code_that_failed_is_not_what_it_said(tmp_path: Path) -> None:
    text = MY_BUG.replace("main()", 'advise("CUDA out of memory")').replace("/opt", "/No space left on device")
    assert failure(tmp_path, node0=text).code == ""


def test_a_lost_connection_is_the_cause_only_when_nothing_else_is_known(tmp_path: Path) -> None:
    assert failure(tmp_path, node0=VICTIM, node1=GOODBYE, job=SRUN).code == "peer-gone"
    killed = example("killed")
    assert failure(tmp_path, node1=killed).code == "killed"
    assert failure(tmp_path, node2=OUT_OF_MEMORY).code == "gpu-memory"


def test_ranks_that_are_ended_with_the_job_are_not_why_it_ended(tmp_path: Path) -> None:
    for word, name in (("CANCELLED", "cancelled"), ("TIMEOUT", "time-limit"), ("NODE_FAIL", "node-failure")):
        assert failure(tmp_path, Ended(word, exit=143), node0=VICTIM, node1=GOODBYE, job=SRUN).code == name


def test_what_a_rank_says_in_its_own_log_counts(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks" / "0003-gpu003" / "12_ab" / "attempt_0" / "1"
    ranks.mkdir(parents=True)
    (ranks / "stderr.log").write_text(
        "Traceback (most recent call last):\ntorch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n"
    )
    found = failure(tmp_path, node0=VICTIM)
    assert (found.code, found.path) == ("gpu-broken", ranks / "stderr.log")
    assert found.cause == "a GPU of node gpu003, or its link, is broken"
    assert "--exclude gpu003;" in found.fix


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


def test_a_setting_that_is_not_known_is_named(tmp_path: Path) -> None:
    box = "╭─ Unrecognized options ──╮\n│ Unrecognized options: --bogus.option=1   │\n"
    found = failure(tmp_path, node0=box)
    assert found.cause == "torchtitan does not take a setting of this run (Unrecognized options: --bogus.option=1)"


def test_the_check_of_a_node_speaks_for_itself(tmp_path: Path) -> None:
    line = r'titan-node: FAIL node=0 host=gpu001 why="3 \"GPUs\" of 4" fix="launcher submit --exclude gpu001"'
    found = failure(tmp_path, Ended("FAILED", exit=20), node0=line + "\n")
    assert found.cause == 'node gpu001 is not fit to train: 3 "GPUs" of 4'
    assert found.fix == "launcher submit --exclude gpu001"


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


@given(st.lists(st.sampled_from(HARMLESS) | st.text(max_size=60).map(lambda text: text + "\n"), max_size=12))
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


# --- what came before what ----------------------------------------------------------------------------------

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


def ranks_log(folder: Path, text: str, node: str = "0001-gpu001") -> None:
    path = folder / "ranks" / node / "12_ab" / "attempt_0" / "1" / "stderr.log"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_what_follows_last_error_is_why_nccl_was_used_wrongly(tmp_path: Path) -> None:
    said = "ncclInvalidUsage: This reflects invalid usage.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0\n"
    text = RANK + re.sub("^", "[rank0]:[rank2]: ", (NCCL % "invalid usage").partition(": ")[2] + said, flags=re.M)[:-17]
    found = failure(tmp_path, node0=VICTIM, node1=text)
    assert found.code == "nccl-misuse"
    assert found.cause == "NCCL was used wrongly: Duplicate GPU detected : rank 1 and rank 0"
    internal = (
        text.replace("ncclInvalidUsage", "ncclInternalError")
        .replace("invalid usage", "internal error")
        .replace("Duplicate GPU detected", "No path")
    )
    assert failure(tmp_path, node0=GOODBYE, node1=internal).cause.endswith(
        "check of its own: No path : rank 1 and rank 0"
    )


@pytest.mark.parametrize(("wait", "option"), [(300000, "init_timeout"), (100000, "train_timeout")])
def test_a_timeout_comes_before_the_connections_that_it_closed(tmp_path: Path, wait: int, option: str) -> None:
    closed = "[rank0]:[E101 00:06:01.5 TCPStore.cpp:1] error: Connection closed by peer [10.0.0.1]:18345.\n"
    ranks_log(tmp_path, WATCHDOG.format(rank=9, time="06:01.0", wait=wait))
    late = WATCHDOG.format(rank=0, time="07:01.0", wait=wait).replace("SeqNum=482", "SeqNum=500")
    found = failure(tmp_path, node0=closed, node1=closed, node2=STEP + late)
    assert found.code == "nccl-timeout" and "(_ALLGATHER_BASE, number 482)" in found.cause
    assert f"comm.{option}_seconds=" in found.fix


def test_a_time_without_a_year_is_near_the_others(tmp_path: Path) -> None:
    near = steps.line_time(b"2026-12-31 23:59:00,000")
    for text, date in (
        (b"[E101 00:06:01.5 x", b"2027-01-01 00:06:01.5"),
        (b"E1231 23:58:00.5", b"2026-12-31 23:58:00.5"),
    ):
        assert steps.line_time(text, near) == steps.line_time(date)
    assert steps.line_time(b"[E230 00:06:01.5 x", near) is None


@pytest.mark.parametrize(
    ("said", "why", "node"),
    [
        ("Task launch for StepId=101.0 failed on node gn2: Invalid job credential", "Invalid job credential", "gn2"),
        ("fwd_tree_thread: can't find address for host gn2, check slurm.conf", "no address of node gn2", "gn2"),
        ("Nodes c3 are still not ready", "node c3 never became ready", "c3"),
        ("Node failure on n7", "node n7 failed", "n7"),
        ("Node failure on n[7-8]", "node n[7-8] failed", "'n[7-8]'"),
    ],
)
def test_the_node_that_slurm_names_is_left_out(tmp_path: Path, said: str, why: str, node: str) -> None:
    ended = Ended("NODE_FAIL" if "failure" in said else "FAILED", exit=1)
    before = "slurmstepd: error: *** STEP 5.0 ON n0 CANCELLED AT 2026-11-22T14:50:52 DUE TO NODE FAILURE, SEE LOG ***\n"
    before = before if "failure" in said else ""
    job = f"{before}srun: error: {said}\nsrun: error: Timed out waiting for job step to complete\n"
    found = failure(tmp_path, ended, node0=STEP, job=job)
    assert why in found.cause and f"--exclude {node}" in found.fix
    assert any(said in line for line in found.lines)


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


def test_the_lines_of_one_rank_belong_together(tmp_path: Path) -> None:
    """Python's faulthandler prints an empty line, behind whose label no blank is left."""
    said = (
        'Fatal Python error: Segmentation fault\n\nCurrent thread 0x7f (most recent call first):\n  File "x.py" in f\n'
    )
    found = failure(tmp_path, node0=STEP + re.sub("^", "[rank0]:", said, flags=re.MULTILINE))
    assert found.code == "crashed" and found.lines[-1].strip() == 'File "x.py" in f'


def test_an_abort_after_the_last_step_is_said_to_be_one(tmp_path: Path) -> None:
    done = STEP.replace("step:  5", "Training completed")
    found = failure(tmp_path, node0=STEP + done + "terminate called without an active exception\n" + report(-6))
    assert (found.code, found.completed) == ("aborted", True)
    assert "training had already reached its last step" in found.as_text()


def test_an_abort_because_nccl_lost_its_peer_is_no_cause(tmp_path: Path) -> None:
    text = NCCL % "remote process exited or there was a network error"
    found = failure(
        tmp_path, node0=STEP + text + "terminate called after throwing an instance of 'c10::DistBackendError'\n"
    )
    assert found.code == "nccl-peer-gone"


def test_the_rank_that_torchrun_saw_fail_first_is_named_beside_an_error_that_is_not_known(tmp_path: Path) -> None:
    late = report(1, 3, "gpu000", 58)
    found = failure(tmp_path, node0=VICTIM + late, node1=MY_BUG + report(1))
    assert found.code == "" and found.lines[0].startswith("ValueError: my own bug")
    assert found.rank is not None and (found.rank.rank, found.rank.host) == (9, "gpu001")
    other = failure(tmp_path, node0=report(1), node1=late)
    assert other.rank == found.rank and "(exitcode: 1)" in other.lines[0]


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


@pytest.mark.parametrize(
    ("exit_code", "text", "code"),
    [
        (
            130,
            'Traceback (most recent call last):\n  File "/x/torchrun", line 8\n    main()\nKeyboardInterrupt\n',
            "interrupted",
        ),
        (130, "KeyboardInterrupt\n" + VICTIM, "interrupted"),
        (130, "", "interrupted"),
        (143, "", "terminated"),
        (143, "srun: error: gpu001: task 0: Terminated\n", "terminated"),
        (143, "srun: error: gpu001: task 0: Exited with exit code 42\n", ""),
        (
            1,
            RANK + "[rank0]:[rank2]: RuntimeError: DataLoader worker (pid 7) is killed by signal: Terminated. \n",
            "terminated",
        ),
    ],
)
def test_an_interruption_is_said_without_frames(tmp_path: Path, exit_code: int, text: str, code: str) -> None:
    found = failure(tmp_path, Ended("FAILED", exit=exit_code), node0=STEP, job=text)
    assert found.code == code
    assert not any("File" in line for line in found.lines)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("[ERROR] Invalid argument: /data/x.sqsh", "/data/x.sqsh is missing on node gpu001"),
        (
            "[ERROR] /etc/enroot/hooks.d/10-devices.sh exited with return code 1",
            "hook 10-devices.sh failed on node gpu001",
        ),
        ("[ERROR] A thing nobody knows", "node gpu001: A thing nobody knows"),
        (
            "enroot-mount: failed to mount: /d at /r/d: Operation not permitted",
            "mount /d on node gpu001: Operation not",
        ),
        (
            "mkdir: cannot create directory '/run/user/5001': Permission denied",
            "/run/user/5001 on node gpu001: Permission",
        ),
        ("[INFO] nothing of note", "only slurmd.log on that node says why"),
    ],
)
def test_the_containers_error_is_shown_behind_any_chatter(tmp_path: Path, said: str, cause: str) -> None:
    chatter = "".join(f"slurmstepd: error: pyxis:     chatter of a hook, line {number}\n" for number in range(99))
    printed = PYXIS % f"{chatter}slurmstepd: error: pyxis:     {said}\n"
    found = failure(tmp_path, node1=printed, job=SRUN)
    assert cause in found.cause and found.fix
    assert any(said in line for line in found.lines) or "slurmd.log" in cause
    tool = "slurmstepd: error: pyxis:     nvidia-container-cli: error\n"
    late = failure(tmp_path, node1=PYXIS % f"{tool}{chatter}slurmstepd: error: pyxis:     [ERROR] at last\n")
    assert late.lines[-1].endswith("[ERROR] at last")


@pytest.mark.parametrize(
    "said",
    [
        "OSError: [Errno 28] No space left on device: '/scratch/x y'",
        "cp: error writing '/scratch/x': No space left on device",
    ],
)
def test_the_disk_that_is_full_is_looked_at_where_it_is(tmp_path: Path, said: str) -> None:
    found = failure(tmp_path, node3=f"{said}\n", job=SRUN)
    assert found.fix.startswith("srun -N1 -w gpu003 df -h") and "/scratch/x" in found.fix
    assert failure(tmp_path, node3="", job=f"{said}\n").fix.startswith("srun -N1 df -h")


def test_an_image_without_a_shell_needs_no_other_python(tmp_path: Path) -> None:
    said = "enroot-switchroot: failed to execute: /bin/sh: No such file or directory\n"
    found = failure(tmp_path, node0=PYXIS % f"slurmstepd: error: pyxis:     {said}")
    assert found.code == "command-missing" and "--python" not in found.fix


def printed_by(program: str) -> str:
    """What Python prints of an exception, with the labels that a rank's lines have."""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr
    return STEP + "".join(f"[rank0]:[rank3]: {line}\n" for line in said.splitlines())


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


def test_errors_of_which_none_led_to_the_other_stay_apart(tmp_path: Path) -> None:
    one = printed_by("raise ValueError('the first')")
    found = failure(tmp_path, node0=one + printed_by("raise RuntimeError('a later one')"))
    assert found.lines[0] == "ValueError: the first" and not any("a later one" in line for line in found.lines)


# --- ranks that say no exception, and exceptions that end none ------------------------------------------------

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
    if own_files:
        ranks_log(tmp_path, "a note of the start\n" + STEP.removeprefix("[rank0]:") + said + "\n")
        said = ""
    said = "".join(
        f"[rank1]:{line}\n" for line in ["a note", STEP.removeprefix("[rank0]:").strip(), *said.splitlines()]
    )
    found = failure(
        tmp_path, node0=VICTIM, node1=STEP + said + report(code), node2=report(1, 3, "gpu002", 58), job=SRUN
    )
    assert (found.code, found.is_error) == (name, True)
    last = ENDINGS[how][1].splitlines()[-1]
    assert last in found.lines and not any("note" in line or "slow" in line for line in found.lines), found.lines
    assert found.rank is not None and found.rank.rank == 9
    if how == "an OpenBLAS that goes on":
        assert "too few processes or threads" in found.cause


@pytest.mark.parametrize("code", [-2, -15, 143])
def test_a_rank_that_was_interrupted_has_no_last_words(code: int, tmp_path: Path) -> None:
    ranks_log(tmp_path, "loading a file\n")
    assert "loading a file" not in failure(tmp_path, node1=STEP + report(code), job=SRUN).lines


def test_a_rank_that_names_its_lost_peer_has_said_all(tmp_path: Path) -> None:
    ranks_log(tmp_path, VICTIM.replace("[rank0]:", "") + "bye\n")
    assert failure(tmp_path, node1=STEP + report(1), job=SRUN).code == "peer-gone"


def test_what_is_printed_is_known_before_last_words_that_are_not(tmp_path: Path) -> None:
    ranks_log(tmp_path, "giving up\n")
    full = "cp: error writing '/scratch/x': No space left on device\n"
    assert failure(tmp_path, node1=full + STEP + report(1), job=SRUN).code == "disk-full"


def survived(program: str) -> str:
    """A real survivor: Python's own words of an error after which it goes on."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert "Traceback" in done.stderr
    return "".join(f"[rank0]:{line}\n" for line in done.stderr.splitlines())


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


def test_a_traceback_after_which_training_goes_on_is_none(tmp_path: Path) -> None:
    printed = RANK + "[rank0]:[rank2]: OSError: [Errno 28] No space left on device: '/x'\n"
    steps_after = STEP.replace("step:  5", "step:  6") + STEP.replace("step:  5", "step:  7")
    assert failure(tmp_path, node0=printed + steps_after + MY_BUG).lines[0].startswith("ValueError: my own bug")
    assert failure(tmp_path, node0=printed + steps_after, job=SRUN).lines == [SRUN.strip()]
    done = STEP.replace("step:  5", "Training completed")
    assert failure(tmp_path, node0=printed + STEP + done + MY_BUG).lines[0].startswith("ValueError: my own bug")
    assert failure(tmp_path, node0=printed + STEP + MY_BUG).code == "disk-full"  # the line of a rank that was ahead


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
