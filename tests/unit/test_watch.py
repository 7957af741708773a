"""What a person sees while a run goes on: plain lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.logs.follow import Progress
from launcher.logs.steps import plain_text
from launcher.logs.watch import DONE, duration, plain_line, watch

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
    "mfu 45.25% of 2250  memory 158.61GiB (86.20%)  left 3 min"
)


def test_the_plain_line() -> None:
    assert plain_line(SEEN) == LINE
    assert plain_line(replace(SEEN, records={"gpu-007": 3}, seconds_left=None)) == (
        "step 20/100  loss 6.43  tps 17,581  tflops 1,018.20  mfu 45.25% of 2250  memory 158.61GiB (86.20%)"
    )
    assert "tps 17,581 (1 of 2 nodes 17,402..17,690" in plain_line(replace(SEEN, records={"a": 1, "b": 0}))
    odd = plain_line(replace(SEEN, loss=float("nan"), tflops=None, mfu_pct=None, peak_tflops=None))
    assert "loss nan" in odd and "tflops" not in odd and "mfu N/A" in odd


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (180, "3 min"), (5000, "83 min"), (7500, "2 h 05 min"), (90000, "25 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_pipe_gets_one_line_per_step() -> None:
    stream = io.StringIO()
    snapshots = [replace(SEEN, step=step) for step in (10, 20, 20, 20, 10, 20)]  # late nodes, then a restart
    assert watch(iter(snapshots), stream, is_terminal=False) == snapshots[-1]
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == [
        "step 10",
        "step 20",
        "step 10",
        "step 20",
    ]
    assert stream.getvalue().isascii() and "\x1b" not in stream.getvalue()
    assert [watch(iter(()), io.StringIO(), is_terminal) for is_terminal in (False, True)] == [None, None]


def test_after_the_last_step_it_is_said_what_takes_time(terminal: io.StringIO) -> None:
    end = [replace(SEEN, step=90), replace(SEEN, step=100)]
    stream = io.StringIO()
    watch(iter(end), stream, is_terminal=False)
    assert stream.getvalue().splitlines()[2] == DONE and stream.getvalue().count(DONE) == 1
    watch(iter(end), terminal, is_terminal=True)
    assert DONE[:40] in terminal.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return io.StringIO()


def shown(stream: io.StringIO) -> list[str]:
    return [plain_text(line.encode()) for line in stream.getvalue().split("\n")]


def test_a_terminal_gets_a_bar_that_fits_80_columns(terminal: io.StringIO) -> None:
    assert watch(iter([SEEN]), terminal, is_terminal=True) == SEEN
    lines = shown(terminal)
    text = "\n".join(lines)
    for part in (
        "step 20/100",
        "3 min left",
        "loss 6.4277",
        "17,581 tokens/s per GPU",
        "1,018.20 TFLOP/s",
        "mfu 45.25% of 2250",
        "memory 158.61GiB (86.20%)",
        "(nodes 17,402..17,690, slowest gpu-007)",
    ):
        assert part in text, text
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
    assert "slowest [red]x[/red]" in "\n".join(shown(terminal))


def test_the_cursor_comes_back_after_an_interrupt(terminal: io.StringIO) -> None:
    def interrupted() -> object:
        yield SEEN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(interrupted(), terminal, is_terminal=True)  # type: ignore[arg-type]
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_a_pipe_never_loads_rich() -> None:
    code = (
        "import io, sys; from launcher.logs.watch import watch; watch(iter(()), io.StringIO(), False); "
        "sys.exit('rich' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
