"""`launcher plan --prove` by the real torchtitan, in both eras: what it takes, and what it refuses in which words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conftest import Launch
from tests.train.test_real_trainer import python, versions

__all__ = ["python"]  # a fixture

DEBUG = {"recipe.flavor": "debugmodel", "recipe.seq_len": 256}
PIPELINE = {"recipe.pipeline_parallel": 4, "training.disable_cuda_graphs": False}


@dataclass(frozen=True)
class Case:
    """A run on GB200, 4 GPUs a node, or on H200, 8 a node; `refused`: torchtitan's words, by era."""

    name: str
    nodes: int = 9
    recipe: str = "llama3-8b"
    gpu: str = "gb200"
    set: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)


def both(words: str) -> dict[str, str]:
    return {"0.2": words, "0.3": words}


FIVE = (
    Case("8B, FSDP", mesh={"dp_shard": 36}),
    Case(
        "HSDP and tensor parallel, with checkpoints",
        set=DEBUG | {"recipe.dp_replicate": 3, "recipe.tensor_parallel": 4, "recipe.checkpoint_interval": 5},
        mesh={"dp_replicate": 3, "dp_shard": 3, "tp": 4},
    ),
    Case(
        "sequence",
        set=DEBUG | {"recipe.tensor_parallel": 12},
        refused=both("divisible by"),
    ),
    Case(
        "batch",
        set=DEBUG | {"recipe.global_batch_size": 100},
        refused=both("global batch size must be multiple of local batch size"),
    ),
    Case(
        "CUDA graphs with pipeline stages, which 0.2 lacks",
        set=DEBUG | PIPELINE,
        # With torch before 2.14 the launcher refuses 0.3's stages first.
        refused={"0.2": "disable_cuda_graphs", "0.3": "pipeline"},
    ),
)


def prove(launch: Launch, python: str, case: Case) -> None:
    flags = [f"--set={key}={json.dumps(value).strip(chr(34))}" for key, value in case.set.items()]
    command = ("plan", "--prove", "--json", "--gpu", case.gpu, "--nodes", str(case.nodes), "--recipe", case.recipe)
    done = launch(*command, *flags, "--python", python)
    installed = versions(python)
    assert installed and done.stdout, done.stderr
    words, proof = case.refused.get(installed[0][:3]), json.loads(done.stdout)["proof"]
    assert proof["torchtitan"] == installed[0] and proof["world"] == case.nodes * (8 if case.gpu[0] == "h" else 4)
    if words is not None:
        assert done.returncode == 3 and "[proof-refused]" in done.stderr, proof
        assert words in proof["refused"]["why"] and "Failed to load" not in proof["refused"]["why"], proof
        return
    assert (done.returncode, proof["refused"]) == (0, None), proof
    assert [one["rank"] for one in proof["ranks"]] == [0, proof["world"] - 1]
    for one in proof["ranks"]:
        assert {name: size for name, size in one["mesh"].items() if size > 1} == case.mesh


@pytest.mark.parametrize("case", FIVE, ids=lambda case: case.name)
def test_what_torchtitan_takes_and_refuses(case: Case, python: str, launch: Launch) -> None:
    prove(launch, python, case)
