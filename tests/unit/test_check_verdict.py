"""Which nodes are unfit and which GPUs are outliers, from the records of all nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.check import problem, verdict, warning


def records(nodes: int = 4, gpus: int = 4, **changes: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Healthy H100 nodes whose GPUs differ by 1%; `changes`: n2={...} for node 2."""
    made = {}
    for node in range(nodes):
        speed = [
            {"gpu": gpu, "product_tflops": 650 + (7 * node + 3 * gpu) % 7, "copy_gbs": 2400 + (node + gpu) % 5}
            for gpu in range(gpus)
        ]
        made[node] = {
            "node": node,
            "host": f"gpu{node:03d}",
            "gpu": "NVIDIA H100 80GB HBM3",
            "problems": [],
            "warnings": [],
            "speed": speed,
            "allreduce_node_gbs": 450.0 + node,
            "torch": "2.14.1",
            "check_s": 20.0 + node,
            **changes.get(f"n{node}", {}),
        }
    return made


def judged(
    found: dict[int, dict[str, Any]], device: str = "cuda", nodes: int = 0, absent: dict[int, str] | None = None
) -> dict[str, Any]:
    node = {"job": {"nodes": nodes or len(found)}, "profile": {"device": device}}
    return verdict.judge(found, node, absent)


def slow(node: int, gpu: int, metric: str, value: float) -> dict[int, dict[str, Any]]:
    made = records()
    made[node]["speed"][gpu][metric] = value
    return made


def test_a_healthy_job() -> None:
    found = judged(records())
    assert found["ok"] and not found["unfit"] and not found["outliers"] and not found["warnings"]
    assert found["figures"]["product_tflops"] == {"min": 650, "median": 653.0, "max": 656}
    assert found["figures"]["check_s"] == 23.0
    (line,) = verdict.lines(found)
    assert line == (
        "titan-check: 4 nodes, fit; matrix product 653 TFLOP/s (650 to 656), memory copy 2402 GB/s (2400 to 2404),"
        " all-reduce in the node 452 GB/s (450 to 453), checked in 23.0 s"
    )


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("product_tflops", 500.0, "GPU 3: matrix product at 500 TFLOP/s, the median of the job is 653"),
        ("copy_gbs", 1200.0, "GPU 3: memory copy at 1200 GB/s, the median of the job is 2402"),
    ],
)
def test_a_slow_gpu_is_named_and_its_node_unfit(metric: str, value: float, said: str) -> None:
    found = judged(slow(2, 3, metric, value))
    (one,) = found["unfit"]
    assert (one["node"], one["host"], one["fault"], one["name"]) == (2, "gpu002", "node", "slow")
    assert said in one["why"] and "--exclude gpu002" in one["fix"]
    (outlier,) = found["outliers"]
    assert (outlier["gpu"], outlier["metric"], outlier["value"], outlier["unfit"]) == (3, metric, value, True)
    assert any("titan-check: unfit gpu002 (node): " in line for line in verdict.lines(found))


def test_a_gpu_that_is_a_little_slow_is_named_and_stops_nobody() -> None:
    found = judged(slow(2, 3, "product_tflops", 560.0))  # 14% below: a warm place, a power limit
    assert found["ok"]
    assert verdict.lines(found)[1].startswith("titan-check: warning gpu002: GPU 3: matrix product at 560")


class Case(NamedTuple):
    """Records, and what is named in them: host, GPU, metric, whether its node is unfit."""

    records: dict[int, dict[str, Any]]
    named: list[tuple[str, int | None, str, bool]]
    device: str = "cuda"


def half_as_fast() -> dict[int, dict[str, Any]]:
    made = records(nodes=2)
    for gpu in made[1]["speed"]:
        gpu["product_tflops"] /= 2
    return made


def on_a_cpu(share: float) -> dict[int, dict[str, Any]]:
    made = records(nodes=2, gpus=2, n1={"allreduce_node_gbs": 0.1})
    made[1]["speed"][0]["product_tflops"] *= share
    return made


SPEED = records(1)[0]["speed"][1]
PRODUCT, REDUCE = "product_tflops", "allreduce_node_gbs"
CASES = {
    "14% below": Case(slow(2, 3, PRODUCT, 560.0), [("gpu002", 3, PRODUCT, False)]),
    "8% below": Case(slow(2, 3, PRODUCT, 600.0), []),
    "all-reduce": Case(records(n1={REDUCE: 200.0}), [("gpu001", None, REDUCE, True)]),
    "half of two nodes": Case(half_as_fast(), [("gpu001", gpu, PRODUCT, True) for gpu in range(4)]),
    "two figures say nothing": Case({0: {**records(1)[0], "speed": [{"gpu": 0, PRODUCT: 1.0}, SPEED]}}, []),
    "CPU, 30%": Case(on_a_cpu(0.3), [], "cpu"),
    "CPU, 20%": Case(on_a_cpu(0.2), [("gpu001", 0, PRODUCT, True)], "cpu"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_who_is_an_outlier(case: Case) -> None:
    found = judged(case.records, case.device)
    assert [(one["host"], one["gpu"], one["metric"], one["unfit"]) for one in found["outliers"]] == case.named
    assert found["ok"] is not any(is_unfit for *_, is_unfit in case.named)


FIGURES = st.lists(st.floats(1.0, 1e4), min_size=3, max_size=200)


@given(FIGURES)
def test_whoever_is_near_the_median_or_above_is_never_an_outlier(values: list[float]) -> None:
    middle, limit = verdict.limit_of(values, "cuda")
    assert limit <= 0.9 * middle and sum(value < limit for value in values) <= len(values) // 2


@given(FIGURES, st.floats(0.01, 100))
def test_the_unit_does_not_matter(values: list[float], factor: float) -> None:
    for device in ("cuda", "cpu"):
        _, limit = verdict.limit_of(values, device)
        _, scaled = verdict.limit_of([value * factor for value in values], device)
        assert scaled == pytest.approx(limit * factor, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(99.0, 101.0), min_size=8, max_size=200), st.floats(0.0, 70.0), st.data())
def test_one_sick_gpu_among_healthy_ones_is_always_found(values: list[float], sick: float, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(values)))
    _, limit = verdict.limit_of([*values[:place], sick, *values[place:]], "cuda")
    assert sick < limit < min(values)


def test_what_only_some_nodes_have_is_theirs() -> None:
    data = problem("data", "/data/c4 is not a directory", "mount it", "run")
    found = judged(records(n1={"problems": [data]}))
    assert [(one["host"], one["fault"], one["why"]) for one in found["unfit"]] == [("gpu001", "node", data["what"])]


@pytest.mark.parametrize(
    ("name", "having", "fault"), [("data", 1, "node"), ("data", 2, "run"), ("ecc", 2, "node"), ("unexpected", 1, "run")]
)
def test_what_half_of_the_nodes_share_is_not_blamed_on_each(name: str, having: int, fault: str) -> None:
    """A file system that stalls costs nobody his nodes; what the hardware says itself stays true."""
    one = problem(name, "x", "y", "node" if name == "ecc" else "run")
    made = {n: {**record, "problems": [one] * (n < having)} for n, record in records(4).items()}
    assert {entry["fault"] for entry in judged(made)["unfit"]} == {fault}


@pytest.mark.parametrize(("nodes", "fault"), [(1, "node"), (2, "node"), (3, "run")])
def test_what_all_of_three_nodes_have_is_the_runs(nodes: int, fault: str) -> None:
    gpus = problem("gpus", "4 GPUs are visible, the profile says 8", "--gpu")
    made = {number: {**record, "problems": [gpus]} for number, record in records(nodes).items()}
    found = judged(made)
    assert len(found["unfit"]) == nodes and {one["fault"] for one in found["unfit"]} == {fault}


def test_a_node_that_nobody_else_was_compared_with_keeps_its_fault() -> None:
    """The others of 36 came too late to be heard."""
    ecc, disk = (problem("ecc", "3 errors", "reset it"), problem("scratch", "/x cannot be written", "--set", "run"))
    alone = {0: {**records(1)[0], "problems": [ecc, disk]}}
    assert [one["fault"] for one in judged(alone, nodes=36)["unfit"]] == ["node", "run"]


def test_a_collective_that_fails_is_nobodys_fault() -> None:
    broken = problem("all-reduce", "across nodes: rank 0: no answer", "NCCL_DEBUG=INFO", "run")
    assert judged(records(n0={"problems": [broken]}))["unfit"][0]["fault"] == "run"


def test_nodes_that_never_came_are_named() -> None:
    here = {number: record for number, record in records().items() if number != 2}
    found = judged(here, nodes=4, absent={2: "gpu002"})
    assert [(one["host"], one["name"], one["fault"]) for one in found["unfit"]] == [("gpu002", "absent", "node")]
    assert not found["ok"]


@pytest.mark.parametrize(("nodes", "absent"), [(2, 1), (4, 3), (4, 2)])
def test_where_most_do_not_come_they_are_not_to_blame(nodes: int, absent: int) -> None:
    """A firewall between the nodes, or node 0's own network: no healthy node is to be left out for it."""
    here = {number: record for number, record in records(nodes).items() if number < nodes - absent}
    found = judged(here, nodes=nodes, absent={n: f"gpu{n:03d}" for n in range(nodes) if n not in here})
    assert not found["ok"] and {one["fault"] for one in found["unfit"]} == {"run"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.13.0"}, "the nodes differ in torch: '2.13.0' on gpu001, else 2.14.1"),
        ({"warnings": [warning("space", "5.0 GiB are free")]}, "5.0 GiB are free"),
    ],
)
def test_warnings_stop_nobody(change: dict[str, Any], said: str) -> None:
    found = judged(records(n1=change))
    assert found["ok"] and said in found["warnings"][0]["what"]
    assert any(line.startswith("titan-check: warning") and said in line for line in verdict.lines(found))


RACK, BOARD = "4f1c2e9a-0000-4d00-8000-000000000001", "00000000-0000-0000-0000-000000000000"


def gpus_in(cluster: str | None, *cliques: str) -> dict[str, Any]:
    return {"gpu_health": [{"fabric_cluster": cluster, "fabric_clique": clique} for clique in cliques]}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([gpus_in(RACK, *"1111"), gpus_in(RACK, *"2222")], "2 NVLink domains (1 + 1 nodes)"),
        ([gpus_in(RACK, *"1111")] * 2 + [gpus_in(RACK, *"2222")], "2 NVLink domains (2 + 1 nodes)"),
        ([gpus_in(RACK, *"1111")] * 3 + [gpus_in(RACK, *"2222")], "2 NVLink domains (3 + 1 nodes)"),
        ([gpus_in(RACK, *"1122")], "2 NVLink domains (1 + 1 nodes)"),
        ([gpus_in(RACK, *"1111"), gpus_in(RACK[::-1], *"1111"), {}], "2 NVLink domains (1 + 1 nodes)"),
        ([gpus_in(RACK, *"1111")] * 4, ""),
        ([gpus_in(BOARD, *"0" * 8), gpus_in(BOARD, *"1" * 8)], ""),
        ([gpus_in(RACK, *"1111"), {}, gpus_in(None, "1"), {"gpu_health": []}], ""),
    ],
    ids=["1+1", "2+1", "3+1", "one node", "a node that does not say", "whole", "eight-GPU boards", "one says"],
)
def test_a_job_that_straddles_nvlink_domains(nodes: list[dict[str, Any]], said: str) -> None:
    health: dict[str, Any] = {f"n{number}": node for number, node in enumerate(nodes)}
    found = judged(records(len(nodes), **health))
    assert found["ok"] and [said in one["what"] for one in found["warnings"]] == ([True] if said else [])


@pytest.mark.parametrize(
    ("device", "hardware", "said"),
    [
        ("cuda", {"hardware": {"peak_tflops": 989}}, "no GPU reaches 40% of the 989 TFLOP/s"),
        ("cuda", {"hardware": {}}, ""),  # a GPU that no profile describes
        ("cuda", {}, ""),  # a node.json of another launcher
        ("cpu", {"hardware": {"peak_tflops": 989}}, ""),
    ],
)
def test_a_job_whose_gpus_are_all_slow(device: str, hardware: dict[str, Any], said: str) -> None:
    made = records()
    for record in made.values():
        for gpu in record["speed"]:
            gpu["product_tflops"] /= 2
    found = verdict.judge(made, {"job": {"nodes": 4}, "profile": {"device": device}, **hardware})
    assert found["ok"] and [said in one["what"] for one in found["warnings"]] == ([True] if said else [])
