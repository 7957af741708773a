"""What Slurm says in part: it is told, and nothing that was not read is held against the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.base.finding import ERROR, OK, WARNING, Check, refusal
from launcher.config.spec import RunSpec
from launcher.nodes.bad_nodes import BadNode, without
from launcher.preflight.checks import preflight
from launcher.preflight.readiness import placed
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts
from tests.cluster_fixtures import CLUSTERS, FakeNode, answering, cluster, install, node_line, partition_line
from tests.conftest import Launch
from tests.unit.test_preflight import PROFILES, found, run
from tests.unit.test_preflight import cluster as values

Fake = Callable[[str, str], Path]
SUBMIT = ("--gpu", "gb200", "--recipe", "debug", "--data", "sample", "--tokenizer", "sample", "--name", "r")
BLOCKS = "".join(
    f"BlockName=rack{b} BlockIndex={b} Nodes=gpu[{18 * b + 1:03d}-{18 * b + 18:03d}] BlockSize=18\n" for b in (0, 1)
)
RACKS = cluster(
    "24.11.5",
    [FakeNode(f"gpu{n:03d}", "IDLE", "gpu:gb200:4(S:0-1)", "aarch64", 144, 870000) for n in range(1, 37)],
    [partition_line("batch", "gpu[001-036]", default=True, max_time="02:00:00")],
    topology=BLOCKS,
    plugin="topology/block",
)
CUT = RACKS | {"nodes": RACKS["nodes"][:3000]}  # the first few, and a part of the next
CUT_AT_A_LINE = RACKS | {"nodes": "".join(RACKS["nodes"].splitlines(keepends=True)[:4])}


def facts_of(answers: Mapping[str, str], *missing: str) -> ClusterFacts:
    kept = {name: text for name, text in answers.items() if name not in missing}
    return detect(answering(kept), lambda path: "")


def looked(spec: RunSpec, facts: ClusterFacts) -> list[Check]:
    return preflight(placed(spec, facts), facts, (), PROFILES)


def statuses(checks: list[Check], name: str) -> set[str]:
    return {check.status for check in checks if check.name == name}


@pytest.mark.parametrize("missing", ["config", "partitions", "topology", "srun"])
def test_every_note_is_a_warning(missing: str) -> None:
    facts = facts_of(RACKS, missing)
    assert facts.unread == (missing,)
    check = found(looked(run("gb200", 9), facts), "cluster")
    assert (check.status, check.what) == (WARNING, facts.notes[0]) and check.fix


def test_whole_answers_have_no_notes() -> None:
    assert facts_of(RACKS).unread == () and statuses(looked(run("gb200", 9), facts_of(RACKS)), "cluster") == set()


@pytest.mark.parametrize("answers", [CUT, CUT_AT_A_LINE], ids=["in a record", "between two"])
def test_nodes_that_could_not_be_read_are_not_missed(answers: Mapping[str, str]) -> None:
    checks = looked(run("gb200", 9, nodelist="gpu010", exclude="gpu011"), facts_of(answers))
    assert ERROR not in {check.status for check in checks}, checks
    nodes = found(checks, "nodes")
    assert (nodes.status, "has 4" in nodes.what, "there may be more" in nodes.why) == (WARNING, True, True)
    assert "whether gpu010 is in service could not be read" in found(checks, "nodelist").what
    assert "1 x 9 nodes, each in one block of up to 18" in found(checks, "placement").what


def test_a_node_that_nothing_lists() -> None:
    spec = run("gb200", 2, exclude="x1")
    assert found(looked(spec, facts_of(CUT)), "exclude").status == WARNING
    assert found(looked(spec, facts_of(RACKS)), "exclude").status == ERROR


@pytest.mark.parametrize(
    "job", [{}, {"partition": "batch"}, {"partition": "other"}, {"nodelist": "gpu001"}, {"time": "9-0"}]
)
def test_unread_partitions_stop_nothing_for_sure(job: dict[str, Any]) -> None:
    facts = facts_of(RACKS, "partitions")
    checks = looked(run("gb200", 2, **job), facts)
    assert refusal(checks, force=False) is None, checks
    assert not any("is up" in check.what for check in checks)


def test_unread_partitions_of_several_names() -> None:
    nodes = [FakeNode("a", partitions="p"), FakeNode("b", partitions="q", arch="aarch64")]
    facts = facts_of(cluster("25.05.3", nodes, []))
    checks = looked(run("h200", 2), facts)
    assert not any(check.certain for check in checks)
    assert "which partition is the default could not be read; there are p, q" in found(checks, "partition").what
    wrong = looked(run("b200", 1, partition="q", nodelist="a"), facts)
    assert refusal(wrong, force=True) is None and refusal(wrong, force=False) is not None


def test_a_partition_record_that_is_cut_off() -> None:
    lines = partition_line("batch", "gpu[001-036]", default=True) + "\n" + partition_line("short", "gpu001")[:300]
    nodes = [FakeNode("gpu001", partitions="batch,short")]
    facts = facts_of(RACKS | {"partitions": lines, "nodes": node_line(nodes[0]) + "\n"})
    assert [(p.name, p.guessed) for p in facts.partitions] == [("batch", False), ("short", True)]
    assert "partitions" in facts.unread


@pytest.mark.parametrize(
    ("missing", "said"),
    [("topology", "topology could not be read"), ("config", "whether Slurm takes --segment could not be read")],
)
def test_a_topology_that_could_not_be_read(missing: str, said: str) -> None:
    facts = facts_of(RACKS, missing)
    check = found(looked(run("gb200", 9), facts), "placement")
    assert (check.status, said in check.what, "scontrol show topology" in check.fix) == (WARNING, True, True)
    assert statuses(looked(run("gb200", 1), facts), "placement") == set()
    assert facts_of(RACKS | {"topology": ""}).unread == ("topology",)


def test_a_repeated_segment_where_no_blocks_could_be_read() -> None:
    origin = {"job.segment": "file /runs/a/run.toml"}
    check = found(looked(run("gb200", 36, origin, segment=18), facts_of(RACKS, "topology")), "placement")
    assert (check.status, check.what) == (WARNING, "--segment 18: topology could not be read")
    own = found(looked(run("gb200", 36, segment=18), facts_of(RACKS, "config")), "placement")
    assert (own.status, "could not be read" in own.what) == (WARNING, True)


def test_show_claims_nothing_of_what_it_guesses(launch: Launch, fake_slurm: Fake) -> None:
    install({name: text for name, text in RACKS.items() if name not in ("partitions", "config")}, fake_slurm)
    shown = " ".join(launch("cluster", "show").stdout.split())
    assert "batch state unknown, limits unknown: 36 nodes" in shown and "no time limit" not in shown
    assert "whether --segment works is unknown" in shown


def test_submit_passes_unread_partitions_with_a_warning(launch: Launch, fake_slurm: Fake, image: Path) -> None:
    install({name: text for name, text in RACKS.items() if name != "partitions"}, fake_slurm)
    fake_slurm("sbatch", "echo 42")
    done = launch("submit", "--image", str(image), *SUBMIT, "--nodes", "2")
    assert done.returncode == 0 and "warning: scontrol -o show partition: scontrol failed" in done.stderr


# ------------------------------------------------------------------------------ nodes that failed their check


def bad(host: str) -> BadNode:
    return BadNode(host, "GPU 2 is dead", "", 0.0, 1e9)


@pytest.mark.parametrize("end", [-20, -60, 40])
def test_a_topology_that_is_cut_off_holds_nothing_against_a_run(end: int) -> None:
    facts = facts_of(RACKS | {"topology": BLOCKS[:end]})
    assert "topology" in facts.unread and any("cut off" in note for note in facts.notes)
    for nodes in (9, 36):
        checks = looked(run("gb200", nodes), facts)
        assert statuses(checks, "blocks") == set() and WARNING in statuses(checks, "cluster")
        assert not any(check.status == ERROR and check.certain for check in checks)


def test_a_bad_node_that_the_partition_lists_is_left_out_though_it_could_not_be_read() -> None:
    spec, checks = without(run("gb200", 2), facts_of(CUT), [bad("gpu020"), bad("x9")], 1.0)
    assert spec.avoid == ("gpu020",)
    warning = next(check for check in checks if check.status == WARNING)
    assert "x9 failed its check lately, and is not left out" in warning.what and "--exclude x9" in warning.fix
    _, silent = without(run("gb200", 2), ClusterFacts(unread=("nodes",)), [bad("gpu020")], 1.0)
    assert statuses(silent, "excluded") == {WARNING}
    _, whole = without(run("gb200", 2), facts_of(RACKS), [bad("x9")], 1.0)
    assert whole == [], "Slurm has no such node any more"


@pytest.mark.parametrize("clusters", [("crusoe",), ()])
def test_a_cluster_without_a_name_leaves_nothing_out_and_says_so(
    clusters: tuple[str, ...], launch: Launch, fake_slurm: Fake, image: Path
) -> None:
    """Whose nodes those are is not guessed."""
    install(RACKS | {"config": RACKS["config"].replace("crusoe", "(null)")}, fake_slurm)
    fake_slurm("sbatch", "echo 42")
    memory = image.parent / "home" / ".config" / "titan-launcher" / "nodes.json"
    memory.parent.mkdir(parents=True)
    entry = {"host": "gpu003", "reason": "dead", "run": "", "at": time.time(), "until": time.time() + 1000}
    memory.write_text(json.dumps({"schema": 1, "clusters": {name: [entry] for name in clusters}}))
    done = launch("submit", "--image", str(image), *SUBMIT, "--nodes", "2")
    assert done.returncode == 0, done.stderr
    assert "--exclude" not in (image.parent / "runs" / "r" / "job.sbatch").read_text()
    assert ("none is left out of those that failed their check: gpu003" in done.stderr) is bool(clusters)


# ------------------------------------------------------------------------------ odd answers


def test_a_boot_time_that_is_no_time() -> None:
    node = FakeNode("gpu1", booted="2026-13-45T99:99:99")
    facts = facts_of(cluster("25.05.3", [node], [partition_line("batch", "gpu1", default=True)]))
    assert facts.nodes[0].booted == ""


def test_ctrl_c_while_slurm_hangs(workplace: Path, fake_slurm: Fake) -> None:
    for command in ("scontrol", "srun"):
        fake_slurm(command, f"echo $$ >>{workplace}/asked; exec sleep 60")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "cluster", "show"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(300):
            if (workplace / "asked").exists() and len((workplace / "asked").read_text().split()) == 5:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # to the launcher alone, as a supervisor does
        since = time.monotonic()
        process.wait(timeout=20)
        assert time.monotonic() - since < 10
        assert process.returncode != 0 and "Traceback" not in (process.stderr.read() if process.stderr else "")
    finally:
        for pid in (workplace / "asked").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_limits_are_read() -> None:
    line = partition_line("p", "n1").replace("AllowGroups=ALL", "AllowGroups=a,b").replace("MinNodes=0", "MinNodes=4")
    line = line.replace("RootOnly=NO ReqResv=NO", "RootOnly=YES ReqResv=YES")
    node = node_line(FakeNode("n1")).replace("TmpDisk=0", "TmpDisk=7000000")
    facts = facts_of({**CLUSTERS["terraform-25.05"], "partitions": f"{line}\n", "nodes": f"{node}\n"})
    (p,) = facts.partitions
    assert (p.groups, p.min_nodes, p.root_only, p.needs_reservation) == (("a", "b"), 4, True, True)
    assert facts.nodes[0].tmp_mib == 7_000_000
    (usual, *_) = facts_of(RACKS).partitions
    assert (usual.groups, usual.min_nodes, usual.root_only, usual.needs_reservation) == ((), 0, False, False)


def test_sure_is_only_what_was_read_whole() -> None:
    """Nodes of another architecture cannot work; where others may be there, --force goes on."""
    facts = values(*(replace(n, arch="x86_64") for n in facts_of(CUT).nodes), unread=("nodes",))
    check = found(preflight(run("gb200", 2), facts), "architecture")
    assert (check.status, check.certain) == (ERROR, False)
    assert found(preflight(run("gb200", 2), replace(facts, unread=())), "architecture").certain
    assert found(preflight(run("gb200", 2), facts), "Pyxis").status == OK
