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

from . import Findings
from .smi import ALARM, REASONS, ask_smi, used

GIB = 1 << 30
DRIVERS = {"11": 450, "12": 525, "13": 580}  # first driver branch that runs a CUDA of that major version
FREE_MIN_GIB, FREE_LOW_GIB = 1, 10
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
UPTIME = Path("/proc/uptime")
OTHERS_MAX_MIB = 2048  # a daemon that watches or shares the GPUs holds a quarter to a half of that
# A GPU that the job before has just left: its memory is being freed, its clocks recover. What stays is a fault.
LOOKS, BETWEEN_S = 3, 5
PASSING = ("memory", "throttle")
EXCLUDE = "leave the node out, --exclude {host}, and tell its operator"


def judge_gpus(gpus: Sequence[Mapping[str, Any]], host: str, *, alone: bool, arch: str) -> Findings:
    """What is wrong with them. `alone`: one GPU in all, which needs no NVLink."""
    found = Findings()
    for number, gpu in enumerate(gpus):
        _judge(gpu, number if gpu.get("index") is None else gpu["index"], host, found, alone=alone, arch=arch)
    return found


def _judge(gpu: Mapping[str, Any], number: int, host: str, found: Findings, *, alone: bool, arch: str) -> None:
    name = f"GPU {number}"

    def unfit(code: str, what: str, fix: str) -> None:
        found.problem(code, what, f"{fix}; {EXCLUDE.format(host=host)}")

    action = gpu.get("recovery_action") or ""
    if gpu.get("alarm"):
        what = f"{name} has a fault, nvidia-smi says in the place of its values: {gpu['alarm']}"
        unfit("recovery", what, f"nvidia-smi -q and dmesg on {host}")
    elif re.search("reset|reboot|drain", action, re.IGNORECASE):
        what = f"{name} has a fault, for which the driver asks for: {action}"
        unfit("recovery", what, f"nvidia-smi -q on {host}")
    if gpu.get("mig_mode") == "Enabled":
        fix = f"as root on {host}: nvidia-smi -i {gpu.get('uuid', number)} -mig 0"
        unfit("mig", f"MIG is enabled on {name}: training needs whole GPUs", fix)
    if gpu.get("ecc_uncorrected"):
        what = f"{name}: {gpu['ecc_uncorrected']} uncorrected memory errors since the driver was loaded"
        if action == "None":  # contained: NVIDIA's guide says that the GPU may be used again at once
            found.warning("ecc", what)
        else:
            unfit("ecc", what, "nvidia-smi -q -d ECC")
    if gpu.get("row_remap_failure"):
        unfit("row-remap", f"{name}: the remapping of a bad memory row has failed", "nvidia-smi -q -d ROW_REMAPPER")
    elif gpu.get("row_remap_pending"):  # new work may start with it: NVIDIA's guide to memory errors
        found.warning("row-remap", f"{name}: the remapping of a bad memory row waits for a reset")
    if slow := [reason for reason in REASONS[:3] if gpu.get(reason)]:
        at = f" at {gpu['temperature_c']} C" if gpu.get("temperature_c") is not None else ""
        what = f"{name} is slowed down by its hardware{at}: {', '.join(slow)}"
        unfit("throttle", what, "nvidia-smi -q -d PERFORMANCE")
    elif gpu.get("sw_thermal_slowdown"):
        found.warning("throttle", f"{name} is slowed down by the driver to keep it cool")
    busy_mib, total_mib = gpu.get("memory_used_mib") or 0, gpu.get("memory_total_mib") or 0
    # Grace's kernel may keep its page cache in the GPU's memory, however much: only a process is another program.
    pid, is_grace = gpu.get("used_by_pid"), arch == "aarch64"
    if busy_mib > max(OTHERS_MAX_MIB, total_mib // 20 if is_grace else 0):
        what = f"{name}: {busy_mib / 1024:.1f} GiB of its memory are in use"
        if is_grace and not pid:
            found.warning("memory", f"{what}, by no process that is seen: files that Grace's kernel keeps?")
        else:
            who = f" (process {pid})" if pid else ""
            unfit("memory", f"{what} by somebody else{who}", f"nvidia-smi on {host} shows the processes; end them")
    state, status = gpu.get("fabric_state") or "", gpu.get("fabric_status") or ""
    broken = state in ("Not Started", "In Progress") or (state == "Completed" and status not in ("", "Success"))
    if broken and not alone:
        what = f"{name} has not joined the NVLink fabric: state {state}, status {status or 'unknown'}"
        unfit("fabric", what, "systemctl status nvidia-fabricmanager (or nvidia-imex)")


def judge_silence(silent: Mapping[str, str], host: str) -> Findings:
    """What nvidia-smi did not say. `silent`: group of fields -> why, in its own words."""
    found = Findings()
    if lost := next((why for why in silent.values() if ALARM.search(why)), ""):
        fix = f"nvidia-smi and dmesg on {host}; {EXCLUDE.format(host=host)}"
        found.problem("recovery", f"a GPU does not answer any more: nvidia-smi {lost}", fix)
    elif silent:
        reasons = {why: ", ".join(group for group in silent if silent[group] == why) for why in silent.values()}
        text = "; ".join(f"{groups} ({why})" for why, groups in reasons.items())
        found.warning("nvidia-smi", f"nvidia-smi does not say: {text}")
    return found


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


def _settled(
    only: Sequence[str], passing: Sequence[str], host: str, env: Mapping[str, str], alone: bool
) -> tuple[list[dict[str, Any]], dict[str, str], Findings, list[dict[str, str]]]:
    """GPUs, what of them is not said, what is wrong with them, and what was wrong with them at an earlier look.

    Looks again while there is a problem whose name is in `passing`.
    """
    before: list[dict[str, str]] = []
    for left in reversed(range(LOOKS)):
        gpus, silent = ask_smi(only)
        gpus = used(gpus, env.get("CUDA_VISIBLE_DEVICES"))
        found = judge_gpus(gpus, host, alone=alone, arch=platform.machine())
        seen = [one for one in found.problems if one["name"] in passing]
        if not seen or not left:
            break
        before = before or seen
        time.sleep(BETWEEN_S)
    return gpus, silent, found, before


def look_after_load(host: str, env: Mapping[str, str]) -> Findings:
    """What slows the GPUs down right after the products: of idle ones it is not seen."""
    _, _, found, before = _settled(("general", "clocks"), ("throttle",), host, env, alone=True)
    slow = Findings([one for one in found.problems if one["name"] == "throttle"])
    for one in before if not slow.problems else ():
        slow.warning("throttle", f"{one['what']}, for a moment after the products")
    return slow


def look(
    node: Mapping[str, Any], host: str, env: Mapping[str, str], folders: Mapping[str, Path]
) -> tuple[dict[str, Any], Findings]:
    """Facts of this node, and what is wrong with it. `folders`: "scratch" and "run", whose free space counts."""
    facts: dict[str, Any] = {"free_gib": {}, "gpu_health": []}
    found = Findings()
    for name, folder in folders.items():
        space = os.statvfs(folder)
        if space.f_blocks == 0:  # a file system that does not count
            continue
        free_gib = space.f_bavail * space.f_frsize / GIB
        facts["free_gib"][name] = round(free_gib, 1)
        what = f"{free_gib:.1f} GiB are free in {folder}"
        if free_gib < FREE_MIN_GIB:
            fault = "node" if name == "scratch" else "run"
            found.problem("space", what, f"df -h {folder}; make room, or another directory", fault)
        elif free_gib < FREE_LOW_GIB:
            found.warning("space", what)
    if node["profile"]["device"] == "cpu":
        return facts, found
    if shutil.which("nvidia-smi") is None:
        found.warning("nvidia-smi", "nvidia-smi is not in the image: the GPUs' health is not known")
    else:
        alone = node["job"]["nodes"] * node["profile"]["gpus_per_node"] == 1
        gpus, silent, of_gpus, _ = _settled((), PASSING, host, env, alone)
        facts["gpu_health"] = gpus
        found.add(of_gpus)
        found.add(judge_silence(silent, host))
        if gpus and gpus[0].get("driver"):
            facts["driver"] = gpus[0]["driver"]
    _look_at_network(node, host, env, found)
    with contextlib.suppress(OSError, ValueError, IndexError):
        facts["uptime_days"] = round(float(UPTIME.read_text().split()[0]) / 86400, 1)
    most = node.get("hardware", {}).get("max_uptime_days", 0)
    if most and (days := facts.get("uptime_days", 0)) > most:
        found.warning("uptime", f"up for {days:.0f} days, more than {most}: reboot it before its NVLink firmware fails")
    return facts, found


def _look_at_network(node: Mapping[str, Any], host: str, env: Mapping[str, str], found: Findings) -> None:
    exclude = EXCLUDE.format(host=host)
    several = node["job"]["nodes"] > 1
    named = "" if env.get("NCCL_IB_DISABLE") == "1" else env.get("NCCL_IB_HCA", "")
    if wrong := infiniband(named, infiniband_states()):
        what = f"InfiniBand: {'; '.join(wrong)}"
        if several:
            found.problem("infiniband", what, f"ibstat on {host}, NCCL_IB_HCA of the profile; {exclude}", "run")
        else:  # one node has no use for it
            found.warning("infiniband", what)
    # One channel for all is called channel0; Slurm's switch/nvidia_imex gives each job one with a number of its own.
    if several and env.get("NCCL_MNNVL_ENABLE") == "1" and not any(IMEX_CHANNELS.glob("channel[0-9]*")):
        what = f"no channel in {IMEX_CHANNELS}: NVLink cannot cross nodes"
        found.problem("imex", what, f"systemctl status nvidia-imex on {host}; {exclude}", "run")
