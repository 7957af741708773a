"""Which segment a job gets, and what the user is told where no segment keeps it in few NVLink domains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.base.finding import OK, WARNING, Finding
from launcher.config.render import render
from launcher.config.spec import PlacedRun
from launcher.config.write import run_toml
from launcher.preflight.cluster import preflight
from launcher.preflight.placement import best_segment, describe, segment_of, with_segment
from launcher.preflight.text import sentence, words
from launcher.scheduler.facts import Block, ClusterFacts, Partition, Topology
from tests.unit.test_preflight import cluster as a_cluster
from tests.unit.test_preflight import node
from tests.unit.test_preflight import run as a_run

RACKS = tuple(Block(f"rack-{r}", tuple(f"r{r}n{i:02d}" for i in range(18))) for r in range(1, 4))


def cluster(*busy: str, blocks: tuple[Block, ...] = RACKS, **values: object) -> ClusterFacts:
    """Three racks of GB200 in one partition; `busy` nodes are drained."""
    kind: dict[str, Any] = {"gres": "gpu:4", "gpus": 4, "arch": "aarch64"}
    names = [name for block in RACKS for name in block.nodes]
    nodes = (node(name, "IDLE+DRAIN" if name in busy else "IDLE", **kind) for name in names)
    known = {"slurm": (25, 11), "topology": "block", "partitions": (Partition("batch", True, "UP"),)}
    return a_cluster(*nodes, blocks=blocks, **(known | values))


def run(nodes: int, gpu: str = "gb200", segment: int = 0) -> PlacedRun:
    return a_run(gpu, nodes, segment=segment)


EXPECTED = {1: 1, 2: 2, 9: 9, 17: 17, 18: 18, 19: 1, 20: 10, 22: 11, 34: 17, 36: 18, 37: 1, 38: 2, 54: 18, 53: 1}


def test_the_largest_divisor_within_a_block_with_blocks_enough_for_all_pieces() -> None:
    assert {nodes: segment_of(nodes, [18] * 3) for nodes in EXPECTED} == EXPECTED
    assert segment_of(36, [18, 17, 17]) == 12  # two pieces of 18 would need two whole racks
    assert segment_of(36, [18]) == 1
    assert segment_of(4, []) == 1


def test_what_is_drained_is_not_counted_on_unless_nothing_else_is_left() -> None:
    facts = cluster("r1n00", "r2n00")
    assert with_segment(run(36), facts).segment == 12
    assert with_segment(run(34), facts).segment == 17
    assert with_segment(run(18), facts).segment == 18  # the third rack is whole
    every = cluster("r1n00", "r2n00", "r3n00")
    assert with_segment(run(17), every).segment == 17
    assert with_segment(run(18), every).segment == 9


def test_it_is_in_the_script_and_is_not_what_was_asked() -> None:
    spec = with_segment(run(36), cluster())
    assert "#SBATCH --segment=18\n" in render(spec)
    assert spec.job.segment == 0 and "\nsegment = 18\n" in run_toml(spec)


NEVER = {
    "Slurm does not know it": (run(36), cluster(slurm=(23, 2))),
    "no blocks": (run(36), cluster(blocks=())),
    "empty blocks": (run(36), cluster(blocks=(Block("rack-1"), Block("rack-2")))),
    "no NVLink over nodes": (run(2, gpu="h200"), cluster()),
    "one node": (run(1), cluster()),
}


@pytest.mark.parametrize(("spec", "facts"), NEVER.values(), ids=NEVER)
def test_never_where_it_means_nothing(spec: PlacedRun, facts: ClusterFacts) -> None:
    assert "--segment" not in render(with_segment(spec, facts))


def test_the_users_own_wins() -> None:
    assert with_segment(run(36, segment=6), cluster()).segment == 6
    assert with_segment(run(36, "h200", segment=6), cluster(slurm=None)).segment == 6


def test_only_the_blocks_of_the_partition_count() -> None:
    facts = cluster()
    few = tuple(replace(n, partitions=("few",)) if n.name < "r1n04" else n for n in facts.nodes)
    facts = replace(facts, nodes=few, partitions=(Partition("few", True, "UP"),))
    assert with_segment(run(4), facts).segment == 4
    assert with_segment(run(5), facts).segment == 1


def check_of(spec: PlacedRun, facts: ClusterFacts) -> Finding:
    (finding,) = [f for f in preflight(with_segment(spec, facts), facts) if words(f).name == "placement"]
    return finding


ROOM = "1 x 17 nodes, each in one block; room now for 1: rack-1 (18 free), rack-2 (18 free), rack-3 (18 free)"


def test_what_the_user_is_told() -> None:
    told = ((17, OK, ROOM), (36, OK, "2 x 18 nodes"), *((n, WARNING, "--nodes 18, or a multiple") for n in (19, 37)))
    for nodes, status, said in told:
        finding = check_of(run(nodes), cluster())
        assert (finding.status, said in sentence(finding)) == (status, True), finding


def test_room_now() -> None:
    found = describe(36, 18, RACKS, {*RACKS[0].nodes, *RACKS[1].nodes[:17]})
    assert found.facts == {"pieces": 2, "segment": 18, "starting": 1, "room": ("rack-1 (18 free)",)}
    assert describe(36, 18, RACKS).facts == {"pieces": 2, "segment": 18, "starting": 0, "room": ()}


UNEVEN = [Block("big", tuple(f"b{i}" for i in range(18)))]
UNEVEN += [Block(f"s{r}", tuple(f"s{r}n{i}" for i in range(16))) for r in range(10)]


def test_the_fewest_domains_of_uneven_blocks() -> None:
    """160 nodes need ten of 18 + 10 x 16, and get ten."""
    found = describe(160, best_segment(160, UNEVEN), UNEVEN)
    assert (found.segment, found.pieces, found.fewest) == (16, 10, 10)
    assert describe(18, best_segment(18, UNEVEN), UNEVEN).fewest == 1
    found = describe(170, best_segment(170, UNEVEN), UNEVEN)
    assert found.pieces > found.fewest


def test_a_segment_that_straddles_says_why() -> None:
    lost = ("r1n00", "r2n00", "r3n00")
    finding = check_of(run(18), cluster(*lost))
    assert (finding.code, finding.status, finding.facts["lost"]) == ("segment-straddles", WARNING, lost)
    assert "; out of service: r1n00, r2n00, r3n00" in sentence(finding)
    smaller = check_of(run(36, segment=6), cluster())
    assert (smaller.code, smaller.status, smaller.fix) == ("segment-straddles", WARNING, "--segment 18")


def test_racks_that_slurm_does_not_know() -> None:
    for nodes, topology, status, said in (
        (18, "flat", OK, "Slurm does not know the racks (topology flat)"),
        (19, "flat", WARNING, "the job may straddle NVLink domains"),
        (37, "tree", WARNING, "37 nodes need at least 3"),
    ):
        facts = cluster(blocks=(), topology=topology)
        finding = check_of(run(nodes), facts)
        assert (finding.status, said in sentence(finding)) == (status, True), finding
        assert status == OK or finding.fix == "an administrator enables topology/block"
        others = (run(1), run(nodes, "h200"))
        assert not [f for spec in others for f in preflight(spec, facts) if words(f).name == "placement"]


def test_the_blocks_of_the_partitions_own_topology() -> None:
    own = Partition("batch", True, "UP", topology="nvl")
    facts = replace(cluster(blocks=(), topology="tree"), partitions=(own,))
    facts = replace(facts, topologies={"nvl": Topology("block", RACKS)})
    assert with_segment(run(36), facts).segment == 18
    assert "segment" in [finding.code for finding in preflight(with_segment(run(36), facts), facts)]
    unread = replace(facts, topologies={"nvl": Topology(unread="scontrol -o show topology nvl: silent")})
    assert with_segment(run(36), unread).segment == 0
    assert "cluster-unread" in [finding.code for finding in preflight(run(36), unread)]
