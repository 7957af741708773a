"""A run directory as an Outcome. Whatever was edited, half copied, or is another user's becomes a problem or a gap,
never a figure that looks whole.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.files import read_json
from launcher.base.output import counted, some
from launcher.base.values import by
from launcher.config.hardware import hardware
from launcher.config.mfu import peak_of
from launcher.image.squashfs_file import known, superblock
from launcher.logs.files import node_logs
from launcher.logs.steps import LogReader, StepRecord
from launcher.results import measure
from launcher.results.goodput import Trace, goodput, kept_steps
from launcher.results.outcome import (
    NO_STEP_COUNTS,
    NON_FINITE,
    RESTARTED,
    VERSIONS,
    Lack,
    NodeCheck,
    Outcome,
    Problem,
    Startup,
    short_of,
)
from launcher.results.settings import count, settings_of, words
from launcher.results.tensorboard import scalars
from launcher.runs.attempts import Attempt, attempts_of, moment
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState

_MIXED = ("gpu", "driver", "torch", "torchtitan", "cuda", "nccl")
_RECORD = re.compile(r"([0-9]{4,})-.+\.json")
_LONGEST_QUEUE_S = 90 * 86400.0
_LONGEST_START_S = 86400.0
_CLOCKS_S = 2.0  # so far apart, rounding included, are moments that really are the same
_Span = tuple[float | None, float | None]
_SHARE, _STEP_TIME = "time_metrics/data_loading(%)", "time_metrics/end_to_end(s)"


def outcome_of(run: Run, state: JobState, with_data_share: bool = True) -> Outcome | None:
    """What the run was and what it reached. `with_data_share` is for what shows it: it takes a third of the time.

    None where the run directory does not say what was asked for, and where a run that is still going has logged
    nothing yet. Files that cannot be read are named in `problems`; nothing is raised for them.
    """
    settings, wrong = settings_of(run)
    needed = ("job.nodes", "profile.gpus_per_node", "recipe.steps", "recipe.local_batch_size", "recipe.log_freq")
    counts = [count({"recipe.log_freq": 1, **settings}, key) for key in needed]
    nodes, gpus_per_node, steps, batch, log_freq = (number or 0 for number in counts)
    if None in counts:
        return None
    log_freq = max(1, log_freq)
    unreadable: list[str] = []
    attempts = attempts_of(run)
    starts, kept = _read(attempts, unreadable)
    wild: list[StepRecord] = []  # of steps that do not count
    found = measure.measure(_records(starts, kept, unreadable, wild), log_freq, kept)
    if found.last is None and state.active:
        return None
    by_attempt = [_trained(Path(attempt.path), unreadable) for attempt in attempts]
    hosts, records = {node.host for node in found.by_node}, by_attempt[-1]
    seen = {host: one for before in by_attempt[:-1] for host, one in before.items() if host in hosts} | records
    first = [at - offset for host, at in found.began.items() if (offset := _offset(seen.get(host, {}))) is not None]
    gpus, last = nodes * gpus_per_node, found.last
    gpu = words(settings, "profile.gpu", "?")
    problems = [
        *map(Problem, unreadable),
        *_of_state(state),
        *_of_steps(found, steps, log_freq),
        *map(Problem, _of_nodes(found, nodes, attempts)),
        *([] if found.is_finite and not wild else [NON_FINITE]),
        *([RESTARTED] if found.restarted else []),
        *map(Problem, [*_of_hardware(seen, gpu), *wrong]),
    ]
    intent = next((said for attempt in attempts if (said := Run(Path(attempt.path)).intent)), {})  # of its first job
    image, submitted = words(settings, "job.image"), moment(intent.get("at"))
    spent = goodput(list(map(_trace, attempts, starts, by_attempt, [nodes] * len(starts))), kept, submitted)
    return Outcome(
        run=run.name,
        run_dir=str(run.path),
        state=state.name,
        date="" if submitted is None else f"{datetime.fromtimestamp(submitted, UTC):%Y-%m-%dT%H:%M:%SZ}",
        cluster=_cluster(intent, seen),
        gpu=gpu,
        nodes=nodes,
        gpus=gpus,
        recipe=_stem(words(settings, "job.recipe", "?")),
        local_batch_size=batch,
        global_batch_size=_global_batch(settings, gpus, batch),
        seq_len=count(settings, "recipe.seq_len") or 0,
        precision=_precision(settings),
        compile=settings.get("recipe.compile") is True,
        steps=steps,
        step=last.step if last else None,
        loss=last.loss if last else None,
        grad_norm=last.grad_norm if last else None,
        memory_pct=last.memory_pct if last else None,
        tps=found.tps,
        tflops=found.tflops,
        memory_gib=found.memory_gib,
        mfu_pct=last.mfu_pct if last else None,
        peak_tflops=peak_of(last.tflops, last.mfu_pct) if last else None,
        data_share=_data_share(run.path / "titan" / "tb", found.warm_steps) if with_data_share else None,
        startup=_startup(submitted, attempts[0].began_at, _checked(by_attempt[0], nodes), first),
        overall_tps=found.overall_tps,
        wall_s=spent.allocation_s
        if spent and len(attempts) > 1
        else _between(attempts[0].began_at, attempts[-1].ended_at, _LONGEST_QUEUE_S),
        series=found.series,
        by_node=found.by_node,
        attempts=tuple(map(_result, attempts, starts, (*kept, measure.ENDLESS), found.by_attempt)),
        goodput=spent,
        problems=tuple(problems),
        notes=_notes(found, records, nodes),
        versions=_versions(seen, image, submitted),
        settings=settings,
        prediction=read_json(run.path / "plan.json") or {},
    )


@dataclass(frozen=True)
class _Logged:
    """The logs of an attempt by node; its first node that logged a step is read, and held until it is used."""

    logs: Mapping[str, Path]
    host: str = ""
    steps: Sequence[StepRecord] = ()  # each once, in their order
    saves: Sequence[tuple[float, float]] = ()  # when checkpoints were saved, and how long each took
    read: dict[Path, list[StepRecord]] = field(default_factory=dict)


def results_of(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """How far each attempt came, by one node's log of each; nothing is raised."""
    starts, kept = _read(attempts, [])
    return tuple(map(_result, attempts, starts, (*kept, measure.ENDLESS), [None] * len(starts)))


def _read(attempts: Sequence[Attempt], unreadable: list[str]) -> tuple[list[_Logged], tuple[int, ...]]:
    """What each attempt logged, and up to which step it counts."""
    starts = [_logged(attempt, unreadable) for attempt in attempts]
    firsts = [start.steps[0].step if start.steps else None for start in starts]
    return starts, kept_steps([attempt.step for attempt in attempts], firsts)


def _logged(attempt: Attempt, unreadable: list[str]) -> _Logged:
    try:
        logs = node_logs(attempt.logs)
    except LauncherError as error:
        unreadable.append(error.what)
        return _Logged({})
    read: dict[Path, list[StepRecord]] = {}
    for host, path in logs.items():
        reader = LogReader(path)
        if records := read.setdefault(path, list(_readable(reader, unreadable))):
            return _Logged(logs, host, measure.deduplicate(records).records, reader.saves, read)
    return _Logged(logs, read=read)


def _records(
    starts: Sequence[_Logged], kept: Sequence[int], unreadable: list[str], wild: list[StepRecord]
) -> Iterator[tuple[str, Iterator[StepRecord]]]:
    """The steps that count, by node and in the order of attempts; of others, those that are not finite go to `wild`."""

    def of_node(host: str) -> Iterator[StepRecord]:
        for start, (low, high) in zip(starts, pairwise((-1, *kept, measure.ENDLESS)), strict=True):
            if path := start.logs.get(host):
                records = start.read.pop(path, None)
                for record in _readable(LogReader(path), unreadable) if records is None else records:
                    if low < record.step <= high:
                        yield record
                    elif not measure.finite(record):
                        wild.append(record)

    for host in dict.fromkeys(host for start in starts for host in start.logs):
        yield host, of_node(host)


def _readable(reader: LogReader, unreadable: list[str]) -> Iterator[StepRecord]:
    try:
        yield from reader.read()
    except OSError as error:
        unreadable.append(f"cannot read {reader.path}: {error.strerror}")


def node_checks(run: Run) -> dict[str, NodeCheck]:
    """What the nodes' checks found, by host; {} of runs without any."""
    return {host: _check(record) for host, record in _node_records(run.path / "nodes", []).items()}


def _check(record: Mapping[str, Any]) -> NodeCheck:
    lists = (record.get(key) for key in ("problems", "warnings", "speed"))
    problems, warnings, speed = (
        [one for one in value if isinstance(one, dict)] if isinstance(value, list) else [] for value in lists
    )
    measured: dict[str, float] = {}
    for key in ("product_tflops", "copy_gbs", "allreduce_node_gbs"):
        if found := [value for one in (record, *speed) if (value := _number(one.get(key), 0, 1e9))]:
            measured[key] = min(found)
    passed = record.get("ok")
    words = tuple(str(one["what"]) for one in (*problems, *warnings) if "what" in one)
    return NodeCheck(passed if isinstance(passed, bool) else None, words, measured)


def _node_records(folder: Path, unreadable: list[str]) -> dict[str, dict[str, Any]]:
    """What the nodes wrote of themselves, by host, in the job's order. Older runs, and local ones cut short, lack
    it.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _RECORD.fullmatch(entry.name))
    except FileNotFoundError:
        return {}
    except OSError as error:
        unreadable.append(f"cannot read {folder}: {error.strerror}")
        return {}
    found = {}
    for name in names:
        if (record := read_json(folder / name)) is None:
            unreadable.append(f"cannot read nodes/{name}, or it is damaged")
        else:
            found[name.partition("-")[2].removesuffix(".json")] = record
    return found


def _trained(attempt: Path, unreadable: list[str]) -> dict[str, dict[str, Any]]:
    """`_node_records` of the nodes that trained, where some were left over."""
    records, hosts = _node_records(attempt / "nodes", unreadable), Run(attempt).chosen
    return {host: record for host, record in records.items() if not hosts or host in hosts}


# --- what makes it less than a result -----------------------------------------------------------------------


def _of_state(state: JobState) -> list[Problem]:
    if state.name == "COMPLETED":
        return []
    reason = f" ({state.reason})" if state.reason and not state.active else ""
    before = "still " if state.active else "" if state.known else "its end is "
    return [Problem(f"{before}{state.name}{reason}", Lack.STATE)]


def _of_steps(found: measure.Measured, steps: int, log_freq: int) -> list[Problem]:
    step = found.last.step if found.last else None
    if step is None or step < measure.last_logged(steps, log_freq) or step > steps:
        return [short_of(step, steps)]
    missing = measure.logged_steps(step, log_freq) - len(found.series)
    problems = [Problem(f"{counted(missing, 'logged step')} missing")] if missing > 0 else []
    return problems + ([NO_STEP_COUNTS] if found.tps is None else [])


def _of_nodes(found: measure.Measured, nodes: int, attempts: Sequence[Attempt]) -> list[str]:
    """Nodes without a log, and those whose logs end before the leading one's: they train in step, so a part of the log
    is missing. Of each attempt; a node that was lost in one has no complete log there.
    """
    problems = []
    for attempt, ends in zip(attempts, found.ends, strict=True):
        logged, last = len(ends), max((end for end, _ in ends.values()), default=0)
        if 0 < logged < nodes - len(set(attempt.culprits) - ends.keys()):
            problems.append(f"only {logged} of {nodes} nodes logged")
        elif logged > nodes:
            problems.append(f"{logged} nodes logged, asked for {nodes}")
        if short := [host for host, (end, _) in ends.items() if end < last and host not in attempt.culprits]:
            problems.append(f"the log of {some(short)} ends at step {min(ends[host][0] for host in short)} of {last}")
    return problems


def _of_hardware(records: Mapping[str, Mapping[str, Any]], gpu: str) -> list[str]:
    """Nodes that differ in what decides a figure, GPUs that are not the profile's, nodes that failed their check."""
    problems = []
    for key in _MIXED:
        good = {host: record.get(key) for host, record in records.items() if record.get("ok") is not False}
        hosts = by(good.__getitem__, (host for host, value in good.items() if isinstance(value, str)))
        if len(hosts) > 1:
            kinds = (f"{value or 'none'} ({some(names)})" for value, names in hosts.items())
            problems.append(f"mixed {key}: {', '.join(kinds)}")
    for host, record in records.items():
        names = record.get("gpu_names")
        kinds_here = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        if len(kinds_here) > 1:
            problems.append(f"mixed gpu in {host}: {', '.join(sorted(kinds_here))}")
        labels = {one.gpu for one in hardware().values()}
        others = {label for label in labels if label != gpu and re.search(rf"\b{label}\b", str(record.get("gpu")))}
        if gpu in labels and others:
            problems.append(f"the profile says {gpu}, {host} has {record.get('gpu')}")
        if record.get("ok") is False:
            problems.append(f"{host} failed its check")
    return problems


def _notes(found: measure.Measured, records: Mapping[str, Any], nodes: int) -> tuple[str, ...]:
    notes = []
    ends = found.ends[-1]
    most = max((many for _, many in ends.values()), default=0)
    last = found.last.step if found.last else 0
    if fewer := [host for host, (end, many) in ends.items() if many < most and end >= last]:
        notes.append(f"fewer logged steps than on other nodes: {some(fewer)}")
    if len(records) < nodes:
        notes.append(f"{len(records) or 'none'} of {nodes} nodes left a record of their versions")
    return tuple(notes)


# --- figures beside the logs' ------------------------------------------------------------------------------


def _data_share(folder: Path, warm_steps: frozenset[int]) -> float | None:
    """Of the time of the steps that count, the part that was spent waiting for data; None where nobody wrote it."""
    found = scalars(folder, (_SHARE, _STEP_TIME))
    share, seconds = found[_SHARE], found[_STEP_TIME]
    both = [(share[step], seconds[step]) for step in warm_steps & share.keys() & seconds.keys()]
    if any(not 0 <= part <= 100.001 or not 0 < time < math.inf for part, time in both) or not both:
        return None
    return min(1.0, sum(part * time for part, time in both) / 100 / sum(time for _, time in both))


def _startup(submitted: float | None, script: float | None, check: _Span, first: Sequence[float]) -> Startup:
    """Where the time before the first step went. Clocks of several machines are compared: what is negative by more
    than their likely difference, or absurdly long, is not told.
    """
    in_container, checked = check
    return Startup(
        queue_s=_between(submitted, script, _LONGEST_QUEUE_S),
        container_s=_between(script, in_container, _LONGEST_START_S),
        check_s=_between(in_container, checked, _LONGEST_START_S),
        first_step_s=_between(checked, min(first, default=None), _LONGEST_START_S),
    )


def _checked(records: Mapping[str, Mapping[str, Any]], nodes: int) -> _Span:
    """When the last node's check began, and when the last one ended."""
    starts = [moment(record.get("time")) for record in records.values()]
    checks = [_number(record.get("check_s"), 0, _LONGEST_START_S) for record in records.values()]
    ends = [None if a is None or b is None else a + b for a, b in zip(starts, checks, strict=True)]
    # A node's check_s has its wait for the last node's container in it, which is told as the container's.
    return _last(starts, nodes), _last(ends, nodes)


def _offset(record: Mapping[str, Any]) -> float | None:
    return _number(record.get("utc_offset_s"), -86400, 86400)


def _trace(attempt: Attempt, start: _Logged, records: Mapping[str, Mapping[str, Any]], nodes: int) -> Trace:
    offset = _offset(records.get(start.host, {}))
    check_s = _between(*_checked(records, nodes), _LONGEST_START_S) or 0.0
    if not start.host or offset is None:
        return Trace(attempt, check_s, None if start.host else ())
    points = [(one.step, one.time - offset) for one in start.steps if one.time is not None]
    return Trace(attempt, check_s, points, [(at - offset, took) for at, took in start.saves])


def _result(attempt: Attempt, start: _Logged, kept: int, tps: float | None) -> Attempt:
    found = replace(attempt, hosts=attempt.hosts or tuple(start.logs), tps=tps)
    if not start.steps:
        return found
    first, last = start.steps[0].step, start.steps[-1].step
    return replace(found, first_step=first, last_step=last, kept_step=min(kept, last))


def _last(moments: Sequence[float | None], nodes: int) -> float | None:
    """None where one of the nodes' is not known: it could be the last."""
    known = [one for one in moments if one is not None]
    return max(known) if len(known) == nodes else None


def _between(start: float | None, end: float | None, longest: float) -> float | None:
    if start is None or end is None or not -_CLOCKS_S <= end - start <= longest:
        return None
    return max(0.0, end - start)


def _number(value: object, low: float, high: float) -> float | None:
    """A number between the two; Python refuses to turn the longest integers into one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    return None


def _cluster(intent: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
    return "local" if intent.get("scheduler") == "local" else _said([intent, *records.values()], "cluster")


def _said(records: Iterable[Mapping[str, Any]], key: str) -> str:
    """What the first that says something says."""
    values = (record.get(key) for record in records)
    return next((value for value in values if isinstance(value, str) and value), "")


def _versions(records: Mapping[str, Mapping[str, Any]], image: str, submitted: float | None) -> dict[str, str]:
    found = {key: _said(records.values(), key) for key in VERSIONS}
    if image:
        found |= {"image": Path(image).name, "digest": _digest(image, submitted)}
    return {key: value for key, value in found.items() if value}


def _digest(image: str, submitted: float | None) -> str:
    """The image's checksum as the file beside it says; "" where there is none or the image is newer than the run."""
    path = Path(image)
    try:
        if submitted is None or path.stat().st_mtime > submitted:
            return ""
        facts = known(path, superblock(path))
    except (OSError, ValueError, LauncherError):
        return ""
    return facts.sha256 if facts else ""


def _global_batch(settings: dict[str, Any], gpus: int, batch: int) -> int:
    if asked := count(settings, "recipe.global_batch_size"):
        return asked
    other = math.prod(count(settings, f"recipe.{name}_parallel") or 1 for name in ("tensor", "context", "pipeline"))
    return batch * gpus // other


def _precision(settings: dict[str, Any]) -> str:
    quantize = words(settings, "recipe.quantize", "none")
    param = words(settings, "recipe.param_dtype", "?")
    return param if quantize == "none" else f"{param} + {quantize}"


def _stem(recipe: str) -> str:
    return Path(recipe).stem if "/" in recipe or recipe.endswith(".toml") else recipe
