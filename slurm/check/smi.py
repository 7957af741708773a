"""nvidia-smi: what is asked, within a time, and what its answers say. Parsers are pure; health.py judges."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import bounded

SMI_LIMIT_S = 20  # without persistence mode the driver wakes every GPU first
LINE_CHARS = 200  # of what is quoted

REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


class Query(NamedTuple):
    """Fields that are asked for together, and the keys of their values here."""

    fields: Mapping[str, str]
    kind: str = "gpu"  # of nvidia-smi's --query-KIND

    @property
    def command(self) -> list[str]:
        """Each line of its answer is led by the GPU's UUID, which joins them."""
        uuid = "uuid" if self.kind == "gpu" else "gpu_uuid"
        return ["nvidia-smi", f"--query-{self.kind}={uuid},{','.join(self.fields)}", "--format=csv,noheader,nounits"]


# Asked separately, because nvidia-smi answers nothing at all where it does not know one of the fields.
QUERIES = {
    "general": Query(
        {
            "index": "index",
            "name": "name",
            "driver_version": "driver",
            "memory.used": "memory_used_mib",
            "memory.total": "memory_total_mib",
            "temperature.gpu": "temperature_c",
        }
    ),
    "ecc": Query({"ecc.errors.uncorrected.volatile.total": "ecc_uncorrected"}),
    "recovery": Query({"gpu_recovery_action": "recovery_action"}),
    "mig": Query({"mig.mode.current": "mig_mode"}),
    "rows": Query(
        {"remapped_rows.pending": "row_remap_pending", "remapped_rows.failure": "row_remap_failure"}, "remapped-rows"
    ),
    "clocks": Query({f"clocks_event_reasons.{reason}": reason for reason in REASONS}),
    "fabric": Query({"fabric.state": "fabric_state", "fabric.status": "fabric_status"}),
    "clique": Query({"fabric.clusterUuid": "fabric_cluster", "fabric.cliqueId": "fabric_clique"}),
    "processes": Query({"pid": "used_by_pid"}, "compute-apps"),
    "identity": Query({"serial": "serial", "pci.bus_id": "bus_id"}),
}
_NUMBERS = {"index", "memory_used_mib", "memory_total_mib", "temperature_c", "ecc_uncorrected"}
_FLAGS = {"row_remap_pending", "row_remap_failure", *REASONS}
_NO_VALUE = re.compile(r"\[?\s*(n/?a|not supported|unknown error|requested functionality.*)?\s*\]?", re.I)
# A GPU that is broken, in the place of a value or of a whole answer.
ALARM = re.compile(r"requires? (?:a )?reset|is lost|fallen off the bus", re.I)


def parse_smi(text: str, fields: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """UUID -> facts, from one command's output. Lines of another form (cut off, a message) are passed over.

    A value that is not there ([N/A], [Not Supported]) or that cannot be read is None, never zero; what stands in the
    place of a broken GPU's values ([GPU requires reset]) is its "alarm".
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(csv.Error):
        for row in csv.reader(text.splitlines(), skipinitialspace=True):
            if len(row) == len(fields) + 1 and (row[0].startswith(("GPU-", "MIG-")) or ALARM.search(row[0])):
                values = {key: _value(key, text.strip()) for key, text in zip(fields.values(), row[1:], strict=True)}
                alarms = [value.strip(" []") for value in row if ALARM.search(value)]
                found[row[0].strip()] = values | ({"alarm": alarms[0]} if alarms else {})
    return found


def _value(key: str, text: str) -> Any:
    if _NO_VALUE.fullmatch(text) or ALARM.search(text):
        return None
    if key in _NUMBERS:
        return int(float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else None
    if key in _FLAGS:
        words = {"active": True, "yes": True, "1": True, "not active": False, "no": False, "0": False}
        return words.get(text.lower())
    return text


def join(answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """One dict a GPU, in nvidia-smi's order, from the output for each group of fields."""
    gpus: dict[str, dict[str, Any]] = {}
    for group, text in answers.items():
        for uuid, facts in parse_smi(text, QUERIES[group].fields).items():
            gpus.setdefault(uuid, {"uuid": uuid}).update(facts)
    return list(gpus.values())


def used(gpus: list[dict[str, Any]], visible: str | None) -> list[dict[str, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: another's GPU on a shared machine is none of this job's business."""
    names = tuple(name.strip() for name in (visible or "").split(",") if name.strip())
    uuids = tuple(name for name in names if name.startswith("GPU-"))
    return [gpu for gpu in gpus if str(gpu.get("index")) in names or (uuids and gpu["uuid"].startswith(uuids))] or gpus


def run_bounded(commands: Sequence[Sequence[str]], limit_s: float) -> list[tuple[str | None, str]]:
    """(standard output, "") of each command that ends well in time, all at once; (None, why) for the others.

    What hangs is killed and not waited for: a process that waits for a dead GPU cannot be killed either.
    """
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    env = {**os.environ, "LC_ALL": "C"}
    started = [
        subprocess.Popen(command, **pipes, text=True, errors="replace", env=env, start_new_session=True)
        for command in commands
    ]
    answers = bounded(limit_s, [process.communicate for process in started])
    return [_answer(process, answer, limit_s) for process, answer in zip(started, answers, strict=True)]


def _answer(process: subprocess.Popen[str], answer: Any, limit_s: float) -> tuple[str | None, str]:
    if answer is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, f"did not answer within {limit_s:.0f} s"
    said, _ = answer.result()
    if process.returncode == 0:
        return said, ""
    printable = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in said)
    last = printable.strip().rpartition("\n")[2].strip()[:LINE_CHARS]
    return None, f"ended with {process.returncode}" + (f": {last}" if last else "")


def ask_smi() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What nvidia-smi says of each GPU, and of which groups of fields it says nothing: group -> why."""
    answers: dict[str, str] = {}
    silent: dict[str, str] = {}
    said = run_bounded([query.command for query in QUERIES.values()], SMI_LIMIT_S)
    for group, (text, why) in zip(QUERIES, said, strict=True):
        if text is None:
            silent[group] = why
        elif group != "processes" and not parse_smi(text, QUERIES[group].fields):  # of processes there may be none
            silent[group] = "no GPU is in its answer"
        else:
            answers[group] = text
    return join(answers), silent
