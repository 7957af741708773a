"""torchtitan 0.2.x: one TOML file holds every setting; options on the command line win over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import Refused

CONFIG_FILE = "job/titan.toml"  # below the run directory
_OWN_KEYS = ("job.config_file", "job.config-file")

_QUANTIZE: dict[str, dict[str, Any]] = {
    "none": {"model.converters": []},
    # Tensorwise scaling with float8 all-gathers: what torchtitan's own H100 and H200 benchmarks used.
    "float8": {
        "model.converters": ["quantize.linear.float8"],
        "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True,
        "quantize.linear.float8.filter_fqns": ["output"],
    },
    "mxfp8": {
        "model.converters": ["quantize.linear.mx"],
        "quantize.linear.mx.recipe_name": "mxfp8_cublas",
        "quantize.linear.mx.filter_fqns": ["output"],
    },
}


def settings(node: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by dotted name, in the words of torchtitan 0.2's JobConfig."""
    recipe = node["recipe"]
    if recipe["quantize"] == "mxfp8" and recipe["compile"] and recipe["tensor_parallel"] > 1:
        raise Refused(
            "torchtitan 0.2 has no MXFP8 with both torch.compile and tensor parallelism",
            "tensor_parallel = 1, or compile = false",
        )
    if recipe["quantize"] not in _QUANTIZE:
        raise Refused(
            f"torchtitan 0.2 has no {recipe['quantize']}", f"one of {', '.join(_QUANTIZE)}; or torchtitan 0.3"
        )
    path = None if node["placed"]["data"] == "hub" else node["placed"]["data"]
    return {
        "job.dump_folder": f"{node['placed']['run_dir']}/titan",
        "job.description": f"{recipe['model']} {recipe['flavor']}",
        "model.name": recipe["model"],
        "model.flavor": recipe["flavor"],
        "model.hf_assets_path": node["placed"]["tokenizer"],
        "optimizer.name": "AdamW",
        "optimizer.lr": float(recipe["lr"]),
        "training.dataset": recipe["dataset"],
        "training.dataset_path": path,
        **common,
        **({"parallelism.enable_async_tensor_parallel": True} if recipe["async_tensor_parallel"] else {}),
        "activation_checkpoint.mode": recipe["activation_checkpoint"],
        # Per operator, not every second layer: what the published rows used, and all that 0.3 has.
        "activation_checkpoint.selective_ac_option": "op",
        **_QUANTIZE[recipe["quantize"]],
        "profiling.enable_profiling": False,
        "validation.enable": False,
        "validation.dataset_path": path,
        "validation.local_batch_size": recipe["local_batch_size"],
        "validation.seq_len": recipe["seq_len"],
    }


def arguments(
    node: Mapping[str, Any], common: Mapping[str, Any], user_flags: list[str], torch_version: str
) -> list[str]:
    """The trainer's arguments. `torch_version` plays no part: 0.2 runs on every torch from 2.9 on."""
    for flag in user_flags:
        if flag.lstrip("-").split("=")[0] in _OWN_KEYS:
            raise Refused(f"{flag}: the launcher writes the configuration file itself", "--set SECTION.KEY=VALUE")
    settings(node, common)
    return [f"--job.config_file={node['placed']['run_dir']}/{CONFIG_FILE}", *user_flags]


def config_files(node: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, str]:
    text = "# Written by the launcher for torchtitan 0.2: -m torchtitan.train --job.config_file=THIS\n"
    return {f"{node['placed']['run_dir']}/{CONFIG_FILE}": text + to_toml(settings(node, common))}


def to_toml(flat: Mapping[str, Any]) -> str:
    """Dotted names as TOML tables, in the order of first mention; None is left out."""
    tables: dict[str, list[str]] = {}
    for dotted, value in flat.items():
        table, _, key = dotted.rpartition(".")
        if value is not None:
            tables.setdefault(table, []).append(f"{key} = {_toml_value(value)}")
    return "\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())


def _toml_value(value: Any) -> str:
    """A JSON value is a TOML value, but for DEL in strings; None inside lists does not occur."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
