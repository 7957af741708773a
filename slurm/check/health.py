"""What a node says of itself: nvidia-smi (smi.py), /sys and /proc. Pure, but for `look` at the end, which asks."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import problem, warning
from .smi import ALARM, REASONS, ask_smi, used

GIB = 1 << 30
DRIVERS = {"11": 450, "12": 525, "13": 580}  # first driver branch that runs a CUDA of that major version
FREE_MIN, FREE_LOW = 1 * GIB, 10 * GIB
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
UPTIME_DAYS = 55  # B200's NVLink firmware has a known fault at 60
OTHERS_MAX = 2 * GIB  # a daemon that watches or shares the GPUs holds a quarter to a half of that
# A GPU that the job before has just left: its memory is being freed, its clocks recover. What stays is a fault.
LOOKS, BETWEEN_S = 3, 5
PASSING = ("memory", "throttle")
EXCLUDE = "leave the node out, --exclude {host}, and tell its operator"


def judge_gpus(
    gpus: Sequence[Mapping[str, Any]], host: str, *, alone: bool, arch: str
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems and warnings. `alone`: one GPU in all, which needs no NVLink."""
    problems, warnings = [], []
    exclude = EXCLUDE.format(host=host)
    for number, gpu in enumerate(gpus):
        name = f"GPU {number if gpu.get('index') is None else gpu['index']}"
        action = gpu.get("recovery_action") or ""
        if gpu.get("alarm"):
            what = f"{name} has a fault, nvidia-smi says in the place of its values: {gpu['alarm']}"
            problems.append(problem("recovery", what, f"nvidia-smi -q and dmesg on {host}; {exclude}"))
        elif re.search("reset|reboot|drain", action, re.IGNORECASE):
            what = f"{name} has a fault, for which the driver asks for: {action}"
            problems.append(problem("recovery", what, f"nvidia-smi -q on {host}; {exclude}"))
        if gpu.get("mig_mode") == "Enabled":
            what = f"MIG is enabled on {name}: training needs whole GPUs"
            fix = f"as root on {host}: nvidia-smi -i {gpu.get('uuid', number)} -mig 0; {exclude}"
            problems.append(problem("mig", what, fix))
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
            warnings.append(warning("row-remap", f"{name}: the remapping of a bad memory row waits for a reset"))
        slow = [reason for reason in REASONS[:3] if gpu.get(reason)]
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
        broken = state in ("Not Started", "In Progress") or (state == "Completed" and status not in ("", "Success"))
        if broken and not alone:
            what = f"{name} has not joined the NVLink fabric: state {state}, status {status or 'unknown'}"
            problems.append(
                problem("fabric", what, f"systemctl status nvidia-fabricmanager (or nvidia-imex); {exclude}")
            )
    return problems, warnings


def judge_silence(silent: Mapping[str, str], host: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems and warnings from what nvidia-smi did not say. `silent`: group of fields -> why, in its own words."""
    lost = next((why for why in silent.values() if ALARM.search(why)), "")
    if lost:
        fix = f"nvidia-smi and dmesg on {host}; {EXCLUDE.format(host=host)}"
        return [problem("recovery", f"a GPU does not answer any more: nvidia-smi {lost}", fix)], []
    reasons = {why: ", ".join(group for group in silent if silent[group] == why) for why in silent.values()}
    text = "; ".join(f"{groups} ({why})" for why, groups in reasons.items())
    return [], [warning("nvidia-smi", f"nvidia-smi does not say: {text}")] if silent else []


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


def look_after_load(host: str, env: Mapping[str, str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Problems and warnings from what slows the GPUs down right after the products: of idle ones it is not seen."""
    seen: list[dict[str, str]] = []
    for again in reversed(range(LOOKS)):
        gpus = used(ask_smi(("general", "clocks"))[0], env.get("CUDA_VISIBLE_DEVICES"))
        found, _ = judge_gpus(gpus, host, alone=True, arch=platform.machine())
        slow = [one for one in found if one["name"] == "throttle"]
        seen = seen or slow
        if not slow:
            return [], [warning("throttle", f"{one['what']}, for a moment after the products") for one in seen]
        if again:
            time.sleep(BETWEEN_S)
    return slow, []


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
    if node["profile"]["device"] == "cpu":
        return facts, problems, warnings
    if shutil.which("nvidia-smi") is None:
        warnings.append(warning("nvidia-smi", "nvidia-smi is not in the image: the GPUs' health is not known"))
    else:
        several = node["job"]["nodes"] * node["profile"]["gpus_per_node"] > 1
        for again in reversed(range(LOOKS)):
            gpus, silent = ask_smi()
            facts["gpu_health"] = gpus = used(gpus, env.get("CUDA_VISIBLE_DEVICES"))
            found = judge_gpus(gpus, host, alone=not several, arch=platform.machine())
            if not again or not any(one["name"] in PASSING for one in found[0]):
                break
            time.sleep(BETWEEN_S)
        unsaid = judge_silence(silent, host)
        problems += found[0] + unsaid[0]
        warnings += found[1] + unsaid[1]
        if gpus and gpus[0].get("driver"):
            facts["driver"] = gpus[0]["driver"]
    exclude = EXCLUDE.format(host=host)
    named = "" if env.get("NCCL_IB_DISABLE") == "1" else env.get("NCCL_IB_HCA", "")
    if wrong := infiniband(named, infiniband_states()):
        what = f"InfiniBand: {'; '.join(wrong)}"
        if node["job"]["nodes"] > 1:
            problems.append(
                problem("infiniband", what, f"ibstat on {host}, NCCL_IB_HCA of the profile; {exclude}", "run")
            )
        else:  # one node has no use for it
            warnings.append(warning("infiniband", what))
    # One channel for all is called channel0; Slurm's switch/nvidia_imex gives each job one with a number of its own.
    mnnvl = env.get("NCCL_MNNVL_ENABLE") == "1" and node["job"]["nodes"] > 1
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
