"""Errors that are known: each row of the table with the output that it is for, and logs that it must leave alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import known_errors
from launcher.cli import launcher as program
from launcher.known_errors import KNOWN, Failure, Where, explain, how_it_ended
from tests.conftest import ROOT, Launch

FAILED = "run FAILED reason= exit=1 logs=some"
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


@dataclass(frozen=True)
class Sample:
    """Output that a row is for, and where that is known from."""

    row: str
    source: str
    text: str = ""
    ended: str = FAILED
    log: str = "0000-gpu001.log"


def raised(row: str, source: str, error: str) -> Sample:
    lines = error.splitlines()
    return Sample(row, source, RANK + "".join(f"[rank0]:[rank2]: {line}\n" for line in lines))


def pyxis(row: str, source: str, *lines: str, log: str = "0000-gpu001.log") -> Sample:
    """What Pyxis prints around enroot's own words (NVIDIA/pyxis issues 101, 122)."""
    text = [
        "slurmstepd: error: pyxis: container start failed with error code: 1",
        "slurmstepd: error: pyxis: printing enroot log file:",
        *(f"slurmstepd: error: pyxis:     {line}" for line in lines),
        "slurmstepd: error: pyxis: couldn't start container",
        "slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1",
        "slurmstepd: error: Failed to invoke spank plugin stack",
    ]
    return Sample(row, source, "\n".join(text) + "\n", log=log)


MEASURED = "measured: Pyxis 0.24.0, enroot 4.1.2"
OURS = "slurm/job.sbatch.j2"
SAMPLES = (
    Sample("node-unfit", "slurm/node.py", 'titan-node: FAIL node=1 host=gpu002 why="3 of 4 GPUs are visible" fix="--exclude gpu002"\n', "run FAILED reason= exit=20 logs=some"),
    Sample("run-dir-unwritable", OURS, "launcher: this node cannot write the run directory: mkdir: Permission denied\n", "run FAILED reason= exit=77 logs=some", "job.log"),
    Sample("run-dir-unwritable", OURS, "", "run FAILED reason= exit=77 logs=some"),
    Sample("submitted-twice", OURS, "launcher: /r/a already holds job 12: nothing is run twice\n", "run FAILED reason= exit=75 logs=some", "job.log"),
    Sample("submitted-twice", OURS, "", "run FAILED reason= exit=75 logs=none"),
    Sample("head-is-loopback", OURS, "launcher: gpu001 resolves to no address but loopback: getent ahostsv4 gpu001\n", "run FAILED reason= exit=76 logs=some", "job.log"),
    Sample("head-is-loopback", OURS, "", "run FAILED reason= exit=76 logs=none"),
    Sample("node-unfit-exit", "slurm/node.py: CHECK_FAILED", STEP, "run FAILED reason= exit=20 logs=some"),
    raised("shm-full", "NVIDIA/nccl: src/misc/shmutils.cc", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\nncclSystemError: System call failed.\nLast error:\nError while creating shared memory segment /dev/shm/nccl-Ab12 (size 9637888)"),
    raised("disk-full", "errno 28 as Python prints it", "OSError: [Errno 28] No space left on device: '/scratch/local/cache/x'"),
    pyxis("disk-full", "squashfs-tools: unsquashfs", "Write on output file failed because No space left on device", "FATAL ERROR: writer: failed to write data block 0"),
    raised("quota", "errno 122 as Python prints it", "OSError: [Errno 122] Disk quota exceeded: '/home/u/runs/r/titan/tb'"),
    raised("stale-handle", "errno 116 as Python prints it", "OSError: [Errno 116] Stale file handle: '/data/c4/en/c4-train.00001-of-01024.json.gz'"),
    raised("read-only", "errno 30 as Python prints it", "OSError: [Errno 30] Read-only file system: '/opt/titan/outputs'"),
    Sample("no-pyxis", "measured: Slurm 22.05 without Pyxis", "srun: unrecognized option '--container-image=/nope/x.sqsh'\nTry \"srun --help\" for more information\n", log="job.log"),
    pyxis("image-from-registry", "NVIDIA/pyxis issue 67", "[INFO] Querying registry for permission grant", "[ERROR] URL https://registry-1.docker.io/v2/library/x/manifests/latest returned error code: 401 Unauthorized"),
    Sample("image-from-registry", "NVIDIA/pyxis issue 127", "pyxis: importing docker image: titan.sqsh\nslurmstepd: error: pyxis: child 7 failed with error code: 1\n", log="job.log"),
    Sample("image-missing", MEASURED, "slurmstepd: error: pyxis: child 771 failed with error code: 1\nslurmstepd: error: pyxis: failed to create container filesystem for image: /nope/x.sqsh\nslurmstepd: error: pyxis: printing enroot log file:\nslurmstepd: error: pyxis:     [ERROR] No such file or directory: /nope/x.sqsh\n", log="job.log"),
    pyxis("image-not-squashfs", MEASURED, "[ERROR] Invalid image format: /data/x.sqsh"),
    pyxis("image-damaged", MEASURED, "Read on filesystem failed because EOF", "FATAL ERROR: File system corruption detected"),
    pyxis("image-damaged", MEASURED, "FATAL ERROR: File system corruption detected"),
    pyxis("image-has-devices", MEASURED, "create_inode: could not create character device /tmp/x/dev/null, because you're not superuser!"),
    Sample("mount-source", MEASURED, "slurmstepd: error: pyxis: --container-mounts: source path does not exist: /nope/dir\n", log="job.log"),
    Sample("mount-target", MEASURED, "srun: error: pyxis: mount target must be a relative path or an absolute path\n", log="job.log"),
    pyxis("wrong-architecture", MEASURED, "enroot-switchroot: failed to execute: /bin/sh: Exec format error"),
    Sample("wrong-architecture", MEASURED, "enroot-switchroot: failed to execute: /bin/sh: Exec format error\n"),
    Sample("wrong-architecture", "slurmstepd's execve, with errno 8", "slurmstepd-gpu001: error: execve(): /usr/bin/python3: Exec format error\n"),
    Sample("command-missing", MEASURED, "slurmstepd-gpu001: error: execve(): python3: No such file or directory\n"),
    pyxis("command-missing", "NVIDIA/pyxis issue 61", "enroot-switchroot: failed to execute: /bin/bash: No such file or directory"),
    pyxis("dev-fuse", MEASURED, "fuse: failed to open /dev/fuse: Permission denied", "[ERROR] Failed to mount: /data/x.sqsh"),
    pyxis("user-namespaces", "NVIDIA/pyxis issue 36", "enroot-nsenter: failed to create user namespace: Permission denied"),
    pyxis("user-namespaces", "the kernel's ENOSPC above user.max_user_namespaces", "enroot-nsenter: failed to create user namespace: No space left on device"),
    pyxis("mount-failed", "NVIDIA/enroot issue 141", "[ERROR] Failed to mount: /mnt/alpine.sqsh"),
    pyxis("no-container-cli", MEASURED, "[ERROR] Command not found: nvidia-container-cli, see https://github.com/NVIDIA/libnvidia-container", "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1"),
    pyxis("driver-too-old-for-image", "NVIDIA/libnvidia-container", "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0", "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1"),
    pyxis("container-cli", "NVIDIA/pyxis issue 122", "nvidia-container-cli: ldcache error: process /sbin/ldconfig failed with error code: 1"),
    pyxis("nvidia-hook", "NVIDIA/pyxis issue 101", "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1"),
    Sample("oom-kill", "slurmstepd 22.05", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.0. Some of your processes may have been killed by the cgroup out-of-memory handler.\n", log="job.log"),
    Sample("oom-kill", "slurmstepd after 22.05, as users quote it", "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n", log="job.log"),
    Sample("oom-kill", "srun 22.05", "srun: error: gpu001: task 0: Out Of Memory\n", log="job.log"),
    Sample("oom-kill", "Slurm's state", "", "run OUT_OF_MEMORY reason=OutOfMemory exit=None logs=some"),
    Sample("killed", "torch: elastic/multiprocessing/api.py", "E1122 14:50:52.956000 5552 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 5686) of binary: python3\n"),
    Sample("killed", "128 + SIGKILL", "", "run FAILED reason= exit=137 logs=some"),
    Sample("time-limit", "measured: Slurm 22.05", "slurmstepd: error: *** JOB 5 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO TIME LIMIT ***\n", log="job.log"),
    Sample("time-limit", "Slurm's state", "", "run TIMEOUT reason= exit=143 logs=some"),
    Sample("node-failure", "slurmstepd 22.05", "slurmstepd: error: *** STEP 5.0 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n", "run NODE_FAIL reason= exit=143 logs=some", "job.log"),
    Sample("preempted", "slurmstepd 22.05", "slurmstepd: error: *** JOB 5 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO PREEMPTION ***\n", "run PREEMPTED reason= exit=143 logs=some", "job.log"),
    Sample("launch-failure", "measured: Slurm 22.05, logs/ not writable (0:53)", "", "run FAILED reason=JobLaunchFailure exit=None logs=none"),
    Sample("launch-failure", "measured: Slurm 22.05, as sacct tells it", "", "run FAILED reason= exit=0 logs=none"),
    Sample("step-refused", "srun 22.05", "srun: error: Unable to create step for job 12: Requested node configuration is not available\n", log="job.log"),
    Sample("cancelled", "slurmstepd 22.05", "slurmstepd: error: *** STEP 5.0 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 ***\n", "run CANCELLED reason= exit=143 logs=some", "job.log"),
    raised("driver-too-old", "gpustack issue 1254", "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW"),
    raised("driver-too-old", "CUDA: cudaErrorInsufficientDriver", "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
    raised("driver-too-old", "torch for CUDA, as users quote it", "RuntimeError: The NVIDIA driver on your system is too old (found version 12080)."),
    raised("no-kernel-image", "pytorch issue 31285", "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"),
    raised("ptxas", "triton issue 8539, where it is sm_121a", "torch._inductor.exc.InductorError: PTXASError: PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : Value 'sm_103a' is not defined for option 'gpu-name'"),
    raised("gpu-memory", "torch for CUDA, as users quote it", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 2 has a total capacity of 79.2 GiB"),
    raised("gpu-broken", "CUDA: cudaErrorECCUncorrectable", "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"),
    raised("fabric-not-ready", "haotian-liu/LLaVA issue 683", "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    raised("no-gpu", "torch: libtorch", "RuntimeError: No CUDA GPUs are available"),
    raised("hub-gated", "huggingface_hub: utils/_http.py", "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1)\n\nCannot access gated repo for url https://huggingface.co/x."),
    raised("hub-401", "huggingface_hub: utils/_http.py", "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1)"),
    raised("hub-403", "huggingface_hub: utils/_http.py", "huggingface_hub.errors.HfHubHTTPError: (Request ID: Root=1)\n\n403 Forbidden: no access.\nCannot access content at: https://huggingface.co/x."),
    raised("hub-429", "huggingface_hub 1.33: utils/_http.py", "huggingface_hub.errors.HfHubHTTPError: (Request ID: Root=1)\n\n429 Too Many Requests for url: https://huggingface.co/x."),
    raised("hub-429", "httpx's words, around which huggingface_hub puts its own", "huggingface_hub.errors.HfHubHTTPError: Client error '429 Too Many Requests' for url 'https://huggingface.co/x'"),
    raised("hub-offline", "huggingface_hub: utils/_http.py", "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://huggingface.co/x: offline mode is enabled."),
    raised("hub-unreachable", "datasets: load.py", "ConnectionError: Couldn't reach 'allenai/c4' on the Hub (ConnectTimeout)"),
    raised("builder-config", "measured: datasets 4.7", "ValueError: BuilderConfig 'en' not found. Available: ['default']"),
    raised("no-data-files", "datasets: load.py", "FileNotFoundError: Couldn't find any data file at /data/c4."),
    raised("shard-damaged", "Python: gzip", "gzip.BadGzipFile: Not a gzipped file (b've')"),
    raised("shard-damaged", "Python: gzip", "EOFError: Compressed file ended before the end-of-stream marker was reached"),
    raised("dp-degree", "torchtitan 0.3.0: components/dataloader.py", "AssertionError: dp_degree is inconsistent before and after checkpoint, dataloader resharding is not supported yet."),
    raised("loss-not-finite", "torchtitan 0.3.0: trainer.py", "RuntimeError: Loss is not finite (global_avg_loss=nan) at step 12. Stopping training."),
    raised("loss-not-finite", "torch: clip_grad_norm_", "RuntimeError: The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped."),
    raised("tokenizer-missing", "torchtitan 0.3.0: components/tokenizer.py", "FileNotFoundError: Tokenizer path '/data/tokenizer' does not exist"),
    raised("tokenizer-missing", "torchtitan 0.2.2: components/tokenizer.py", "FileNotFoundError: No supported tokenizer files found in '/data'. Available files: []."),
    Sample("unknown-setting", "tyro 1.0, which reads the options of torchtitan 0.3.0", "Unrecognized options: --bogus.option, 3\n"),
    Sample("unknown-setting", "tyro 1.0, as it is printed", "╭─ Unrecognized options ──────────╮\n│ Unrecognized options: --bogus.option=1   │\n"),
    raised("nccl-no-interface", "NVIDIA/nccl: bootstrap", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, internal error\nncclInternalError: Internal check failed.\nLast error:\nBootstrap : no socket interface found"),
    raised("nccl-locked-memory", "NVIDIA/nccl: misc/ibvwrap.cc", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\nncclSystemError: System call failed.\nLast error:\nCall to ibv_create_cq failed with error Cannot allocate memory"),
    Sample("nccl-ib", "NVIDIA/nccl-tests issues 185, 227", "gpu001:5771:5771 [0] misc/ibvwrap.cc:187 NCCL WARN Call to ibv_modify_qp failed with error Connection timed out\n" + RANK + "[rank0]:[rank2]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\n"),
    raised("port-in-use", "torch: c10d sockets", "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, code: -98, name: EADDRINUSE, message: address already in use"),
    Sample("nccl-timeout", "torch: ProcessGroupNCCL.cpp", "[rank0]:[E1122 14:50:52.1 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)\n"),
    raised("nccl-peer-gone", "NVIDIA/nccl issue 2076", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.21.5"),
    raised("nccl-system", "NVIDIA/nccl issue 1016", "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1275, unhandled system error (run with NCCL_DEBUG=INFO for details)"),
    raised("nccl-cuda", "NVIDIA/nccl: ncclUnhandledCudaError", "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled cuda error"),
    pyxis("container-not-started", "NVIDIA/pyxis issue 135"),
    raised("head-unreachable", "torch: c10d sockets", "torch.distributed.DistNetworkError: The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29001)."),
    raised("rendezvous-timeout", "torch: dynamic_rendezvous.py", "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError"),
    raised("rendezvous-closed", "torch: dynamic_rendezvous.py", "torch.distributed.elastic.rendezvous.api.RendezvousClosedError"),
    raised("peer-gone", "gloo: transport/tcp/pair.cc", "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18345."),
    Sample("rendezvous-gone", "measured: torch 2.13", "W1122 14:50:52.945000 5552 dynamic_rendezvous.py:1346] The node 'gpu003_0' has failed to send a keep-alive heartbeat to the rendezvous 'x' due to an error of type RendezvousConnectionError.\n"),
)  # fmt: skip


def failure(folder: Path, ended: str = FAILED, **logs: str) -> Failure:
    """What is said of a run with these logs: `job`, and `node0`, `node1`, ..."""
    for name, text in logs.items():
        file = "job.log" if name == "job" else f"000{name[-1]}-gpu00{name[-1]}.log"
        (folder / file).write_text(text)
    return explain(folder, ended, "my-run", folder.parent / "my run")


@pytest.mark.parametrize("sample", SAMPLES, ids=[f"{s.row}-{i}" for i, s in enumerate(SAMPLES)])
def test_each_known_error_is_named_and_its_lines_are_shown(tmp_path: Path, sample: Sample) -> None:
    (tmp_path / "0009-gpu009.log").write_text(STEP)  # a node that did nothing wrong
    if sample.text:
        (tmp_path / sample.log).write_text(STEP + sample.text if sample.log != "job.log" else sample.text)
    found = explain(tmp_path, sample.ended, "my-run", tmp_path / "my run")
    known = {row.name: row for row in KNOWN}[sample.row]
    assert found.name == sample.row
    assert found.cause and found.fix and "{" not in found.cause + found.fix
    if sample.text and re.search(known.pattern, sample.text, re.MULTILINE):
        assert any(re.search(known.pattern, line) for line in found.lines), found.lines
        assert found.path is not None and found.path.name == sample.log


def test_every_row_has_output_that_it_is_for_and_says_where_that_is_known_from() -> None:
    names = [row.name for row in KNOWN]
    assert len(names) == len(set(names))
    assert set(names) == {sample.row for sample in SAMPLES}
    assert all(sample.source for sample in SAMPLES)


def alternatives(pattern: str) -> list[str]:
    """The parts of a pattern between the bars that are in no brackets, without its backslashes."""
    parts, depth = [""], 0
    for letter in pattern.replace("\\(", "\x01").replace("\\)", "\x02"):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.replace("\x01", "(").replace("\x02", ")").replace("\\", "") for part in parts]


@pytest.mark.parametrize("row", [row for row in KNOWN if row.where is Where.PRINTED], ids=lambda row: row.name)
def test_what_is_printed_anywhere_is_not_passed_over(row: known_errors.Known) -> None:
    """Lines without one of a few words are not looked at, for speed: each text of a row must hold one of them."""
    for text in alternatives(row.pattern):
        assert text.startswith("^run ") or known_errors._hinted(text.encode()), text


# --- who is to blame ----------------------------------------------------------------------------------------

MY_BUG = RANK + "[rank0]:[rank2]: ValueError: my own bug, at 2026-11-22 14:50:52,000\n"
VICTIM = (
    "[rank0]:[titan] 2026-11-22 14:50:40,000 - root - INFO - Training starts at step 1\n" + RANK
) + "[rank0]:[rank2]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18345.\n"
OUT_OF_MEMORY = RANK + "[rank0]:[rank2]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
GOODBYE = next(sample.text for sample in SAMPLES if sample.row == "rendezvous-gone")
TORCHRUN = next(sample.text for sample in SAMPLES if sample.row == "killed").replace("-9", "1")
SRUN = "srun: error: gpu001: task 0: Exited with exit code 1\n"


def test_the_rank_that_failed_is_to_blame_and_not_its_victims(tmp_path: Path) -> None:
    timeout = next(sample.text for sample in SAMPLES if sample.row == "nccl-timeout")
    found = failure(
        tmp_path, node0=STEP + VICTIM + TORCHRUN, node1=OUT_OF_MEMORY, node2=GOODBYE, node3=timeout, job=SRUN
    )
    assert found.name == "gpu-memory"
    assert found.path is not None and found.path.name == "0001-gpu001.log"
    assert found.lines[0].startswith("torch.OutOfMemoryError")


def test_of_two_known_causes_the_earlier_one_is_named(tmp_path: Path) -> None:
    late = OUT_OF_MEMORY + "  time      : 2026-11-22_14:51:52\n"
    early = MY_BUG.replace("my own bug", "BuilderConfig 'en' not found. Available: ['default']")
    assert failure(tmp_path, node0=late, node1=early).name == "builder-config"


def test_an_error_that_is_not_known_is_shown_and_nothing_else_is_blamed(tmp_path: Path) -> None:
    """Known texts all around it: a warning that was survived, the victims, the ends that torchrun and srun tell."""
    warned = "W1122 14:00:00.000000 1 hub.py:1] 429 Too Many Requests. Retrying in 1 s. No space left on device\n"
    found = failure(tmp_path, node0=VICTIM + GOODBYE, node1=warned + MY_BUG + TORCHRUN, node2=VICTIM, job=SRUN)
    assert (found.name, found.cause, found.fix, found.is_error) == ("", "", "", True)
    assert found.lines[0].startswith("ValueError: my own bug")


def test_a_helper_program_of_another_architecture_says_nothing_of_the_image(tmp_path: Path) -> None:
    error = MY_BUG.replace("ValueError: my own bug", "OSError: [Errno 8] Exec format error: '/data/bin/ptxas'")
    assert failure(tmp_path, node0=error).name == ""
    helper = "/data/bin/prepare: line 3: /data/bin/tool: cannot execute binary file: Exec format error\n"
    assert failure(tmp_path, node0=helper + STEP, job=SRUN).name == ""


def test_what_a_rank_may_survive_is_no_cause_where_it_is_not_the_error(tmp_path: Path) -> None:
    """An exception counts as one only in the first error: a warning may say the same."""
    warned = f"{known_errors._HINTS[-1].decode()} 429 Too Many Requests, trying again\n"
    found = failure(tmp_path, node0=STEP + warned + STEP, job=SRUN)
    assert (found.name, found.lines[0]) == ("", SRUN.strip())


def test_of_what_is_printed_the_more_telling_line_is_named(tmp_path: Path) -> None:
    fuse, full = "fuse: failed to open /dev/fuse: Permission denied\n", "cp: No space left on device\n"
    found = failure(tmp_path, node0=STEP + fuse, node1=STEP + full + "after it\n" + STEP, job=SRUN)
    assert found.name == "disk-full"
    assert found.lines == [full.strip(), "after it"]
    assert failure(tmp_path, node0=fuse, node1=STEP, job=SRUN).name == "dev-fuse"


def test_the_code_that_failed_is_not_what_it_said(tmp_path: Path) -> None:
    text = MY_BUG.replace("main()", 'advise("CUDA out of memory")').replace("/opt", "/No space left on device")
    assert failure(tmp_path, node0=text).name == ""


def test_a_lost_connection_is_the_cause_only_when_nothing_else_is_known(tmp_path: Path) -> None:
    assert failure(tmp_path, node0=VICTIM, node1=GOODBYE, job=SRUN).name == "peer-gone"
    killed = next(sample.text for sample in SAMPLES if sample.row == "killed")
    assert failure(tmp_path, node1=killed).name == "killed"
    assert failure(tmp_path, node2=OUT_OF_MEMORY).name == "gpu-memory"


def test_ranks_that_are_ended_with_the_job_are_not_why_it_ended(tmp_path: Path) -> None:
    for word, name in (("CANCELLED", "cancelled"), ("TIMEOUT", "time-limit"), ("NODE_FAIL", "node-failure")):
        ended = f"run {word} reason= exit=143 logs=some"
        assert failure(tmp_path, ended, node0=VICTIM, node1=GOODBYE, job=SRUN).name == name


def test_what_a_rank_says_in_its_own_log_counts(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks" / "0003-gpu003" / "12_ab" / "attempt_0" / "1"
    ranks.mkdir(parents=True)
    (ranks / "stderr.log").write_text(
        "Traceback (most recent call last):\ntorch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\n"
    )
    found = failure(tmp_path, node0=VICTIM)
    assert (found.name, found.path) == ("gpu-broken", ranks / "stderr.log")
    assert found.cause == "a GPU of node gpu003, or its link, is broken"
    assert "--exclude gpu003;" in found.fix


def test_what_a_log_says_cannot_add_to_a_command(tmp_path: Path) -> None:
    line = "slurmstepd: error: pyxis: --container-mounts: source path does not exist: /d; rm -rf ~ {run}\n"
    found = failure(tmp_path, job=line)
    assert found.cause == "the node has no /d; rm -rf ~ {run} to mount into the container"
    assert shlex.split(found.fix)[:4] == ["srun", "-N1", "ls", "-ld"]
    assert shlex.split(found.fix)[4] == "/d; rm -rf ~ {run};"


def test_a_setting_that_is_not_known_is_named(tmp_path: Path) -> None:
    box = "╭─ Unrecognized options ──────────╮\n│ Unrecognized options: --bogus.option=1   │\n"
    found = failure(tmp_path, node0=box)
    assert found.cause == "torchtitan does not know a setting of this run (Unrecognized options: --bogus.option=1)"


def test_the_check_of_a_node_speaks_for_itself(tmp_path: Path) -> None:
    line = r'titan-node: FAIL node=0 host=gpu001 why="3 \"GPUs\" of 4" fix="launcher submit --exclude gpu001"'
    found = failure(tmp_path, node0=line + "\n")
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(HARMLESS) | st.text(max_size=60).map(lambda text: text + "\n"), max_size=12))
def test_a_log_without_them_never_gets_a_cause(tmp_path: Path, lines: list[str]) -> None:
    """Whatever else a rank wrote before it raised something of its own."""
    text = "".join(lines).encode("utf-8", "replace").decode()
    found = failure(tmp_path, node0=text + "\n" + MY_BUG)
    assert found.name == ""
    assert found.lines and "my own bug" in found.lines[0]


def test_a_failed_run_with_harmless_logs_shows_their_end_and_no_cause(tmp_path: Path) -> None:
    quiet = "".join(line for line in HARMLESS if line != GOODBYE)
    found = failure(tmp_path, node0=quiet)
    assert (found.name, found.is_error) == ("", False)
    assert found.lines[-1] == HARMLESS[-1].strip()


def test_an_empty_run_has_nothing_to_say(tmp_path: Path) -> None:
    assert failure(tmp_path) == Failure("", "", "", None, [], False)
    assert explain(tmp_path / "absent", FAILED, "r", tmp_path).lines == []


def test_how_it_ended_tells_whether_anything_was_logged(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("")
    assert how_it_ended("FAILED", "JobLaunchFailure", None, tmp_path).endswith("exit=None logs=none")
    (tmp_path / "job.log").write_text("x")
    assert how_it_ended("FAILED", "ended by SIGTERM", 143, tmp_path).endswith("exit=143 logs=some")


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
        assert found.name == "dev-fuse"


# --- what a user sees ---------------------------------------------------------------------------------------


@pytest.fixture
def make_run(workplace: Path) -> Callable[..., Path]:
    """A run directory that has ended, as the job's script leaves it."""

    def make(name: str, exit_code: int = 1, **logs: str) -> Path:
        run = workplace / "runs" / name
        (run / "logs").mkdir(parents=True)
        (run / "intent.json").write_text('{"scheduler": "slurm", "job_name": "x", "at": 1}')
        (run / "job.json").write_text('{"job_id": "12"}')
        (run / "end.json").write_text(json.dumps({"exit_code": exit_code, "signal": "", "slurm": ""}))
        for log, text in logs.items():
            (run / "logs" / ("job.log" if log == "job" else f"0000-{log}.log")).write_text(text)
        return run

    return make


def test_status_prints_the_cause_then_the_fix_then_the_lines(make_run: Callable[..., Path], launch: Launch) -> None:
    run = make_run("r", gpu001=STEP + OUT_OF_MEMORY, job=SRUN)
    done = launch("status", "r")
    assert done.returncode == 8
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert lines[0] == "cause: a GPU's memory is too small for this run"
    assert lines[1] == f"try: launcher submit {run}/run.toml --batch-size N   (smaller)"
    assert lines[2] == f"from {run}/logs/0000-gpu001.log:"
    assert lines[3] == "| torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert lines[-1] == "everything: launcher logs r"
    told = json.loads(launch("status", "r", "--json").stdout)["failure"]
    assert told["known_error"] == "gpu-memory" and told["cause"] == lines[0].removeprefix("cause: ")
    assert told["fix"] == lines[1].removeprefix("try: ") and told["lines"][0] == lines[3].removeprefix("| ")
    assert told["log"] == f"{run}/logs/0000-gpu001.log"
    watched = launch("watch", "r")
    assert watched.returncode == 8 and "cause: a GPU's memory" in watched.stderr
    last = json.loads(launch("watch", "r", "--json").stdout.splitlines()[-1])
    assert last["failure"] == told


def test_status_of_an_unknown_error_shows_it_and_claims_nothing(make_run: Callable[..., Path], launch: Launch) -> None:
    run = make_run("r", gpu001=STEP + MY_BUG + GOODBYE, job=SRUN)
    done = launch("status", "r")
    assert "cause:" not in done.stderr and "try:" not in done.stderr
    assert f"first error, in {run}/logs/0000-gpu001.log:\n  | ValueError: my own bug" in done.stderr
    told = json.loads(launch("status", "r", "--json").stdout)["failure"]
    assert told["known_error"] is told["cause"] is told["fix"] is None
    assert told["lines"][0].startswith("ValueError")


def test_an_exit_code_alone_is_explained(make_run: Callable[..., Path], launch: Launch) -> None:
    make_run("r", exit_code=76)
    done = launch("status", "r")
    assert "cause: the first node resolves to a loopback address" in done.stderr


def test_a_good_run_has_no_failure_whatever_its_last_words(make_run: Callable[..., Path], launch: Launch) -> None:
    make_run("r", exit_code=0, gpu001=STEP + GOODBYE)
    done = launch("status", "r")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(launch("status", "r", "--json").stdout)["failure"] is None


# --- what is promised elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_the_commands_that_are_proposed_exist(row: known_errors.Known) -> None:
    texts = re.findall(r"launcher ((?:[a-z0-9]+ )*[^;|]*)", re.sub(r"   \(.*?\)", "", row.fix))
    for text in texts:
        command: click.Command = program
        words = text.split()
        context = click.Context(command)
        while isinstance(command, click.Group):
            found = command.get_command(context, words.pop(0))
            assert found is not None, text
            command = found
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= options, text
        assert not ("{again}" in words and given & {"--gpu", "--recipe"}), f"submit refuses it: {text}"


def in_docs(text: str) -> str:
    """A sentence of the table as docs/errors.md has it: capitals for what differs from run to run."""
    places = {
        "again": "RUN/run.toml",
        "run_dir": "RUN",
        "run": "RUN",
        "fix": "what the line proposes",
        "path2": "",
    }
    filled = re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[1].upper()), text)
    return filled.replace("|", "\\|")


def test_the_page_lists_every_row_by_family() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == {row.family for row in KNOWN}
    for row in KNOWN:
        cells = re.search(rf"^\| `{row.name}` \| `(.+)` \| (.*) \| (.*) \|$", sections[row.family], re.MULTILINE)
        assert cells, row.name
        assert re.search(row.pattern, cells[1].replace("\\|", "|")), row.name
        assert cells.group(2, 3) == (in_docs(row.what), in_docs(row.fix))
