"""What is trained: the keys of a recipe's file, of `[recipe]` in run.toml, and of "recipe" in node.json."""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = {
    "activation_checkpoint": ("none", "selective", "full"),
    "quantize": ("none", "float8", "mxfp8", "nvfp4"),
    "param_dtype": ("bfloat16", "float32"),
}

# The first compute capability with products of that kind, as torchtitan asks for it in both eras.
NEEDS_CAPABILITY = {"float8": (8, 9), "mxfp8": (10, 0), "nvfp4": (10, 0)}


@dataclass(frozen=True)
class Recipe:
    """What is trained and how, in words that every torchtitan release can be told."""

    model: str = "llama3"
    flavor: str = "8B"  # "debugmodel", "8B", "70B"
    dataset: str = "c4"
    seq_len: int = 8192  # tokens
    local_batch_size: int = 1  # sequences per GPU and step
    global_batch_size: int = -1  # sequences per step; -1: local batch size x data-parallel degree
    steps: int = 100
    log_freq: int = 10  # steps between logged lines
    lr: float = 3e-4
    warmup_steps: int = 200
    seed: int = 0  # 0: torchtitan's own choice
    activation_checkpoint: str = "selective"
    compile: bool = False
    like_for_like: bool = True  # without what newer releases add by themselves, and older ones lack
    quantize: str = "none"
    param_dtype: str = "bfloat16"
    dp_replicate: int = 1
    dp_shard: int = -1  # -1: all ranks that are left
    tensor_parallel: int = 1
    async_tensor_parallel: bool = False  # matrix products overlap with their communication; needs compile
    context_parallel: int = 1
    pipeline_parallel: int = 1
    checkpoint_interval: int = 0  # steps; 0: no checkpoints
    checkpoint_keep: int = 2  # newest checkpoints that stay
    tensorboard: bool = True
