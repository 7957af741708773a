"""`-m titan.cpu ARGS`: `-m torchtitan.train ARGS` on a machine without an accelerator, over gloo.

torchtitan trains on a CPU once torch answers a few questions that it only answers for GPUs. Nothing of torchtitan
is changed, and nothing at all where an accelerator exists: a GPU that went missing must not become a slow success.
"""

from __future__ import annotations

import atexit
import os
import platform
import resource
import runpy
import sys
import threading
from types import SimpleNamespace
from typing import Any

from . import recorder


def patch() -> bool:
    """Teaches torch what torchtitan asks of a device. False, and nothing done, where there is an accelerator."""
    import torch

    if torch._utils._get_available_device_type() is not None:
        return False
    torch._utils._get_available_device_type = lambda: "cpu"
    _patch_device_module(torch.cpu)
    _patch_collectives()
    _patch_flex_attention()
    return True


def main() -> None:
    # The compiled parts of attention need a C++ compiler, which an image does not have to hold.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    patch()
    recorder.listen()
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)
    end()


def end() -> None:
    """Ends this process when Python would, without its last part: threads of gloo abort it there now and then."""
    for thread in threading.enumerate():  # those that write checkpoints, for one
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _patch_device_module(cpu: Any) -> None:
    """What torchtitan's memory monitor calls; "reserved" memory is the most this process ever had resident."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def memory_stats(device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
        peaks = dict.fromkeys(("active_bytes.all.peak", "reserved_bytes.all.peak"), peak)
        return {**peaks, "num_alloc_retries": 0, "num_ooms": 0}

    cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=total)
    cpu.memory_stats = memory_stats
    cpu.reset_peak_memory_stats = lambda device=None: None
    cpu.empty_cache = lambda: None
    cpu.current_device = lambda: 0


def _patch_collectives() -> None:
    """gloo cannot scale while it sums, and torch before 2.14 has no public way to change a group's timeout."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_and_sum(self: Any, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_and_sum
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda timeout, group=None: dist.distributed_c10d._set_pg_timeout(timeout, group)


def _patch_flex_attention() -> None:
    """torchtitan 0.3's attention has no backward pass on a CPU: a dense one with the same mask stands in."""
    import torch.nn.functional as functional
    from torch.nn.attention import flex_attention as flex

    def dense(
        query: Any,
        key: Any,
        value: Any,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        *,
        return_aux: Any = None,
        **_: Any,
    ) -> Any:
        if score_mod is not None or return_lse or (return_aux is not None and return_aux.lse):
            raise NotImplementedError("attention on a CPU: no score_mod, no log-sum-exp")
        mask = getattr(block_mask, "dense", None)
        if block_mask is not None and mask is None:  # one mask serves every layer of a step
            sizes = query.size(0), None, query.size(-2), key.size(-2)
            mask = block_mask.dense = flex.create_mask(block_mask.mask_mod, *sizes, query.device)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        return output if return_aux is None else (output, flex.AuxOutput())

    flex.flex_attention = dense


if __name__ == "__main__":
    main()
