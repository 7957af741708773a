"""The results row of a run directory."""

from __future__ import annotations

from launcher.cluster.state import JobState
from launcher.follow import read_records
from launcher.results.rows import Row, summarise
from launcher.runs import Run


def row_of(run: Run, state: JobState) -> Row | None:
    """None where no node has logged a step yet, or the run directory does not say what was asked for.

    A run that has not ended in success is incomplete, whatever its log says.
    """
    spec = run.spec
    recipe = spec.get("recipe")
    records = read_records(run.logs)
    if not isinstance(recipe, dict) or not any(records.values()):
        return None
    return summarise(
        records,
        gpu=str(spec.get("gpu", "?")),
        nodes=int(spec.get("nodes", 0)),
        gpus_per_node=int(spec.get("gpus_per_node", 0)),
        local_batch_size=int(recipe.get("local_batch_size", 0)),
        steps=int(recipe.get("steps", 0)),
        log_freq=max(1, int(recipe.get("log_freq", 1))),
        finished=state.name == "COMPLETED",
    )
