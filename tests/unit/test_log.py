"""The parser of torchtitan's logs: formats of each release, broken logs, growing files."""

from __future__ import annotations

import inspect
import math
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.logs import steps as log
from launcher.logs.first_error import find_errors
from launcher.logs.steps import LogReader, StepRecord, parse_line, plain_text

PLAIN = (
    b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - step: 100  loss:  6.4277  grad_norm:  2.9062  "
    b"memory: 158.61GiB(86.20%)  tps: 17,581  tflops: 1,018.20  mfu: 45.25%"
)
COLOURED = (
    b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - \x1b[31mstep: 100  \x1b[32mloss:  6.4277  "
    b"\x1b[38;2;180;60;0mgrad_norm:  2.9062  \x1b[38;2;54;234;195mmemory: 158.61GiB(86.20%)  "
    b"\x1b[34mtps: 17,581  \x1b[36mtflops: 1,018.20  \x1b[35mmfu: 45.25%\x1b[39m"
)
TIME = 1795331431.413  # 2026-11-22 07:10:31,413 read as UTC
EXPECTED = StepRecord(100, 6.4277, 2.9062, 158.61, 86.2, 17581.0, 1018.2, 45.25, TIME, 0)


def read_in_parts(path: Path, *parts: bytes) -> list[StepRecord]:
    """What a reader finds that looks at a growing file each time that a part has been written."""
    path.unlink(missing_ok=True)
    reader = LogReader(path)
    found: list[StepRecord] = []
    for part in parts:
        with path.open("ab") as handle:
            handle.write(part)
        found += reader.read()
    return found


def render(record: StepRecord, colour: bool = False, loss_digits: int = 5) -> bytes:
    """A record as torchtitan 0.2.2 (5 digits), 0.2.1 (4 digits) and 0.3.0 (mfu: N/A) print it."""
    codes = ("31", "32", "38;2;180;60;0", "38;2;54;234;195", "34", "36", "35", "39")
    c = [f"\x1b[{code}m" if colour else "" for code in codes]
    mfu = "N/A" if record.mfu_pct is None else f"{record.mfu_pct:.2f}%"
    return (
        f"[rank{record.rank}]:[titan] 2026-11-22 07:10:31,413 - root - INFO - "
        f"{c[0]}step: {record.step:2}  {c[1]}loss: {record.loss:8.{loss_digits}f}  "
        f"{c[2]}grad_norm: {record.grad_norm:7.4f}  "
        f"{c[3]}memory: {record.memory_gib:5.2f}GiB({record.memory_pct:.2f}%)  "
        f"{c[4]}tps: {round(record.tps):,}  {c[5]}tflops: {record.tflops:,.2f}  {c[6]}mfu: {mfu}{c[7]}"
    ).encode()


@pytest.mark.parametrize("line", [PLAIN, COLOURED, PLAIN + b"\n", COLOURED + b"\r\n"])
def test_a_step_line(line: bytes) -> None:
    assert parse_line(line) == EXPECTED


@pytest.mark.parametrize(
    ("prefix", "rank", "time"),
    [
        (b"", None, None),
        (b"[titan] 2026-11-22 07:10:31,413 - root - INFO - ", None, TIME),
        (b"0: [rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - ", 0, TIME),
        (b"17: [rank3]:[titan] 2026-11-22 07:10:31,413 - root - INFO - ", 3, TIME),
        (b"[default0]:[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - ", 0, TIME),
        (b"\r 50%|#####     | 5/10[rank1]:[titan] 2026-11-22 07:10:31,413 - root - INFO - ", 1, TIME),
        (b"\xff\xfe\x00[rank2]: [titan] 2026-11-22 07:10:31 - ", 2, 1795331431.0),
        (b"[rank2]:[titan] 2026-13-45 07:10:31,413 - root - INFO - ", 2, None),
        (b"[rank5]: 2026-11-22 06:00:00,000 saving\r[rank0]: ", 0, None),
    ],
)
def test_what_stands_before_the_step(prefix: bytes, rank: int | None, time: float | None) -> None:
    record = parse_line(prefix + PLAIN[PLAIN.index(b"step:") :])
    assert record is not None and (record.step, record.rank, record.time) == (100, rank, time)


def test_earlier_releases_and_quantised_runs() -> None:
    old = b"step: 10  loss:  7.9794  memory: 33.40GiB(35.15%)  wps: 5,762  mfu: 33.57%"
    assert parse_line(old) == StepRecord(10, 7.9794, None, 33.40, 35.15, 5762.0, None, 33.57, None, None)
    quantised = parse_line(PLAIN.replace(b"45.25%", b"N/A"))
    assert quantised is not None and quantised.mfu_pct is None and quantised.tflops == 1018.2


@pytest.mark.parametrize("text", [b"nan", b"NaN", b"inf", b"-inf"])
def test_losses_that_are_no_numbers(text: bytes) -> None:
    record = parse_line(PLAIN.replace(b" 6.4277", text.rjust(7)).replace(b" 2.9062", b"    nan"))
    assert record is not None and record.grad_norm is not None
    assert not math.isfinite(record.loss) and math.isnan(record.grad_norm)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"step: 5",
        PLAIN.replace(b"step:", b"validate step:"),
        COLOURED.replace(b"step:", b"validate step:"),
        b"[titan] validate step:  1  loss:  7.9794  memory:  0.67GiB(2.84%)  tps: 528",
        PLAIN.replace(b"6.4277", b"6.42.77"),
        PLAIN.replace(b"  grad_norm:", b"  surprise  grad_norm:"),
        b"Training starts at step: 1",
    ],
)
def test_lines_that_report_no_training_step(line: bytes) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize("line", [PLAIN, COLOURED.removesuffix(b"\x1b[39m"), PLAIN.replace(b"45.25%", b"N/A")])
def test_a_line_cut_short_is_no_record(line: bytes) -> None:
    assert [end for end in range(len(line)) if parse_line(line[:end])] == []


def test_a_fork_that_prints_no_mfu_has_records_and_a_line_cut_before_it_has_none() -> None:
    line = b"[rank0]:[titan] 2026-11-22 07:10:31,413 - root - INFO - step: 10  loss:  7.9  memory: 33.40GiB(35.15%)  "
    whole = parse_line(line + b"tps: 5,762  tflops: 1.20\n")
    assert whole is not None and (whole.mfu_pct, whole.tflops, whole.tps) == (None, 1.2, 5762)
    assert parse_line(line + b"tps: 5,762\n") is not None
    assert parse_line(line + b"tps: 5,762  tflops: 1.20") is None  # what follows may be more of the number
    assert parse_line(line + b"tps: 5,762  mf\n") is None


def test_a_cut_line_glued_to_the_next_gives_only_the_whole_one(tmp_path: Path) -> None:
    later = PLAIN.replace(b"step: 100", b"step: 110")
    for end in range(len(PLAIN)):
        assert [record.step for record in read_in_parts(tmp_path / "log", PLAIN[:end] + later + b"\n")] == [110]


def test_very_long_lines() -> None:
    noise = b"x" * 100_000
    assert parse_line(noise) is None
    assert parse_line(noise + PLAIN) == EXPECTED
    assert parse_line(b"step:" * 20_000) is None


def test_the_longest_match_fits_what_is_read_again() -> None:
    parser = inspect.getattr_static(re, "_parser")
    assert parser.parse(log._STEP.pattern).getwidth()[1] < log.RECORD_BYTES


records = st.builds(
    StepRecord,
    step=st.integers(1, 10**9),
    loss=st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf]),
    grad_norm=st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf]),
    memory_gib=st.floats(0, 999),
    memory_pct=st.floats(0, 100),
    tps=st.floats(0, 1e7),
    tflops=st.floats(0, 1e5),
    mfu_pct=st.none() | st.floats(0, 100),
    time=st.just(TIME),
    rank=st.integers(0, 7),
)
# Bytes that a log may hold between records, biased towards what could confuse the parser.
pieces = [b"\n", b"\r", b"step:", b"validate ", PLAIN[:80], COLOURED[:150], PLAIN, b"x" * 3000]
noise = st.lists(st.binary(max_size=40) | st.sampled_from(pieces), max_size=4).map(b"".join)


@given(record=records, colour=st.booleans(), digits=st.sampled_from([4, 5]))
def test_what_torchtitan_prints_is_read_back(record: StepRecord, colour: bool, digits: int) -> None:
    found = parse_line(render(record, colour, digits))
    assert found is not None and record.grad_norm is not None and record.tflops is not None
    assert (found.step, found.rank, found.time) == (record.step, record.rank, TIME)
    assert f"{found.loss:.{digits}f}" == f"{record.loss:.{digits}f}"
    assert f"{found.grad_norm:.4f}" == f"{record.grad_norm:.4f}"
    assert found.memory_gib == float(f"{record.memory_gib:.2f}")
    assert found.memory_pct == float(f"{record.memory_pct:.2f}")
    assert (found.tps, found.tflops) == (round(record.tps), float(f"{record.tflops:.2f}"))
    assert found.mfu_pct == (None if record.mfu_pct is None else float(f"{record.mfu_pct:.2f}"))


@given(st.binary(max_size=400) | noise)
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    parse_line(data)
    plain_text(data)


@given(
    parts=st.lists(st.tuples(noise, records.map(render), st.sampled_from([b"\n", b"\r\n", b""])), max_size=4),
    cuts=st.lists(st.integers(0, 20_000), max_size=12),
    every=st.sampled_from([None, 40, 300]),
    block=st.sampled_from([1, 5000, log.BLOCK_BYTES]),
)
def test_when_a_log_is_read_changes_nothing(
    parts: list[tuple[bytes, bytes, bytes]],
    cuts: list[int],
    every: int | None,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = b"".join(b"".join(part) for part in parts)
    edges = range(0, len(data), every) if every else sorted({cut for cut in cuts if cut < len(data)})
    path = tmp_path_factory.getbasetemp() / "cut.log"
    whole = read_in_parts(path, data)
    with pytest.MonkeyPatch.context() as patch:  # lines that are longer than a piece, too
        patch.setattr(log, "BLOCK_BYTES", block)
        patch.setattr(log, "LINE_BYTES", 4096)
        seen = read_in_parts(path, *(data[start:end] for start, end in pairwise([0, *edges, len(data)])))
    assert repr(seen) == repr(whole)  # repr: NaN differs from itself


@pytest.mark.parametrize("line", [COLOURED, COLOURED.replace(b"step:", b"validate step:")], ids=["step", "validation"])
def test_a_record_keeps_its_time_and_rank_wherever_the_file_ended(line: bytes, tmp_path: Path) -> None:
    data = b"x" * 3000 + b"\n" + line + b"\n" + b"y" * 3000
    expected = [] if b"validate" in line else [EXPECTED]
    for cut in range(2900, len(data) - 2900):
        assert read_in_parts(tmp_path / "log", data[:cut], data[cut:]) == expected, cut


def test_a_record_within_a_line_that_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of progress ends no line."""
    monkeypatch.setattr(log, "BLOCK_BYTES", 1)
    for before in range(log.LINE_BYTES - 400, log.LINE_BYTES + 100):
        assert read_in_parts(tmp_path / "log", b"x" * before + b"\r" + COLOURED + b"y" * 3000) == [EXPECTED], before


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "0000-gpu001.log"
    reader = LogReader(path)
    assert list(reader.read()) == []
    path.write_bytes(b"starting\n" + PLAIN[:100])
    assert list(reader.read()) == []
    with path.open("ab") as handle:
        handle.write(PLAIN[100:])  # no end of line yet, but the record is whole
    assert list(reader.read()) == [EXPECTED]
    assert list(reader.read()) == []
    with path.open("ab") as handle:
        handle.write(b"\n" + COLOURED + b"\n")
    assert list(reader.read()) == [EXPECTED]
    assert reader.offset == path.stat().st_size


def test_a_truncated_or_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "0000-gpu001.log"
    path.write_bytes(PLAIN + b"\n" + PLAIN[:60])
    reader = LogReader(path)
    assert len(list(reader.read())) == 1
    path.write_bytes(PLAIN + b"\n")
    assert len(list(reader.read())) == 1
    other = tmp_path / "other"
    other.write_bytes(PLAIN + b"\n" + PLAIN + b"\n")
    other.rename(path)
    assert len(list(reader.read())) == 2
    path.unlink()
    assert list(reader.read()) == []


def test_memory_is_bounded_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "0000-gpu001.log"
    path.write_bytes(b"x" * (24 << 20))  # one line
    tracemalloc.start()
    try:
        assert list(LogReader(path).read()) == []
        assert find_errors([path]).path is None
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"\x1b[31mred\x1b[39m and \x1b[38;2;1;2;3mmore\n", "red and more"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]52;c;ZXZpbA==\x1b\\text", "text"),
        (b"\x1bc\x1b[2J\x1b[Hclear", "clear"),
        (b" 10%|#\r 20%|##\r 30%|###\n", " 30%|###"),
        (b"text\r\n", "text"),
        (b"a\tb\x00\x07\x08\x7f", "a\tb"),
        ("left\u202eright\u2066".encode(), "leftright"),
        (b"\xc2\x9b31mcsi", "csi"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("Größe 模型".encode(), "Größe 模型"),
    ],
)
def test_plain_text_cannot_drive_a_terminal(line: bytes, text: str) -> None:
    assert plain_text(line) == text


@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_plain_text_has_no_control_characters_left(line: bytes) -> None:
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e]", plain_text(line))
