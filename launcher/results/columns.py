"""Every column of the results, once: where its value comes from, and how and where people see it. Pure functions.

A new column is its source (a field of Outcome that read.py fills, unless it follows from others) and one entry of
COLUMNS: with a key alone it is in JSON and CSV, with a title also in the terminal's table, in Markdown and on the page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.base.values import json_values
from launcher.config.mfu import peak_text
from launcher.results.accept import MAX_SPREAD, MAX_WAITING
from launcher.results.measure import against_others
from launcher.results.outcome import VERSIONS, Goodput, Lack, Outcome
from launcher.results.published import is_row
from launcher.results.rows import is_incomplete, median_mfu_pct, mfu_at_other_peaks, records_used

TERMINAL, MARKDOWN, PAGE = "terminal", "markdown", "page"
LARGEST = 1e100  # a number beyond this is no measurement, and drawing it overflows


@dataclass(frozen=True)
class Cell:
    """What people see: a text, the number it sorts by where that is not the text, what stands beside it in small, and
    a word where it needs attention.
    """

    text: str
    value: float | None = None
    more: str = ""
    flag: str = ""


@dataclass(frozen=True)
class Column:
    """`value` is what JSON has (None: the field of Outcome with that key), and `csv` the columns that one of several
    parts becomes. The rest is for people: `cell` how it is written (None: with `digits` and `unit`), `places` where
    it is shown, `asked` whether it was asked for, and is no figure that was reached; `wide`: its texts may be of any
    length and are wrapped on the page; `note`: what it means, said below the page's table.
    """

    key: str
    value: Callable[[Outcome], Any] | None = None
    csv: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    title: str = ""
    cell: Callable[[Outcome], Cell] | None = None
    places: tuple[str, ...] = (TERMINAL, MARKDOWN, PAGE)
    digits: int = 0
    unit: str = ""
    asked: bool = False
    wide: bool = False
    note: str = ""

    def of(self, outcome: Outcome) -> Any:
        return self.value(outcome) if self.value else getattr(outcome, self.key)

    def shown(self, outcome: Outcome) -> Cell:
        if self.cell:
            return self.cell(outcome)
        value = self.of(outcome)
        return Cell(value) if isinstance(value, str) else number(value, self.digits, self.unit)


def shown_in(place: str) -> list[Column]:
    return [column for column in COLUMNS if column.title and place in column.places]


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON values; NaN and infinity, which JSON lacks, become null beside `non_finite: true`.

    `tps`, `tflops`, `memory_gib`, `mfu_pct` and `loss` are the last logged step's; `spread` and what is called median
    are of the steps after warm-up, and so is `mfu_pct_at`.
    """
    return json_values({column.key: column.of(outcome) for column in COLUMNS})


def as_flat(outcome: Outcome) -> dict[str, Any]:
    """`as_dict` with one value a key: what CSV has."""
    flat: dict[str, Any] = {}
    values = as_dict(outcome)
    for column in COLUMNS:
        value = values[column.key]
        if isinstance(value, list):
            value = "; ".join(map(str, value))
        flat |= column.csv(value) if column.csv else {column.key: value}
    return flat


def drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and abs(value) < LARGEST


def number(value: float | None, digits: int = 0, unit: str = "", more: str = "") -> Cell:
    if value is None:
        return Cell("")
    if not drawable(value):
        return Cell(f"{value}".replace("nan", "NaN"), None, more)
    return Cell(f"{value:,.{digits}f}{unit}", value, more)


def percent(value: float) -> str:
    """A difference: `+0.4%`, `-3.2%` with a minus sign, `0.0%`."""
    return f"{value:+.1f}%".replace("-", "−") if abs(value) >= 0.05 else "0.0%"


def _batch(outcome: Outcome) -> Cell:
    tokens = f" x {outcome.seq_len:,}" if outcome.seq_len else ""
    return number(outcome.local_batch_size, unit=tokens)


def _recipe(outcome: Outcome) -> Cell:
    more = [*filter(None, [outcome.precision]), *(["compiled"] if outcome.compile else [])]
    return Cell(outcome.recipe, more=", ".join(more))


def _tps(outcome: Outcome) -> Cell:
    """A row says its step where a run has the half of its quartiles' distance."""
    tps = outcome.tps
    more = f"step {outcome.step}" if is_row(outcome) and outcome.step else ""
    if tps and tps.count > 1 and tps.median:
        more = f"±{50 * (tps.q3 - tps.q1) / tps.median:.1f}%"
    return number(outcome.median_tps, more=more)


def _mfu(outcome: Outcome) -> Cell:
    mfu = None if outcome.on_cpu else median_mfu_pct(outcome)
    return number(mfu, 2, "%", f"of {peak_text(outcome.peak_tflops)}")


def _memory(outcome: Outcome) -> Cell:
    """The most that any node had, where a table for people has room for one figure."""
    last = outcome.last.memory_gib if outcome.last else None
    return number(outcome.memory_gib.high if outcome.memory_gib else last, 1, " GiB")


def _loss(outcome: Outcome) -> Cell:
    short = outcome.step is not None and not outcome.complete
    return number(outcome.loss, 4, more=f"step {outcome.step}" if short else "")


def _slowest(outcome: Outcome) -> Cell:
    behind = against_others(outcome.by_node)
    if not behind:
        return Cell("")
    node = behind[0]
    flag = "slow" if node.behind > MAX_SPREAD else ""
    return Cell(percent(-100 * node.behind), -100 * node.behind, node.host, flag)


def _data(outcome: Outcome) -> Cell:
    if outcome.data_share is None:
        return Cell("")
    flag = "high" if outcome.data_share > MAX_WAITING else ""
    return Cell(f"{100 * outcome.data_share:.1f}%", outcome.data_share, flag=flag)


def _flat_goodput(spent: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"goodput_{part.name}": (spent or {}).get(part.name) for part in dataclasses.fields(Goodput)}


def _date(outcome: Outcome) -> Cell:
    day, _, time = outcome.date[:16].partition("T")
    return Cell(day, more=time)


def _spreads(outcome: Outcome) -> dict[str, Any]:
    found = {"tps": outcome.tps, "tflops": outcome.tflops, "memory_gib": outcome.memory_gib}
    return {name: dataclasses.asdict(value) if value else None for name, value in found.items()}


def _flat_spreads(spreads: Mapping[str, Any]) -> dict[str, Any]:
    parts = ("median", "q1", "q3", "low", "high", "count")
    return {f"{name}_{part}": (spread or {}).get(part) for name, spread in spreads.items() for part in parts}


def _flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What says that two rows are the same work: with these a CSV of ours is a baseline (results/published.py)."""
    return {name: settings.get(f"recipe.{name}") for name in WORK} | {"init_from": settings.get("job.init_from")}


WORK = (
    "model",
    "flavor",
    "activation_checkpoint",
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "dp_replicate",
    "async_tensor_parallel",
    "like_for_like",
)
# People see them in this order, figures as they are asked for most.
COLUMNS = (
    Column("run"),
    Column("run_dir"),
    Column("state"),
    Column("complete"),
    Column("problems", lambda o: [problem.text for problem in o.problems]),
    Column("notes"),
    Column("gpu"),
    Column(
        "nodes",
        title="Nodes",
        cell=lambda o: number(o.nodes, more=f"x {o.per_node} {o.gpu}"),
        places=(TERMINAL, PAGE),
        asked=True,
    ),
    Column("gpus"),
    Column("recipe", title="Recipe", cell=_recipe, places=(PAGE,), asked=True, wide=True),
    Column("local_batch_size", title="Batch", cell=_batch, places=(TERMINAL, PAGE), asked=True),
    Column("global_batch_size"),
    Column("seq_len"),
    Column("precision"),
    Column("compile"),
    Column(
        "median_tps",
        title="Tokens/s per GPU",
        cell=_tps,
        note="the median over nodes and logged steps after warm-up, and half the distance of its quartiles",
    ),
    Column("median_mfu_pct", median_mfu_pct, title="MFU", cell=_mfu, note="of the median, by the peak in TFLOP/s"),
    Column("steps"),
    Column("step"),
    Column("grad_norm"),
    Column("memory_gib", lambda o: o.last and o.last.memory_gib, title="Memory", cell=_memory, places=(TERMINAL, PAGE)),
    Column("memory_pct"),
    Column("loss", title="Loss", cell=_loss, places=(TERMINAL, PAGE), note="at the last logged step"),
    Column("tps", lambda o: o.last and o.last.tps),
    Column("tflops", lambda o: o.last and o.last.tflops),
    Column("mfu_pct"),
    Column("peak_tflops"),
    Column(
        "mfu_pct_at",
        lambda o: {f"{peak:g}": round(mfu, 2) for peak, mfu in mfu_at_other_peaks(o).items()},
        lambda at: {"mfu_pct_at": "; ".join(f"{mfu} of {peak}" for peak, mfu in at.items())},
    ),
    Column("overall_tps"),
    Column("records_used", records_used),
    Column("spread", _spreads, _flat_spreads),
    Column("startup", lambda o: dataclasses.asdict(o.startup), dict),
    Column("wall_s"),
    Column("restarts"),
    Column("attempts", lambda o: [dataclasses.asdict(attempt) for attempt in o.attempts], lambda _: {}),
    Column("goodput_pct"),
    Column("goodput", lambda o: o.goodput and dataclasses.asdict(o.goodput), _flat_goodput),
    Column("nodes_logged", lambda o: len(o.by_node)),
    Column(
        "slowest_node",
        lambda o: o.measured[0].host if o.measured else None,
        title="Slowest node",
        cell=_slowest,
        places=(PAGE,),
        wide=True,
        note="against the median of the others",
    ),
    Column("slowest_tps", lambda o: o.measured[0].tps if o.measured else None),
    Column("fastest_tps", lambda o: o.measured[-1].tps if o.measured else None),
    Column("by_node", lambda o: [{"host": node.host, "tps": node.tps} for node in o.by_node], lambda _: {}),
    Column(
        "data_share",
        title="Data wait",
        cell=_data,
        places=(PAGE,),
        note="the part of a step that is waiting for data; empty where the run wrote none",
    ),
    Column("date", title="Date (UTC)", cell=_date, places=(PAGE,)),
    Column("cluster", title="Cluster", places=(PAGE,), asked=True, wide=True),
    Column("incomplete", is_incomplete),
    Column("restarted", lambda o: o.has(Lack.RESTARTED)),
    Column("non_finite", lambda o: o.has(Lack.NON_FINITE)),
    Column("versions", csv=lambda versions: {name: versions.get(name) for name in VERSIONS}),
    Column("settings", csv=_flat_settings),
    Column("prediction", csv=lambda said: {"predicted_tps": said.get("tps")}),
)
