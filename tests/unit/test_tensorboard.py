"""Event files as TensorBoard's format has them, written here field by field; damaged ones; and the reader's limits.

tests/train/test_real_event_files.py reads what torch's own SummaryWriter wrote.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.results import tensorboard
from launcher.results.tensorboard import scalars

# The first two records of a file that torch 2.13's SummaryWriter wrote: the version, and a loss at step 1.
REAL = bytes.fromhex(
    "4800000000000000fe92489d09452554edd4c0da411a0d627261696e2e4576656e743a32522e0a2c74656e736f72626f6172642e73756d6d"
    "6172792e7772697465722e6576656e745f66696c655f7772697465721b402a3232000000000000002419"
    "56ec092759b6edd4c0da4110012a250a230a1c6c6f73735f6d6574726963732f676c6f62616c5f6176675f6c6f737315b4ee0041b322cdd5"
)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def part(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def record(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + b"\0\0\0\0" + data + b"\0\0\0\0"


def scalar(step: int, tag: str, value: float) -> bytes:
    entry = part(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
    return record(b"\x09" + struct.pack("<d", 1.79e9) + b"\x10" + varint(step) + part(5, part(1, entry)))


def steps(tmp_path: Path, data: bytes, tag: str = "loss") -> dict[int, float]:
    (tmp_path / "events.out.tfevents.1.vm").write_bytes(data)
    return scalars(tmp_path, [tag])[tag]


def test_a_real_file(tmp_path: Path) -> None:
    assert steps(tmp_path, REAL, "loss_metrics/global_avg_loss") == {1: pytest.approx(8.0583, abs=1e-4)}
    assert steps(tmp_path, REAL, "global_avg_loss") == {}, "another tag that ends so"


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.floats(width=32, allow_nan=False))), st.text(max_size=30))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[int, float]], other: str
) -> None:
    data = b"".join(scalar(step, "loss", value) + scalar(step, f"{other}/loss", 1.0) for step, value in values)
    assert steps(tmp_path_factory.mktemp("tb"), data) == dict(values)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_damage_ends_the_file_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int
) -> None:
    good = b"".join(scalar(step, "loss", step / 2) for step in range(5))
    whole = cut // len(scalar(0, "loss", 0.0)) if cut < len(good) else 5
    found = steps(tmp_path_factory.mktemp("tb"), good[:cut] + noise)
    assert found.items() >= {step: step / 2 for step in range(whole)}.items()


@pytest.mark.parametrize(
    "hole",
    [
        b"\0" * 4096,
        b"\xff" * 64,
        struct.pack("<Q", 1 << 60) + b"x" * 64,
        record(scalar(2, "loss", 2.0)[12:21] + b"\x10" + b"\x80" * 11 + b"\x01" + scalar(2, "loss", 2.0)[23:-4]),
    ],
)
def test_holes_and_a_number_that_never_ends(tmp_path: Path, hole: bytes) -> None:
    assert steps(tmp_path, scalar(1, "loss", 1.0) + hole) == {1: 1.0}


def test_several_files_are_one_run_and_the_later_counts(tmp_path: Path) -> None:
    for folder, number, values in (("a", 20, {10: 3.0, 20: 4.0}), ("b", 10, {1: 1.0, 10: 2.0})):
        (tmp_path / folder).mkdir()
        text = b"".join(scalar(step, "x", value) + scalar(step, "y", 0.0) for step, value in values.items())
        (tmp_path / folder / f"events.out.tfevents.{number}.vm.1.0").write_bytes(text)
    (tmp_path / "a" / "notes.txt").write_text("other")
    assert scalars(tmp_path, ["x", "z"]) == {"x": {1: 1.0, 10: 3.0, 20: 4.0}, "z": {}}
    assert scalars(tmp_path / "none", ["x"]) == {"x": {}}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    with path.open("wb") as handle:
        for step in range(20_000):
            handle.write(scalar(step, "something else", 0.5))
        handle.write(scalar(1, "x", 1.0))
    tracemalloc.start()
    try:
        assert scalars(tmp_path, ["x"]) == {"x": {1: 1.0}}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_without_end_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "MOST", 10_000)
    monkeypatch.setattr(tensorboard, "MOST_FILES", 3)
    for number in range(5):
        data = b"".join(scalar(step, f"tag{number}", 0.5) for step in range(1000))
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(data)
    found = scalars(tmp_path, ["tag0", "tag2", "tag3"])
    assert 100 < len(found["tag0"]) < 500 and found["tag2"] and not found["tag3"]
