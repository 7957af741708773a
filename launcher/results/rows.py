"""From step records to a results row: pure functions, no files and no clock.

Runs are compared on tokens/s. MFU depends on the peak that torchtitan divided by, which changed between its
releases, so wherever a person reads MFU the peak stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launcher.titan.log import StepRecord

# bf16 peaks in TFLOP/s that torchtitan 0.2 and 0.3 divide by, and 2450, the vendor's own figure for GB200.
KNOWN_PEAKS = (148.0, 154.85, 191.5, 312.0, 362.0, 756.0, 835.0, 989.0, 1300.0, 2250.0, 2450.0, 2500.0)
SAME_STEP_SECONDS = 2.0
COLUMNS = (
    "GPU Type",
    "Compute nodes in training job",
    "Batch size",
    "Performance indicators at the last logged step",
)
_WIDTHS = (8, 29, 10)  # of the published table's first three columns


@dataclass(frozen=True, slots=True)
class Row:
    """One run's result. Throughput is per GPU; `last` is what the run's last logged step said.

    `median_tps` is the median over nodes of each node's median after warm-up (see `after_warmup`), the other
    node figures are the ends of the same list. `records_used` counts logged steps, not training steps.
    """

    gpu: str
    nodes: int
    gpus: int
    local_batch_size: int
    steps: int
    last: StepRecord | None
    peak_tflops: float | None
    median_tps: float | None
    records_used: int
    nodes_logged: int
    slowest_node: str
    slowest_tps: float | None
    fastest_tps: float | None
    incomplete: bool
    restarted: bool
    non_finite: bool


def summarise(
    records_by_node: Mapping[str, Sequence[StepRecord]],
    *,
    gpu: str,
    nodes: int,
    gpus_per_node: int,
    local_batch_size: int,
    steps: int,
    log_freq: int,
    finished: bool = True,
) -> Row:
    """The row of a run, from each node's records in the order of its log.

    `last` comes from the first node (as the mapping orders them) that got furthest and knows the loss. A run is
    incomplete when its last logged step is not the last that torchtitan logs (step 1 and multiples of
    `log_freq`), or when the caller knows that it did not end well and says `finished=False`.
    """
    kept: dict[str, list[StepRecord]] = {}
    medians: dict[str, float] = {}
    restarted, used = False, 0
    for node, records in records_by_node.items():
        unique, again = deduplicate(records)
        restarted |= bool(again)
        if not unique:
            continue
        kept[node] = unique
        if warm := after_warmup(unique, log_freq, again):
            medians[node] = median(record.tps for record in warm)
            used = max(used, len(warm))
    last = max(
        (records[-1] for records in kept.values()),
        key=lambda record: (record.step, record.knows_loss),
        default=None,
    )
    expected = steps // log_freq * log_freq or min(steps, 1)
    slowest = min(medians, key=lambda node: medians[node], default="")
    return Row(
        gpu=gpu,
        nodes=nodes,
        gpus=nodes * gpus_per_node,
        local_batch_size=local_batch_size,
        steps=steps,
        last=last,
        peak_tflops=peak_of(last.tflops, last.mfu_pct) if last else None,
        median_tps=median(medians.values()) if medians else None,
        records_used=used,
        nodes_logged=len(kept),
        slowest_node=slowest,
        slowest_tps=medians.get(slowest),
        fastest_tps=max(medians.values(), default=None),
        incomplete=not finished or last is None or last.step < expected,
        restarted=restarted,
        non_finite=any(not _is_finite(record) for records in records_by_node.values() for record in records),
    )


def deduplicate(records: Sequence[StepRecord]) -> tuple[list[StepRecord], frozenset[int]]:
    """One record per step in step order, and the steps that were the first to be logged after a restart.

    A restart goes back to a checkpoint and logs steps again: the last record of a step counts. Equal steps
    within two seconds are no restart but several ranks or nodes that share one log.
    """
    by_step: dict[int, StepRecord] = {}
    again = set()
    previous: StepRecord | None = None
    for record in records:
        if previous is not None and _went_back(previous, record):
            again.add(record.step)
        by_step[record.step] = record
        previous = record
    return [by_step[step] for step in sorted(by_step)], frozenset(again)


def after_warmup(
    records: Sequence[StepRecord], log_freq: int, restarts: frozenset[int] = frozenset()
) -> list[StepRecord]:
    """The records whose tokens/s count, of one node's records without repetitions.

    Step 1 never counts: it pays for start-up, and torchtitan divides its time wrongly. Where at least three
    records remain, those up to step `log_freq` don't either, since caches, allocator and clocks still settle
    there, nor does the first after a restart, for the same reasons.
    """
    rest = [record for record in records if record.step > 1]
    if len(rest) < 3:
        return rest
    return [record for record in rest if record.step > log_freq and record.step not in restarts] or rest


def peak_of(tflops: float | None, mfu_pct: float | None) -> float | None:
    """The peak in TFLOP/s that an MFU was divided by, or None where the two figures are too coarse to tell.

    Both are printed with two decimals. If exactly one known peak fits within that rounding, that is it.
    """
    if not tflops or not mfu_pct or not math.isfinite(tflops) or not math.isfinite(mfu_pct):
        return None
    derived = 100 * tflops / mfu_pct
    error = derived * (0.005 / abs(mfu_pct) + 0.005 / abs(tflops))
    if derived <= 0 or error > 0.05 * derived:
        return None
    fitting = [peak for peak in KNOWN_PEAKS if abs(peak - derived) <= error]
    return fitting[0] if len(fitting) == 1 else derived


def mfu_text(mfu_pct: float | None, peak_tflops: float | None) -> str:
    """MFU for people: `45.25% of 2250 TFLOP/s`, `12.00% of about 417 TFLOP/s`, `N/A`."""
    if mfu_pct is None:
        return "N/A"
    if peak_tflops is None:
        return f"{mfu_pct:.2f}% of an unknown peak"
    peak = f"{peak_tflops:g}" if peak_tflops in KNOWN_PEAKS else f"about {peak_tflops:.0f}"
    return f"{mfu_pct:.2f}% of {peak} TFLOP/s"


def indicators(record: StepRecord) -> str:
    """A record in the published table's form, without its step."""
    parts = [f"loss: {record.loss:7.4f}"]
    if record.grad_norm is not None:
        parts.append(f"grad_norm: {record.grad_norm:7.4f}")
    parts.append(f"memory: {record.memory_gib:5.2f}GiB({record.memory_pct:.2f}%)")
    parts.append(f"tps: {record.tps:,.0f}")
    if record.tflops is not None:
        parts.append(f"tflops: {record.tflops:,.2f}")
    parts.append("mfu: N/A" if record.mfu_pct is None else f"mfu: {record.mfu_pct:.2f}%")
    return "  ".join(parts)


def markdown_header() -> str:
    """The two lines above `markdown_row`s."""
    cells = [name.ljust(width) for name, width in zip(COLUMNS, (*_WIDTHS, 0), strict=True)]
    return f"|{'|'.join(cells)}|\n|{'|'.join('-' * len(cell) for cell in cells)}|"


def markdown_row(row: Row) -> str:
    """The row in the published table's four columns; an incomplete run says how far it came, not `step:`."""
    if row.last is None:
        result = f"no step of {row.steps} was logged"
    elif row.incomplete:
        result = f"step {row.last.step} of {row.steps}  {indicators(row.last)}"
    else:
        result = f"step: {row.last.step}  {indicators(row.last)}"
    cells = (row.gpu, f"{row.nodes} ({row.gpus} GPU)", str(row.local_batch_size))
    padded = [cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    return f"|{'|'.join(padded)}|{result}|"


def summary_line(row: Row) -> str:
    """One line: the median, its spread over nodes, MFU with its peak, and what makes it less than a result."""
    if row.last is None:
        return f"no step of {row.steps} was logged"
    parts = []
    if row.incomplete:
        parts.append(f"incomplete: step {row.last.step} of {row.steps}")
    if row.nodes_logged < row.nodes:
        parts.append(f"only {row.nodes_logged} of {row.nodes} nodes logged")
    if row.non_finite:
        parts.append("NaN or infinity in loss or grad_norm")
    if row.restarted:
        parts.append("restarted")
    if row.median_tps is None:
        parts.append("no step after warm-up")
    else:
        steps = "1 logged step" if row.records_used == 1 else f"{row.records_used} logged steps"
        spread = ""
        if row.nodes_logged > 1:
            spread = f" (nodes {row.slowest_tps:,.0f}..{row.fastest_tps:,.0f}, slowest {row.slowest_node})"
        parts.append(f"median {row.median_tps:,.0f} tokens/s per GPU over {steps}{spread}")
    parts.append(f"mfu {mfu_text(row.last.mfu_pct, row.peak_tflops)}")
    return ", ".join(parts)


def row_as_dict(row: Row) -> dict[str, object]:
    """The row as JSON values; NaN and infinity, which JSON lacks, become null beside `non_finite: true`."""
    last = row.last
    values: dict[str, object] = {
        "gpu": row.gpu,
        "nodes": row.nodes,
        "gpus": row.gpus,
        "local_batch_size": row.local_batch_size,
        "steps": row.steps,
        "step": last.step if last else None,
        "loss": last.loss if last else None,
        "grad_norm": last.grad_norm if last else None,
        "memory_gib": last.memory_gib if last else None,
        "memory_pct": last.memory_pct if last else None,
        "tps": last.tps if last else None,
        "tflops": last.tflops if last else None,
        "mfu_pct": last.mfu_pct if last else None,
        "peak_tflops": row.peak_tflops,
        "median_tps": row.median_tps,
        "records_used": row.records_used,
        "nodes_logged": row.nodes_logged,
        "slowest_node": row.slowest_node or None,
        "slowest_tps": row.slowest_tps,
        "fastest_tps": row.fastest_tps,
        "incomplete": row.incomplete,
        "restarted": row.restarted,
        "non_finite": row.non_finite,
    }
    return json_values(values)


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinity, which JSON lacks and many of its readers refuse."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _is_finite(record: StepRecord) -> bool:
    return math.isfinite(record.loss) and (record.grad_norm is None or math.isfinite(record.grad_norm))


def _went_back(previous: StepRecord, record: StepRecord) -> bool:
    if record.step != previous.step:
        return record.step < previous.step
    if record.time is None or previous.time is None:
        return record.rank == previous.rank
    return record.time - previous.time > SAME_STEP_SECONDS
