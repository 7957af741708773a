"""torchtitan 0.3.x: a function in a registry gives the starting point, options change it.

Also the registry of what torchtitan's own lacks: `--module titan.registry_era --config llama3_8b_float8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import Refused

_BASE = {"debugmodel": "llama3_debugmodel", "8B": "llama3_8b", "70B": "llama3_70b"}
_OWN_MODULE = f"titan.{__name__.rpartition('.')[2]}"  # this file, as the run directory holds it

# torchtitan 0.3 is made for this torch: older ones lack what its default SPMD backend and its pipelines call.
_TORCH = (2, 14)


def starting_point(flavor: str, quantize: str) -> tuple[str, str]:
    """Module and function that hold the configuration to start from.

    Raises Refused where neither torchtitan nor this module has one.
    """
    if quantize == "none":
        return "llama3", _BASE[flavor]
    if quantize == "mxfp8" and flavor == "8B":
        return _OWN_MODULE, "llama3_8b_mxfp8"
    if quantize == "nvfp4" and flavor == "8B":
        return "llama3", "llama3_8b_first_85_pct_layers_nvfp4"
    if quantize == "float8" and flavor in ("8B", "70B"):
        return _OWN_MODULE, f"{_BASE[flavor]}_float8"
    raise Refused(
        f"torchtitan 0.3 has no {quantize} configuration for {flavor}",
        'quantize = "none", or an image with torchtitan 0.2.2',
    )


def settings(node: Mapping[str, Any], common: Mapping[str, Any], torch_version: str) -> dict[str, Any]:
    """Every setting by dotted name, in the words of torchtitan 0.3's Trainer.Config."""
    recipe = node["recipe"]
    path = None if node["placed"]["data"] == "hub" else node["placed"]["data"]
    cuda = node["profile"]["device"] == "cuda"
    old_torch = bool(torch_version) and _major_minor(torch_version) < _TORCH
    if old_torch and recipe["pipeline_parallel"] > 1:
        raise Refused(
            f"torchtitan 0.3 needs torch 2.14 for pipeline stages, here is {torch_version}",
            "pipeline_parallel = 1, or an image with a newer torch",
        )
    return {
        "dump_folder": f"{node['placed']['run_dir']}/titan",
        "hf_assets_path": node["placed"]["tokenizer"],
        "dataloader.dataset": recipe["dataset"],
        "dataloader.dataset_path": path,
        "optimizer.param_groups.0.optimizer_kwargs.lr": float(recipe["lr"]),
        **common,
        **({"parallelism.spmd_backend": "partial_dtensor"} if old_torch else {}),
        # What 0.3 adds to a run by itself, and 0.2 did not have. CUDA graphs cannot be had with pipeline stages.
        "training.disable_cuda_graphs": recipe["like_for_like"] or not cuda or recipe["pipeline_parallel"] > 1,
        **({"loss.num_chunks": 1} if recipe["like_for_like"] else {}),
        **({"compile.enable_async_tensor_parallel": True} if recipe["async_tensor_parallel"] else {}),
        "profiler.enable_profiling": False,
        "debug.enable_structured_logging": False,
        "validator.enable": False,
        "validator.dataloader.dataset_path": path,
    }


def arguments(
    node: Mapping[str, Any], common: Mapping[str, Any], user_flags: list[str], torch_version: str
) -> list[str]:
    """The trainer's arguments. Options of the activation checkpointing follow its subcommand, all others precede it."""
    recipe = node["recipe"]
    module, function = starting_point(recipe["flavor"], recipe["quantize"])
    checkpointing = [flag for flag in user_flags if flag.replace("-", "_").startswith("__activation_checkpoint.")]
    for flag in checkpointing:
        if flag.startswith(("--activation_checkpoint.mode", "--activation-checkpoint.mode")):
            raise Refused(f"{flag}: torchtitan 0.3 has no such setting", "--set recipe.activation_checkpoint=full")
    return [
        f"--module={module}",
        f"--config={function}",
        *(flag_of(key, value) for key, value in settings(node, common, torch_version).items()),
        *(flag for flag in user_flags if flag not in checkpointing),
        f"activation-checkpoint:{recipe['activation_checkpoint']}",
        *checkpointing,
    ]


def config_files(node: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, str]:
    return {}


def flag_of(dotted: str, value: Any) -> str:
    """An option of the trainer's, whose parser takes no value after a switch."""
    section, _, name = dotted.rpartition(".")
    prefix = f"--{section}." if section else "--"
    if isinstance(value, bool):
        return f"{prefix}{'' if value else 'no_'}{name}"
    return f"{prefix}{name}={','.join(value) if isinstance(value, list) else value}"


def _major_minor(version: str) -> tuple[int, int]:
    numbers = re.match(r"([0-9]{1,4})\.([0-9]{1,4})(?![0-9A-Za-z])", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (99, 0)


def llama3_8b_float8() -> Any:
    """torchtitan's llama3_8b with every linear layer but the last in float8, one scale for each tensor, as in 0.2."""
    return _float8("8B")


def llama3_70b_float8() -> Any:
    """The same for llama3_70b."""
    return _float8("70B")


def _float8(flavor: str) -> Any:
    from torchtitan.components.quantization import Float8LinearConverter
    from torchtitan.models.llama3 import config_registry, model_registry

    config = getattr(config_registry, _BASE[flavor])()
    # Scaled row by row, torchtitan's default, it was published to gain 4% on a B200, and tensor by tensor 25%.
    converter = Float8LinearConverter.Config(recipe_name="tensorwise", filter_fqns=["lm_head"])
    config.model_spec = model_registry(flavor, converters=[converter])
    return config


def llama3_8b_mxfp8() -> Any:
    """torchtitan's own, with casts that its torchao has on this machine."""
    from torchtitan.models.llama3 import config_registry

    if not _has_cuda_kernel("torchao::mxfp8_quantize"):
        _cast_by_triton()
    return config_registry.llama3_8b_mxfp8()


def _has_cuda_kernel(operator: str) -> bool:
    """Of torchao's wheels for arm64 many are Python alone, and their operators have no kernel."""
    import torch
    import torchao.prototype.mx_formats.kernels  # noqa: F401 loads what there is

    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"))
    except RuntimeError:  # not even the operator
        return False


def _cast_by_triton() -> None:
    """MXFP8Linear with its casts along the first dimension, which the backward pass needs, by Triton."""
    import torch
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.mx_formats import config
    from torchtitan.components.quantization.mx import MXFP8Linear

    def forward(self: Any, input: Any) -> Any:
        output = mx_mm.apply(
            input,
            self.weight,
            *[torch.float8_e4m3fn] * 3,
            32,  # the block of MX formats
            self.kernel_preference,
            config.MXFP8Dim0CastKernelChoice.TRITON,
            config.MXFP8Dim1CastKernelChoice.TRITON,
            self.scale_calculation_mode,
            self.wgrad_with_hp,
        )
        return output if self.bias is None else output + self.bias.to(output.dtype)

    MXFP8Linear.forward = forward
