"""Quantization in both eras, as far as a machine without a GPU goes: the layers are swapped, a step in emulated float8
is made, and the kernels that MXFP8 and NVFP4 cast with compile for Blackwell. torchtitan asks for the GPU's capability:
that answer is made up.
"""

from __future__ import annotations

import runpy
import subprocess

import pytest

from tests.conftest import ROOT
from tests.train.test_real_trainer import answer, python, versions

__all__ = ["python"]  # a fixture

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
from torchtitan.components.quantization import float8, mx, nvfp4
from torchtitan.models.llama3 import config_registry
from launcher.titan import registry_era
mx.has_cuda_capability = float8.has_cuda_capability = nvfp4.has_cuda_capability = lambda major, minor: True

def swapped(kind, value):
    if isinstance(value, (list, tuple)):
        return sum(swapped(kind, item) for item in value)
    if not dataclasses.is_dataclass(value):
        return 0
    inside = (getattr(value, field.name) for field in dataclasses.fields(value))
    return (type(value) is kind) + sum(swapped(kind, item) for item in inside)

def layers(flavor, quantize):
    module, function = registry_era.starting_point(flavor, quantize)
    return getattr(config_registry if module == "llama3" else registry_era, function)().model_spec.model.layers

linears = swapped(float8.Linear.Config, layers("8B", "none")) // 32
assert swapped(mx.MXFP8Linear.Config, layers("8B", "mxfp8")) == linears * 32
assert mx.MXFP8Linear.forward.__module__ == registry_era.__name__  # torch without CUDA has no kernel of torchao's
assert swapped(nvfp4.NVFP4Linear.Config, layers("8B", "nvfp4")) == linears * 27  # 85%
for flavor, count in (("8B", 32), ("70B", 80)):
    found = layers(flavor, "float8")
    assert swapped(float8.Float8Linear.Config, found) == linears * count
    first = found[0].attention.wo._torchao_config
    assert first.cast_config_weight.scaling_granularity.value == "tensorwise"
""",
}

# One forward and backward pass in float8 as the recipes ask for it; its matrix products are emulated.
STEP = """
import dataclasses, torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=True)
torch.manual_seed(0)
plain = torch.nn.Linear(64, 32)
model = convert_to_float8_training(torch.nn.Sequential(plain), config=config)
x = torch.randn(16, 64, requires_grad=True)
model(x).square().mean().backward()
assert type(model[0]).__name__ == "Float8Linear" and model[0].weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
torch.testing.assert_close(model(x), plain(x), rtol=0.1, atol=0.1)
"""


OLD_TRITON = """
import importlib.metadata
assert tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 9)
"""


def titan(python: str) -> str:
    found = versions(python)
    assert found
    return found[0][:3]


def test_the_layers_are_swapped(python: str) -> None:
    answer(python, LAYERS[titan(python)])


def test_a_step_in_float8(python: str) -> None:
    answer(python, STEP)


@pytest.mark.parametrize("quantize", ["mxfp8", "nvfp4"])
def test_the_kernels_compile_for_blackwell(python: str, quantize: str) -> None:
    """By the program with which containers/check.py tries an image."""
    if quantize == "nvfp4" and titan(python) == "0.2":
        pytest.skip("torchtitan 0.2 has no NVFP4")
    if quantize == "nvfp4" and subprocess.run([python, "-c", OLD_TRITON]).returncode:
        pytest.skip("torchao 0.18 cannot be imported with triton 3.9 where there is a GPU")
    answer(python, runpy.run_path(str(ROOT / "containers" / "check.py"))["KERNELS"], quantize)
