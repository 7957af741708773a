"""Why a job is waiting, in plain words, and what would start sooner."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.preflight.waiting import explain, fewer, meaning, reasons
from launcher.scheduler.facts import ClusterFacts, Partition
from launcher.titan.recipe import Recipe
from tests.conftest import Launch
from tests.unit.test_preflight import RACKS, cluster, node, run
from tests.unit.test_preflight import slurm as slurm

Fake = Callable[[str, str], Path]
FREE = (node("n0"), node("n1"))
NOW = datetime(2026, 11, 22, 18, 0)
IN_80_MIN = "estimated start: 2026-11-22 19:20, in 1 h 20 min"


@pytest.mark.parametrize(
    ("entry", "reason"), [pytest.param(entry, text, id=text) for entry in reasons() for text in entry["example"]]
)
def test_each_example_is_explained_by_its_own_entry(entry: dict[str, Any], reason: str) -> None:
    """An earlier pattern that matches the same beginning would hide a later one."""
    assert meaning(reason) == (entry["says"], entry["nodes"])


@pytest.mark.parametrize("entry", reasons(), ids=lambda entry: entry["pattern"])
def test_each_entry_is_sound(entry: dict[str, Any]) -> None:
    kinds = {key: type(value) for key, value in entry.items()}
    assert kinds == {"pattern": str, "says": str, "nodes": bool, "example": list}
    assert entry["example"] and [other["says"] for other in reasons()].count(entry["says"]) == 1


def test_an_unknown_reason_is_not_explained_away() -> None:
    assert meaning("SomethingNew") == ("", False)
    assert explain("SomethingNew", None, ClusterFacts()) == ["Slurm has no estimate of its start"]


def facts() -> ClusterFacts:
    broken = [node(name, "IDLE+DRAIN", reason="Xid [79] [root@2026-01-02]") for name in ("d1", "d2")]
    busy = [node(f"b{i}", "ALLOCATED") for i in range(4)]
    others = [node(f"o{i}", partitions=("other",)) for i in range(9)]
    nodes = [*(node(f"n{i}") for i in range(3)), *busy, *broken, node("k", "IDLE+RESERVED"), *others]
    return cluster(*nodes, partitions=(Partition("batch", True, "UP"), Partition("other", False, "UP")))


def test_nodes_estimate_and_what_would_start_sooner() -> None:
    lines = explain("Resources", run(nodes=9), facts(), "2026-11-22T19:20:00", NOW)
    assert lines == [
        "the job is next, but not enough nodes are free yet",
        "9 nodes requested; partition batch has 10: 3 free, 4 in use, 2 out of service, 1 reserved",
        "out of service: d1 is drained (Xid [79] [root@2026-01-02]), d2 is drained (Xid [79] [root@2026-01-02])",
        "estimated start: 2026-11-22 19:20, in 1 h 20 min",
        "sooner: --nodes 3: 3 nodes free now",
    ]


def test_no_advice_that_would_not_help() -> None:
    busy = cluster(node("n0", "ALLOCATED"), node("n1", "ALLOCATED"))
    for reason, nodes, seen in (("JobHeldUser", 9, facts()), ("Resources", 2, busy), ("Priority", 2, cluster(*FREE))):
        lines = explain(reason, run(nodes=nodes), seen, "N/A", NOW)
        assert "sooner" not in " ".join(lines) and "Slurm has no estimate of its start" in lines


def test_fewer_nodes_fit_the_parallel_degrees() -> None:
    spec = run(nodes=9)
    for recipe, most in ((Recipe(), 5), (Recipe(tensor_parallel=16), 4), (Recipe(dp_replicate=3), 3)):
        assert fewer(replace(spec, recipe=recipe), 5) == most
    assert fewer(replace(spec, recipe=Recipe(dp_shard=72)), 5) == fewer(spec, 0) == 0


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("2026-11-22T17:00:00", "estimated start: 2026-11-22 17:00, which is now"),
        ("2026-11-22T19:20:00\n", IN_80_MIN),
        ("2026-11-22T19:20:00+0100", IN_80_MIN),
        ("2026-11-22T19:20:00.5", IN_80_MIN),
        ("slurm: warning: 2026-11-30T00:00:00 is maintenance\n2026-11-22T19:20:00", IN_80_MIN),
        *((text, "Slurm has no estimate of its start") for text in ("N/A", "", "slurm: error", "2026-13-45T99:99:99")),
    ],
)
def test_slurms_estimate(said: str, line: str) -> None:
    assert explain("Resources", None, ClusterFacts(), said, NOW)[-1] == line


def test_blocks_without_room_are_named() -> None:
    states = ("IDLE", "ALLOCATED", "IDLE", "ALLOCATED")
    nodes = [node(f"a{i}", state, gres="gpu:4", gpus=4, arch="aarch64") for i, state in enumerate(states)]
    waits = cluster(*nodes, blocks=RACKS, topology="block")
    lines = explain("Resources", run("gb200", 2, segment=2), waits, "", NOW)
    assert "1 x 2 nodes, each in one block; room now for 0" in lines


def test_status_tells_it(launch: Launch, slurm: Fake, image: Path) -> None:
    script = image.parent / "runs" / "r" / "job.sbatch"
    launch("submit", "--gpu", "b200", "--image", "titan.sqsh", "--name", "r", "--nodes", "9", "--force")
    job = script.read_text().partition("#SBATCH --job-name=")[2].partition("\n")[0]
    answer = 'case "$*" in *--start*) {start};; *) echo "42|PENDING|{job}|{reason}";; esac'
    slurm("squeue", answer.format(start="echo 2036-01-01T10:00:00", job=job, reason="PartitionNodeLimit"))
    said = launch("status", "r").stdout
    assert "PENDING (PartitionNodeLimit" in said and "never starts as it is" in said
    assert "9 nodes requested; partition batch has 4: 4 free" in said
    assert "estimated start: 2036-01-01 10:00, in " in said and "sooner: --nodes 4: 4 nodes free now" in said
    waiting = json.loads(launch("status", "r", "--json").stdout)["waiting"]
    assert waiting[0].startswith("it asks for more nodes")
    slurm("scontrol", "exit 1")
    slurm("squeue", answer.format(start="exit 1", job=job, reason="Priority"))
    done = launch("status", "r")
    assert done.returncode == 0 and "jobs with a higher priority start first" in done.stdout, done.stderr
