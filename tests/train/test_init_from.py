"""`--init-from` with the real torchtitan: the first loss is that of the checkpoint, and a run's own checkpoint wins.

The checkpoint is tiny, in the Hub's format, in two shards and bf16. What its loss must be is computed with plain
torch by the Hub's definition of the model (rotary embedding over halves, not over pairs as torchtitan's).
"""

# ruff: noqa: F811
from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.stage.sample import write_c4_sample
from tests.train.test_real_trainer import (  # noqa: F401 (fixtures)
    PYTHONS,
    ROOT,
    Started,
    answer,
    losses,
    make_run,
    python,
    started,
    versions,
)
from tests.unit.test_titan_command import debug_node

SEQ_LEN = 64
BEGIN = 256  # of the sample's tokenizer; its other tokens are bytes

# Writes the checkpoint to argv[1]; prints the loss of each list of tokens on standard input, each without context.
CHECKPOINT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from titan.weights import INDEX, SHAPES, wanted_tensors
folder, shape = Path(sys.argv[1]), SHAPES["debugmodel"]
folder.mkdir()
draw = torch.Generator().manual_seed(7)
def weight(name, size):
    if len(size) == 1:
        return 1 + 0.2 * torch.randn(size, generator=draw)
    std = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 0.15}.get(name, 0.1)
    return std * torch.randn(size, generator=draw)
weights = {name: weight(name, size).bfloat16() for name, size in wanted_tensors(shape).items()}
names = list(weights)
shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
for file, inside in shards.items():
    save_file({name: weights[name] for name in inside}, folder / file, metadata={"format": "pt"})
weight_map = {name: file for file, inside in shards.items() for name in inside}
(folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
config = {"model_type": "llama", **vars(shape), "rope_theta": 500000.0, "rope_scaling": scaling}
(folder / "config.json").write_text(json.dumps(config))

heads, width = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads
speed = 500000.0 ** -(torch.arange(0, width, 2) / width)
turns = 8192 * speed / (2 * torch.pi)  # within the context that the model was first trained on
smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
speed = speed * (smooth + (1 - smooth) / 8)
def norm(x, name):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[name].float()
def linear(x, name):
    return x @ weights[name + ".weight"].float().T
def turned(x, angle):
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()
def loss(tokens):
    given, expected = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    n = len(given)
    angle = torch.outer(torch.arange(n), speed).repeat(1, 2)
    later = torch.ones(n, n).triu(1).bool()
    x = weights["model.embed_tokens.weight"].float()[given]
    for i in range(shape.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(h, f"{at}self_attn.{p}_proj").view(n, heads, width).transpose(0, 1) for p in "qkv")
        scores = turned(q, angle) @ turned(k, angle).transpose(1, 2) / width**0.5
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(n, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(h, at + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    logits = linear(norm(x, "model.norm.weight"), "lm_head")
    return torch.nn.functional.cross_entropy(logits, expected).item()
print("ANSWER", json.dumps([loss(tokens) for tokens in json.load(sys.stdin)]))
"""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    losses: list[float]  # on what each of two ranks reads first


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Every interpreter would make the same one."""
    maker = next((python for python in PYTHONS if versions(python)), None)
    if maker is None:
        pytest.skip("no interpreter has torchtitan: set LAUNCHER_TRAIN_PYTHON")
    folder = tmp_path_factory.mktemp("init-from")
    write_c4_sample(folder / "c4")
    first = []
    for index in range(2):
        with gzip.open(folder / "c4" / "en" / f"c4-train.{index:05d}-of-00004.json.gz") as lines:
            text = json.loads(next(lines))["text"].encode()
        assert len(text) > SEQ_LEN
        first.append([BEGIN, *text[:SEQ_LEN]])
    found = answer(maker, CHECKPOINT, str(folder / "weights"), given=first, path=ROOT / "launcher")
    assert min(found) > 9, f"a random start has about 8: {found}"
    return Checkpoint(folder / "weights", found)


def node(checkpoint: Checkpoint, ranks: int, **recipe: Any) -> dict[str, Any]:
    made = debug_node(init_from=str(checkpoint.folder), gpus_per_node=ranks)
    made["recipe"].update(seq_len=SEQ_LEN, local_batch_size=1, log_freq=1, tensorboard=False, steps=2, **recipe)
    return made


def record(run: Path) -> dict[str, Any]:
    (path,) = (run / "nodes").glob("*.json")
    return dict(json.loads(path.read_text()))


def test_training_starts_from_the_checkpoint_and_saves_nothing_unasked(
    python: str, checkpoint: Checkpoint, tmp_path: Path, started: Started
) -> None:
    output = started.alone(python, make_run(tmp_path / "run", node(checkpoint, ranks=2)))
    assert list(losses(output)) == [1, 2]
    assert losses(output)[1] == pytest.approx(sum(checkpoint.losses) / 2, abs=1e-3)
    assert not (tmp_path / "run" / "titan" / "checkpoint").exists()
    facts = record(tmp_path / "run")
    assert (facts["init_from"], facts["init_from_files"]) == (str(checkpoint.folder), 2)


def test_the_runs_own_checkpoint_wins_over_the_initial_one(
    python: str, checkpoint: Checkpoint, tmp_path: Path, started: Started
) -> None:
    node_json = make_run(tmp_path / "run", node(checkpoint, ranks=1, checkpoint_interval=1))
    before = losses(started.alone(python, node_json))
    assert before[1] == pytest.approx(checkpoint.losses[0], abs=1e-3)
    saved = tmp_path / "run" / "titan" / "checkpoint"
    assert sorted(path.name for path in saved.glob("step-*")) == ["step-1", "step-2"]
    shutil.rmtree(saved / "step-2")
    output = started.alone(python, node_json)
    assert losses(output) == {2: pytest.approx(before[2], abs=1e-3)}, "step 1 is not trained again"
    assert record(tmp_path / "run")["init_from"] == str(saved / "step-1")
