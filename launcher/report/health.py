"""Whether the cluster is good: each run's verdict, as `launcher accept` gives it, and one answer for all runs of a GPU
type. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.base.errors import quoted
from launcher.base.output import counted, some
from launcher.base.values import by
from launcher.report.figures import slow_nodes, work
from launcher.results.accept import MAX_SPREAD, MAX_WAITING, THRESHOLD, About, Reason, Verdict, Word, judge, share_text
from launcher.results.columns import drawable
from launcher.results.measure import Against
from launcher.results.outcome import Outcome

NOTHING = ("", "")  # to be done
MOST_NAMED = 6  # runs, nodes or sizes in one line of the answer
OK, LOOK, NOT_MEASURED, NOT_COUNTED = "ok", "look", "not measured", "not counted"
REST = (About.END, About.FINITE, About.STEPS, About.LOSS)  # faults that are told apart from speed and nodes
OWN = (*REST, About.SPEED, About.PACE)  # of the run: each of its nodes counts by the newest run that measured it


@dataclass(frozen=True)
class Health:
    """A run with its verdict. `place` is the run's on the page."""

    place: int
    outcome: Outcome
    verdict: Verdict

    @property
    def name(self) -> str:
        return self.outcome.run

    @property
    def share(self) -> float:
        """Of the published tokens/s; 0 where there is nothing to measure it by."""
        return self.verdict.share or 0.0

    @property
    def is_unjudged(self) -> bool:
        """Nothing follows from it for the cluster: too little is known, or it failed by what was asked of it."""
        return self.verdict.word is Word.CANNOT_SAY or self.is_own_fault

    @property
    def is_own_fault(self) -> bool:
        return bool(self.outcome.own_fault) and self.verdict.reasons[0].about is About.END

    @property
    def is_fast(self) -> bool:
        """It reaches what is published. A node that was slow in it has a line of its own."""
        return not self.is_unjudged and self.verdict.share is not None and not self.faults(*OWN)

    @property
    def waits_for_data(self) -> bool:
        return (self.outcome.data_share or 0.0) > MAX_WAITING

    def faults(self, *about: About) -> list[Reason]:
        """Why accept says FAIL, of what it looked at, where that may be the cluster's doing."""
        reasons = () if self.is_own_fault else self.verdict.reasons
        return [reason for reason in reasons if reason.word is Word.FAIL and reason.about in about]


@dataclass(frozen=True)
class Finding:
    """One thing that the answer rests on. `word`: OK, LOOK, NOT_MEASURED, NOT_COUNTED, or FAIL."""

    name: str
    word: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What there is to say of one GPU type on one cluster."""

    name: str
    word: Word
    headline: str
    fix: tuple[str, str]  # what to do next and the command for it; ("", "") where nothing is to be done
    findings: tuple[Finding, ...]


def health(outcomes: Sequence[Outcome], published: Sequence[Outcome]) -> list[Health]:
    return [
        Health(place, outcome, judge(outcome, published, losses=published)) for place, outcome in enumerate(outcomes)
    ]


def answers(runs: Sequence[Health]) -> list[Answer]:
    """One for each GPU type and cluster, in the order of the runs."""
    groups = by(lambda run: (run.outcome.gpu, run.outcome.cluster), runs)
    several = len({cluster for _, cluster in groups}) > 1
    return [
        _answer(f"{gpu} on {cluster or 'an unnamed cluster'}" if several else gpu, members)
        for (gpu, cluster), members in groups.items()
    ]


def _answer(name: str, runs: Sequence[Health]) -> Answer:
    newest = sorted(runs, key=lambda run: run.outcome.date, reverse=True)
    judged = _counted(newest)
    nodes, slow = _nodes(newest)
    word = Word.PASS if any(run.is_fast for run in judged) else Word.CANNOT_SAY
    if slow or any(run.faults(*OWN) for run in judged):
        word = Word.FAIL
    own = [run for run in newest if run.is_own_fault]
    findings = (_speed(judged), nodes, _data(judged), _rest(judged), *_own(own))
    return Answer(name, word, *_headline(word, judged, slow, own), findings)


def _counted(newest: Sequence[Health]) -> list[Health]:
    """Of each kind of work and number of nodes the newest run that could be judged, else the newest. What was wrong
    before the last repair is history: so is an older run that did not get to its end, behind one that did.
    """
    found: dict[tuple[object, ...], Health] = {}
    for run in newest:
        key = (*work(run.outcome).items(), run.outcome.nodes)
        later = found.get(key)
        if later is None or (
            later.is_unjudged and not run.is_unjudged and (run.outcome.complete or not later.outcome.complete)
        ):
            found[key] = run
    return sorted(found.values(), key=lambda run: run.outcome.nodes)


def _headline(
    word: Word, judged: Sequence[Health], slow: Sequence[tuple[Against, Health]], own: Sequence[Health]
) -> tuple[str, tuple[str, str]]:
    """The answer in sentences, and the command that comes next."""
    fast = [run for run in judged if run.is_fast]
    below = [run for run in judged if run.faults(About.SPEED)]
    halting = [run for run in judged if run.faults(About.PACE)]
    broken = [run for run in judged if run.faults(*REST)]
    if word is Word.CANNOT_SAY:
        others = sorted((run for run in judged if not run.is_own_fault), key=lambda run: run.outcome.date)
        if not others:
            return f"Not measured. Runs that failed: {_names(own)}.", _logs(own)
        return f"Not measured. {others[-1].name}: {others[-1].verdict.reasons[0].detail}.", NOTHING
    parts, fix = [], _logs(broken or halting)
    if below:
        fix = "See what differs", quoted("launcher", "compare", below[0].name, "published")
    if slow:
        hosts = [node.host for node, _ in slow]  # the slowest first
        least, most = (f"{100 * node.behind:.0f}" for node, _ in (slow[-1], slow[0]))
        much = f"{most}%" if least == most else f"{least} to {most}%"
        verb, whose = ("is", "its") if len(hosts) == 1 else ("are", "their")
        parts.append(f"{some(hosts, MOST_NAMED)} {verb} {much} slower than {whose} peers.")
        exclude = quoted("launcher", "cluster", "nodes", "add", *hosts, "--reason", f"{much} slower than {whose} peers")
        fix = f"Exclude {'it' if len(hosts) == 1 else 'them'}", exclude
    if below:
        parts.append(f"Only {_shares(below)} of published on {_sizes(below)}.")
    if halting:
        parts.append(f"Steps stood still in {_names(halting)}.")
    if broken:
        parts.append(f"Failed: {_names(broken)}.")
    if fast:
        parts.append(f"{'Otherwise ' if parts else ''}{_shares(fast)} of published on {_sizes(fast)}.")
    if word is Word.PASS and any(run.waits_for_data for run in judged):
        parts.append("Steps wait for data.")
    return " ".join(parts), fix


def _logs(runs: Sequence[Health]) -> tuple[str, str]:
    return ("See why", quoted("launcher", "logs", runs[0].name)) if runs else NOTHING


def _names(runs: Sequence[Health]) -> str:
    return some([run.name for run in runs], MOST_NAMED)


def _own(own: Sequence[Health]) -> list[Finding]:
    """Runs that failed by what was asked of them, which says nothing of the cluster."""
    texts = _first(f"{run.name}: {run.outcome.own_fault}" for run in own)
    return [Finding("Runs that failed", NOT_COUNTED, tuple(texts))] if own else []


def _speed(judged: Sequence[Health]) -> Finding:
    below = [run for run in judged if run.faults(About.SPEED)]
    fast = [run for run in judged if not run.is_unjudged and run.share >= THRESHOLD]
    texts = _first(
        f"{counted(run.outcome.nodes, 'node')}: {share_text(run.share)} of published, below the "
        f"{100 * THRESHOLD:g}% asked for ({run.name})"
        for run in below
    )
    if below and fast and min(r.outcome.nodes for r in below) > max(r.outcome.nodes for r in fast):
        texts.append("slow only on more nodes: look at the network between them first")
    halting = _first(f"{run.name}: {fault.detail}" for run in judged for fault in run.faults(About.PACE))
    texts += halting
    if fast:
        texts.append(f"{_shares(fast)} of published on {_sizes(fast)}")
    unjudged = by(_why_unjudged, (run for run in judged if run.is_unjudged and not run.is_own_fault))
    texts += _first(f"not judged: {_names(runs)}: {why}" for why, runs in unjudged.items())
    word = str(Word.FAIL) if below or halting else OK if fast else NOT_MEASURED
    return Finding("Speed", word, tuple(texts or ["no run got as far as to be measured"]))


def _why_unjudged(run: Health) -> str:
    first = run.verdict.reasons[0]
    return first.detail if first.about is About.SPEED else first.what


def _nodes(newest: Sequence[Health]) -> tuple[Finding, list[tuple[Against, Health]]]:
    """Every node by the newest run in which accept would judge it. One that was slow and has not run since is slow."""
    seen: set[str] = set()
    slow: list[tuple[Against, Health]] = []
    for run in newest:
        if any(reason.about is About.NODES for reason in run.verdict.reasons):
            slow += [(node, run) for node in slow_nodes(run.outcome) if node.host not in seen]
            seen |= {node.host for node in run.outcome.by_node if drawable(node.tps)}
    if not seen:
        text = "no run has figures of two nodes or more to hold against each other"
        return Finding("Nodes", NOT_MEASURED, (text,)), []
    slow.sort(key=lambda found: -found[0].behind)
    texts = _first(f"{node.host}: {100 * node.behind:.1f}% slower than the others ({run.name})" for node, run in slow)
    limit = f"more than {100 * MAX_SPREAD:g}% slower than the others"
    texts.append(f"{'no other' if slow else 'none'} of {len(seen)} nodes is {limit}")
    return Finding("Nodes", str(Word.FAIL) if slow else OK, tuple(texts)), slow


def _data(judged: Sequence[Health]) -> Finding:
    known = [run for run in judged if run.outcome.data_share is not None]
    if not known:
        return Finding("Data", NOT_MEASURED, ("no run recorded how long steps wait for data",))
    most = max(known, key=lambda run: run.outcome.data_share or 0.0)
    text = f"at most {100 * (most.outcome.data_share or 0.0):.1f}% of a step is waiting for data ({most.name})"
    usual = f"; up to {100 * MAX_WAITING:g}% is usual" if most.waits_for_data else ""
    return Finding("Data", LOOK if most.waits_for_data else OK, (text + usual,))


def _rest(judged: Sequence[Health]) -> Finding:
    faults = ((run, "; ".join(fault.what for fault in run.faults(*REST))) for run in judged)
    word, texts = str(Word.FAIL), _first(f"{run.name}: {what}" for run, what in faults if what)
    if not texts:
        whole = sum(run.outcome.complete for run in judged)
        word = OK if whole else NOT_MEASURED
        wrong = f"nothing wrong in {counted(whole, 'run')}, the newest of each kind and size"
        texts = [wrong if whole else "no run is complete"]
    return Finding("Ends and loss", word, tuple(texts))


def _shares(runs: Sequence[Health]) -> str:
    shares = [run.share for run in runs]
    low, high = (share_text(share).removesuffix("%").removesuffix(".0") for share in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _sizes(runs: Sequence[Health]) -> str:
    """`3, 9 and 17 nodes`"""
    *first, last = sorted({run.outcome.nodes for run in runs})
    if len(first) >= MOST_NAMED:
        return f"{first[0]:,} to {last:,} nodes"
    return " and ".join(filter(None, [", ".join(f"{size:,}" for size in first), counted(last, "node")]))


def _first(texts: Iterable[str]) -> list[str]:
    found = list(texts)
    return found[:MOST_NAMED] + ([f"and {len(found) - MOST_NAMED:,} more"] if len(found) > MOST_NAMED else [])
