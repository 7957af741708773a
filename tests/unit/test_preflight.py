"""Every check before a run queues: what provokes it, how serious it is, and what it tells the user to type."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import pytest

from launcher.base.errors import ExitStatus
from launcher.base.finding import ERROR, OK, WARNING, Finding, error, impossible, warning
from launcher.config.layers import find, merge, read_layer
from launcher.config.resolve import placed
from launcher.config.spec import PlacedRun
from launcher.preflight.cluster import preflight
from launcher.preflight.here import files
from launcher.preflight.placement import with_gpu_memory
from launcher.preflight.text import TEXTS, as_dict, refusal, sentence
from launcher.scheduler.facts import Block, ClusterFacts, Node, Partition
from tests.conftest import ROOT, Launch

Fake = Callable[[str, str], Path]
PYXIS = ("--container-image", "--container-mounts")


def node(name: str, states: str = "IDLE", **values: Any) -> Node:
    known: dict[str, Any] = {"partitions": ("batch",), "gres": "gpu:8", "gpus": 8, "arch": "x86_64", "cpus": 176}
    return Node(name, frozenset(states.split("+")), **{**known, **values})


def cluster(*nodes: Node, **values: Any) -> ClusterFacts:
    both = (Partition("batch", True, "UP"), Partition("small", False, "UP", 300, 1))
    known: dict[str, Any] = {"slurm": (25, 5), "pyxis_options": PYXIS, "topology": "tree", "partitions": both}
    return ClusterFacts(nodes=nodes, **{**known, **values})


def batch(**values: Any) -> ClusterFacts:
    """Four nodes in a partition of one's own making."""
    known: dict[str, Any] = {"default": True, "state": "UP", **values}
    return cluster(*FOUR, partitions=(Partition("batch", **known),))


def run(gpu: str = "h200", nodes: int = 2, origin: dict[str, str] | None = None, **job: Any) -> PlacedRun:
    spec = merge([read_layer(find("profiles", gpu), "profile")])
    known: dict[str, Any] = {"name": "r", "gpu": gpu, "image": "/i.sqsh", "nodes": nodes, **job}
    return placed(replace(spec, job=replace(spec.job, **known), origin={**spec.origin, **(origin or {})}))


def profile(spec: PlacedRun, **values: Any) -> PlacedRun:
    return replace(spec, profile=replace(spec.profile, **values))


def four(**values: Any) -> ClusterFacts:
    return cluster(*(replace(node, **values) for node in FOUR))


def codes(findings: list[Finding], *statuses: str) -> list[str]:
    return [finding.code for finding in findings if not statuses or finding.status in statuses]


def found(findings: list[Finding], code: str) -> Finding:
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, codes(findings)
    return matching[0]


FOUR = tuple(node(f"n{i}") for i in range(4))
ARM64 = node("arm", arch="aarch64")
SILENT = ClusterFacts(unread={"nodes": "scontrol did not answer"})
DYNAMIC = tuple(node(f"d{i}", "IDLE+DYNAMIC_NORM") for i in range(2))
BROKEN = node("bad", "IDLE+DRAIN", reason="GPU 3 [fell off] the bus [root@2026-01-02T03:04:05]")
ARM = tuple(node(f"a{i}", arch="aarch64", gres="gpu:gb200:4(S:0-1)", gpus=4) for i in range(4))
RACKS = (Block("rack-1", ("a0", "a1")), Block("rack-2", ("a2", "a3")))


def racks(*blocks: Block) -> ClusterFacts:
    return cluster(*ARM, topology="block", blocks=blocks or RACKS)


def plus(one: Node) -> ClusterFacts:
    return cluster(*FOUR, one)


class Case(NamedTuple):
    code: str
    spec: PlacedRun
    facts: ClusterFacts
    said: str  # part of what the user reads
    fix: str = ""


BLOCKLESS = racks(Block("rack-1", ("a0",)), Block("rack-2"))
TYPED = profile(run(), gres="gpu:h200")
TWO_OF_H200 = cluster(node("n", gres="gpu:h200:8(S:0-1),nvme:2"), node("m", gres="gpu:h200:8"))
BUSY = cluster(node("n0"), node("n1", "ALLOCATED"))
DOWN, KEPT = node("bad", "DOWN+NOT_RESPONDING"), node("kept", "IDLE+RESERVED")
LONG = run(partition="small", time="10")
SEGMENT_2, SEGMENT_4 = (run("gb200", 4, segment=size) for size in (2, 4))
RESERVED = cluster(*(node(f"n{i}", "IDLE+RESERVED") for i in range(2)))
TWO = cluster(*FOUR, partitions=(Partition("a"), Partition("b")))
SMALL = replace(run("a100"), gpu_gib=39.4)
LIMITED = (Partition("batch", True, "UP", 86400), Partition("small", False, "UP", 300))
CASES = {
    OK: [
        Case("partition", run(partition="small,batch", time="10"), four(), "small"),
        Case("nodes", run(nodes=4), plus(BROKEN), "has 5, 4 of them in service, 4 of them free now"),
        Case("nodes", run(nodes=5), plus(BROKEN), "5 requested; partition batch has 5, 4 of them in service"),
        Case("nodes-busy", run(), BUSY, "waits for others"),
        Case("node-states", run(nodes=4), plus(BROKEN), "bad is drained"),
        Case("gpus", TYPED, TWO_OF_H200, "gpu:h200:8 on 2 nodes"),
        Case("segment", SEGMENT_2, racks(), "2 x 2 nodes, each in one block; room now for 2: rack-1 (2"),
    ],
    WARNING: [
        Case("partition-closed", run(), batch(state="DOWN"), "DOWN", "sinfo -s"),
        Case("nodes-not-yet", run(nodes=9), cluster(*DYNAMIC), "has 2: the job waits", "--nodes 2"),
        Case("nodes-out-of-service", run(nodes=5), plus(BROKEN), "4 in service: bad is drained (GPU 3 [", "--nodes 4"),
        Case("nodes-out-of-service", run(nodes=5), plus(DOWN), "bad is down", "sinfo -R"),
        Case("nodes-out-of-service", run(nodes=5), plus(KEPT), "kept is reserved", "scontrol show reserv"),
        Case("nodelist-out", run(nodelist="n0,bad"), plus(BROKEN), "bad is drained", "--nodelist"),
        Case("gpus-idle", run("gb200"), four(arch="aarch64"), "uses 4 GPUs per node, but n0 has 8", "--gpus-per-node"),
        Case("gpu-type", run("b200"), four(gres="gpu:h200:8"), "for B200, but Slurm reports h200", "--gpu h200"),
        Case("gpu-type", run("b200"), four(features=("H100",)), "h100", "--gpu h100"),
        Case("gpu-memory", SMALL, four(gres="gpu:a100_40gb:8"), "in Slurm say 39.4 (gpu:a100_40gb:8)", "launcher plan"),
        Case("architecture-other", run("gb200", runtime="bare"), four(), "x86_64", "--gpu"),
        Case("nodes-not-yet", run(), cluster(), "has 0: the job waits until more nodes come up", "sinfo -s"),
        Case("architecture-other", run(), plus(ARM64), "4 of x86_64, 1 of aarch64", "--exclude"),
        Case("segment-straddles", run("gb200", 3, segment=1), racks(), "3 x 1 nodes", "--nodes 2, or a multiple"),
        Case("cluster-silent", run(), SILENT, "about them was checked: scontrol did not answer", "scontrol ping"),
        Case("nodes-out-of-service", run(), RESERVED, "n0 is reserved", "scontrol show reservation"),
    ],
    ERROR: [
        Case("partition-unknown", run(partition="gpu"), four(), "it has batch, small", "--partition batch"),
        Case("partition-not-named", run(), TWO, "the cluster has no default", "--partition a"),
        Case("partition-closed", run(), batch(state="INACTIVE"), "INACTIVE", "sinfo -s"),
        Case("time-limit", LONG, four(), "above the limit of partition small, 00:05:00", "--time 00:05:00"),
        Case("time-limit", run(time="1-12"), batch(max_time_s=86400), "1-00:00:00", "--time 1-00:00:00"),
        Case("job-too-large", run(partition="small"), four(), "allows at most 1 node per job", "--nodes 1"),
        Case("job-too-small", run(), batch(min_nodes=3), "needs at least 3 nodes per job", "--nodes 3"),
        Case("nodes-too-few", run(nodes=9), four(), "has 4: the job would wait for ever", "--nodes 4"),
        Case("nodes-too-few", run(nodes=4, exclude="n[0-1]"), four(), "has 2, without those of --exclude", "--nodes 2"),
        Case("nodes-too-few", run(nodes=3), cluster(*FOUR[:2], *ARM), "has 2 with gpu:8", "--nodes 2"),
        Case("node-unknown", run(nodelist="n[0-1],x7"), four(), "--nodelist n[0-1],x7: Slurm has no node x7", "sinfo"),
        Case("node-unknown", run(exclude="x[1-3]"), four(), "no node x1, x2, x3: it has n0, n1, n2 and 1", "sinfo"),
        Case("nodelist-too-long", run(nodes=1, nodelist="n[0-2]"), four(), "names 3 nodes", "--nodes 3"),
        Case("gpus-absent", run(), cluster(*ARM), "gpu:8 per node, but no node of partition batch has", "--gpus-per-"),
        Case("gpus-absent", run(), cluster(*ARM), "has that: 4 with 4 of gpu", "--gpus-per-node 4"),
        Case("gpus-absent", run(), cluster(node("c", gres="", gpus=0)), "1 with no GPUs", "--partition"),
        Case("gpus-absent", TYPED, cluster(*ARM), "gpu:h200:8", "--gpu NAME"),
        Case("architecture-other", run("gb200"), four(), "for aarch64, but partition batch has 4 of x86_64", "--set"),
        Case("pyxis-absent", run(), cluster(*FOUR, pyxis_options=()), "no --container-image", "--runtime apptainer"),
        Case("segment-unsupported", run(segment=2), four(), "Slurm 25.05, topology tree", "--segment 0"),
        Case("segment-above-block", SEGMENT_4, racks(), "largest block has 2 nodes", "--segment 2"),
        Case("nodes-in-no-block", run("gb200", 2), BLOCKLESS, "3 nodes of partition batch are in no block", "scontrol"),
        Case("nodes-in-no-block", run("gb200", 2), BLOCKLESS, "topology: a1, a2, a3", "topology.yaml"),
        Case("nodes-in-no-block", run("gb200", 2), BLOCKLESS, "is not available; no nodes in rack-2", "reconfigure"),
    ],
}


@pytest.mark.parametrize(
    ("status", "case"), [pytest.param(key, one, id=one.code) for key, cases in CASES.items() for one in cases]
)
def test_what_is_found(status: str, case: Case) -> None:
    finding = found(preflight(case.spec, case.facts), case.code)
    assert finding.status == status
    assert case.said in sentence(finding) and case.fix in finding.fix, sentence(finding)
    assert status == OK or finding.fix, "a finding without a way out"
    assert as_dict(finding).keys() == {"name", "status", "what", "why", "fix", "certain", "code", "facts"}


def test_every_code_is_used_and_in_the_docs() -> None:
    rooms = (ROOT / "launcher" / name for name in ("preflight", "nodes", "plan"))
    code = "".join(path.read_text() for room in rooms for path in room.glob("*.py") if path.name != "text.py")
    docs = (ROOT / "docs" / "preflight.md").read_text()
    named = [name for name in TEXTS if f'"{name}"' in code or name.endswith("-refused")]
    assert [name for name in TEXTS if name not in named or f"`{name}`" not in docs] == []


CHOSEN = profile(run(origin={"profile.gpus_per_node": "option --gpus-per-node"}), gpus_per_node=2)
GOOD = {
    "a run that fits": (run(), four()),
    "on CPUs": (run("cpu", runtime="bare"), four()),
    "one cloud names GB200 B200": (run("gb200"), four(arch="aarch64", gres="gpu:b200:4", gpus=4)),
    "nodes of its own reservation": (run(reservation="mine"), RESERVED),
    "fewer GPUs by the user's choice": (CHOSEN, four()),
    "the longest of two limits": (run(partition="small,batch", time="10"), cluster(*FOUR, partitions=LIMITED)),
}


@pytest.mark.parametrize(("spec", "facts"), GOOD.values(), ids=GOOD)
def test_nothing_is_held_against(spec: PlacedRun, facts: ClusterFacts) -> None:
    assert codes(preflight(spec, facts), WARNING, ERROR) == []


def test_only_what_is_sure_stops_force() -> None:
    """Where nodes come and go, others may register."""
    for states, certain in (("IDLE", True), ("IDLE+DYNAMIC_NORM", False)):
        facts = replace(racks(), nodes=tuple(replace(node, states=frozenset(states.split("+"))) for node in ARM))
        assert found(preflight(run(nodes=2), facts), "gpus-absent").certain is certain  # no node has eight
        assert found(preflight(run("gb200", 4, segment=4), facts), "segment-above-block").certain is certain
    assert found(preflight(run("gb200"), four()), "architecture-other").certain
    assert found(preflight(run(segment=2), cluster(*FOUR, slurm=(22, 5))), "segment-unsupported").certain


def test_an_image_that_does_not_fit_the_nodes_disk() -> None:
    said = "unpacks to 30.0 GiB, but Slurm reports TmpDisk=20000 MiB for n0, n1, n2 and 1 more"
    sizes = ((20_000, False, said), (20_000, None, said), (20_000, True, ""), (0, False, ""), (40_000, False, ""))
    for tmp_mib, squashfuse, words in sizes:
        findings = preflight(run(), replace(four(tmp_mib=tmp_mib), squashfuse=squashfuse), unpacked_bytes=30 << 30)
        assert codes(findings, WARNING) == ["disk-small"] * bool(words)
        assert not words or words in sentence(found(findings, "disk-small"))


def test_mounts_whose_source_is_not_here() -> None:
    """The profile's may be on the compute nodes alone, as on most clusters: no word with every submission."""
    own = run(mounts=("/nowhere/x:/x", "/nowhere/a 'b'; rm:/y"))
    first, odd, theirs = files(profile(own, mounts=("/nowhere/p:/p",)))[-3:]
    assert first.status == WARNING and sentence(first).startswith("--mount /nowhere/x: not on this machine")
    assert shlex.split(odd.fix) == ["ls", "-ld", "/nowhere/a 'b'; rm"]
    assert theirs.status == OK and sentence(theirs).startswith("/nowhere/p, which profile h200 mounts, is not on this")
    assert "--set 'profile.mounts=[]'" in theirs.fix


def test_what_stops_a_submission() -> None:
    unknown = error("partition-unknown", partition="x", known="y")
    for findings, force, status in (
        ([], False, None),
        ([warning("pyxis-absent")], False, None),
        ([error("pyxis-absent")], False, ExitStatus.INVALID),
        ([error("pyxis-absent")], True, None),
        ([impossible("pyxis-absent")], True, ExitStatus.INVALID),
        ([unknown], False, ExitStatus.NOT_FOUND),
    ):
        refused = refusal(findings, force)
        assert (refused and refused.status) == status


def test_the_refusal_names_all_errors_and_offers_force_only_where_it_helps() -> None:
    may_wait, cannot = error("path-absent-here", "f", path="p"), impossible("nodelist-too-long", count=2, asked=1)
    both = refusal([may_wait, cannot], False)
    assert both and both.what.startswith("--nodelist names 2 nodes") and "--force" not in both.fix
    assert both.original == "files: p is not on this machine; f"
    one = refusal([may_wait], False)
    assert one and one.fix == "f; --force submits it anyway"


NAMED = (
    ("a100", {"gres": "gpu:a100:8"}, 0),
    ("a100", {"gres": "gpu:nvidia_a100-sxm4-80gb:8"}, 0),  # the profile's own
    ("a100", {"gres": "gpu:nvidia_a100-sxm4-40gb:8"}, 39.4),
    ("a100", {"gres": "gpu:a100_1g.10gb:8"}, 9.85),
    ("a100", {"features": ("A100-40GB", "ssd960gb")}, 39.4),
    ("a100", {"features": ("64gb",)}, 0),  # not of a GPU
    ("gb200", {"gres": "gpu:gb200:4", "arch": "aarch64"}, 0),
    ("gb200", {"gres": "gpu:gb200-186gb:4", "arch": "aarch64"}, 0),
    ("h200", {"gres": "gpu:h200-141gb:8"}, 0),
)


def test_the_memory_that_slurm_names() -> None:
    for gpu, seen, gib in NAMED:
        assert with_gpu_memory(run(gpu), four(**seen)).gpu_gib == pytest.approx(gib), seen


def test_the_features_of_a_constraint_choose_the_nodes() -> None:
    small, big = ("a100_40gb", "ib"), ("a100_80gb", "ib")
    mixed = cluster(*(node(f"n{i}", features=small if i else big) for i in range(4)))
    only_big = run("a100", 1, constraint="a100_80gb&ib")
    assert with_gpu_memory(run("a100", 1), mixed).gpu_gib == pytest.approx(39.4)
    assert with_gpu_memory(only_big, mixed).gpu_gib == 0
    assert found(preflight(only_big, mixed), "nodes").facts["there"] == 1
    none = found(preflight(run("a100", 1, constraint="eth"), mixed), "nodes-too-few")
    assert "those that lack --constraint eth" in sentence(none)
    assert found(preflight(run("a100", 1, constraint="[ib|eth]"), mixed), "nodes").facts["there"] == 4


# ------------------------------------------------------------------------------ the commands, on a Slurm of scripts

NODES = "\n".join(
    f"NodeName=n{i} Arch=x86_64 CPUTot=176 Gres=gpu:8 State=IDLE RealMemory=16000 Partitions=batch" for i in range(4)
)
PARTITIONS = "PartitionName=batch Default=YES MaxNodes=UNLIMITED MaxTime=02:00:00 Nodes=n[0-3] State=UP"
SCONTROL = f"""
case "$*" in
*node*) cat <<'X'
{NODES}
X
;;
*partition*) echo '{PARTITIONS}';;
*config*) echo 'SLURM_VERSION           = 25.05.1';;
*) exit 1;;
esac
"""
SUBMIT = ("--gpu", "b200", "--image", "titan.sqsh", "--data", "sample", "--name", "r")


@pytest.fixture
def slurm(fake_slurm: Fake, image: Path) -> Fake:
    fake_slurm("scontrol", SCONTROL)
    fake_slurm("srun", "echo '      --container-image=[USER@]REGISTRY#IMAGE|PATH'")
    fake_slurm("sbatch", f'echo "$@" >>{image.parent}/sbatch.txt; echo 42')
    return fake_slurm


def test_a_batch_for_80_gb_does_not_fit_40(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", SCONTROL.replace("Gres=gpu:8", "Gres=gpu:a100_40gb:8"))
    a100 = ("--gpu", "a100", *SUBMIT[2:], "--nodes", "2")
    for command in ("submit", "preflight", "sweep"):
        done = launch(command, *a100)
        assert done.returncode == ExitStatus.INVALID, done.stdout + done.stderr
        assert "only 38 of a GPU's memory can be used" in done.stdout + done.stderr
        assert command == "sweep" or "names in Slurm say 39.4 (gpu:a100_40gb:8)" in done.stdout + done.stderr
    assert "of 39.4 " in launch("plan", *a100, "--partition", "batch").stdout
    assert "of 79.2 " in launch("plan", *a100).stdout  # of no cluster
    (image.parent / "c.toml").write_text('[job]\ngpu = "a100"\n')
    told = json.loads(launch("plan", *SUBMIT[2:], "--config", "c.toml", "--json").stdout)
    assert (told["device_gib"], told["verdict"]) == (39.4, "does not fit")
    assert launch("submit", *a100, "--force").returncode == 0
    assert json.loads((image.parent / "runs" / "r" / "plan.json").read_text())["device_gib"] == 39.4


def test_submit_refuses_before_anything_exists(launch: Launch, slurm: Fake, image: Path) -> None:
    done = launch("submit", *SUBMIT, "--nodes", "9")
    assert (done.returncode, "partition batch has 4" in done.stderr) == (ExitStatus.INVALID, True), done.stderr
    assert "--force" in done.stderr
    assert not (image.parent / "sbatch.txt").exists() and not (image.parent / "runs").exists()
    forced = launch("submit", *SUBMIT, "--nodes", "9", "--force")
    assert forced.returncode == 0 and "warning: --nodes 9: partition batch has 4" in forced.stderr, forced.stderr
    assert len((image.parent / "sbatch.txt").read_text().splitlines()) == 1, "sbatch ran once, with the script"


@pytest.mark.parametrize("command", ["submit", "sweep", "accept"])
def test_what_this_machine_refuses_waits_for_no_slurm(command: str, launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", f"touch {image.parent}/asked; exit 1")
    image.unlink()
    done = launch(command, *SUBMIT)
    assert "[image-missing]" in done.stderr and not (image.parent / "asked").exists(), done.stderr
    assert "no such file" in launch("preflight", *SUBMIT).stdout and (image.parent / "asked").exists()


def test_a_dry_run_asks_slurm_nothing(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", f"touch {image.parent}/asked; exit 1")
    assert launch("submit", *SUBMIT, "--nodes", "9", "--dry-run").returncode == 0
    assert not (image.parent / "asked").exists()
    script = launch("submit", *SUBMIT, "--dry-run").stdout
    assert "\n# submit also adds --segment and --exclude, as the cluster then needs them\n" in script
    assert "# submit also adds" not in launch("submit", "--local", "--recipe", "debug", "--dry-run").stdout


def test_the_preflight_command(launch: Launch, slurm: Fake, image: Path) -> None:
    good = launch("preflight", *SUBMIT, "--nodes", "2", "--json")
    assert good.returncode == 0, good.stderr
    said = json.loads(good.stdout)
    names = {check["name"] for check in said["checks"]}
    assert said["ok"] is True and {"image", "partition", "GPUs", "nodes", "Pyxis"} <= names
    bad = launch("preflight", *SUBMIT, "--nodes", "9", "--time", "3:00:00")
    assert bad.returncode == ExitStatus.INVALID
    assert "error    time: --time 3:00:00 is above" in bad.stdout and "try: --time 02:00:00" in bad.stdout
    assert "error    nodes: --nodes 9" in bad.stdout and "submit would refuse it" in bad.stdout
    image.write_bytes(b"no squashfs")
    broken = launch("preflight", *SUBMIT)
    assert broken.returncode == ExitStatus.INVALID and "error    image:" in broken.stdout
    assert not (image.parent / "runs").exists() and not (image.parent / "sbatch.txt").exists()


def test_the_nodes_of_the_runs_own_reservation_are_free() -> None:
    facts = cluster(*FOUR[:2], node("m0", "IDLE+RESERVED"), node("m1", "IDLE+MAINT"))
    for reservation, free in (("r1", 4), ("", 2)):
        assert found(preflight(run(reservation=reservation), facts), "nodes").facts["free"] == free


def test_b200_nodes_that_run_for_too_long() -> None:
    booted = ("2026-01-05T00:00:00", "2026-01-04T23:59:00", "2026-01-03T00:00:00", "")
    facts = cluster(*(replace(node, booted=at) for node, at in zip(FOUR, booted, strict=True)))
    now = datetime(2026, 3, 1, 23, 59)
    finding = found(preflight(run("b200"), facts, now), "uptime")
    assert finding.status == WARNING and "up for more than 55 days: n2 (57), n1 (56)" in sentence(finding)
    assert finding.fix.endswith("scontrol reboot ASAP nextstate=RESUME 'n[1-2]'")
    for gpu, at in (("h200", now), ("b200", datetime(2026, 2, 1))):
        assert "uptime" not in codes(preflight(run(gpu), facts, at))


def test_each_finding_brings_what_its_words_name() -> None:
    """Wherever one is made; those with facts of a mapping are left to the tests that make them."""
    lacking = []
    for path in (ROOT / "launcher").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") not in ("ok", "warning", "error", "impossible", "refuse"):
                continue
            given = {word.arg for word in call.keywords}
            code = str(call.args[0].value) if call.args and isinstance(call.args[0], ast.Constant) else ""
            named = {name for text in TEXTS.get(code, ()) for _, name, _, _ in Formatter().parse(text) if name}
            if None not in given and named - given:
                lacking.append((path.name, call.lineno, code, named - given))
    assert lacking == []
