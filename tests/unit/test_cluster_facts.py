"""What is read from Slurm's commands: every version's text, odd reasons, half answers, and the profile that follows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config.propose import contradictions, propose
from launcher.scheduler import parse, slurm
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts, Node, Partition
from tests.cluster_fixtures import CLUSTERS, STAMP, FakeNode, answering, cluster, node_line, partition_line

NAME = st.from_regex(r"[a-z][a-z0-9-]{0,12}[0-9]{1,4}", fullmatch=True)
# Free text as an administrator may type it: brackets, quotes, spaces, key=value, newlines.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0"), max_size=60)


def facts_of(answers: dict[str, str], plugstack: str = "") -> ClusterFacts:
    return detect(answering(answers), lambda path: plugstack)


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_version_gives_the_same_kind_of_facts(name: str) -> None:
    facts = facts_of(dict(CLUSTERS[name]))
    flavour, number = name.split("-")
    year, month = number.split(".")
    assert facts.slurm == (int(year), int(month))
    assert facts.unread == {}
    assert facts.pyxis and "--container-mounts" in facts.pyxis_options
    assert facts.accounting is (flavour == "managed")
    partition = facts.partition()
    assert partition and partition.default and partition.state == "UP"
    assert {node.name for node in facts.nodes} == set(partition.nodes)
    assert all(node.cpus and node.memory_mib and node.gpus for node in facts.nodes)
    assert propose(facts.nodes_of()).profile == ("h200" if flavour == "managed" else "gb200")


def test_the_nodes_of_a_terraform_cluster() -> None:
    facts = facts_of(dict(CLUSTERS["terraform-24.11"]))
    nodes = {int(node.name[-3:]): node for node in facts.nodes}
    first = nodes[1]
    assert (first.name, first.partitions, first.features) == ("batch-compute-node-001", ("batch", "short"), ("nvl72",))
    assert (first.gres, first.gpus, first.gpu_type) == ("gpu:gb200:4(S:0-1)", 4, "gb200")
    assert (first.cpus, first.memory_mib, first.arch) == (144, 870000, "aarch64")
    words = ["idle", "drained", "down", "mixed", "reserved", "allocated"]
    assert [nodes[n].state for n in (1, 3, 5, 6, 7, 8)] == words
    assert [n for n in range(1, 10) if nodes[n].free] == [1, 2, 4, 9]
    assert nodes[3].reason == f"NVLink [GPU 2] State=IDLE: xid 145 (see #7) [{STAMP}]"
    assert [n.name for n in facts.nodes_of("short")] == ["batch-compute-node-001", "batch-compute-node-002"]
    assert facts.partitions_of("short")[0] == Partition(
        "short", False, "UP", 1800, None, ("batch-compute-node-001", "batch-compute-node-002")
    )


def test_blocks_with_empty_ones_and_without_aggregated_ones() -> None:
    facts = facts_of(dict(CLUSTERS["terraform-24.11"]))
    assert [(b.name, len(b.nodes)) for b in facts.blocks] == [("rack1", 18), ("rack2", 18), ("rack3", 0)]
    assert facts.segment and facts.topology == "block"
    older = facts_of(dict(CLUSTERS["terraform-23.11"]))
    assert [(b.name, len(b.nodes)) for b in older.blocks] == [("rack1", 18), ("rack2", 18)]


def test_segment_needs_blocks_and_a_slurm_that_knows_it() -> None:
    blocks = dict(CLUSTERS["terraform-24.11"])
    assert facts_of(blocks).segment
    assert not facts_of(blocks | {"config": blocks["config"].replace("24.11", "23.02")}).segment
    assert not facts_of(blocks | {"topology": "", "config": CLUSTERS["managed-25.11"]["config"]}).segment
    assert facts_of(dict(CLUSTERS["tree-23.02"])).topology == "tree"


def test_dynamic_and_sleeping_nodes() -> None:
    awake, busy, asleep, drained = facts_of(dict(CLUSTERS["managed-25.11"])).nodes
    assert (awake.free, busy.free, asleep.free, drained.free) == (True, False, True, False)
    assert (asleep.state, asleep.arch) == ("powered down", "")
    assert drained.reason == f"Kubernetes: pod [slurm/h200-3] evicted [{STAMP}]"
    assert drained.states == {"IDLE", "DRAIN", "DYNAMIC_NORM"}


STATES = {
    "IDLE": "idle",
    "IDLE+CLOUD+POWERED_DOWN": "powered down",
    "IDLE+CLOUD+POWERING_UP": "powering up",
    "IDLE+PLANNED": "planned",
    "MIXED+PLANNED": "mixed",
    "ALLOCATED+COMPLETING": "completing",
    "DOWN*": "down",
    "DOWN*+DRAIN+CLOUD+MAINT": "down",
    "idle*": "not responding",
    "IDLE+FAIL": "failed",
    "IDLE+INVALID_REG": "invalid",
    "IDLE+DRAIN+MAINT": "drained",
    "MIXED+DRAIN": "draining",
    "IDLE+MAINT": "maintenance",
    "IDLE+REBOOT_ISSUED": "rebooting",
    "IDLE+REBOOT_REQUESTED": "reboot requested",
    "IDLE+A_FLAG_OF_SLURM_30": "a_flag_of_slurm_30+idle",
    "": "unknown",
}


def test_a_state_in_a_word_or_two() -> None:
    nodes = {flags: Node("n", parse.states(flags)) for flags in STATES}
    assert {flags: node.state for flags, node in nodes.items()} == STATES
    assert [flags for flags, node in nodes.items() if node.free] == ["IDLE", "IDLE+CLOUD+POWERED_DOWN"]


GRES = {
    **{"gpu:4": (4, ""), "gpu:gb200:4": (4, "gb200"), "gpu:H100:8(S:0-1)": (8, "h100"), "gpu": (1, "")},
    **{"gpu:a100": (1, "a100"), "nvme:2,gpu:b200:8(S:0,2),ib:8": (8, "b200"), "(null)": (0, ""), "": (0, "")},
    **{"gpu:a100:4,gpu:a100_1g.5gb:14": (18, ""), "gpumem:80": (0, ""), "gpu:nvidia_b200:8": (8, "nvidia_b200")},
}
TIMES = {
    **{"00:30:00": 1800, "7-00:00:00": 604800, "1-12": 129600, "90": 5400, "1:30": 90},
    **dict.fromkeys(("UNLIMITED", "INFINITE", "nonsense", "")),
}
HOSTS = {
    "n[1-2,07]x,login": ["n1x", "n2x", "n07x", "login"],
    "r[1-2]n[08-09]": ["r1n08", "r1n09", "r2n08", "r2n09"],
    **{text: [] for text in ("(null)", "", "ALL", "n[1-999999999]", "n[3-1]", "n[", "n[1-3],n[37-5")},
}


def test_gpus_times_and_host_lists() -> None:
    read = {gres: parse.nodes(f"NodeName=n State=IDLE Gres={gres}")[0] for gres in GRES}
    assert {gres: (node.gpus, node.gpu_type) for gres, node in read.items()} == GRES
    assert parse.count_of("gpu:gb200:4(S:0-1),nvme:2,gpu:b200:2", "gpu:gb200") == 4
    assert {text: parse.seconds(text) for text in TIMES} == TIMES
    assert {hosts: list(parse.expand(hosts)) for hosts in HOSTS} == HOSTS


@given(reason=TEXT, comment=TEXT, state=st.sampled_from(["IDLE+DRAIN", "DOWN*", "MIXED+DRAIN"]))
@example(reason="x State=IDLE Gres=gpu:99 Partitions=evil", comment="", state="DOWN*")
@example(reason="first\nsecond line", comment="", state="DOWN*")
@example(reason="[a b] (c) 'd' \"e\" [root]", comment="Reason=no [x@y]", state="IDLE+DRAIN")
def test_no_free_text_changes_the_rest_of_a_node(reason: str, comment: str, state: str) -> None:
    if any(line.startswith("NodeName=") for line in f"{reason}\n{comment}".split("\n")):
        return  # only an administrator who means it
    node = FakeNode("gpu-1", state, "gpu:gb200:4", "aarch64", 144, 870000, "a,b", "p,q", reason)
    text = node_line(replace(node, free_text=f"Comment={comment}" if comment else "")) + "\n"
    read, _ = parse.nodes(text + node_line(FakeNode("gpu-2")) + "\n")
    assert (read.name, read.states, read.gpus, read.arch) == ("gpu-1", parse.states(state), 4, "aarch64")
    assert (read.partitions, read.features) == (("p", "q"), ("a", "b"))


@given(reason=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="@\x85\xa0"), min_size=1))
def test_a_reason_of_one_word_is_kept_as_it_is(reason: str) -> None:
    text = node_line(FakeNode("n", "DOWN", reason=f"{reason} and more"))
    assert parse.nodes(text)[0].reason == f"{reason} and more [{STAMP}]"


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    """ValueError is what `detect` expects of an answer that is none."""
    for read, said in (
        (parse.nodes, f"NodeName={text}\n{text}"),
        (parse.partitions, f"PartitionName={text}\n{text}"),
        (parse.blocks, f"BlockName=b Nodes={text}\n{text}"),
        (parse.config, text),
        (lambda said: parse.rows(said, 4), text),
    ):
        with suppress(ValueError):
            read(said)
    for always in (parse.version, parse.seconds, parse.gres_of, parse.expand, parse.container_options):
        always(text)
    parse.squashfuse(text)


@given(st.lists(NAME, max_size=30, unique=True))
@example(["n9", "n10", "n010", "n009", "n1"])
def test_a_compressed_host_list_means_the_same_names(names: list[str]) -> None:
    assert sorted(parse.expand(parse.compress(names))) == sorted(names)


def test_warnings_among_the_answer_are_not_nodes() -> None:
    lines = CLUSTERS["managed-25.11"]["nodes"].splitlines()
    odd = ("slurm: warning: config changed", "scontrol: error: no Arch=riscv64", "bye")
    noisy = "\n".join([odd[0], *lines[:3], odd[1], *lines[3:], odd[2]]) + "\n"
    calm = facts_of(dict(CLUSTERS["managed-25.11"]))
    facts = facts_of(dict(CLUSTERS["managed-25.11"]) | {"nodes": noisy})
    assert facts.nodes == calm.nodes and facts.nodes[2].arch == ""


def test_a_node_that_its_partition_lists_and_slurm_does_not_show() -> None:
    """Powered down in the cloud, or just gone."""
    answers = dict(CLUSTERS["managed-25.11"])
    facts = facts_of(answers | {"nodes": "\n".join(answers["nodes"].splitlines()[1:]) + "\n"})
    assert facts.unread == {} and len(facts.nodes) == 3
    assert facts.hidden() == facts.hidden("all") == {"test-cluster-h200-0"} and facts.hidden("x") == set()


def test_limits_and_disks_are_read() -> None:
    line = partition_line("p", "n1").replace("AllowGroups=ALL", "AllowGroups=a,b").replace("MinNodes=0", "MinNodes=4")
    (p,) = parse.partitions(line.replace("RootOnly=NO ReqResv=NO", "RootOnly=YES ReqResv=YES"))
    assert (p.groups, p.min_nodes, p.root_only, p.needs_reservation) == (("a", "b"), 4, True, True)
    assert parse.partitions(partition_line("p", "n1")) == (Partition("p", False, "UP", nodes=("n1",)),)
    assert parse.nodes(node_line(FakeNode("n1")).replace("TmpDisk=0", "TmpDisk=7000000"))[0].tmp_mib == 7_000_000


def test_a_boot_time_that_is_no_time() -> None:
    """Of a node that never registered, or nonsense."""
    for booted in ("None", "Unknown", "", "N/A", "2026-13-45T99:99:99"):
        assert parse.nodes(node_line(FakeNode("n1", booted=booted)))[0].booted == ""
    assert parse.nodes(node_line(FakeNode("n1")))[0].booted == "2026-03-01T00:00:00"


def test_nothing_at_all_is_an_error_and_an_empty_cluster_is_not() -> None:
    for answers, said in (({}, "scontrol failed"), ({"nodes": "what?\n"}, "nonsense"), ({"nodes": ""}, "nonsense")):
        with pytest.raises(LauncherError, match=said) as raised:
            facts_of(answers).require("")
        assert raised.value.status is ExitStatus.CLUSTER
    empty = cluster("25.11.2", [], [partition_line("all", "", default=True)])
    for said in ("", "No nodes in the system\n"):
        facts = facts_of(empty | {"nodes": said}).require("all")
        assert (facts.nodes, facts.unread) == ((), {})


def test_commands_that_hang_are_given_up(fake_slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ANSWER_S", 0.3)
    for command in ("scontrol", "srun"):
        fake_slurm(command, "exec sleep 60")
    assert all("did not answer" in why for why in detect().unread.values()) and len(detect().unread) == 5


def test_images_are_mounted_or_unpacked_as_plugstack_says(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "plugstack.conf").write_text("# pyxis.so\ninclude d/*.conf\n")
    (tmp_path / "d" / "a.conf").write_text("optional /x/spank_other.so use_squashfuse=1\n")
    line = tmp_path / "d" / "pyxis.conf"
    path = str(tmp_path / "plugstack.conf")
    for text, expected in (
        ("", None),
        ("required /x/spank_pyxis.so\n", False),
        ("required /x/spank_pyxis.so use_squashfuse=1\n", True),
        ("required spank_pyxis.so runtime_path=/r use_squashfuse=true\n", True),
        ("required spank_pyxis.so use_squashfuse=yes\n", True),
        ("required spank_pyxis.so use_squashfuse=Y\n", True),
        ("required spank_pyxis.so use_squashfuse=0\n", False),
        ("#required spank_pyxis.so\n", None),
    ):
        line.write_text(text)
        assert parse.squashfuse(slurm.plugstack(path)) is expected
    assert slurm.plugstack(str(tmp_path / "none.conf")) == ""


def test_a_shell_that_shapes_the_output_does_not_reach_slurm(fake_slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TOPO_LEN", "10")
    fake_slurm("scontrol", 'echo "$SLURM_TOPO_LEN|$LC_ALL"')
    assert slurm.ask(("scontrol", "show", "topology")) == "|C\n"
    assert os.environ["SLURM_TOPO_LEN"] == "10"


# ------------------------------------------------------------------------------------------ the profile


def node(name: str = "batch-compute-node-001", gres: str = "gpu:8", arch: str = "x86_64", **values: object) -> Node:
    (read,) = parse.nodes(f"NodeName={name} State=IDLE Arch={arch} Gres={gres}")
    return replace(read, states=frozenset(), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "profile"),
    [
        ([node(gres="gpu:gb200:4", arch="aarch64")], "gb200"),
        ([node(gres="gpu:gb300:4", arch="aarch64")], "gb300"),
        ([node(gres="gpu:B200:4", arch="aarch64")], "gb200"),  # as one cloud types its GB200
        ([node(gres="gpu:b200:8")], "b200"),
        ([node(features=("h100", "ib"))], "h100"),
        ([node("slurm-h200-0")], "h200"),
        ([node("slurm-h200-0"), node("slurm-h200-1", arch="")], "h200"),
        ([node("login-1", gres=""), node("slurm-h200-0")], "h200"),
        ([node(gres="gpu:nvidia_a100:8", cpus=96, arch="")], "a100"),  # the CPUs agree
        ([node(gres="gpu:h100:8", arch="")], ""),  # the GRES alone
        ([node(gres="gpu:8")], ""),
        ([node(gres="gpu:4", arch="aarch64")], ""),  # GB200 or GB300
        ([node(gres="gpu:gb200:4", arch="x86_64")], ""),
        ([node(gres="gpu:h200:4")], ""),
        ([node(gres="gpu:h200:8", features=("h100",))], ""),
        ([node(gres="gpu:h200:8", features=("gb200",))], ""),
        ([node("b200-1", gres="gpu:h200:8")], ""),
        ([node("slurm-h200-0"), node("slurm-b200-0")], ""),
        ([node(gres="gpu:h200:8"), node(gres="gpu:h100:8")], ""),
        ([node(gres="")], ""),
        ([], ""),
    ],
)
def test_the_profile_needs_a_name_and_something_that_agrees(nodes: list[Node], profile: str) -> None:
    assert propose(nodes).profile == profile


def test_contradictions_say_what_both_sides_say() -> None:
    proposal = propose([node(gres="gpu:gb200:4", memory_mib=16000)])
    assert proposal.contradictions == ("gb200 does not fit x86_64",)
    (text,) = propose([node("b200-1", gres="gpu:h200:8")]).contradictions
    assert "GRES gpu:h200:8 says h200" in text and "node names b200-1 says b200" in text
    small = propose([node("slurm-h200-0", memory_mib=64 * 1024)])
    assert small.contradictions == ("h200 does not fit 64 GiB of memory a node",)
    (none,) = propose([node(gres="")]).contradictions
    assert "has GPUs in its GRES" in none
    (gres, *_) = propose([node(gres="gpu:B200:4", arch="aarch64")]).evidence
    assert gres.what == "GRES gpu:B200:4 (some clouds write B200 for GB200)"
    mixed = propose([node(gres="gpu:h200:8"), node(gres="gpu:h100:8")])
    assert mixed.candidates == ("h200", "h100") and "2 sorts: 8 GPUs (h200), 8 GPUs (h100)" in mixed.contradictions[0]


def test_a_chosen_profile_is_compared_with_the_nodes() -> None:
    nodes = [node("slurm-h200-0", memory_mib=2_000_000)]
    assert contradictions("h200", nodes) == []
    assert contradictions("gb200", nodes) == [
        "node names slurm-h200-0 says h200, not gb200",
        "gb200 does not fit 8 GPUs a node",
        "gb200 does not fit x86_64",
    ]
    assert contradictions("h200", [node(gres="")]) == ["none of the 1 nodes has GPUs in its GRES"]
    assert contradictions("./mine.toml", nodes) == []


def test_a_topology_of_a_partitions_own() -> None:
    """The cluster's is flat or of other blocks: that says nothing about the partition."""
    answers = dict(CLUSTERS["terraform-25.05"])
    lines = answers["partitions"].splitlines()
    named = "".join(f"{line} Topology={'nvl' if 'Name=short' in line else 'gone'}\n" for line in lines)
    config = answers["config"].replace("topology/block", "topology/flat")
    other = answering({**answers, "partitions": named, "config": config, "topology": ""})

    def run(words: Sequence[str]) -> str:
        if tuple(words) == ("scontrol", "-o", "show", "topology", "nvl"):
            return "BlockName=b1 BlockIndex=0 Nodes=batch-compute-node-[001-002] BlockSize=2\n"
        if words[-1] == "gone":
            raise LauncherError("slurm-failed", "scontrol failed")
        return other(words)

    facts = detect(run, lambda path: "")
    assert (facts.topology, facts.segment, facts.unread) == ("flat", False, {})
    of_short, of_batch, of_both = (facts.as_placed(name) for name in ("short", "", "short,batch"))
    assert (of_short.topology, of_short.segment, [len(b.nodes) for b in of_short.blocks]) == ("block", True, [2])
    assert of_batch.unread == {"topology": "scontrol -o show topology gone: scontrol failed"}
    assert (of_both.topology, of_both.segment, of_both.blocks) == ("", False, ())
    older = facts_of(answers)
    assert older.as_placed("short") is older
    assert parse.topology("SwitchName=leaf1 Level=0 Nodes=a\n").kind == "tree" and parse.topology("").kind == "flat"
