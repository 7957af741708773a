"""Scalars from TensorBoard's event files, without TensorBoard: the login node has neither it nor protobuf.

A file is a sequence of records: length (8 bytes, little-endian), its checksum (4), an `Event` message, its checksum
(4). Of the messages only what a scalar needs is decoded: Event.step = 2 and .summary = 5, Summary.value = 1, in a
value .tag = 1 and .simple_value = 2, as torch's SummaryWriter.add_scalar writes them (tensorflow/core/util/event.proto
and framework/summary.proto). Checksums are not looked at: a file that was cut or has holes ends at the damage.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from launcher.logs.steps import open_log

_LONGEST = 1 << 20  # bytes of a record; a scalar's has some 60, and a longer one is an image, a graph or damage
MOST = 64 << 20  # bytes of a file that are read: a million scalars
MOST_FILES = 1000  # of a run
_HEADER = struct.Struct("<QI")


def scalars(folder: Path, tags: Collection[str]) -> dict[str, dict[int, float]]:
    """By tag and step the value that was written last, from all event files below `folder`; {} where there are none."""
    found: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    wanted = {tag.encode(): tag for tag in tags}
    for path in sorted(_event_files(folder), key=lambda path: path.name)[:MOST_FILES]:  # the name begins with the time
        try:
            for step, tag, value in read_scalars(path, tuple(wanted)):
                if tag in wanted:
                    found[wanted[tag]][step] = value
        except OSError:
            continue  # another user's: one figure is missing, not the result
    return found


def read_scalars(path: Path, tags: Collection[bytes] = (b"",)) -> Iterator[tuple[int, bytes, float]]:
    """(step, tag, value) of scalars in an event file, up to its end or its first damage. Memory doesn't grow.

    Only records that hold one of `tags` somewhere are decoded, which is most of the time. Raises OSError where the
    file cannot be read.
    """
    if (handle := open_log(path)) is None:
        return
    wanted = re.compile(b"|".join(map(re.escape, tags))).search
    with handle:
        while handle.tell() < MOST and len(header := handle.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            if not 0 < length <= _LONGEST:
                return
            record = handle.read(length + 4)
            if len(record) < length + 4:
                return
            if not wanted(record):
                continue
            try:
                yield from _scalars_in(record[:length])
            except (ValueError, IndexError, struct.error):
                return


def _event_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if ".tfevents." in name)


def _scalars_in(event: bytes) -> Iterator[tuple[int, bytes, float]]:
    step, summaries = 0, []
    for field, value in _fields(event):
        if field == 2 and isinstance(value, int):
            step = value
        elif field == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for field, entry in _fields(summary):
            if field != 1 or not isinstance(entry, bytes):
                continue
            parts = dict(_fields(entry))
            tag, number = parts.get(1), parts.get(2)
            if isinstance(tag, bytes) and isinstance(number, bytes) and len(number) == 4:
                yield step, tag, struct.unpack("<f", number)[0]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an integer for a varint, else its bytes. Raises ValueError for other than that."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number that never ends")
