"""Charts as SVG text: values in, markup out. Colours and fonts are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from markupsafe import Markup

from launcher.base.output import plain, shortened

WIDTH, HEIGHT = 600, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 156, 14, 46
LABEL_GAP = 14  # between the names at the ends of lines
LABEL_WIDTH = 130  # of a name and its leader
LONGEST = 15  # characters of a name there
COLOURS = 8
MOST_TIPS = 40  # points of a line that show their values
Tell = Callable[[float, float], str]  # what a pointer that rests on a point shows of it


@dataclass(frozen=True, slots=True)
class Drawn:
    """One line and its dots. `points` whose y is not finite break the line: NaN, or infinity for what is off the chart.

    `css` names its classes; `label` stands at its right end, moved where others are as near; `tip` is its name where a
    pointer rests on it. `run`: hidden together with that run's row.
    """

    points: tuple[tuple[float, float], ...]
    css: str
    label: str = ""
    tip: str = ""
    joined: bool = True
    dots: bool = False
    run: int | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from `low` to `high` with its ticks and their texts."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    name: str
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(values: Iterable[float], name: str, most: int = 5, whole: bool = False) -> Axis:
    """An axis around the finite `values`, with at most about `most` ticks at 1, 2 or 5 times a power of ten.

    It starts at 0 only where the values come near it: the differences between runs are a few percent.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    least = max(max(abs(low), abs(high)) * 0.02 or 1.0, 1.0 if whole else 1e-9)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    if 0 < low < 0.4 * high:
        low = 0.0
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    if not whole:  # the ends of steps are numbers of their own, rates are not
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, tuple((i * step, tick_text(i * step, digits)) for i in range(first, last + 1)), name)


def not_from_zero(y: Axis) -> str:
    """What a chart says of a vertical axis that begins above 0: differences look larger there than they are."""
    return f"The vertical axis starts at {y.ticks[0][1]}, not at 0." if y.low > 0 else ""


def days(values: Iterable[float], name: str) -> Axis:
    """An axis of days, counted as datetime does."""
    found = list(values)
    first = math.floor(min(found))
    axis = linear([value - first for value in found], name, whole=True)
    ticks = tuple((first + at, f"{date.fromordinal(first + round(at)):%d %b}") for at, _ in axis.ticks)
    return replace(axis, low=first + axis.low, high=first + axis.high, ticks=ticks)


def tick_text(value: float, digits: int) -> str:
    if abs(value) >= 1e7 or digits > 6:
        return f"{value:.4g}"
    return f"{value:,.{digits}f}"


def counts(values: Iterable[int], name: str) -> Axis:
    """A logarithmic axis whose ticks are the `values` themselves, without those too near to the one before."""
    marks = sorted({value for value in values if value > 0}) or [1]
    low, high = marks[0] / 1.15, marks[-1] * 1.15
    axis = Axis(low, high, (), name, logarithmic=True)
    width = WIDTH - LEFT - RIGHT
    kept: list[int] = []
    for mark in marks:
        if not kept or (axis.share(mark) - axis.share(kept[-1])) * width >= 14 * (1 + len(str(mark)) / 2):
            kept.append(mark)
    return Axis(low, high, tuple((mark, f"{mark:,}") for mark in kept), name, logarithmic=True)


def spread_out(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions, moved so that neighbours are `gap` apart: down from `low`, then up from `high`."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    floor, ceiling = low, high
    for index in order:
        moved[index] = max(moved[index], floor)
        floor = moved[index] + gap
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def chart(drawn: Sequence[Drawn], x: Axis, y: Axis, tell: Tell, ident: str, title: str, about: str) -> Markup:
    """A chart with axes, grid, lines and their names. `title` and `about` are what a screen reader says."""
    parts = [
        Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
        ).format(WIDTH, HEIGHT, ident, ident, ident, plain(title), ident, plain(about)),
        _axes(x, y),
    ]
    visible = [one for one in drawn if any(math.isfinite(value) for _, value in one.points)]
    ends = [_end(one, x, y) for one in visible]
    # Lines that end at the same step share the room to the right of it.
    labelled = sorted((i for i, one in enumerate(visible) if one.label), key=lambda i: ends[i][0])
    place_of: dict[int, float] = {}
    while labelled:
        sharing = [i for i in labelled if ends[i][0] < ends[labelled[0]][0] + LABEL_WIDTH]
        labelled = labelled[len(sharing) :]
        places = spread_out([ends[i][1] for i in sharing], LABEL_GAP, TOP + 4, HEIGHT - BOTTOM)
        place_of |= dict(zip(sharing, places, strict=True))
    for index, one in enumerate(visible):
        parts.append(_line(one, x, y, tell, _label(one, ends[index], place_of.get(index, 0.0))))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def swatch(css: str) -> Markup:
    """The sample of a line that stands before its name in a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 32 14" aria-hidden="true"><path class="line {}" d="M1 7H31"/></svg>'
    ).format(css)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _axes(x: Axis, y: Axis) -> Markup:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        Markup('<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, _y(y, at), right, LEFT - 7, _y(y, at) + 4, text
        )
        for at, text in y.ticks
    ]
    parts += [
        Markup('<path class="tick" d="M{:.1f} {}v5"/><text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            _x(x, at), bottom, _x(x, at), bottom + 19, text
        )
        for at, text in x.ticks
    ]
    parts.append(Markup('<path class="tick" d="M{} {}H{}"/>').format(LEFT, bottom, right))
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(right, HEIGHT - 6, x.name)
    )
    return Markup('<g class="axes">') + Markup("").join(parts) + Markup("</g>")


def _end(one: Drawn, x: Axis, y: Axis) -> tuple[float, float]:
    at, value = [point for point in one.points if math.isfinite(point[1])][-1]
    return _x(x, at), _y(y, value)


def _label(one: Drawn, end: tuple[float, float], moved_to: float) -> Markup:
    if not one.label:
        return Markup("")
    text = Markup('<text class="mark {}" x="{:.1f}" y="{:.1f}">{}</text>')
    leader = Markup('<path class="leader {}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        one.css, end[0] + 4, end[1], end[0] + 17, moved_to
    )
    return leader + text.format(one.css, end[0] + 20, moved_to + 4, shortened(plain(one.label), LONGEST))


def _line(one: Drawn, x: Axis, y: Axis, tell: Tell, label: Markup) -> Markup:
    run = "" if one.run is None else Markup(' data-run="{}"').format(one.run)
    parts = [Markup('<g class="{}"{}><title>{}</title>').format(one.css, run, plain(one.tip))]
    stretches = _stretches(one.points)
    if one.joined:
        path = "".join(
            "M" + "L".join(f"{_x(x, at):.1f} {_y(y, value):.1f}" for at, value in stretch)
            for stretch in stretches
            if len(stretch) > 1
        )
        parts.append(Markup('<path class="line {}" d="{}"/>').format(one.css, path))
    tipped = -(-sum(map(len, stretches)) // MOST_TIPS) or 1  # every so many
    number = 0
    for stretch in stretches:
        for at, value in stretch:
            shown = one.dots or len(stretch) == 1  # a step between two NaNs has no line to be on
            number += 1
            if shown or number % tipped == 0:
                dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>'
                css = f"dot {one.css}" if shown else "hit"
                tip = plain(f"{one.tip}, {tell(at, value)}")
                parts.append(Markup(dot).format(css, _x(x, at), _y(y, value), tip))
    for (_, before), (at, value) in zip([(0.0, 0.0), *one.points], one.points, strict=False):
        if not math.isfinite(value) and math.isfinite(before):  # the first of several is enough
            mark = '<path class="lost {}" d="M{:.1f} {}l7 7m0 -7l-7 7"><title>{}, {}</title></path>'
            parts.append(Markup(mark).format(one.css, _x(x, at) - 3.5, TOP, plain(one.tip), tell(at, value)))
    return Markup("").join(parts) + label + Markup("</g>")


def _stretches(points: Iterable[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points between the breaks."""
    found: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if not math.isfinite(point[1]):
            found.append([])
        else:
            found[-1].append(point)
    return [stretch for stretch in found if stretch]
