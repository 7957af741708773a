"""What Pyxis, enroot, Slurm, NCCL, CUDA, the Hub and torchtitan print when they fail, with where it is known from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.known_errors import Failure, explain

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
    Sample(
        "node-unfit",
        "slurm/node.py",
        'titan-node: FAIL node=1 host=gpu002 why="3 of 4 GPUs are visible" fix="--exclude gpu002"\n',
        "run FAILED reason= exit=20 logs=some",
    ),
    Sample(
        "run-dir-unwritable",
        OURS,
        "launcher: this node cannot write the run directory: mkdir: Permission denied\n",
        "run FAILED reason= exit=77 logs=some",
        "job.log",
    ),
    Sample("run-dir-unwritable", OURS, "", "run FAILED reason= exit=77 logs=some"),
    Sample(
        "submitted-twice",
        OURS,
        "launcher: /r/a already holds job 12: nothing is run twice\n",
        "run FAILED reason= exit=75 logs=some",
        "job.log",
    ),
    Sample("submitted-twice", OURS, "", "run FAILED reason= exit=75 logs=none"),
    Sample(
        "head-is-loopback",
        OURS,
        "launcher: gpu001 resolves to no address but loopback: getent ahostsv4 gpu001\n",
        "run FAILED reason= exit=76 logs=some",
        "job.log",
    ),
    Sample("head-is-loopback", OURS, "", "run FAILED reason= exit=76 logs=none"),
    Sample("node-unfit-exit", "slurm/node.py: CHECK_FAILED", STEP, "run FAILED reason= exit=20 logs=some"),
    raised(
        "shm-full",
        "NVIDIA/nccl: src/misc/shmutils.cc",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\nncclSystemError: System call failed.\nLast error:\nError while creating shared memory segment /dev/shm/nccl-Ab12 (size 9637888)",
    ),
    raised(
        "disk-full",
        "errno 28 as Python prints it",
        "OSError: [Errno 28] No space left on device: '/scratch/local/cache/x'",
    ),
    pyxis(
        "disk-full",
        "squashfs-tools: unsquashfs",
        "Write on output file failed because No space left on device",
        "FATAL ERROR: writer: failed to write data block 0",
    ),
    raised(
        "quota", "errno 122 as Python prints it", "OSError: [Errno 122] Disk quota exceeded: '/home/u/runs/r/titan/tb'"
    ),
    raised(
        "stale-handle",
        "errno 116 as Python prints it",
        "OSError: [Errno 116] Stale file handle: '/data/c4/en/c4-train.00001-of-01024.json.gz'",
    ),
    raised(
        "read-only", "errno 30 as Python prints it", "OSError: [Errno 30] Read-only file system: '/opt/titan/outputs'"
    ),
    Sample(
        "no-pyxis",
        "measured: Slurm 22.05 without Pyxis",
        "srun: unrecognized option '--container-image=/nope/x.sqsh'\nTry \"srun --help\" for more information\n",
        log="job.log",
    ),
    pyxis(
        "image-from-registry",
        "NVIDIA/pyxis issue 67",
        "[INFO] Querying registry for permission grant",
        "[ERROR] URL https://registry-1.docker.io/v2/library/x/manifests/latest returned error code: 401 Unauthorized",
    ),
    Sample(
        "image-from-registry",
        "NVIDIA/pyxis issue 127",
        "pyxis: importing docker image: titan.sqsh\nslurmstepd: error: pyxis: child 7 failed with error code: 1\n",
        log="job.log",
    ),
    Sample(
        "image-missing",
        MEASURED,
        "slurmstepd: error: pyxis: child 771 failed with error code: 1\nslurmstepd: error: pyxis: failed to create container filesystem for image: /nope/x.sqsh\nslurmstepd: error: pyxis: printing enroot log file:\nslurmstepd: error: pyxis:     [ERROR] No such file or directory: /nope/x.sqsh\n",
        log="job.log",
    ),
    pyxis("image-not-squashfs", MEASURED, "[ERROR] Invalid image format: /data/x.sqsh"),
    pyxis(
        "image-damaged",
        MEASURED,
        "Read on filesystem failed because EOF",
        "FATAL ERROR: File system corruption detected",
    ),
    pyxis("image-damaged", MEASURED, "FATAL ERROR: File system corruption detected"),
    pyxis(
        "image-has-devices",
        MEASURED,
        "create_inode: could not create character device /tmp/x/dev/null, because you're not superuser!",
    ),
    Sample(
        "mount-source",
        MEASURED,
        "slurmstepd: error: pyxis: --container-mounts: source path does not exist: /nope/dir\n",
        log="job.log",
    ),
    Sample(
        "mount-target",
        MEASURED,
        "srun: error: pyxis: mount target must be a relative path or an absolute path\n",
        log="job.log",
    ),
    pyxis("wrong-architecture", MEASURED, "enroot-switchroot: failed to execute: /bin/sh: Exec format error"),
    Sample("wrong-architecture", MEASURED, "enroot-switchroot: failed to execute: /bin/sh: Exec format error\n"),
    Sample(
        "wrong-architecture",
        "slurmstepd's execve, with errno 8",
        "slurmstepd-gpu001: error: execve(): /usr/bin/python3: Exec format error\n",
    ),
    Sample("command-missing", MEASURED, "slurmstepd-gpu001: error: execve(): python3: No such file or directory\n"),
    pyxis(
        "command-missing",
        "NVIDIA/pyxis issue 61",
        "enroot-switchroot: failed to execute: /bin/bash: No such file or directory",
    ),
    pyxis(
        "dev-fuse",
        MEASURED,
        "fuse: failed to open /dev/fuse: Permission denied",
        "[ERROR] Failed to mount: /data/x.sqsh",
    ),
    pyxis(
        "user-namespaces", "NVIDIA/pyxis issue 36", "enroot-nsenter: failed to create user namespace: Permission denied"
    ),
    pyxis(
        "user-namespaces",
        "the kernel's ENOSPC above user.max_user_namespaces",
        "enroot-nsenter: failed to create user namespace: No space left on device",
    ),
    pyxis("mount-failed", "NVIDIA/enroot issue 141", "[ERROR] Failed to mount: /mnt/alpine.sqsh"),
    pyxis(
        "no-container-cli",
        MEASURED,
        "[ERROR] Command not found: nvidia-container-cli, see https://github.com/NVIDIA/libnvidia-container",
        "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1",
    ),
    pyxis(
        "driver-too-old-for-image",
        "NVIDIA/libnvidia-container",
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0",
        "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1",
    ),
    pyxis(
        "container-cli",
        "NVIDIA/pyxis issue 122",
        "nvidia-container-cli: ldcache error: process /sbin/ldconfig failed with error code: 1",
    ),
    pyxis(
        "nvidia-hook", "NVIDIA/pyxis issue 101", "[ERROR] /etc/enroot/hooks.d/98-nvidia.sh exited with return code 1"
    ),
    Sample(
        "oom-kill",
        "slurmstepd 22.05",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.0. Some of your processes may have been killed by the cgroup out-of-memory handler.\n",
        log="job.log",
    ),
    Sample(
        "oom-kill",
        "slurmstepd after 22.05, as users quote it",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n",
        log="job.log",
    ),
    Sample("oom-kill", "srun 22.05", "srun: error: gpu001: task 0: Out Of Memory\n", log="job.log"),
    Sample("oom-kill", "Slurm's state", "", "run OUT_OF_MEMORY reason=OutOfMemory exit=None logs=some"),
    Sample(
        "killed",
        "torch: elastic/multiprocessing/api.py",
        "E1122 14:50:52.956000 5552 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 5686) of binary: python3\n",
    ),
    Sample("killed", "128 + SIGKILL", "", "run FAILED reason= exit=137 logs=some"),
    Sample(
        "time-limit",
        "measured: Slurm 22.05",
        "slurmstepd: error: *** JOB 5 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO TIME LIMIT ***\n",
        log="job.log",
    ),
    Sample("time-limit", "Slurm's state", "", "run TIMEOUT reason= exit=143 logs=some"),
    Sample(
        "node-failure",
        "slurmstepd 22.05",
        "slurmstepd: error: *** STEP 5.0 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n",
        "run NODE_FAIL reason= exit=143 logs=some",
        "job.log",
    ),
    Sample(
        "preempted",
        "slurmstepd 22.05",
        "slurmstepd: error: *** JOB 5 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 DUE TO PREEMPTION ***\n",
        "run PREEMPTED reason= exit=143 logs=some",
        "job.log",
    ),
    Sample(
        "launch-failure",
        "measured: Slurm 22.05, logs/ not writable (0:53)",
        "",
        "run FAILED reason=JobLaunchFailure exit=None logs=none",
    ),
    Sample("launch-failure", "measured: Slurm 22.05, as sacct tells it", "", "run FAILED reason= exit=0 logs=none"),
    Sample(
        "step-refused",
        "srun 22.05",
        "srun: error: Unable to create step for job 12: Requested node configuration is not available\n",
        log="job.log",
    ),
    Sample(
        "cancelled",
        "slurmstepd 22.05",
        "slurmstepd: error: *** STEP 5.0 ON gpu001 CANCELLED AT 2026-11-22T14:50:52 ***\n",
        "run CANCELLED reason= exit=143 logs=some",
        "job.log",
    ),
    raised(
        "driver-too-old",
        "gpustack issue 1254",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW",
    ),
    raised(
        "driver-too-old",
        "CUDA: cudaErrorInsufficientDriver",
        "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    ),
    raised(
        "driver-too-old",
        "torch for CUDA, as users quote it",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12080).",
    ),
    raised(
        "no-kernel-image",
        "pytorch issue 31285",
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
    ),
    raised(
        "ptxas",
        "triton issue 8539, where it is sm_121a",
        "torch._inductor.exc.InductorError: PTXASError: PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : Value 'sm_103a' is not defined for option 'gpu-name'",
    ),
    raised(
        "gpu-memory",
        "torch for CUDA, as users quote it",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 2 has a total capacity of 79.2 GiB",
    ),
    raised(
        "gpu-broken",
        "CUDA: cudaErrorECCUncorrectable",
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    ),
    raised(
        "fabric-not-ready",
        "haotian-liu/LLaVA issue 683",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    ),
    raised("no-gpu", "torch: libtorch", "RuntimeError: No CUDA GPUs are available"),
    raised(
        "hub-gated",
        "huggingface_hub: utils/_http.py",
        "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1)\n\nCannot access gated repo for url https://huggingface.co/x.",
    ),
    raised(
        "hub-401",
        "huggingface_hub: utils/_http.py",
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1)",
    ),
    raised(
        "hub-403",
        "huggingface_hub: utils/_http.py",
        "huggingface_hub.errors.HfHubHTTPError: (Request ID: Root=1)\n\n403 Forbidden: no access.\nCannot access content at: https://huggingface.co/x.",
    ),
    raised(
        "hub-429",
        "huggingface_hub 1.33: utils/_http.py",
        "huggingface_hub.errors.HfHubHTTPError: (Request ID: Root=1)\n\n429 Too Many Requests for url: https://huggingface.co/x.",
    ),
    raised(
        "hub-429",
        "httpx's words, around which huggingface_hub puts its own",
        "huggingface_hub.errors.HfHubHTTPError: Client error '429 Too Many Requests' for url 'https://huggingface.co/x'",
    ),
    raised(
        "hub-offline",
        "huggingface_hub: utils/_http.py",
        "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://huggingface.co/x: offline mode is enabled.",
    ),
    raised(
        "hub-unreachable",
        "datasets: load.py",
        "ConnectionError: Couldn't reach 'allenai/c4' on the Hub (ConnectTimeout)",
    ),
    raised(
        "builder-config", "measured: datasets 4.7", "ValueError: BuilderConfig 'en' not found. Available: ['default']"
    ),
    raised("no-data-files", "datasets: load.py", "FileNotFoundError: Couldn't find any data file at /data/c4."),
    raised("shard-damaged", "Python: gzip", "gzip.BadGzipFile: Not a gzipped file (b've')"),
    raised(
        "shard-damaged", "Python: gzip", "EOFError: Compressed file ended before the end-of-stream marker was reached"
    ),
    raised(
        "dp-degree",
        "torchtitan 0.3.0: components/dataloader.py",
        "AssertionError: dp_degree is inconsistent before and after checkpoint, dataloader resharding is not supported yet.",
    ),
    raised(
        "loss-not-finite",
        "torchtitan 0.3.0: trainer.py",
        "RuntimeError: Loss is not finite (global_avg_loss=nan) at step 12. Stopping training.",
    ),
    raised(
        "loss-not-finite",
        "torch: clip_grad_norm_",
        "RuntimeError: The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped.",
    ),
    raised(
        "tokenizer-missing",
        "torchtitan 0.3.0: components/tokenizer.py",
        "FileNotFoundError: Tokenizer path '/data/tokenizer' does not exist",
    ),
    raised(
        "tokenizer-missing",
        "torchtitan 0.2.2: components/tokenizer.py",
        "FileNotFoundError: No supported tokenizer files found in '/data'. Available files: [].",
    ),
    Sample(
        "unknown-setting",
        "tyro 1.0, which reads the options of torchtitan 0.3.0",
        "Unrecognized options: --bogus.option, 3\n",
    ),
    Sample(
        "unknown-setting",
        "tyro 1.0, as it is printed",
        "╭─ Unrecognized options ──────────╮\n│ Unrecognized options: --bogus.option=1   │\n",
    ),
    raised(
        "nccl-no-interface",
        "NVIDIA/nccl: bootstrap",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, internal error\nncclInternalError: Internal check failed.\nLast error:\nBootstrap : no socket interface found",
    ),
    raised(
        "nccl-locked-memory",
        "NVIDIA/nccl: misc/ibvwrap.cc",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\nncclSystemError: System call failed.\nLast error:\nCall to ibv_create_cq failed with error Cannot allocate memory",
    ),
    Sample(
        "nccl-ib",
        "NVIDIA/nccl-tests issues 185, 227",
        "gpu001:5771:5771 [0] misc/ibvwrap.cc:187 NCCL WARN Call to ibv_modify_qp failed with error Connection timed out\n"
        + RANK
        + "[rank0]:[rank2]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\n",
    ),
    raised(
        "port-in-use",
        "torch: c10d sockets",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, code: -98, name: EADDRINUSE, message: address already in use",
    ),
    Sample(
        "nccl-timeout",
        "torch: ProcessGroupNCCL.cpp",
        "[rank0]:[E1122 14:50:52.1 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)\n",
    ),
    raised(
        "nccl-peer-gone",
        "NVIDIA/nccl issue 2076",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.21.5",
    ),
    raised(
        "nccl-system",
        "NVIDIA/nccl issue 1016",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1275, unhandled system error (run with NCCL_DEBUG=INFO for details)",
    ),
    raised(
        "nccl-cuda",
        "NVIDIA/nccl: ncclUnhandledCudaError",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled cuda error",
    ),
    pyxis("container-not-started", "NVIDIA/pyxis issue 135"),
    raised(
        "head-unreachable",
        "torch: c10d sockets",
        "torch.distributed.DistNetworkError: The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29001).",
    ),
    raised(
        "rendezvous-timeout",
        "torch: dynamic_rendezvous.py",
        "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError",
    ),
    raised(
        "rendezvous-closed",
        "torch: dynamic_rendezvous.py",
        "torch.distributed.elastic.rendezvous.api.RendezvousClosedError",
    ),
    raised(
        "peer-gone",
        "gloo: transport/tcp/pair.cc",
        "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18345.",
    ),
    Sample(
        "rendezvous-gone",
        "measured: torch 2.13",
        "W1122 14:50:52.945000 5552 dynamic_rendezvous.py:1346] The node 'gpu003_0' has failed to send a keep-alive heartbeat to the rendezvous 'x' due to an error of type RendezvousConnectionError.\n",
    ),
)


def failure(folder: Path, ended: str = FAILED, **logs: str) -> Failure:
    """What is said of a run with these logs: `job`, and `node0`, `node1`, ..."""
    for name, text in logs.items():
        file = "job.log" if name == "job" else f"000{name[-1]}-gpu00{name[-1]}.log"
        (folder / file).write_text(text)
    return explain(folder, ended, "my-run", folder.parent / "my run")
