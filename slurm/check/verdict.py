"""From what every node found to the job's verdict: which nodes are unfit, which GPUs are outliers.

The thresholds. A GPU is an outlier where its figure is below the median of all GPUs of the job by more than the larger
of 6 x 1.4826 x MAD and 10% of the median. It is named; its node is unfit where it is below UNFIT of the median, too:
healthy GPUs of one kind differ by several percent in a product that their power limit slows, more in warm places.
The median and MAD (the median distance from it; x 1.4826 it estimates a standard deviation) do not move when a minority
is sick, as a mean would; 6 of those deviations never happen by chance among thousands of GPUs; and 10% leaves out GPUs
that agree so closely that a harmless 2% would be "6 deviations". On a CPU, whose cores others use too, only less than a
quarter of the median counts, and the all-reduce not at all. Of an even number of figures the better middle one is the
median, so that the slow half of two nodes is seen. On GPUs three figures are the fewest that say anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from . import warning

METRICS = {  # key of a record's `speed` -> what it is called, unit
    "product_tflops": ("matrix product", "TFLOP/s"),
    "copy_gbs": ("memory copy", "GB/s"),
    "allreduce_node_gbs": ("all-reduce in the node", "GB/s"),
}
UNFIT = 0.80  # of the median: slower outliers stop the job. A sick GPU, or one whose hardware slows it, loses more.
SLOW = 0.40  # of the peak; a healthy GPU reaches 65 to 80% in this product
MIN_VALUES = 3


def limit_of(values: Sequence[float], device: str) -> tuple[float, float]:
    """Median, and the figure below which one is an outlier."""
    middle = statistics.median_high(values)
    if device == "cpu":
        return middle, 0.25 * middle
    deviation = 1.4826 * statistics.median_low([abs(value - middle) for value in values])
    return middle, middle - max(6 * deviation, 0.10 * middle)


def outliers(records: Mapping[int, Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """GPUs, and nodes for the all-reduce, that are slower than the others of the job by more than chance."""
    found = []
    for metric in METRICS:
        figures = _figures(records, metric)
        few = metric == "allreduce_node_gbs" if device == "cpu" else len(figures) < MIN_VALUES
        if few or not figures:
            continue
        middle, limit = limit_of([value for _, _, value in figures], device)
        found += [
            {
                "node": node,
                "host": records[node].get("host", "?"),
                "gpu": gpu,
                "metric": metric,
                "value": round(value, 3),
                "median": round(middle, 3),
                "limit": round(limit, 3),
                "unfit": value < UNFIT * middle,
            }
            for node, gpu, value in figures
            if value < limit
        ]
    return found


def _figures(records: Mapping[int, Mapping[str, Any]], metric: str) -> list[tuple[int, int | None, float]]:
    if metric == "allreduce_node_gbs":
        return [(n, None, r[metric]) for n, r in sorted(records.items()) if r.get(metric)]
    return [
        (node, int(speed["gpu"]), float(speed[metric]))
        for node, record in sorted(records.items())
        for speed in record.get("speed", ())
        if speed.get(metric)
    ]


def judge(
    records: Mapping[int, Mapping[str, Any]],
    node: Mapping[str, Any],
    absent: Mapping[int, str] | None = None,
    step_nodes: int = 0,
) -> dict[str, Any]:
    """The content of nodes/check.json. `node`: node.json; `absent`: hosts of nodes that were waited for in vain;
    `step_nodes`: how many have started, where some are spares.
    """
    device, needed = node["profile"]["device"], node["job"]["nodes"]
    nodes = max(needed, step_nodes)
    slow = outliers(records, device)
    unfit = _of_all(records, "problems")
    for one in unfit:
        one["why"] = one.pop("what")
    _settle_faults(unfit, len(records))
    peak = node.get("hardware", {}).get("peak_tflops", 0) if device == "cuda" else 0
    warnings = _of_all(records, "warnings")
    for one in slow:
        name, unit = METRICS[one["metric"]]
        gpu = "" if one["gpu"] is None else f"{'GPU' if device == 'cuda' else 'rank'} {one['gpu']}: "
        what = f"{gpu}{name} at {one['value']:.4g} {unit}, but the job's median is {one['median']:.4g}"
        place = {"node": one["node"], "host": one["host"]}
        if one["unfit"]:
            fix = f"leave the node out: --exclude {one['host']}"
            unfit.append({**place, "name": "slow", "why": what, "fix": fix, "fault": "node"})
        else:
            warnings.append({**place, **warning("slow", what)})
    bad = {one["node"] for one in unfit}
    fit = sorted(records.keys() - bad - (absent or {}).keys())
    # Where half of the nodes or more do not come, it is the network, or the node that all of them are to come to.
    # Where enough came, the rest was not waited for long enough to be blamed.
    has_choice = nodes > needed and len(fit) >= needed
    fault = "node" if 2 * len(absent or ()) < nodes and not has_choice else "run"
    why = "did not report to the first node in time"
    for number, host in sorted((absent or {}).items()):
        fix = f"look at its log, or leave it out: --exclude {host}"
        unfit.append({"node": number, "host": host, "name": "absent", "why": why, "fix": fix, "fault": fault})
    team, more = records, {}
    if has_choice:
        chosen = choose({number: records[number] for number in fit}, {one["node"] for one in slow}, needed, device)
        team = {number: records[number] for number in chosen}
        spare = [records[number].get("host", "?") for number in fit if number not in team]
        hosts = [record.get("host", "?") for record in team.values()]
        more = {"chosen": hosts, "spare": spare, "head": records[chosen[0]].get("address", "")}
    return {
        "schema": 1,
        "nodes": nodes,
        "ok": len(fit) >= needed,
        "unfit": unfit,
        "outliers": slow,
        "warnings": [*warnings, *({"node": None, "host": "", **one} for one in _of_the_job(team, peak))],
        "figures": _summary(records),
        **more,
    }


def choose(fit: Mapping[int, Mapping[str, Any]], slow: Collection[int], nodes: int, device: str) -> list[int]:
    """The numbers of the nodes that train, of those that are fit: as few as can be of those with `slow` GPUs, then as
    few NVLink domains as can be, whole ones before parts, then the fastest, then the first. In the order of the nodes,
    which keeps neighbours side by side.

    On a CPU, whose cores others use too, speed says nothing. A node whose GPUs are a domain of their own, or that does
    not say, stands for itself.
    """
    speed = dict.fromkeys(fit, math.inf)
    for metric in METRICS if device == "cuda" else ():
        figures = _figures(fit, metric)
        middle = statistics.median_high([value for _, _, value in figures] or [1])
        for number, _, value in figures:
            speed[number] = min(speed[number], value / middle)
    order = sorted(fit, key=lambda number: (number in slow, -speed[number], number))
    place = {number: at for at, number in enumerate(order)}
    domain = {number: next(iter(_domains({number: fit[number]})), number) for number in fit}
    chosen: set[int] = set()
    used: set[Any] = set()
    while missing := nodes - len(chosen):
        groups: dict[Any, list[int]] = {}  # those with slow GPUs only where no others are left
        left = [number for number in order if number not in chosen]
        for number in left:
            if (number in slow) == (left[0] in slow):
                groups.setdefault(domain[number], []).append(number)
        best = min(  # what costs no further domain, then the smallest domain that is enough, then the largest
            groups,
            key=lambda one: (
                one not in used,
                len(groups[one]) < missing,
                len(groups[one]) if len(groups[one]) >= missing else -len(groups[one]),
                place[groups[one][:missing][-1]],
            ),
        )
        chosen.update(groups[best][:missing])
        used.add(best)
    return sorted(chosen)


def _of_all(records: Mapping[int, Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The problems or warnings of all nodes, each with its node."""
    return [
        {"node": node, "host": record.get("host", "?"), **one}
        for node, record in sorted(records.items())
        for one in record.get(key, ())
    ]


def _settle_faults(unfit: list[dict[str, Any]], nodes: int) -> None:
    """What only a few nodes have is theirs; what all of three or more have is the run's, whatever each thought.

    In between, as with a file system that half of them cannot reach, and where there is nobody to be compared with, the
    fault stays that was named where the problem was found. Nobody is blamed for what nobody foresaw.
    """
    hosts: dict[str, set[int]] = {}
    for one in unfit:
        hosts.setdefault(one["name"], set()).add(one["node"])
    for one in unfit:
        having = len(hosts[one["name"]])
        if one["name"] in ("meeting", "all-reduce", "unexpected") or one["name"].startswith("checkpoint-"):
            continue  # of the last, node 0 looks for all
        if having < nodes and (having == 1 or 2 * having < nodes):
            one["fault"] = "node"
        elif 2 < nodes == having:
            one["fault"] = "run"


def _of_the_job(records: Mapping[int, Mapping[str, Any]], peak_tflops: float) -> list[dict[str, str]]:
    """Warnings: what differs between its nodes, and GPUs that are all far below their peak (0: any)."""
    found: list[dict[str, str]] = []
    for key in ("torch", "torchtitan", "nccl", "driver", "gpu"):
        by_value: dict[str, list[str]] = {}
        for record in records.values():
            by_value.setdefault(str(record.get(key, "")), []).append(str(record.get("host")))
        if len(by_value) > 1:
            few, hosts = min(by_value.items(), key=lambda item: len(item[1]))
            others = ", ".join(sorted(set(by_value) - {few}))
            where = ", ".join(sorted(hosts)[:8])
            found.append(warning(key, f"the nodes differ in {key}: {few!r} on {where}, elsewhere {others}"))
    domains = _domains(records)
    if len(domains) > 1:
        sizes = " + ".join(str(len(hosts)) for hosts in domains.values())
        what = f"the job straddles {len(domains)} NVLink domains ({sizes} nodes): traffic between them is slower"
        found.append(warning("fabric", what))
    best = max((value for _, _, value in _figures(records, "product_tflops")), default=0)
    if 0 < best < SLOW * peak_tflops:
        what = f"no GPU reaches {SLOW:.0%} of the {peak_tflops:g} TFLOP/s of its data sheet: {best:.0f} at most"
        found.append(warning("product", what))
    return found


def _domains(records: Mapping[int, Mapping[str, Any]]) -> dict[tuple[str, str], set[str]]:
    """NVLink domain, as cluster UUID and clique -> the hosts with a GPU in it.

    Eight-GPU boards, each a domain of its own that nobody else can join, have a UUID of zeros: those are left out.
    """
    domains: dict[tuple[str, str], set[str]] = {}
    for record in records.values():
        for gpu in record.get("gpu_health", ()):
            cluster, clique = str(gpu.get("fabric_cluster") or ""), gpu.get("fabric_clique")
            if cluster.strip("0-") and clique is not None:
                domains.setdefault((cluster, str(clique)), set()).add(str(record.get("host")))
    return domains


def _summary(records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in METRICS:
        if values := [value for _, _, value in _figures(records, metric)]:
            found = {"min": min(values), "median": statistics.median_high(values), "max": max(values)}
            figures[metric] = {name: round(value, 3) for name, value in found.items()}
    for key, worst in (("allreduce_job_gbs", min), ("check_s", max)):
        if said := [record[key] for record in records.values() if record.get(key)]:
            figures[key] = round(worst(said), 3)
    return figures


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """The summary that node 0 prints: one line for all, then one for each unfit node's problem and each warning."""
    hosts = {one["host"] for one in verdict["unfit"]}
    count = "1 node" if verdict["nodes"] == 1 else f"{verdict['nodes']} nodes"
    figures, parts = verdict["figures"], []
    for metric, (name, unit) in METRICS.items():
        if metric in figures:
            f = figures[metric]
            parts.append(f"{name} {f['median']:.4g} {unit} ({f['min']:.4g} to {f['max']:.4g})")
    if "allreduce_job_gbs" in figures:
        parts.append(f"all-reduce across nodes {figures['allreduce_job_gbs']:.4g} GB/s")
    state = "fit" if verdict["ok"] else ""
    if "chosen" in verdict:
        state = f"{len(verdict['chosen'])} chosen"
        state += f", spare: {', '.join(verdict['spare'])}" if verdict["spare"] else ""
    if hosts:
        state += f"{', ' if state else ''}unfit: {', '.join(sorted(hosts))}"
    tail = [*parts, *([f"checked in {figures['check_s']:.1f} s"] if "check_s" in figures else [])]
    shown = [f"titan-check: {count}, {state}; {', '.join(tail)}".rstrip("; ")]
    shown += [f"titan-check: unfit {one['host']} ({one['fault']}): {one['why']}" for one in verdict["unfit"]]
    shown += [
        f"titan-check: warning{' ' + one['host'] if one['host'] else ''}: {one['what']}" for one in verdict["warnings"]
    ]
    return shown
