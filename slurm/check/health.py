"""What a node says of itself: nvidia-smi, /sys and /proc. Parsers are pure; only `look` at the end asks anybody."""

from __future__ import annotations

import contextlib
import csv
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import problem, warning

GIB = 1 << 30
SMI_LIMIT_S = 20  # without persistence mode the driver wakes every GPU first
DRIVERS = {"11": 450, "12": 525, "13": 580}  # first driver branch that runs a CUDA of that major version
FREE_MIN, FREE_LOW = 1 * GIB, 10 * GIB
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
UPTIME_DAYS = 55  # B200's NVLink firmware has a known fault at 60
OTHERS_MAX = 2 * GIB  # a daemon that watches or shares the GPUs holds a quarter to a half of that
# A GPU that the job before has just left: its memory is being freed, its clocks recover. What stays is a fault.
LOOKS, BETWEEN_S = 3, 5
PASSING = ("memory", "throttle")
EXCLUDE = "leave the node out, --exclude {host}, and tell its operator"

# Asked separately, because nvidia-smi answers nothing at all where it does not know one of the fields. Where a group
# has two spellings, the first that is answered counts.
_REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
GROUPS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "general": (("gpu", ("index", "name", "driver_version", "memory.used", "memory.total", "temperature.gpu")),),
    "ecc": (("gpu", ("ecc.errors.uncorrected.volatile.total",)),),
    "recovery": (("gpu", ("gpu_recovery_action",)),),
    "rows": (("remapped-rows", ("remapped_rows.pending", "remapped_rows.failure")),),
    "clocks": tuple(
        ("gpu", tuple(f"{prefix}.{reason}" for reason in _REASONS))
        for prefix in ("clocks_event_reasons", "clocks_throttle_reasons")
    ),
    "fabric": (("gpu", ("fabric.state", "fabric.status")),),
    "clique": (("gpu", ("fabric.clusterUuid", "fabric.cliqueId")),),
    "processes": (("compute-apps", ("pid",)),),
}  # fmt: skip
KEYS = {
    "memory.used": "memory_used_mib",
    "memory.total": "memory_total_mib",
    "temperature.gpu": "temperature_c",
    "driver_version": "driver",
    "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected",
    "gpu_recovery_action": "recovery_action",
    "remapped_rows.pending": "row_remap_pending",
    "remapped_rows.failure": "row_remap_failure",
    "fabric.state": "fabric_state",
    "fabric.status": "fabric_status",
    "fabric.clusterUuid": "fabric_cluster",
    "fabric.cliqueId": "fabric_clique",
    "pid": "used_by_pid",
    **{f"{prefix}.{reason}": reason for prefix in ("clocks_event_reasons", "clocks_throttle_reasons") for reason in _REASONS},
}  # fmt: skip
_NUMBERS = {"index", "memory_used_mib", "memory_total_mib", "temperature_c", "ecc_uncorrected"}
_FLAGS = {"row_remap_pending", "row_remap_failure", *_REASONS}
_NO_VALUE = re.compile(
    r"\[?\s*(n/?a|not supported|unknown error|requested functionality.*|gpu requires reset)?\s*\]?", re.I
)


def smi_commands() -> list[tuple[str, tuple[str, ...], list[str]]]:
    """Group, its fields and the command that asks for them; each is led by the GPU's UUID, which joins them."""
    return [
        (group, fields, ["nvidia-smi", f"--query-{kind}={'gpu_uuid' if kind != 'gpu' else 'uuid'},{','.join(fields)}",
                         "--format=csv,noheader,nounits"])
        for group, spellings in GROUPS.items()
        for kind, fields in spellings
    ]  # fmt: skip


def parse_smi(text: str, fields: Sequence[str]) -> dict[str, dict[str, Any]]:
    """UUID -> facts, from one command's output. Lines of another form (cut off, a message) are passed over.

    A value that is not there ([N/A], [Not Supported]) or that cannot be read is None, never zero.
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(csv.Error):
        for row in csv.reader(text.splitlines(), skipinitialspace=True):
            if len(row) == len(fields) + 1 and row[0].startswith(("GPU-", "MIG-")):
                found[row[0].strip()] = {
                    KEYS.get(name, name): _value(KEYS.get(name, name), value.strip())
                    for name, value in zip(fields, row[1:], strict=True)
                }
    return found


def _value(key: str, text: str) -> Any:
    if _NO_VALUE.fullmatch(text):
        return None
    if key in _NUMBERS:
        return int(float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else None
    if key in _FLAGS:
        words = {"active": True, "yes": True, "1": True, "not active": False, "no": False, "0": False}
        return words.get(text.lower())
    return text


def join(answers: Sequence[tuple[Sequence[str], str | None]]) -> list[dict[str, Any]]:
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
    ]  # fmt: skip
    return chosen or gpus


def judge_gpus(
    gpus: Sequence[Mapping[str, Any]], host: str, *, alone: bool, arch: str
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems and warnings. `alone`: one GPU in all, which needs no NVLink."""
    problems, warnings = [], []
    exclude = EXCLUDE.format(host=host)
    for number, gpu in enumerate(gpus):
        name = f"GPU {gpu.get('index', number)}"
        action = gpu.get("recovery_action") or ""
        if re.search("reset|reboot|drain", action, re.IGNORECASE):
            what = f"{name} has a fault, for which the driver asks for: {action}"
            problems.append(problem("recovery", what, f"nvidia-smi -q on {host}; {exclude}"))
        if gpu.get("ecc_uncorrected"):
            what = f"{name}: {gpu['ecc_uncorrected']} uncorrected memory errors since the driver was loaded"
            if action == "None":  # contained: NVIDIA's guide says that the GPU may be used again at once
                warnings.append(warning("ecc", what))
            else:
                problems.append(problem("ecc", what, f"nvidia-smi -q -d ECC; {exclude}"))
        if gpu.get("row_remap_failure"):
            what = f"{name}: the remapping of a bad memory row has failed"
            problems.append(problem("row-remap", what, f"nvidia-smi -q -d ROW_REMAPPER; {exclude}"))
        elif gpu.get("row_remap_pending"):  # new work may start with it: NVIDIA's guide to memory errors
            warnings.append(
                warning("row-remap", f"{name}: the remapping of a bad memory row waits for a reset")
            )
        slow = [reason for reason in _REASONS[:3] if gpu.get(reason)]
        if slow:
            at = f" at {gpu['temperature_c']} C" if gpu.get("temperature_c") is not None else ""
            what = f"{name} is slowed down by its hardware{at}: {', '.join(slow)}"
            problems.append(problem("throttle", what, f"nvidia-smi -q -d PERFORMANCE; {exclude}"))
        elif gpu.get("sw_thermal_slowdown"):
            warnings.append(warning("throttle", f"{name} is slowed down by the driver to keep it cool"))
        busy, total = gpu.get("memory_used_mib"), gpu.get("memory_total_mib")
        # Grace's kernel may keep its page cache in the GPU's memory, however much: only a process is another program.
        pid = gpu.get("used_by_pid")
        limit = max(OTHERS_MAX, (total or 0) * (1 << 20) // 20) if arch == "aarch64" else OTHERS_MAX
        if busy is not None and busy * (1 << 20) > limit:
            what = f"{name}: {busy / 1024:.1f} GiB of its memory are in use"
            if arch == "aarch64" and not pid:
                warnings.append(
                    warning("memory", f"{what}, by no process that is seen: files that Grace's kernel keeps?")
                )
            else:
                who = f" (process {pid})" if pid else ""
                fix = f"nvidia-smi on {host} shows the processes; end them, or {exclude}"
                problems.append(problem("memory", f"{what} by somebody else{who}", fix))
        state, status = gpu.get("fabric_state") or "", gpu.get("fabric_status") or ""
        broken = state in ("Not Started", "In Progress") or (
            state == "Completed" and status not in ("", "Success")
        )
        if broken and not alone:
            what = f"{name} has not joined the NVLink fabric: state {state}, status {status or 'unknown'}"
            problems.append(
                problem("fabric", what, f"systemctl status nvidia-fabricmanager (or nvidia-imex); {exclude}")
            )
    return problems, warnings


def driver_needed(driver: str, cuda: str) -> int:
    """The driver branch that this CUDA asks for where `driver` is older; 0 where it is new enough or not known.

    An older one still works behind the image's forward-compatibility package (cuda-compat, data-centre GPUs only),
    so the caller says whether CUDA has started.
    """
    needed = DRIVERS.get(cuda.partition(".")[0], 0)
    have = re.match(r"\d+", driver)
    return needed if have and int(have[0]) < needed else 0


def hca_names(value: str) -> list[tuple[str, int]]:
    """Devices that NCCL_IB_HCA asks for, with the port (0: any). `^` excludes: then none is asked for.

    NCCL takes a list of NAME[:PORT]; without a leading `=` each is a prefix.
    """
    value = value.strip()
    if value.startswith("^") or value.startswith("=^"):
        return []
    found = []
    for item in value.removeprefix("=").split(","):
        name, _, port = item.strip().partition(":")
        if name:
            found.append((name, int(port) if port.isdecimal() else 0))
    return found


def infiniband(value: str, states: Mapping[str, Mapping[int, str]]) -> list[str]:
    """What is wrong with the devices that NCCL_IB_HCA names. `states`: device -> port -> sysfs's state line.

    A numbered name means that device, though NCCL would take mlx5_10 for mlx5_1 where that is missing.
    """
    wrong = []
    for name, port in hca_names(value):
        if name in states:
            matched = [name]
        else:
            numbered = re.search(r"_[a-z]*\d+$", name)
            matched = [] if numbered else [device for device in states if device.startswith(name)]
        if not matched:
            wrong.append(f"{name} is missing")
            continue
        ports = [(d, p, state) for d in matched for p, state in states[d].items() if port in (0, p)]
        if not any("ACTIVE" in state.split(": ")[-1].split() for _, _, state in ports):
            shown = ", ".join(sorted({state.strip() for _, _, state in ports})) or f"no port {port}"
            wrong.append(f"{name} is not active ({shown})")
    return wrong


def infiniband_states(root: Path = Path("/sys/class/infiniband")) -> dict[str, dict[int, str]]:
    states: dict[str, dict[int, str]] = {}
    for path in sorted(root.glob("*/ports/*/state")):
        with contextlib.suppress(OSError, ValueError):
            states.setdefault(path.parts[-4], {})[int(path.parts[-2])] = path.read_text().strip()
    return states


def run_bounded(commands: Sequence[Sequence[str]], limit_s: float) -> list[str | None]:
    """Standard output of each command that ends well in time, all at once; None for the others.

    What hangs is killed and not waited for: a process that waits for a dead GPU cannot be killed either.
    """
    started: list[subprocess.Popen[str] | None] = []
    for command in commands:
        with contextlib.suppress(OSError):
            started.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                    errors="replace", env={**os.environ, "LC_ALL": "C"}, start_new_session=True,
                )
            )  # fmt: skip
            continue
        started.append(None)
    deadline, found = time.monotonic() + limit_s, []
    for process in started:
        text = None
        if process is not None:
            try:
                text = process.communicate(timeout=max(0.0, deadline - time.monotonic()))[0]
                text = text if process.returncode == 0 else None
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        found.append(text)
    return found


def ask_smi() -> tuple[list[dict[str, Any]], list[str]]:
    """What nvidia-smi says of each GPU, and the groups of fields of which it says nothing."""
    commands = smi_commands()
    outputs = run_bounded([command for _, _, command in commands], SMI_LIMIT_S)
    answered = {group for (group, _, _), text in zip(commands, outputs, strict=True) if text is not None}
    gpus = join([(fields, text) for (_, fields, _), text in zip(commands, outputs, strict=True)])
    return gpus, [group for group in GROUPS if group not in answered]


def look(
    node: Mapping[str, Any], host: str, env: Mapping[str, str], folders: Mapping[str, Path]
) -> tuple[dict[str, Any], list[dict[str, str]], list[dict[str, str]]]:
    """Facts, problems and warnings of this node. `folders`: "scratch" and "run", whose free space counts."""
    facts: dict[str, Any] = {"free_gib": {}, "gpu_health": []}
    problems: list[dict[str, str]] = []
    warnings: list[dict[str, str]] = []
    for name, folder in folders.items():
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        if space.f_blocks == 0:  # a file system that does not count
            continue
        facts["free_gib"][name] = round(free / GIB, 1)
        what = f"{free / GIB:.1f} GiB are free in {folder}"
        if free < FREE_MIN:
            fault = "node" if name == "scratch" else "run"
            problems.append(problem("space", what, f"df -h {folder}; make room, or another directory", fault))
        elif free < FREE_LOW:
            warnings.append(warning("space", what))
    if node["device"] == "cpu":
        return facts, problems, warnings
    if shutil.which("nvidia-smi") is None:
        warnings.append(
            warning("nvidia-smi", "nvidia-smi is not in the image: the GPUs' health is not known")
        )
    else:
        several = node["nodes"] * node["gpus_per_node"] > 1
        for again in reversed(range(LOOKS)):
            gpus, silent = ask_smi()
            facts["gpu_health"] = gpus = used(gpus, env.get("CUDA_VISIBLE_DEVICES"))
            found = judge_gpus(gpus, host, alone=not several, arch=platform.machine())
            if not again or not any(one["name"] in PASSING for one in found[0]):
                break
            time.sleep(BETWEEN_S)
        problems += found[0]
        warnings += found[1]
        if silent:
            warnings.append(warning("nvidia-smi", f"nvidia-smi does not say: {', '.join(silent)}"))
        if gpus and gpus[0].get("driver"):
            facts["driver"] = gpus[0]["driver"]
    exclude = EXCLUDE.format(host=host)
    named = "" if env.get("NCCL_IB_DISABLE") == "1" else env.get("NCCL_IB_HCA", "")
    if wrong := infiniband(named, infiniband_states()):
        what = f"InfiniBand: {'; '.join(wrong)}"
        if node["nodes"] > 1:
            problems.append(
                problem("infiniband", what, f"ibstat on {host}, NCCL_IB_HCA of the profile; {exclude}", "run")
            )
        else:  # one node has no use for it
            warnings.append(warning("infiniband", what))
    # One channel for all is called channel0; Slurm's switch/nvidia_imex gives each job one with a number of its own.
    mnnvl = env.get("NCCL_MNNVL_ENABLE") == "1" and node["nodes"] > 1
    if mnnvl and not any(IMEX_CHANNELS.glob("channel[0-9]*")):
        problems.append(
            problem(
                "imex",
                f"no channel in {IMEX_CHANNELS}: NVLink cannot cross nodes",
                f"systemctl status nvidia-imex on {host}; {exclude}",
                "run",
            )
        )
    with contextlib.suppress(OSError, ValueError, IndexError):
        facts["uptime_days"] = round(float(Path("/proc/uptime").read_text().split()[0]) / 86400, 1)
    names = [str(gpu.get("name")) for gpu in facts["gpu_health"]]
    if facts.get("uptime_days", 0) > UPTIME_DAYS and any(re.search(r"\bB200\b", name) for name in names):
        warnings.append(
            warning(
                "uptime",
                f"up for {facts['uptime_days']:.0f} days: B200's NVLink firmware fails at 60; reboot",
            )
        )
    return facts, problems, warnings
