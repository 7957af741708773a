"""What Slurm does not say, or only in part: one warning, and no check that needs it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from launcher.base.finding import ERROR, WARNING, Finding
from launcher.config.spec import PlacedRun
from launcher.nodes.bad_nodes import BadNode, without
from launcher.preflight.cluster import preflight
from launcher.preflight.placement import with_segment
from launcher.preflight.text import sentence
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts
from tests.cluster_fixtures import FakeNode, answering, cluster, install, partition_line
from tests.conftest import Launch, forked
from tests.unit.test_preflight import codes, found, run

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
BATCH, SHORT = partition_line("batch", "gpu[001-036]", default=True), partition_line("short", "gpu001")
HALVES = {
    "nodes, cut in a record": ("nodes", RACKS["nodes"][:3000]),
    "nodes, no answer": ("nodes", None),
    "partitions, cut off": ("partitions", f"{BATCH}\n{SHORT[:300]}"),
    "partitions, a record cut off": ("partitions", f"{BATCH}\nPartitionName=short AllowGroups=ALL\n"),
    "partitions, nothing": ("partitions", ""),
    "partitions, no answer": ("partitions", None),
    "topology, cut in a word": ("topology", BLOCKS[:-20]),
    "topology, cut in a list": ("topology", BLOCKS[:-60]),
    "topology, one block": ("topology", BLOCKS[:40]),
    "topology, nothing": ("topology", ""),
    "topology, no answer": ("topology", None),
    "config, nothing": ("config", ""),
    "config, no answer": ("config", None),
    "srun, no answer": ("srun", None),
}
CHECKED = {  # what is found of a run that fits, and the answers that it needs
    "partition": {"partitions"},
    "time": {"partitions"},
    "gpus": {"nodes", "partitions"},
    "nodes": {"nodes", "partitions"},
    "architecture": {"nodes", "partitions"},
    "pyxis": {"srun"},
    "segment": {"config", "nodes", "partitions", "topology"},
}


def facts_of(answers: Mapping[str, str | None]) -> ClusterFacts:
    return detect(answering({name: text for name, text in answers.items() if text is not None}), lambda path: "")


def looked(spec: PlacedRun, facts: ClusterFacts) -> list[Finding]:
    return preflight(with_segment(spec, facts), facts)


@pytest.mark.parametrize(("question", "answer"), HALVES.values(), ids=HALVES)
def test_an_answer_that_is_not_whole_is_one_warning_and_no_check(question: str, answer: str | None) -> None:
    """Whatever the run asks for, nothing is held against it: not nodes, limits or blocks that were not read."""
    facts = facts_of(RACKS | {question: answer})
    assert list(facts.unread) == [question]
    findings = looked(run("gb200", 9), facts)
    warned = found(findings, "cluster-unread")
    assert sentence(warned).startswith(f"{facts.unread[question]}: not checked: ") and warned.fix
    assert set(codes(findings)) == {"cluster-unread"} | {
        code for code, needed in CHECKED.items() if question not in needed
    }
    if question in ("nodes", "partitions"):
        time = "9-0" if question == "partitions" else "1:00:00"
        odd_runs = (run("gb200", 99, nodelist="x1"), run("h200", exclude="x2", time=time), run("gb200", 2, segment=30))
        for odd in odd_runs:
            assert codes(looked(odd, facts), ERROR) == []


def test_nodes_that_slurm_does_not_show_are_not_missed() -> None:
    """Cloud nodes that are powered down: their partition lists them, and a job wakes them."""
    facts = facts_of(RACKS | {"nodes": "".join(RACKS["nodes"].splitlines(keepends=True)[:4])})
    findings = looked(run("gb200", 9, nodelist="gpu010", exclude="gpu011"), facts)
    assert facts.unread == {} and codes(findings, ERROR) == []
    assert sentence(found(findings, "nodes-not-yet")).startswith("--nodes 9: partition batch has 4, without those of")
    assert "1 x 9 nodes" in sentence(found(findings, "segment"))
    assert not found(looked(run("h200"), facts), "gpus-absent").certain
    assert codes(looked(run("gb200", 2, exclude="x1"), facts), ERROR) == ["node-unknown"]
    assert without(run("gb200"), facts, [bad("gpu020")], 1.0)[0].avoid == ("gpu020",)


def test_whole_answers_are_all_checked() -> None:
    assert facts_of(RACKS).unread == {} and codes(looked(run("gb200", 9), facts_of(RACKS))) == list(CHECKED)


def test_a_partition_that_is_not_read_is_not_looked_for() -> None:
    facts = facts_of(RACKS | {"partitions": None})
    assert facts.require("other") is facts and codes(looked(run("gb200", 2, partition="other"), facts), ERROR) == []
    assert [node.name for node in facts.nodes_of("batch")] == [node.name for node in facts.nodes]


def test_no_segment_is_chosen_without_the_blocks_and_the_users_own_stays() -> None:
    for question in ("config", "topology", "nodes", "partitions"):
        facts = facts_of(RACKS | {question: None})
        assert with_segment(run("gb200", 36), facts).segment == 0
        assert with_segment(run("gb200", 36, segment=18), facts).segment == 18


def test_submit_passes_unread_answers_with_one_warning(launch: Launch, fake_slurm: Fake, image: Path) -> None:
    fake_slurm("sbatch", "echo 42")
    for missing, said in (
        ({"partitions"}, "scontrol -o show partition: scontrol failed"),
        (RACKS.keys(), "Slurm's nod"),
    ):
        install({name: text for name, text in RACKS.items() if name not in missing}, fake_slurm)
        done = launch("submit", "--image", str(image), *SUBMIT, f"--name=r{len(missing)}", "--nodes", "2")
        assert done.returncode == 0 and done.stderr.count("warning: ") == 1, done.stderr
        assert f"warning: {said}" in done.stderr


# ------------------------------------------------------------------------------ nodes that failed their check


def bad(host: str) -> BadNode:
    return BadNode(host, "GPU 2 is dead", "", 0.0, 1e9)


def test_a_bad_node_is_not_left_out_where_slurm_does_not_say_which_nodes_it_has() -> None:
    """Slurm refuses a job that excludes a node which it does not know."""
    spec, (finding,) = without(run("gb200", 2), facts_of(CUT), [bad("gpu020"), bad("x9")], 1.0)
    assert spec.avoid == () and finding.status == WARNING
    assert "(gpu020, x9)" in sentence(finding)
    assert "--exclude gpu020,x9" in finding.fix
    assert without(run("gb200", 2), facts_of(CUT), [], 1.0)[1] == []
    assert without(run("gb200", 2), facts_of(RACKS), [bad("x9")], 1.0)[1] == [], "Slurm has no such node any more"


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
    assert ("Slurm does not say its cluster's name (gpu003)" in done.stderr) is bool(clusters)


def test_ctrl_c_while_slurm_hangs(workplace: Path, fake_slurm: Fake) -> None:
    for command in ("scontrol", "srun"):
        fake_slurm(command, f"echo $$ >>{workplace}/asked; exec sleep 60")
    asked = workplace / "asked"
    process = forked("cluster", "show")
    try:
        while not (asked.exists() and len(asked.read_text().split()) == 5) and process.running():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)  # to the launcher alone, as a supervisor does
        done = process.end()
        assert done.returncode == ExitStatus.INTERRUPTED and "Traceback" not in done.stderr
    finally:
        for pid in asked.read_text().split():
            with suppress(ProcessLookupError):  # it goes on only where the launcher did not wait for it
                os.kill(int(pid), signal.SIGKILL)
