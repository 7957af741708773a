"""What goes wrong on clusters, each provoked on a real Slurm, and what a user reads then.

Elsewhere: nodes, GPUs, limits and drained nodes in test_preflight_on_slurm.py; topology blocks and a Slurm without
Pyxis in test_slurm_2411.py; mounts, secrets and values with commas in test_launcher_on_slurm.py; data that one node
does not have, a lost or slow GPU in test_node_check.py. Not here: when a node booted comes from the kernel (B200's
uptime: tests/unit/test_preflight.py), and a limit on user namespaces would be the whole machine's
(test_known_errors.py).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from launcher.image.squashfs_file import sidecar_path
from tests.cluster.conftest import AS_ROOT, Launch, stand_in
from tests.cluster.daemons import output, processes, wait_for
from tests.cluster.slurm_cluster import Cluster, finished_job, slurm_run
from tests.cluster.test_preflight_on_slurm import BARE, queued

pytestmark = [AS_ROOT, pytest.mark.usefixtures("own_cluster")]

HERE = os.uname().machine
OTHER = "x86_64" if HERE == "aarch64" else "aarch64"
IN_IMAGE = ("--gpu", "cpu", "--config", "cpu.toml", "--recipe", "debug", "--image", "titan.sqsh")
ON_GPUS = ("--gpu", "gb200", "--set", f"profile.arch={HERE}", "--recipe", "debug", "--image", "titan.sqsh")


@pytest.fixture
def image(small_image: Path, user_dir: Path) -> Path:
    return stand_in(small_image, user_dir / "titan.sqsh")


def program(launch: Launch, name: str, text: str | bytes) -> tuple[str, ...]:
    """Options that run it in the place of Python."""
    return ("--python", str(launch.script(name, text)), "--mount", f"{launch.directory}:{launch.directory}")


def ended(launch: Launch, name: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """`launcher status` and the logs of a run, once its job has ended."""
    wait_for((launch.run(name) / "end.json").exists, f"the end of {name}", 120)
    return launch("status", name), launch("logs", name).stdout


# --- known before anything queues ---------------------------------------------------------------------------


def other_architecture(folder: Path) -> None:
    sidecar(folder, arch=OTHER)


def newer_cuda(folder: Path) -> None:
    versions = {"torch": "2.14.1", "torchtitan": "0.3.0", "cuda": "13.0"}
    sidecar(folder, arch=HERE, driver_min="580", versions=versions)


def sidecar(folder: Path, **changes: object) -> None:
    path = sidecar_path(folder / "titan.sqsh")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("prepare", "arguments", "said", "forced"),
    [
        (other_architecture, IN_IMAGE, f"the image is for {OTHER}, the GPU profile for {HERE}", (False, True)),
        (
            newer_cuda,
            (*ON_GPUS, "--set", "profile.driver=570.1"),
            "CUDA 13.0 in the image needs driver 580, the nodes have 570.1",
            (False,),
        ),
        (
            lambda _: None,
            (*IN_IMAGE, "--tokenizer", "/nowhere/tokenizer"),
            "/nowhere/tokenizer does not exist here: if the compute nodes lack it too, the job will fail",
            (False,),
        ),
    ],
    ids=["architecture", "driver", "no tokenizer"],
)
def test_it_never_queues(
    prepare: Callable[[Path], None],
    arguments: tuple[str, ...],
    said: str,
    forced: tuple[bool, ...],
    launch: Launch,
    slurm: Cluster,
    image: Path,
    user_dir: Path,
) -> None:
    """An old driver may do with NVIDIA's cuda-compat: that one `--force` passes."""
    prepare(user_dir)
    for force in forced:
        done = launch("submit", *arguments, "--yes", "--name", "refused", *(["--force"] if force else []))
        assert (done.returncode, said in done.stderr) == (ExitStatus.INVALID, True), done.stderr
        assert "  try: " in done.stderr
    assert not [name for name in queued(slurm) if name.startswith("refused")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--env", "LD_PRELOAD=/opt/nccl/libnccl.so"),
            "--env LD_PRELOAD=/opt/nccl/libnccl.so: the container does not have the host's library",
        ),
        (("--data", "hub"), "the job has no token for the Hub"),
    ],
    ids=["LD_PRELOAD", "no token"],
)
def test_it_is_warned_of(arguments: tuple[str, ...], said: str, launch: Launch, image: Path) -> None:
    done = launch("submit", *IN_IMAGE, *arguments, "--yes", "--name", "warned")
    assert done.returncode == 0 and said in done.stderr.replace("\n", " "), done.stderr


# --- what the script does not walk into ---------------------------------------------------------------------


def test_a_relative_image_no_container_name_a_port_of_its_own_and_the_nodes_limits(
    launch: Launch, slurm: Cluster, image: Path, user_dir: Path
) -> None:
    """Submitted from a shell with a limit of 77 open files, which Slurm gives to a job's steps if nobody forbids it."""
    low = ["sh", "-c", 'ulimit -n 77; exec "$@"', "sh"]
    wrap = ["sbatch", "--parsable", f"--output={user_dir}/plain", "--wrap=srun sh -c 'ulimit -n'"]
    plain = slurm_run(slurm, [*low, *wrap], cwd=user_dir).stdout.strip()
    finished_job(slurm, plain)
    assert (user_dir / "plain").read_text().strip() == "77"

    probe = program(launch, "probe", '#!/bin/sh\necho "limit $(ulimit -n)"\n')
    in_low = replace(launch, command=(*low, *launch.command))
    done = in_low("submit", *IN_IMAGE, *probe, "--yes", "--name", "probe", "--nodes", "2")
    assert done.returncode == 0, done.stderr
    status, logs = ended(launch, "probe")
    job = json.loads((launch.run("probe") / "job.json").read_text())["job_id"]
    assert status.returncode == 0, status.stderr + logs
    assert logs.count("limit ") == 2 and "limit 77" not in logs
    ran = slurm_run(slurm, ["scontrol", "write", "batch_script", job, "-"]).stdout
    assert ran.rstrip() == (launch.run("probe") / "job.sbatch").read_text().rstrip()
    assert f"--container-image={image}" in ran and "--container-name" not in ran
    assert f":{20000 + int(job) % 10000}\n" in (launch.run("probe") / "logs" / "job.log").read_text()


@pytest.fixture
def hosts_of_node_1(slurm: Cluster, user_dir: Path) -> Iterator[Path]:
    """What the first node alone reads as /etc/hosts; Slurm knows the first two nodes by name and not by address."""
    directory, (first, second) = slurm.directory, slurm.nodes[:2]
    command_line = f"slurmd\0-D\0-N\0{first}\0-f\0{directory}/slurm.conf\0"
    (slurmd,) = [pid for pid, command, _ in processes() if command == command_line]
    hosts = user_dir / "hosts"
    shutil.copy(directory / "hosts", hosts)
    addresses = {line.split()[1]: line.split()[0] for line in hosts.read_text().splitlines() if "node-" in line}

    def known_as(names: dict[str, str]) -> None:
        for node, address in names.items():
            update = ["scontrol", "update", f"NodeName={node}", f"NodeAddr={address}"]
            assert slurm_run(slurm, update).returncode == 0

    inside = ("nsenter", "--mount", "--pid", f"--target={slurmd}")
    output(*inside, "mount", "--bind", str(hosts), "/etc/hosts")
    known_as({node: node for node in (first, second)})
    yield hosts
    known_as({node: addresses[node] for node in (first, second)})
    output(*inside, "umount", "/etc/hosts")


def test_a_first_node_whose_name_is_loopback(
    launch: Launch, slurm: Cluster, user_dir: Path, hosts_of_node_1: Path
) -> None:
    """As Debian does it: a machine's own name is 127.0.1.1. Another node's address tells its own; without, it stops."""
    lines = hosts_of_node_1.read_text().splitlines()
    first, second = slurm.nodes[:2]
    (address,) = [line.split()[0] for line in lines if line.endswith(first)]
    words = (*BARE, *program(launch, "nothing", "#!/bin/sh\n")[:2], "--nodes", "2", "--yes")

    def run(name: str, *loopback: str) -> tuple[subprocess.CompletedProcess[str], str]:
        text = [f"127.0.1.1 {line.split()[1]}" if line.endswith(loopback) else line for line in lines]
        hosts_of_node_1.write_text("\n".join(text) + "\n")
        done = launch("submit", *words, "--nodelist", f"{first},{second}", "--name", name)
        assert done.returncode == 0, done.stderr
        return ended(launch, name)

    status, logs = run("found", first)
    assert status.returncode == 0 and f"rendezvous {address}:" in logs, status.stderr + logs
    status, logs = run("stops", first, second)
    assert json.loads((launch.run("stops") / "end.json").read_text())["exit_code"] == 76
    assert "cause: the first node resolves to a loopback address" in status.stderr, status.stderr + logs
    assert f"launcher: {first} resolves to no address but loopback: getent ahosts " in status.stderr


# --- known in the job, and said afterwards ------------------------------------------------------------------


def test_a_program_of_another_architecture(launch: Launch, image: Path, user_dir: Path) -> None:
    """The image's sidecar knows no better; its program is for a machine that does not exist."""
    foreign = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHI", 2, 0x1234, 1).ljust(48, b"\0")
    done = launch("submit", *IN_IMAGE, *program(launch, "foreign", foreign), "--yes", "--name", "foreign")
    assert done.returncode == 0, done.stderr
    status, logs = ended(launch, "foreign")
    assert "cause: the image was built for another CPU architecture than the node's" in status.stderr, (
        status.stderr + logs
    )
    assert "Exec format error" in status.stderr and "launcher image inspect" in status.stderr


def lfs_pointers(folder: Path) -> None:
    (folder / "c4" / "en").mkdir(parents=True)
    (folder / "c4" / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/*.json.gz\n---\n")
    for number in range(2):
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{number:064x}\nsize 319000000\n"
        (folder / "c4" / "en" / f"c4-train.{number:05d}-of-01024.json.gz").write_text(text)


# A stand-in that knows nothing but the NVLink domain: the nodes are in one each.
NVIDIA_SMI = """#!/bin/sh
case "$1" in *fabric.cliqueId*) echo "GPU-0, 4f1c2e9a-0000-4d00-8000-0001, ${SLURMD_NODENAME##*-}" ;; *) exit 2 ;; esac
"""


def test_what_only_the_nodes_can_tell(launch: Launch, slurm: Cluster, image: Path, user_dir: Path) -> None:
    """All of it in one go: Git LFS pointers, no IMEX channel, InfiniBand device or tokenizer; on one node a full
    disk.
    """
    (user_dir / "tokenizer").mkdir()
    lfs_pointers(user_dir)
    full = f'[ "$SLURMD_NODENAME" = {slurm.nodes[1]} ] && mount -t tmpfs -o size=64m none /tmp'
    program(launch, "nvidia-smi", NVIDIA_SMI)
    probe = program(launch, "full", f'#!/bin/sh\n{full}\nPATH={user_dir}:$PATH exec python3 "$@"\n')
    words = (*ON_GPUS, *probe, "--data", "c4", "--tokenizer", "tokenizer", "--env", "NCCL_IB_HCA=mlx5_99")
    nodes = ("--check", "quick", "--nodes", "2", "--nodelist", ",".join(slurm.nodes[:2]))
    seen_here = launch("submit", *words, *nodes, "--yes", "--name", "sick")
    assert seen_here.returncode == ExitStatus.INVALID and "[data-unfit]" in seen_here.stderr, seen_here.stderr
    done = launch("submit", *words, *nodes, "--force", "--name", "sick")
    assert done.returncode == 0 and "c4-train.00000-of-01024.json.gz is a Git LFS pointer" in done.stderr, done.stderr
    status, logs = ended(launch, "sick")
    assert status.returncode == ExitStatus.NODES_UNFIT, status.stderr + logs
    verdict = json.loads((launch.run("sick") / "nodes" / "check.json").read_text())
    found = {host: {one["name"]: one for one in verdict["unfit"] if one["host"] == host} for host in slurm.nodes[:2]}
    assert set(found[slurm.nodes[1]]) - set(found[slurm.nodes[0]]) == {"space"}
    space = found[slurm.nodes[1]]["space"]
    assert space["fault"] == "node" and "0.1 GiB are free in /tmp/" in space["why"], space
    told = found[slurm.nodes[0]]
    assert "mlx5_99 is missing" in told["infiniband"]["why"] and told["infiniband"]["fault"] == "run"
    assert "NVLink cannot cross nodes" in told["imex"]["why"]
    assert f"2 of 2 shards in {user_dir}/c4/en are Git LFS pointers, not data" in told["data"]["why"], told
    assert "tokenizer.json: No such file or directory" in told["tokenizer"]["why"]
    assert "the job straddles 2 NVLink domains (1 + 1 nodes)" in " ".join(one["what"] for one in verdict["warnings"])
    for one in verdict["unfit"]:
        assert f"titan-check: unfit {one['host']} ({one['fault']}): {one['why']}" in logs
    assert "titan-command" not in logs  # torchrun was started nowhere
