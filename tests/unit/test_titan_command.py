"""node.json -> torchrun's command line, for both eras of torchtitan. The command lines are written out in full."""

from __future__ import annotations

import copy
import sys
import tomllib
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.titan import Refused, cpu, toml_era
from launcher.titan.command import (
    Rendezvous,
    common_settings,
    config_files,
    era,
    shown_local_rank,
    torchrun_command,
    trainer_arguments,
)
from launcher.titan.recipe import Recipe

LLAMA3_8B: dict[str, Any] = {
    "schema": 2,
    "job": {"nodes": 9, "gpu": "gb200", "recipe": "llama3-8b", "init_from": "", "checkpoint_dir": "", "check": "off"},
    "profile": {"gpu": "GB200", "device": "cuda", "gpus_per_node": 4, "scratch": ""},
    "recipe": vars(Recipe(local_batch_size=5)),
    "titan": {},
    "placed": {
        "run_dir": "/runs/one",
        "data": "/data/c4",
        "data_source": "/data/c4",
        "tokenizer": "/data/tokenizers/Llama-3.1-8B",
    },
}
NINE_NODES = Rendezvous("4711", 2, "gpu-003", "10.0.0.1", 24711)


def torchrun(start: str, rendezvous: str, rank: str) -> list[str]:
    """The part of a command line that both eras share; its words, as nobody here has a space in one."""
    return f"""
        {start} {rendezvous} --max-restarts=0 --role=rank --tee=3 --local-ranks-filter=0
        --log-dir=/runs/one/logs/ranks/{rank} -m
    """.split()


TORCHRUN_NINE = torchrun(
    "python3 -m torch.distributed.run --nnodes=9 --nproc-per-node=4 --rdzv-id=4711",
    "--rdzv-backend=static --rdzv-endpoint=10.0.0.1:24711 --node-rank=2 --rdzv-conf=timeout=900",
    "0002-gpu-003",
)
REGISTRY_ERA = """
--module=llama3 --config=llama3_8b
--dump_folder=/runs/one/titan --hf_assets_path=/data/tokenizers/Llama-3.1-8B
--dataloader.dataset=c4 --dataloader.dataset_path=/data/c4
--optimizer.param_groups.0.optimizer_kwargs.lr=0.0003
--training.local_batch_size=5 --training.global_batch_size=-1 --training.seq_len=8192 --training.steps=100
--training.mixed_precision_param=bfloat16
--lr_scheduler.warmup_steps=200 --lr_scheduler.decay_ratio=None --lr_scheduler.decay_type=linear
--lr_scheduler.min_lr_factor=0.0
--parallelism.data_parallel_replicate_degree=1 --parallelism.data_parallel_shard_degree=-1
--parallelism.tensor_parallel_degree=1 --parallelism.context_parallel_degree=1
--parallelism.pipeline_parallel_degree=1 --parallelism.pipeline_parallel_schedule=1F1B
--compile.no_enable --compile.components=model,loss
--checkpoint.no_enable --checkpoint.interval=500 --checkpoint.no_last_save_model_only
--metrics.log_freq=10 --metrics.disable_color_printing --metrics.enable_tensorboard --metrics.save_tb_folder=tb
--debug.seed=None --comm.init_timeout_seconds=1000 --comm.train_timeout_seconds=1000
--training.disable_cuda_graphs --loss.num_chunks=1
--profiler.no_enable_profiling --debug.no_enable_structured_logging
--validator.no_enable --validator.dataloader.dataset_path=/data/c4
activation-checkpoint:selective
"""


def changed(node: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a node.json with other values: of a whole table, or of a key, wherever it stands."""
    node = copy.deepcopy(node)
    for key, value in changes.items():
        table = node if key in node else next(node[name] for name in ("job", "profile", "placed") if key in node[name])
        table[key] = value
    return node


def a_node(recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return changed(LLAMA3_8B, recipe={**LLAMA3_8B["recipe"], **(recipe or {})}, **changes)


def debug_node(**changes: Any) -> dict[str, Any]:
    sizes = {"flavor": "debugmodel", "seq_len": 256, "local_batch_size": 4, "steps": 20, "log_freq": 2}
    rates = {"lr": 8e-4, "warmup_steps": 2, "seed": 1, "activation_checkpoint": "none", "param_dtype": "float32"}
    return changed(a_node({**sizes, **rates}, device="cpu", nodes=1, gpus_per_node=2), **changes)


def test_8b_in_the_registry_era_is_one_line() -> None:
    command = torchrun_command(LLAMA3_8B, "0.3.0", NINE_NODES, torch_version="2.14.1+cu130")
    assert command == [*TORCHRUN_NINE, "torchtitan.train", *REGISTRY_ERA.split()]
    assert config_files(LLAMA3_8B, "0.3.0") == {}


def test_8b_in_the_toml_era_is_a_file() -> None:
    command = torchrun_command(LLAMA3_8B, "0.2.2", NINE_NODES, torch_version="2.14.1+cu130")
    assert command == [*TORCHRUN_NINE, "torchtitan.train", "--job.config_file=/runs/one/job/titan.toml"]
    ((path, text),) = config_files(LLAMA3_8B, "0.2.2").items()
    assert path == "/runs/one/job/titan.toml"
    tables = tomllib.loads(text)
    told = {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}
    shared = {key: value for key, value in common_settings(LLAMA3_8B).items() if value is not None}
    assert told == shared | {
        "job.dump_folder": "/runs/one/titan",
        "job.description": "llama3 8B",
        **{"model.name": "llama3", "model.flavor": "8B", "model.converters": []},
        "model.hf_assets_path": "/data/tokenizers/Llama-3.1-8B",
        **{"optimizer.name": "AdamW", "optimizer.lr": 3e-4},
        **{"training.dataset": "c4", "training.dataset_path": "/data/c4"},
        **{"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
        **{"profiling.enable_profiling": False, "validation.enable": False, "validation.dataset_path": "/data/c4"},
        **{"validation.local_batch_size": 5, "validation.seq_len": 8192},
    }


@pytest.mark.parametrize("version", ["0.2.2", "0.3.0"])
def test_the_debug_recipe_on_a_cpu_starts_behind_the_patches(version: str) -> None:
    rendezvous = Rendezvous("7", 0, "here")
    command = torchrun_command(debug_node(), version, rendezvous, torch_version="2.13.0+cpu", python="/venv/bin/python")
    shared = torchrun(
        "/venv/bin/python -m torch.distributed.run --nnodes=1 --nproc-per-node=2 --rdzv-id=7",
        "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1",
        "0000-here",
    )
    assert command[: len(shared) + 1] == [*shared, "titan.cpu"]
    text = " ".join(command) + "".join(config_files(debug_node(), version).values())
    assert ("activation-checkpoint:none" if version == "0.3.0" else 'mode = "none"') in text
    assert ("--debug.seed=1" if version == "0.3.0" else "seed = 1") in text


GRAPHS, NO_GRAPHS = "--training.no_disable_cuda_graphs", "--training.disable_cuda_graphs"
OLD_BACKEND = "--parallelism.spmd_backend=partial_dtensor"
FAST, TODAY = {"like_for_like": False}, "2.14.1+cu130"
ARGUMENTS: tuple[tuple[dict[str, Any], str, str], ...] = (  # of the recipe, torch, and an argument of 0.3's, or none
    ({}, "2.13.0+cpu", OLD_BACKEND),
    *(({}, torch, f"no {OLD_BACKEND}") for torch in (TODAY, "", "2.15.0.dev1")),
    (FAST, TODAY, GRAPHS),
    (FAST, TODAY, "no --loss.num_chunks=1"),
    ({}, TODAY, NO_GRAPHS),
    ({}, TODAY, "--loss.num_chunks=1"),
    ({**FAST, "pipeline_parallel": 4}, TODAY, NO_GRAPHS),
    ({"flavor": "70B"}, TODAY, "--module=llama3 --config=llama3_70b"),
    ({"quantize": "mxfp8"}, TODAY, "--module=titan.registry_era --config=llama3_8b_mxfp8"),
    ({"quantize": "nvfp4"}, TODAY, "--module=llama3 --config=llama3_8b_first_85_pct_layers_nvfp4"),
    ({"quantize": "float8"}, TODAY, "--module=titan.registry_era --config=llama3_8b_float8"),
    ({"quantize": "float8", "flavor": "70B"}, TODAY, "--module=titan.registry_era --config=llama3_70b_float8"),
)


@pytest.mark.parametrize(("recipe", "torch", "has"), ARGUMENTS)
def test_an_argument_of_03(recipe: dict[str, Any], torch: str, has: str) -> None:
    found = trainer_arguments(a_node({"compile": True, **recipe}), "0.3.0", torch)
    *no, wanted = has.split("no ")
    assert (f" {wanted} " in f" {' '.join(found)} ") is not bool(no)
    assert "--compile.enable" in found


def test_no_graphs_on_a_cpu_and_no_path_of_the_hubs_data() -> None:
    assert NO_GRAPHS in trainer_arguments(a_node(FAST, device="cpu"), "0.3.0", TODAY)
    assert "--dataloader.dataset_path=None" in trainer_arguments(a_node(data="hub"), "0.3.0", TODAY)
    assert "dataset_path" not in next(iter(config_files(a_node(data="hub"), "0.2.2").values()))


def test_releases_are_of_an_era_or_refused_with_the_range() -> None:
    for version in ("0.2.1", "0.2.2", "0.2.2+crusoe", "0.2.2.dev20260101"):
        assert era(version) is toml_era
    for version in ("0.1.0", "0.2.0", "0.2.3", "0.2.20", "0.30.1", "9.9.0", "nonsense", ""):
        with pytest.raises(Refused, match=r"0\.2\.1 to 0\.2\.2 and 0\.3\.x") as refused:
            torchrun_command(LLAMA3_8B, version, NINE_NODES)
        assert "pip install torchtitan==" in refused.value.fix


def test_set_pairs_come_last_and_switches_are_spelled_as_the_parser_wants() -> None:
    pairs = {
        "training.max_norm": "2.0",
        "training.disable_cuda_graphs": "false",
        "compile.enable": "True",
        "activation_checkpoint.debug": "true",
        "comm.init_timeout_seconds": "1500",
        "metrics.save_tb_folder": "a b'c\"$(x)",
    }
    node = a_node(titan=pairs)
    plain = [
        "--training.max_norm=2.0",
        "--training.no_disable_cuda_graphs",
        "--compile.enable",
        "--comm.init_timeout_seconds=1500",
        "--metrics.save_tb_folder=a b'c\"$(x)",
    ]
    assert trainer_arguments(node, "0.3.0")[-7:] == [
        *plain,
        "activation-checkpoint:selective",
        "--activation_checkpoint.debug",
    ]
    assert trainer_arguments(node, "0.2.2")[1:] == [*plain[:3], "--activation_checkpoint.debug", *plain[3:]]


def test_quantised_models_have_a_converter_in_02() -> None:
    for quantize, converter in (("float8", "float8"), ("mxfp8", "mx")):
        settings = tomllib.loads(next(iter(config_files(a_node({"quantize": quantize}), "0.2.2").values())))
        assert settings["model"]["converters"] == [f"quantize.linear.{converter}"]
        assert settings["quantize"]["linear"][converter]["filter_fqns"] == ["output"]


@pytest.mark.parametrize(
    ("version", "recipe", "changes", "why"),
    [
        ("0.3.0", {"flavor": "70B", "quantize": "mxfp8"}, {}, "no mxfp8 configuration for 70B"),
        ("0.3.0", {"pipeline_parallel": 2}, {}, "needs torch 2.14"),
        ("0.2.2", {"quantize": "mxfp8", "compile": True, "tensor_parallel": 2}, {}, "tensor parallelism"),
        ("0.2.2", {"quantize": "nvfp4"}, {}, "torchtitan 0.2 has no nvfp4"),
        ("0.3.0", {"async_tensor_parallel": True}, {}, "torch.compile's work"),
        ("0.2.2", {"flavor": "405B"}, {}, "no translation for the model llama3 405B"),
        ("0.2.2", {"compile": True}, {"device": "cpu"}, "torch.compile"),
        ("0.3.0", {}, {"device": "cpu", "titan": {"compile.enable": "true"}}, "torch.compile"),
        ("0.2.2", {"quantize": "float8"}, {"device": "cpu"}, "float8 needs a GPU"),
        ("0.3.0", {"context_parallel": 2}, {"device": "cpu"}, "context parallelism needs a GPU"),
        ("0.2.2", {}, {"titan": {"job.config_file": "/x.toml"}}, "writes the configuration file itself"),
        ("0.3.0", {}, {"titan": {"activation_checkpoint.mode": "full"}}, "has no such setting"),
    ],
)
def test_what_an_era_cannot_do_is_refused(
    version: str, recipe: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(Refused, match=why) as refused:
        torchrun_command(a_node(recipe, **changes), version, NINE_NODES, torch_version="2.13.0")
    assert refused.value.fix


def test_where_the_nodes_meet() -> None:
    for port in (0, -1, 70000):
        with pytest.raises(Refused, match=f"9 nodes cannot meet at port {port}"):
            torchrun_command(LLAMA3_8B, "0.3.0", Rendezvous("1", 0, "a", "10.0.0.1", port))
    for node_id, address, words in (
        (0, "10.0.0.1", "--rdzv-endpoint=10.0.0.1:20001 --node-rank=0"),
        (8, "10.0.0.1", "--rdzv-endpoint=10.0.0.1:20001 --node-rank=8"),
        (0, "fd00::1", "--rdzv-endpoint=[fd00::1]:20001"),
    ):
        command = torchrun_command(LLAMA3_8B, "0.3.0", Rendezvous("1", node_id, "a", address, 20001))
        assert words in " ".join(command)


# nodes, GPUs on each, pipeline stages -> the local rank that knows the loss
SHOWN = {(1, 4, 1): 0, (1, 4, 2): 2, (1, 4, 4): 3, (2, 4, 2): 0, (2, 4, 4): 2}


def test_with_pipeline_stages_the_rank_that_knows_the_loss_is_shown() -> None:
    for (nodes, gpus, stages), shown in SHOWN.items():
        assert shown_local_rank(a_node({"pipeline_parallel": stages}, nodes=nodes, gpus_per_node=gpus)) == shown


def test_toml_survives_every_character() -> None:
    values = {"a.b": 'q"\\ \n\t\x7f\u00e9\U0001f600', "a.c": ["x,y", ""], "d.e": 1e-05, "d.f": None, "g.h": True}
    parsed = tomllib.loads(toml_era.to_toml(values))
    assert parsed == {"a": {"b": values["a.b"], "c": ["x,y", ""]}, "d": {"e": 1e-05}, "g": {"h": True}}


def test_nothing_is_patched_where_an_accelerator_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(SimpleNamespace):
        def __setattr__(self, name: str, value: object) -> None:
            raise AssertionError(f"torch.{name} was changed")

    fake = Frozen(_utils=Frozen(_get_available_device_type=lambda: "cuda"))  # which has nothing else to look at
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert cpu.patch() is False
