"""What nvidia-smi, /sys and /proc say, in every form, and what is made of it. The outputs are made up."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.check import health, smi

UUIDS = [f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(4)]
GENERAL = smi.GROUPS["general"][0][1]
REASONS = smi.GROUPS["clocks"][0][1]
OLD_REASONS = smi.GROUPS["clocks"][1][1]
FABRIC = smi.GROUPS["fabric"][0][1]


def asked(nodes: int, gpus: int) -> dict[str, Any]:
    return {"job": {"nodes": nodes}, "profile": {"device": "cuda", "gpus_per_node": gpus}}


def general(**values: str) -> str:
    """nvidia-smi's lines for four idle GPUs; `values` for GPU 2."""
    rows = []
    for index, uuid in enumerate(UUIDS):
        row = {
            "index": str(index),
            "name": "NVIDIA H100 80GB HBM3",
            "driver": "570.124.06",
            "used": "4",
            "total": "81559",
            "temp": "31",
        }
        row |= values if index == 2 else {}
        rows.append(", ".join([uuid, *row.values()]))
    return "\n".join(rows) + "\n"


def judged(*answers: tuple[Any, str | None], arch: str = "x86_64", alone: bool = False) -> tuple[list[str], list[str]]:
    problems, warnings = health.judge_gpus(smi.join(answers), "gpu001", alone=alone, arch=arch)
    assert all(one["fault"] == "node" and one["fix"] for one in problems)
    return [one["what"] for one in problems], [one["what"] for one in warnings]


def of_gpu_2(good: str, bad: str) -> str:
    return "".join(f"{uuid}, {bad if index == 2 else good}\n" for index, uuid in enumerate(UUIDS))


def test_idle_gpus_are_fit() -> None:
    gpus = smi.join([(GENERAL, general())])
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
    assert judged((GENERAL, general())) == ([], [])


@pytest.mark.parametrize(
    ("fields", "good", "bad", "said"),
    [
        (smi.GROUPS["ecc"][0][1], "0", "3", "GPU 2: 3 uncorrected memory errors"),
        (smi.GROUPS["rows"][0][1], "0, 0", "0, 1", "GPU 2: the remapping of a bad memory row has failed"),
        (
            REASONS,
            "Not Active, Not Active, Not Active, Not Active",
            "Active, Active, Not Active, Not Active",
            "GPU 2 is slowed down by its hardware at 31 C: hw_slowdown, hw_thermal",
        ),
        (
            OLD_REASONS,
            "Not Active, Not Active, Not Active, Not Active",
            "Active, Not Active, Active, Not Active",
            "hw_slowdown, hw_power_brake_slowdown",
        ),
        (FABRIC, "Completed, Success", "In Progress, N/A", "GPU 2 has not joined the NVLink fabric: state In Progress"),
        (FABRIC, "Completed, Success", "Completed, Insufficient Resources", "status Insufficient Resources"),
    ],
    ids=["ecc", "remap failed", "throttled", "throttled, older driver", "fabric", "fabric status"],
)
def test_a_sick_gpu(fields: Any, good: str, bad: str, said: str) -> None:
    sick = judged((GENERAL, general()), (fields, of_gpu_2(good, bad)))
    assert len(sick[0]) == 1 and said in sick[0][0], sick
    assert judged((GENERAL, general()), (fields, of_gpu_2(good, good))) == ([], [])


RECOVERY = smi.GROUPS["recovery"][0][1]


def test_memory_errors_are_judged_by_what_the_driver_asks_for() -> None:
    ecc = (smi.GROUPS["ecc"][0][1], of_gpu_2("0", "3"))
    problems, warnings = judged((GENERAL, general()), ecc, (RECOVERY, of_gpu_2("None", "None")))
    assert problems == [] and "GPU 2: 3 uncorrected" in warnings[0]  # the driver has dealt with them
    assert judged((GENERAL, general()), ecc, (RECOVERY, of_gpu_2("None", "[N/A]")))[0]  # it does not say
    for action in ("Reset", "Reboot", "Drain P2P", "Drain and Reset"):
        (problem,), _ = judged((GENERAL, general()), (RECOVERY, of_gpu_2("None", action)))
        assert problem == f"GPU 2 has a fault, for which the driver asks for: {action}"


def test_a_gpu_that_is_cut_into_pieces() -> None:
    mig = smi.GROUPS["mig"][0][1]
    (problem,), _ = judged((GENERAL, general()), (mig, of_gpu_2("Disabled", "Enabled")))
    assert problem == "MIG is enabled on GPU 2: training needs whole GPUs"
    assert judged((GENERAL, general()), (mig, of_gpu_2("Disabled", "[N/A]"))) == ([], [])
    (one,), _ = health.judge_gpus(smi.join([(mig, of_gpu_2("Disabled", "Enabled"))]), "h", alone=False, arch="")
    assert f"nvidia-smi -i {UUIDS[2]} -mig 0" in one["fix"]


def test_a_row_that_waits_for_a_reset_is_a_warning() -> None:
    problems, warnings = judged((GENERAL, general()), (smi.GROUPS["rows"][0][1], of_gpu_2("No, No", "Yes, No")))
    assert problems == [] and "GPU 2: the remapping of a bad memory row waits" in warnings[0]


def test_a_gpu_that_the_driver_keeps_cool_is_a_warning() -> None:
    hot = of_gpu_2("Not Active, Not Active, Not Active, Not Active", "Not Active, Not Active, Not Active, Active")
    problems, warnings = judged((GENERAL, general()), (REASONS, hot))
    assert problems == [] and "GPU 2 is slowed down by the driver" in warnings[0]


def test_memory_that_somebody_else_uses() -> None:
    assert judged((GENERAL, general(used="2048"))) == ([], [])
    assert "GPU 2: 2.0 GiB of its memory are in use" in judged((GENERAL, general(used="2049")))[0][0]
    # Grace's kernel keeps its page cache there, too: only a process is somebody else
    process = (smi.GROUPS["processes"][0][1], f"{UUIDS[2]}, 4711\n")
    assert judged((GENERAL, general(used="4000")), process, arch="aarch64") == ([], [])
    problems, warnings = judged((GENERAL, general(used="40000")), arch="aarch64")
    assert problems == [] and "by no process that is seen" in warnings[0]
    assert "somebody else (process 4711)" in judged((GENERAL, general(used="40000")), process, arch="aarch64")[0][0]


def test_one_gpu_alone_needs_no_fabric() -> None:
    waiting = (FABRIC, of_gpu_2("In Progress, N/A", "In Progress, N/A"))
    assert judged((GENERAL, general()), waiting, alone=True) == ([], [])
    assert len(judged((GENERAL, general()), waiting)[0]) == 4


@pytest.mark.parametrize(
    "nothing", ["[N/A]", "N/A", "[Not Supported]", "Not Supported", "[Unknown Error]", "", "¿qué?"]
)
def test_what_is_not_said_is_not_zero_and_not_a_fault(nothing: str) -> None:
    row = of_gpu_2(nothing, nothing)
    for group in ("ecc", "fabric", "clique"):
        fields = smi.GROUPS[group][0][1]
        filled = "".join(f"{uuid}, {', '.join([nothing] * len(fields))}\n" for uuid in UUIDS)
        assert judged((GENERAL, general()), (fields, filled)) == ([], []), group
    assert smi.parse_smi(row, smi.GROUPS["ecc"][0][1])[UUIDS[0]] == {"ecc_uncorrected": None}


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
    assert len(smi.parse_smi(text, GENERAL)) <= 1
    assert len(smi.join([(GENERAL, general()), (FABRIC, text), (REASONS, None)])) == 4


@given(st.text(max_size=300), st.sampled_from(sorted(smi.GROUPS)))
def test_no_text_breaks_the_parser(text: str, group: str) -> None:
    fields = smi.GROUPS[group][0][1]
    health.judge_gpus(smi.join([(fields, text), (fields, f"{UUIDS[0]}, {text}")]), "h", alone=False, arch="x86_64")


@pytest.mark.parametrize("alarm", ["[GPU requires reset]", "[GPU is lost]"])
def test_a_broken_gpu_whose_values_are_an_alarm(alarm: str) -> None:
    said = f"GPU 2 has a fault, nvidia-smi says in the place of its values: {alarm[1:-1]}"
    assert judged((GENERAL, general(used=alarm, temp=alarm))) == ([said], [])
    for group in ("ecc", "recovery", "fabric", "clocks"):
        fields = smi.GROUPS[group][0][1]
        row = (", ".join(["[N/A]"] * len(fields)), ", ".join([alarm] * len(fields)))
        assert judged((GENERAL, general()), (fields, of_gpu_2(*row))) == ([said], []), group
    lost = general().replace(UUIDS[2], alarm)  # even its name
    assert judged((GENERAL, lost)) == ([said], [])


LOST = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost. Reboot the system to recover this GPU"


@pytest.mark.parametrize(
    ("script", "problems", "warnings"),
    [
        (
            f"echo 'GPU-0, 0'; echo '{LOST.replace('. ', '.  ')}'; exit 15",
            [f"a GPU does not answer any more: nvidia-smi ended with 15: {LOST}"],
            [],
        ),
        ("sleep 60", [], [f"nvidia-smi does not say: {', '.join(smi.GROUPS)} (did not answer within 3 s)"]),
        (
            "head -c 300 /dev/urandom",
            [],
            [f"nvidia-smi does not say: {', '.join(list(smi.GROUPS)[:-1])} (no GPU is in its answer)"],
        ),
        (
            "printf 'half\\033 a line' >&2; exit 9",
            [],
            [f"nvidia-smi does not say: {', '.join(smi.GROUPS)} (ended with 9: half? a line)"],
        ),
        (
            'case "$1" in *name*) sleep 60;; *) echo no such field; exit 2;; esac',
            [],
            [
                "nvidia-smi does not say: general (did not answer within 3 s); "
                f"{', '.join(list(smi.GROUPS)[1:])} (ended with 2: no such field)"
            ],
        ),
    ],
    ids=["lost", "hangs", "garbage", "fails", "one hangs, the others fail"],
)
def test_what_nvidia_smi_says_instead_of_an_answer_is_told(
    script: str, problems: list[str], warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(smi, "SMI_LIMIT_S", 3)
    _, wrong, said = health.look(asked(nodes=1, gpus=4), "gpu001", {}, {})
    assert [one["what"] for one in wrong] == problems and [one["what"] for one in said] == warnings
    assert {(one["name"], one["fault"]) for one in wrong} <= {("recovery", "node")}


def test_the_first_spelling_that_is_answered_counts() -> None:
    active = of_gpu_2("Active, Active, Active, Active", "Active, Active, Active, Active")
    gpus = smi.join([(GENERAL, general()), (REASONS, None), (OLD_REASONS, active)])
    assert all(gpu["hw_slowdown"] for gpu in gpus)


def test_gpus_that_are_hidden_from_the_job_are_not_judged() -> None:
    gpus = smi.join([(GENERAL, general(used="50000"))])
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


STATES = {f"mlx5_{n}": {1: "4: ACTIVE"} for n in (0, 1, 2, 10)} | {
    "mlx5_3": {1: "1: DOWN"},
    "mlx5_4": {1: "2: INIT", 2: "4: ACTIVE"},
}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("", []),
        ("mlx5_1,mlx5_2", []),
        ("=mlx5_1", []),
        ("mlx5_1:1", []),
        ("mlx5", []),
        ("mlx5_4", []),
        ("^mlx5_9", []),
        ("^=mlx5_9", []),
        ("mlx5_1,,", []),
        ("mlx5_1,mlx5_9", ["mlx5_9 is missing"]),
        ("mlx5_3", ["mlx5_3 is not active (1: DOWN)"]),
        ("mlx5_4:1", ["mlx5_4 is not active (2: INIT)"]),
        ("mlx5_1:7", ["mlx5_1 is not active (no port 7)"]),
        ("bnxt", ["bnxt is missing"]),
    ],
)
def test_infiniband_devices_that_the_profile_names(value: str, wrong: list[str]) -> None:
    assert health.infiniband(value, STATES) == wrong


def test_a_missing_mlx5_1_is_not_hidden_by_mlx5_10() -> None:
    assert health.infiniband("mlx5_1", {"mlx5_10": {1: "4: ACTIVE"}}) == ["mlx5_1 is missing"]


def test_the_states_of_infiniband_ports(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    assert health.infiniband_states(tmp_path) == {"mlx5_0": {1: "4: ACTIVE"}}
    assert health.infiniband_states(tmp_path / "absent") == {}


def test_commands_that_hang_or_are_missing_are_left_behind() -> None:
    slow = [sys.executable, "-c", "import time; print('late', flush=True); time.sleep(60)"]
    began = time.monotonic()
    found = smi.run_bounded([slow, ["echo", "one"], ["false"], ["/no/such/program"]], 1.0)
    assert found == [
        (None, "did not answer within 1 s"),
        ("one\n", ""),
        (None, "ended with 1"),
        (None, "No such file or directory"),
    ]
    assert time.monotonic() - began < 30  # not the 60 that it would have taken


SMI = """#!/bin/sh
case "$1" in
*name*) i=0; while [ $i -lt 4 ]; do echo "GPU-$i, $i, NVIDIA B200, 580.95.05, 3, 183359, 30"; i=$((i+1)); done ;;
*ecc*) printf 'GPU-0, 0\\nGPU-1, 0\\nGPU-2, 7\\nGPU-3, 0\\n' ;;
*) echo 'Field is not a valid field to query.'; exit 2 ;;
esac
"""


def test_a_whole_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    node = asked(nodes=2, gpus=4)
    env = {"NCCL_IB_HCA": "no_such_0", "NCCL_MNNVL_ENABLE": "1"}
    facts, problems, warnings = health.look(node, "gpu001", env, {"scratch": tmp_path})
    assert facts["driver"] == "580.95.05" and len(facts["gpu_health"]) == 4
    assert facts["free_gib"]["scratch"] > 0
    names = [one["name"] for one in problems]
    assert {"ecc", "infiniband", "imex"} <= set(names) and "GPU 2: 7 uncorrected" in problems[names.index("ecc")][
        "what"
    ]
    unsaid = (
        "nvidia-smi does not say: recovery, mig, rows, clocks, fabric, clique, processes"
        " (ended with 2: Field is not a valid field to query.)"
    )
    assert unsaid in [one["what"] for one in warnings]
    assert {one["name"]: one["fault"] for one in problems} == {
        "ecc": "node",
        "infiniband": "run",
        "imex": "run",
    }
    monkeypatch.setattr(health, "IMEX_CHANNELS", tmp_path)
    (tmp_path / "channel17").touch()  # Slurm's own numbering
    other = health.look(node, "gpu001", {**env, "NCCL_IB_DISABLE": "1"}, {})
    assert [one["name"] for one in other[1]] == ["ecc"]
    alone = health.look(asked(nodes=1, gpus=4), "gpu001", env, {})
    assert [one["name"] for one in alone[1]] == ["ecc"]  # neither InfiniBand nor IMEX is needed


@pytest.mark.parametrize(("freed_at_look", "fit"), [(2, True), (9, False)])
def test_memory_that_is_being_freed_is_no_fault(
    freed_at_look: int, fit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job has just ended on this node: its process takes seconds to let go of the GPU."""
    smi = tmp_path / "nvidia-smi"
    busy = f"echo >>{tmp_path}/looks; [ $(wc -l <{tmp_path}/looks) -lt {freed_at_look} ] && used=90000 || used=3"
    smi.write_text(
        f'#!/bin/sh\ncase "$1" in *name*) {busy}; echo "GPU-0, 0, NVIDIA H200, 580.95.05, $used, 143771, 30" ;; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(health, "BETWEEN_S", 0)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    _, problems, _ = health.look(asked(nodes=1, gpus=1), "h", {}, {})
    assert [one["name"] for one in problems] == ([] if fit else ["memory"])


@pytest.mark.parametrize(("slow_looks", "problems", "warnings"), [(0, 0, 0), (1, 0, 1), (2, 0, 1), (9, 1, 0)])
def test_a_slowdown_that_only_load_shows(
    slow_looks: int, problems: int, warnings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"""#!/bin/sh
case "$1" in
*name*) echo "GPU-0, 0, NVIDIA H200, 580.95.05, 90000, 143771, 91" ;;
*event*)
    echo >>{tmp_path}/looks
    [ $(wc -l <{tmp_path}/looks) -le {slow_looks} ] && state=Active || state='Not Active'
    echo "GPU-0, Not Active, $state, Not Active, Not Active" ;;
*) exit 2 ;;
esac
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(health, "BETWEEN_S", 0)
    found = health.look_after_load("h", {})
    assert [len(part) for part in found] == [problems, warnings]
    what = "GPU 0 is slowed down by its hardware at 91 C: hw_thermal_slowdown"
    assert all(one["name"] == "throttle" and one["what"].startswith(what) for part in found for one in part)
    assert all(one["what"].endswith("for a moment after the products") for one in found[1])


def test_without_nvidia_smi_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts, problems, warnings = health.look(asked(nodes=1, gpus=8), "h", {}, {})
    assert facts["gpu_health"] == [] and problems == [] and "not in the image" in warnings[0]["what"]


def test_little_space_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def space(gib: float) -> Any:
        def statvfs(_: Path) -> os.statvfs_result:
            return os.statvfs_result((4096, 4096, 10**9, 10**9, int(gib * health.GIB / 4096), 0, 0, 0, 0, 255))

        monkeypatch.setattr(os, "statvfs", statvfs)
        return health.look({"profile": {"device": "cpu"}}, "h", {}, {"scratch": tmp_path, "run": tmp_path})[1:]

    assert space(50) == ([], [])
    assert [one["name"] for one in space(5)[1]] == ["space", "space"] and space(5)[0] == []
    assert [one["fault"] for one in space(0.5)[0]] == ["node", "run"]
