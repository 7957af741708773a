"""The table of runs: its columns, a row per run with its verdict, and the published rows beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.base.mfu import peak_text
from launcher.base.output import counted
from launcher.report.figures import drawable, percent
from launcher.report.health import Health
from launcher.results.accept import About, Word, share_text
from launcher.results.outcome import Outcome
from launcher.results.rows import median_mfu_pct

TAGS = {Word.PASS: "pass", Word.FAIL: "fail", Word.CANNOT_SAY: "cannot"}  # classes of the style sheet


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, the number it sorts by where that is not the text, what stands below in small, and a
    word where it needs attention.
    """

    text: str
    value: float | None = None
    more: str = ""
    flag: str = ""


@dataclass(frozen=True)
class Column:
    """`setting`: what was asked for. Where all rows agree on it, it is said once above the table. `wide`: its texts
    may be of any length and are wrapped. `note`: what it means, said below the table.
    """

    name: str
    number: bool
    setting: bool = False
    wide: bool = False
    note: str = ""

    @property
    def css(self) -> str:
        return " ".join(["n"] * self.number + ["w"] * self.wide)


@dataclass(frozen=True)
class Row:
    """A row of the runs' table; `run` is None for a published one. `tags` are (class, text)."""

    run: int | None
    name: str
    result: str  # "complete", "incomplete", "published"
    tags: tuple[tuple[str, str], ...]
    why: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    common: tuple[tuple[str, str], ...]  # (column, what all rows have there)


COLUMNS = (  # after "Run" and "Result"
    Column(
        "Of published",
        True,
        wide=True,
        note="as a share of the published row that matches best; that is one value, whose noise is not known",
    ),
    Column("Tokens/s per GPU", True, note="the median over nodes and logged steps after warm-up"),
    Column("Slowest node", True, wide=True, note="against the median of the others"),
    Column("Data wait", True, note="the part of a step that is waiting for data; empty where the run wrote none"),
    Column("Nodes", True, True),
    Column("Recipe", False, True, wide=True),
    Column("Loss", True, note="at the last logged step"),
    Column("Memory", True),
    Column("MFU, of TFLOP/s", True, note="of the median"),
    Column("Date (UTC)", False),
    Column("Cluster", False, True, wide=True),
)


def table(runs: Sequence[Health], published: Sequence[Outcome]) -> Table:
    """The runs, then the published rows of their GPU types; columns that tell no two rows apart are taken out."""
    types = {run.outcome.gpu.casefold() for run in runs}
    rows = [_of_run(run) for run in runs]
    rows += [_of_published(row) for row in published if row.gpu.casefold() in types]
    kept, common = [], []
    for place, column in enumerate(COLUMNS):
        cells = [(row.cells[place].text, row.cells[place].more) for row in rows if row.run is not None]
        others = [(row.cells[place].text, row.cells[place].more) for row in rows if row.run is None]
        # A published row says nothing of its recipe, cluster and date, and contradicts no one.
        agree = len(set(cells)) == 1 and set(others) <= {cells[0], ("", cells[0][1]), ("", "")}
        if column.setting and agree and len(rows) > 1:
            if cells[0] != ("", ""):
                common.append((column.name, " ".join(filter(None, cells[0]))))
        elif column.setting or any(text for text, _ in (*cells, *others)):
            kept.append(place)
    columns = tuple(COLUMNS[place] for place in kept)
    shown = tuple(
        Row(row.run, row.name, row.result, row.tags, row.why, row.notes, tuple(row.cells[i] for i in kept))
        for row in rows
    )
    return Table(columns, shown, tuple(common))


def _of_run(run: Health) -> Row:
    outcome, verdict = run.outcome, run.verdict
    tags = [(TAGS[verdict.word], str(verdict.word))]
    tags += [] if outcome.complete else [("incomplete", "incomplete")]
    worst = [reason for reason in verdict.reasons if reason.word is verdict.word]
    worst = [] if verdict.word is Word.PASS else worst  # the share of the published figure stands beside it
    said = [reason.what for reason in worst]
    if not any(reason.about is About.END for reason in worst):
        # What accept has no need to add makes the result less than one all the same.
        said += [problem.text for problem in outcome.problems if problem.text not in said]
    result = "complete" if outcome.complete else "incomplete"
    tps = outcome.tps
    spread = f"{tps.q1:,.0f} to {tps.q3:,.0f}" if tps and tps.count > 1 else ""
    step = f"step {outcome.step}" if outcome.step is not None and not outcome.complete else ""
    cells = (_share(run), *_cells(outcome, spread, step, _slowest(run), _data(run)))
    return Row(run.place, outcome.run, result, tuple(tags), "; ".join(said), outcome.notes, cells)


def _of_published(row: Outcome) -> Row:
    """It says its step where a run has quartiles."""
    cells = (Cell(""), *_cells(row, f"step {row.step}", "", Cell(""), Cell("")))
    return Row(None, row.source, "published", (("published", "published"),), "", (), cells)


def _cells(outcome: Outcome, below_tps: str, below_loss: str, slowest: Cell, data: Cell) -> tuple[Cell, ...]:
    mfu = median_mfu_pct(outcome)
    work = [f"batch {outcome.local_batch_size:,}{f' × {outcome.seq_len:,}' if outcome.seq_len else ''}"]
    work += [*filter(None, [outcome.precision]), *(["compiled"] if outcome.compile else [])]
    day, _, time = outcome.date[:16].partition("T")
    return (
        number(outcome.median_tps, more=below_tps),
        slowest,
        data,
        number(outcome.nodes, more=f"{outcome.gpus:,} × {outcome.gpu}"),
        Cell(outcome.recipe, more=", ".join(work)),
        number(outcome.loss, 4, more=below_loss),
        number(outcome.memory_pct, 1, "%"),
        number(mfu, 2, "%", f"of {peak_text(outcome.peak_tflops)}" if outcome.peak_tflops else "peak unknown"),
        Cell(day, more=time),
        Cell(outcome.cluster),
    )


def _share(run: Health) -> Cell:
    share, row = run.verdict.share, run.verdict.baseline
    if share is None or row is None or row.tps is None:
        return Cell("")
    size = "" if row.gpus == run.outcome.gpus else f" on {counted(row.nodes, 'node')}"
    return Cell(share_text(share), 100 * share, f"of {row.tps.median:,.0f}{size}")


def _slowest(run: Health) -> Cell:
    if run.nodes is None:
        return Cell("")
    node = run.nodes.slowest
    return Cell(percent(node.percent), node.percent, node.host, "slow" if node.slow else "")


def _data(run: Health) -> Cell:
    share = run.outcome.data_share
    if share is None:
        return Cell("")
    cell = number(100 * share, 1, "%")
    return Cell(cell.text, cell.value, flag="high" if run.waits_for_data else "")


def number(value: float | None, digits: int = 0, unit: str = "", more: str = "") -> Cell:
    if value is None:
        return Cell("")
    if not drawable(value):  # NaN, infinite
        return Cell(f"{value}".replace("nan", "NaN"), None, more)
    return Cell(f"{value:,.{digits}f}{unit}", value, more)
