"""Clusters as text: what Slurm's commands print on them, written by us field by field, for 22.05 to 25.11.

`CLUSTERS` has one of each flavour and version; `answering` plays one for `detect`, `install` for the whole program.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.scheduler.detect import QUESTIONS

STAMP = "root@2026-03-04T05:06:07"
PYXIS = """\
  Options provided by plugins:
      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH
                              [pyxis] the image to use for the container filesystem.
      --container-mounts=SRC:DST[:FLAGS][,SRC:DST...]
      --container-workdir=PATH
      --container-writable    [pyxis] make the container filesystem writable
      --no-container-mount-home
"""


@dataclass(frozen=True)
class FakeNode:
    """One node's record. `free_text` is what stands behind the reason: Comment=, Extra=."""

    name: str
    state: str = "IDLE"
    gres: str = "gpu:8"
    arch: str = "x86_64"
    cpus: int = 176
    memory_mib: int = 1900000
    features: str = ""
    partitions: str = "batch"
    reason: str = ""
    free_text: str = ""
    booted: str = "2026-03-01T00:00:00"  # "None" or "Unknown" of a node that never registered


def node_line(node: FakeNode, version: tuple[int, int] = (25, 5)) -> str:
    """The record of `scontrol -o show node`, with the fields of that version in their order."""
    registered = f"Arch={node.arch} " if node.arch else ""
    effective = f"CPUEfctv={node.cpus} " if version >= (22, 5) else ""
    fields = [
        f"NodeName={node.name} {registered}CoresPerSocket={node.cpus // 2 or 1}",
        f"CPUAlloc=0 {effective}CPUTot={node.cpus} CPULoad=0.03",
        f"AvailableFeatures={node.features or '(null)'}",
        f"ActiveFeatures={node.features or '(null)'}",
        f"Gres={node.gres or '(null)'}",
        f"NodeAddr={node.name} NodeHostName={node.name} Version={version[0]}.{version[1]:02d}.3",
        "OS=Linux 6.8.0-1036-64k #39~22.04.1-Ubuntu SMP PREEMPT_DYNAMIC Tue Mar  4 05:06:07 UTC 2026"
        if node.arch
        else "",
        f"RealMemory={node.memory_mib} AllocMem=0 FreeMem={node.memory_mib // 2} Sockets=2 Boards=1",
        f"State={node.state} ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A",
        f"Partitions={node.partitions}" if node.partitions else "",
        f"BootTime={node.booted} " * bool(node.booted)
        + "SlurmdStartTime=2026-03-01T00:01:00 LastBusyTime=2026-03-04T00:00:00",
        "ResumeAfterTime=None" if version >= (23, 2) else "",
        f"CfgTRES=cpu={node.cpus},mem={node.memory_mib}M,billing={node.cpus}",
        "AllocTRES= ",
        "CapWatts=n/a" if version < (24, 5) else "",
        "CurrentWatts=0 AveWatts=0",
        "ExtSensorsJoules=n/s ExtSensorsWatts=0 ExtSensorsTemp=n/s" if version < (24, 11) else "",
        f"Reason={node.reason} [{STAMP}]" if node.reason else "",
        node.free_text,
    ]
    return " ".join(field for field in fields if field) + " "


def partition_line(name: str, nodes: str, default: bool = False, max_time: str = "UNLIMITED", state: str = "UP") -> str:
    return (
        f"PartitionName={name} AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL "
        f"Default={'YES' if default else 'NO'} QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO "
        "GraceTime=0 "
        f"Hidden=NO MaxNodes=UNLIMITED MaxTime={max_time} MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED "
        f"Nodes={nodes or '(null)'} PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=EXCLUSIVE "
        f"OverTimeLimit=NONE PreemptMode=OFF State={state} TotalCPUs=1 TotalNodes=1 SelectTypeParameters=NONE "
        "JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED"
    )


def config_text(version: str, name: str, topology: str, accounting: str = "accounting_storage/none") -> str:
    return (
        "Configuration data as of 2026-03-04T05:06:07\n"
        f"AccountingStorageType   = {accounting}\n"
        "BOOT_TIME               = 2026-03-01T00:00:00\n"
        f"ClusterName             = {name}\n"
        "MinJobAge               = 300 sec\n"
        "PlugStackConfig         = /etc/slurm/plugstack.conf\n"
        "SlurmctldParameters     = (null)\n"
        f"SLURM_VERSION           = {version}\n"
        f"TopologyPlugin          = {topology}\n\n"
        "Slurmctld(primary) at slurm-head-node-1 is UP\n"
    )


def cluster(
    version: str,
    nodes: Sequence[FakeNode],
    partitions: Sequence[str],
    name: str = "crusoe",
    topology: str = "",
    plugin: str = "topology/default",
    pyxis: bool = True,
    accounting: str = "accounting_storage/none",
) -> dict[str, str]:
    """The answers of one cluster by the question that `detect` asks."""
    number = (int(version[:2]), int(version[3:5]))
    return {
        "config": config_text(version, name, plugin, accounting),
        "nodes": "".join(f"{node_line(node, number)}\n" for node in nodes),
        "partitions": "".join(f"{line}\n" for line in partitions),
        "topology": topology,
        "srun": "Usage: srun [OPTIONS(0)... [executable(0) [args(0)...]]]\n\n" + (PYXIS if pyxis else ""),
    }


def _terraform(version: str, topology: str = "", plugin: str = "topology/default") -> dict[str, str]:
    """GB200 nodes under names that say nothing, as Terraform makes them; one is drained, one down, one planned."""
    special = {
        3: ("IDLE+DRAIN", "NVLink [GPU 2] State=IDLE: xid 145 (see #7)"),
        5: ("DOWN*", "Not responding"),
        6: ("MIXED+PLANNED", ""),
        7: ("IDLE+RESERVED", ""),
        8: ("ALLOCATED", ""),
    }
    nodes = [
        FakeNode(
            f"batch-compute-node-{n:03d}",
            special.get(n, ("IDLE", ""))[0],
            "gpu:gb200:4(S:0-1)",
            "aarch64",
            144,
            870000,
            reason=special.get(n, ("", ""))[1],
            features="nvl72" if n < 19 else "",
            partitions="batch,short" if n < 3 else "batch",
        )
        for n in range(1, 37)
    ]
    lines = [
        partition_line("batch", "batch-compute-node-[001-036]", default=True),
        partition_line("short", "batch-compute-node-[001-002]", max_time="00:30:00"),
    ]
    return cluster(version, nodes, lines, topology=topology, plugin=plugin)


def _managed(version: str) -> dict[str, str]:
    """H200 pods under Kubernetes: dynamic nodes, untyped GRES, one asleep, an accounting database."""
    nodes = [
        FakeNode("test-cluster-h200-0", "IDLE+DYNAMIC_NORM", "gpu:8", features="h200,x86"),
        FakeNode("test-cluster-h200-1", "MIXED+DYNAMIC_NORM", "gpu:8", features="h200,x86"),
        FakeNode("test-cluster-h200-2", "IDLE+CLOUD+POWERED_DOWN+DYNAMIC_NORM", "gpu:8", "", features="h200,x86"),
        FakeNode(
            "test-cluster-h200-3",
            "IDLE+DRAIN+DYNAMIC_NORM",
            "gpu:8",
            features="h200,x86",
            reason="Kubernetes: pod [slurm/h200-3] evicted",
            free_text='Comment={"pod": "a b", "State=": "IDLE"}',
        ),
    ]
    for_all = partition_line("all", "test-cluster-h200-[0-3]", default=True)
    nodes = [FakeNode(**{**vars(node), "partitions": "all"}) for node in nodes]
    return cluster(
        version, nodes, [for_all], "slurm_test", "", "topology/flat", accounting="accounting_storage/slurmdbd"
    )


BLOCKS_2311 = """\
BlockName=rack1 BlockIndex=0 Nodes=batch-compute-node-[001-018]
BlockName=rack2 BlockIndex=1 Nodes=batch-compute-node-[019-036]
"""
BLOCKS_2411 = """\
BlockName=rack1 BlockIndex=0 Nodes=batch-compute-node-[001-018] BlockSize=18
BlockName=rack2 BlockIndex=1 Nodes=batch-compute-node-[019-036] BlockSize=18
BlockName=rack3 BlockIndex=2 Nodes= BlockSize=18
AggregatedBlock=rack[1-2] BlockIndex=3 Nodes=batch-compute-node-[001-036] BlockSize=36
"""
TREE = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=batch-compute-node-[001-018]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=batch-compute-node-[001-036] Switches=leaf[1-2]
"""
CLUSTERS: Mapping[str, Mapping[str, str]] = {
    "terraform-22.05": _terraform("22.05.8"),
    "terraform-23.11": _terraform("23.11.10", BLOCKS_2311, "topology/block"),
    "terraform-24.11": _terraform("24.11.5", BLOCKS_2411, "topology/block"),
    "terraform-25.05": _terraform("25.05.3", BLOCKS_2411, "topology/block"),
    "managed-24.05": _managed("24.05.4"),
    "managed-25.11": _managed("25.11.2"),
    "tree-23.02": _terraform("23.02.7", TREE, "topology/tree"),
}


def answering(answers: Mapping[str, str]) -> Callable[[Sequence[str]], str]:
    """`run` of `detect`: a question that `answers` does not have fails, as a missing command does."""

    def run(words: Sequence[str]) -> str:
        name = next((name for name, question in QUESTIONS.items() if tuple(words) == question), words[0])
        if name not in answers:
            raise LauncherError(
                "slurm-failed",
                f"{words[0]} failed (exit code 1)",
                "scontrol ping",
                status=ExitStatus.CLUSTER,
                original="slurm: no",
            )
        return answers[name]

    return run


def install(answers: Mapping[str, str], fake_slurm: Callable[[str, str], Path]) -> None:
    """The same as commands in PATH: `fake_slurm` is the fixture of that name."""
    cases: dict[str, list[str]] = {"scontrol": [], "srun": []}
    for name, text in answers.items():
        command, *words = QUESTIONS.get(name, (name,))
        folder = fake_slurm("answers", ":").parent
        (folder / f"{name}.txt").write_text(text)
        pattern = shlex.quote(" ".join(words)) if words else "*"
        cases.setdefault(command, []).append(f"{pattern}) cat {shlex.quote(f'{folder}/{name}.txt')};;")
    for command, lines in cases.items():
        fake_slurm(command, f'case "$*" in {" ".join(lines)} *) echo "{command}: error: no" >&2; exit 1;; esac')
