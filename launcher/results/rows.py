"""One run's result in the published form and in one sentence: pure functions of an Outcome.

Runs are compared on tokens/s. MFU depends on the peak that torchtitan divided by, which changed between its
releases, so wherever a person reads MFU the peak stands beside it.
"""

from __future__ import annotations

import html
import re

from launcher.base.output import counted, plain
from launcher.config.hardware import of_gpu
from launcher.config.mfu import mfu_text
from launcher.logs.steps import StepRecord
from launcher.results.outcome import NO_STEP_COUNTS, Lack, Outcome, short_of

COLUMNS = ("GPU Type", "Compute nodes in training job", "Batch size", "Performance indicators at the last logged step")
_WIDTHS = (8, 29, 10)  # of the published table's first three columns


def median_mfu_pct(outcome: Outcome) -> float | None:
    """The MFU in percent that stands beside the median of tokens/s: the median TFLOP/s through the trainer's peak.

    Where that peak cannot be told, the last step's, as it was printed; None where the trainer printed none.
    """
    if outcome.mfu_pct is None or outcome.peak_tflops is None or outcome.tflops is None:
        return outcome.mfu_pct
    return 100 * outcome.tflops.median / outcome.peak_tflops


def shown_mfu(outcome: Outcome) -> str:
    """With its denominator; of CPUs no peak is known."""
    return mfu_text(None if outcome.on_cpu else median_mfu_pct(outcome), outcome.peak_tflops)


def gpus_text(outcome: Outcome) -> str:
    """`9 (36 GPU)`, as the published table writes it."""
    return f"{outcome.nodes} ({counted(outcome.gpus, 'rank') if outcome.on_cpu else f'{outcome.gpus} GPU'})"


def mfu_at_other_peaks(outcome: Outcome) -> dict[float, float]:
    """`median_mfu_pct` by the GPU's usual peaks in TFLOP/s, but for the one that the trainer divided by.

    Empty where the trainer printed none: a quantised run is not measured against a bf16 peak.
    """
    if outcome.mfu_pct is None or outcome.tflops is None:
        return {}
    known = of_gpu(outcome.gpu)
    others = (peak for peak in (known.peaks if known else ()) if peak != outcome.peak_tflops)
    return {peak: 100 * outcome.tflops.median / peak for peak in others}


def is_incomplete(outcome: Outcome) -> bool:
    """Whether it did not end well or did not get to its last step, whatever else may be wrong with it."""
    return outcome.state != "COMPLETED" or outcome.has(Lack.SHORT)


def indicators(outcome: Outcome, last: StepRecord) -> str:
    """The last logged step in the published table's form, without its number."""
    parts = [f"loss: {last.loss:7.4f}"]
    if last.grad_norm is not None:
        parts.append(f"grad_norm: {last.grad_norm:7.4f}")
    share = "" if outcome.memory_pct is None else f"({outcome.memory_pct:.2f}%)"
    parts.append(f"memory: {last.memory_gib:5.2f}GiB{share}")
    parts.append(f"tps: {last.tps:,.0f}")
    if last.tflops is not None:
        parts.append(f"tflops: {last.tflops:,.2f}")
    parts.append("mfu: N/A" if outcome.mfu_pct is None else f"mfu: {outcome.mfu_pct:.2f}%")
    return "  ".join(parts)


def markdown_header() -> str:
    """The two lines above `markdown_row`s."""
    cells = [name.ljust(width) for name, width in zip(COLUMNS, (*_WIDTHS, 0), strict=True)]
    return f"|{'|'.join(cells)}|\n|{'|'.join('-' * len(cell) for cell in cells)}|"


def markdown_row(outcome: Outcome) -> str:
    """The row in the published table's four columns; what is not a whole result says so instead of `step:`."""
    cells = (escape(outcome.gpu), gpus_text(outcome), str(outcome.local_batch_size))
    padded = [cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    return f"|{'|'.join(padded)}|{last_step(outcome)}|"


def last_step(outcome: Outcome) -> str:
    """The fourth column: `step: 100  loss: …`, or `step 40 of 100 (FAILED)  loss: …`."""
    if outcome.last is None:
        return short_of(None, outcome.steps).text
    shown = indicators(outcome, outcome.last)
    if outcome.complete:
        return f"step: {outcome.step}  {shown}"
    short = short_of(outcome.step, outcome.steps).text
    others = "; ".join(escape(problem.text) for problem in outcome.problems if problem.kind is not Lack.SHORT)
    return f"{short}{f' ({others})' if others else ''}  {shown}"


_MARKDOWN = re.compile(r"[\\`*\[\]|]")


def escape(text: str) -> str:
    """Words of others in a cell of a Markdown table: no markup, no HTML, no end of the cell."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(plain(text), quote=False))


def summary_line(outcome: Outcome) -> str:
    """One line: the median, its spread over nodes, MFU with its denominator, and what makes it less than a result."""
    parts = [problem.text for problem in outcome.problems]
    if outcome.step is None:
        return plain(", ".join(parts) or short_of(None, outcome.steps).text)
    if parts and is_incomplete(outcome):
        parts[0] = f"incomplete: {parts[0]}"
    if outcome.tps is None:
        parts += [] if outcome.has(Lack.NO_STEP_COUNTS) else [NO_STEP_COUNTS.text]
    else:
        steps = counted(records_used(outcome), "logged step")
        spread, nodes = "", outcome.measured
        if len(nodes) > 1:
            spread = f" (nodes {nodes[0].tps:,.0f}..{nodes[-1].tps:,.0f}, slowest {nodes[0].host})"
        parts.append(f"median {outcome.tps.median:,.0f} tokens/s per {outcome.unit} over {steps}{spread}")
    parts.append(f"MFU {shown_mfu(outcome)}")
    return plain(", ".join(parts))


def records_used(outcome: Outcome) -> int:
    """How many logged steps stand behind the median: of the nodes that have one, the mean, rounded up."""
    return -(-outcome.tps.count // outcome.measured_at_once) if outcome.tps else 0
