"""From what was asked for (`job/node.json`) to the torchrun command line of one node. Values in, values out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import Refused, registry_era, toml_era
from .checkpoints import folder_of

# Each era: its releases, the newest that was read, and the module that speaks to them.
ERAS = (
    (r"0\.2\.[12](?!\d)", "0.2.1 to 0.2.2", "0.2.2", toml_era),
    (r"0\.3(?!\d)", "0.3.x", "0.3.0", registry_era),
)
FLAVORS = ("debugmodel", "8B", "70B")
NODE_SCHEMA = 2  # of job/node.json

# Containers reach this point minutes apart where the image is unpacked on every node. torchrun's own 60 s for
# the first contact with the head node would then end the job.
RENDEZVOUS_TIMEOUT_S = 900

# check/hang.py: for how long nothing moves before a run hangs, at least; so many times that before its pace is known
# and while it writes a checkpoint. torchtitan gives up later, so that the evidence is there first.
HANG_S, STARTUP, EVIDENCE_S = 45.0, 20, 100
_TIMEOUTS = ("comm.init_timeout_seconds", "comm.train_timeout_seconds")
HANG_NAME = "LAUNCHER_HANG_S"  # a variable of the job: other seconds; 0: nobody watches


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of one job meet, as one of them sees it."""

    job_id: str
    node_id: int = 0  # this node's place among those that train, in Slurm's order; node 0 hosts the meeting point
    node_name: str = "node"
    head_addr: str = "127.0.0.1"  # an address of node 0
    head_port: int = 0  # 0: any free port, with one node only
    step_nodes: int = 0  # nodes of the step, where they are more than the job's: the check chooses those that train


def era(version: str) -> ModuleType:
    """The module that speaks to torchtitan `version` (a release, a nightly, or a fork's local version).

    Raises Refused for a release whose options this project has not read.
    """
    for pattern, _, _, module in ERAS:
        if re.match(pattern, version):
            return module
    raise Refused(
        f"torchtitan {version} is installed; this launcher speaks {' and '.join(said for _, said, _, _ in ERAS)}",
        f"an image with another torchtitan: pip install torchtitan=={ERAS[-1][2]}",
    )


def common_settings(node: dict[str, Any]) -> dict[str, Any]:
    """Settings that every supported release spells the same, by dotted name. None means: no value."""
    recipe, saves = node["recipe"], node["recipe"]["checkpoint_interval"] > 0
    watched: float = hang_s(node.get("env") or {})
    return {
        "training.local_batch_size": recipe["local_batch_size"],
        "training.global_batch_size": recipe["global_batch_size"],
        "training.seq_len": recipe["seq_len"],
        "training.steps": recipe["steps"],
        "training.mixed_precision_param": recipe["param_dtype"],
        "lr_scheduler.warmup_steps": recipe["warmup_steps"],
        "lr_scheduler.decay_ratio": None,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_factor": 0.0,
        "parallelism.data_parallel_replicate_degree": recipe["dp_replicate"],
        "parallelism.data_parallel_shard_degree": recipe["dp_shard"],
        "parallelism.tensor_parallel_degree": recipe["tensor_parallel"],
        "parallelism.context_parallel_degree": recipe["context_parallel"],
        "parallelism.pipeline_parallel_degree": recipe["pipeline_parallel"],
        "parallelism.pipeline_parallel_schedule": "1F1B",
        "compile.enable": recipe["compile"],
        "compile.components": ["model", "loss"],
        "checkpoint.enable": saves or bool(node["job"]["init_from"]),
        "checkpoint.interval": recipe["checkpoint_interval"] or 500,
        # A last checkpoint with weights alone could not be resumed with more steps.
        "checkpoint.last_save_model_only": False,
        # Written while training goes on, but for the last one.
        **({"checkpoint.async_mode": "async", "checkpoint.keep_latest_k": recipe["checkpoint_keep"]} if saves else {}),
        **({"checkpoint.folder": str(folder_of(node))} if node["job"].get("checkpoint_dir") else {}),
        **(_initial_weights(node["job"]["init_from"], saves) if node["job"]["init_from"] else {}),
        "metrics.log_freq": recipe["log_freq"],
        "metrics.disable_color_printing": True,
        "metrics.enable_tensorboard": recipe["tensorboard"],
        "metrics.save_tb_folder": "tb",
        "debug.seed": recipe["seed"] or None,
        **(dict.fromkeys(_TIMEOUTS, int(watched * STARTUP) + EVIDENCE_S) if watched else {}),
    }


def _initial_weights(folder: str, saves: bool) -> dict[str, Any]:
    """Weights in the Hub's format to start from. Once the run has a checkpoint of its own, that one wins."""
    return {
        "checkpoint.initial_load_path": folder,
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_model_only": True,
        # Without it, loading means saving too, at the latest after the last step: 96 GB for 8B.
        "checkpoint.load_only": not saves,
    }


def hang_s(env: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(env.get(HANG_NAME) or HANG_S))
    except ValueError:
        return HANG_S


def user_flags(settings: dict[str, Any]) -> list[str]:
    """`--set` pairs as options, in which true and false are words."""
    switch = {"true": True, "false": False}
    return [registry_era.flag_of(key, switch.get(str(value).lower(), value)) for key, value in settings.items()]


def trainer_arguments(node: dict[str, Any], titan_version: str, torch_version: str = "") -> list[str]:
    """What follows `-m torchtitan.train`. `torch_version` decides what a release needs of its torch.

    Raises Refused for what the installed release cannot do.
    """
    chosen = era(titan_version)
    recipe = node["recipe"]
    if recipe["model"] != "llama3" or recipe["flavor"] not in FLAVORS:
        raise Refused(
            f"there is no translation for the model {recipe['model']} {recipe['flavor']}",
            f'model = "llama3" with flavor = {", ".join(FLAVORS)}',
        )
    if node["profile"]["device"] == "cpu":
        _refuse_on_cpu(node)
    if recipe["async_tensor_parallel"] and not recipe["compile"]:
        raise Refused("async_tensor_parallel is torch.compile's work", "compile = true")
    arguments: list[str] = chosen.arguments(node, common_settings(node), user_flags(node["titan"]), torch_version)
    return arguments


def _refuse_on_cpu(node: dict[str, Any]) -> None:
    recipe = node["recipe"]
    if recipe["compile"] or str(node["titan"].get("compile.enable", "")).lower() == "true":
        raise Refused("torch.compile is switched off on a CPU", "compile = false")
    if recipe["quantize"] != "none":
        raise Refused(f"{recipe['quantize']} needs a GPU", 'quantize = "none"')
    if recipe["context_parallel"] > 1:
        raise Refused("context parallelism needs a GPU", "context_parallel = 1")


def config_files(node: dict[str, Any], titan_version: str) -> dict[str, str]:
    """Files that must exist before the command runs: absolute path -> text. Every node writes the same ones."""
    files: dict[str, str] = era(titan_version).config_files(node, common_settings(node))
    return files


def shown_local_rank(node: dict[str, Any]) -> int:
    """The local rank whose lines go to the node's log: 0, or with pipeline stages the one that knows the loss."""
    world = node["job"]["nodes"] * node["profile"]["gpus_per_node"]
    stages = node["recipe"]["pipeline_parallel"]
    return int(world // stages * (stages - 1) % node["profile"]["gpus_per_node"]) if stages > 1 else 0


def torchrun_command(
    node: dict[str, Any],
    titan_version: str,
    rendezvous: Rendezvous,
    *,
    torch_version: str = "",
    python: str = "python3",
) -> list[str]:
    """The whole command line of one node, as `os.execvp` takes it.

    Raises Refused for what the installed release cannot do, and for a meeting point that cannot work.
    """
    arguments = trainer_arguments(node, titan_version, torch_version)
    nodes = max(node["job"]["nodes"], rendezvous.step_nodes)
    if nodes > 1 and not 0 < rendezvous.head_port < 65536:
        raise Refused(
            f"{nodes} nodes cannot meet at port {rendezvous.head_port}",
            "the job script exports TITAN_HEAD_PORT from the job id: submit again",
        )
    alone = node["job"]["nodes"] == 1 and rendezvous.head_port == 0
    if alone:  # torchrun chooses a free port
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        head = f"[{rendezvous.head_addr}]" if ":" in rendezvous.head_addr else rendezvous.head_addr
        # Static: ranks follow Slurm's order of the nodes, so that neighbours in the network are neighbours in NCCL's
        # rings and in a shard group. c10d sorts nodes by the text of their addresses: 10.0.0.10 before 10.0.0.9.
        meeting = [
            "--rdzv-backend=static",
            f"--rdzv-endpoint={head}:{rendezvous.head_port}",
            f"--node-rank={rendezvous.node_id}",
            f"--rdzv-conf=timeout={RENDEZVOUS_TIMEOUT_S}",
        ]
    return [
        python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={node['job']['nodes']}",
        f"--nproc-per-node={node['profile']['gpus_per_node']}",
        f"--rdzv-id={rendezvous.job_id}",
        *meeting,
        "--max-restarts=0",
        "--role=rank",
        "--tee=3",
        f"--local-ranks-filter={shown_local_rank(node)}",
        f"--log-dir={node['placed']['run_dir']}/logs/ranks/{rendezvous.node_id:04d}-{rendezvous.node_name}",
        "-m",
        "titan.cpu" if node["profile"]["device"] == "cpu" else "torchtitan.train",
        *arguments,
    ]


def preview(node: dict[str, Any], python: str = "python3") -> dict[str, str]:
    """For each era, the command of a node as shell text, and the configuration file that it reads.

    What only the running job knows stands in capitals: HEAD_ADDR, HEAD_PORT, JOB_ID.
    """
    shown = {}
    for _, _, version, _ in ERAS:
        port = 0 if node["job"].get("scheduler") == "local" else 1
        rendezvous = Rendezvous("JOB_ID", 0, "NODE", "HEAD_ADDR", port)
        try:
            command = torchrun_command(node, version, rendezvous, python=python)
        except Refused as refused:
            shown[version] = f"refused: {refused.why} ({refused.fix})"
            continue
        text = shlex.join(command).replace("HEAD_ADDR:1", "HEAD_ADDR:HEAD_PORT")
        files = config_files(node, version)
        shown[version] = "\n".join([text, *(f"\n{path}:\n{content}" for path, content in files.items())])
    return shown
