"""nvidia-smi: what is asked, within a time, and what its answers say. Parsers are pure; health.py judges."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SMI_LIMIT_S = 20  # without persistence mode the driver wakes every GPU first
LINE_CHARS = 200  # of what is quoted

REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


class Query(NamedTuple):
    """Fields that are asked for together, and the keys of their values here."""

    group: str
    fields: Mapping[str, str]
    kind: str = "gpu"  # of nvidia-smi's --query-KIND

    @property
    def command(self) -> list[str]:
        """Each line of its answer is led by the GPU's UUID, which joins them."""
        uuid = "uuid" if self.kind == "gpu" else "gpu_uuid"
        return ["nvidia-smi", f"--query-{self.kind}={uuid},{','.join(self.fields)}", "--format=csv,noheader,nounits"]


# Asked separately, because nvidia-smi answers nothing at all where it does not know one of the fields. Where a group
# has two spellings, the first that is answered counts.
QUERIES = (
    Query(
        "general",
        {
            "index": "index",
            "name": "name",
            "driver_version": "driver",
            "memory.used": "memory_used_mib",
            "memory.total": "memory_total_mib",
            "temperature.gpu": "temperature_c",
        },
    ),
    Query("ecc", {"ecc.errors.uncorrected.volatile.total": "ecc_uncorrected"}),
    Query("recovery", {"gpu_recovery_action": "recovery_action"}),
    Query("mig", {"mig.mode.current": "mig_mode"}),
    Query(
        "rows",
        {"remapped_rows.pending": "row_remap_pending", "remapped_rows.failure": "row_remap_failure"},
        "remapped-rows",
    ),
    Query("clocks", {f"clocks_event_reasons.{reason}": reason for reason in REASONS}),
    Query("clocks", {f"clocks_throttle_reasons.{reason}": reason for reason in REASONS}),
    Query("fabric", {"fabric.state": "fabric_state", "fabric.status": "fabric_status"}),
    Query("clique", {"fabric.clusterUuid": "fabric_cluster", "fabric.cliqueId": "fabric_clique"}),
    Query("processes", {"pid": "used_by_pid"}, "compute-apps"),
)
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


def join(answers: Sequence[tuple[Mapping[str, str], str | None]]) -> list[dict[str, Any]]:
    """One dict a GPU, in nvidia-smi's order, from (fields, output) of each command; None: no answer."""
    gpus: dict[str, dict[str, Any]] = {}
    for fields, text in answers:
        for uuid, facts in parse_smi(text or "", fields).items():
            gpu = gpus.setdefault(uuid, {"uuid": uuid})
            gpu.update({key: value for key, value in facts.items() if gpu.get(key) is None})
    return list(gpus.values())


def used(gpus: list[dict[str, Any]], visible: str | None) -> list[dict[str, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: another's GPU on a shared machine is none of this job's business."""
    if not visible:
        return gpus
    names = [name.strip() for name in visible.split(",")]
    chosen = [
        gpu
        for gpu in gpus
        if any(name == str(gpu.get("index")) or (name[:4] == "GPU-" and gpu["uuid"].startswith(name)) for name in names)
    ]
    return chosen or gpus


def run_bounded(commands: Sequence[Sequence[str]], limit_s: float) -> list[tuple[str | None, str]]:
    """(standard output, "") of each command that ends well in time, all at once; (None, why) for the others.

    What hangs is killed and not waited for: a process that waits for a dead GPU cannot be killed either.
    """
    started: list[subprocess.Popen[str] | str] = []
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "LC_ALL": "C"}
    for command in commands:
        try:
            started.append(
                subprocess.Popen(command, **pipes, text=True, errors="replace", env=env, start_new_session=True)
            )
        except OSError as error:
            started.append(error.strerror or str(error))
    deadline = time.monotonic() + limit_s
    return [_answer(one, deadline, limit_s) if not isinstance(one, str) else (None, one) for one in started]


def _answer(process: subprocess.Popen[str], deadline: float, limit_s: float) -> tuple[str | None, str]:
    try:
        # After one that hung, the others have had their time: what they have said is still read.
        out, err = process.communicate(timeout=max(0.2, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return None, f"did not answer within {limit_s:.0f} s"
    return (out, "") if process.returncode == 0 else (None, _last_line(f"{out}\n{err}", process.returncode))


def _last_line(text: str, code: int) -> str:
    """Why a command failed, in its own last words: nvidia-smi says it on its standard output."""
    printable = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    lines = [line.strip() for line in printable.split("\n") if line.strip()]
    return f"ended with {code}" + (f": {lines[-1][:LINE_CHARS]}" if lines else "")


def ask_smi(only: Sequence[str] = ()) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What nvidia-smi says of each GPU, and of which groups of fields it says nothing: group -> why."""
    queries = [query for query in QUERIES if not only or query.group in only]
    answers = run_bounded([query.command for query in queries], SMI_LIMIT_S)
    silent: dict[str, str] = {}  # group -> why, or "" where one of its spellings was answered
    for (group, fields, _), (text, why) in zip(queries, answers, strict=True):
        if text is not None and not parse_smi(text, fields) and group != "processes":
            why = "no GPU is in its answer"  # of processes there may be none
        if silent.get(group) != "":
            silent[group] = why
    gpus = join([(query.fields, text) for query, (text, _) in zip(queries, answers, strict=True)])
    return gpus, {group: why for group, why in silent.items() if why}
