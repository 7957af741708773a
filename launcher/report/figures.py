"""What the page and the plots draw, from Outcomes and published rows: pure functions and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from statistics import median

from launcher.base.output import counted
from launcher.base.values import by
from launcher.results.accept import MAX_SPREAD
from launcher.results.columns import drawable
from launcher.results.measure import Against, against_others
from launcher.results.outcome import Outcome
from launcher.results.published import ALIKE, best_match, described, is_row, publisher, same_gpu, say

MOST_LINES = 16  # of a GPU type: more cannot be told apart
MOST_POINTS = 400  # of a line: more than a chart has pixels to show
Placed = tuple[int, Outcome]  # a run's place on the page, and the run


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of one run over its steps. A NaN stands where the log has no finite number, and breaks the line.

    `run` is the run's place on the page, `number` the line's among those of its GPU type.
    """

    run: int
    number: int
    outcome: Outcome
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """One measurement: of a run, or of a published row (whose `run` says nothing), `at` a number of GPUs or a day."""

    at: float
    value: float
    name: str
    run: int


@dataclass(frozen=True, slots=True)
class Group:
    """Measurements that make one line: with the same GPU type, settings and software over the number of GPUs, or with
    the same work and number of nodes over time.
    """

    label: str
    published: bool
    dots: tuple[Dot, ...]

    @property
    def medians(self) -> tuple[tuple[float, float], ...]:
        """Each place with the median of its runs, ascending."""
        by_place = groupby(self.dots, key=lambda dot: dot.at)
        return tuple((at, median(dot.value for dot in dots)) for at, dots in by_place)


def gpu_types(outcomes: Iterable[Outcome]) -> list[str]:
    """Each GPU type once, in the order of the runs: runs on different ones are never in one chart."""
    return list(dict.fromkeys(outcome.gpu for outcome in outcomes))


def with_series(outcomes: Iterable[Outcome], gpu: str) -> list[Placed]:
    """The runs on `gpu` that logged steps."""
    return [(run, outcome) for run, outcome in enumerate(outcomes) if outcome.gpu == gpu and outcome.series]


def lines(outcomes: Sequence[Outcome], gpu: str, figure: str) -> list[Line]:
    """`figure` ("tps" or "loss") over the steps of the first MOST_LINES runs on `gpu` that logged any.

    Step 1 has no throughput worth showing: it pays for start-up, and torchtitan divides its time wrongly.
    """
    found: list[Line] = []
    for number, (run, outcome) in enumerate(with_series(outcomes, gpu)[:MOST_LINES], 1):
        points = [
            (float(point.step), value if drawable(value := getattr(point, figure)) else math.nan)
            for point in outcome.series
            if figure != "tps" or point.step > 1
        ]
        found.append(Line(run, number, outcome, tuple(thin(points))))
    return [line for line in found if line.points]


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points that look the same: of each stretch the first, lowest, highest, last, and one NaN."""
    if len(points) <= most:
        return list(points)
    stretches = most // 5
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        stretch = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        finite = [point for point in stretch if not math.isnan(point[1])]
        lost = [point for point in stretch if math.isnan(point[1])]
        chosen = set(lost[:1])
        if finite:
            chosen |= {finite[0], min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1)), finite[-1]}
        kept += sorted(chosen, key=itemgetter(0))
    return kept


def work(outcome: Outcome) -> dict[str, str]:
    """Equal for runs whose steps are the same work, whatever the size, software and environment."""
    known = described(outcome)
    accumulated = outcome.global_batch_size / max(1, outcome.local_batch_size * outcome.gpus)
    alike = {word: say(known.get(key, "?")) for key, word in ALIKE.items()}
    return {"GPU": outcome.gpu, **alike, "batches a step and GPU": f"{accumulated:g}"}


def _work_and_software(outcome: Outcome) -> dict[str, str]:
    """Equal for runs whose sizes may stand on one line: what a step does, in which environment, with what software."""
    own = {key: say(value) for key, value in sorted(outcome.settings.items()) if key.startswith(("env.", "titan."))}
    software = {name: outcome.versions.get(name, "?") for name in ("torch", "torchtitan")}
    return {**work(outcome), **own, **software, "GPUs a node": str(outcome.per_node)}


def _work_and_source(row: Outcome) -> dict[str, str]:
    """Equal for published rows that may stand on one line."""
    return {**work(row), "date": row.date, "driver": row.versions.get("driver", "?"), "source": row.source}


def grouped(
    runs: Iterable[Placed], alike: Callable[[Outcome], dict[str, str]] = work
) -> list[tuple[str, list[Placed]]]:
    """Like runs under a name; what tells groups apart is in it only where it is needed."""
    groups = by(lambda placed: tuple(alike(placed[1]).items()), runs)
    short = {key: _name(members[0][1]) for key, members in groups.items()}
    found = []
    for key, members in groups.items():
        same = [set(other) for other, name in short.items() if name == short[key]]
        telling = [f"{word} {value}" for word, value in key if any((word, value) not in other for other in same)]
        found.append((", ".join([short[key], *telling]), members))
    return found


def _name(outcome: Outcome) -> str:
    name = f"published ({publisher(outcome)['name']})" if is_row(outcome) else outcome.recipe
    parts = [name, f"batch {outcome.local_batch_size}", outcome.precision]
    return ", ".join([*parts, *(["compiled"] if outcome.compile else [])])


def scaling(outcomes: Sequence[Outcome], published: Iterable[Outcome], gpu: str) -> list[Group]:
    """The lines of the scaling chart of one GPU type: complete runs, like with like, then published rows.

    No line where all of them have the same number of GPUs: there is no scaling to see.
    """
    whole = [(run, o) for run, o in enumerate(outcomes) if o.gpu == gpu and o.complete and drawable(o.median_tps)]
    rows = [(0, row) for row in published if same_gpu(row.gpu, gpu) and drawable(row.median_tps)]
    rows.sort(key=lambda placed: placed[1].step or 0)
    kinds = [*grouped(whole, _work_and_software), *grouped(rows, _work_and_source)]
    found = [
        Group(label, is_row(runs[0][1]), _ascending(Dot(o.gpus, o.median_tps or 0.0, o.run, run) for run, o in runs))
        for label, runs in kinds
    ]
    return found if len({dot.at for group in found for dot in group.dots}) > 1 else []


def trends(outcomes: Sequence[Outcome], published: Sequence[Outcome], gpu: str) -> tuple[list[Group], bool]:
    """Complete runs over time, for each kind of work and number of nodes; whether in percent of published rather than
    in tokens/s, as where nothing like them is published.
    """
    tps: dict[int, Dot] = {}
    shares: dict[int, Dot] = {}
    for run, one in enumerate(outcomes):
        if one.gpu == gpu and one.complete and one.date and one.median_tps and drawable(one.median_tps):
            at = datetime.fromisoformat(one.date)
            day = at.toordinal() + (at.hour * 60 + at.minute) / 1440
            tps[run] = Dot(day, one.median_tps, one.run, run)
            if (row := best_match(one, published).row) and row.median_tps:
                shares[run] = Dot(day, 100 * one.median_tps / row.median_tps, one.run, run)
    dots = shares or tps
    kinds = grouped(((run, outcomes[run]) for run in dots), lambda one: work(one) | {"on": counted(one.nodes, "node")})
    return [Group(label, False, _ascending(dots[run] for run, _ in runs)) for label, runs in kinds], bool(shares)


def _ascending(dots: Iterable[Dot]) -> tuple[Dot, ...]:
    return tuple(sorted(dots, key=lambda dot: (dot.at, dot.run)))


def measured_by(outcomes: Iterable[Outcome], published: Sequence[Outcome]) -> list[Outcome]:
    """The published rows that the runs are measured by, each once, the smallest first."""
    rows = (best_match(outcome, published).row for outcome in outcomes)
    found = {(row.gpus, row.run): row for row in rows if row and drawable(row.median_tps)}
    return [found[key] for key in sorted(found)]


def slow_nodes(outcome: Outcome) -> list[Against]:
    """Nodes that are further behind the others than accept allows, the slowest first."""
    return [node for node in against_others(outcome.by_node) if node.behind > MAX_SPREAD]


def differences(outcomes: Sequence[Outcome]) -> tuple[list[tuple[str, tuple[str | None, ...]]], list[tuple[str, str]]]:
    """Settings and versions: those in which runs differ, and those that all runs share. None: not said."""
    texts = [_texts(outcome) for outcome in outcomes]
    differing, shared = [], []
    for key in dict.fromkeys(key for own in texts for key in own):
        values = tuple(own.get(key) for own in texts)
        if len(set(values)) == 1:
            shared.append((key, values[0] or ""))
        else:
            differing.append((key, values))
    return differing, shared


def _texts(outcome: Outcome) -> dict[str, str]:
    versions = {f"version.{key}": value for key, value in outcome.versions.items()}
    return {str(key): say(value) if value != "" else "" for key, value in {**outcome.settings, **versions}.items()}
