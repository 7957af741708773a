"""What slurm/node.py checks before it becomes torchrun, run as a process with stand-ins for torch and torchtitan."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.node_place import Place, cpu, gpu, started
from tests.unit.test_titan_command import debug_node

__all__ = ["cpu", "gpu"]  # fixtures


def test_a_healthy_gpu_node_says_so_before_torchrun_starts(gpu: Place) -> None:
    done = gpu.start(TITAN_HEAD_ADDR="127.0.0.1", TITAN_HEAD_PORT="0")
    assert done.stdout.splitlines()[0] == (
        'titan-node: ok node=0 host=gpu001 device=cuda gpus=4 gpu="NVIDIA GB200"'
        " torch=2.14.1+cu130 cuda=13.0 torchtitan=0.3.0 iface=lo"
    )
    assert done.stdout.splitlines()[1].startswith("titan-command: ")
    arguments, _, directory = started(done)
    assert "--nproc-per-node=4" in arguments and "torchtitan.train" in arguments
    assert directory == str(gpu.run_dir)
    versions = {"torch": "2.14.1+cu130", "torchtitan": "0.3.0", "cuda": "13.0", "nccl": "2.30.7"}
    record = gpu.record()  # holds what a row of results needs
    assert record.items() >= {**versions, "node": 0, "host": "gpu001", "ok": True}.items()
    assert record["gpu_names"] == ["NVIDIA GB200"] * 4 and record["command"][1:3] == ["-m", "torch.distributed.run"]
    assert {"driver", "python", "arch", "address", "iface", "data_files"} <= record.keys()
    assert [path.name for path in (gpu.run_dir / "nodes").iterdir()] == ["0000-gpu001.json"]


@pytest.mark.parametrize(("wanted", "limit"), [("", 0), ("1", 4096)])
def test_ranks_leave_no_core_dumps_unless_they_are_asked_for(wanted: str, limit: int, gpu: Place) -> None:
    run = gpu.site / "torch" / "distributed" / "run.py"
    run.write_text("import resource; print('CORES', resource.getrlimit(resource.RLIMIT_CORE)[0])")
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (4096, before[1]))
    try:
        assert gpu.start(LAUNCHER_CORE_DUMPS=wanted).stdout.splitlines()[-1] == f"CORES {limit}"
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_a_cpu_node_trains_behind_the_patches_and_sees_no_gpu(cpu: Place) -> None:
    done = cpu.start(HF_TOKEN="hf_do_not_tell")
    arguments, env, _ = started(done)
    assert "titan.cpu" in arguments and "torchtitan.train" not in arguments
    assert env["PYTHONPATH"].split(os.pathsep) == [f"{cpu.run_dir}/job", str(cpu.site)]
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert env[name].startswith(f"{cpu.run_dir.parent}/titan-{os.getuid()}-")
    assert env["PYTHONUNBUFFERED"] == "1"  # a step is seen when it is done, and before what torchrun says of the end
    assert env["HF_HUB_OFFLINE"] == env["HF_DATASETS_OFFLINE"] == "1"
    names = [env[f"{library}_SOCKET_IFNAME"] for library in ("NCCL", "GLOO", "TP")]
    assert names == ["=lo", "lo", "lo"]  # eth1 would be eth10, too, for NCCL alone
    said = done.stdout.splitlines()
    assert "hf_do_not_tell" not in "\n".join(said[:-1]) + json.dumps(cpu.record())
    # The command that is printed can be typed again.
    command, clean = said[1].removeprefix("titan-command: "), {"PATH": os.environ["PATH"]}
    again = subprocess.run(["bash", "-c", command], env=clean, capture_output=True, text=True, timeout=60)
    assert started(again)[0] == arguments


def test_the_toml_eras_configuration_file_is_there(tmp_path: Path) -> None:
    place = Place(tmp_path, debug_node(), titan="0.2.2")
    arguments, _, _ = started(place.start())
    assert arguments[-1] == f"--job.config_file={place.run_dir}/job/titan.toml"
    assert "steps = 20" in (place.run_dir / "job" / "titan.toml").read_text()


def test_what_is_set_already_wins(cpu: Place) -> None:
    _, env, _ = started(cpu.start(NCCL_SOCKET_IFNAME="ib0", HF_HOME="/my/hf", HF_HUB_OFFLINE="0"))
    assert (env["NCCL_SOCKET_IFNAME"], env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("ib0", "/my/hf", "0")
    assert "HF_DATASETS_OFFLINE" not in env  # it would win over the other in `datasets`
    assert env["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("home", ["", "/nonexistent/home"])
def test_a_home_that_is_missing_is_replaced(cpu: Place, home: str) -> None:
    _, env, _ = started(cpu.start(HOME=home))
    assert os.access(env["HOME"], os.W_OK)


def test_streaming_from_the_hub_stays_online(cpu: Place) -> None:
    cpu.change(data="hub")
    _, env, _ = started(cpu.start())
    assert not {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"} & env.keys()


@pytest.mark.parametrize(
    ("gpus", "words", "fault"),
    [("3", "3 GPUs are visible, the profile says 4", "node"), ("8", "8 GPUs", "run"), ("0", "0 GPUs", "run")],
)
def test_missing_gpus_are_a_failure_and_never_a_cpu_run(gpu: Place, gpus: str, words: str, fault: str) -> None:
    """A node that has lost one is to blame; with none, or too many, the image or the profile is wrong."""
    assert words in gpu.refused(FAKE_GPUS=gpus)
    assert gpu.record()["ok"] is False and words in gpu.record()["why"]
    assert [one["fault"] for one in gpu.record()["problems"]] == [fault]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 319338842\n"


class Refusal(NamedTuple):
    """What is wrong, with the node or with its surroundings, and what its one line says."""

    words: str
    wrong: Callable[[Place], object] = lambda place: None
    env: Mapping[str, str] = {}


def every_shard(content: bytes) -> Callable[[Place], object]:
    return lambda place: [shard.write_bytes(content) for shard in (place.data / "en").glob("*train*")]


def one_shard(content: bytes) -> Callable[[Place], object]:
    return lambda place: (place.data / "en" / "c4-train.00001-of-00002.json.gz").write_bytes(content)


def first_shard_elsewhere(place: Place) -> None:
    shard = place.data / "en" / "c4-train.00000-of-00002.json.gz"
    shard.unlink()
    shard.symlink_to("/elsewhere/c4-train.json.gz")


def readme(text: str) -> Refusal:
    return Refusal("not describe the configuration `en`", lambda place: (place.data / "README.md").write_text(text))


def node_json(text: str, words: str) -> Refusal:
    return Refusal(words, lambda place: (place.run_dir / "job" / "node.json").write_text(text))


OF_A_GPU_NODE = {
    "old driver": Refusal(
        'CUDA 13.0 does not start: The NVIDIA driver \\"570\\" is too old',
        env={"FAKE_CUDA_ERROR": 'The NVIDIA driver "570"\n is too old'},
    ),
    "torch without CUDA": Refusal("torch 2.13.0+cpu was built without CUDA", env={"FAKE_TORCH": "2.13.0+cpu"}),
    "torch broken": Refusal("ImportError: libcudart.so.13", env={"FAKE_TORCH_BROKEN": "1"}),
    "no head node": Refusal("TITAN_HEAD_ADDR is not set", lambda place: place.change(nodes=2)),
    "loopback": Refusal("is loopback", lambda place: place.change(nodes=2), {"TITAN_HEAD_ADDR": "127.0.0.1"}),
    "IPv6": Refusal("the nodes meet over IPv4", lambda place: place.change(nodes=2), {"TITAN_HEAD_ADDR": "::1"}),
    "no route": Refusal("no route to the head node x.invalid", env={"TITAN_HEAD_ADDR": "x.invalid"}),
}
OF_A_CPU_NODE = {
    "no torchtitan": Refusal("torchtitan is not installed for", lambda place: shutil.rmtree(place.site / "torchtitan")),
    "another torchtitan": Refusal(
        "torchtitan 9.9.0 is installed; this launcher speaks 0.2.1 to 0.2.2 and 0.3.x",
        lambda place: next(place.site.glob("*/METADATA")).write_text("Name: torchtitan\nVersion: 9.9.0\n"),
    ),
    "a recipe for GPUs": Refusal("torch.compile is switched off on a CPU", lambda place: place.recipe(compile=True)),
    "no port": Refusal("2 nodes cannot meet at port 0", lambda place: place.change(nodes=2)),
    "no data": Refusal("c4 is not a directory on this node", lambda place: shutil.rmtree(place.data)),
    "data not named": Refusal("no data directory was given", lambda place: place.change(data="")),
    "no README": Refusal("README.md: No such file", lambda place: (place.data / "README.md").unlink()),
    "README without header": readme("# C4\nconfig_name: en\n"),
    "README of another language": readme("---\nconfigs:\n- config_name: de\n---\n"),
    "no shards": Refusal("holds no *.json.gz", lambda place: shutil.rmtree(place.data / "en")),
    "pointers": Refusal("2 of 2 shards in", every_shard(POINTER)),
    "one pointer": Refusal("are Git LFS pointers, not data", one_shard(POINTER)),
    "not gzip": Refusal("is not a gzip file", every_shard(b"<html>" * 100)),
    "link out of the node": Refusal("leads to /elsewhere/c4-train.json.gz, which is", first_shard_elsewhere),
    "run directory": Refusal("cannot be written", lambda place: (place.run_dir / "nodes").write_text("a file")),
    "node.json cut": node_json("{", "is not JSON"),
    "node.json of another kind": node_json("[1]", "schema 2"),
    "node.json deep": node_json("[" * 200_000, "is not JSON"),
}


@pytest.mark.parametrize("case", OF_A_GPU_NODE.values(), ids=OF_A_GPU_NODE.keys())
def test_a_gpu_node_refuses(case: Refusal, gpu: Place) -> None:
    case.wrong(gpu)
    assert case.words in gpu.refused(**{"TITAN_HEAD_PORT": "20001", **case.env})


@pytest.mark.parametrize("case", OF_A_CPU_NODE.values(), ids=OF_A_CPU_NODE.keys())
def test_a_cpu_node_refuses(case: Refusal, cpu: Place) -> None:
    case.wrong(cpu)
    head = {"TITAN_HEAD_ADDR": "127.0.0.1", "TITAN_HEAD_PORT": "abc"}
    line = cpu.refused(**head, **case.env)
    assert case.words in line
    if "launcher stage" in line:
        assert f"launcher stage c4 --to {cpu.data} --for {cpu.run_dir}/run.toml" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{", "is not JSON"), ("[]", "not a JSON object"), ("[" * 200_000, "is not JSON")],
    ids=["missing", "broken", "list", "nested"],
)
def test_the_tokenizer_is_incomplete(cpu: Place, name: str, content: str | None, words: str) -> None:
    (cpu.tokenizer / name).unlink() if content is None else (cpu.tokenizer / name).write_text(content)
    line = cpu.refused()
    assert f"{cpu.tokenizer}/{name}" in line and words in line
    assert f"launcher stage tokenizer --to {cpu.tokenizer}" in line


def test_no_node_json(cpu: Place) -> None:
    assert "No such file" in cpu.refused("/nowhere/node.json")
    assert "one argument is needed" in cpu.refused("a", "b")
