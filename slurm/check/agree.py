"""How the nodes of a job come to one verdict: records to node 0, an all-reduce over everybody, the verdict back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from . import Findings, problem
from .health import look_after_load
from .meeting import Guest, Host, Lost, port_of
from .verdict import judge
from .workers import Worker, ask

ARRIVE_S = 900  # containers that are unpacked on each node start minutes apart
UNFIT_S = 60  # how long the others are waited for once one node is known to be unfit: so that all of those are named
REPORT_S = 300  # how long an unfit node tries to say so to node 0, which may still be measuring
# torch from a cold network disk; products, with the libraries that they load; NCCL's start and sums. They end what
# hangs, and are not what a healthy node takes.
HELLO_S, MEASURE_S, HOST_S, COLLECTIVE_S = 600, 180, 60, 300


def measure(
    crew: Sequence[Worker], node: Mapping[str, Any], host: str, env: Mapping[str, str], found: Findings
) -> dict[str, Any]:
    """Facts: each GPU's "speed" and "allreduce_node_gbs", the all-reduce in this node. What is wrong: into `found`."""
    what = "GPU" if node["profile"]["device"] == "cuda" else "rank"
    facts: dict[str, Any] = {"speed": []}
    fix = "look at nvidia-smi and dmesg on this node; leave it out: --exclude NODE"
    measured = ask(crew, {"do": "measure"}, MEASURE_S)
    # A sick GPU fails by itself; all of several at once do for want of a library, say.
    fault = "run" if len(crew) > 1 and all("problem" in answer for answer in measured) else "node"
    for gpu, answer in enumerate(measured):
        if "problem" in answer:
            found.problem("product", f"{what} {gpu}: {answer['problem']}", fix, fault)
        else:
            facts["speed"].append({"gpu": gpu, **{key: round(value, 4) for key, value in answer.items()}})
    if node["profile"]["device"] == "cuda":
        look_after_load(host, env, found)
    if len(crew) > 1 and not found.problems:
        opened = ask(crew[:1], {"do": "host"}, HOST_S)[0]
        value, why = _reduce(crew, what, len(crew), 0, "127.0.0.1", opened)
        if why:
            found.problem("all-reduce-node", why, fix, "run")
        else:
            facts["allreduce_node_gbs"] = value
    return facts


def agree(
    facts: dict[str, Any],
    node: Mapping[str, Any],
    crew: Sequence[Worker],
    publish: Callable[[dict[str, Any]], None],
    where: Any,
    over: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The verdict of all nodes, the same on each, once `publish` has had it: on node 0 before anybody can act on it.

    Raises Lost where node 0 cannot be reached. `facts` gets this node's share of what was measured together. `where`:
    torchrun's Rendezvous, beside which the nodes meet. `over`: with spares, whether they have met without this one.
    """
    nodes = max(node["job"]["nodes"], where.step_nodes)
    if nodes == 1:
        verdict = judge({0: facts}, node)
        publish(verdict)
        return verdict
    wait_s = ARRIVE_S if not facts["problems"] else REPORT_S if facts["node"] else UNFIT_S
    if facts["node"] == 0:
        with closing(Host(port_of(where.head_port), where.job_id, nodes)) as host:
            return _lead(facts, node, crew, publish, host, wait_s if nodes == node["job"]["nodes"] else ARRIVE_S)
    with closing(Guest(where.head_addr, port_of(where.head_port), where.job_id, facts["node"], wait_s, over)) as guest:
        guest.say(facts)
        message = guest.hear(ARRIVE_S + UNFIT_S)
        if "verdict" not in message:
            result = _across(crew, message["nodes"], facts["node"], where.head_addr, message)
            _merge(facts, result)
            guest.say(result)
            message = guest.hear(COLLECTIVE_S + UNFIT_S)
        if "verdict" not in message:
            raise Lost("node 0 began the all-reduce a second time")
        publish(message["verdict"])
        return dict(message["verdict"])


def _lead(
    facts: dict[str, Any],
    node: Mapping[str, Any],
    crew: Sequence[Worker],
    publish: Callable[[dict[str, Any]], None],
    host: Host,
    wait_s: float,
) -> dict[str, Any]:
    """Node 0's part: hears all, has them reduce, and tells them."""
    needed, spares = node["job"]["nodes"], host.nodes - node["job"]["nodes"]
    came = [not facts["problems"]]  # for each node that has come, whether it is fit

    def hurry(record: Mapping[str, Any]) -> float | None:
        """Once enough have come, the rest is waited for as long again: containers start minutes apart where an image
        is unpacked, and a dead node must not hold up the others for ARRIVE_S.
        """
        came.append(not record.get("problems"))
        if came.count(False) > spares:
            return UNFIT_S
        return max(UNFIT_S, time.time() - facts["time"]) if came.count(True) >= needed else None

    records = {0: facts, **host.gather(wait_s, hurry)}
    absent = set(range(host.nodes)) - records.keys()
    # Those who are late while too many are known to be unfit were not waited for: nothing can be said of them.
    named = {} if came.count(False) > spares else hosts_of(absent, Path(node["placed"]["run_dir"]))
    verdict = judge(_timed(records), node, named, host.nodes)
    fit = sorted(records.keys() - {one["node"] for one in verdict["unfit"]})
    if verdict["ok"] and crew and facts["check"] == "full" and len(fit) > 1:
        opened = ask(crew[:1], {"do": "host"}, HOST_S)[0]
        if "port" in opened:
            host.tell({"do": "allreduce", "port": opened["port"], "nodes": fit}, fit)
        if 0 in fit:
            _merge(facts, _across(crew, fit, 0, "127.0.0.1", opened))
        if "port" in opened:
            results = host.gather(COLLECTIVE_S + UNFIT_S, among=fit)
            for number, result in results.items():
                _merge(records[number], result)
            named |= {number: records[number]["host"] for number in set(fit) - results.keys() - {0}}
        verdict = judge(_timed(records), node, named, host.nodes)
    publish(verdict)
    host.tell({"verdict": verdict})
    return verdict


def _across(
    crew: Sequence[Worker], fit: Sequence[int], node_id: int, address: str, opened: Mapping[str, Any]
) -> dict[str, Any]:
    """This node's part of the all-reduce over all ranks of the fit nodes."""
    each = len(crew)
    value, why = _reduce(crew, "rank", len(fit) * each, fit.index(node_id) * each, address, opened)
    if why:
        fix = "--env NCCL_DEBUG=INFO shows which network was tried; check the firewall between the nodes"
        return {"problems": [problem("all-reduce", f"across nodes: {why}", fix, "run")]}
    return {"allreduce_job_gbs": value}


def _reduce(
    crew: Sequence[Worker], what: str, world: int, first: int, address: str, opened: Mapping[str, Any]
) -> tuple[float, str]:
    """GB/s of the slowest, or why there is none. The crew has ranks from `first` on; `opened`: the store's port."""
    if "port" not in opened:
        return 0.0, str(opened["problem"])
    place = {"world": world, "first": first, "address": address, "port": opened["port"]}
    answers = ask(crew, {"do": "allreduce", **place}, COLLECTIVE_S)
    wrong = [f"{what} {first + i}: {answer['problem']}" for i, answer in enumerate(answers) if "problem" in answer]
    return (0.0, wrong[0]) if wrong else (round(min(answer["allreduce_gbs"] for answer in answers), 4), "")


def _merge(record: dict[str, Any], result: Mapping[str, Any]) -> None:
    record.setdefault("problems", []).extend(result.get("problems", ()))
    if "allreduce_job_gbs" in result:
        record["allreduce_job_gbs"] = result["allreduce_job_gbs"]


def _timed(records: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    records[0]["check_s"] = round(time.time() - records[0]["time"], 1)
    return records


def hosts_of(numbers: set[int], run_dir: Path) -> dict[int, str]:
    """Names of nodes that have not come: srun has opened a log for each, called <%4n>-<host>.log."""
    found = {}
    for number in sorted(numbers):
        logs = sorted((run_dir / "logs").glob(f"{number:04d}-*.log"))
        found[number] = logs[0].stem[5:] if logs else f"node {number}"
    return found
