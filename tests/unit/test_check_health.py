"""What nvidia-smi, /sys and /proc say, in every form, and what is made of it. The outputs are made up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.check import Findings, health, smi

UUIDS = [f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(4)]


def asked(nodes: int, gpus: int) -> dict[str, Any]:
    return {"job": {"nodes": nodes}, "profile": {"device": "cuda", "gpus_per_node": gpus}}


def general(**values: str) -> str:
    """nvidia-smi's lines for four idle GPUs; `values` for GPU 2."""
    idle = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.124.06", "used": "4", "total": "81559", "temp": "31"}
    rows = [
        ", ".join([uuid, str(index), *(idle | (values if index == 2 else {})).values()])
        for index, uuid in enumerate(UUIDS)
    ]
    return "\n".join(rows) + "\n"


def of_gpu_2(good: str, bad: str) -> str:
    return "".join(f"{uuid}, {bad if index == 2 else good}\n" for index, uuid in enumerate(UUIDS))


def judged(answers: Mapping[str, str], *, alone: bool = False, arch: str = "x86_64") -> tuple[list[str], list[str]]:
    """What is said of four GPUs: problems, warnings."""
    found = health.judge_gpus(smi.join({"general": general(), **answers}), "h", alone=alone, arch=arch)
    assert all(one["fault"] == "node" and one["fix"] for one in found.problems)
    assert all(f"-i {UUIDS[2]} -mig 0" in one["fix"] for one in found.problems if "MIG" in one["what"])
    return [one["what"] for one in found.problems], [one["what"] for one in found.warnings]


def test_idle_gpus_are_fit() -> None:
    gpus = smi.join({"general": general()})
    assert [gpu["index"] for gpu in gpus] == [0, 1, 2, 3]
    assert gpus[0] == {
        "uuid": UUIDS[0],
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "570.124.06",
        "memory_used_mib": 4,
        "memory_total_mib": 81559,
        "temperature_c": 31,
    }
    assert judged({}) == ([], [])


HW, BRAKE, COOLED = (
    ", ".join("Active" if reason in words else "Not Active" for reason in smi.REASONS)
    for words in (
        ("hw_slowdown", "hw_thermal_slowdown"),
        ("hw_slowdown", "hw_power_brake_slowdown"),
        ("sw_thermal_slowdown",),
    )
)
NO_REASON = ", ".join(["Not Active"] * 4)


class Sick(NamedTuple):
    """What nvidia-smi says of a healthy GPU and of GPU 2, and what is made of it: a problem, or a warning."""

    group: str
    good: str
    bad: str
    problem: str = ""
    warning: str = ""
    action: str = ""  # that the driver asks for, where it says one


SICK = {
    "memory errors": Sick("ecc", "0", "3", "GPU 2: 3 uncorrected memory errors"),
    "memory errors, dealt with": Sick("ecc", "0", "3", "", "GPU 2: 3 uncorrected", action="None"),
    "memory errors, action not said": Sick("ecc", "0", "3", "GPU 2: 3 uncorrected", action="[N/A]"),
    "reset": Sick("recovery", "None", "Reset", "GPU 2 has a fault, the driver asks for: Reset"),
    "reboot": Sick("recovery", "None", "Reboot", "the driver asks for: Reboot"),
    "drain": Sick("recovery", "None", "Drain P2P", "the driver asks for: Drain P2P"),
    "drain and reset": Sick("recovery", "None", "Drain and Reset", "the driver asks for: Drain and Reset"),
    "remap failed": Sick("rows", "0, 0", "0, 1", "GPU 2: the remapping of a bad memory row has failed"),
    "remap waits": Sick("rows", "No, No", "Yes, No", "", "GPU 2: the remapping of a bad memory row waits"),
    "in pieces": Sick("mig", "Disabled", "Enabled", "MIG is enabled on GPU 2: training needs whole GPUs"),
    "throttled": Sick("clocks", NO_REASON, HW, "hardware at 31 C: hw_slowdown, hw_thermal_slowdown"),
    "braked": Sick("clocks", NO_REASON, BRAKE, "hw_slowdown, hw_power_brake_slowdown"),
    "kept cool": Sick("clocks", NO_REASON, COOLED, "", "GPU 2 is slowed down by the driver"),
    "fabric": Sick("fabric", "Completed, Success", "In Progress, N/A", "joined the NVLink fabric: state In Progress"),
    "fabric status": Sick("fabric", "Completed, Success", "Completed, Insufficient", "status Insufficient"),
}


@pytest.mark.parametrize("case", SICK.values(), ids=SICK.keys())
def test_a_sick_gpu(case: Sick) -> None:
    action = {"recovery": of_gpu_2("None", case.action)} if case.action else {}
    problems, warnings = judged({case.group: of_gpu_2(case.good, case.bad), **action})
    assert (len(problems), len(warnings)) == (bool(case.problem), bool(case.warning))
    assert case.problem in "".join(problems) and case.warning in "".join(warnings)
    assert judged({case.group: of_gpu_2(case.good, case.good)}) == ([], [])


PROCESS = {"processes": f"{UUIDS[2]}, 4711\n"}


@pytest.mark.parametrize(
    ("used", "arch", "answers", "problem", "warning"),
    [
        ("2048", "x86_64", {}, "", ""),
        ("2049", "x86_64", {}, "GPU 2: 2.0 GiB of its memory are in use", ""),
        # Grace's kernel keeps its page cache there, too: only a process is somebody else
        ("4000", "aarch64", PROCESS, "", ""),
        ("40000", "aarch64", {}, "", "but by no process"),
        ("40000", "aarch64", PROCESS, "somebody else (process 4711)", ""),
    ],
)
def test_memory_that_somebody_else_uses(
    used: str, arch: str, answers: Mapping[str, str], problem: str, warning: str
) -> None:
    gpus = smi.join({"general": general(used=used), **answers})
    found = health.judge_gpus(gpus, "h", alone=False, arch=arch)
    for said, entries in ((problem, found.problems), (warning, found.warnings)):
        assert [said in one["what"] for one in entries] == ([True] if said else [])


def test_one_gpu_alone_needs_no_fabric() -> None:
    waiting = of_gpu_2("In Progress, N/A", "In Progress, N/A")
    assert judged({"fabric": waiting}, alone=True) == ([], [])
    assert len(judged({"fabric": waiting})[0]) == 4


@pytest.mark.parametrize(
    "nothing", ["[N/A]", "N/A", "[Not Supported]", "Not Supported", "[Unknown Error]", "", "¿qué?"]
)
def test_what_is_not_said_is_not_zero_and_not_a_fault(nothing: str) -> None:
    for group in ("ecc", "mig", "fabric", "clique"):
        row = ", ".join([nothing] * len(smi.QUERIES[group].fields))
        assert judged({group: of_gpu_2(row, row)}) == ([], []), group
    assert smi.join({"ecc": of_gpu_2(nothing, nothing)})[0]["ecc_uncorrected"] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        'Field "fabric.state" is not a valid field to query.\n',
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        general()[:90],
        "\0\0\0",
        '"' * 200_000,
    ],
    ids=["empty", "unknown field", "no driver", "cut off", "zeros", "quotes"],
)
def test_what_is_no_answer_is_passed_over(text: str) -> None:
    assert len(smi.join({"general": text})) <= 1
    assert len(smi.join({"general": general(), "fabric": text})) == 4


@given(st.text(max_size=300), st.sampled_from(sorted(smi.QUERIES)))
def test_no_text_breaks_the_parser(text: str, group: str) -> None:
    for said in (text, f"{UUIDS[0]}, {text}"):
        health.judge_gpus(smi.join({group: said}), "h", alone=False, arch="x86_64")


@pytest.mark.parametrize("alarm", ["[GPU requires reset]", "[GPU is lost]"])
def test_a_broken_gpu_whose_values_are_an_alarm(alarm: str) -> None:
    said = f"GPU 2 has a fault, nvidia-smi reports: {alarm[1:-1]}"
    lost = general().replace(UUIDS[2], alarm)  # even its name
    for text in (general(used=alarm, temp=alarm), lost):
        found = health.judge_gpus(smi.join({"general": text}), "h", alone=False, arch="x86_64")
        assert [one["what"] for one in found.problems] == [said] and not found.warnings
    for group in ("ecc", "recovery", "fabric", "clocks"):
        row = (", ".join([word] * len(smi.QUERIES[group].fields)) for word in ("[N/A]", alarm))
        assert judged({group: of_gpu_2(*row)}) == ([said], []), group


LOST = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot the system to recover this GPU"


@pytest.mark.parametrize(
    ("script", "problem", "warning"),
    [
        (
            f"echo 'GPU-0, 0'; echo '{LOST.replace('. ', '.  ')}'; exit 15",
            f"a GPU no longer answers: nvidia-smi ended with 15: {LOST}",
            "",
        ),
        ("sleep 60", "", "general (did not answer within 1 s)"),
        ("head -c 300 /dev/urandom", "", "general (no GPU is in its answer)"),
        ("printf 'half\\033 a line' >&2; exit 9", "", "general (ended with 9: half? a line)"),
        (
            'case "$1" in *name*) sleep 60;; *) exit 2;; esac',
            "",
            "general (did not answer within 1 s); ecc (ended with 2)",
        ),
    ],
    ids=["lost", "hangs", "garbage", "fails", "one hangs, the others fail"],
)
def test_what_nvidia_smi_says_instead_of_an_answer_is_told(
    script: str, problem: str, warning: str, nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(script)
    monkeypatch.setattr(smi, "SMI_LIMIT_S", 1)
    found = Findings()
    health.look(asked(nodes=1, gpus=4), "gpu001", {}, {}, found)
    assert [one["what"] for one in found.problems] == ([problem] if problem else [])
    told = [one["what"] for one in found.warnings]
    assert [what.startswith(f"nvidia-smi does not tell: {warning}") for what in told] == ([True] if warning else [])


def test_what_goes_wrong_is_noted_and_the_next_thing_is_looked_at() -> None:
    found = Findings()
    for name, error in {"data": OSError(116, "Stale file handle", "/data/c4"), "gpus": KeyError("x")}.items():
        with found.noting(name):
            raise error
    assert [(one["name"], one["what"]) for one in found.problems] == [
        ("data", "/data/c4: Stale file handle"),
        ("unexpected", "unexpected: KeyError: 'x'"),
    ]
    assert ["traceback" in one for one in found.problems] == [False, True]


def test_gpus_that_are_hidden_from_the_job_are_not_judged() -> None:
    gpus = smi.join({"general": general()})
    assert [gpu["index"] for gpu in smi.used(gpus, "0,1")] == [0, 1]
    assert [gpu["index"] for gpu in smi.used(gpus, UUIDS[3][:12])] == [3]
    for unreadable in (None, "", "nonsense"):
        assert len(smi.used(gpus, unreadable)) == 4


@pytest.mark.parametrize(
    ("driver", "cuda", "needed"),
    [
        ("570.124.06", "13.0", 580),
        ("580.95.05", "13.0", 0),
        ("610.1", "13.1", 0),
        ("525.60", "12.8", 0),
        ("470.1", "12.4", 525),
        ("", "13.0", 0),
        ("570.1", "", 0),
        ("570.1", "99.0", 0),
        ("garbage", "13.0", 0),
    ],
)
def test_the_driver_against_cuda(driver: str, cuda: str, needed: int) -> None:
    assert health.driver_needed(driver, cuda) == needed


DEVICES = {f"mlx5_{n}": "4: ACTIVE" for n in (0, 1, 10)} | {"mlx5_3": "1: DOWN", "mlx5_4": "2: INIT"}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("", []),
        ("mlx5_1:1,,mlx5_10", []),
        ("=mlx5_1", []),
        ("mlx5", []),
        ("^mlx5_9", []),
        ("^=mlx5_9", []),
        ("mlx5_3,mlx5_4", ["mlx5_3 is not active (1: DOWN)", "mlx5_4 is not active (2: INIT)"]),
        ("mlx5_1,mlx5_9,bnxt", ["mlx5_9 is missing", "bnxt is missing"]),
    ],
)
def test_infiniband_devices_that_the_profile_names(
    value: str, wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INFINIBAND", tmp_path)
    for device, state in DEVICES.items():
        (tmp_path / device / "ports" / "1").mkdir(parents=True)
        (tmp_path / device / "ports" / "1" / "state").write_text(f"{state}\n")
    assert health.infiniband(value) == wrong
    shutil.rmtree(tmp_path / "mlx5_1")
    assert health.infiniband("mlx5_1") == ["mlx5_1 is missing"]  # mlx5_10 is another


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in nvidia-smi's place."""

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(health, "BETWEEN_S", 0)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")

    return put


SMI = """
case "$1" in
*name*) i=0; while [ $i -lt 4 ]; do echo "GPU-$i, $i, NVIDIA B200, 580.95.05, 3, 183359, 30"; i=$((i+1)); done ;;
*ecc*) printf 'GPU-0, 0\\nGPU-1, 0\\nGPU-2, 7\\nGPU-3, 0\\n' ;;
*) echo 'Field is not a valid field to query.'; exit 2 ;;
esac
"""
NODE = asked(nodes=2, gpus=4)


def test_a_whole_node(nvidia_smi: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(SMI)
    env = {"NCCL_IB_HCA": "no_such_0", "NCCL_MNNVL_ENABLE": "1"}
    found = Findings()
    facts = health.look(NODE, "gpu001", env, {"scratch": tmp_path}, found)
    assert facts["driver"] == "580.95.05" and len(facts["gpu_health"]) == 4 and facts["free_gib"]["scratch"] > 0
    assert "GPU 2: 7 uncorrected" in next(one["what"] for one in found.problems if one["name"] == "ecc")
    (unsaid,) = (one["what"] for one in found.warnings if one["name"] == "nvidia-smi")
    assert "recovery (ended with 2: Field is not a valid field to query.); mig (" in unsaid
    faults = {one["name"]: one["fault"] for one in found.problems}
    assert faults == {"ecc": "node", "infiniband": "run", "imex": "run"}
    monkeypatch.setattr(health, "IMEX_CHANNELS", tmp_path)
    (tmp_path / "channel17").touch()  # Slurm's own numbering
    other, alone = Findings(), Findings()
    health.look(NODE, "gpu001", {**env, "NCCL_IB_DISABLE": "1"}, {}, other)
    health.look(asked(nodes=1, gpus=4), "gpu001", env, {}, alone)  # neither InfiniBand nor IMEX is needed
    assert [one["name"] for one in other.problems] == [one["name"] for one in alone.problems] == ["ecc"]


@pytest.mark.parametrize(("freed_at_look", "fit"), [(2, True), (9, False)])
def test_memory_that_is_being_freed_is_no_fault(
    freed_at_look: int, fit: bool, nvidia_smi: Callable[[str], None], tmp_path: Path
) -> None:
    """A job has just ended on this node: its process takes seconds to let go of the GPU."""
    busy = f"echo >>{tmp_path}/looks; [ $(wc -l <{tmp_path}/looks) -lt {freed_at_look} ] && used=90000 || used=3"
    nvidia_smi(f'case "$1" in *name*) {busy}; echo "GPU-0, 0, NVIDIA H200, 580.95.05, $used, 143771, 30" ;; esac')
    found = Findings()
    health.look(asked(nodes=1, gpus=1), "h", {}, {}, found)
    assert [one["name"] for one in found.problems] == ([] if fit else ["memory"])


@pytest.mark.parametrize(("slow_looks", "problems"), [(3, 1), (1, 0)])
def test_a_slowdown_that_only_load_shows(
    slow_looks: int, problems: int, nvidia_smi: Callable[[str], None], tmp_path: Path
) -> None:
    nvidia_smi(f"""
case "$1" in
*name*) echo "GPU-0, 0, NVIDIA H200, 580.95.05, 90000, 143771, 91" ;;
*event*)
    echo >>{tmp_path}/looks
    [ $(wc -l <{tmp_path}/looks) -le {slow_looks} ] && state=Active || state='Not Active'
    echo "GPU-0, Not Active, $state, Not Active, Not Active" ;;
*) exit 2 ;;
esac""")
    found = Findings()
    health.look_after_load("h", {}, found)
    assert [one["name"] for one in found.problems] == ["throttle"] * problems and not found.warnings
    assert all("GPU 0 is slowed down by its hardware at 91 C" in one["what"] for one in found.problems)


def test_without_nvidia_smi_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Findings()
    facts = health.look(asked(nodes=1, gpus=8), "h", {}, {}, found)
    assert facts["gpu_health"] == [] and not found.problems and "not in the image" in found.warnings[0]["what"]


@pytest.mark.parametrize(
    ("free_gib", "faults", "warnings"), [(50, [], []), (5, [], ["space", "space"]), (0.5, ["node", "run"], [])]
)
def test_little_space_is_told(
    free_gib: float, faults: list[str], warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = int(free_gib * health.GIB / 4096)
    space = os.statvfs_result((4096, 4096, 10**9, 10**9, blocks, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    found = Findings()
    health.look({"profile": {"device": "cpu"}}, "h", {}, {"scratch": tmp_path, "run": tmp_path}, found)
    assert [one["fault"] for one in found.problems] == faults
    assert [one["name"] for one in found.warnings] == warnings
