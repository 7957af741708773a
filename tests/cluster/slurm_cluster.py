"""A real Slurm on one machine, for tests: one slurmctld and several slurmd, started as root.

Each slurmd runs in network, PID, UTS and mount namespaces of its own, so nodes have different names
and addresses, talk to each other over TCP, and see only their own processes. slurmctld and the
commands run on the host, which one more cable joins to the nodes' network; so ordinary users need
no privilege to use sbatch, squeue, srun, scancel and scontrol.
"""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.daemons import (
    OWN_NAMESPACES,
    claim_subnet,
    has_own_network,
    output,
    plug_in,
    remove_leftovers,
    spawn,
    start_bridge,
    stop_recorded,
    wait_for,
)

START_TIMEOUT_S = 40.0
CONTROLLER = "slurm-head-node-1"
PLUGIN_SOURCES = [str(Path(__file__).with_name(name)) for name in ("spank_container.c", "container.c")]
COMPILE = ("gcc", "-shared", "-fPIC", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror")

DEBIAN_PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "gcc": "gcc",
    "mksquashfs": "squashfs-tools",
    "ip": "iproute2",
    "unshare": "util-linux",
}


@dataclass(frozen=True)
class Cluster:
    """A Slurm that can be used: with `env`, any Slurm command talks to it."""

    directory: Path
    slurm_conf: Path | None  # None: where Slurm looks by itself
    env: dict[str, str]
    nodes: tuple[str, ...]
    partitions: tuple[str, ...]
    gpus_per_node: int
    record: Path | None = field(default=None)  # None: not started here, so never stopped here
    root: Path | None = None  # of another release's nodes


@dataclass(frozen=True)
class Release:
    """Another Slurm release: a root directory that holds it, what to add to slurm.conf, and topology.conf."""

    root: Path
    conf: str
    topology: str


@dataclass(frozen=True)
class User:
    """An account of the machine that commands can be run as."""

    name: str
    uid: int
    gid: int
    home: Path


def missing_packages() -> list[str]:
    """Debian packages without which no cluster can be started, found by what they install."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = {package for tool, package in DEBIAN_PACKAGES.items() if not shutil.which(tool, path=path)}
    if not Path("/usr/include/slurm/spank.h").exists():
        missing.add("libslurm-dev")
    return sorted(missing)


def slurm_run(
    cluster: Cluster,
    command: Sequence[str | Path],
    user: User | None = None,
    cwd: Path | None = None,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command with the cluster's environment, as root or as `user`, and return what it printed."""
    account: dict[str, object] = {}
    variables = {"HOME": "/root", "USER": "root", "LOGNAME": "root"} | cluster.env
    if user:
        variables |= {"HOME": str(user.home), "USER": user.name, "LOGNAME": user.name}
        cwd = cwd or user.home
    if user and user.uid != os.getuid():
        account = {"user": user.uid, "group": user.gid, "extra_groups": []}
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [str(word) for word in command],
        env={**variables, **(env or {})},
        cwd=cwd or cluster.directory,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **account,
    )


def job_fields(cluster: Cluster, job: str) -> dict[str, str]:
    """What `scontrol show job` says about a job: JobState, Reason, ExitCode, and so on."""
    shown = slurm_run(cluster, ["scontrol", "-o", "show", "job", job])
    if shown.returncode:
        raise RuntimeError(shown.stderr.strip())
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def finished_job(cluster: Cluster, job: str, timeout: float = 60) -> dict[str, str]:
    """`job_fields` of a job, once it has left its nodes; TimeoutError if it does not do so in time."""
    running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")
    wait_for(lambda: job_fields(cluster, job)["JobState"] not in running, f"the end of job {job}", timeout)
    return job_fields(cluster, job)


def start_cluster(
    directory: Path,
    nodes: int = 4,
    gpus_per_node: int = 4,
    release: Release | None = None,
    settings: Mapping[str, str] | None = None,
) -> Cluster:
    """Start a Slurm whose files all lie in `directory`, and wait until every node is idle.

    It is the machine's own, or that of `release`, whose jobs then see that release's files and /tmp only.
    `settings` are lines of slurm.conf, in place of those of the same name.
    Ordinary users must be able to enter `directory`. Whatever goes wrong on the way, nothing that was
    started is left running, and the error holds the ends of the daemons' logs.
    """
    directory = directory.resolve()
    _check_others_can_enter(directory)
    remove_leftovers()
    record, subnet = claim_subnet(directory)
    names = tuple(f"gpu-compute-node-{number:03d}" for number in range(1, nodes + 1))
    addresses = {CONTROLLER: f"{subnet}.1"} | {name: f"{subnet}.{11 + i}" for i, name in enumerate(names)}
    path = os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    if release:
        path = f"{directory}/bin:{path}"
    cluster = Cluster(
        directory=directory,
        slurm_conf=directory / "slurm.conf",
        env={"SLURM_CONF": str(directory / "slurm.conf"), "PATH": path, "LANG": "C.UTF-8"},
        nodes=names,
        partitions=("batch", "small"),
        gpus_per_node=gpus_per_node,
        record=record,
        root=release.root if release else None,
    )
    try:
        _write_files(cluster, addresses, release, settings or {})
        _start_daemons(cluster, record, addresses)
        _wait_until_idle(cluster)
    except Exception as error:
        logs = _log_tails(directory)
        stop_cluster(cluster)
        raise RuntimeError(f"Slurm did not start in {directory}: {error}\n{logs}") from error
    except BaseException:  # Ctrl-C
        stop_cluster(cluster)
        raise
    return cluster


def stop_cluster(cluster: Cluster) -> None:
    """End what `start_cluster` started, jobs included. The directory stays, for its logs."""
    if cluster.record is not None:
        stop_recorded(cluster.record)


def existing_cluster(directory: Path) -> Cluster:
    """The Slurm that this machine already belongs to, described by sinfo; `directory` is for the tests."""
    listed = output("sinfo", "-h", "-N", "-o", "%N|%R|%G").split()
    rows = [line.split("|") for line in listed]
    gpus = [int(count) for count in re.findall(r"gpu:(?:\w+:)?(\d+)", "".join(row[2] for row in rows))]
    conf = os.environ.get("SLURM_CONF")
    env = {name: os.environ[name] for name in ("PATH", "SLURM_CONF", "LANG") if name in os.environ}
    return Cluster(
        directory=directory,
        slurm_conf=Path(conf) if conf else None,
        env=env,
        nodes=tuple(sorted({row[0] for row in rows})),
        partitions=tuple(dict.fromkeys(row[1] for row in rows)),
        gpus_per_node=max(gpus, default=0),
    )


@contextlib.contextmanager
def running_cluster(
    directory: Path,
    nodes: int = 4,
    gpus_per_node: int = 4,
    release: Release | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """`start_cluster` and `stop_cluster` around a block."""
    cluster = start_cluster(directory, nodes, gpus_per_node, release, settings)
    try:
        yield cluster
    finally:
        stop_cluster(cluster)


# ------------------------------------------------------------------------------------------ files


def _check_others_can_enter(directory: Path) -> None:
    directory.chmod(0o755)
    for parent in directory.parents:
        if not parent.stat().st_mode & 0o001:
            raise RuntimeError(f"ordinary users cannot enter {parent}, so they could not use a Slurm in it")


def _write_files(
    cluster: Cluster, addresses: dict[str, str], release: Release | None, settings: Mapping[str, str]
) -> None:
    root = cluster.directory
    for name in ("munge", "state", "spool", "log", "run", "gpu", "containers"):
        (root / name).mkdir(mode=0o755, exist_ok=True)
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for number in range(cluster.gpus_per_node):  # a GPU here is one more /dev/null
        os.mknod(root / "gpu" / f"nvidia{number}", 0o020666, os.makedev(1, 3))
    hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (root / "hosts").write_text("\n".join(hosts) + "\n")
    enter = ENTER.format(root=shlex.quote(str(release.root))) if release else ""
    (root / "node.sh").write_text(NODE_SCRIPT.format(enter=enter))
    (root / "head.sh").write_text(HEAD_SCRIPT.format(enter=enter))
    gpus = f"{root}/gpu/nvidia[0-{cluster.gpus_per_node - 1}]"
    (root / "gres.conf").write_text(f"Name=gpu Type=gb200 File={gpus}\n")
    conf = _slurm_conf(cluster, addresses, settings)
    if release:  # without containers: the plug-in is built against the machine's own Slurm
        (root / "topology.conf").write_text(release.topology)
        (root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (root / "bin").mkdir()
        for name in ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol", "sacct"):
            program = root / "bin" / name
            program.write_text(COMMAND.format(name=name, root=shlex.quote(str(release.root))))
            program.chmod(0o755)
        (root / "slurm.conf").write_text(conf + release.conf)
        return
    plugin = root / "spank_container.so"
    output(*COMPILE, "-o", str(plugin), *PLUGIN_SOURCES)
    (root / "plugstack.conf").write_text(f"required {plugin} staging={root}/containers\n")
    (root / "slurm.conf").write_text(f"{conf}PlugStackConfig={root}/plugstack.conf\n")


# What a process does to see another release's files, and of this machine's only /tmp and the kernel's.
ENTER = (
    "for d in /tmp /dev /proc /sys; do mount --rbind $d {root}$d; done; mount --bind /etc/hosts "
    "{root}/etc/hosts; exec chroot {root}"
)

COMMAND = """\
#!/bin/sh
# A Slurm command of another release; inside a job that release's own.
[ -d {root} ] || exec /usr/bin/{name} "$@"
exec unshare --mount --propagation slave sh -c 'for d in /tmp /dev /proc; do mount --rbind $d {root}$d; done
exec chroot {root} /usr/bin/{name} "$@"' {name} "$@"
"""

NODE_SCRIPT = """\
#!/bin/sh
# usage: node.sh NAME DIRECTORY: a compute node; runs as process 1 of the node's own namespaces.
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
until ip -4 -o address show dev eth0 2>/dev/null | grep -q inet; do sleep 0.02; done
({enter} slurmd -D -N "$1" -f "$2/slurm.conf") &
wait $!
[ ! -e "$2/run/$1.alone" ] || exec sleep infinity # a test ends slurmd, and its node lives on
"""

HEAD_SCRIPT = """\
#!/bin/sh
# usage: head.sh NAME DIRECTORY: slurmctld, under a name of its own but in the host's network.
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
{enter} slurmctld -D -f "$2/slurm.conf"
"""


def _slurm_conf(cluster: Cluster, addresses: dict[str, str], settings: Mapping[str, str]) -> str:
    """Accounting is off and finished jobs are kept for 300 s, as on Crusoe's Terraform clusters."""
    root = cluster.directory
    general = f"""\
        ClusterName=launchertest
        SlurmctldHost={CONTROLLER}({addresses[CONTROLLER]})
        SlurmctldPort=16817
        SlurmdPort=16818
        CommunicationParameters=NoCtldInAddrAny
        SlurmUser=root
        SlurmdUser=root
        AuthType=auth/munge
        AuthInfo=socket={root}/munge/socket,cred_expire=5
        CredType=cred/munge
        StateSaveLocation={root}/state
        SlurmdSpoolDir={root}/spool/%n
        SlurmctldPidFile={root}/run/slurmctld.pid
        SlurmdPidFile={root}/run/%n.pid
        SlurmctldLogFile={root}/log/slurmctld.log
        SlurmdLogFile={root}/log/%n.log
        SlurmdParameters=config_overrides
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        AccountingStorageType=accounting_storage/none
        JobCompType=jobcomp/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        GresTypes=gpu
        ReturnToService=2
        MinJobAge=300
        KillWait=5
        SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
        """
    values = {**dict(line.split("=", 1) for line in textwrap.dedent(general).split()), **settings}
    lines = [f"{name}={value}" for name, value in values.items()]
    for name in cluster.nodes:
        lines.append(
            f"NodeName={name} NodeAddr={addresses[name]} Sockets=2 CoresPerSocket=8 ThreadsPerCore=1 "
            f"RealMemory=16000 Gres=gpu:gb200:{cluster.gpus_per_node} State=UNKNOWN"
        )
    lines.append(f"PartitionName=batch Nodes={','.join(cluster.nodes)} Default=YES MaxTime=INFINITE State=UP")
    lines.append(f"PartitionName=small Nodes={cluster.nodes[0]} MaxTime=5 State=UP")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------- daemons


def _start_daemons(cluster: Cluster, record: Path, addresses: dict[str, str]) -> None:
    root = str(cluster.directory)
    logs = cluster.directory / "log"
    munge = f"{root}/munge"
    spawn(  # --force: munged dislikes directories that others may write in, such as /tmp
        *(record, logs / "munged.out", "munged", "--foreground", "--force"),
        *(f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
        *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
    )
    bridge = start_bridge(record, logs / "bridge.out")
    address = addresses[CONTROLLER]
    plug_in(bridge, os.getpid(), f"ltest{address.split('.')[2]}", address)
    wait_for(lambda: os.path.exists(f"{munge}/socket"), "munged's socket")
    start_controller(cluster)
    for name in cluster.nodes:
        start_node(cluster, name, bridge, addresses[name])


def start_controller(cluster: Cluster) -> int:
    """Start slurmctld, which goes on where one before it was ended, and return the pid of its namespaces."""
    assert cluster.record
    root = str(cluster.directory)
    log = cluster.directory / "log/slurmctld.out"
    return spawn(cluster.record, log, *OWN_NAMESPACES, "--uts", "sh", f"{root}/head.sh", CONTROLLER, root)


def start_node(cluster: Cluster, name: str, bridge: int, address: str) -> int:
    """Start a node that does not run, and return the pid of its namespaces, whose end is the node's."""
    assert cluster.record
    root = str(cluster.directory)
    own = (*OWN_NAMESPACES, "--uts", "--net")
    pid = spawn(cluster.record, cluster.directory / f"log/{name}.out", *own, "sh", f"{root}/node.sh", name, root)
    wait_for(functools.partial(has_own_network, pid), f"the network namespace of {name}")
    plug_in(bridge, pid, "eth0", address)
    return pid


def _wait_until_idle(cluster: Cluster) -> None:
    def all_idle() -> bool:
        seen = slurm_run(cluster, ["sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T"])
        return seen.stdout.splitlines() == [f"{name} idle" for name in cluster.nodes]

    wait_for(all_idle, f"{len(cluster.nodes)} idle nodes", START_TIMEOUT_S)


def _log_tails(directory: Path) -> str:
    """The last lines of each daemon's log: what a failed start has to say."""
    texts: list[str] = []
    for log in sorted((directory / "log").glob("*.out")):
        lines = log.read_text(errors="replace").splitlines()[-8:]
        texts += [f"--- {log.name}", *lines]
    return "\n".join(texts)
