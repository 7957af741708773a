"""What a person sees while a run goes on: its phases, a bar and figures on a terminal, plain lines in a pipe.

rich is imported only for a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from launcher.base.errors import LauncherError
from launcher.base.files import read_json
from launcher.base.output import columns, counted, duration, echo, is_terminal, plain, print_json, size
from launcher.config.mfu import mfu_text
from launcher.logs.follow import Progress
from launcher.preflight.waiting import why_waiting
from launcher.runs import attach, control
from launcher.runs import directory as runs
from launcher.runs.attempts import Attempt, ended_by
from launcher.runs.directory import Run
from launcher.runs.phases import Phase, Standing, Watcher
from launcher.scheduler.state import WAITING, JobState

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

ENDING = "all steps are done; on a cluster, removing containers takes minutes"
_CALLED = {Phase.CHECKING: "checking nodes"}


@dataclass(frozen=True)
class About:
    """What is said of a run besides how it stands."""

    name: str
    what: str  # recipe, size and job
    unit: str  # what tokens/s are per: "GPU", or "rank" on CPUs
    target: float | None = None  # tokens/s
    target_is: str = ""  # "published" or "planned"


def about(run: Run) -> About:
    job, profile, plan = run.asked["job"], run.asked["profile"], read_json(run.path / "plan.json") or {}
    where = size(run.nodes, run.ranks_per_node, str(profile.get("gpu", "?")), run.on_cpu)
    job_id = f", {'process' if run.is_local else 'job'} {run.job['job_id']}" if run.job else ""
    target = number if isinstance(number := plan.get("tps"), (int, float)) and number > 0 else None
    unit, target_is = "rank" if run.on_cpu else "GPU", "planned" if plan.get("differs") else "published"
    return About(run.name, f"{job.get('recipe', '?')} on {where}{job_id}", unit, target, target_is)


def watch(run: Run, stream: TextIO) -> None:
    """Shows how the run stands until it has ended: steps on `stream`, what comes before them in a pipe on stderr."""
    show(attach.standings(run), about(run), stream, is_terminal(stream), partial(why_it_waits, run))


def why_it_waits(run: Run, state: JobState | None) -> list[str]:
    """Lines that tell why Slurm has not started the run yet; none where it does not wait for Slurm."""
    return why_waiting(run, state) if state and state.name in WAITING and not run.is_local else []


def show(
    standings: Iterable[Standing],
    about: About,
    stream: TextIO,
    on_terminal: bool,
    why: Callable[[JobState | None], Sequence[str]] = lambda _: (),
) -> None:
    """`why`: lines that tell why the run waits, asked for each new reason of Slurm's."""
    said: object = ()
    lines: Sequence[str] = ()
    last: Standing | None = None
    with _screen(stream) if on_terminal else nullcontext() as live:
        for seen in standings:
            is_new = (reason := (seen.attempt, seen.phase, *_reason(seen))) != said
            if is_new and seen.phase is Phase.QUEUED:
                lines = why(seen.state)
            said = reason
            if live:
                live.update(_panel(seen, about, lines), refresh=True)
                continue
            if seen.before and seen.attempt != (last.attempt if last else 1):
                echo(f"{about.name}: {started_again(seen)}", err=True)
            # The same step comes again when another node's log shows it; a smaller one after a restart is news.
            if seen.progress and not (last and last.progress and last.progress.step == seen.progress.step):
                echo(plain_line(seen.progress, about.unit), file=stream)
            if is_new:
                what = f"attempt {seen.attempt - 1} ended" if seen.before else "it was submitted"
                began = seen.began.get(seen.phase, seen.at)  # not now: who looks after the end sees all phases at once
                since = f", {duration(began - seen.began[Phase.QUEUED])} after {what}"
                detail = f" ({detail})" if (detail := _detail(seen)) else ""
                news = _detail(seen) if seen.phase is Phase.QUEUED else f"{_called(seen)}{detail}{since}"
                echo(f"{about.name}: {news}", *(f"  {line}" for line in lines if seen.phase is Phase.QUEUED), err=True)
            if seen.hang and not (last and last.hang):
                echo(f"{about.name}: hang: {plain(seen.hang)}", err=True)
            last = seen


def started_again(seen: Standing) -> str:
    """`attempt 2: node n2 lost, from step 20`"""
    before = seen.before or Attempt(0, "")
    start = [] if before.step is None else [f"from step {before.step}" if before.step else "from the beginning"]
    return f"attempt {seen.attempt}: {', '.join(filter(None, [ended_by(before), *start]))}"


def _reason(seen: Standing) -> tuple[str, ...]:
    return (seen.state.name, seen.state.reason) if seen.state and seen.phase is Phase.QUEUED else ()


def _called(seen: Standing) -> str:
    return _CALLED.get(seen.phase, str(seen.phase))


def _detail(seen: Standing) -> str:
    """What is to be said of the phase that the run is in."""
    if seen.phase is Phase.QUEUED:
        return " ".join(_reason(seen)).strip() or "Slurm does not answer; trying again"
    if seen.phase is Phase.STARTING:
        return f"{seen.started} of {counted(seen.nodes, 'node')}"
    if seen.phase is Phase.CHECKING:
        doing = ", ".join(what if seen.nodes == 1 else f"{what} on {count}" for what, count in seen.doing.items())
        return f"{seen.fit} of {counted(seen.nodes, 'node')} done{f'; {doing}' if doing else ''}"
    return {Phase.LOADING: "torch, model, data, first step", Phase.ENDING: ENDING}.get(seen.phase, "")


def plain_line(progress: Progress, unit: str = "GPU") -> str:
    """One snapshot as one line of plain text."""
    nodes, logged = len(progress.records), sum(1 for count in progress.records.values() if count)
    tps = f"tps {progress.tps:,.0f}"
    if nodes > 1:
        of = "nodes" if logged == nodes else f"{logged} of {nodes} nodes"
        tps += f" ({of} {progress.tps_min:,.0f}..{progress.tps_max:,.0f}, slowest {plain(progress.slowest_node)})"
    left = [] if progress.seconds_left is None else [f"left {duration(progress.seconds_left)}"]
    step = [f"step {progress.step}/{progress.steps_total}", f"loss {progress.loss:.2f}", tps]
    return "  ".join([*step, *_machine(progress, unit), *left])


def _machine(progress: Progress, unit: str) -> list[str]:
    """TFLOP/s and MFU, of which CPUs have no peak; memory."""
    memory = f"memory {progress.memory_gib:.2f}GiB ({progress.memory_pct:.2f}%)"
    if unit != "GPU":
        return ["MFU n/a", memory]
    tflops = [] if progress.tflops is None else [f"tflops {progress.tflops:,.2f}"]
    return [*tflops, f"MFU {mfu_text(progress.mfu_pct, progress.peak_tflops, unit='')}", memory]


# --- on a terminal ------------------------------------------------------------------------------------------


@contextmanager
def _screen(stream: TextIO) -> Iterator[Live]:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, force_terminal=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        yield live


def _group(parts: Iterable[tuple[str, str] | RenderableType]) -> RenderableType:
    """(text, style), which does not wrap: as Text, not markup, as a node's name is not ours to trust."""
    from rich.console import Group
    from rich.text import Text

    def line(text: str, style: str) -> Text:
        return Text(plain(text), style=style, no_wrap=True, overflow="ellipsis")

    return Group(*(line(*part) if isinstance(part, tuple) else part for part in parts))


def _panel(seen: Standing, about: About, why: Sequence[str]) -> RenderableType:
    """Lines that fit 80 columns."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    *before, current = [f"  {name:<14} {took:>7}  {detail}".rstrip() for name, took, detail in phase_rows(seen)]
    parts: list[tuple[str, str] | RenderableType] = [(f"{about.name}  {about.what}", "bold")]
    parts += [(f"  {started_again(seen)}", "yellow")] if seen.before else []
    parts += [*((line, "dim") for line in before), (current, "")]
    if progress := seen.progress:
        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            bar.add_column(no_wrap=True, ratio=ratio)
        left = "" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"
        done = ProgressBar(total=max(1, progress.steps_total), completed=progress.step)
        bar.add_row(f"step {progress.step}/{progress.steps_total}", done, left)
        parts += [bar, *((line, "") for line in figures(progress, about))]
    parts += [(f"  hang: {seen.hang}", "red")] if seen.hang else []
    return _group([*parts, *((f"  {line}", "") for line in why if seen.phase is Phase.QUEUED)])


def phase_rows(seen: Standing) -> list[tuple[str, str, str]]:
    """(phase, elapsed, detail) of every phase so far."""
    order = list(Phase)
    phases = [phase for phase in order[: order.index(seen.phase) + 1] if phase in seen.began]
    starts = [seen.began[phase] for phase in phases]
    rows = zip(phases, starts, [*starts[1:], seen.at], strict=True)
    return [
        (_CALLED.get(phase, str(phase)), elapsed(end - start), _detail(seen) if phase is seen.phase else "")
        for phase, start, end in rows
    ]


def figures(progress: Progress, about: About) -> list[str]:
    """What stands below the bar."""
    tps = f"{progress.tps:,.0f} tokens/s per {about.unit}"
    if about.target:
        tps += f", {100 * progress.tps / about.target:.1f}% of the {about.target_is} {about.target:,.0f}"
    lines = [f"loss {progress.loss:.4f}  {tps}", "  ".join(_machine(progress, about.unit))]
    if len(progress.records) > 1:
        behind = 100 * (1 - progress.tps_min / progress.tps) if progress.tps else 0.0
        slowest = f"slowest {progress.slowest_node}: {progress.tps_min:,.0f} tokens/s, {behind:.1f}% below the median"
        lines.append(f"{slowest}; fastest {progress.tps_max:,.0f}")
    return lines


def elapsed(seconds: float) -> str:
    """As a clock shows it: `0:07`, `12:03`, `1:02:03`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- all runs -----------------------------------------------------------------------------------------------


_HEAD = ("run", "phase", "since", "step", "tokens/s", "left")


def watch_all(runs_dir: Path, as_json: bool) -> None:
    """One line for each run until none goes on: a live table on a terminal, elsewhere a line for each news."""
    watchers: dict[Path, Watcher] = {}
    rows: dict[str, tuple[str, ...]] = {}
    with nullcontext() if as_json or not is_terminal(sys.stdout) else _screen(sys.stdout) as live:
        going = True
        while going:
            found = runs.all_runs(runs_dir)
            states = control.states(found)
            silent = {name for name in rows if name in states and not (states[name].known or states[name].gone)}
            going = bool(silent) or any(state.active for state in states.values())
            for run in (run for run in found if states[run.name].active or run.name in rows):
                with suppress(LauncherError):  # its logs cannot be read: `launcher watch RUN` says why
                    seen = watchers.setdefault(run.path, Watcher(run)).look(states[run.name])[-1]
                    row, before = _row(run.name, seen), rows.get(run.name, _HEAD)
                    rows[run.name] = row
                    if not live and (row[1], row[3]) != (before[1], before[3]):
                        _say(row, seen, as_json)
            if live:
                table = columns([_HEAD, *rows.values()], 2, live.console.width)
                live.update(_group((line, "") for line in table), refresh=True)
            if going:
                time.sleep(attach.ASK_EVERY_S)
    if not rows:
        echo(f"no active runs in {runs_dir}", err=True)


def _row(name: str, seen: Standing) -> tuple[str, ...]:
    """The phase of a run that goes on, else how it ended."""
    progress, active = seen.progress, seen.state is None or seen.state.active
    left = progress.seconds_left if progress and active else None
    return (
        name,
        _called(seen) if active or not seen.state else seen.state.name,
        elapsed(seen.at - seen.began.get(seen.phase, seen.at)) if active else "",
        f"{progress.step}/{progress.steps_total}" if progress else "",
        f"{progress.tps:,.0f}" if progress else "",
        "" if left is None else duration(left),
    )


def _say(row: Sequence[str], seen: Standing, as_json: bool) -> None:
    if as_json:
        progress = attach.as_dict(seen.progress) if seen.progress else None
        said = {"run": row[0], "phase": str(seen.phase), "state": row[1], "progress": progress}
        print_json(said | {"attempt": seen.attempt}, indent=None)
    else:
        cells = [f"  {name} {cell}" for name, cell in zip(_HEAD[2:], row[2:], strict=True) if cell]
        echo(f"{row[0]}: {row[1]}{''.join(cells)}")
