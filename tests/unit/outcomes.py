"""Results made by hand: a plausible complete run of llama3-8b on nine GB200 nodes, and what a test changes in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.logs.steps import StepRecord
from launcher.results.outcome import NON_FINITE, RESTARTED, Lack, NodeResult, Outcome, Problem, Spread, Startup
from launcher.scheduler.state import FAILED, GOING, UNKNOWN, WAITING
from tests.unit.titan_log import STEPS, T0
from tests.unit.titan_log import step as step_line

LOSSES = (12.2512, 10.9034, 9.9821, 9.2456, 8.8213, 8.3127, 7.9014, 7.5233, 7.2018, 6.9127, 6.6542)
SOFTWARE = {"torch": "2.14.1", "torchtitan": "0.2.2", "cuda": "13.0", "nccl": "2.28.9", "driver": "580.95.05"}
SOFTWARE |= {"python": "3.12.3"}
STATES = FAILED | GOING | WAITING | {UNKNOWN}
INPUTS = {"threshold": 0.95, "max_spread": 0.05, "baseline": "published", "date": "2026-11-22", "launcher": "1"}
PER_TOKEN = 57.914e9  # FLOP of Llama-3-8B at 8192 tokens, as torchtitan counts them


def spread(median: float, relative: float = 0.004, count: int = 81) -> Spread:
    """Quartiles `relative` of the median away on both sides, the ends thrice as far."""
    q, end = median * relative, median * relative * 3
    return Spread(median, median - q, median + q, median - end, median + end, count)


def nodes(*tps: float | None, host: str = "gb200") -> tuple[NodeResult, ...]:
    """Nodes gb200-001, … with these medians."""
    return tuple(NodeResult(f"{host}-{number:03}", value) for number, value in enumerate(tps, 1))


NINE = nodes(*(17930.0 + 10 * offset for offset in range(-4, 5)))


def point(step: int, loss: float, tps: float = 17930.0, tflops: float | None = None) -> StepRecord:
    return StepRecord(step, loss, 2.5, 159.31, 86.58, tps, tflops, 46.15)


def points(losses: tuple[float, ...] = LOSSES, tps: float = 17930.0) -> tuple[StepRecord, ...]:
    return tuple(point(step, loss, tps / 4 if step == 1 else tps) for step, loss in zip(STEPS, losses, strict=False))


def problems(*texts: str) -> tuple[Problem, ...]:
    """As results/read.py makes them, told by their words."""
    known = {problem.text: problem for problem in (RESTARTED, NON_FINITE)}

    def kind(text: str) -> Lack:
        if re.fullmatch(r"step \d+ of \d+|no step of \d+ was logged", text):
            return Lack.SHORT
        return Lack.STATE if STATES & set(text.split(" (")[0].split()) else Lack.OTHER

    return tuple(known.get(text) or Problem(text, kind(text)) for text in texts)


def outcome(
    gpu: str = "GB200", nodes: int = 9, per_node: int = 4, local_batch_size: int = 5, compile: bool = False, **more: Any
) -> Outcome:
    """`more` are fields of Outcome; a `settings` replaces single keys of the whole."""
    gpus = nodes * per_node
    base = Outcome(
        run="titan-llama3-8b-0930",
        run_dir="/home/user/runs/titan-llama3-8b-0930",
        state="COMPLETED",
        date="2026-11-20T09:30:00Z",
        cluster="crusoe",
        gpu=gpu,
        nodes=nodes,
        gpus=gpus,
        recipe="llama3-8b",
        local_batch_size=local_batch_size,
        global_batch_size=gpus * local_batch_size,
        seq_len=8192,
        precision="bfloat16",
        compile=compile,
        steps=100,
        step=100,
        loss=LOSSES[-1],
        grad_norm=2.5,
        memory_pct=86.58,
        tps=spread(17930.0),
        tflops=spread(17930.0 * PER_TOKEN / 1e12),
        memory_gib=spread(159.31, 0.0),
        mfu_pct=46.15,
        peak_tflops=2250.0,
        data_share=0.012,
        startup=Startup(queue_s=12.0, container_s=38.0, check_s=9.5, first_step_s=95.0),
        series=points(),
        by_node=NINE,
        versions=SOFTWARE | {"image": "titan-stable-arm64.sqsh"},
        settings={
            "job.gpu": gpu.lower(),
            "job.image": "/data/images/titan-stable-arm64.sqsh",
            "job.nodes": nodes,
            "job.recipe": "llama3-8b",
            "job.data": "/data/c4",
            "job.runtime": "pyxis",
            "job.segment": nodes,
            "profile.gpu": gpu,
            "profile.gpus_per_node": per_node,
            "recipe.model": "llama3",
            "recipe.flavor": "8B",
            "recipe.dataset": "c4",
            "recipe.seq_len": 8192,
            "recipe.local_batch_size": local_batch_size,
            "recipe.global_batch_size": -1,
            "recipe.steps": 100,
            "recipe.log_freq": 10,
            "recipe.lr": 3e-4,
            "recipe.activation_checkpoint": "selective",
            "recipe.compile": compile,
            "recipe.quantize": "none",
            "recipe.param_dtype": "bfloat16",
            "recipe.dp_replicate": 1,
            "recipe.dp_shard": -1,
            "recipe.like_for_like": True,
            "recipe.tensor_parallel": 1,
            "recipe.async_tensor_parallel": False,
            "recipe.context_parallel": 1,
            "recipe.pipeline_parallel": 1,
            "recipe.checkpoint_interval": 0,
            "env.NCCL_MNNVL_ENABLE": "1",
        },
    )
    if "problems" in more:
        more["problems"] = problems(*more["problems"])
    if "settings" in more:
        more["settings"] = {**base.settings, **more["settings"]}
    return replace(base, **more)


def silent(**changes: Any) -> Outcome:
    """A run that logged no step."""
    nothing = dict.fromkeys(("step", "loss", "grad_norm", "memory_pct", "tps", "tflops", "memory_gib", "mfu_pct"))
    return outcome(**{**nothing, "series": (), "by_node": (), "problems": ("no step of 100 was logged",), **changes})


def write_run(
    folder: Path,
    tps: Sequence[float] = (17930.0, 17950.0),
    end: str = '{"exit_code": 0}',
    at: float = 1763630000,
    **changes: Any,
) -> Path:
    """A run directory as a job of 100 steps leaves it, one log a node; `changes` are keys of the recipe.

    `loss` among them is the last step's, and `steps_logged` cuts the logs off.
    """
    last = changes.pop("loss", LOSSES[-1])
    logged = changes.pop("steps_logged", 100)
    settings = {key.removeprefix("recipe."): v for key, v in outcome().settings.items() if "recipe." in key}
    node: dict[str, Any] = {
        "schema": 2,
        "job": {"nodes": len(tps), "gpu": "gb200", "recipe": "llama3-8b"},
        "profile": {"gpu": changes.pop("gpu", "GB200"), "gpus_per_node": 4},
        "recipe": {**settings, **changes},
        "placed": {"run_dir": str(folder)},
    }
    for name in ("job", "logs", "nodes"):
        (folder / name).mkdir(parents=True)
    (folder / "job" / "node.json").write_text(json.dumps(node))
    (folder / "intent.json").write_text(json.dumps({"scheduler": "local", "job_name": "x", "at": at}))
    if end:
        (folder / "end.json").write_text(end)
    for number, median in enumerate(tps):
        lines = []
        for minute, (step, loss) in enumerate(zip(STEPS, (*LOSSES[:-1], last), strict=True)):
            wobble = (-20, 20, 0, 10, -10)[minute % 5]
            lines.append(step_line(step, round(median + wobble), at=T0 + 60 * minute, loss=loss))
        host = f"gb200-{number + 1:03}"
        record = {"ok": True, "host": host, "gpu": f"NVIDIA {node['profile']['gpu']}", **SOFTWARE}
        (folder / "nodes" / f"{number:04}-{host}.json").write_text(json.dumps(record))
        (folder / "logs" / f"{number:04}-{host}.log").write_text(
            "".join(line for line, step in zip(lines, STEPS, strict=True) if step <= logged)
        )
    return folder
