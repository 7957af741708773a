"""`launcher plan --prove` by the real torchtitan, in both eras: what it takes, and what it refuses in which words.

The first five always; LAUNCHER_TEST_PROOF_BANK=1 runs all of the bank; docs/plan.md has its time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest

from tests.conftest import Launch
from tests.train.test_real_trainer import python, versions

__all__ = ["python"]  # a fixture


@dataclass(frozen=True)
class Case:
    """A run and its known outcome: the `mesh`, or words of the refusal. `old` and `new`: with 0.2, with 0.3 alone."""

    name: str
    nodes: int = 9
    gpu: str = "gb200"  # 4 a node, of others 8
    recipe: str = "debugmodel"  # that one: the small model, with the recipe llama3-8b
    set: str = ""  # without a dot, keys of the recipe
    mesh: str = ""
    refused: str = ""
    old: str = ""
    new: str = ""
    whole: bool = True  # to the end of the step; else up to a kernel that only a GPU has, or a value


TORCH = "needs torch 2.14 for pipeline stages"  # which the tests' torchtitan 0.3 has not
BANK = (
    Case("8B, FSDP", recipe="llama3-8b", mesh="dp_shard=36"),
    Case(
        "HSDP and TP, with checkpoints",
        set="dp_replicate=3 tensor_parallel=4 checkpoint_interval=5",
        mesh="dp_replicate=3 dp_shard=3 tp=4",
    ),
    Case("sequence", set="tensor_parallel=12", refused="divisible by"),
    Case("batch", set="global_batch_size=100", refused="global batch size must be multiple of local batch size"),
    Case(
        "CUDA graphs with pipeline stages",
        set="pipeline_parallel=4 training.disable_cuda_graphs=false",
        old="disable_cuda_graphs",  # which 0.2 lacks
        new=TORCH,
    ),
    # -- data parallel
    Case("one node", 1, mesh="dp_shard=4"),
    Case("68 ranks", 17, mesh="dp_shard=68"),
    Case("8B, 1,856 ranks of H100", 232, "h100", "llama3-8b", mesh="dp_shard=1856"),
    # 0.3 sets up wq, wk and wv as one matrix, which has fewer rows in the small model.
    Case("more ranks than rows", 464, mesh="dp_shard=1856", new="placement changes are not supported"),
    Case("HSDP", set="dp_replicate=9", mesh="dp_replicate=9 dp_shard=4"),
    Case("HSDP, 1,856 ranks", 464, set="dp_replicate=116", mesh="dp_replicate=116 dp_shard=16"),
    Case("replicas alone", 2, set="dp_replicate=8 dp_shard=1", mesh="dp_replicate=8", whole=False),
    Case("gradients of four batches", set="global_batch_size=720", mesh="dp_shard=36"),
    Case("replicas that do not divide", set="dp_replicate=5", refused="not a multiple"),
    Case("shards that do not divide", set="dp_shard=5", refused="the degrees multiply to 5"),
    Case("torchtitan's shards", set="parallelism.data_parallel_shard_degree=5", refused="try: --set recipe.dp_shard"),
    # -- tensor parallel: 16 heads
    Case("TP", 1, set="tensor_parallel=2", mesh="dp_shard=2 tp=2"),
    Case(
        "HSDP and TP, 1,024 ranks",
        128,
        "h100",
        set="dp_replicate=16 tensor_parallel=4",
        mesh="dp_replicate=16 dp_shard=16 tp=4",
    ),
    Case("TP of a node", 1, "h100", set="tensor_parallel=8", mesh="tp=8"),
    Case("TP by all heads", 4, set="tensor_parallel=16", mesh="tp=16"),
    Case(
        "async TP", 2, "h100", set="tensor_parallel=8 async_tensor_parallel=true compile=true", mesh="dp_shard=2 tp=8"
    ),
    Case("async TP without compile", 2, "h100", set="async_tensor_parallel=true", refused="torch.compile's work"),
    Case("more TP than heads", 8, set="tensor_parallel=32", old="is invalid for input of size", new="head"),
    Case("heads that do not divide", 3, set="tensor_parallel=3 seq_len=258", old="is invalid for input", new="head"),
    Case("TP that does not divide", set="tensor_parallel=5", refused="not a multiple"),
    # -- context parallel
    Case("CP", 2, set="context_parallel=2", mesh="dp_shard=4 cp=2"),
    Case("CP and TP", 4, set="context_parallel=4 tensor_parallel=2 seq_len=512", mesh="dp_shard=2 cp=4 tp=2"),
    Case("CP and HSDP", 8, set="context_parallel=4 dp_replicate=4 seq_len=512", mesh="dp_replicate=4 dp_shard=2 cp=4"),
    Case(
        "CP, 1,856 ranks",
        464,
        set="context_parallel=8 dp_replicate=116 seq_len=1024",
        mesh="dp_replicate=116 dp_shard=2 cp=8",
    ),
    Case("a sequence that 0.3 cannot mask by CP", 4, set="context_parallel=4", mesh="dp_shard=4 cp=4", whole=False),
    Case("sequence by CP", 3, set="context_parallel=3", refused="divisible by"),
    Case("sequence by CP and TP", 8, set="context_parallel=4 tensor_parallel=4 seq_len=240", refused="divisible by"),
    # -- pipelines
    Case("PP", 2, set="pipeline_parallel=2", mesh="pp=2 dp_shard=4", new=TORCH),
    Case("PP and TP", 4, set="pipeline_parallel=2 tensor_parallel=2", mesh="pp=2 dp_shard=4 tp=2", new=TORCH),
    Case("PP and CP", 4, set="pipeline_parallel=2 context_parallel=2", mesh="pp=2 dp_shard=4 cp=2", new=TORCH),
    Case("PP and HSDP", 4, set="pipeline_parallel=2 dp_replicate=4", mesh="pp=2 dp_replicate=4 dp_shard=2", new=TORCH),
    Case(
        "all five, 1,856 ranks",
        464,
        set="pipeline_parallel=2 tensor_parallel=2 context_parallel=2 dp_replicate=29",
        mesh="pp=2 dp_replicate=29 dp_shard=8 cp=2 tp=2",
        new=TORCH,
    ),
    Case("more stages than layers", set="pipeline_parallel=9", old="stages", new=TORCH),
    Case(
        "microbatches",
        2,
        set="pipeline_parallel=2 parallelism.pipeline_parallel_microbatch_size=2",
        old="batch",
        new=TORCH,
    ),
    Case("schedule", 2, set="pipeline_parallel=2 parallelism.pipeline_parallel_schedule=No", old="No", new=TORCH),
    # -- quantization
    Case("float8", 4, "h100", "llama3-8b-fast", mesh="dp_shard=32"),
    Case("float8 and TP", 1, "h200", "llama3-8b-fast", "tensor_parallel=2", mesh="dp_shard=4 tp=2"),
    Case("MXFP8", 1, "gb200", "llama3-8b-fast", mesh="dp_shard=4", whole=False),
    Case(
        "MXFP8, compile and TP",
        1,
        "b200",
        "llama3-8b-fast",
        "tensor_parallel=2",
        "dp_shard=4 tp=2",
        old="MXFP8",
        whole=False,
    ),
    Case("NVFP4", 1, "gb300", "llama3-8b-nvfp4", mesh="dp_shard=4", old="no nvfp4", whole=False),
    Case("float8 on A100", 1, "a100", "llama3-8b", "quantize=float8", refused="SM89"),
    Case("MXFP8 on H100", 1, "h100", "llama3-8b-fast", "quantize=mxfp8", refused="SM100"),
    Case("NVFP4 on H200", 1, "h200", "llama3-8b-nvfp4", old="no nvfp4", new="SM100"),
    Case(
        "MXFP8, small",
        1,
        set="quantize=mxfp8",
        mesh="dp_shard=4",
        new="no mxfp8 configuration for debugmodel",
        whole=False,
    ),
    # -- other settings
    Case("70B, FSDP", 16, recipe="llama3-70b", mesh="dp_shard=64"),
    Case("70B, async TP", 32, "h100", "llama3-70b-tp", mesh="dp_shard=32 tp=8"),
    Case("fine-tuning", 1, "h200", "llama3-8b-finetune", mesh="dp_shard=8"),
    Case("no checkpointing, fp32", 1, set="activation_checkpoint=none param_dtype=float32", mesh="dp_shard=4"),
    Case("full checkpointing and TP", 1, set="activation_checkpoint=full tensor_parallel=2", mesh="dp_shard=2 tp=2"),
    Case("CUDA graphs", 1, set="like_for_like=false compile=true", mesh="dp_shard=4"),
    Case("resharding", 1, set="parallelism.fsdp_reshard_after_forward=always like_for_like=false", mesh="dp_shard=4"),
    Case("unknown setting", 1, set="training.no_such_thing=1", refused="no_such_thing"),
    Case("no number", 1, set="training.max_norm=much", refused="much"),
)


def outcome(launch: Launch, python: str, case: Case) -> None:
    small = "recipe.flavor=debugmodel recipe.seq_len=256 " if case.recipe == "debugmodel" else ""
    pairs = (small + case.set).split()
    flags = [f"--set={pair if '.' in pair.partition('=')[0] else f'recipe.{pair}'}" for pair in pairs]
    recipe = "llama3-8b" if small else case.recipe
    command = ("plan", "--prove", "--json", "--gpu", case.gpu, "--nodes", str(case.nodes), "--recipe", recipe)
    done = launch(*command, *flags, "--python", python, timeout=600)
    (titan, _) = versions(python) or ("", "")
    words = (case.old if titan.startswith("0.2") else case.new) or case.refused
    planned = json.loads(done.stdout or "{}")
    proof, parts = planned.get("proof", {}), planned.get("memory_parts_gib")
    if words:
        assert done.returncode in (2, 3) and words in done.stderr, (proof, done.stderr)
        assert not proof or (words in proof["refused"]["why"] and "Failed to load" not in done.stderr), proof
        return
    assert (done.returncode, proof["torchtitan"], proof["refused"]) == (0, titan, None), proof
    world = case.nodes * (4 if case.gpu.startswith("gb") else 8)
    assert [one["rank"] for one in proof["ranks"]] == [0, world - 1]
    for one in proof["ranks"]:
        mesh = " ".join(f"{name}={size}" for name, size in one.get("mesh", {}).items() if size > 1)
        assert (mesh, one["untried"]) == (case.mesh, "") or (not case.whole and one["untried"]), one
    if parts and case.whole:  # the plan's formula: weights and two moments; rank 0 has the largest share
        held = 12 * proof["ranks"][0]["parameters"] / 2**30
        assert held == pytest.approx(parts["states"], rel=0.01, abs=0.006)


def first_five_or_all() -> tuple[Case, ...]:
    return BANK if os.environ.get("LAUNCHER_TEST_PROOF_BANK") == "1" else BANK[:5]


@pytest.mark.parametrize("case", first_five_or_all(), ids=lambda case: case.name)
def test_what_torchtitan_takes_and_refuses(case: Case, python: str, launch: Launch) -> None:
    outcome(launch, python, case)
