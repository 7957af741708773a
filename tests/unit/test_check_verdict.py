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
        ("product_tflops", 500.0, "GPU 3: matrix product at 500 TFLOP/s, but the job's median is 653"),
        ("copy_gbs", 1200.0, "GPU 3: memory copy at 1200 GB/s, but the job's median is 2402"),
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


class Blame(NamedTuple):
    """A problem that the first nodes of a job have, and whose fault it is taken for."""

    problem: dict[str, Any]
    having: int
    nodes: int
    fault: str
    heard: int = 0  # where not all have come: nodes that did


ECC = problem("ecc", "3 errors", "reset it")
DATA = problem("data", "/data/c4 is not a directory", "mount it", "run")
GPUS = problem("gpus", "4 GPUs are visible, the profile says 8", "--gpu")
BLAMED = {
    "what only one has is its own": Blame(DATA, 1, 4, "node"),
    "one of two": Blame(DATA, 1, 2, "node"),
    "a file system that stalls": Blame(DATA, 2, 4, "run"),
    "what the hardware says itself": Blame(ECC, 2, 4, "node"),
    "what nobody foresaw": Blame(problem("unexpected", "x", "y", "run"), 1, 4, "run"),
    "a collective": Blame(problem("all-reduce", "across nodes: no answer", "NCCL_DEBUG=INFO", "run"), 1, 4, "run"),
    "a node alone": Blame(GPUS, 1, 1, "node"),
    "both": Blame(GPUS, 2, 2, "node"),
    "all of three": Blame(GPUS, 3, 3, "run"),
    "nobody else was heard": Blame(ECC, 1, 36, "node", heard=1),
    "nobody else was heard of the run": Blame(problem("scratch", "/x", "--set", "run"), 1, 36, "run", heard=1),
}


@pytest.mark.parametrize("case", BLAMED.values(), ids=BLAMED.keys())
def test_whose_fault_it_is(case: Blame) -> None:
    made = records(case.heard or case.nodes)
    for number in range(case.having):
        made[number]["problems"] = [case.problem]
    unfit = judged(made, nodes=case.nodes)["unfit"]
    assert [(one["host"], one["fault"]) for one in unfit] == [(f"gpu{n:03d}", case.fault) for n in range(case.having)]
    assert {one["why"] for one in unfit} == {case.problem["what"]}


@pytest.mark.parametrize(("nodes", "absent", "fault"), [(4, 1, "node"), (2, 1, "run"), (4, 3, "run"), (4, 2, "run")])
def test_nodes_that_never_came_are_named(nodes: int, absent: int, fault: str) -> None:
    """Where most do not come, a firewall or node 0's own network keeps them: no healthy node is left out for it."""
    gone = {number: f"gpu{number:03d}" for number in range(nodes - absent, nodes)}
    here = {number: record for number, record in records(nodes).items() if number not in gone}
    found = judged(here, nodes=nodes, absent=gone)
    assert not found["ok"]
    assert {(one["host"], one["name"], one["fault"]) for one in found["unfit"]} >= {
        (host, "absent", fault) for host in gone.values()
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.13.0"}, "the nodes differ in torch: '2.13.0' on gpu001, elsewhere 2.14.1"),
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


# --- the choice among more nodes than train ------------------------------------------------------------------


class Choice(NamedTuple):
    """By node: its NVLink domain ("" says none), its product's share of the others', and which have slow GPUs."""

    domains: str
    nodes: int
    chosen: list[int]
    speed: dict[int, float] | None = None
    slow: tuple[int, ...] = ()
    device: str = "cuda"


CHOICES = {
    "nothing tells them apart": Choice("----", 3, [0, 1, 2]),
    "the slowest is left out": Choice("----", 3, [0, 2, 3], {1: 0.97}),
    "the two slowest": Choice("-----", 3, [1, 3, 4], {0: 0.98, 2: 0.96, 4: 0.99}),
    "a CPU's speed says nothing": Choice("----", 3, [0, 1, 2], {1: 0.5}, device="cpu"),
    "slow GPUs before speed": Choice("----", 3, [0, 1, 3], {0: 0.95}, (2,)),
    "slow GPUs where there are no others": Choice("----", 3, [0, 1, 3], {2: 0.85, 3: 0.88}, (2, 3)),
    "one domain": Choice("aaab", 3, [0, 1, 2], {0: 0.9}),
    "the smallest that is enough": Choice("aaaaabbb", 3, [5, 6, 7], {5: 0.95}),
    "the fastest of two such": Choice("aaabbb", 3, [3, 4, 5], {0: 0.95}),
    "few domains": Choice("aabbbbcc", 6, [0, 1, 2, 3, 4, 5]),
    "a whole one before a part": Choice("abbbccc", 4, [0, 1, 2, 3]),
    "the slowest of the part is left out": Choice("aaabbb", 5, [0, 1, 2, 3, 5], {4: 0.95}),
    "slow GPUs before domains": Choice("aaab", 3, [0, 1, 3], slow=(2,)),
    "slow GPUs, in the domain of the others": Choice("aaab", 2, [0, 1], slow=(1, 2, 3)),
    "all": Choice("ab", 2, [0, 1], slow=(0, 1)),
}


def with_speed(domains: str, speed: dict[int, float]) -> dict[int, dict[str, Any]]:
    made = {}
    for number, name in enumerate(domains):
        gpus = [{"gpu": gpu, "product_tflops": 650.0 * speed.get(number, 1.0), "copy_gbs": 2400.0} for gpu in range(4)]
        health = gpus_in(RACK, *name * 4) if name != "-" else {}
        made[number] = {"host": f"gpu{number:03d}", "address": f"10.0.0.{number}", "speed": gpus, **health}
    return made


@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES.keys())
def test_which_nodes_are_chosen(case: Choice) -> None:
    made = with_speed(case.domains, case.speed or {})
    assert verdict.choose(made, case.slow, case.nodes, case.device) == case.chosen


@given(st.data())
def test_the_chosen_are_as_many_as_train_and_none_of_them_is_unfit(data: st.DataObject) -> None:
    domains = data.draw(st.text("-abc", min_size=2, max_size=12))
    step = len(domains)
    speed = data.draw(st.dictionaries(st.integers(0, step - 1), st.floats(0.5, 1.1)))
    made = with_speed(domains, speed)
    for number in data.draw(st.sets(st.integers(0, step - 1))):
        made[number]["problems"] = [ECC]
    absent = data.draw(st.sets(st.integers(1, step - 1)))
    gone = {number: made.pop(number)["host"] for number in absent}
    nodes = data.draw(st.integers(1, step - 1))
    found = verdict.judge(made, {"job": {"nodes": nodes}, "profile": {"device": "cuda"}}, gone, step)
    unfit = {one["host"] for one in found["unfit"]}
    fit = {record["host"] for record in made.values()} - unfit
    assert found["nodes"] == step and found["ok"] == (len(fit) >= nodes) == ("chosen" in found)
    if found["ok"]:
        assert len(found["chosen"]) == nodes == len(set(found["chosen"]))
        assert found["chosen"] == sorted(found["chosen"]) and {*found["chosen"], *found["spare"]} == fit
        assert found["head"] == f"10.0.0.{int(found['chosen'][0][3:])}"


def test_what_is_told_of_a_choice() -> None:
    """A node that did not come in the short time is not blamed, and the domains are counted of those that train."""
    made = with_speed("aaab", {})
    made[1]["problems"] = [ECC]
    node = {"job": {"nodes": 2}, "profile": {"device": "cuda"}}
    found = verdict.judge(made, node, {4: "gpu004"}, 5)
    assert found["chosen"] == ["gpu000", "gpu002"] and found["spare"] == ["gpu003"] and not found["warnings"]
    assert [(one["host"], one["fault"]) for one in found["unfit"]] == [("gpu001", "node"), ("gpu004", "run")]
    assert verdict.lines(found)[0].startswith(
        "titan-check: 5 nodes, 2 chosen, spare: gpu003, unfit: gpu001, gpu004; matrix product "
    )
    assert "chosen" not in verdict.judge(made, {**node, "job": {"nodes": 5}}, {4: "gpu004"}, 5)
    assert "chosen" not in verdict.judge(with_speed("aa", {}), node, {}, 2)
