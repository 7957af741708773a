"""The results row of a run directory. Its `job/node.json` may have been edited or damaged since it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.cluster.state import JobState
from launcher.follow import read_records
from launcher.results.rows import Row, summarise
from launcher.runs import Run

_MOST = 10**9  # steps, nodes, sequences: more is damage, and Python refuses to print what is far longer


def row_of(run: Run, state: JobState) -> Row | None:
    """None where no node has logged a step yet, or the run directory does not say what was asked for.

    A run that has not ended in success is incomplete, whatever its log says.
    """
    spec = run.spec
    recipe = _recipe(spec)
    nodes, gpus_per_node = _count(spec.get("nodes")), _count(spec.get("gpus_per_node"))
    local_batch_size, steps = _count(recipe.get("local_batch_size")), _count(recipe.get("steps"))
    log_freq = _count(recipe.get("log_freq", 1))
    if (
        nodes is None
        or gpus_per_node is None
        or local_batch_size is None
        or steps is None
        or log_freq is None
    ):
        return None
    records = read_records(run.logs)
    if not any(records.values()):
        return None
    gpu = spec.get("gpu")
    return summarise(
        records,
        gpu=gpu if isinstance(gpu, str) else "?",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        local_batch_size=local_batch_size,
        steps=steps,
        log_freq=max(1, log_freq),
        finished=state.name == "COMPLETED",
    )


def steps_of(run: Run) -> int:
    """How many training steps were asked for; 0 where the run directory does not say."""
    return _count(_recipe(run.spec).get("steps")) or 0


def _recipe(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = spec.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _count(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST:
        return value
    return None
