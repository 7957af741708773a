"""What a node says of itself: nvidia-smi (smi.py), /sys and /proc. Pure, but for `look` at the end, which asks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import Findings
from .smi import ALARM, REASONS, ask_smi, used

GIB = 1 << 30
DRIVERS = {"11": 450, "12": 525, "13": 580}  # first driver branch that runs a CUDA of that major version
FREE_MIN_GIB, FREE_LOW_GIB = 1, 10
IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
INFINIBAND = Path("/sys/class/infiniband")
OTHERS_MAX_MIB = 2048  # a daemon that watches or shares the GPUs holds a quarter to a half of that
# A GPU that the job before has just left: its memory is being freed, its clocks recover. What stays is a fault.
LOOKS, BETWEEN_S = 3, 5
PASSING = {"memory", "throttle"}
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
        what = f"{name} has a fault, nvidia-smi reports: {gpu['alarm']}"
        unfit("recovery", what, f"nvidia-smi -q and dmesg on {host}")
    elif re.search("reset|reboot|drain", action, re.IGNORECASE):
        what = f"{name} has a fault, the driver asks for: {action}"
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
            found.warning("memory", f"{what}, but by no process: probably files that Grace's kernel caches")
        else:
            who = f" (process {pid})" if pid else ""
            unfit("memory", f"{what} by somebody else{who}", f"nvidia-smi on {host} shows the processes; end them")
    state, status = gpu.get("fabric_state") or "", gpu.get("fabric_status") or ""
    broken = state in ("Not Started", "In Progress") or (state == "Completed" and status not in ("", "Success"))
    if broken and not alone:
        what = f"{name} has not joined the NVLink fabric: state {state}, status {status or 'unknown'}"
        unfit("fabric", what, "systemctl status nvidia-fabricmanager (or nvidia-imex)")


def judge_silence(silent: Mapping[str, str], host: str, found: Findings) -> None:
    """What nvidia-smi did not say. `silent`: group of fields -> why, in its own words."""
    if lost := next((why for why in silent.values() if ALARM.search(why)), ""):
        fix = f"nvidia-smi and dmesg on {host}; {EXCLUDE.format(host=host)}"
        found.problem("recovery", f"a GPU no longer answers: nvidia-smi {lost}", fix)
    elif silent:
        text = "; ".join(f"{group} ({why})" for group, why in silent.items())
        found.warning("nvidia-smi", f"nvidia-smi does not tell: {text}")


def driver_needed(driver: str, cuda: str) -> int:
    """The driver branch that this CUDA asks for where `driver` is older; 0 where it is new enough or not known.

    An older one still works behind the image's forward-compatibility package (cuda-compat, data-centre GPUs only),
    so the caller says whether CUDA has started.
    """
    needed = DRIVERS.get(cuda.partition(".")[0], 0)
    have = re.match(r"\d+", driver)
    return needed if have and int(have[0]) < needed else 0


def infiniband(value: str) -> list[str]:
    """What is wrong with the devices that NCCL_IB_HCA names. With a leading ^ it names those that are not used."""
    if value.startswith(("^", "=^")):
        return []
    wrong = []
    for name in filter(None, (item.strip().partition(":")[0] for item in value.removeprefix("=").split(","))):
        # NCCL takes a name for a prefix; one that ends in a number is meant as that device, not as mlx5_10 for mlx5_1.
        pattern = name if re.search(r"_[a-z]*\d+$", name) else f"{name}*"
        states = [path.read_text().strip() for path in sorted(INFINIBAND.glob(f"{pattern}/ports/*/state"))]
        if not states:
            wrong.append(f"{name} is missing")
        elif not any(state.endswith(": ACTIVE") for state in states):
            wrong.append(f"{name} is not active ({', '.join(states)})")
    return wrong


def _settled(
    host: str, env: Mapping[str, str], alone: bool, passing: Container[str] = PASSING
) -> tuple[list[dict[str, Any]], Findings]:
    """GPUs, and what is wrong with them. Looks again while there is a problem that may pass."""
    for left in reversed(range(LOOKS)):
        gpus, silent = ask_smi()
        gpus = used(gpus, env.get("CUDA_VISIBLE_DEVICES"))
        found = judge_gpus(gpus, host, alone=alone, arch=platform.machine())
        judge_silence(silent, host, found)
        if not left or not any(one["name"] in passing for one in found.problems):
            break
        time.sleep(BETWEEN_S)
    return gpus, found


def look_after_load(host: str, env: Mapping[str, str], found: Findings) -> None:
    """What slows the GPUs down right after the products: of idle ones it is not seen. What passes at once is none."""
    if shutil.which("nvidia-smi"):
        _, slow = _settled(host, env, alone=True, passing={"throttle"})
        found.problems += [one for one in slow.problems if one["name"] == "throttle"]


def look(
    node: Mapping[str, Any], host: str, env: Mapping[str, str], folders: Mapping[str, Path], found: Findings
) -> dict[str, Any]:
    """Facts of this node; what is wrong: into `found`. `folders`: "scratch" and "run", whose free space counts."""
    facts: dict[str, Any] = {"free_gib": {}, "gpu_health": []}
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
        return facts
    if shutil.which("nvidia-smi") is None:
        found.warning("nvidia-smi", "nvidia-smi is not in the image: the GPUs' health was not checked")
    else:
        alone = node["job"]["nodes"] * node["profile"]["gpus_per_node"] == 1
        facts["gpu_health"], of_gpus = _settled(host, env, alone)
        found.problems += of_gpus.problems
        found.warnings += of_gpus.warnings
        if (gpus := facts["gpu_health"]) and gpus[0].get("driver"):
            facts["driver"] = gpus[0]["driver"]
    _look_at_network(node, host, env, found)
    return facts


def _look_at_network(node: Mapping[str, Any], host: str, env: Mapping[str, str], found: Findings) -> None:
    exclude = EXCLUDE.format(host=host)
    several = node["job"]["nodes"] > 1
    named = "" if env.get("NCCL_IB_DISABLE") == "1" else env.get("NCCL_IB_HCA", "")
    if wrong := infiniband(named):
        what = f"InfiniBand: {'; '.join(wrong)}"
        if several:
            found.problem("infiniband", what, f"ibstat on {host}, NCCL_IB_HCA of the profile; {exclude}", "run")
        else:  # one node has no use for it
            found.warning("infiniband", what)
    # One channel for all is called channel0; Slurm's switch/nvidia_imex gives each job one with a number of its own.
    if several and env.get("NCCL_MNNVL_ENABLE") == "1" and not any(IMEX_CHANNELS.glob("channel[0-9]*")):
        what = f"no channel in {IMEX_CHANNELS}: NVLink cannot cross nodes"
        found.problem("imex", what, f"systemctl status nvidia-imex on {host}; {exclude}", "run")
