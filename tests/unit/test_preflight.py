"""Every check before a run queues: what provokes it, how serious it is, and what it tells the user to type."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.base.finding import ERROR, OK, WARNING, Check, refusal
from launcher.config.layers import find, merge, names_of, read_layer
from launcher.config.spec import RunSpec
from launcher.preflight.checks import preflight
from launcher.scheduler.facts import Block, ClusterFacts, Node, Partition
from tests.conftest import Launch

Fake = Callable[[str, str], Path]
PROFILES = tuple(names_of("profiles"))


def node(name: str, states: str = "IDLE", **values: Any) -> Node:
    known: dict[str, Any] = {
        "partitions": ("batch",),
        "gres": "gpu:8",
        "gpus": 8,
        "arch": "x86_64",
        "cpus": 176,
        **values,
    }
    return Node(name, frozenset(states.split("+")), **known)


def cluster(*nodes: Node, **values: Any) -> ClusterFacts:
    known: dict[str, Any] = {
        "slurm": (25, 5),
        "pyxis": "0.21.0",
        "topology": "tree",
        "partitions": (Partition("batch", True, "UP"), Partition("small", False, "UP", 300, 1)),
        **values,
    }
    return ClusterFacts(nodes=nodes, **known)


def run(gpu: str = "h200", nodes: int = 2, origin: dict[str, str] | None = None, **job: Any) -> RunSpec:
    spec = merge([read_layer(find("profiles", gpu), "profile")])
    known: dict[str, Any] = {"name": "r", "gpu": gpu, "image": "/i.sqsh", "nodes": nodes, **job}
    return replace(spec, job=replace(spec.job, **known), origin={**spec.origin, **(origin or {})})


def profile(spec: RunSpec, **values: Any) -> RunSpec:
    return replace(spec, profile=replace(spec.profile, **values))


FOUR = tuple(node(f"n{i}") for i in range(4))
DYNAMIC = tuple(node(f"d{i}", "IDLE+DYNAMIC_NORM") for i in range(2))
BROKEN = node("bad", "IDLE+DRAIN", reason="GPU 3 [fell off] the bus [root@2026-01-02T03:04:05]")
ARM = tuple(node(f"a{i}", arch="aarch64", gres="gpu:gb200:4(S:0-1)", gpus=4) for i in range(4))
BLOCKS = {"segment": True, "topology": "block"}
RACKS = (Block("rack-1", ("a0", "a1")), Block("rack-2", ("a2", "a3")))


CASES = {
    "more nodes than there are": (run(nodes=9), cluster(*FOUR), "nodes", ERROR, "has 4", "--nodes 4"),
    "more nodes than --exclude leaves": (
        run(nodes=4, exclude="n[0-1]"),
        cluster(*FOUR),
        "nodes",
        ERROR,
        "has 2, without those of --exclude",
        "--nodes 2",
    ),
    "nodes that may still register": (run(nodes=9), cluster(*DYNAMIC), "nodes", WARNING, "has 2", "--nodes 2"),
    "no nodes at all": (run(), cluster(), "nodes", WARNING, "no nodes now", "sinfo -s"),
    "nodes enough, but busy": (
        run(nodes=2),
        cluster(node("n0"), node("n1", "ALLOCATED")),
        "nodes",
        OK,
        "waits for others",
        "",
    ),
    "some have too few GPUs": (run(nodes=3), cluster(*FOUR[:2], *ARM), "nodes", ERROR, "has 2 with gpu:8", "--nodes 2"),
    "drained": (
        run(nodes=5),
        cluster(*FOUR, BROKEN),
        "node states",
        WARNING,
        "bad is drained (GPU 3 [fell off] the bus",
        "--nodes 4",
    ),
    "not answering": (
        run(nodes=5),
        cluster(*FOUR, node("bad", "DOWN+NOT_RESPONDING")),
        "node states",
        WARNING,
        "bad is down",
        "sinfo -R",
    ),
    "kept for a reservation": (
        run(nodes=5),
        cluster(*FOUR, node("kept", "IDLE+RESERVED")),
        "node states",
        WARNING,
        "kept is reserved",
        "--nodes 4; scontrol show reservation",
    ),
    "drained, so not all in service": (
        run(nodes=5),
        cluster(*FOUR, BROKEN),
        "nodes",
        OK,
        "5 asked; partition batch has 5, 4 of them in service",
        "",
    ),
    "in service, and one drained": (
        run(nodes=4),
        cluster(*FOUR, BROKEN),
        "nodes",
        OK,
        "4 asked; partition batch has 4 in service, 4 of them free now",
        "",
    ),
    "drained, but not needed": (run(nodes=4), cluster(*FOUR, BROKEN), "node states", OK, "bad is drained", ""),
    "GPUs that no node has": (
        run(),
        cluster(*ARM),
        "GPUs",
        ERROR,
        "gpu:8 on a node, and no node of partition batch has that: 4 with 4 of gpu",
        "--gpus-per-node 4",
    ),
    "no GPUs": (run(), cluster(node("c", gres="", gpus=0)), "GPUs", ERROR, "1 with no GPUs", "--partition"),
    "GPUs of another name": (profile(run(), gres="gpu:h200"), cluster(*ARM), "GPUs", ERROR, "gpu:h200:8", "--gpu NAME"),
    "GPUs of that name": (
        profile(run(), gres="gpu:h200"),
        cluster(node("n", gres="gpu:h200:8(S:0-1),nvme:2"), node("m", gres="gpu:h200:8")),
        "GPUs",
        OK,
        "2 nodes",
        "",
    ),
    "half of the GPUs": (
        run("gb200"),
        cluster(*(replace(n, arch="aarch64") for n in FOUR)),
        "GPUs per node",
        WARNING,
        "uses 4 GPUs of a node; n0 has 8",
        "--gpus-per-node 8",
    ),
    "another architecture": (
        run("gb200"),
        cluster(*FOUR),
        "architecture",
        ERROR,
        "gb200 is for aarch64; partition batch has 4 nodes of x86_64",
        "--set profile.arch=x86_64",
    ),
    "another architecture, no image": (
        run("gb200", runtime="bare"),
        cluster(*FOUR),
        "architecture",
        WARNING,
        "x86_64",
        "--gpu",
    ),
    "two architectures": (
        run(),
        cluster(*FOUR, node("arm", arch="aarch64")),
        "architecture",
        WARNING,
        "4 nodes of x86_64 and 1 node of aarch64",
        "--exclude arm",
    ),
    "another GPU by name": (
        run("b200"),
        cluster(*(replace(n, gres="gpu:h200:8") for n in FOUR)),
        "GPU type",
        WARNING,
        "for B200; Slurm speaks of h200",
        "--gpu h200",
    ),
    "another GPU by feature": (
        run("b200"),
        cluster(*(replace(n, features=("H100",)) for n in FOUR)),
        "GPU type",
        WARNING,
        "h100",
        "--gpu h100",
    ),
    "no such partition": (
        run(partition="gpu"),
        cluster(*FOUR),
        "partition",
        ERROR,
        "it has batch, small",
        "--partition batch",
    ),
    "no default partition": (
        run(),
        cluster(*FOUR, partitions=(Partition("a"), Partition("b"))),
        "partition",
        ERROR,
        "none is the default",
        "--partition a",
    ),
    "partition down": (
        run(),
        cluster(*FOUR, partitions=(Partition("batch", True, "DOWN"),)),
        "partition",
        WARNING,
        "DOWN",
        "sinfo -s",
    ),
    "partition inactive": (
        run(),
        cluster(*FOUR, partitions=(Partition("batch", True, "INACTIVE"),)),
        "partition",
        ERROR,
        "INACTIVE",
        "sinfo -s",
    ),
    "too long": (
        run(nodes=1, partition="small", time="10"),
        cluster(*FOUR),
        "time",
        ERROR,
        "above the limit of partition small, 00:05:00",
        "--time 00:05:00",
    ),
    "days": (
        run(partition="small", time="1-12"),
        cluster(*FOUR, partitions=(Partition("small", False, "UP", 86400),)),
        "time",
        ERROR,
        "1-00:00:00",
        "--time 1-00:00:00",
    ),
    "not too long for the other": (
        run(partition="small,batch", time="10"),
        cluster(*FOUR),
        "partition",
        OK,
        "small",
        "",
    ),
    "too few for the partition": (
        run(nodes=2),
        cluster(*FOUR, partitions=(Partition("batch", True, "UP", min_nodes=3),)),
        "nodes per job",
        ERROR,
        "takes jobs of 3 nodes and more",
        "--nodes 3",
    ),
    "a reservation is a must": (
        run(),
        cluster(*FOUR, partitions=(Partition("batch", True, "UP", needs_reservation=True),)),
        "reservation",
        ERROR,
        "of a reservation alone",
        "scontrol show reservation",
    ),
    "too many for one job": (
        run(partition="small"),
        cluster(*FOUR),
        "nodes per job",
        ERROR,
        "allows 1 node in a job",
        "--nodes 1",
    ),
    "unknown in --nodelist": (run(nodelist="n[0-1],x7"), cluster(*FOUR), "nodelist", ERROR, "no node x7", "sinfo"),
    "unknown in --exclude": (run(exclude="x[1-3]"), cluster(*FOUR), "exclude", ERROR, "no node x1, x2, x3", "sinfo"),
    "drained in --nodelist": (
        run(nodelist="n0,bad"),
        cluster(*FOUR, BROKEN),
        "nodelist",
        WARNING,
        "bad is drained",
        "--nodelist",
    ),
    "named and excluded": (run(nodelist="n0", exclude="n[0-2]"), cluster(*FOUR), "nodelist", ERROR, "n0 stands in", ""),
    "named in another partition": (
        run(nodelist="o"),
        cluster(*FOUR, node("o", partitions=("small",))),
        "nodelist",
        ERROR,
        "o is not in partition batch",
        "sinfo",
    ),
    "more named than asked": (
        run(nodes=1, nodelist="n[0-2]"),
        cluster(*FOUR),
        "nodelist",
        ERROR,
        "names 3 nodes",
        "--nodes 3",
    ),
    "no Pyxis": (run(), cluster(*FOUR, pyxis=None), "Pyxis", ERROR, "no --container-image", "--runtime apptainer"),
    "Pyxis not known": (
        run(),
        cluster(*FOUR, pyxis=None, unread=("srun",)),
        "Pyxis",
        WARNING,
        "cannot be told",
        "srun --help",
    ),
    "segment, old Slurm": (
        run(segment=2),
        cluster(*FOUR, slurm=(22, 5)),
        "placement",
        ERROR,
        "Slurm 22.05, topology tree",
        "--segment 0",
    ),
    "segment that does not divide": (
        run(nodes=3, segment=2),
        cluster(*FOUR, **BLOCKS),
        "placement",
        ERROR,
        "does not divide --nodes 3",
        "--segment 3",
    ),
    "segment beyond a block": (
        run("gb200", 4, segment=4),
        cluster(*ARM, **BLOCKS, blocks=RACKS),
        "placement",
        ERROR,
        "largest block has 2 nodes",
        "--segment 2",
    ),
    "segment that fits": (
        run("gb200", 4, segment=2),
        cluster(*ARM, **BLOCKS, blocks=RACKS),
        "placement",
        OK,
        "2 x 2 nodes, each in one block of up to 2; room now: rack-1 (2 free), rack-2 (2 free)",
        "",
    ),
    "segment smaller than it could be": (
        run("gb200", 3, segment=1),
        cluster(*ARM, **BLOCKS, blocks=RACKS),
        "placement",
        WARNING,
        "3 x 1 nodes",
        "--nodes 2 or 4",
    ),
    "named in no block": (
        run("gb200", 1, nodelist="a3"),
        cluster(*ARM, **BLOCKS, blocks=(Block("rack-1", ("a0", "a1")),)),
        "blocks",
        ERROR,
        "--nodelist: a3: in no block",
        "scontrol show topology",
    ),
    "empty blocks": (
        run("gb200", 2),
        cluster(*ARM, **BLOCKS, blocks=(Block("rack-1", ("a0",)), Block("rack-2"))),
        "blocks",
        ERROR,
        "3 nodes of partition batch are in no block of the topology: a1, a2, a3",
        "scontrol show topology",
    ),
    "nodes cannot be read": (run(), None, "cluster", WARNING, "cannot be read", "sinfo -s"),
    "nodes cannot be read, and why": (
        run(),
        ClusterFacts(notes=("sinfo did not answer",)),
        "cluster",
        WARNING,
        "did not answer",
        "scontrol ping",
    ),
    "preloaded library": (
        replace(run(), env={"LD_PRELOAD": "/usr/lib/libnccl.so"}),
        None,
        "preload",
        WARNING,
        "libnccl",
        "the image brings its own",
    ),
}


def found(checks: list[Check], name: str) -> Check:
    matching = [check for check in checks if check.name == name]
    assert len(matching) == 1, [vars(check) for check in checks]
    return matching[0]


@pytest.mark.parametrize(("spec", "facts", "name", "status", "said", "fix"), CASES.values(), ids=CASES.keys())
def test_what_is_found(spec: RunSpec, facts: ClusterFacts | None, name: str, status: str, said: str, fix: str) -> None:
    check = found(preflight(spec, facts, (), PROFILES), name)
    assert check.status == status, check
    assert said in f"{check.what}: {check.why}" and fix in check.fix, check
    assert (status == OK) or check.fix, "a finding without a way out"


def test_a_run_that_fits_has_nothing_against_it() -> None:
    facts = cluster(*FOUR)
    assert {check.status for check in preflight(run(), facts, (), PROFILES)} == {OK}
    assert {check.status for check in preflight(run("cpu", runtime="bare"), facts, (), PROFILES)} == {OK}
    other_name = cluster(*(replace(n, arch="aarch64", gres="gpu:b200:4", gpus=4) for n in FOUR))
    names = [check.name for check in preflight(run("gb200"), other_name, (), PROFILES)]
    assert "GPUs" in names and "GPU type" not in names  # one cloud names GB200 "B200"


def test_a_reservation_opens_its_nodes() -> None:
    facts = cluster(*(node(f"n{i}", "IDLE+RESERVED") for i in range(2)))
    assert found(preflight(run(), facts), "node states").status == WARNING
    assert "node states" not in [check.name for check in preflight(run(reservation="mine"), facts)]


def test_gpus_per_node_that_the_user_chose_is_no_contradiction() -> None:
    chosen = profile(run(origin={"profile.gpus_per_node": "option --gpus-per-node"}), gpus_per_node=2)
    assert "GPUs per node" not in [check.name for check in preflight(chosen, cluster(*FOUR))]


@pytest.mark.parametrize(
    ("partitions", "groups", "status", "said"),
    [
        (
            (Partition("p", True, "UP", groups=("ml", "ops")),),
            ("users",),
            WARNING,
            "is for the groups ml, ops; you are in users",
        ),
        ((Partition("p", True, "UP", groups=("ml", "ops")),), ("users", "ops"), "", ""),
        ((Partition("p", True, "UP"),), ("users",), "", ""),
        ((Partition("p", True, "UP", root_only=True),), ("users",), ERROR, "is for root alone"),
    ],
)
def test_who_may_use_the_partition(
    partitions: tuple[Partition, ...], groups: tuple[str, ...], status: str, said: str
) -> None:
    facts = cluster(*(replace(n, partitions=("p",)) for n in FOUR), partitions=partitions)
    checks = preflight(run(), facts, groups=groups)
    assert {check.status for check in checks if check.name == "access"} == ({status} if status else set())
    assert not status or said in found(checks, "access").what
    assert "access" not in [check.name for check in preflight(run(), facts, groups=None)]  # root


@pytest.mark.parametrize(
    ("tmp_mib", "squashfuse", "warned"),
    [
        (20_000, False, True),
        (20_000, None, True),
        (20_000, True, False),
        (0, False, False),
        (40_000, False, False),
    ],
)
def test_an_image_that_does_not_fit_the_nodes_disk(tmp_mib: int, squashfuse: bool | None, warned: bool) -> None:
    facts = cluster(*(replace(n, tmp_mib=tmp_mib) for n in FOUR), squashfuse=squashfuse)
    checks = preflight(run(), facts, unpacked_bytes=30 << 30)
    assert ("disk" in [check.name for check in checks]) is warned
    if warned:
        said = found(checks, "disk")
        assert said.status == WARNING and "unpacks to 30.0 GiB; Slurm says TmpDisk=20000 MiB of n0, n1" in said.what


@pytest.mark.parametrize(
    ("change", "sure"),
    [({}, True), ({"states": "IDLE+DYNAMIC_NORM"}, False), ({"guessed": True}, False), ({"unread": ("nodes",)}, False)],
    ids=["whole", "dynamic", "guessed", "half"],
)
def test_only_what_is_sure_stops_force(change: dict[str, Any], sure: bool) -> None:
    """Others may register, and what could not be read may be otherwise."""
    states = change.pop("states", "IDLE")
    batch = Partition("batch", True, "UP", guessed=change.pop("guessed", False))
    arm = tuple(replace(node, states=frozenset(states.split("+"))) for node in ARM)
    facts = cluster(*arm, partitions=(batch,), **{**BLOCKS, "blocks": RACKS, **change})
    assert found(preflight(run(nodes=2), facts), "GPUs").certain is sure  # no node has eight
    assert found(preflight(run("gb200", 4, segment=4), facts), "placement").certain is sure  # of blocks of two


def test_a_mount_of_the_profile_that_is_not_here() -> None:
    """Its source may be on the compute nodes alone; and only the profile's own key takes it away."""
    spec = run("h200")
    (source,) = (mount.split(":")[0] for mount in spec.profile.mounts)
    check = found(preflight(spec, cluster(*FOUR), [source]), "mounts")
    assert (check.status, check.what) == (
        OK,  # as on most login nodes: no word with every submission
        f"{source}, which profile h200 mounts: not on this machine",
    )
    assert "compute nodes have it as a rule" in check.why and "--set 'profile.mounts=[]'" in check.fix
    own = run("h200", mounts=(f"{source}:/x",))
    assert f"--mount {source}" in found(preflight(own, cluster(*FOUR), [source]), "mounts").what


def test_hints_are_quoted() -> None:
    check = found(preflight(run(), cluster(*FOUR), ["/a 'b'; rm"]), "mounts")
    assert shlex.split(check.fix) == ["ls", "-ld", "/a 'b'; rm"]


def test_mounts_that_are_not_here() -> None:
    check = found(preflight(run(), cluster(*FOUR), ["/nowhere"]), "mounts")
    assert (check.status, "/nowhere" in check.what) == (WARNING, True)


@pytest.mark.parametrize(
    ("checks", "force", "status"),
    [
        ([], False, None),
        ([Check("a", WARNING, "x")], False, None),
        ([Check("a", ERROR, "x")], False, ExitStatus.INVALID),
        ([Check("a", ERROR, "x")], True, None),
        ([Check("a", ERROR, "x", certain=True)], True, ExitStatus.INVALID),
        ([Check("a", ERROR, "x", not_found=True)], False, ExitStatus.NOT_FOUND),
    ],
)
def test_what_stops_a_submission(checks: list[Check], force: bool, status: ExitStatus | None) -> None:
    refused = refusal(checks, force)
    assert (refused and refused.status) == status


def test_the_refusal_names_all_errors_and_offers_force_only_where_it_helps() -> None:
    both = refusal([Check("a", ERROR, "may wait", fix="f"), Check("b", ERROR, "cannot", certain=True)], False)
    assert both and (both.what, both.original) == ("cannot", "a: may wait; f") and "--force" not in both.fix
    one = refusal([Check("a", ERROR, "may wait", fix="f")], False)
    assert one and one.fix == "f; --force submits it all the same"


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
SUBMIT = ("--gpu", "b200", "--image", "titan.sqsh", "--name", "r")


@pytest.fixture
def slurm(fake_slurm: Fake, image: Path) -> Fake:
    fake_slurm("scontrol", SCONTROL)
    fake_slurm("srun", "echo '      --container-image=[USER@]REGISTRY#IMAGE|PATH'")
    fake_slurm("sbatch", f'echo "$@" >>{image.parent}/sbatch.txt; echo 42')
    return fake_slurm


def test_submit_refuses_before_anything_exists(launch: Launch, slurm: Fake, image: Path) -> None:
    done = launch("submit", *SUBMIT, "--nodes", "9")
    assert (done.returncode, "partition batch has 4" in done.stderr) == (ExitStatus.INVALID, True), done.stderr
    assert "--force" in done.stderr
    assert not (image.parent / "sbatch.txt").exists() and not (image.parent / "runs").exists()
    forced = launch("submit", *SUBMIT, "--nodes", "9", "--force")
    assert forced.returncode == 0 and "warning: --nodes 9: partition batch has 4" in forced.stderr, forced.stderr
    assert len((image.parent / "sbatch.txt").read_text().splitlines()) == 1, "sbatch ran once, with the script"


def test_force_does_not_pass_what_cannot_work(launch: Launch, slurm: Fake, image: Path) -> None:
    done = launch("submit", *SUBMIT, "--gpus-per-node", "9", "--force")
    assert (done.returncode, "no node of partition batch has that" in done.stderr) == (
        ExitStatus.INVALID,
        True,
    )
    assert not (image.parent / "runs").exists()


def test_an_unreadable_cluster_costs_one_warning(launch: Launch, slurm: Fake) -> None:
    slurm("scontrol", "exit 1")
    done = launch("submit", *SUBMIT, "--nodes", "9")
    assert done.returncode == 0 and done.stderr.count("nothing of them was checked") == 1, done.stderr


def test_a_dry_run_asks_slurm_nothing(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", f"touch {image.parent}/asked; exit 1")
    assert launch("submit", *SUBMIT, "--nodes", "9", "--dry-run").returncode == 0
    assert not (image.parent / "asked").exists()
    script = launch("submit", *SUBMIT, "--dry-run").stdout
    assert "\n# submit adds --segment and --exclude as the cluster has them then\n" in script
    assert "# submit adds" not in launch("submit", "--local", "--recipe", "debug", "--dry-run").stdout


def test_the_preflight_command(launch: Launch, slurm: Fake, image: Path) -> None:
    good = launch("preflight", *SUBMIT, "--nodes", "2", "--json")
    assert good.returncode == 0, good.stderr
    said = json.loads(good.stdout)
    assert said["ok"] is True and {"image", "partition", "GPUs", "nodes", "Pyxis"} <= {
        c["name"] for c in said["checks"]
    }
    bad = launch("preflight", *SUBMIT, "--nodes", "9", "--time", "3:00:00")
    assert bad.returncode == ExitStatus.INVALID
    assert "error    time: --time 3:00:00 is above" in bad.stdout and "try: --time 02:00:00" in bad.stdout
    assert "error    nodes: --nodes 9" in bad.stdout and "submit would refuse it" in bad.stdout
    image.write_bytes(b"no squashfs")
    broken = launch("preflight", *SUBMIT)
    assert broken.returncode == ExitStatus.INVALID and "error    image:" in broken.stdout
    assert not (image.parent / "runs").exists() and not (image.parent / "sbatch.txt").exists()
