"""MXFP8 in both eras, as far as a machine without a GPU goes: the layers are swapped, and the cast that the backward
pass needs compiles for Blackwell. torchtitan asks for the GPU's capability: that answer alone is made up.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.train.test_real_trainer import python, versions

__all__ = ["python"]  # a fixture

CAST = """
import sys, torch, torch.utils._triton
torch.utils._triton.has_triton = torch.cuda.is_available = lambda: True  # torchao defines its kernels then
import torchao.utils
torchao.utils.is_sm_at_least_100 = lambda: True
torchao.utils.is_cuda_version_at_least = lambda major, minor: True
from torchao.prototype.mx_formats import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = kernels.to_mxfp8_dim1_kernel
while not isinstance(kernel, triton.JITFunction):
    kernel = kernel.fn
known = {"ROW_TILE_SIZE": 128, "COL_TILE_SIZE": 128, "INNER_BLOCK_SIZE": 32, "SCALING_MODE": "rceil"}
types = {"x_ptr": "*bf16", "output_col_major_ptr": "*fp8e4nv", "col_scale_ptr": "*u8", "n_rows": "i32", "n_cols": "i32"}
source = ASTSource(kernel, signature=types | dict.fromkeys(known, "constexpr"), constexprs=known)
made = triton.compile(source, target=GPUTarget("cuda", 100, 32)).asm
assert ".target sm_100a" in made["ptx"] and len(made["cubin"]) > 1000
"""

LAYERS = {
    "0.2": """
import torch, torchtitan.components.quantization.mx as mx
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
mx.has_cuda_capability = lambda major, minor: True
config = JobConfig()
config.quantize.linear.mx.filter_fqns = ["output"]
dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
model = torch.nn.ModuleDict({"wq": torch.nn.Linear(64, 64), "output": torch.nn.Linear(64, 64)})
mx.MXLinearConverter(config, dims).convert(model)
assert type(model["wq"]).__name__ == "MXLinear" and type(model["output"]).__name__ == "Linear"
assert model["wq"].config.mxfp8_dim1_cast_kernel_choice.name == "TRITON"
""",
    "0.3": """
import dataclasses
import torchtitan.components.quantization.mx as mx
from launcher.titan import registry_era
mx.has_cuda_capability = lambda major, minor: True
config = registry_era.llama3_8b_mxfp8()
layers = config.model_spec.model.layers

def swapped(value):
    if isinstance(value, (list, tuple)):
        return sum(map(swapped, value))
    if not dataclasses.is_dataclass(value):
        return 0
    inside = (getattr(value, field.name) for field in dataclasses.fields(value))
    return (type(value) is mx.MXFP8Linear.Config) + sum(map(swapped, inside))

assert swapped(layers) >= 5 * 32, swapped(layers)
assert mx.MXFP8Linear.forward.__module__ == registry_era.__name__  # torch without CUDA has no kernel of torchao's
""",
}


def run(python: str, program: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=env, cwd=Path("/"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_layers_are_swapped(python: str) -> None:
    found = versions(python)
    assert found
    run(python, LAYERS[found[0][:3]])


def test_the_cast_compiles_for_blackwell(python: str) -> None:
    run(python, CAST)
