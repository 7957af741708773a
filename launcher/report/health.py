"""Whether the cluster is good: each run's verdict, as `launcher accept` gives it, and one answer for all runs of a GPU
type. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.base.errors import quoted
from launcher.base.output import counted, some
from launcher.report.figures import Heat, NodeCell, drawable, heat, work
from launcher.results.accept import (
    MAX_SPREAD,
    MAX_WAITING,
    THRESHOLD,
    About,
    Reason,
    Verdict,
    Word,
    judge,
    share_text,
)
from launcher.results.outcome import Outcome

MOST_NAMED = 6  # runs, nodes or sizes in one line of the answer
OK, LOOK = "ok", "look"
REST = (About.END, About.FINITE, About.STEPS, About.LOSS)  # faults that are told apart from speed and nodes
OWN = (*REST, About.SPEED, About.PACE)  # of the run: each of its nodes counts by the newest run that measured it


@dataclass(frozen=True)
class Health:
    """A run with its verdict and its nodes. `place` is the run's on the page."""

    place: int
    outcome: Outcome
    verdict: Verdict
    nodes: Heat | None

    @property
    def waits_for_data(self) -> bool:
        share = self.outcome.data_share
        return share is not None and share > MAX_WAITING


@dataclass(frozen=True)
class Finding:
    """One thing that the answer rests on. `word`: OK, LOOK, or a verdict's."""

    name: str
    word: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What there is to say of one GPU type on one cluster."""

    name: str
    word: Word
    headline: str
    findings: tuple[Finding, ...]


def health(outcomes: Sequence[Outcome], published: Sequence[Outcome]) -> list[Health]:
    return [
        Health(place, outcome, judge(outcome, published, losses=published), heat(outcome))
        for place, outcome in enumerate(outcomes)
    ]


def answers(runs: Sequence[Health]) -> list[Answer]:
    """One for each GPU type and cluster, in the order of the runs."""
    groups: dict[tuple[str, str], list[Health]] = {}
    for run in runs:
        groups.setdefault((run.outcome.gpu, run.outcome.cluster), []).append(run)
    several = len({cluster for _, cluster in groups}) > 1
    return [
        _answer(f"{gpu} on {cluster or 'an unnamed cluster'}" if several else gpu, members)
        for (gpu, cluster), members in groups.items()
    ]


def _answer(name: str, runs: Sequence[Health]) -> Answer:
    newest = _newest_first(runs)
    judged = _counted(newest)
    nodes, slow = _nodes(newest)
    if not slow and any(_faults(run, About.SPEED) for run in judged):
        hint = "nodes wait for each other in every step, so one slow GPU or link can slow all without showing here"
        nodes = replace(nodes, texts=(*nodes.texts, hint))
    speed, data, rest = _speed(judged), _data(judged), _rest(judged)
    word = Word.PASS if any(map(_is_fast, judged)) else Word.CANNOT_SAY
    if slow or any(_faults(run, *OWN) for run in judged):
        word = Word.FAIL
    return Answer(name, word, _headline(word, judged, slow), (speed, nodes, data, rest))


def _newest_first(runs: Iterable[Health]) -> list[Health]:
    return sorted(runs, key=lambda run: run.outcome.date, reverse=True)


def _counted(newest: Sequence[Health]) -> list[Health]:
    """Of each kind of work and number of nodes the newest run that could be judged, else the newest. What was wrong
    before the last repair is history: so is an older run that did not get to its end, behind one that did.
    """
    found: dict[tuple[object, ...], Health] = {}
    for run in newest:
        key = (work(run.outcome), run.outcome.nodes)
        later = found.get(key)
        if later is None or (
            _unjudged(later) and not _unjudged(run) and (run.outcome.complete or not later.outcome.complete)
        ):
            found[key] = run
    return sorted(found.values(), key=lambda run: run.outcome.nodes)


def _unjudged(run: Health) -> bool:
    return run.verdict.word is Word.CANNOT_SAY


def _headline(word: Word, judged: Sequence[Health], slow: Sequence[tuple[NodeCell, Health]]) -> str:
    if word is Word.CANNOT_SAY:
        first = _newest_first(judged)[0]
        return f"no run here could be judged. {first.outcome.run}: {first.verdict.reasons[0].what}"
    fast = [run for run in judged if _is_fast(run)]
    reached = f"{_shares(fast)} of the published tokens/s on {_sizes(fast)}" if fast else ""
    if word is Word.PASS:
        waiting = "; steps wait for data" if any(run.waits_for_data for run in judged) else ""
        return f"good: {reached}{waiting}"
    parts = []
    if below := [run for run in judged if _faults(run, About.SPEED)]:
        parts.append(f"only {_shares(below)} of the published tokens/s on {_sizes(below)}")
    if halting := [run.outcome.run for run in judged if _faults(run, About.PACE)]:
        parts.append(f"stood still now and then: {some(halting, MOST_NAMED)}")
    if slow:
        parts.append(f"slow: {some([cell.host for cell, _ in slow], MOST_NAMED)}")
    if broken := [run for run in judged if _faults(run, *REST)]:
        parts.append(f"failed: {some([run.outcome.run for run in broken], MOST_NAMED)}")
    return "; ".join([*parts, *([f"good: {reached}"] if fast else [])])


def _is_fast(run: Health) -> bool:
    """It reaches what is published. A node that was slow in it has a line of its own."""
    return not _unjudged(run) and run.verdict.share is not None and not _faults(run, *OWN)


def _faults(run: Health, *about: About) -> list[Reason]:
    """Why accept says FAIL, of what it looked at."""
    return [reason for reason in run.verdict.reasons if reason.word is Word.FAIL and reason.about in about]


def _speed(judged: Sequence[Health]) -> Finding:
    below = [run for run in judged if _faults(run, About.SPEED)]
    fast = [run for run in judged if not _unjudged(run) and (run.verdict.share or 0.0) >= THRESHOLD]
    unknown = [run for run in judged if _unjudged(run)]
    texts = [
        f"{_nodes_of(run)}: {share_text(run.verdict.share or 0.0)} of published, below the {100 * THRESHOLD:g}% "
        f"asked for ({run.outcome.run})"
        for run in below[:MOST_NAMED]
    ]
    texts += _more(below)
    if below and fast and min(r.outcome.nodes for r in below) > max(r.outcome.nodes for r in fast):
        texts.append("slow only on more nodes: look at the network between them first")
    if below:
        command = quoted("launcher", "compare", below[0].outcome.run, "published")
        texts.append(f"what differs from the published run: {command}")
    halting = [(run, fault) for run in judged for fault in _faults(run, About.PACE)]
    texts += [f"{run.outcome.run}: {fault.detail}" for run, fault in halting[:MOST_NAMED]] + _more(halting)
    if fast:
        texts.append(f"{_shares(fast)} of published on {_sizes(fast)}")
    if others := list(filter(None, map(_other_size, (*below, *fast)))):
        texts.append(f"measured by a row of another size: {some(others, MOST_NAMED)}")
    by_reason: dict[str, list[str]] = {}
    for run in unknown:
        first = run.verdict.reasons[0]
        why = first.detail if first.about is About.SPEED else first.what
        by_reason.setdefault(why, []).append(run.outcome.run)
    texts += [f"not judged: {some(names, MOST_NAMED)}: {why}" for why, names in list(by_reason.items())[:MOST_NAMED]]
    texts += _more(list(by_reason), " reasons")
    word = Word.FAIL if below or halting else OK if fast else Word.CANNOT_SAY
    return Finding("Speed", str(word), tuple(texts or ["no run got as far as to be measured"]))


def _other_size(run: Health) -> str:
    """`9n by 3 nodes`, where the published row has another number of GPUs than the run."""
    row = run.verdict.baseline
    if row is None or row.gpus == run.outcome.gpus:
        return ""
    return f"{run.outcome.run} by {counted(row.nodes, 'node')}"


def _nodes(newest: Sequence[Health]) -> tuple[Finding, list[tuple[NodeCell, Health]]]:
    """Every node by the newest run in which accept would judge it. One that was slow and has not run since is slow."""
    seen: set[str] = set()
    slow: list[tuple[NodeCell, Health]] = []
    for run in newest:
        if run.nodes is None or not any(reason.about is About.NODES for reason in run.verdict.reasons):
            continue
        slow += [(cell, run) for cell in run.nodes.slow if cell.host not in seen]
        seen |= {node.host for node in run.outcome.by_node if drawable(node.tps)}
    if not seen:
        text = "no run has figures of two nodes or more to hold against each other"
        return Finding("Nodes", str(Word.CANNOT_SAY), (text,)), []
    slow.sort(key=lambda found: found[0].percent or 0.0)
    texts = [
        f"{cell.host}: {-(cell.percent or 0.0):.1f}% slower than the others ({run.outcome.run})"
        for cell, run in slow[:MOST_NAMED]
    ]
    texts += _more(slow)
    limit = f"more than {100 * MAX_SPREAD:g}% slower than the others"
    texts.append(f"{'no other' if slow else 'none'} of {len(seen)} nodes is {limit}")
    return Finding("Nodes", str(Word.FAIL) if slow else OK, tuple(texts)), slow


def _data(judged: Sequence[Health]) -> Finding:
    known = [(run.outcome.data_share, run) for run in judged if run.outcome.data_share is not None]
    if not known:
        return Finding("Data", str(Word.CANNOT_SAY), ("not known how long steps wait for data",))
    most, run = max(known, key=lambda found: found[0])
    text = f"at most {100 * most:.1f}% of a step is waiting for data"
    if run.waits_for_data:
        text = (
            f"{100 * most:.1f}% of a step is waiting for data ({run.outcome.run}); up to "
            f"{100 * MAX_WAITING:g}% is usual"
        )
    return Finding("Data", LOOK if run.waits_for_data else OK, (text,))


def _rest(judged: Sequence[Health]) -> Finding:
    broken = [(run, faults) for run in judged if (faults := _faults(run, *REST))]
    texts = [f"{run.outcome.run}: {'; '.join(fault.what for fault in faults)}" for run, faults in broken[:MOST_NAMED]]
    texts += _more(broken)
    whole = sum(run.outcome.complete for run in judged)
    if broken:
        return Finding("Ends and loss", str(Word.FAIL), tuple(texts))
    if whole:
        return Finding(
            "Ends and loss", OK, (f"nothing wrong in {counted(whole, 'run')}, the newest of each kind and size",)
        )
    return Finding("Ends and loss", str(Word.CANNOT_SAY), ("no run is complete",))


def _shares(runs: Sequence[Health]) -> str:
    shares = [run.verdict.share or 0.0 for run in runs]
    low, high = share_text(min(shares)), share_text(max(shares))
    return low if low == high else f"{low} to {high}"


def _sizes(runs: Sequence[Health]) -> str:
    """`3, 9 and 17 nodes`"""
    *first, last = sorted({run.outcome.nodes for run in runs})
    if len(first) >= MOST_NAMED:
        return f"{first[0]:,} to {last:,} nodes"
    before = ", ".join(f"{size:,}" for size in first) + " and " if first else ""
    return before + counted(last, "node")


def _nodes_of(run: Health) -> str:
    return counted(run.outcome.nodes, "node")


def _more(all_: Sequence[object], what: str = "") -> list[str]:
    return [f"and {len(all_) - MOST_NAMED:,} more{what}"] if len(all_) > MOST_NAMED else []
