"""Two results side by side: settings that differ, and figures with their difference and its noise. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.base.output import columns, counted
from launcher.base.values import json_values
from launcher.results.outcome import PHASES, Outcome, Spread
from launcher.results.published import PUBLISHED, described, is_row, same_gpu, same_version, say, unlike

# Settings that differ between any two runs and change no figure.
_NAMES = ("job.name", "job.runs_dir", "run_dir")


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


@dataclass(frozen=True, slots=True)
class Comparison:
    """`settings` and `versions` hold what differs: key, A's value, B's value; None where a side does not have it."""

    a: Outcome
    b: Outcome
    warnings: tuple[str, ...]
    settings: tuple[tuple[str, Any, Any], ...]
    versions: tuple[tuple[str, str | None, str | None], ...]
    figures: tuple[Figure, ...]


def compare(a: Outcome, b: Outcome) -> Comparison:
    warnings = []
    if not same_gpu(a.gpu, b.gpu):
        warnings.append(f"different GPUs: {a.gpu} and {b.gpu}; their tokens/s say nothing about either cluster")
    warnings += [f"not the same work (A against B): {reason}" for reason in unlike(a, b)]
    for name, side in (("A", a), ("B", b)):
        if not side.complete:
            warnings.append(f"{name} is not complete: {side.lacks}")
    of_both = is_row(a) or is_row(b)
    return Comparison(
        a, b, tuple(warnings), _differing(described(a), described(b), of_both), _versions(a, b), _figures(a, b)
    )


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
    incomplete = [f"{name} is not complete" for name, side in (("A", a), ("B", b)) if not side.complete]
    unlike_peak = ""
    if a.peak_tflops != b.peak_tflops:
        unlike_peak = f"divided by {_peak(a)} and {_peak(b)} TFLOP/s"
    step = "" if a.step == b.step else f"at step {_or(a.step)} and {_or(b.step)}"
    spreads = (
        ("tokens/s per GPU", "tokens/s", a.tps, b.tps),
        ("TFLOP/s per GPU", "TFLOP/s", a.tflops, b.tflops),
        ("peak memory", "GiB", a.memory_gib, b.memory_gib),
    )
    values = (
        ("MFU", "%", a.mfu_pct, b.mfu_pct, unlike_peak),
        ("loss", "", a.loss, b.loss, step),
        ("gradient norm", "", a.grad_norm, b.grad_norm, step),
        ("waiting for data", "%", _percent(a.data_share), _percent(b.data_share), ""),
        ("slowest node", "tokens/s", _slowest(a), _slowest(b), ""),
    )
    found = [_of_spreads(*row, a, b) for row in spreads]
    found += [_of_values(*row) for row in values]
    for name, _ in PHASES:
        called = name.removesuffix("_s").replace("_", " ")  # by which scripts find a figure
        found.append(_of_values(f"start-up: {called}", "s", getattr(a.startup, name), getattr(b.startup, name), ""))
    shown = [figure for figure in found if figure.a is not None or figure.b is not None]
    if incomplete:
        shown = [
            dataclasses.replace(f, difference=None, share=None, beyond=None, why_not="; ".join(incomplete))
            for f in shown
        ]
    return tuple(shown)


def _of_spreads(name: str, unit: str, a: Spread | None, b: Spread | None, of_a: Outcome, of_b: Outcome) -> Figure:
    bare = _of_values(name, unit, a.median if a else None, b.median if b else None, "")
    if bare.difference is None:
        return bare
    sides = (noise(a, len(of_a.measured)), noise(b, len(of_b.measured)))
    known = [side for side in sides if side is not None]
    if not known:
        return dataclasses.replace(bare, remark="too few values to tell its noise")
    if len(known) == 1:  # a single value scatters as the steps of the other side do, not as their median does
        steps = b if sides[0] is None else a
        assert steps is not None
        known.append(1.96 * (steps.q3 - steps.q1) / 1.349)
    size = math.hypot(*known)
    if size == 0:  # peak memory often is: nothing to hold a difference against
        return dataclasses.replace(bare, remark="no noise: constant within a run" if bare.difference else "")
    remark = ""
    if None in sides:
        one = of_a if sides[0] is None else of_b
        what = "one published value" if one.state == PUBLISHED else "one value, or too few"
        remark = f"{what}, taken to scatter as the other's steps"
    return dataclasses.replace(bare, noise=size, beyond=abs(bare.difference) > size, remark=remark)


def _of_values(name: str, unit: str, a: float | None, b: float | None, why_not: str) -> Figure:
    if a is None or b is None:
        return Figure(name, unit, a, b, remark="" if a is b else f"known of {'B' if a is None else 'A'} only")
    if why_not or not (math.isfinite(a) and math.isfinite(b)):
        return Figure(name, unit, a, b, why_not=why_not or "not a finite number")
    return Figure(name, unit, a, b, b - a, (b - a) / abs(a) if a else None)


def _slowest(outcome: Outcome) -> float | None:
    return outcome.slowest.tps if outcome.slowest else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _peak(outcome: Outcome) -> str:
    return "an unknown peak of" if outcome.peak_tflops is None else f"{outcome.peak_tflops:.0f}"


def _or(step: int | None) -> str:
    return "none" if step is None else str(step)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], of_both: bool) -> tuple[tuple[str, Any, Any], ...]:
    """With `of_both` only keys that both sides have: a table's row does not say most of its settings."""
    keys = [key for key in {**a, **b} if key not in _NAMES and (not of_both or (key in a and key in b))]
    return tuple((key, a.get(key), b.get(key)) for key in keys if _plain(a.get(key)) != _plain(b.get(key)))


def _plain(value: Any) -> Any:
    """A tuple and the list that JSON made of it are the same setting."""
    return list(value) if isinstance(value, tuple) else value


def _versions(a: Outcome, b: Outcome) -> tuple[tuple[str, str | None, str | None], ...]:
    """A version that one side does not know is no difference."""
    both = [key for key in a.versions if key in b.versions]
    return tuple((k, a.versions[k], b.versions[k]) for k in both if not same_version(a.versions[k], b.versions[k]))


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; NaN and infinity become null."""
    sides = {}
    for name, side in (("a", found.a), ("b", found.b)):
        sides[name] = {
            "run": side.run,
            "run_dir": side.run_dir,
            "state": side.state,
            "date": side.date,
            "gpu": side.gpu,
            "nodes": side.nodes,
            "gpus": side.gpus,
            "complete": side.complete,
            "problems": [problem.text for problem in side.problems],
        }
    return sides | {
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
    figures = [(_named(f), _number(f.a), _number(f.b), *_change(f)) for f in found.figures]
    lines += [f"  {line}" for line in columns([("", "A", "B", "difference", ""), *figures])]
    if any(figure.noise is not None for figure in found.figures):
        lines.append("Noise: 95% interval of the difference of the medians, from the steps of these runs alone.")
    return lines


def _title(side: Outcome) -> str:
    size = f"{counted(side.nodes, 'node')} x {side.gpus // max(1, side.nodes)} {side.gpu}"
    state = "" if is_row(side) or side.state == "COMPLETED" else f", {side.state}"
    return f"{side.run}: {size}{f', {side.date}' if side.date else ''}{state}"


def _cell(value: Any) -> str:
    shown = "(not set)" if value is None else say(value)
    return shown if len(shown) <= 60 else f"{shown[:28]}…{shown[-28:]}"


def _named(figure: Figure) -> str:
    return f"{figure.name}, {figure.unit}" if figure.unit in ("GiB", "s", "%") else figure.name


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
    if figure.share is not None:
        amount += f" ({100 * figure.share:+.1f}%)"
    remark = figure.remark
    if figure.noise is not None:
        remark = (
            f"{'beyond' if figure.beyond else 'within'} the noise of "
            f"{figure.noise:,.{digits if figure.noise >= 1 else 2}f}"
        )
        remark += f" ({figure.remark})" if figure.remark else ""
    return amount, remark
