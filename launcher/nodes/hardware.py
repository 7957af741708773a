"""Which hardware to send back after a run: what failed, which GPU that is, and what to do with it.

From the driver's lines that slurm/check/watch.py copies into a node's log, the node check, and the verdict on a hang.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.base.errors import quoted
from launcher.logs.steps import last_bytes
from launcher.nodes import unfit
from launcher.runs.directory import Run
from launcher.runs.judged import culprit_of, objects, writable

LOG_BYTES = 1 << 20
ERROR = re.compile(r"\b(S?)Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),\s*([^\n]{0,300})")


@dataclass(frozen=True)
class SendBack:
    """A node's fault. `gpu`: index, UUID and serial number, as far as they are known."""

    host: str
    cause: str
    action: str  # reset, reboot, isolate, watch
    source: str = ""  # of the action
    gpu: str = ""
    xid: int | None = None

    @property
    def drain(self) -> str:
        return quoted("scontrol", "update", f"NodeName={self.host}", "State=DRAIN", f"Reason={self.cause[:120]}")

    def lines(self) -> list[str]:
        source = f" ({self.source})" if self.source else ""
        where = f"{self.host}, {self.gpu}" if self.gpu else self.host
        return [f"{where}: {self.cause}; action: {self.action}{source}", f"  drain it: {self.drain}"]


def of_run(run: Run) -> list[SendBack]:
    """The faults of a run's nodes, each once, in the job's order."""
    found: list[SendBack] = []
    records = {str(record.get("host")): record for record in run.node_records}
    for path in sorted(run.logs.glob("[0-9]*-*.log")):
        host = path.stem.partition("-")[2]
        gpus = objects(records.get(host, {}).get("gpu_health"))
        text = last_bytes(path, LOG_BYTES).decode("utf-8", "replace")
        kernel = "\n".join(line for line in text.splitlines() if line.startswith("titan-kernel: "))
        found += [one for line in ERROR.finditer(kernel) if (one := driver_error(host, line, gpus))]
    found += [SendBack(node.host, node.why, "isolate") for node in unfit.of_run(run) if node.own]
    if culprit := culprit_of(run.path):
        host, local = culprit["host"], culprit.get("local_rank")
        gpus = objects(records.get(host, {}).get("gpu_health"))
        gpu = _named(gpus[local]) if isinstance(local, int) and 0 <= local < len(gpus) else ""
        found.append(SendBack(host, f"hang: {writable(str(run.hang.get('why')))}", "watch", gpu=gpu))
    return list(dict.fromkeys(found))


def driver_error(host: str, line: re.Match[str], gpus: Sequence[Mapping[str, Any]]) -> SendBack | None:
    """What a line of the driver's says, if it is about hardware."""
    switch, bus, code, text = line.groups()
    table = _table()
    if switch:
        action = "watch" if "Non-fatal" in text else "isolate"
        return SendBack(host, f"SXid {code}: NVSwitch, {text[:80]}", action, table["sxid_source"], xid=int(code))
    rows = [row for row in table["xid"] if int(code) in row["codes"] and row.get("says", "") in text]
    if not rows:
        return None
    at = [gpu for gpu in gpus if str(gpu.get("bus_id", "")).lower().removeprefix("0000").startswith(bus.lower())]
    gpu = _named(at[0]) if at else f"GPU at {bus}"
    return SendBack(host, f"Xid {code}: {rows[0]['meaning']}", rows[0]["action"], table["source"], gpu, int(code))


def _named(gpu: Mapping[str, Any]) -> str:
    serial = f"serial {gpu['serial']}" if gpu.get("serial") else ""
    return ", ".join(filter(None, (f"GPU {gpu.get('index', '?')}", str(gpu.get("uuid") or ""), serial)))


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("xid.toml").read_text(encoding="utf-8"))
