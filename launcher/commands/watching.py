"""What a person sees while a run goes on: its phases, a bar and figures on a terminal, plain lines in a pipe.

rich is imported only for a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.base.errors import LauncherError
from launcher.base.files import read_json
from launcher.base.output import counted, duration, echo, is_terminal, plain, print_json, size
from launcher.config.mfu import mfu_text
from launcher.logs.follow import Progress
from launcher.preflight.waiting import why_waiting
from launcher.runs import attach, control
from launcher.runs import directory as runs
from launcher.runs.directory import Run
from launcher.runs.phases import Phase, Standing, Watcher

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

ENDING = "all steps are done; removing containers takes minutes"


@dataclass(frozen=True)
class About:
    """What is said of a run besides how it stands."""

    name: str
    what: str  # recipe, size and job
    unit: str  # what tokens/s are per: "GPU", or "rank" on CPUs
    target: float | None = None  # tokens/s
    target_is: str = ""  # "published" or "planned"


def about(run: Run) -> About:
    asked, plan = run.asked, read_json(run.path / "plan.json") or {}
    job, profile = asked["job"], asked["profile"]
    on_cpu = profile.get("device") == "cpu"
    where = size(job.get("nodes", 0), profile.get("gpus_per_node", 0), str(profile.get("gpu", "?")), on_cpu)
    number = (run.job or {}).get("job_id", "")
    job_text = f", {'process' if run.is_local else 'job'} {number}" if number else ""
    tps = plan.get("tps")
    return About(
        run.name,
        f"{job.get('recipe', '?')} on {where}{job_text}",
        "rank" if on_cpu else "GPU",
        float(tps) if isinstance(tps, (int, float)) and tps > 0 else None,
        "planned" if plan.get("differs") else "published",
    )


def watch(run: Run, stream: TextIO) -> None:
    """Shows how the run stands until it has ended: steps on `stream`, what comes before them in a pipe on stderr."""
    show(attach.standings(run), about(run), stream, stream.isatty(), lambda seen: _why_waiting(run, seen))


def _why_waiting(run: Run, seen: Standing) -> list[str]:
    return why_waiting(run, seen.state) if seen.state and not run.is_local and seen.state.name != "SUBMITTING" else []


def show(
    standings: Iterable[Standing],
    about: About,
    stream: TextIO,
    on_terminal: bool,
    why: Callable[[Standing], Sequence[str]] = lambda _: (),
) -> None:
    """`why`: lines that tell why the run waits, asked for each new reason of Slurm's."""
    said: object = ()
    lines: Sequence[str] = ()
    with _screen(stream) if on_terminal else _no_screen() as live:
        last: Standing | None = None
        for seen in standings:
            if seen.phase is Phase.QUEUED and (reason := seen.state and (seen.state.name, seen.state.reason)) != said:
                said, lines = reason, why(seen)
                if not live:
                    echo(f"{about.name}: {_waiting(seen)}", *(f"  {line}" for line in lines), err=True)
            if live:
                live.update(_panel(seen, about, lines), refresh=True)
            else:
                _plain(seen, last, about, stream)
            last = seen


def _plain(seen: Standing, last: Standing | None, about: About, stream: TextIO) -> None:
    if seen.phase not in (Phase.QUEUED, last and last.phase) and seen.phase is not Phase.ENDING:
        echo(f"{about.name}: {_phase_line(seen)}", err=True)
    before = last.progress.step if last and last.progress else None
    # The same step comes again when another node's log shows it; a smaller one after a restart is news.
    if seen.progress and seen.progress.step != before:
        echo(plain_line(seen.progress, about.unit), file=stream)
    if seen.phase is Phase.ENDING and not (last and last.phase is Phase.ENDING):
        echo(f"{about.name}: ending: {ENDING}", err=True)


def _phase_line(seen: Standing) -> str:
    detail = _detail(seen, seen.phase)
    queued = seen.began.get(Phase.QUEUED)
    since = f", {duration(max(0.0, seen.at - queued))} after it was submitted" if queued else ""
    return f"{_called(seen.phase)}{f' ({detail})' if detail else ''}{since}"


def _waiting(seen: Standing) -> str:
    return f"{seen.state.name} {seen.state.reason}".strip() if seen.state else "Slurm does not answer; trying again"


def _called(phase: Phase) -> str:
    return "checking nodes" if phase is Phase.CHECKING else str(phase)


def _detail(seen: Standing, phase: Phase) -> str:
    """Of the phase that the run is in, what is to be said of it."""
    if phase is Phase.QUEUED:
        return _waiting(seen)
    if phase is Phase.STARTING:
        return f"{seen.started} of {counted(seen.nodes, 'node')}"
    if phase is Phase.CHECKING:
        doing = ", ".join(
            f"{what} on {count}" if seen.nodes > 1 else what for what, count in (seen.doing or {}).items()
        )
        return f"{seen.fit} of {counted(seen.nodes, 'node')} done{f'; {doing}' if doing else ''}"
    if phase is Phase.LOADING:
        return "torch, model, data, first step"
    return ENDING if phase is Phase.ENDING else ""


def plain_line(progress: Progress, unit: str = "GPU") -> str:
    """One snapshot as one line of plain text."""
    parts = [
        f"step {progress.step}/{progress.steps_total}",
        f"loss {progress.loss:.2f}",
        f"tps {progress.tps:,.0f}{_spread(progress)}",
    ]
    if progress.tflops is not None and unit == "GPU":
        parts.append(f"tflops {progress.tflops:,.2f}")
    parts.append(_mfu(progress, unit))
    parts.append(_memory(progress))
    if progress.seconds_left is not None:
        parts.append(f"left {duration(progress.seconds_left)}")
    return "  ".join(parts)


def _spread(progress: Progress) -> str:
    if len(progress.records) < 2:
        return ""
    logged = sum(1 for count in progress.records.values() if count)
    nodes = "nodes" if logged == len(progress.records) else f"{logged} of {len(progress.records)} nodes"
    return f" ({nodes} {progress.tps_min:,.0f}..{progress.tps_max:,.0f}, slowest {plain(progress.slowest_node)})"


def _mfu(progress: Progress, unit: str) -> str:
    if unit != "GPU":
        return "mfu n/a"
    return f"mfu {mfu_text(progress.mfu_pct, progress.peak_tflops, unit='')}"


def _memory(progress: Progress) -> str:
    return f"memory {progress.memory_gib:.2f}GiB ({progress.memory_pct:.2f}%)"


# --- on a terminal ------------------------------------------------------------------------------------------


@contextmanager
def _screen(stream: TextIO) -> Iterator[Live]:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, force_terminal=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        yield live


@contextmanager
def _no_screen() -> Iterator[None]:
    yield None


def _panel(seen: Standing, about: About, why: Sequence[str]) -> RenderableType:
    """Lines that fit 80 columns, and none that wraps on less. Text, not markup: a node's name is not ours to trust."""
    from rich.console import Group
    from rich.text import Text

    def text(line: str, style: str = "") -> Text:
        return Text(plain(line), style=style, no_wrap=True, overflow="ellipsis")

    *before, current = [f"  {name:<14} {took:>7}  {detail}".rstrip() for name, took, detail in phase_rows(seen)]
    parts: list[RenderableType] = [text(about.name, "bold").append(f"  {plain(about.what)}", "not bold")]
    parts += [*(text(line, "dim") for line in before), text(current)]
    if seen.progress:
        parts += [_bar(seen.progress), *map(text, figures(seen.progress, about))]
    return Group(*parts, *(text(f"  {line}") for line in why if seen.phase is Phase.QUEUED))


def phase_rows(seen: Standing) -> list[tuple[str, str, str]]:
    """(phase, elapsed, detail) of every phase so far."""
    order = list(Phase)
    phases = [phase for phase in order[: order.index(seen.phase) + 1] if phase in seen.began]
    starts = [seen.began[phase] for phase in phases]
    ends = [*starts[1:], seen.at]
    return [
        (_called(phase), elapsed(end - start), _detail(seen, phase) if phase is seen.phase else "")
        for phase, start, end in zip(phases, starts, ends, strict=True)
    ]


def _bar(progress: Progress) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = "" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    done = ProgressBar(total=max(1, progress.steps_total), completed=progress.step)
    bar.add_row(Text(f"step {progress.step}/{progress.steps_total}", style="bold"), done, Text(left))
    return bar


def figures(progress: Progress, about: About) -> list[str]:
    """What stands below the bar."""
    tps = f"{progress.tps:,.0f} tokens/s per {about.unit}"
    if about.target:
        tps += f", {100 * progress.tps / about.target:.1f}% of the {about.target_is} {about.target:,.0f}"
    lines = [f"loss {progress.loss:.4f}  {tps}", f"{_mfu(progress, about.unit)}  {_memory(progress)}"]
    if progress.tflops is not None and about.unit == "GPU":
        lines[1] = f"{progress.tflops:,.2f} TFLOP/s  {lines[1]}"
    if len(progress.records) > 1:
        behind = 100 * (1 - progress.tps_min / progress.tps) if progress.tps else 0.0
        slowest = f"slowest {progress.slowest_node}: {progress.tps_min:,.0f} tokens/s, {behind:.1f}% below the median"
        lines.append(slowest + ("" if progress.tps_max <= progress.tps else f"; fastest {progress.tps_max:,.0f}"))
    return lines


def elapsed(seconds: float) -> str:
    """As a clock shows it: `0:07`, `12:03`, `1:02:03`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- all runs -----------------------------------------------------------------------------------------------


def watch_all(runs_dir: Path, as_json: bool) -> None:
    """One line for each run until none goes on: a live table on a terminal, elsewhere a line for each news."""
    watchers: dict[Path, Watcher] = {}
    seen: dict[Path, Standing] = {}
    ask = attach.patient(lambda: _states(runs_dir))
    on_screen = not as_json and is_terminal(sys.stdout)
    with _screen(sys.stdout) if on_screen else _no_screen() as live:
        while True:
            found = ask() or []
            going = [(run, state) for run, state in found if state.active or run.path in seen]
            for run, state in going:
                before = seen.get(run.path)
                try:
                    now = watchers.setdefault(run.path, Watcher(run)).look(state)[-1]
                except LauncherError:  # its logs cannot be read: `launcher watch RUN` says why
                    continue
                seen[run.path] = now
                if not live and _news(now) != (before and _news(before)):
                    _say_news(run, now, as_json)
            if live:
                live.update(_all_table([(run, seen[run.path]) for run, _ in going if run.path in seen]), refresh=True)
            if not any(state.active for _, state in found):
                return
            time.sleep(attach.ASK_EVERY_S)


def _states(runs_dir: Path) -> list[tuple[Run, Any]]:
    found = runs.all_runs(runs_dir)
    states = control.states(found)
    return [(run, states[run.name]) for run in found]


def _word(seen: Standing) -> str:
    """The phase of a run that goes on, else how it ended."""
    return _called(seen.phase) if seen.state is None or seen.state.active else seen.state.name


def _news(seen: Standing) -> tuple[str, int | None]:
    return _word(seen), seen.progress.step if seen.progress else None


def _say_news(run: Run, seen: Standing, as_json: bool) -> None:
    if as_json:
        progress = attach.as_dict(seen.progress) if seen.progress else None
        print_json({"run": run.name, "phase": str(seen.phase), "state": _word(seen), "progress": progress}, indent=None)
    else:
        unit = about(run).unit
        echo(f"{run.name}: {_word(seen)}" + (f"  {plain_line(seen.progress, unit)}" if seen.progress else ""))


def _all_table(rows: Sequence[tuple[Run, Standing]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), expand=False)
    for title in ("run", "phase", "since", "step", "tokens/s", "left"):
        is_name = title in ("run", "phase")
        table.add_column(title, no_wrap=True, overflow="ellipsis", justify="left" if is_name else "right")
    if not rows:
        return Text("no run goes on")
    for run, seen in rows:
        progress, since = seen.progress, seen.began.get(seen.phase)
        left = progress.seconds_left if progress and seen.state and seen.state.active else None
        table.add_row(
            Text(plain(run.name)),
            _word(seen),
            "" if since is None or not (seen.state and seen.state.active) else elapsed(seen.at - since),
            f"{progress.step}/{progress.steps_total}" if progress else "",
            f"{progress.tps:,.0f}" if progress else "",
            "" if left is None else duration(left),
        )
    return table
