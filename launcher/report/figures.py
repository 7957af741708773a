"""What the page and the plots draw, from Outcomes and published rows: pure functions and values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from launcher.results.accept import MAX_SPREAD
from launcher.results.measure import against_others
from launcher.results.outcome import Outcome
from launcher.results.published import ALIKE, best_match, described, say

MOST_LINES = 16  # of a GPU type: more cannot be told apart
MOST_POINTS = 400  # of a line: more than a chart has pixels to show
MOST_NODES = 60  # in a heat strip
LARGEST = 1e100  # a number beyond this is no measurement, and drawing it overflows


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of one run over its steps. A NaN stands where the log has no finite number, and breaks the line.

    `run` is the run's place on the page, `number` what the line is called in its chart.
    """

    run: int
    number: int
    name: str
    complete: bool
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """One measurement in the scaling chart: tokens/s per GPU of a run, or of a published row (`run` None)."""

    gpus: int
    tps: float
    name: str
    run: int | None = None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Measurements with the same GPU type, settings and software, by GPU count; only these make one line."""

    label: str
    published: bool
    dots: tuple[Dot, ...]

    @property
    def medians(self) -> tuple[tuple[int, float], ...]:
        """Each GPU count with the median of its runs, ascending."""
        by_count = groupby(self.dots, key=lambda dot: dot.gpus)
        return tuple((gpus, median(dot.tps for dot in dots)) for gpus, dots in by_count)

    @property
    def ideal(self) -> float:
        """The rate of the smallest count, which perfect scaling would hold."""
        return self.medians[0][1]


@dataclass(frozen=True, slots=True)
class Kind:
    """Runs whose steps are the same work, by their places on the page: their tokens/s can share an axis."""

    label: str
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeCell:
    host: str
    tps: float | None
    percent: float | None  # above (+) or below (-) the median of the run's other nodes, as accept measures it

    @property
    def slow(self) -> bool:
        return self.percent is not None and self.percent < -100 * MAX_SPREAD


@dataclass(frozen=True, slots=True)
class Heat:
    """The nodes of a run, each against the others; with many nodes only the slowest, slowest first."""

    median: float
    cells: tuple[NodeCell, ...]
    slowest: NodeCell
    fastest: NodeCell
    silent: int  # nodes without a figure
    others: tuple[NodeCell, ...]  # not among the cells, slowest first
    slow: tuple[NodeCell, ...]  # further behind than accept allows, slowest first


@dataclass(frozen=True)
class Differences:
    """Settings and versions: those in which runs differ, and those that all runs share. None: not said."""

    differing: tuple[tuple[str, tuple[str | None, ...]], ...]
    shared: tuple[tuple[str, str], ...]


def drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and abs(value) < LARGEST


def gpu_types(outcomes: Iterable[Outcome]) -> list[str]:
    """Each GPU type once, in the order of the runs: runs on different ones are never in one chart."""
    return list(dict.fromkeys(outcome.gpu for outcome in outcomes))


def lines(outcomes: Sequence[Outcome], gpu: str, figure: str) -> list[Line]:
    """`figure` ("tps" or "loss") over the steps of the first MOST_LINES runs on `gpu` that logged any.

    Step 1 has no throughput worth showing: it pays for start-up, and torchtitan divides its time wrongly.
    """
    found: list[Line] = []
    for run, outcome in enumerate(outcomes):
        points = [
            (float(point.step), value if drawable(value := getattr(point, figure)) else math.nan)
            for point in outcome.series
            if figure != "tps" or point.step > 1
        ]
        if outcome.gpu == gpu and outcome.series and len(found) < MOST_LINES:
            number = len(found) + 1
            found.append(Line(run, number, outcome.run, outcome.complete, tuple(thin(points))))
    return found


def with_series(outcomes: Iterable[Outcome], gpu: str) -> int:
    """How many runs on `gpu` logged steps, drawn or not."""
    return sum(outcome.gpu == gpu and bool(outcome.series) for outcome in outcomes)


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points that look the same: of each stretch the first, lowest, highest, last, and one NaN."""
    if len(points) <= most:
        return list(points)
    stretches = most // 5
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        finite = [point for point in stretch if not math.isnan(point[1])]
        chosen = {p for p in stretch if math.isnan(p[1])} and {next(p for p in stretch if math.isnan(p[1]))}
        if finite:
            chosen |= {finite[0], min(finite, key=_value), max(finite, key=_value), finite[-1]}
        kept += sorted(chosen, key=lambda point: point[0])
    return kept


def _value(point: tuple[float, float]) -> float:
    return point[1]


def scaling(outcomes: Sequence[Outcome], published: Iterable[Outcome], gpu: str) -> list[Scaling]:
    """The lines of the scaling chart of one GPU type: complete runs, like with like, then published rows.

    No line where all of them have the same number of GPUs: there is no scaling to see.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Outcome]]] = {}
    for run, outcome in enumerate(outcomes):
        if outcome.gpu == gpu and outcome.complete and outcome.tps and drawable(outcome.tps.median):
            groups.setdefault(_alike(outcome), []).append((run, outcome))
    labels = _labels([members[0][1] for members in groups.values()])
    found = [
        Scaling(label, False, _ascending(Dot(o.gpus, o.tps.median, o.run, run) for run, o in members if o.tps))
        for label, members in zip(labels, groups.values(), strict=True)
    ]
    rows: dict[str, dict[int, Outcome]] = {}
    for row in sorted(published, key=lambda row: row.step or 0):  # of two steps of one run, the later stands
        if row.gpu.casefold() == gpu.casefold() and row.tps and drawable(row.tps.median):
            rows.setdefault(_published_label(row), {})[row.gpus] = row
    for label, by_count in rows.items():
        dots = (Dot(row.gpus, row.tps.median, row.run) for row in by_count.values() if row.tps)
        found.append(Scaling(label, True, _ascending(dots)))
    return found if len({dot.gpus for group in found for dot in group.dots}) > 1 else []


def _published_label(row: Outcome) -> str:
    parts = [f"published ({row.source})", f"batch {row.local_batch_size}", row.precision]
    more = ["compiled"] if row.compile else []
    more += [f"driver {row.versions['driver']}"] if "driver" in row.versions else []
    return ", ".join([*filter(None, parts), *more])


def _ascending(dots: Iterable[Dot]) -> tuple[Dot, ...]:
    return tuple(sorted(dots, key=lambda dot: (dot.gpus, dot.run or 0)))


def work(outcome: Outcome) -> tuple[str, ...]:
    """Equal for runs whose steps are the same work, whatever the size, software and environment."""
    known = described(outcome)
    accumulated = outcome.global_batch_size / max(1, outcome.local_batch_size * outcome.gpus)
    return (outcome.gpu, *(str(known.get(key)) for key in ALIKE), f"{accumulated:g}")


def kinds(outcomes: Sequence[Outcome], gpu: str) -> list[Kind]:
    """The runs on `gpu` by what a step of theirs does, in the order of the runs."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for run, outcome in enumerate(outcomes):
        if outcome.gpu == gpu:
            groups.setdefault(work(outcome), []).append(run)
    labels = _labels([outcomes[runs[0]] for runs in groups.values()])
    return [Kind(label, tuple(runs)) for label, runs in zip(labels, groups.values(), strict=True)]


def _alike(outcome: Outcome) -> tuple[Any, ...]:
    """Equal for runs whose sizes may stand on one line: what a step does, in which environment, with what software."""
    own = sorted(key for key in outcome.settings if key.startswith(("env.", "titan.")))
    return (
        *work(outcome),
        *(f"{key}={outcome.settings[key]}" for key in own),
        *(outcome.versions.get("torch"), outcome.versions.get("torchtitan")),
        outcome.gpus // max(1, outcome.nodes),
    )


def _labels(firsts: Sequence[Outcome]) -> list[str]:
    """A name for each group of like runs; what tells them apart is added only where it is needed."""

    def name(outcome: Outcome) -> str:
        parts = [outcome.recipe, f"batch {outcome.local_batch_size}", outcome.precision]
        return ", ".join([*parts, *(["compiled"] if outcome.compile else [])])

    def details(outcome: Outcome) -> list[str]:
        known = described(outcome)
        settings = [f"{word} {say(known.get(key, '?'))}" for key, word in ALIKE.items()]
        return [*settings, *(f"{key} {outcome.versions.get(key, '?')}" for key in ("torch", "torchtitan"))]

    short = [name(outcome) for outcome in firsts]
    texts = []
    for text, outcome in zip(short, firsts, strict=True):
        same = [details(other) for other, its in zip(firsts, short, strict=True) if its == text]
        telling = [own for own, *all_ in zip(details(outcome), *same, strict=True) if len(set(all_)) > 1]
        texts.append(", ".join([text, *telling]))
    return [
        text if texts.count(text) == 1 else f"{text} (settings {texts[: i + 1].count(text)})"
        for i, text in enumerate(texts)
    ]


def heat(outcome: Outcome) -> Heat | None:
    """None where fewer than two nodes have a figure: there is nothing to compare."""
    found = against_others(outcome.by_node)
    if not found:
        return None
    by_rate = [NodeCell(node.host, node.tps, -100 * node.behind) for node in found]
    of_host = {cell.host: cell for cell in by_rate}
    cells = [of_host.get(node.host) or NodeCell(node.host, None, None) for node in outcome.by_node]
    silent = [cell for cell in cells if cell.tps is None]
    shown, rest = cells, []
    if len(cells) > MOST_NODES:
        ranked = silent + by_rate
        shown, rest = ranked[:MOST_NODES], ranked[MOST_NODES:]
    slow = tuple(cell for cell in by_rate if cell.slow)
    middle = median(node.tps for node in found)
    return Heat(middle, tuple(shown), by_rate[0], by_rate[-1], len(silent), tuple(rest), slow)


def measured_by(outcomes: Iterable[Outcome], published: Sequence[Outcome]) -> list[Outcome]:
    """The published rows that the runs are measured by, each once, the smallest first."""
    rows = (best_match(outcome, published).row for outcome in outcomes)
    found = {(row.gpus, row.run): row for row in rows if row and row.tps and drawable(row.tps.median)}
    return [found[key] for key in sorted(found)]


def percent(value: float | None) -> str:
    """A difference: `+0.4%`, `-3.2%` with a minus sign, `0.0%`; `no data` for None."""
    if value is None:
        return "no data"
    return f"{value:+.1f}%".replace("-", "−") if abs(value) >= 0.05 else "0.0%"


def slow_node(outcome: Outcome) -> tuple[NodeCell, tuple[tuple[float, float], ...]] | None:
    """The slowest node with its tokens/s over the steps, where it is further behind than accept allows."""
    found = heat(outcome)
    if found is None or not found.slow:
        return None
    node = next(node for node in outcome.by_node if node.host == found.slow[0].host)
    points = [(float(step), tps if drawable(tps) else math.nan) for step, tps in node.steps if step > 1]
    return found.slow[0], tuple(thin(points))


def differences(outcomes: Sequence[Outcome]) -> Differences:
    """Every setting and version, split by whether all runs say the same."""
    columns = [_texts(outcome) for outcome in outcomes]
    differing, shared = [], []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = tuple(column.get(key) for column in columns)
        first = values[0]
        if first is not None and all(value == first for value in values):
            shared.append((key, first))
        else:
            differing.append((key, values))
    return Differences(tuple(differing), tuple(shared))


def _texts(outcome: Outcome) -> dict[str, str]:
    versions = {f"version.{key}": value for key, value in outcome.versions.items()}
    return {str(key): say(value) if value != "" else "" for key, value in {**outcome.settings, **versions}.items()}
