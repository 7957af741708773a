"""One worker a GPU (or CPU rank): reads commands as JSON lines, answers each with one line.

    python3 -m check.speed DEVICE LOCAL_RANK

It is a process of its own because CUDA and NCCL can hang where nothing but a kill helps, and because all of its GPU
memory is free again the moment it has ended. It never outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
IMAGE = "an image that holds it (containers/ builds one), or with --runtime bare: --python PATH/TO/python3"
COLLECTIVE_S = 240  # a process group that does not come up in this time has lost somebody; torchtitan waits 300
# Per device: side of the square matrices, bytes copied, bytes summed over all ranks, seconds of measuring.
SIZES = {
    "cuda": (8192, 1 << 30, 1 << 28, 1.0),
    "cpu": (512, 1 << 25, 1 << 22, 0.25),
}
TFLOP, GB = 1e12, 1e9


def main(argv: list[str]) -> int:
    device, rank = argv[1], int(argv[2])
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # NCCL and others print to standard output
    try:
        import torch
    except Exception as error:  # a broken image breaks here in many ways
        torch, failed = None, f"import torch fails: {_said(error)}"
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = (
                {"problem": failed, "fix": IMAGE, "fault": "run"}
                if torch is None
                else _do(torch, command, device, rank)
            )
        except Exception as error:  # CUDA, NCCL and gloo have no common root; what they say is the answer
            answer = {"problem": f"{command['do']}: {_said(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # without the destructors of process groups whose peers may have gone


def _do(torch: Any, command: dict[str, Any], device: str, rank: int) -> dict[str, Any]:
    if command["do"] == "look":
        return look(torch, device, command["gpus"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    if command["do"] == "measure":
        return {"product_tflops": product_tflops(torch, device), "copy_gbs": copy_gbs(torch, device)}
    if command["do"] == "host":
        return _host(torch)
    return {"allreduce_gbs": _allreduce(torch, device, command, rank)}


def look(torch: Any, device: str, expected: int) -> dict[str, Any]:
    """Versions, and as many usable GPUs as the profile says. A missing one is never a reason to train on the CPU."""
    found: dict[str, Any] = {"torch": str(torch.__version__), "cuda": torch.version.cuda or "", "nccl": ""}
    if device == "cpu":
        return {**found, "gpus": 0, "gpu": "CPU", "gpu_names": []}
    if not torch.version.cuda:
        why = f"torch {torch.__version__} was built without CUDA"
        return {**found, "problem": why, "fix": "use an image with a CUDA build of torch", "fault": "run"}
    visible = torch.cuda.device_count()
    try:
        torch.cuda.init()
        names = [torch.cuda.get_device_name(index) for index in range(visible)]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # an old driver, a missing one and a broken GPU come in different classes
        why = f"CUDA {torch.version.cuda} does not start: {' '.join(str(error).split())}"
        fix = (
            "run nvidia-smi in the container; the image needs NVIDIA_VISIBLE_DEVICES=all and"
            " NVIDIA_DRIVER_CAPABILITIES=compute,utility, the node a driver for this CUDA"
        )
        return {**found, "problem": why, "fix": fix, "fault": "node" if visible else "run"}  # none: the image
    found.update(gpus=visible, gpu=names[0] if names else "", gpu_names=names)
    if visible != expected:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        found["problem"] = f"{visible} GPUs are visible, the profile says {expected}"
        found["fault"] = "node" if 0 < visible < expected else "run"  # no node has lost all, or found one
        found["fix"] = (
            f"nvidia-smi -L on this node; the job must ask for --gres=gpu:{expected}, and CUDA_VISIBLE_DEVICES"
            f" ({hidden}) must not hide any"
        )
    elif len(set(names)) > 1:
        found["problem"] = f"different GPUs in one node: {', '.join(sorted(set(names)))}"
        found["fix"] = "nvidia-smi -L on this node; leave it out: --exclude NODE"
    return found


def product_tflops(torch: Any, device: str) -> float:
    """TFLOP/s of a square matrix product in the type that is trained in: bfloat16, on a CPU float32.

    2 n^3 operations each. Several products per sample hide the cost of waiting for the GPU; the median of the samples
    is taken after a warm-up, in which clocks rise and the library chooses its kernel.
    """
    side, _, _, seconds = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    taken = _median_s(lambda: torch.mm(left, right, out=out), torch, device, seconds, 10)
    return 2 * side**3 / taken / TFLOP


def copy_gbs(torch: Any, device: str) -> float:
    """GB/s of a copy within the device's memory: every byte is read and written, and counted as two."""
    _, size, _, seconds = SIZES[device]
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = _median_s(lambda: target.copy_(source), torch, device, seconds / 2, 5)
    return 2 * size / taken / GB


def _median_s(work: Callable[[], Any], torch: Any, device: str, seconds: float, batch: int) -> float:
    """Seconds that `work` takes: the median over samples of `batch` calls, for at least `seconds` and 5 samples.

    On a CPU only the time counts in which this process had a core: there are more processes than cores in a test.
    """
    wait, clock = _wait(torch, device), time.perf_counter if device == "cuda" else time.process_time
    samples: list[float] = []
    for _ in range(batch):
        work()
    wait()
    end = time.perf_counter() + seconds
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 200):
        began = clock()
        for _ in range(batch):
            work()
        wait()
        samples.append((clock() - began) / batch)
    return max(statistics.median(samples), 1e-9)


def _wait(torch: Any, device: str) -> Callable[[], Any]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _host(torch: Any) -> dict[str, Any]:
    """The store at which the job's ranks meet, on a free port; lives as long as this worker."""
    global _STORE
    _STORE = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return {"port": _STORE.port}


_STORE: Any = None


def _allreduce(torch: Any, device: str, command: dict[str, Any], rank: int) -> float:
    """Bus bandwidth in GB/s of a sum over `world` ranks: 2 (n - 1) / n x bytes / time, as nccl-tests counts it.

    That is what each rank's link carries, so figures of different numbers of ranks can be compared. All ranks take
    the slowest one's time.
    """
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=COLLECTIVE_S)
    world = command["world"]
    store = dist.TCPStore(command["address"], command["port"], is_master=False, timeout=limit)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=command["first"] + rank, world_size=world, timeout=limit)
    size = SIZES[device][2]
    values = torch.zeros(size // 4, device=device, dtype=torch.float32)
    wait = _wait(torch, device)

    def seconds(count: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(values)
        wait()
        slowest = torch.tensor([(time.perf_counter() - began) / count], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest.item())

    seconds(2)  # connections are made, and NCCL chooses its way
    once = seconds(1)
    taken = seconds(max(2, min(20, int(SIZES[device][3] / max(once, 1e-6)))))
    dist.destroy_process_group()
    return float(2 * (world - 1) / world * size / max(taken, 1e-9) / GB)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
