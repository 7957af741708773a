"""The table of runs: a row per run with its verdict, and the published rows beside them. Its columns are those of
results/columns.py, behind the verdict's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.base.output import counted
from launcher.report.figures import slow_nodes
from launcher.report.health import Health
from launcher.results.accept import About, Reason, Word, share_text
from launcher.results.columns import PAGE, Cell, Column, shown_in
from launcher.results.outcome import Lack, Outcome, per_unit
from launcher.results.published import beside, called, publisher

TAGS = {Word.PASS: "pass", Word.FAIL: "fail", Word.CANNOT_SAY: "cannot"}  # classes of the style sheet
_BRIEF = {
    About.SPEED: "nothing to compare with",
    About.FINITE: "NaN or infinity",
    About.STEPS: "too few steps",
    About.PACE: "steps stood still",
    About.LOSS: "loss is off",
}
SHARE = Column(
    "share",
    title="Of published",
    wide=True,
    note="as a share of the published row that matches best; that is one value, whose noise is not known",
)


@dataclass(frozen=True)
class Row:
    """A row of the runs' table; `run` is None for a published one, which has a `link`. `tags` are (class, text).

    `brief` is the result in a few words, `why` all of it.
    """

    run: int | None
    name: str
    result: str  # "complete", "incomplete", "published"
    tags: tuple[tuple[str, str], ...]
    brief: str
    why: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    link: str = ""


@dataclass(frozen=True)
class Table:
    columns: tuple[tuple[str, str, str], ...]  # title, class, note
    rows: tuple[Row, ...]
    common: tuple[tuple[str, str], ...]  # (column, what all rows have there)


def table(runs: Sequence[Health], published: Sequence[Outcome]) -> Table:
    """The runs, then the published rows beside them; columns that tell no two rows apart are taken out."""
    outcomes = [run.outcome for run in runs]
    others = beside(outcomes, published)
    kept: list[tuple[tuple[str, str, str], list[Cell]]] = []
    common = []
    for column in (SHARE, *shown_in(PAGE)):
        title = per_unit(column.title, outcomes)
        of_runs = [*map(_share, runs)] if column is SHARE else [*map(column.shown, outcomes)]
        cells = of_runs + [Cell("") if column is SHARE else column.shown(row) for row in others]
        # A published row says nothing of its recipe and cluster, and contradicts no one.
        said = {(cell.text, cell.more) for place, cell in enumerate(cells) if cell.text or place < len(runs)}
        if column.asked and len(said) == 1 and len(cells) > 1:
            common += [(title, " ".join(filter(None, text))) for text in said if text[0]]
        elif column.asked or any(cell.text for cell in cells):
            css = " ".join(["n"] * any(cell.value is not None for cell in cells) + ["w"] * column.wide)
            kept.append(((title, css, column.note), cells))
    by_row = [tuple(cells[place] for _, cells in kept) for place in range(len(runs) + len(others))]
    rows = (*map(_of_run, runs, by_row), *map(_of_published, others, by_row[len(runs) :]))
    return Table(tuple(column for column, _ in kept), rows, tuple(common))


def _of_run(run: Health, cells: tuple[Cell, ...]) -> Row:
    outcome, verdict = run.outcome, run.verdict
    tags = [(TAGS[verdict.word], str(verdict.word))]
    tags += [] if outcome.complete else [("incomplete", "incomplete")]
    worst = [reason for reason in verdict.reasons if reason.word is verdict.word]
    worst = [] if verdict.word is Word.PASS else worst  # the share of the published figure stands beside it
    said = [reason.what for reason in worst]
    if not any(reason.about is About.END for reason in worst):
        # What accept has no need to add makes the result less than one all the same.
        said += [problem.text for problem in outcome.problems if problem.text not in said]
    brief = ", ".join(dict.fromkeys(_brief(run, reason) for reason in worst)) or outcome.lacks
    result = "complete" if outcome.complete else "incomplete"
    return Row(run.place, outcome.run, result, tuple(tags), brief, "; ".join(said), outcome.notes, cells)


def _of_published(row: Outcome, cells: tuple[Cell, ...]) -> Row:
    return Row(None, called(row), "published", (("published", "published"),), "", "", (), cells, publisher(row)["link"])


def _brief(run: Health, reason: Reason) -> str:
    """A few words; the numbers are in the columns beside it, or in the reason's own words."""
    if reason.about is About.END:
        short = [one.text for one in run.outcome.problems if one.kind in (Lack.SHORT, Lack.RESTARTED)]
        state = [run.outcome.state.lower().replace("_", " ")] if run.outcome.state != "COMPLETED" else []
        return ", ".join([*state, *short]) or "not whole"
    if reason.about is About.SPEED and run.verdict.share is not None:
        return f"{share_text(run.verdict.share)} of published"
    return counted(len(slow_nodes(run.outcome)), "slow node") if reason.about is About.NODES else _BRIEF[reason.about]


def _share(run: Health) -> Cell:
    share, row = run.verdict.share, run.verdict.baseline
    if share is None or row is None or row.tps is None:
        return Cell("")
    size = "" if row.gpus == run.outcome.gpus else f" on {counted(row.nodes, 'node')}"
    return Cell(share_text(share), 100 * share, f"of {row.tps.median:,.0f}{size}")
