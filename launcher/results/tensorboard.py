"""Scalars from TensorBoard's event files, without TensorBoard: the login node has neither it nor protobuf.

A file is a sequence of records: length (8 bytes, little-endian), its checksum (4), an `Event` message, its checksum
(4). Of a scalar, as torch's SummaryWriter.add_scalar writes it, the message begins with the wall time (9 bytes) and
the step (field 2, a varint, left out where it is 0) and ends with the tag (field 1, its length and its text) and the
value (field 2, a float). Other messages are passed over. Checksums are not looked at: a file that was cut or has holes
ends at the damage.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.logs.steps import open_log

_LONGEST = 1 << 20  # bytes of a record; a scalar's has some 60, and a longer one is an image, a graph or damage
MOST = 64 << 20  # bytes of a file that are read: a million scalars
MOST_FILES = 1000  # of a run
_HEADER = struct.Struct("<QI")
_VALUE = struct.Struct("<xf")  # behind the tag: what kind of field it is, and the float
_WALL_TIME = 9  # bytes


def scalars(folder: Path, tags: Sequence[str]) -> dict[str, dict[int, float]]:
    """By tag and step the value that was written last, from all event files below `folder`; {} where there are none.

    A tag has at most 127 bytes. Memory does not grow with the files.
    """
    found: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    endings = {bytes([0x0A, len(tag.encode())]) + tag.encode() + b"\x15": found[tag] for tag in tags}
    for path in sorted(_event_files(folder), key=lambda path: path.name)[:MOST_FILES]:  # the name begins with the time
        try:
            for event in _events(path):
                values = next(
                    (endings[ending] for ending in endings if event[: 1 - _VALUE.size].endswith(ending)), None
                )
                if values is not None and (step := _step(event)) is not None:
                    (values[step],) = _VALUE.unpack(event[-_VALUE.size :])
        except OSError:
            continue  # another user's: one figure is missing, not the result
    return found


def _event_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if ".tfevents." in name)


def _events(path: Path) -> Iterator[bytes]:
    """The messages of a file up to its end or its first damage. Raises OSError where it cannot be read."""
    if (handle := open_log(path)) is None:
        return
    with handle:
        while handle.tell() < MOST and len(header := handle.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            if not 0 < length <= _LONGEST or len(record := handle.read(length + 4)) < length + 4:
                return
            yield record[:length]


def _step(event: bytes) -> int | None:
    """None for a number that does not end."""
    step = 0
    if event[_WALL_TIME : _WALL_TIME + 1] != b"\x10":
        return step
    for place, byte in enumerate(event[_WALL_TIME + 1 : _WALL_TIME + 11]):
        step |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return step
    return None
