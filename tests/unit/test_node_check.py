"""slurm/node.py's check as processes on several "nodes" of this machine, with a torch that only pretends.

The figures mean nothing here; the real torch is asked in tests/train, real nodes in tests/cluster.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.config.spec import Job, PlacedRun, node_config
from launcher.runs.judged import judge
from tests.conftest import Forked, Launch
from tests.unit.node_place import FAILED, Place, fake_site, started
from tests.unit.test_submission import wait_for
from tests.unit.test_titan_command import LLAMA3_8B, changed, debug_node

# What speed.py asks of torch, without numbers in it, on a clock that only these calls move: however busy the machine
# is, a product takes as long as any other. FAKE_SLOW makes it take ten times as long.
FAKE_TENSORS = """
import time
bfloat16 = float32 = uint8 = None
class Tensor:
    def __init__(self, *arguments, **_): pass
    def to(self, _): return self
    def item(self): return 0.001
    def copy_(self, _): burn(0.0005)
randn = zeros = empty = ones = empty_like = tensor = Tensor
clock = 0.0
def burn(seconds):
    global clock
    clock += seconds
time.perf_counter = time.process_time = lambda: clock
def mm(left, right, out):
    if os.environ.get("FAKE_NO_PRODUCT"): raise RuntimeError("libcublas.so.13 is missing")
    burn(0.01 if os.environ.get("FAKE_SLOW") else 0.001)
def set_num_threads(_): pass
cuda.set_device = lambda _: None
cuda.synchronize = lambda: None
from . import distributed
"""
FAKE_DISTRIBUTED = """
import os, sys
class ReduceOp: MAX = None
class TCPStore:
    port = 4711
    def __init__(self, *arguments, **_): pass
def init_process_group(backend, store, rank, world_size, timeout):
    if world_size == int(os.environ.get("FAKE_HANG", "0")):
        print("NCCL INFO no route", flush=True)
        raise RuntimeError("Connection closed by peer")
def all_reduce(values, op=None): sys.modules["torch"].burn(0.001)
def destroy_process_group(): pass
"""


class Nodes(Place):
    """A run of several nodes, all of them on this machine."""

    def __init__(self, folder: Path, node: dict[str, Any], spares: int = 0) -> None:
        super().__init__(folder, changed(node, check="full"))
        self.first, self.step = 0, self.node["job"]["nodes"] + spares
        self.said = {"TITAN_NODES": str(self.step)} if spares else {}
        fake_site(self.site, FAKE_TENSORS, FAKE_DISTRIBUTED)

    def run(self, address: str = "127.0.0.1", **changes: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
        """Every node's process, ended; `changes`: n1={...} are node 1's own variables, or its node.json."""
        done = []
        for process in self.begin(address, **changes):
            done.append(process.end())
            assert "Traceback" not in done[-1].stdout + done[-1].stderr, done[-1]
        return done

    def begin(self, address: str = "127.0.0.1", **changes: dict[str, str]) -> list[Forked]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        running = []
        for number in range(self.first, self.step):
            own = dict(changes.get(f"n{number}", {}))
            node_json = own.pop("node_json", f"{self.run_dir}/job/node.json")
            env = self.environment(
                TITAN_HEAD_ADDR=address,
                TITAN_HEAD_PORT=str(port + 10000 if port < 55000 else port),
                TITAN_JOB_ID="7",
                SLURM_NODEID=str(number),
                SLURMD_NODENAME=f"gpu{number:03d}",
                TMPDIR=str(self.run_dir.parent / f"tmp{number}"),
                **self.said,
            )
            env.update(own)
            Path(env["TMPDIR"]).mkdir(exist_ok=True)
            running.append(self.process(env, node_json))
        return running

    def verdict(self) -> dict[str, Any]:
        value = json.loads((self.run_dir / "nodes" / "check.json").read_text())
        assert isinstance(value, dict)
        return value

    def record_of(self, number: int) -> dict[str, Any]:
        return self.record(f"{number:04d}-gpu{number:03d}")


@pytest.fixture
def two(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path, debug_node(nodes=2))


def all_stopped(done: list[subprocess.CompletedProcess[str]]) -> None:
    assert [one.returncode for one in done] == [FAILED] * len(done), done
    assert not any("STARTED" in one.stdout or "titan-command" in one.stdout for one in done)


def test_healthy_nodes_are_measured_and_train(two: Nodes) -> None:
    done = two.run()
    for number, one in enumerate(done):
        started(one)
        record = two.record_of(number)
        assert record["ok"] and record["check"] == "full" and record["problems"] == []
        assert [gpu["gpu"] for gpu in record["speed"]] == [0, 1]
        assert min(gpu[key] for gpu in record["speed"] for key in ("product_tflops", "copy_gbs")) > 0
        assert record["allreduce_node_gbs"] > 0 and record["allreduce_job_gbs"] > 0 and record["check_s"] > 0
        assert record["time"] > 1e9 and isinstance(record["utc_offset_s"], int)
        (ok,) = [line for line in one.stdout.splitlines() if line.startswith("titan-node: ok ")]
        assert " product_tflops=" in ok and " allreduce_job_gbs=" in ok and " check_s=" in ok
    assert two.verdict()["ok"] and two.verdict()["figures"]["allreduce_job_gbs"] > 0
    assert done[0].stdout.startswith("titan-check: 2 nodes, fit; matrix product ")
    assert "titan-check" not in done[1].stdout
    assert not [path for folder in two.run_dir.parent.glob("tmp*") for path in folder.rglob("check-*")]


def test_what_is_wrong_on_one_node_stops_all_and_names_it(two: Nodes) -> None:
    own = changed(two.node, data="/nowhere", tokenizer="/nowhere/else")
    (two.run_dir.parent / "own.json").write_text(json.dumps(own))
    done = two.run(n1={"node_json": str(two.run_dir.parent / "own.json")})
    all_stopped(done)
    said = [line for line in done[1].stdout.splitlines() if line.startswith("titan-node: FAIL")]
    assert len(said) == 2 and "/nowhere is not a directory" in said[0] and "/nowhere/else/tokenizer" in said[1]
    assert "titan-node" not in done[0].stdout  # it is fit
    assert "titan-check: stop node=0 host=gpu000 because gpu001 is unfit: /nowhere is not" in done[0].stdout
    verdict = two.verdict()
    assert {(one["host"], one["name"], one["fault"]) for one in verdict["unfit"]} == {
        ("gpu001", "data", "node"),
        ("gpu001", "tokenizer", "node"),
    }
    assert two.record_of(0)["ok"] and two.record_of(0)["stopped"].startswith("gpu001 is unfit")
    record = two.record_of(1)
    assert not record["ok"] and "/nowhere is not" in record["why"]
    assert [one["fault"] for one in record["problems"]] == ["node", "node"]


def test_who_is_ended_because_another_has_ended_says_why_all_the_same(two: Nodes) -> None:
    """srun sends SIGTERM to all when the first one has ended with a code, and then tells of a signal."""
    first, second = two.begin(n1={"FAKE_TORCH_BROKEN": "1"})
    wait_for(lambda: "\ntitan-check: stop node=0" in "\n" + first.said())
    os.kill(first.pid, signal.SIGTERM)
    assert [first.end().returncode, second.end().returncode] == [FAILED, FAILED]


def test_a_slow_rank_is_an_outlier(two: Nodes) -> None:
    done = two.run(n1={"FAKE_SLOW": "1"})
    all_stopped(done)
    verdict = two.verdict()
    assert {(one["host"], one["metric"]) for one in verdict["outliers"]} == {("gpu001", "product_tflops")}
    assert 'host=gpu001 why="rank 0: matrix product at ' in done[1].stdout
    assert two.record_of(1)["problems"][0]["name"] == "slow" and two.record_of(0)["ok"]


def test_a_network_that_fails_stops_the_job(two: Nodes) -> None:
    done = two.run(n0={"FAKE_HANG": "4"}, n1={"FAKE_HANG": "4"})
    all_stopped(done)
    assert {one["fault"] for one in two.verdict()["unfit"]} == {"run"}
    assert "across nodes: rank 0: allreduce: RuntimeError: Connection closed" in done[0].stdout
    assert "titan-check: printed by worker 1:\nNCCL INFO no route" in done[0].stdout


def test_a_wrong_setting_is_not_blamed_on_the_only_node(tmp_path: Path) -> None:
    alone = Nodes(tmp_path, debug_node(nodes=1))
    all_stopped(alone.run(n0={"TITAN_SCRATCH": "/proc/none"}))
    all_stopped(alone.run(n0={"FAKE_HANG": "2"}))  # NCCL within the node
    assert [(one["name"], one["fault"]) for one in alone.verdict()["unfit"]] == [("all-reduce-node", "run")]
    all_stopped(alone.run(n0={"FAKE_NO_PRODUCT": "1"}))  # of all its ranks
    assert [(one["name"], one["fault"]) for one in alone.verdict()["unfit"]] == [("product", "run")] * 2


def test_quick_multiplies_nothing(two: Nodes) -> None:
    two.change(check="quick")
    done = two.run(n1={"FAKE_SLOW": "1"})
    for one in done:
        started(one)
    assert "speed" not in two.record_of(0) and two.record_of(0)["free_gib"] and two.verdict()["ok"]
    assert done[0].stdout.startswith("titan-check: 2 nodes, fit; checked in ")


def test_off_asks_nobody(two: Nodes) -> None:
    two.change(check="off")
    for one in two.run():
        started(one)
    assert not (two.run_dir / "nodes" / "check.json").exists() and "free_gib" not in two.record_of(0)


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


SMI = """#!/bin/sh
case "$1" in
*name*) for i in 0 1 2 3; do echo "GPU-$i, $i, NVIDIA GB200, 580.95.05, 3, 189471, 30"; done ;;
*ecc*) for i in 0 1 2 3; do echo "GPU-$i, ${FAKE_ECC:-0}"; done ;;
*) exit 2 ;;
esac
"""


@pytest.fixture
def gpus(tmp_path: Path) -> Nodes:
    place = Nodes(tmp_path, changed(LLAMA3_8B, nodes=3))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return place


def test_gpu_nodes(gpus: Nodes) -> None:
    """One has lost a GPU, one has memory errors: both are named in one go, the third is not to blame."""
    common = {"PATH": f"{gpus.run_dir.parent}/bin:{os.environ['PATH']}"}
    done = gpus.run(own_address(), n0=common, n1={**common, "FAKE_GPUS": "3"}, n2={**common, "FAKE_ECC": "2"})
    all_stopped(done)
    unfit = {(one["host"], one["name"]) for one in gpus.verdict()["unfit"]}
    assert unfit == {("gpu001", "gpus"), ("gpu002", "ecc")}
    assert {one["fault"] for one in gpus.verdict()["unfit"]} == {"node"}
    assert "3 GPUs are visible, the profile says 4" in done[1].stdout
    assert gpus.record_of(2)["gpu_health"][0]["ecc_uncorrected"] == 2
    assert "titan-node: FAIL" not in done[0].stdout
    healthy = gpus.run(own_address(), n0=common, n1=common, n2=common)
    for one in healthy:
        started(one)
    assert len(gpus.record_of(1)["speed"]) == 4 and gpus.record_of(1)["driver"] == "580.95.05"


def test_a_driver_that_is_too_old_is_told_by_its_number(tmp_path: Path) -> None:
    place = Nodes(tmp_path, changed(LLAMA3_8B, nodes=1))
    (tmp_path / "nvidia-smi").write_text(SMI.replace("580.95.05", "570.86.15"))
    (tmp_path / "nvidia-smi").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (done,) = place.run(n0={**own, "FAKE_CUDA_ERROR": "The driver is too old"})
    assert done.returncode == FAILED
    assert "does not start: The driver is too old; driver 570.86.15 is older than CUDA 13.0 needs (580)" in done.stdout
    assert place.verdict()["unfit"][0]["fault"] == "run"  # the image's: a healthy node is not left out for it
    (done,) = place.run(n0=own)  # it starts all the same: behind the image's compatibility package
    started(done)
    assert "titan-check: warning gpu000: driver 570.86.15 is older" in done.stdout


def test_the_level_is_a_key_of_the_job(launch: Launch, two: Nodes) -> None:
    spec = PlacedRun(job=Job(name="r", check="quick"))
    assert node_config(spec)["job"]["check"] == "quick" and node_config(PlacedRun())["job"]["check"] == "full"
    done = launch("config", "show", "--local", "--recipe", "debug", "--check", "off")
    assert done.returncode == 0 and re.search(r"job\.check +off +\(option --check\)", done.stdout), done.stdout
    assert launch("render", "--check", "sometimes").returncode == ExitStatus.USAGE


# --- spare nodes: three meet, two train -----------------------------------------------------------------------


@pytest.fixture
def spare(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path, debug_node(nodes=2), spares=1)


def trained(place: Nodes, done: list[subprocess.CompletedProcess[str]], *numbers: int) -> None:
    """These nodes became torchrun, as ranks in this order around the first of them; the others ended well."""
    for number, one in enumerate(done):
        assert one.returncode == 0 and "titan-check: stop" not in one.stdout, one
        if number in numbers:
            arguments, _, _ = started(one)
            rank = numbers.index(number)
            assert {"--nnodes=2", "--rdzv-backend=static", f"--node-rank={rank}"} < set(arguments)
            assert f"--log-dir={place.run_dir}/logs/ranks/{rank:04d}-gpu{number:03d}" in arguments
        else:
            assert "STARTED" not in one.stdout and "titan-command" not in one.stdout
    assert place.verdict()["ok"] and place.verdict()["chosen"] == [f"gpu{number:03d}" for number in numbers]


def test_a_spare_is_told_so_and_ends_well(spare: Nodes) -> None:
    done = spare.run()
    trained(spare, done, 0, 1)
    assert done[2].stdout == "titan-check: spare node=2 host=gpu002 (chosen: gpu000, gpu001)\n"
    assert spare.record_of(2)["ok"] and spare.record_of(2)["spare"] is True and "spare" not in spare.record_of(1)
    assert all(spare.record_of(number)["allreduce_job_gbs"] > 0 for number in range(3))  # all are measured
    assert done[0].stdout.startswith("titan-check: 3 nodes, 2 chosen, spare: gpu002; matrix product ")


@pytest.mark.parametrize("sick", [0, 1, 2])
def test_an_unfit_node_is_left_out(spare: Nodes, sick: int) -> None:
    """Node 0 too, at which the others meet: the next one becomes torchrun's head."""
    broken: dict[str, Any] = {f"n{sick}": {"FAKE_TORCH_BROKEN": "1"}}
    done = spare.run(**broken)
    trained(spare, done, *sorted({0, 1, 2} - {sick}))
    assert "titan-node: FAIL" in done[sick].stdout and "import torch fails: ImportError" in done[sick].stdout
    assert spare.record_of(sick)["ok"] is False
    assert [one["name"] for one in spare.record_of(sick)["problems"]] == ["gpus"]  # and heard the verdict
    assert [(one["host"], one["fault"]) for one in spare.verdict()["unfit"]] == [(f"gpu{sick:03d}", "node")]
    assert judge([spare.record_of(number) for number in range(3)], spare.verdict(), 2)[0].own


def test_the_head_is_the_first_that_is_chosen(spare: Nodes) -> None:
    """Node 0 of the step has no place in the run: the others know another's address, by its own word."""
    (spare.run_dir.parent / "own.json").write_text(json.dumps(changed(spare.node, data="/nowhere")))
    done = spare.run("127.0.0.2", n0={"node_json": str(spare.run_dir.parent / "own.json")})
    trained(spare, done, 1, 2)
    for one in done[1:]:
        assert "--rdzv-endpoint=127.0.0.1:" in one.stdout  # where a way to 127.0.0.2 begins
    assert spare.verdict()["head"] == "127.0.0.1"
    assert spare.record_of(1)["allreduce_job_gbs"] > 0  # at node 0, whose torch is well


def test_a_slow_rank_is_left_out(spare: Nodes) -> None:
    trained(spare, spare.run(n1={"FAKE_SLOW": "1"}), 0, 2)
    assert spare.record_of(1)["problems"][0]["name"] == "slow"


def test_too_few_are_fit(spare: Nodes) -> None:
    done = spare.run(n0={"FAKE_TORCH_BROKEN": "1"}, n1={"FAKE_TORCH_BROKEN": "1"})
    all_stopped(done)
    assert not spare.verdict()["ok"] and "chosen" not in spare.verdict()
    assert "titan-check: stop node=2 host=gpu002 because gpu000 is unfit" in done[2].stdout


def test_the_choice_needs_no_measurements(spare: Nodes) -> None:
    spare.change(check="off")
    trained(spare, spare.run(n1={"FAKE_TORCH_BROKEN": "1"}), 0, 2)


def test_one_of_two(tmp_path: Path) -> None:
    place = Nodes(tmp_path, debug_node(nodes=1), spares=1)
    first, second = place.run(n0={"FAKE_TORCH_BROKEN": "1"})
    assert first.returncode == 0 and "--nnodes=1" in started(second)[0] and place.verdict()["chosen"] == ["gpu001"]


def test_a_node_that_does_not_come_holds_nobody_up(spare: Nodes) -> None:
    """It comes when the others train: it reads so in the run directory, and ends none of them."""
    (spare.run_dir / "job" / "check" / "agree.py").write_text(
        (spare.run_dir / "job" / "check" / "agree.py").read_text().replace("UNFIT_S = 60", "UNFIT_S = 0.1")
    )
    late = {"TITAN_HEAD_PORT": "11024"}  # where nobody is
    done = spare.run(n2=late)
    trained(spare, done, 0, 1)
    assert [(one["name"], one["fault"]) for one in spare.verdict()["unfit"]] == [("absent", "run")]
    assert 'why="the nodes have met without this one"' in done[2].stdout


def test_a_node_0_that_never_began_is_named_by_the_others(spare: Nodes) -> None:
    agree = spare.run_dir / "job" / "check" / "agree.py"
    agree.write_text(agree.read_text().replace("ARRIVE_S = 900", "ARRIVE_S = 1"))
    spare.first = 1
    (spare.run_dir / "logs").mkdir()
    (spare.run_dir / "logs" / "0000-gpu000.log").touch()
    done = [process.end() for process in spare.begin()]
    all_stopped(done)
    (one,) = spare.verdict()["unfit"]
    assert (one["host"], one["name"], one["fault"]) == ("gpu000", "absent", "node") and not spare.verdict()["ok"]
    assert spare.record_of(1)["ok"] and spare.record_of(2)["ok"]
    assert "titan-check: stop node=1 host=gpu001 because gpu000 is unfit" in done[0].stdout
