"""Is a directory a checkpoint in the Hub's format that fits the model? Looks at file headers, reads no weights.

The same check runs where a job is submitted and on every node before torchrun starts: torchtitan itself would find
a missing shard only after all ranks have met, and two of the differences below never.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import LFS_POINTER, Refused, read_object
from .checkpoints import INDEX

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Shape:
    """What of a Llama 3 flavor must agree, in the order and words of transformers' config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def kv_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def layer_parameters(self) -> int:
        hidden = self.hidden_size
        return 2 * hidden * (hidden + self.kv_dim) + 3 * hidden * self.intermediate_size + 2 * hidden

    @property
    def parameters(self) -> int:
        return sum(math.prod(size) for size in wanted_tensors(self).values())

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and Adam's two moments in fp32."""
        return 12 * self.parameters


# As both eras of torchtitan build them (models/llama3/__init__.py).
SHAPES = {
    "debugmodel": Shape(256, 6, 16, 16, 768, 2048),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256),
    "70B": Shape(8192, 80, 64, 8, 28672, 128256),
}
# torchtitan's positions are Llama 3.1's whatever config.json says: another model would train, from a wrong start.
_ROPE_THETA = 500000.0
_ROPE_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_weights(folder: Path, flavor: str) -> int:
    """The number of safetensors files in `folder`, which hold every weight of `flavor` in the right shape.

    Raises Refused for everything else: no directory, another model, a missing, cut, empty or pointer file.
    """
    fix = stage_command(flavor, shlex.quote(str(folder)))
    shape = SHAPES.get(flavor)
    if shape is None:
        raise Refused(f"there is no checkpoint format for the flavor {flavor}", f"one of {', '.join(SHAPES)}")
    if not folder.is_dir():
        raise Refused(f"{folder} is not a directory", f"mount it, or: {fix}")
    try:
        _check_config(read_object(folder / "config.json", fix), shape, flavor, folder)
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        indexed = _indexed(folder, fix)
        if missing := sorted(indexed - set(names)):
            raise Refused(f"{folder}: {len(missing)} of {len(indexed)} shards are missing: {missing[0]}", fix)
        if not names:
            raise Refused(f"{folder} holds no *.safetensors", fix)
        tensors: dict[str, tuple[int, ...]] = {}
        for name in names:
            found = _header(folder / name, fix)
            if twice := sorted(tensors.keys() & found.keys()):
                raise Refused(f"{folder / name}: {twice[0]} is also in another file", f"an empty directory: {fix}")
            tensors |= found
    except OSError as error:
        raise Refused(f"{error.filename or folder}: {error.strerror}", fix) from error
    _check_tensors(tensors, shape, flavor, folder, fix)
    return len(names)


def stage_command(flavor: str, folder: str) -> str:
    """The command that fetches and repairs such a directory; 8B is its default."""
    return f"launcher stage model {'Llama-3.1-70B ' if flavor == '70B' else ''}--to {folder}"


def wanted_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama checkpoint in the Hub's format."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (shape.kv_dim, hidden),
        "self_attn.v_proj": (shape.kv_dim, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    wanted: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for index in range(shape.num_hidden_layers):
        wanted |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return {**wanted, "model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)}


def starting_weights(node: Mapping[str, Any], own: Path | None) -> dict[str, Any]:
    """Facts about where a run with `init_from` gets its weights: its `own` newest checkpoint, else that directory.

    Raises Refused where torchtitan could not start from it.
    """
    if not (folder := node["job"]["init_from"]) or own:
        return {"init_from": str(own)} if folder else {}
    return {"init_from": folder, "init_from_files": check_weights(Path(folder), node["recipe"]["flavor"])}


def _check_config(config: dict[str, Any], shape: Shape, flavor: str, folder: Path) -> None:
    fix = f"stage another: {stage_command(flavor, 'DIR')}; or --recipe with the flavor that fits this one"
    if config.get("model_type") != "llama":
        raise Refused(f"{folder}/config.json: model_type is {config.get('model_type')!r}, not 'llama'", fix)
    found = {"num_key_value_heads": config.get("num_attention_heads"), **config}  # left out: one for each head
    wrong = [f"{key} is {found.get(key)}, not {value}" for key, value in vars(shape).items() if found.get(key) != value]
    if wrong:
        raise Refused(f"{folder}/config.json is not that of {flavor}: {', '.join(wrong)}", fix)
    # transformers 5 writes both into one table.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {key: rope.get(key) for key in _ROPE_SCALING}
    if theta != _ROPE_THETA or scaling != _ROPE_SCALING:
        raise Refused(
            f"{folder}/config.json: rope_theta {theta} with scaling {rope or None} is not Llama 3.1's, and torchtitan"
            " knows no other",
            fix,
        )


def _indexed(folder: Path, fix: str) -> set[str]:
    """The files that the index names; none where there is no index, which a model in one file does not need."""
    if not (folder / INDEX).exists():
        return set()
    weight_map = read_object(folder / INDEX, fix).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{folder / INDEX} has no weight_map", fix)
    return {str(name) for name in weight_map.values()}


def _header(path: Path, fix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in one safetensors file that is whole.

    Eight bytes with the length of a JSON object, the object, then the tensors without a gap: so the object also
    says how long the file must be. Source: https://huggingface.co/docs/safetensors/index#format
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise Refused(f"{path} is a Git LFS pointer, not data", fix)
        if size < 8:
            raise Refused(f"{path} is {'cut off' if size else 'empty'}", fix)
        length = struct.unpack("<Q", start[:8])[0]
        if length > _LARGEST_HEADER:
            raise Refused(f"{path} is not a safetensors file", fix)
        stream.seek(8)
        text = stream.read(length)
    if len(text) < length:
        raise Refused(f"{path} is cut off: {size:,} bytes", fix)
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        shapes: dict[str, tuple[int, ...]] = {name: tuple(map(int, entry["shape"])) for name, entry in table.items()}
        dtypes = {name: entry["dtype"] for name, entry in table.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise Refused(f"{path} is not a safetensors file", fix) from error
    if size != end:
        raise Refused(f"{path} has {size:,} bytes, its header says {end:,}", fix)
    if other := sorted(f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES):
        raise Refused(f"{path}: {other[0]}; torchtitan starts from {', '.join(_DTYPES)} only", fix)
    return shapes


def _check_tensors(found: Mapping[str, tuple[int, ...]], shape: Shape, flavor: str, folder: Path, fix: str) -> None:
    wanted = wanted_tensors(shape)
    if missing := [name for name in wanted if name not in found]:
        raise Refused(f"{folder}: {len(missing)} of {len(wanted)} weights of {flavor} are missing: {missing[0]}", fix)
    for name, size in wanted.items():
        if found[name] != size:
            raise Refused(f"{folder}: {name} has the shape {list(found[name])}, {flavor} needs {list(size)}", fix)
