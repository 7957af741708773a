"""PASS, FAIL or CANNOT SAY: a run's result, measured by one that was published or accepted before. Pure functions.

docs/accept.md has the rules in words; the numbers are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from launcher.base.errors import ExitStatus
from launcher.base.output import counted, some
from launcher.base.values import json_values
from launcher.config.spec import SAMPLE
from launcher.results.compare import noise
from launcher.results.measure import against_others
from launcher.results.outcome import NON_FINITE, Lack, Outcome
from launcher.results.published import LIMITED, NEAR, PUBLISHED, Match, best_match, called, described, same_version
from launcher.runs.attempts import ended_by
from launcher.scheduler.state import JobState

THRESHOLD = 0.95  # of the baseline's tokens/s
MAX_SPREAD = 0.05  # a node's tokens/s below the median of the other nodes
MAX_LOST = 0.05  # of the time after warm-up, to steps that were slower than the median or stood still
MAX_WAITING = 0.02  # of a step's time, for data: above it a note says so
MIN_STEPS = 5  # logged steps after warm-up
# Published runs of one recipe differ by 35% in their loss at step 100 (6.14 to 8.30): only more is a fault.
LOSS_MARGIN = 1.35
# A random start begins near ln(128256) = 11.8 and is at 9.9 after 10 steps, at 6.1 to 8.3 after 100.
FALLS_BY, FALLS_AFTER = 0.10, 50  # share of the first logged loss, training steps
LAST_LOSSES = 3  # logged steps whose median is the loss: a single step may be a spike
# Ends that are the run's or its nodes' own doing. Of the others (cancelled, preempted) nothing can be said.
OWN_FAULT = {"FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"}


class Word(StrEnum):
    """The first that any reason has is the verdict's."""

    FAIL = "FAIL"
    CANNOT_SAY = "CANNOT SAY"
    PASS = "PASS"


EXITS = {Word.PASS: ExitStatus.OK, Word.FAIL: ExitStatus.BELOW, Word.CANNOT_SAY: ExitStatus.CANNOT_SAY}


class About(StrEnum):
    """What was looked at."""

    END = "end"  # how the run ended, and all else that makes its result less than one
    FINITE = "finite"
    SPEED = "speed"
    STEPS = "steps"
    PACE = "pace"
    NODES = "nodes"
    LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that was looked at: what follows from it alone, and the numbers in words."""

    word: Word
    about: About
    detail: str
    nodes: tuple[str, ...] = ()  # that are to blame

    @property
    def what(self) -> str:
        return self.detail if self.about in (About.END, About.FINITE) else f"{self.about}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """FAIL where any reason is, else CANNOT SAY where any is, else PASS. `share` is of the baseline's tokens/s."""

    word: Word
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]
    baseline: Outcome | None
    share: float | None

    @property
    def exit(self) -> ExitStatus:
        return EXITS[self.word]


def judge(
    outcome: Outcome | None,
    rows: Sequence[Outcome],
    *,
    threshold: float = THRESHOLD,
    max_spread: float = MAX_SPREAD,
    losses: Sequence[Outcome] = (),
    faults: Sequence[str] = (),
    state: str = "",
) -> Verdict:
    """`rows`: what the run may be measured by; the one that matches best is taken. `losses`: results whose loss is a
    reference beside theirs. `faults`: nodes that failed their check, why the job failed. `state`: the run's, needed
    only where it has no outcome.
    """
    reasons = [Reason(Word.FAIL, About.END, fault) for fault in faults]
    if outcome is None:
        if not reasons:
            reasons.append(_end(state, state, "it has no result yet") or _cannot(About.END, "it has no result"))
        return _verdict(reasons, (), None, None)
    if not_finite := _not_finite(outcome):
        reasons.append(not_finite)
    own = "; ".join(problem.text for problem in outcome.problems if problem.kind is Lack.STATE) or outcome.state
    others = "; ".join(problem.text for problem in outcome.problems if problem.kind is not Lack.STATE)
    if end := _end(outcome.state, own, others):
        reasons.append(end)
    elif not outcome.complete and not reasons:
        reasons.append(_cannot(About.END, outcome.lacks))
    if reasons:
        return _verdict(reasons, outcome.notes, None, None)
    match = best_match(outcome, rows)
    speed, share = _speed(outcome, match, threshold)
    steps = _steps(outcome)
    # Too few steps say nothing for the run and nothing against it.
    reasons = [*speed, steps, *_pace(outcome), *_node_spread(outcome, max_spread)]
    if steps.word is not Word.PASS:  # more of them would not help where there is nothing to measure by
        reasons = [steps] if match.row else [*speed, steps]
    reasons += _loss(outcome, [*([match.row] if match.row else []), *losses])
    return _verdict(reasons, (*_notes(outcome, match, threshold, share), *outcome.notes), match.row, share)


def _verdict(reasons: Sequence[Reason], notes: tuple[str, ...], row: Outcome | None, share: float | None) -> Verdict:
    first = sorted(reasons, key=lambda reason: list(Word).index(reason.word))
    return Verdict(first[0].word, tuple(first), notes, row, share)


def _cannot(about: About, detail: str) -> Reason:
    return Reason(Word.CANNOT_SAY, about, detail)


def _end(state: str, own: str, others: str) -> Reason | None:
    """What the run's state alone says; None where it completed. `own`: what its outcome says of the state."""
    if not state or state == "COMPLETED":
        return None
    found = JobState(state)
    what = f"the run is {own}" if found.active else f"the run ended {own}" if found.known else own
    word = Word.FAIL if state in OWN_FAULT else Word.CANNOT_SAY
    return Reason(word, About.END, f"{what}: {others}" if others else what)


def _not_finite(outcome: Outcome) -> Reason | None:
    """NaN or infinity in the loss or the gradient's norm, wherever it was logged."""
    points = [(point.step, point.loss, point.grad_norm) for point in outcome.series]
    for step, loss, grad_norm in [*points, (outcome.step, outcome.loss, outcome.grad_norm)]:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if value is not None and not math.isfinite(value):
                return Reason(Word.FAIL, About.FINITE, f"{name}: {value:g} at step {step}")
    return Reason(Word.FAIL, About.FINITE, NON_FINITE.text) if outcome.has(Lack.NON_FINITE) else None


def _speed(outcome: Outcome, match: Match, threshold: float) -> tuple[list[Reason], float | None]:
    row = match.row
    if row is None:
        return [_cannot(About.SPEED, match.why_not)], None
    if not row.complete or row.tps is None or outcome.tps is None:
        return [_cannot(About.SPEED, f"the baseline {called(row)} is not complete: {row.lacks}")], None
    share = outcome.tps.median / row.tps.median
    if outcome.run_dir and row.run_dir == outcome.run_dir:
        return [_cannot(About.SPEED, "the baseline is this run itself")], None
    enough = share >= threshold
    word = Word.PASS if enough else Word.FAIL
    sign = "at least" if enough else "below"
    what = (
        f"{outcome.tps.median:,.0f} tokens/s per {outcome.unit} is {share_text(share)} of {row.tps.median:,.0f}, "
        f"{sign} the required {100 * threshold:g}%"
    )
    if match.factor > NEAR and enough == (outcome.gpus < row.gpus):
        # More GPUs are a little slower each. So a fast run on more, and a slow one on fewer, are certain; not these.
        word = Word.CANNOT_SAY
        what += (
            f"; but that is on {row.gpus} GPUs and this run had {outcome.gpus}, {match.factor:.1f} times "
            f"{'fewer, where each should be faster' if enough else 'more, where each may be slower'}"
        )
    elif enough and row.settings.get(LIMITED):
        word = Word.CANNOT_SAY
        what += f"; but those GPUs had limited power ({called(row)}), and yours may be faster"
    return [Reason(word, About.SPEED, what)], share


def share_text(share: float) -> str:
    """Rounded down, so that what is below 95% never reads 95.0%."""
    return f"{math.floor(1000 * share + 1e-6) / 10:.1f}%"


def _steps(outcome: Outcome) -> Reason:
    steps = outcome.tps.count // outcome.measured_at_once if outcome.tps else 0
    what = f"{steps} logged after warm-up"
    if steps >= MIN_STEPS:
        return Reason(Word.PASS, About.STEPS, f"{what}, to step {outcome.step}")
    return _cannot(About.STEPS, f"{what}, {MIN_STEPS} are needed: more --steps, or a smaller recipe.log_freq")


def _pace(outcome: Outcome) -> list[Reason]:
    """Tokens over all the time, against the median: a run that stands still now and then has a good median."""
    if outcome.on_cpu:  # whose cores others use, too
        return []
    if outcome.tps is None or outcome.tps.median <= 0 or outcome.overall_tps is None:
        return []
    lost = 1 - outcome.overall_tps / outcome.tps.median
    what = f"{outcome.overall_tps:,.0f} tokens/s per GPU over the whole time after warm-up"
    what += f", {100 * lost:.1f}% below the median" if lost >= 0.0005 else ""
    what += f" (limit {100 * MAX_LOST:g}%)"
    if lost <= MAX_LOST:
        return [Reason(Word.PASS, About.PACE, what)]
    warm_up = outcome.settings.get("recipe.log_freq") or 1
    slow = [p.step for p in outcome.series if p.step > warm_up and p.tps < (1 - MAX_LOST) * outcome.tps.median]
    what += f"; slow up to step {some([str(step) for step in slow])}" if slow else ""
    if interval := outcome.settings.get("recipe.checkpoint_interval"):
        return [_cannot(About.PACE, f"{what}; this includes checkpoints every {interval} steps")]
    return [Reason(Word.FAIL, About.PACE, what)]


def _node_spread(outcome: Outcome, max_spread: float) -> list[Reason]:
    """Every node against the median of the others; torchtitan's nodes wait for each other, so that one which is
    slower by its own clock has more than a slow GPU: it started steps late or stood still in between.
    """
    behind = against_others(outcome.by_node)
    if not behind:
        return []
    slow = [node for node in behind if node.behind > max_spread]
    each = [
        f"{node.host} {node.tps:,.0f} tokens/s, {100 * node.behind:.1f}% below the others' {node.others:,.0f}"
        for node in slow or behind[:1]
    ]
    word = Word.FAIL if slow else Word.PASS
    what = f"{'too slow:' if slow else 'slowest'} {some(each, 10)} (limit {100 * max_spread:g}%)"
    return [Reason(word, About.NODES, what, tuple(node.host for node in slow))]


def _loss(outcome: Outcome, references: Sequence[Outcome]) -> list[Reason]:
    """Whether the loss fell, and whether it is where the same model's was at the same step."""
    points = [point for point in outcome.series if math.isfinite(point.loss)]
    if not points or len(points) < len(outcome.series):
        return []  # none was logged; or not finite, which has been said
    first, last = points[0].loss, median(point.loss for point in points[-LAST_LOSSES:])
    step, fresh = points[-1].step, not outcome.settings.get("job.init_from")
    limit = first * (1 - FALLS_BY) if fresh and step >= FALLS_AFTER else first * (1.0 if fresh else LOSS_MARGIN)
    start = f"{first:.2f} at step {points[0].step}"
    what = f"{start}, {last:.2f} at step {step} (median of the last {LAST_LOSSES})"
    if last > limit:
        return [Reason(Word.FAIL, About.LOSS, f"{what}; it should be at most {limit:.2f} by then")]
    peak = max(points, key=lambda point: point.loss)
    if peak.loss > first * (LOSS_MARGIN if fresh else 2 * LOSS_MARGIN):
        exploded = peak is points[-1]
        word, end = (
            (Word.FAIL, ", the last one: it exploded") if exploded else (Word.CANNOT_SAY, ": it jumped, and came back")
        )
        return [Reason(word, About.LOSS, f"{start}, {peak.loss:.2f} at step {peak.step}{end}")]
    known = [loss for row in references if (loss := _reference_loss(outcome, row, step)) is not None]
    if not known:
        if references and _generated(outcome) and not any(map(_generated, references)):
            what += "; the text is generated (--data sample), so the loss is not comparable with others'"
        return [Reason(Word.PASS, About.LOSS, what)]
    there = f"{min(known):.2f}" + (f" to {max(known):.2f}" if min(known) < max(known) else "")
    what += f"; at that step others had {there}"
    if last > LOSS_MARGIN * max(known):
        return [Reason(Word.FAIL, About.LOSS, f"{what}, and more than {LOSS_MARGIN:g} times that is a fault")]
    if fresh and last < min(known) / LOSS_MARGIN:
        what += "; a loss this low means that the data or the computation is wrong"
        return [Reason(Word.FAIL, About.LOSS, what)]
    return [Reason(Word.PASS, About.LOSS, what)]


def _reference_loss(outcome: Outcome, row: Outcome, step: int) -> float | None:
    """The row's loss at the step, where both train the same model from the same kind of start."""
    found, other = described(outcome), described(row)
    same = ("recipe.model", "recipe.flavor", "recipe.seq_len", "recipe.dataset")
    if any(found.get(key) != other.get(key) for key in same if key in other and key in found):
        return None
    if _generated(outcome) != _generated(row):
        return None
    if "recipe.flavor" not in other or (found.get("job.init_from") or "") != (other.get("job.init_from") or ""):
        return None
    if row.step == step and row.loss is not None and math.isfinite(row.loss):
        return row.loss
    return next((p.loss for p in row.series if p.step == step and math.isfinite(p.loss)), None)


def _generated(outcome: Outcome) -> bool:
    """Whether it trained on text that the launcher made, whose loss is of its own kind."""
    return outcome.settings.get("job.data") == SAMPLE


def _notes(outcome: Outcome, match: Match, threshold: float, share: float | None) -> tuple[str, ...]:
    notes, row, settings = [], match.row, described(outcome)
    if outcome.restarts:
        ends = [ended_by(one) or "not known why" for one in outcome.attempts[:-1]]
        goodput = "" if outcome.goodput_pct is None else f"; goodput {outcome.goodput_pct:.0f}%"
        notes.append(f"{len(outcome.attempts)} attempts: {', '.join(ends)}{goodput}")
    if row is not None:
        if match.factor > 1:
            notes.append(
                f"the nearest {'published ' if row.state == PUBLISHED else ''}result is of {_size(row)} "
                f"({row.gpus} GPUs), this run had {_size(outcome)} ({outcome.gpus} GPUs)"
            )
        if row.state == PUBLISHED:
            notes.append("the baseline is a single run, so its variance is unknown")
        per_node = [described(one).get("profile.gpus_per_node") for one in (outcome, row)]
        if None not in per_node and per_node[0] != per_node[1]:
            notes.append(f"{per_node[0]} GPUs a node, {per_node[1]} in {called(row)}")
        for name in ("driver", "cuda"):
            there, here = row.versions.get(name), outcome.versions.get(name)
            if there and here and not same_version(there, here):
                notes.append(f"{name} {here}, {there} in {called(row)}")
        if "recipe.activation_checkpoint" not in described(row):
            notes.append(f"activation checkpointing of {called(row)} is not known")
        if share is not None and row.tps and outcome.tps and share < threshold:
            missing = threshold * row.tps.median - outcome.tps.median
            size = noise(outcome.tps, len(outcome.measured)) or 0.0
            if missing < size:
                notes.append(
                    f"{missing:,.0f} tokens/s are missing, less than this run's noise of {size:,.0f}: repeat it"
                )
    if outcome.data_share is not None and outcome.data_share > MAX_WAITING:
        notes.append(
            f"{100 * outcome.data_share:.1f}% of a step is spent waiting for data: check number of files and disk"
        )
    if own := sorted(key for key in settings if key.startswith("titan.")):
        notes.append(f"settings that the recipe does not have, and that may change the speed: {', '.join(own)}")
    if interval := settings.get("recipe.checkpoint_interval"):
        notes.append(f"checkpoints every {interval} steps, which take time")
    return tuple(notes)


def _size(outcome: Outcome) -> str:
    return counted(outcome.nodes, "node")


def headline(name: str, outcome: Outcome | None, verdict: Verdict) -> str:
    """Behind the verdict's word: `my-run: 17,930 tokens/s per GPU, 99.7% of the published 17,975 (GB200, 9 nodes)`"""
    if outcome is None or outcome.tps is None or not outcome.complete:
        return f"{name}: {verdict.reasons[0].what}"
    text = f"{name}: {outcome.tps.median:,.0f} tokens/s per {outcome.unit}"
    row = verdict.baseline
    if row is None or row.tps is None or verdict.share is None:
        return f"{text} ({outcome.gpu}, {_size(outcome)})"
    of = "the published " if row.state == PUBLISHED else f"{row.run}'s "
    return f"{text}, {share_text(verdict.share)} of {of}{row.tps.median:,.0f} ({row.gpu}, {_size(row)})"


_FIGURES = ("gpu", "nodes", "gpus", "complete", "step", "loss", "mfu_pct", "peak_tflops", "versions")
_BASELINE = ("run", "gpu", "nodes", "gpus", "step")


def as_dict(name: str, outcome: Outcome | None, verdict: Verdict, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict as JSON values, with what it was reached from: what accept.json holds."""
    row = verdict.baseline
    figures: dict[str, Any] = {}
    baseline: dict[str, Any] | None = None
    if outcome is not None:
        tps, slowest = outcome.tps, outcome.slowest
        figures = {key: getattr(outcome, key) for key in _FIGURES} | {
            "tps": outcome.median_tps,
            "tps_q1": tps.q1 if tps else None,
            "tps_q3": tps.q3 if tps else None,
            "slowest_node": slowest.host if slowest else None,
            "slowest_tps": slowest.tps if slowest else None,
        }
    if row is not None:
        baseline = {key: getattr(row, key) for key in _BASELINE}
        baseline |= {"published": row.state == PUBLISHED, "tps": row.median_tps}
    return json_values(
        {
            "schema": 1,
            "run": name,
            "verdict": str(verdict.word),
            "exit_code": int(verdict.exit),
            "headline": f"{verdict.word}  {headline(name, outcome, verdict)}",
            "share": verdict.share,
            "reasons": [{"verdict": str(reason.word), "what": reason.what} for reason in verdict.reasons],
            "notes": verdict.notes,
            "figures": figures,
            "baseline": baseline,
            "inputs": inputs,
        }
    )
