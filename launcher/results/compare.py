"""Two results side by side: settings that differ, and figures with their difference and its noise. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from launcher.base.output import columns, size
from launcher.base.values import json_values
from launcher.config.mfu import peak_text
from launcher.results.outcome import PHASES, Outcome, Spread, per_unit
from launcher.results.published import PUBLISHED, described, is_row, same_gpu, same_version, say, unlike

TPS = "tokens/s per GPU"
# Settings that differ between any two runs and change no figure.
_NAMES = ("job.name", "job.runs_dir", "job.image_dir", "run_dir")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of both sides. `noise` is in the figure's unit: what chance alone makes of the difference.

    `beyond` says whether the difference exceeds it, None where nothing says how much noise there is; `why_not` says
    why the difference means nothing, and `share` is the difference as a share of A's.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    difference: float | None = None
    share: float | None = None
    noise: float | None = None
    beyond: bool | None = None
    remark: str = ""
    why_not: str = ""


LARGE_NOISE = 0.05  # of A's tokens/s: more could hide a difference that `accept` fails a run for


class Verdict(StrEnum):
    """What the tokens/s say of B."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "the same"
    CANNOT_SAY = "cannot say"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`settings` and `versions` hold what differs: key, A's value, B's value; None where a side does not have it."""

    a: Outcome
    b: Outcome
    warnings: tuple[str, ...]
    settings: tuple[tuple[str, Any, Any], ...]
    versions: tuple[tuple[str, str | None, str | None], ...]
    figures: tuple[Figure, ...]
    verdict: Verdict
    sentence: str  # the verdict for people


def compare(a: Outcome, b: Outcome) -> Comparison:
    warnings, different_work = [], unlike(a, b)
    if not same_gpu(a.gpu, b.gpu):
        warnings.append(f"different GPUs: {a.gpu} and {b.gpu}; their tokens/s say nothing about either cluster")
    warnings += [f"not the same work (A against B): {reason}" for reason in different_work]
    for name, side in (("A", a), ("B", b)):
        if not side.complete:
            warnings.append(f"{name} is not complete: {side.lacks}")
    settings = _differing(described(a), described(b), is_row(a) or is_row(b))
    figures = _figures(a, b)
    verdict, sentence = _judged(a, b, next((figure for figure in figures if figure.name == TPS), None))
    sentence += ", but it did not do the same work" if different_work and verdict is not Verdict.CANNOT_SAY else ""
    return Comparison(a, b, tuple(warnings), settings, _versions(a, b), figures, verdict, sentence)


def _judged(a: Outcome, b: Outcome, tps: Figure | None) -> tuple[Verdict, str]:
    """The verdict, and in words."""
    share = 100 * tps.share if tps and tps.share else 0.0
    if why := _why_unsaid(a, b, tps):
        return Verdict.CANNOT_SAY, f"CANNOT SAY which is faster: {why}"
    if not (tps and tps.beyond):
        return Verdict.SAME, f"SAME: the difference of {share:+.1f}% in tokens/s is within noise"
    verdict, more = (Verdict.FASTER, "more") if share > 0 else (Verdict.SLOWER, "fewer")
    return verdict, f"{verdict.upper()}: B has {abs(share):.1f}% {more} tokens/s than A, which exceeds noise"


def _why_unsaid(a: Outcome, b: Outcome, tps: Figure | None) -> str:
    if not same_gpu(a.gpu, b.gpu):
        return "the GPUs differ"
    if tps is None or tps.difference is None:
        return (tps.why_not if tps else "") or "the noise is not known"
    if not tps.a or tps.share is None:
        return "A has no tokens/s"
    noise_share = (tps.noise or 0.0) / abs(tps.a)
    if noise_share > LARGE_NOISE and not tps.beyond:
        return f"the noise of ±{100 * noise_share:.0f}% is too large to tell; log more steps"
    return "the noise is not known" if tps.beyond is None and tps.difference else ""


def noise(spread: Spread | None, nodes: int) -> float | None:
    """Half the width of a 95% interval of a median, in the figure's unit; None where the values cannot tell.

    1.96 x 1.2533 / 1.349 x IQR / sqrt(n) = 1.82 x IQR / sqrt(n). For n independent values of a normal distribution
    the median's standard error is sqrt(pi / 2) sigma / sqrt(n), and IQR / 1.349 estimates sigma without minding
    outliers (McGill, Tukey and Larsen, "Variations of Box Plots", The American Statistician 32, 1978: their notches
    are the same with 1.57 in the place of 1.82, made so that two of them may be held side by side).

    `nodes` is how many nodes logged the values: they wait for each other in every step, so that their values of one
    step count as one, n = count / nodes. What changes from run to run (placement, neighbours, heat) is not in it.
    """
    if spread is None or not math.isfinite(spread.q3 - spread.q1):
        return None
    independent = spread.count / max(1, nodes)
    if independent < 3:  # quartiles of two values are the values
        return None
    return 1.96 * math.sqrt(math.pi / 2) * (spread.q3 - spread.q1) / 1.349 / math.sqrt(independent)


def _figures(a: Outcome, b: Outcome) -> tuple[Figure, ...]:
    incomplete = "; ".join(f"{name} is not complete" for name, side in (("A", a), ("B", b)) if not side.complete)
    peaks = [peak_text(side.peak_tflops) for side in (a, b)]
    peak = "" if a.peak_tflops == b.peak_tflops else f"divided by {peaks[0]} and {peaks[1]} TFLOP/s"
    step = "" if a.step == b.step else f"at step {a.step} and {b.step}"
    sides = (a, b)
    figures = [
        _of_spreads(TPS, "tokens/s", [side.tps for side in sides], sides),
        _of_spreads("TFLOP/s per GPU", "TFLOP/s", [side.tflops for side in sides], sides),
        _of_spreads("peak memory", "GiB", [side.memory_gib for side in sides], sides),
        _of_values("MFU", "%", [side.mfu_pct for side in sides], peak),
        _of_values("loss", "", [side.loss for side in sides], step),
        _of_values("gradient norm", "", [side.grad_norm for side in sides], step),
        _of_values("waiting for data", "%", [None if (o := side.data_share) is None else 100 * o for side in sides]),
        _of_values("slowest node", "tokens/s", [side.slowest.tps if side.slowest else None for side in sides]),
    ]
    for name, _ in PHASES:
        called = name.removesuffix("_s").replace("_", " ")  # by which scripts find a figure
        figures.append(_of_values(f"start-up: {called}", "s", [getattr(side.startup, name) for side in sides]))
    shown = [figure for figure in figures if figure.a is not None or figure.b is not None]
    if incomplete:
        shown = [Figure(figure.name, figure.unit, figure.a, figure.b, why_not=incomplete) for figure in shown]
    return tuple(shown)


def _of_spreads(name: str, unit: str, spreads: Sequence[Spread | None], of: Sequence[Outcome]) -> Figure:
    bare = _of_values(name, unit, [spread.median if spread else None for spread in spreads])
    if bare.difference is None:
        return bare
    known = [
        (half, spread)
        for spread, side in zip(spreads, of, strict=True)
        if (half := noise(spread, len(side.measured))) is not None and spread
    ]
    if not known:
        return dataclasses.replace(bare, remark="too few values to tell its noise")
    remark, halves = "", [half for half, _ in known]
    if len(known) == 1:  # a single value scatters as the steps of the other side do, not as their median does
        (steps,) = (spread for _, spread in known)
        halves.append(1.96 * (steps.q3 - steps.q1) / 1.349)
        is_row = PUBLISHED in [side.state for side in of]
        remark = "a published value is a single run, so its variance is unknown" if is_row else "one side has one value"
    half = math.hypot(*halves)
    if half == 0:  # peak memory often is: nothing to hold a difference against
        return bare
    return dataclasses.replace(bare, noise=half, beyond=abs(bare.difference) > half, remark=remark)


def _of_values(name: str, unit: str, values: Sequence[float | None], why_not: str = "") -> Figure:
    a, b = values
    if a is None or b is None:
        return Figure(name, unit, a, b, remark="" if a is b else f"known of {'B' if a is None else 'A'} only")
    if why_not or not (math.isfinite(a) and math.isfinite(b)):
        return Figure(name, unit, a, b, why_not=why_not or "not a finite number")
    return Figure(name, unit, a, b, b - a, (b - a) / abs(a) if a else None)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], of_both: bool) -> tuple[tuple[str, Any, Any], ...]:
    """With `of_both` only keys that both sides have: a table's row does not say most of its settings."""
    a, b = json_values(a), json_values(b)  # a tuple and the list that JSON made of it are the same setting
    keys = [key for key in {**a, **b} if key not in _NAMES and (not of_both or (key in a and key in b))]
    return tuple((key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key))


def _versions(a: Outcome, b: Outcome) -> tuple[tuple[str, str | None, str | None], ...]:
    """A version that one side does not know is no difference."""
    both = [key for key in a.versions if key in b.versions]
    return tuple((k, a.versions[k], b.versions[k]) for k in both if not same_version(a.versions[k], b.versions[k]))


_SIDE = ("run", "run_dir", "state", "date", "gpu", "nodes", "gpus", "complete")


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; NaN and infinity become null."""
    sides = {
        name: {key: getattr(side, key) for key in _SIDE} | {"problems": [problem.text for problem in side.problems]}
        for name, side in (("a", found.a), ("b", found.b))
    }
    return sides | {
        "verdict": str(found.verdict),
        "warnings": list(found.warnings),
        "settings": [json_values({"key": k, "a": a, "b": b}) for k, a, b in found.settings],
        "versions": [{"name": k, "a": a, "b": b} for k, a, b in found.versions],
        "figures": [json_values(dataclasses.asdict(figure)) for figure in found.figures],
    }


def as_text(found: Comparison, warning: Callable[[str], str] = str) -> list[str]:
    """The comparison for a terminal: sides, warnings, styled by `warning`, what differs, figures."""
    lines = [f"{name}  {_title(side)}" for name, side in (("A", found.a), ("B", found.b))]
    rows = [(key, _cell(a), _cell(b)) for key, a, b in (*found.settings, *found.versions)]
    lines += [warning(f"warning: {text}") for text in found.warnings]
    lines += ["", "Settings and versions that differ:" if rows else "Settings and versions: none differ"]
    lines += [f"  {line}" for line in columns([("", "A", "B"), *rows])] if rows else []
    lines += ["", "Figures, B against A:"]
    sides = (found.a, found.b)
    on_cpus = found.a.on_cpu and found.b.on_cpu
    shown = [figure for figure in found.figures if not (on_cpus and figure.name == "MFU")]
    figures = [(_named(f, sides), _number(f.a), _number(f.b), *_change(f)) for f in shown]
    marks = ("  ", *("* " if figure.beyond else "  " for figure in shown))
    table = columns([("", "A", "B", "difference", ""), *figures])
    lines += [f"{mark}{line}" for mark, line in zip(marks, table, strict=True)]
    if any(figure.noise is not None for figure in found.figures):
        lines.append("* exceeds the noise of these runs' steps (95%); days and nodes may differ by more")
    lines += dict.fromkeys(f"  {f.remark}" for f in found.figures if f.remark and f.noise is not None)
    return [*lines, "", found.sentence]


def _title(side: Outcome) -> str:
    state = "" if is_row(side) or side.state == "COMPLETED" else f", {side.state}"
    return f"{side.run}: {size(side.nodes, side.per_node, side.gpu)}{f', {side.date}' if side.date else ''}{state}"


def _cell(value: Any) -> str:
    shown = "(not set)" if value is None else say(value)
    return shown if len(shown) <= 60 else f"{shown[:28]}…{shown[-28:]}"


def _named(figure: Figure, sides: Sequence[Outcome]) -> str:
    name = per_unit(figure.name, sides)
    return f"{name}, {figure.unit}" if figure.unit in ("GiB", "s", "%") else name


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _change(figure: Figure) -> tuple[str, str]:
    if figure.why_not:
        return "", f"not comparable: {figure.why_not}"
    if figure.difference is None:
        return "", figure.remark
    if figure.difference == 0:
        return "the same", figure.remark
    digits = 0 if max(abs(figure.a or 0), abs(figure.b or 0)) >= 1000 else 2
    amount = f"{figure.difference:+,.{digits}f}"
    amount += "" if figure.share is None else f" ({100 * figure.share:+.1f}%)"
    if figure.noise is None:
        return amount, figure.remark
    return amount, f"noise {figure.noise:,.{digits if figure.noise >= 1 else 2}f}"
