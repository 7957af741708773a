"""What a person sees while a run goes on: plain lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.watching import ENDING, About, elapsed, figures, phase_rows, plain_line, show
from launcher.logs.follow import Progress
from launcher.logs.steps import plain_text
from launcher.runs.phases import Phase, Standing
from launcher.scheduler.state import JobState

SEEN = Progress(
    step=20,
    steps_total=100,
    loss=6.4277,
    tps=17581.0,
    tps_min=17402.0,
    tps_max=17690.0,
    slowest_node="gpu-007",
    tflops=1018.2,
    mfu_pct=45.25,
    peak_tflops=2250.0,
    memory_gib=158.61,
    memory_pct=86.2,
    seconds_left=180.0,
    records={"gpu-001": 3, "gpu-007": 3},
)
LINE = (
    "step 20/100  loss 6.43  tps 17,581 (nodes 17,402..17,690, slowest gpu-007)  tflops 1,018.20  "
    "MFU 45.25% of 2250  memory 158.61GiB (86.20%)  left 3 min 00 s"
)


def test_the_plain_line() -> None:
    assert plain_line(SEEN) == LINE
    assert plain_line(replace(SEEN, records={"gpu-007": 3}, seconds_left=None)) == (
        "step 20/100  loss 6.43  tps 17,581  tflops 1,018.20  MFU 45.25% of 2250  memory 158.61GiB (86.20%)"
    )
    assert "tps 17,581 (1 of 2 nodes 17,402..17,690" in plain_line(replace(SEEN, records={"a": 1, "b": 0}))
    odd = plain_line(replace(SEEN, loss=float("nan"), tflops=None, mfu_pct=None, peak_tflops=None))
    assert "loss nan" in odd and "tflops" not in odd and "MFU n/a" in odd


ABOUT = About("my-run", "llama3-8b on 9 nodes x 4 GB200, job 7", "GPU", 17975.0, "published")
BEGAN = dict(zip(Phase, (1000.0, 1192.0, 1233.0, 1291.0, 1326.0, 2050.0), strict=True))
RUNNING = JobState("RUNNING", "squeue")


def standing(progress: Progress | None = SEEN, phase: Phase = Phase.TRAINING, **more: Any) -> Standing:
    return Standing(phase, BEGAN, more.pop("state", RUNNING), 2049.0, more.pop("nodes", 9), progress=progress, **more)


def watch(progress: Iterable[Progress], stream: io.StringIO, is_terminal: bool) -> None:
    ends = (Phase.TRAINING, Phase.ENDING)
    show((standing(one, ends[one.step >= one.steps_total]) for one in progress), ABOUT, stream, is_terminal)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0:00"), (7.9, "0:07"), (723, "12:03"), (3723, "1:02:03"), (90000, "25:00:00")],
)
def test_elapsed(seconds: float, text: str) -> None:
    assert elapsed(seconds) == text


def test_phases_with_what_they_took() -> None:
    checking = standing(None, Phase.CHECKING, fit=3, doing={"speed": 5, "the nodes together": 1})
    assert phase_rows(checking) == [
        ("queued", "3:12", ""),
        ("starting", "0:41", ""),
        ("checking nodes", "13:36", "3 of 9 nodes done; speed on 5, the nodes together on 1"),
    ]
    assert phase_rows(standing())[2:] == [
        ("checking nodes", "0:58", ""),
        ("loading", "0:35", ""),
        ("training", "12:03", ""),
    ]
    waiting = standing(None, Phase.QUEUED, state=JobState("PENDING", "squeue", "Resources"))
    assert phase_rows(waiting) == [("queued", "17:29", "PENDING Resources")]
    assert phase_rows(standing(None, Phase.STARTING, started=2))[-1][2] == "2 of 9 nodes"


def test_figures_against_the_published_one_and_of_cpu_ranks() -> None:
    assert figures(SEEN, ABOUT) == [
        "loss 6.4277  17,581 tokens/s per GPU, 97.8% of the published 17,975",
        "tflops 1,018.20  MFU 45.25% of 2250  memory 158.61GiB (86.20%)",
        "slowest gpu-007: 17,402 tokens/s, 1.0% below the median; fastest 17,690",
    ]
    on_cpu = figures(replace(SEEN, records={"a": 1}), About("r", "debug", "rank"))
    assert on_cpu == ["loss 6.4277  17,581 tokens/s per rank", "MFU n/a  memory 158.61GiB (86.20%)"]


def test_a_pipe_tells_each_phase_once_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    pending = standing(None, Phase.QUEUED, state=JobState("PENDING", "squeue", "Priority"))
    silent = replace(pending, state=None)
    starting = [standing(None, Phase.STARTING, started=1), standing(None, Phase.STARTING)]
    seen = [pending, pending, silent, *starting, standing()]
    show(seen, ABOUT, stream := io.StringIO(), False, lambda state: ["because"] if state else [])
    assert capsys.readouterr().err.splitlines() == [
        "my-run: PENDING Priority",
        "  because",
        "my-run: Slurm does not answer; trying again",
        "my-run: starting (1 of 9 nodes), 3 min 12 s after it was submitted",
        "my-run: training, 5 min 26 s after it was submitted",
    ]
    assert stream.getvalue() == LINE + "\n"


def test_a_pipe_gets_one_line_per_step() -> None:
    stream = io.StringIO()
    snapshots = [replace(SEEN, step=step) for step in (10, 20, 20, 20, 10, 20)]  # late nodes, then a restart
    watch(iter(snapshots), stream, is_terminal=False)
    steps = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["step 10", "step 20", "step 10", "step 20"]
    assert stream.getvalue().isascii() and "\x1b" not in stream.getvalue()


def test_after_the_last_step_it_is_said_what_takes_time(
    terminal: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    end = [replace(SEEN, step=90), replace(SEEN, step=100), replace(SEEN, step=100)]
    watch(iter(end), io.StringIO(), is_terminal=False)
    assert capsys.readouterr().err.count(ENDING) == 1
    watch(iter(end), terminal, is_terminal=True)
    assert ENDING[:40] in terminal.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return io.StringIO()


def shown(stream: io.StringIO) -> list[str]:
    return [plain_text(line.encode()) for line in stream.getvalue().split("\n")]


def test_a_terminal_gets_a_bar_that_fits_80_columns(terminal: io.StringIO) -> None:
    watch(iter([SEEN]), terminal, is_terminal=True)
    lines = shown(terminal)
    text = "\n".join(lines)
    head = (f"my-run  {ABOUT.what}", "training         12:03", "step 20/100", "3 min 00 s left")
    assert all(part in text for part in (*head, *figures(SEEN, ABOUT))), text
    assert max(map(len, lines)) <= 80
    assert "\x1b[" in terminal.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    watch(iter([replace(SEEN, slowest_node="a-very-long-partition-compute-node-name-007")]), terminal, True)
    assert max(map(len, shown(terminal))) <= columns


def test_no_color_is_honoured(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def colours(text: str) -> bool:
        return "\x1b[38" in text or "\x1b[3" in text.replace("\x1b[3m", "") or "\x1b[9" in text

    watch(iter([SEEN]), terminal, is_terminal=True)
    assert colours(terminal.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    without = io.StringIO()
    watch(iter([SEEN]), without, is_terminal=True)
    assert not colours(without.getvalue())


def test_a_node_name_is_not_markup(terminal: io.StringIO) -> None:
    watch(iter([replace(SEEN, slowest_node="[red]x[/red]")]), terminal, is_terminal=True)
    assert "slowest [red]x[/red]:" in "\n".join(shown(terminal))


def test_the_cursor_comes_back_after_an_interrupt(terminal: io.StringIO) -> None:
    def interrupted() -> Iterator[Progress]:
        yield SEEN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(interrupted(), terminal, is_terminal=True)
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_a_pipe_never_loads_rich() -> None:
    code = (
        "import io, sys; from launcher.commands.watching import About, show; "
        "show((), About('r', '', 'GPU'), io.StringIO(), False); "
        "sys.exit('rich' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
