"""What a run will need and reach, said before it starts: memory, tokens/s, time, files. Pure; docs/plan.md explains it.

Memory of a GPU is a formula for torchtitan's Llama 3 under FSDP, in eager mode:

    states       12 bytes x parameters / shards: fp32 weights and Adam's two moments. The gradients (4 more) are whole
                 when the activations are gone: the larger of the two moments counts.
    saved        what the layers keep for the backward pass, by the kind of activation checkpointing
    recomputed   one whole layer, while its backward pass runs (not with "none", where all layers are saved)
    logits       2 bytes x tokens x vocabulary in bf16, and three times as many in fp32 (log-softmax, its gradient and
                 the loss's): the allocator keeps all four
    gathered     the unsharded weights of two layers, of the embedding and of the last layer, and the last's gradient;
                 with tensor parallelism, what each rank has of a layer for the whole sequence: the inputs of attention
                 and feed-forward, and the gradients of both

Held against the memory column of the source page's and Crusoe's twelve rows (12 to 128 GPUs of four types, batches of
2, 4 and 5), all eager 8B with selective checkpointing, it is off by -1.1% to +1.7%; tests/unit/test_plan.py keeps it
within MEMORY_IS_GOOD_TO. torchtitan's own eager rows of 2024 have 2% and 8% more. The rest is reasoned, and what is
published of it is off: compiled 8B had 27 to 30% more in 2024 and 6% less in 2025, 70B with tensor parallel 8, full
checkpointing and float8 8 to 15% more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from launcher.base.finding import Finding, error
from launcher.config.hardware import of_gpu
from launcher.config.spec import HUB, MAX_NODES, SAMPLE, RunSpec
from launcher.results.outcome import Outcome
from launcher.results.published import ALIKE, LIMITED, LONG, TORCHTITAN, called, published, same_gpu, say
from launcher.scheduler.parse import seconds
from launcher.stage.shards import TRAIN_FILES
from launcher.stage.view import files_needed, tokens_of
from launcher.titan.weights import SHAPES, Shape

GIB = 2**30
MEMORY_IS_GOOD_TO = 0.02  # of the published rows
FITS = 0.95  # of a GPU's memory: published rows go up to 92.8%, and the formula is good to 2%
TIGHT = 0.98  # above it, NCCL's buffers and the CUDA context have no room
START_S = 180.0  # queue excluded: container, node check, imports, first step. Assumed; `results` shows what it was.

# In these a run may differ from the row that it is held against: by how much they change the speed is not guessed.
NOT_ADJUSTED = {
    "recipe.compile",
    "recipe.quantize",
    "recipe.activation_checkpoint",
    "recipe.local_batch_size",
    "recipe.like_for_like",
}


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in GiB, at the fullest moment of a step; the parts as in this module's docstring."""

    states: float
    saved: float
    recomputed: float
    logits: float
    gathered: float
    at_optimizer: float  # the other full moment: weights, moments and gradients, without activations

    @property
    def total(self) -> float:
        return max(self.states + self.saved + self.recomputed + self.logits + self.gathered, self.at_optimizer)


@dataclass(frozen=True)
class Plan:
    """The prediction, by the keys that JSON has. None: it cannot be said, and `notes` has the reason."""

    tps: float | None  # per GPU
    memory_gib: float | None
    wall_s: float | None  # at `tps`, with START_S
    node_hours: float | None
    c4_files: int | None
    basis: str  # the published row, as it is called
    differs: tuple[str, ...]  # in what this run is another one
    tokens: int  # in all steps
    limit_s: int | None
    memory: Memory | None  # not in JSON: its parts are
    device_gib: float | None
    verdict: str  # "fits", "tight", "does not fit" or ""
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    checkpoint_gb: float | None = None  # of one, where the run saves any
    fitting_batch: int | None = None  # the largest that fits, where the run's own does not


def plan(spec: RunSpec, rows: Sequence[Outcome] | None = None) -> Plan:
    """The prediction for a run. `rows`: published ones, read when None."""
    memory, device = memory_of(spec), _device_gib(spec)
    notes = [] if memory else [_why_no_memory(spec)]
    if spec.gpu_gib:
        notes.append(f"by their names in Slurm, the GPUs have {device:.1f} GiB, less than others of their type")
    if memory and device is None:
        notes.append(f"how much memory a {spec.profile.gpu} has is not known here")
    if memory and spec.recipe.tensor_parallel > 1:
        notes.append("memory: published runs with tensor parallelism needed up to 15% more (docs/plan.md)")
    shape, saves = _shape(spec), spec.recipe.checkpoint_interval > 0
    row, differs = _speed(spec, published() if rows is None else rows)
    tps, tokens = row.median_tps if row else None, tokens_of(spec)
    wall_s = tokens / (tps * spec.gpus) + START_S if tps else None
    wants_files = spec.recipe.dataset == "c4" and spec.job.data not in (SAMPLE, HUB)
    if wants_files and spec.data_parallel > TRAIN_FILES:
        notes.append(
            f"C4 has {TRAIN_FILES:,} files, fewer than {spec.data_parallel:,} data-parallel ranks: every rank "
            "reads all of them and keeps its share (docs/data.md)"
        )
    verdict = _verdict(spec, memory, device)
    short = device if verdict in ("tight", "does not fit") else None
    return Plan(
        tps=tps,
        memory_gib=_needed(spec, memory) if memory else None,
        wall_s=wall_s,
        node_hours=spec.job.nodes * wall_s / 3600 if wall_s else None,
        c4_files=files_needed(spec, TRAIN_FILES) if wants_files else None,
        basis=called(row) if row else "",
        differs=differs,
        tokens=tokens,
        limit_s=seconds(spec.job.time) or None,
        memory=memory,
        device_gib=device,
        verdict=verdict,
        advice=_advice(spec, short) if short else (),
        notes=tuple(notes),
        checkpoint_gb=round(shape.checkpoint_bytes / 1e9, 2) if shape and saves else None,
        fitting_batch=_fitting_batch(spec, short) if short else None,
    )


def memory_findings(spec: RunSpec) -> list[Finding]:
    """What there is to say where a GPU has not the memory that the run needs."""
    memory, device = memory_of(spec), _device_gib(spec)
    if memory is None or device is None or _verdict(spec, memory, device) != "does not fit":
        return []
    needed, there = math.ceil(_needed(spec, memory)), math.floor(TIGHT * device)
    fix = ", or ".join(_advice(spec, device))
    return [error("memory-short", fix, batch=spec.recipe.local_batch_size, needed=needed, there=there)]


def parameters_of(spec: RunSpec) -> int | None:
    """By the model's dimensions; None where they are not known."""
    model = _shape(spec)
    return model.parameters if model else None


def _shape(spec: RunSpec) -> Shape | None:
    return SHAPES.get(spec.recipe.flavor) if spec.recipe.model == "llama3" else None


def _why_no_memory(spec: RunSpec) -> str:
    if spec.profile.device != "cuda":
        return "the formula is for a GPU's memory; on a CPU the trainer logs its process's memory"
    if _shape(spec) is None:
        return f"the dimensions of {spec.recipe.model} {spec.recipe.flavor} are not known here"
    return "the formula for memory is not made for pipeline parallelism" if spec.recipe.pipeline_parallel > 1 else ""


def memory_of(spec: RunSpec) -> Memory | None:
    """By the formula above; None where it does not hold."""
    recipe, model = spec.recipe, _shape(spec)
    if model is None or _why_no_memory(spec):
        return None
    tensor, context = recipe.tensor_parallel, recipe.context_parallel
    shards = recipe.dp_shard * context if recipe.dp_shard > 0 else spec.gpus // (tensor * recipe.dp_replicate)
    count = model.parameters / tensor
    width = 2 if recipe.param_dtype == "bfloat16" else 4  # bytes
    tokens = recipe.local_batch_size * recipe.seq_len / context
    every_layer = tokens * width / tensor
    kept = {
        # Input, wq, attention and w2 (dim each), wv and w1: of the matrix products torchtitan keeps every second.
        "selective": 4 * model.hidden_size + model.kv_dim + model.intermediate_size,
        "full": model.hidden_size,  # the input
        "none": _whole_layer(model),
    }[recipe.activation_checkpoint]
    head = model.vocab_size * model.hidden_size
    whole_sequence = 4 * tokens * width * model.hidden_size if tensor > 1 else 0.0
    gathered = 3 * head + 2 * model.layer_parameters
    return Memory(
        states=12 * count / shards / GIB,
        saved=model.num_hidden_layers * every_layer * kept / GIB,
        recomputed=every_layer * _whole_layer(model) / GIB if recipe.activation_checkpoint != "none" else 0.0,
        logits=(width + 3 * 4) * tokens * model.vocab_size / tensor / GIB,
        gathered=(width * gathered / tensor + whole_sequence) / GIB,
        at_optimizer=16 * count / shards / GIB,
    )


def _whole_layer(model: Shape) -> int:
    """Numbers that a layer's backward pass needs, per token: nothing left out.

    Input, two norms, query, attention, residual, and key and value repeated for every head (8 x dim); key and value
    themselves; and w1, silu, w3 and their product.
    """
    return 8 * model.hidden_size + 2 * model.kv_dim + 4 * model.intermediate_size


def _needed(spec: RunSpec, memory: Memory) -> float:
    """torch.compile was published to need about half the activation memory, and cannot shrink all that "full" saves."""
    if not spec.recipe.compile:
        return memory.total
    saved = memory.saved if spec.recipe.activation_checkpoint != "full" else 0.0
    return max(memory.total - (saved + memory.recomputed) / 2, memory.at_optimizer)


def _device_gib(spec: RunSpec) -> float | None:
    known = of_gpu(spec.profile.gpu)
    return spec.gpu_gib or (known.memory_gib if known else None)


def _verdict(spec: RunSpec, memory: Memory | None, device: float | None) -> str:
    if memory is None or device is None:
        return ""
    if memory.total <= FITS * device:
        return "fits"
    # What torch.compile saves is known roughly: a run that needs it to fit is never called more than tight.
    return "tight" if _needed(spec, memory) <= TIGHT * device else "does not fit"


def _fits(spec: RunSpec, device: float, nodes: int = 0, **recipe: Any) -> bool:
    """Whether it would with these changes."""
    job = replace(spec.job, nodes=nodes or spec.job.nodes)
    other = replace(spec, recipe=replace(spec.recipe, **recipe), job=job)
    return _verdict(other, memory_of(other), device) == "fits"


def _fitting_batch(spec: RunSpec, device: float) -> int | None:
    # A smaller batch, as more nodes, only ever needs less: looked for by halves, as `submit` waits for this.
    smaller = range(1, spec.recipe.local_batch_size)
    fits = partial(_fits, spec, device)
    return bisect_left(smaller, True, key=lambda b: not fits(local_batch_size=b)) or None


def _advice(spec: RunSpec, device: float) -> tuple[str, ...]:
    """What would make it fit, one change each."""
    fits = partial(_fits, spec, device)
    batch = _fitting_batch(spec, device)
    found = [f"--batch-size {batch}"] if batch else []
    if spec.recipe.activation_checkpoint != "full" and fits(activation_checkpoint="full"):
        found.append("--set recipe.activation_checkpoint=full")
    if spec.recipe.dp_shard < 1:
        more = range(spec.job.nodes + 1, min(16 * spec.job.nodes, MAX_NODES) + 1)
        at = bisect_left(more, True, key=lambda n: fits(nodes=n))
        found += [f"--nodes {more[at]}"] if at < len(more) else []
    return tuple(found)


def _speed(spec: RunSpec, rows: Sequence[Outcome]) -> tuple[Outcome | None, tuple[str, ...]]:
    """The nearest published row, and in what the run is another one; or no row, and why."""
    gpu, values = spec.profile.gpu, {"framework": TORCHTITAN, **spec.values()}
    mine = [
        (row, {key for key in ALIKE if key in row.settings and row.settings[key] != values[key]})
        for row in rows
        if same_gpu(row.gpu, gpu) and row.tps and row.settings.get("framework", TORCHTITAN) == TORCHTITAN
    ]
    if not mine:
        return None, (f"no published row of {gpu}",)
    like = [(row, unlike) for row, unlike in mine if unlike <= NOT_ADJUSTED]
    if not like:
        least = min(
            (unlike - NOT_ADJUSTED for _, unlike in mine), key=lambda keys: ("recipe.flavor" in keys, len(keys))
        )
        names = [word for key, word in ALIKE.items() if key in least]
        return None, (f"no published row of {gpu} with this run's {' and '.join(names)}",)
    batch = "recipe.local_batch_size"
    row, unlike = min(
        like,
        key=lambda one: (
            batch in one[1],
            len(one[1]),
            LIMITED in one[0].settings,
            abs(math.log(one[0].gpus / spec.gpus)),
            (one[0].step or LONG) < LONG,
        ),
    )
    differs = [
        f"{word} {say(values[key])}, not {say(row.settings[key])}" for key, word in ALIKE.items() if key in unlike
    ]
    differs += [f"{spec.gpus} GPUs, not {row.gpus}"] if row.gpus != spec.gpus else []
    return row, tuple(f"{what}: not adjusted" for what in differs)


_DIGITS = {"tps": 1, "memory_gib": 2, "wall_s": 1, "node_hours": 4}


def as_dict(found: Plan) -> dict[str, Any]:
    """For JSON, and for RUN/plan.json, which `results` holds against the outcome."""
    values: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in vars(found).items()
    }
    for key, digits in _DIGITS.items():
        values[key] = values[key] and round(values[key], digits)
    memory = values.pop("memory")
    values["memory_parts_gib"] = {key: round(value, 2) for key, value in vars(memory).items()} if memory else None
    # `tps_high` is of version 0.1, which guessed a range.
    return values | {"start_s": START_S, "tps_high": values["tps"]}


def prediction(spec: RunSpec) -> dict[str, Any]:
    """`as_dict` for RUN/plan.json. A prediction is a help: whatever is wrong with it, it stops no submission."""
    try:
        return as_dict(plan(spec))
    except Exception as error:  # the one place that may: a run must not fail for what is only said about it
        return {"notes": [f"no prediction: {error}"]}
