"""Results as text for a terminal, Markdown and CSV: pure functions of Outcomes.

A run that is not a whole result never shows bare figures: a table says what it lacks in their place or beside them.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.base.output import columns, duration, plain, some
from launcher.config.mfu import mfu_text
from launcher.results.columns import MARKDOWN, TERMINAL, Cell, as_flat, shown_in
from launcher.results.outcome import PHASES, Outcome, Spread, per_unit
from launcher.results.rows import (
    COLUMNS,
    escape,
    gpus_text,
    last_step,
    markdown_header,
    markdown_row,
    mfu_at_other_peaks,
    shown_mfu,
    summary_line,
)
from launcher.runs.attempts import Attempt, ended_by

_WIDTH = 100  # columns
_NAMES = {"cuda": "CUDA", "nccl": "NCCL", "driver": "driver", "python": "Python"}


def one_run(outcome: Outcome) -> str:
    """A run's published row, its summary, and below them everything else that is known, a line each."""
    lines = [markdown_header(), markdown_row(outcome), "", summary_line(outcome), ""]
    for name, text in _details(outcome):
        wrapped = textwrap.wrap(plain(text), _WIDTH - 14, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {name if n == 0 else '':<10}  {part}" for n, part in enumerate(wrapped)]
    return "\n".join(lines)


def _details(outcome: Outcome) -> list[tuple[str, str]]:
    """What is known under what name; nothing is printed of an empty text."""
    per, image = f" per {outcome.unit}", outcome.versions.get("image", "")
    others = ", ".join(mfu_text(mfu, peak, "") for peak, mfu in mfu_at_other_peaks(outcome).items())
    share, digest = outcome.data_share, outcome.versions.get("digest", "")
    return [
        ("run", ", ".join(filter(None, (outcome.run, outcome.state, outcome.date, outcome.cluster)))),
        ("asked", _asked(outcome)),
        ("tokens/s", _spread_text(outcome.tps, 0, per)),
        ("TFLOP/s", _spread_text(outcome.tflops, 2, per)),
        ("memory", _spread_text(outcome.memory_gib, 2, " GiB")),
        ("MFU", f"{shown_mfu(outcome)}; also {others}" if others else ""),
        ("data", "" if share is None else f"{100 * share:.1f}% of a step is waiting for data"),
        ("start-up", _startup_text(outcome)),
        ("goodput", _goodput_text(outcome)),
        *((f"attempt {one.number}", attempt_text(one, outcome.unit)) for one in outcome.attempts if outcome.restarts),
        ("slowest", _slowest_text(outcome)),
        ("versions", software_text(outcome)),
        ("image", f"{image} {f'sha256:{digest[:12]}' if digest else ''}".rstrip() if image else ""),
        *(("predicted", text) for text in _predicted(outcome)),
        *(("problem", problem.text) for problem in outcome.problems),
        *(("note", text) for text in outcome.notes),
    ]


def _asked(outcome: Outcome) -> str:
    compiled = "compiled" if outcome.compile else "eager"
    return (
        f"{outcome.recipe}, {outcome.nodes} x {outcome.per_node} {outcome.gpu}, batch {outcome.local_batch_size} x "
        f"{outcome.seq_len} tokens (global {outcome.global_batch_size}), {outcome.precision}, {compiled}"
    )


def _spread_text(value: Spread | None, digits: int, unit: str) -> str:
    if value is None:
        return ""
    if value.count == 1:
        return f"{value.median:,.{digits}f}{unit}, one value"
    return (
        f"{value.median:,.{digits}f}{unit}, quartiles {value.q1:,.{digits}f}..{value.q3:,.{digits}f}, "
        f"all {value.low:,.{digits}f}..{value.high:,.{digits}f}, {value.count} values"
    )


def attempt_text(attempt: Attempt, unit: str) -> str:
    """`n1, n2, steps 1 to 34 (to 20 count), 17,930 tokens/s per GPU, node n2 lost`"""
    lost = attempt.last_step != attempt.kept_step
    steps = f"steps {attempt.first_step} to {attempt.last_step}" if attempt.last_step else "no step"
    count = f" ({f'to {attempt.kept_step}' if attempt.kept_step else 'none'} count)" if lost else ""
    rate = "" if attempt.tps is None else f"{attempt.tps:,.0f} tokens/s per {unit}"
    return ", ".join(filter(None, (some(attempt.hosts), steps + count, rate, ended_by(attempt))))


def _startup_text(outcome: Outcome) -> str:
    parts = [(called, getattr(outcome.startup, name)) for name, called in PHASES]
    known = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in parts if seconds is not None)
    unknown = ", ".join(name for name, seconds in parts if seconds is None)
    return f"{known} ({unknown} not known)" if known and unknown else known


def _goodput_text(outcome: Outcome) -> str:
    spent = outcome.goodput
    if not spent or not outcome.has_spent:
        return ""
    parts = [f"{name[:-2]} {duration(s)}" for name, s in asdict(spent).items() if s and name != "allocation_s"]
    return f"{outcome.goodput_pct or 0:.0f}% of {duration(spent.allocation_s)}: {', '.join(parts)}"


def _slowest_text(outcome: Outcome) -> str:
    if (slowest := outcome.slowest) is None or slowest.tps is None or outcome.tps is None:
        return ""
    below = 100 * (1 - slowest.tps / outcome.tps.median) if outcome.tps.median else 0.0
    return f"{slowest.host}: {slowest.tps:,.0f} tokens/s per {outcome.unit}, {below:.1f}% below the median"


def software_text(outcome: Outcome) -> str:
    return ", ".join(
        f"{_NAMES.get(name, name)} {version}"
        for name, version in outcome.versions.items()
        if name not in ("image", "digest")
    )


def _predicted(outcome: Outcome) -> list[str]:
    """What `launcher plan` said before the run, each beside what came of it."""
    wall_s = outcome.wall_s
    reached = {
        "tps": ("tokens/s per GPU", outcome.median_tps, 0),
        "memory_gib": ("GiB of memory", outcome.memory_gib.high if outcome.memory_gib else None, 1),
        "wall_s": ("s after the queue", wall_s, 0),
        "node_hours": ("node-hours", None if wall_s is None else outcome.nodes * wall_s / 3600, 2),
    }
    lines = []
    for key, (unit, value, digits) in reached.items():
        said = outcome.prediction.get(key)
        if isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 < said < 1e9:
            continue
        if value is None or not outcome.complete:
            lines.append(f"{said:,.{digits}f} {unit}")
        else:
            lines.append(f"{said:,.{digits}f} {unit}, reached {value:,.{digits}f} ({100 * (value / said - 1):+.1f}%)")
    return lines


def table(outcomes: Sequence[Outcome], width: int = 0) -> str:
    """Several runs, a line each; of a run that is no whole result what it lacks, and no figures. `width`: a terminal's,
    where that stands below, and a narrow one gets bare figures.
    """
    shown = sorted(shown_in(TERMINAL), key=lambda column: not column.asked)
    left = 1 + sum(column.asked for column in shown)
    rows = [("run", *(column.title.removesuffix(" per GPU") for column in shown), "")]
    for outcome in outcomes:
        found = [(column, column.shown(outcome)) for column in shown if column.asked or outcome.complete]
        cells = [cell.text if not column.asked and 0 < width < _WIDTH else cell_text(cell) for column, cell in found]
        cells += [""] * (len(shown) - len(cells))
        rows.append((outcome.run, *cells, "" if width else outcome.lacks))
    lacking = [f"{outcome.run}: {outcome.lacks}" for outcome in outcomes if width and outcome.lacks]
    lines = columns([[plain(cell) for cell in row] for row in rows], left, width)
    return "\n".join([*lines, *map(plain, lacking)])


def cell_text(cell: Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.more)))


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table: the published four columns first, then those of ours, and the run."""
    shown = shown_in(MARKDOWN)
    titles = (*COLUMNS, *(per_unit(column.title, outcomes) for column in shown), "Run")
    lines = [f"|{'|'.join(titles)}|", f"|{'|'.join('---' for _ in titles)}|"]
    for outcome in outcomes:
        about = "; ".join(filter(None, (outcome.date[:10], software_text(outcome))))
        cells = (
            escape(outcome.gpu),
            gpus_text(outcome),
            str(outcome.local_batch_size),
            last_step(outcome) if outcome.last else escape(outcome.lacks),
            *(escape(cell_text(column.shown(outcome))) if outcome.complete else "not a result" for column in shown),
            escape(outcome.run) + (f" ({escape(about)})" if about else ""),
        )
        lines.append(f"|{'|'.join(cells)}|")
    return "\n".join(lines)


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """One line a run with all figures, empty where unknown; text that a spreadsheet would run is led by a quote
    mark.
    """
    rows = [as_flat(outcome) for outcome in outcomes]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0] if rows else [])
    writer.writerows([_csv_cell(value) for value in row.values()] for row in rows)
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value if isinstance(value, (int, float)) else ""
    value = plain(value)
    return f"'{value}" if re.match(r"\s*[=+\-@]", value) else value
