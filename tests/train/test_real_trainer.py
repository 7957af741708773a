"""The real torchtitan: its parsers take our command lines, and it trains the debug recipe on two CPU ranks.

LAUNCHER_TRAIN_PYTHON names the interpreters to run in, separated by ':' (default: the one that runs pytest), so
that both eras are tested in one go. An interpreter without torchtitan is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.results.read import outcome_of
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState
from launcher.stage import sample
from launcher.titan import Refused
from launcher.titan.command import Rendezvous, config_files, torchrun_command, trainer_arguments
from tests.unit.node_place import lay_out
from tests.unit.test_titan_command import a_node, changed, debug_node

ROOT = Path(__file__).parent.parent.parent
PYTHONS = [python for python in os.environ.get("LAUNCHER_TRAIN_PYTHON", sys.executable).split(":") if python]

VERSIONS = """
import importlib.metadata, importlib.util, json
found = all(importlib.util.find_spec(name) for name in ("torch", "torchtitan"))
print(json.dumps([importlib.metadata.version(name) for name in ("torchtitan", "torch")] if found else []))
"""

# Parses every command line of the list on standard input and prints what the trainer would have run with.
PARSE = """
import dataclasses, json, sys
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager

def plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "model_spec"}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)

try:  # 0.3 converts the model while it parses, which needs a GPU and torchao
    import torchtitan.components.quantization as quantization
    for name in ("Float8", "MXFP8", "NVFP4"):
        converter = getattr(quantization, name + "LinearConverter")
        converter.__init__ = lambda self, config: None
        converter.convert = lambda self, model: model
except (ImportError, AttributeError):
    pass

task = json.load(sys.stdin)
tokenizer = HuggingFaceTokenizer(tokenizer_path=task["tokenizer"])
text = "Bytes: \\u20ac \\U0001f600"
ids = tokenizer.encode(text, add_bos=True, add_eos=True)
answer = {"ends": [tokenizer.bos_id, tokenizer.eos_id, ids[0], ids[-1]], "same": tokenizer.decode(ids[1:-1]) == text}
answer["parsed"] = [plain(ConfigManager().parse_args(arguments)) for arguments in task["arguments"]]
print("ANSWER" + json.dumps(answer))
"""

# The attention that stands in on a CPU against torch's own, which has a forward pass there: packed documents, and
# fewer key than query heads.
ATTENTION = """
import sys, torch
from torch.nn.attention import flex_attention as flex
from titan import cpu
torch.manual_seed(0)
query, key, value = torch.randn(2, 8, 64, 16), torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
document = torch.tensor([[0] * 20 + [1] * 44, [0] * 50 + [1] * 14])
mask = flex.create_block_mask(
    lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k]), 2, None, 64, 64, device="cpu"
)
own = flex.flex_attention
expected = own(query, key, value, block_mask=mask, enable_gqa=True)
assert cpu.patch() and flex.flex_attention is not own
query.requires_grad_()
found = flex.flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
found.sum().backward()
torch.testing.assert_close(found, expected)
assert query.grad is not None
print("ANSWER")
"""


@cache
def versions(python: str) -> tuple[str, str] | None:
    """torchtitan's and torch's version in that interpreter; None where one is missing."""
    try:
        done = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return (found[0], found[1]) if found else None


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    path = str(request.param)
    if versions(path) is None:
        pytest.skip(f"{path} has no torchtitan: set LAUNCHER_TRAIN_PYTHON to an interpreter that has")
    return path


def answer(python: str, program: str, *words: str, given: object = None, path: Path = ROOT, **env: str) -> Any:
    """What a program of ours prints last in that interpreter, behind ANSWER: it is given a JSON value."""
    done = subprocess.run(
        [python, "-c", program, *words],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": str(path), **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2].strip() or "null")


def make_run(folder: Path, node: dict[str, Any]) -> Path:
    """A run directory as `launcher submit` makes it, with sample data; returns its node.json."""
    data, tokenizer = folder / "sample" / "c4", folder / "sample" / "tokenizer"
    sample.write_c4_sample(data)
    sample.write_tokenizer(tokenizer)
    return lay_out(folder, changed(node, data=str(data), data_source=str(data), tokenizer=str(tokenizer)))


class Started:
    """node.py processes of one run, and how they end."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, python: str, node_json: Path, **env: str) -> None:
        self.processes.append(
            subprocess.Popen(
                [python, str(node_json.parent / "node.py"), str(node_json)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TITAN_HEAD_ADDR": "127.0.0.1", **env},
            )
        )

    def alone(self, python: str, node_json: Path, **env: str) -> str:
        """What a run of one node prints, once it has ended well."""
        self.processes.clear()
        self.start(python, node_json, TITAN_JOB_ID=f"k{os.getpid()}", TITAN_HEAD_PORT="0", **env)
        return self.finish()[0]

    def finish(self, timeout_s: float = 420) -> list[str]:
        """What each printed; all of them have ended well."""
        ends = time.monotonic() + timeout_s
        outputs = [p.communicate(timeout=max(1.0, ends - time.monotonic()))[0] for p in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [0] * len(codes), "\n".join(output[-4000:] for output in outputs)
        return outputs


@pytest.fixture
def started() -> Iterator[Started]:
    runs = Started()
    yield runs
    for process in runs.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    for folder in Path(tempfile.gettempdir()).glob(f"titan-{os.getuid()}-?{os.getpid()}"):
        shutil.rmtree(folder)


def test_the_attention_that_stands_in_is_the_same_attention(python: str) -> None:
    answer(python, ATTENTION, path=ROOT / "launcher")


def test_what_03_adds_by_itself_changes_no_loss(python: str, tmp_path: Path, started: Started) -> None:
    """Its loss in chunks; CUDA graphs need a GPU."""
    if (versions(python) or ("",))[0].startswith("0.2"):
        return  # both runs would be the same
    found = []
    for like_for_like in (True, False):
        node = debug_node(gpus_per_node=1)
        recipe = node["recipe"] | {"steps": 2, "log_freq": 1, "like_for_like": like_for_like}
        run = make_run(tmp_path / str(like_for_like), changed(node, recipe=recipe))
        found.append(losses(started.alone(python, run)))
    assert set(found[0]) == {1, 2} and found[0] == pytest.approx(found[1], rel=1e-3)


def test_tensor_parallel_with_full_checkpointing_makes_a_step(python: str, tmp_path: Path, started: Started) -> None:
    """Async TP is torch.compile's work, which a CPU has not: tests/train/test_proof.py builds it."""
    node = debug_node()
    recipe = node["recipe"] | {"steps": 1, "log_freq": 1, "tensor_parallel": 2, "activation_checkpoint": "full"}
    output = started.alone(python, make_run(tmp_path / "run", changed(node, recipe=recipe)))
    assert "tp=2" in output and 7 < losses(output)[1] < 9, output[-2000:]


def losses(output: str) -> dict[int, float]:
    """Loss by step, from the lines of one node."""
    lines = [line.split("step:")[1].split() for line in output.splitlines() if " step: " in line]
    return {int(words[0]): float(words[words.index("loss:") + 1]) for words in lines}


def variants() -> dict[str, dict[str, Any]]:
    """Node files of all the recipes and of everything a recipe can change."""
    big = {"flavor": "70B", "local_batch_size": 1, "lr": 1.5e-4, "activation_checkpoint": "full"}
    return {
        "8b": a_node(),
        "70b": a_node({**big, "tensor_parallel": 8}, gpus_per_node=8),
        "70b-float8": a_node({**big, "quantize": "float8", "compile": True}, gpus_per_node=8),
        "70b-mxfp8": a_node({**big, "quantize": "mxfp8", "compile": True}, gpus_per_node=8),
        "70b-tp": a_node(
            {**big, "tensor_parallel": 8, "async_tensor_parallel": True, "compile": True}, gpus_per_node=8
        ),
        "8b-fast": a_node({"compile": True, "activation_checkpoint": "none", "like_for_like": False}),
        "8b-nvfp4": a_node({"compile": True, "quantize": "nvfp4", "like_for_like": False}),
        "8b-float8": a_node({"compile": True, "quantize": "float8"}),
        "8b-mxfp8": a_node({"compile": True, "quantize": "mxfp8"}),
        "8b-hsdp": a_node({"dp_replicate": 9, "dp_shard": 4, "global_batch_size": 360, "seed": 42}),
        "8b-cp": a_node({"context_parallel": 2}),
        "8b-pp": a_node({"pipeline_parallel": 4}),
        "8b-hub": a_node(data="hub"),
        "8b-checkpoints": a_node({"checkpoint_interval": 50, "tensorboard": False}),
        "8b-set": a_node(titan={"training.max_norm": "2.0", "metrics.enable_wandb": "true", "compile.enable": "TRUE"}),
        "debug": debug_node(),
    }


CANNOT = {
    "0.2": {"8b-nvfp4"},
    "0.3": {"70b-mxfp8", "8b-pp"},  # 8b-pp: with torch before 2.14 only
}


def test_the_real_parser_takes_every_recipe(python: str, tmp_path: Path) -> None:
    found = versions(python)
    assert found is not None
    titan, torch = found
    sample.write_tokenizer(tmp_path / "tokenizer")
    lines, refused = {}, set()
    for name, node in variants().items():
        node = changed(node, run_dir=str(tmp_path / name), tokenizer=str(tmp_path / "tokenizer"))
        try:
            lines[name] = trainer_arguments(node, titan, torch)
        except Refused:
            refused.add(name)
            continue
        for path, text in config_files(node, titan).items():
            Path(path).parent.mkdir(parents=True)
            Path(path).write_text(text)
    assert refused - {"8b-pp"} == CANNOT[titan[:3]] - {"8b-pp"}
    task = {"tokenizer": str(tmp_path / "tokenizer"), "arguments": list(lines.values())}
    said = answer(python, PARSE, given=task, path=ROOT / "launcher")  # `titan`, as in a run directory
    assert said["ends"] == [256, 257, 256, 257] and said["same"]
    parsed = dict(zip(lines, said["parsed"], strict=True))
    read = read_02 if titan.startswith("0.2") else read_03
    sizes = {"local_batch_size": 5, "global_batch_size": -1, "seq_len": 8192, "steps": 100, "param_dtype": "bfloat16"}
    rates = {"lr": 3e-4, "warmup_steps": 200, "max_norm": 1.0, "betas_eps_decay": [0.9, 0.95, 1e-8, 0.1]}
    off = dict.fromkeys(("compile", "color", "checkpoint", "validate", "profile"), False)
    place = {"degrees": [1, -1, 1, 1, 1], "schedule": "1F1B", "data": ["c4", "/data/c4"], "tensorboard": "tb"}
    more = {"decay": [None, "linear", 0.0], "selective_by_op": True, "log_freq": 10, "seed": None}
    published = {**sizes, **rates, **off, **place, **more}
    assert read(parsed["8b"]) == published
    assert read(parsed["70b"])["degrees"] == [1, -1, 8, 1, 1] and read(parsed["70b"])["lr"] == 1.5e-4
    assert not read(parsed["70b"])["selective_by_op"] and not read(parsed["8b-fast"])["selective_by_op"]
    assert read(parsed["8b-fast"])["compile"] and read(parsed["8b-float8"])["compile"]
    if not titan.startswith("0.2"):
        added = {name: [it["training"]["disable_cuda_graphs"], it["loss"]["num_chunks"]] for name, it in parsed.items()}
        fast = {"8b-fast", "8b-nvfp4"}
        assert added == {name: [False, 8] if name in fast else [True, 1] for name in parsed}
    where = "parallelism" if titan.startswith("0.2") else "compile"
    assert [name for name, it in parsed.items() if it[where]["enable_async_tensor_parallel"]] == ["70b-tp"]
    assert read(parsed["8b-hsdp"])["degrees"] == [9, 4, 1, 1, 1] and read(parsed["8b-hsdp"])["seed"] == 42
    assert read(parsed["8b-cp"])["degrees"] == [1, -1, 1, 2, 1]
    assert read(parsed["8b-hub"])["data"] == ["c4", None]
    assert read(parsed["8b-checkpoints"])["checkpoint"] and not read(parsed["8b-checkpoints"])["tensorboard"]
    assert read(parsed["8b-set"]) == {**published, "max_norm": 2.0, "compile": True}
    assert parsed["8b-set"]["metrics"]["enable_wandb"] is True
    assert read(parsed["debug"])["param_dtype"] == "float32" and read(parsed["debug"])["steps"] == 20


def read_common(config: dict[str, Any]) -> dict[str, Any]:
    """What both eras keep in the same place."""
    training, parallelism, metrics = config["training"], config["parallelism"], config["metrics"]
    kinds = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "context_parallel")
    schedule = config["lr_scheduler"]
    return {
        **{name: training[name] for name in ("local_batch_size", "global_batch_size", "seq_len", "steps", "max_norm")},
        "param_dtype": training["mixed_precision_param"],
        "warmup_steps": schedule["warmup_steps"],
        "decay": [schedule["decay_ratio"], schedule["decay_type"], schedule["min_lr_factor"]],
        "compile": config["compile"]["enable"],
        "log_freq": metrics["log_freq"],
        "color": not metrics["disable_color_printing"],
        "tensorboard": metrics["enable_tensorboard"] and metrics["save_tb_folder"],
        "degrees": [parallelism[f"{name}_degree"] for name in (*kinds, "pipeline_parallel")],
        "schedule": parallelism["pipeline_parallel_schedule"],
        "checkpoint": config["checkpoint"]["enable"],
        "seed": config["debug"]["seed"],
    }


def read_02(config: dict[str, Any]) -> dict[str, Any]:
    optimizer, checkpointing = config["optimizer"], config["activation_checkpoint"]
    return {
        **read_common(config),
        "lr": optimizer["lr"],
        "betas_eps_decay": [optimizer[name] for name in ("beta1", "beta2", "eps", "weight_decay")],
        "selective_by_op": (checkpointing["mode"], checkpointing["selective_ac_option"]) == ("selective", "op"),
        "validate": config["validation"]["enable"],
        "profile": config["profiling"]["enable_profiling"],
        "data": [config["training"]["dataset"], config["training"]["dataset_path"]],
    }


def read_03(config: dict[str, Any]) -> dict[str, Any]:
    (group,) = config["optimizer"]["param_groups"]
    options = group["optimizer_kwargs"]
    return {
        **read_common(config),
        "lr": options["lr"],
        "betas_eps_decay": [*options["betas"], options["eps"], options["weight_decay"]],
        "selective_by_op": "force_recompute_mm_shapes_by_fqns" in (config["activation_checkpoint"] or {}),
        "validate": config["validator"]["enable"],
        "profile": config["profiler"]["enable_profiling"],
        "data": [config["dataloader"]["dataset"], config["dataloader"]["dataset_path"]],
    }


def test_the_debug_recipe_learns(python: str, tmp_path: Path, started: Started) -> None:
    run = tmp_path / "run"
    began = time.time()
    output = started.alone(python, make_run(run, debug_node(check="full")), TZ="XXX-5:30")
    assert "titan-node: ok node=0 " in output, output[:500]
    outcome_is_whole(run, output, began)
    found = losses(output)
    assert list(found) == [1, *range(2, 21, 2)]
    assert 7 < found[1] < 9 and found[20] < 4, found
    assert "dp_shard=2" in output and "Traceback" not in output
    assert list((run / "titan" / "tb").rglob("events.out.tfevents.*"))
    (record,) = (run / "nodes").glob("0*.json")
    facts = json.loads(record.read_text())
    assert facts["ok"] is True and len(facts["speed"]) == 2 and facts["allreduce_node_gbs"] > 0
    second_rank = list((run / "logs" / "ranks").rglob("1/std*.log"))
    assert any("step: 20" in path.read_text() for path in second_rank), "the other rank's log is kept"


def outcome_is_whole(run: Path, output: str, began: float) -> None:
    """What `launcher results` makes of the run, whose node has a time zone of its own."""
    (record,) = (run / "nodes").glob("0*.json")
    (run / "logs" / f"{record.stem}.log").write_text(output)
    (run / "end.json").write_text(json.dumps({"exit_code": 0, "began_at": int(began)}))
    found = outcome_of(Run(run), JobState("COMPLETED"))
    assert found is not None and (found.problems, found.notes) == ((), ())
    assert found.tps is not None and found.tps.count == 9 and found.tflops is not None
    assert found.loss == losses(output)[20] and len(found.series) == 11
    assert found.data_share is not None and 0 < found.data_share < 0.5
    startup, took = found.startup, time.time() - began
    seconds = (startup.container_s, startup.check_s, startup.first_step_s)
    assert all(part is not None and 0 <= part < took for part in seconds), startup
    assert startup.first_step_s, "importing torch alone takes longer"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_are_in_the_order_of_the_nodes(python: str, tmp_path: Path) -> None:
    """Not of their addresses' texts, nor of their process ids: the last node starts first."""
    node, port = debug_node(nodes=2, run_dir=str(tmp_path)), free_port()
    node["profile"]["gpus_per_node"] = 1
    processes = []
    for index in (1, 0):
        command = torchrun_command(node, "0.3.0", Rendezvous("1", index, f"n{index}", "127.0.0.1", port), python=python)
        tell = ["--no-python", "sh", "-c", f'echo "$RANK of $WORLD_SIZE" >{tmp_path}/{index}']
        processes.append(subprocess.Popen([*command[: command.index("titan.cpu") - 1], *tell]))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [(tmp_path / str(index)).read_text() for index in (0, 1)] == ["0 of 2\n", "1 of 2\n"]


def test_two_nodes_train_one_model_and_leave_a_checkpoint(python: str, tmp_path: Path, started: Started) -> None:
    run, port = tmp_path / "run", str(free_port())
    node = debug_node(nodes=2, gpus_per_node=1, check="full", titan={"training.max_norm": "0.5"})
    node["recipe"].update(steps=4, checkpoint_interval=2, activation_checkpoint="selective", log_freq=1)
    node_json = make_run(run, node)
    for index in (0, 1):
        started.start(
            python,
            node_json,
            TITAN_JOB_ID=f"u{os.getpid()}",
            TITAN_HEAD_PORT=port,
            SLURM_NODEID=str(index),
            SLURMD_NODENAME=f"node{index}",
        )
    outputs = started.finish()
    assert losses(outputs[0]) == losses(outputs[1]) and list(losses(outputs[0])) == [1, 2, 3, 4]
    assert all("dp_shard=2" in output for output in outputs)
    assert sorted(path.name for path in (run / "titan" / "checkpoint").iterdir()) == [
        *("launcher.json", "step-2", "step-4")
    ]
    assert all((run / "titan" / "checkpoint" / f"step-{step}" / ".metadata").is_file() for step in (2, 4))
    records = [json.loads(path.read_text()) for path in sorted((run / "nodes").glob("0*.json"))]
    assert len(records) == 2 and json.loads((run / "nodes" / "check.json").read_text())["ok"] is True
    for record in records:  # measured by the real torch
        figures = [*(gpu[key] for gpu in record["speed"] for key in ("product_tflops", "copy_gbs"))]
        assert len(figures) == 2 and min(figures) > 0
        assert record["allreduce_job_gbs"] > 0


def test_a_setting_that_torchtitan_does_not_know_ends_the_run_with_its_name(
    python: str, tmp_path: Path, started: Started
) -> None:
    node_json = make_run(tmp_path / "run", debug_node(titan={"training.no_such_thing": "1"}))
    started.start(python, node_json, TITAN_JOB_ID=f"v{os.getpid()}", TITAN_HEAD_PORT="0")
    output = started.processes[0].communicate(timeout=120)[0]
    assert started.processes[0].returncode not in (0, 20)
    # The rank that ends first has torchrun end the other, perhaps before that one has said it: then it is in its file.
    of_ranks = "".join(path.read_text() for path in (tmp_path / "run" / "logs").rglob("*") if path.is_file())
    assert "no_such_thing" in output.split("\n", 2)[2] + of_ranks
