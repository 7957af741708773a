"""slurm/node.py as a process in a run directory of its own, with a torch that only pretends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher import sample
from launcher.stage import view
from tests.unit.test_titan_command import LLAMA3_8B, debug_node

ROOT = Path(__file__).parent.parent.parent
FAILED = 20

FAKE_TORCH = """
import os
if os.environ.get("FAKE_TORCH_BROKEN"):
    raise ImportError("libcudart.so.13: cannot open shared object file")
__version__ = os.environ.get("FAKE_TORCH", "2.14.1+cu130")
class version:
    cuda = None if "+cpu" in __version__ else "13.0"
class cuda:
    device_count = staticmethod(lambda: int(os.environ.get("FAKE_GPUS", "4")))
    get_device_name = staticmethod(lambda index: "NVIDIA GB200")
    class nccl:
        version = staticmethod(lambda: (2, 30, 7))
    @staticmethod
    def init():
        if os.environ.get("FAKE_CUDA_ERROR"):
            raise RuntimeError(os.environ["FAKE_CUDA_ERROR"])
"""
FAKE_RUN = "import json, os, sys\nprint('STARTED', json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"


class Place:
    """A run directory as `launcher submit` makes it, and a folder of made-up packages."""

    def __init__(self, folder: Path, node: dict[str, Any], titan: str | None = "0.3.0") -> None:
        self.run_dir, self.site = folder / "run", folder / "site"
        (self.run_dir / "job").mkdir(parents=True)
        shutil.copy(ROOT / "slurm" / "node.py", self.run_dir / "job")
        shutil.copytree(ROOT / "launcher" / "titan", self.run_dir / "job" / "titan")
        shutil.copytree(ROOT / "slurm" / "check", self.run_dir / "job" / "check")
        self.data, self.tokenizer = folder / "c4", folder / "tokenizer"
        sample.write_c4_sample(self.data, train_files=2, documents_per_file=3)
        sample.write_tokenizer(self.tokenizer)
        self.write_node(
            {**node, "data": str(self.data), "data_source": str(self.data), "tokenizer": str(self.tokenizer)}
        )
        (self.site / "torch" / "distributed").mkdir(parents=True)
        (self.site / "torch" / "__init__.py").write_text(FAKE_TORCH)
        (self.site / "torch" / "distributed" / "__init__.py").touch()
        (self.site / "torch" / "distributed" / "run.py").write_text(FAKE_RUN)
        if titan is not None:
            self.install_titan(titan)

    def write_node(self, node: dict[str, Any]) -> None:
        self.node = {"check": "off", **node, "run_dir": str(self.run_dir)}  # its torch cannot multiply
        (self.run_dir / "job" / "node.json").write_text(json.dumps(self.node))

    def install_titan(self, version: str) -> None:
        (self.site / "torchtitan").mkdir()
        (self.site / "torchtitan" / "__init__.py").touch()
        info = self.site / f"torchtitan-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchtitan\nVersion: {version}\n")

    def start(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = self.start_unchecked(*arguments, **env)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def start_unchecked(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            # -S: without the packages of the environment that runs these tests
            [sys.executable, "-S", str(self.run_dir / "job" / "node.py"), *(arguments or [f"{self.run_dir}/job/node.json"])],
            env={
                "PATH": os.environ["PATH"], "PYTHONPATH": str(self.site), "HOME": str(self.run_dir),
                "SLURMD_NODENAME": "gpu001", "TITAN_JOB_ID": f"t{os.getpid()}", "TMPDIR": str(self.run_dir.parent),
                **env,
            },
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done

    def refused(self, *arguments: str, **env: str) -> str:
        """The FAIL line of a start that must fail, without anything having been started."""
        done = self.start(*arguments, **env)
        lines = done.stdout.splitlines()
        assert done.returncode == FAILED, done
        assert len(lines) == 1 and lines[0].startswith("titan-node: FAIL node="), lines
        assert ' why="' in lines[0] and lines[0].endswith('"') and ' fix=""' not in lines[0], lines
        return lines[0]

    def record(self, name: str = "0000-gpu001") -> dict[str, Any]:
        value = json.loads((self.run_dir / "nodes" / f"{name}.json").read_text())
        assert isinstance(value, dict)
        return value


@pytest.fixture
def cpu(tmp_path: Path) -> Place:
    return Place(tmp_path, debug_node())


@pytest.fixture
def gpu(tmp_path: Path) -> Place:
    return Place(tmp_path, {**LLAMA3_8B, "nodes": 1})


def started(done: subprocess.CompletedProcess[str]) -> tuple[list[str], dict[str, str], str]:
    """Arguments, environment and directory that torchrun was given."""
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and last.startswith("STARTED "), done
    arguments, environment, directory = json.loads(last.removeprefix("STARTED "))
    return arguments, environment, directory


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


def test_the_record_holds_what_a_results_row_needs(gpu: Place) -> None:
    started(gpu.start())
    record = gpu.record()
    assert record["ok"] and record["gpu_names"] == ["NVIDIA GB200"] * 4
    assert {name: record[name] for name in ("torch", "torchtitan", "cuda", "nccl", "node", "host")} == {
        "torch": "2.14.1+cu130", "torchtitan": "0.3.0", "cuda": "13.0", "nccl": "2.30.7", "node": 0, "host": "gpu001",
    }  # fmt: skip
    assert record["command"][1:3] == ["-m", "torch.distributed.run"]
    assert {"driver", "python", "arch", "address", "iface", "data_files"} <= record.keys()
    assert not list((gpu.run_dir / "nodes").glob("*.tmp")) and not list((gpu.run_dir / "nodes").glob(".*"))


def test_a_cpu_node_trains_behind_the_patches_and_sees_no_gpu(cpu: Place) -> None:
    arguments, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu"))
    assert "titan.cpu" in arguments and "torchtitan.train" not in arguments
    assert env["PYTHONPATH"].split(os.pathsep) == [f"{cpu.run_dir}/job", str(cpu.site)]
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_the_printed_command_can_be_typed_again(cpu: Place) -> None:
    done = cpu.start(FAKE_TORCH="2.13.0+cpu")
    command = done.stdout.splitlines()[1].removeprefix("titan-command: ")
    again = subprocess.run(
        ["bash", "-c", command], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert started(again)[0] == started(done)[0]


def test_the_toml_eras_configuration_file_is_there(tmp_path: Path) -> None:
    place = Place(tmp_path, debug_node(), titan="0.2.2")
    arguments, _, _ = started(place.start(FAKE_TORCH="2.13.0+cpu"))
    assert arguments[-1] == f"--job.config_file={place.run_dir}/job/titan.toml"
    assert "steps = 20" in (place.run_dir / "job" / "titan.toml").read_text()


def test_caches_interfaces_and_offline_mode_are_set(cpu: Place) -> None:
    _, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu"))
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert env[name].startswith(f"{cpu.run_dir.parent}/titan-{os.getuid()}-")
    assert env["HF_HUB_OFFLINE"] == env["HF_DATASETS_OFFLINE"] == "1"
    assert {env[f"{library}_SOCKET_IFNAME"] for library in ("NCCL", "GLOO", "TP")} == {"lo"}


def test_what_is_set_already_wins(cpu: Place) -> None:
    _, env, _ = started(
        cpu.start(FAKE_TORCH="2.13.0+cpu", NCCL_SOCKET_IFNAME="ib0", HF_HOME="/my/hf", HF_HUB_OFFLINE="0")
    )
    assert (env["NCCL_SOCKET_IFNAME"], env["HF_HOME"], env["HF_HUB_OFFLINE"]) == ("ib0", "/my/hf", "0")
    assert "HF_DATASETS_OFFLINE" not in env  # it would win over the other in `datasets`
    assert env["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("home", ["", "/nonexistent/home"])
def test_a_home_that_is_missing_is_replaced(cpu: Place, home: str) -> None:
    _, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu", HOME=home))
    assert os.access(env["HOME"], os.W_OK)


def test_streaming_from_the_hub_stays_online(cpu: Place) -> None:
    cpu.write_node({**cpu.node, "data": "hub"})
    _, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu"))
    assert not {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"} & env.keys()


def test_a_secret_in_the_environment_is_neither_printed_nor_recorded(cpu: Place) -> None:
    done = cpu.start(FAKE_TORCH="2.13.0+cpu", HF_TOKEN="hf_do_not_tell")
    assert "hf_do_not_tell" not in "\n".join(done.stdout.splitlines()[:-1])
    assert "hf_do_not_tell" not in (cpu.run_dir / "nodes" / "0000-gpu001.json").read_text()


@pytest.mark.parametrize(
    ("gpus", "words", "fault"),
    [("3", "3 GPUs are visible, the profile says 4", "node"), ("8", "8 GPUs", "run"), ("0", "0 GPUs", "run")],
)
def test_missing_gpus_are_a_failure_and_never_a_cpu_run(gpu: Place, gpus: str, words: str, fault: str) -> None:
    """A node that has lost one is to blame; with none, or too many, the image or the profile is wrong."""
    assert words in gpu.refused(FAKE_GPUS=gpus)
    assert gpu.record()["ok"] is False and words in gpu.record()["why"]
    assert [one["fault"] for one in gpu.record()["problems"]] == [fault]


def test_a_driver_that_is_too_old_is_told_in_cudas_words(gpu: Place) -> None:
    line = gpu.refused(FAKE_CUDA_ERROR='The NVIDIA driver "570"\n is too old')
    assert 'CUDA 13.0 does not start: The NVIDIA driver \\"570\\" is too old' in line


def test_a_torch_without_cuda_cannot_serve_a_gpu_profile(gpu: Place) -> None:
    assert "torch 2.13.0+cpu was built without CUDA" in gpu.refused(FAKE_TORCH="2.13.0+cpu")


def test_a_torch_that_cannot_be_imported(gpu: Place) -> None:
    assert "ImportError: libcudart.so.13" in gpu.refused(FAKE_TORCH_BROKEN="1")


def test_torchtitan_is_missing(tmp_path: Path) -> None:
    assert "torchtitan is not installed for" in Place(tmp_path, debug_node(), titan=None).refused()


def test_torchtitan_is_of_another_era(tmp_path: Path) -> None:
    line = Place(tmp_path, debug_node(), titan="0.4.0").refused(FAKE_TORCH="2.13.0+cpu")
    assert "torchtitan 0.4.0 is installed; this launcher speaks 0.2.1 to 0.2.2 and 0.3.x" in line


def test_what_the_release_cannot_do_is_told_by_the_node(cpu: Place) -> None:
    cpu.node["recipe"]["compile"] = True
    cpu.write_node(cpu.node)
    assert "torch.compile is switched off on a CPU" in cpu.refused(FAKE_TORCH="2.13.0+cpu")


def test_the_data_directory_is_missing(cpu: Place) -> None:
    shutil.rmtree(cpu.data)
    line = cpu.refused()
    assert f"{cpu.data} is not a directory on this node" in line
    assert f"launcher stage c4 --to {cpu.data} --for {cpu.run_dir}/run.toml" in line


def test_no_data_was_named(cpu: Place) -> None:
    cpu.write_node({**cpu.node, "data": ""})
    assert "no data directory was given" in cpu.refused()


def test_the_hubs_readme_is_missing(cpu: Place) -> None:
    (cpu.data / "README.md").unlink()
    assert "README.md: No such file or directory" in cpu.refused()


@pytest.mark.parametrize("text", ["# C4\nconfig_name: en\n", "---\nconfigs:\n- config_name: de\n---\n", ""])
def test_a_readme_without_the_configuration_en(cpu: Place, text: str) -> None:
    (cpu.data / "README.md").write_text(text)
    assert "does not describe the configuration `en`" in cpu.refused()


def test_there_are_no_shards(cpu: Place) -> None:
    shutil.rmtree(cpu.data / "en")
    assert "holds no *.json.gz" in cpu.refused()


def pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 319338842\n"


def test_all_shards_are_lfs_pointers(cpu: Place) -> None:
    for shard in (cpu.data / "en").glob("*train*"):
        shard.write_bytes(pointer())
    assert "all 2 shards" in cpu.refused() and "Git LFS pointers" in cpu.refused()


def test_some_shards_are_lfs_pointers(cpu: Place) -> None:
    next((cpu.data / "en").glob("*train*")).write_bytes(pointer())
    done = cpu.start(FAKE_TORCH="2.13.0+cpu")
    assert 'titan-node: warn node=0 host=gpu001 why="1 of 2 shards are Git LFS pointers' in done.stdout
    started(done)


def test_a_shard_that_is_not_gzip(cpu: Place) -> None:
    for shard in (cpu.data / "en").glob("*train*"):
        shard.write_bytes(b"<html>" * 100)
    assert "is not a gzip file" in cpu.refused()


def test_a_link_whose_target_is_not_mounted(cpu: Place) -> None:
    (cpu.data / "en" / "c4-train.00000-of-00002.json.gz").unlink()
    (cpu.data / "en" / "c4-train.00000-of-00002.json.gz").symlink_to("/elsewhere/c4-train.json.gz")
    line = cpu.refused()
    assert "c4-train.00000-of-00002.json.gz leads to /elsewhere/c4-train.json.gz, which is not on this" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{", "is not JSON"), ("[]", "tokenizer's"), ("[" * 200_000, "is not JSON")],
    ids=["missing", "broken", "list", "nested"],
)
def test_the_tokenizer_is_incomplete(cpu: Place, name: str, content: str | None, words: str) -> None:
    (cpu.tokenizer / name).unlink() if content is None else (cpu.tokenizer / name).write_text(content)
    line = cpu.refused()
    assert f"{cpu.tokenizer}/{name}" in line and words in line
    assert f"launcher stage tokenizer --to {cpu.tokenizer}" in line


def test_the_run_directory_cannot_be_written(cpu: Place) -> None:
    (cpu.run_dir / "nodes").write_text("a file where a directory belongs")
    assert f"the run directory {cpu.run_dir} cannot be written" in cpu.refused()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "schema 1"),
        ('{"schema": 1}', "run_dir is missing"),
        ("[" * 200_000, "is not JSON"),
    ],
    ids=["broken", "list", "empty", "nested"],
)
def test_a_damaged_node_json(cpu: Place, text: str, words: str) -> None:
    (cpu.run_dir / "job" / "node.json").write_text(text)
    assert words in cpu.refused()


def test_no_node_json(cpu: Place) -> None:
    assert "No such file" in cpu.refused("/nowhere/node.json")
    assert "one argument is needed" in cpu.refused("a", "b")


def test_several_nodes_need_a_head_node_that_is_not_loopback(gpu: Place) -> None:
    gpu.write_node({**gpu.node, "nodes": 2})
    assert "TITAN_HEAD_ADDR is not set" in gpu.refused()
    assert "is loopback" in gpu.refused(TITAN_HEAD_ADDR="127.0.0.1", TITAN_HEAD_PORT="20001")
    assert "no route to the head node no-such-host.invalid" in gpu.refused(TITAN_HEAD_ADDR="no-such-host.invalid")


def test_several_nodes_need_a_port(cpu: Place) -> None:
    cpu.write_node({**cpu.node, "nodes": 2})
    line = cpu.refused(TITAN_HEAD_ADDR="127.0.0.1", TITAN_HEAD_PORT="abc", FAKE_TORCH="2.13.0+cpu")
    assert "2 nodes cannot meet at port 0" in line


def test_each_node_has_a_record_and_a_log_folder_of_its_own(cpu: Place) -> None:
    cpu.write_node({**cpu.node, "nodes": 2})
    for index in (0, 1):
        arguments, _, _ = started(
            cpu.start(
                FAKE_TORCH="2.13.0+cpu", TITAN_HEAD_ADDR="127.0.0.1", TITAN_HEAD_PORT="20001",
                SLURM_NODEID=str(index), SLURMD_NODENAME=f"gpu00{index}",
            )
        )  # fmt: skip
        assert f"--log-dir={cpu.run_dir}/logs/ranks/000{index}-gpu00{index}" in arguments
        assert cpu.record(f"000{index}-gpu00{index}")["node"] == index


@pytest.fixture
def node_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """slurm/node.py as a module, with `titan` beside it as in a run directory."""
    monkeypatch.syspath_prepend(str(ROOT / "launcher"))
    monkeypatch.syspath_prepend(str(ROOT / "slurm"))
    spec = importlib.util.spec_from_file_location("node_under_test", ROOT / "slurm" / "node.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interface_of_an_address(node_module: ModuleType) -> None:
    from check.network import interface_of  # type: ignore[import-not-found]  # as a run directory has it

    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""


def test_the_interface_towards_a_head_node(node_module: ModuleType) -> None:
    names = {name for _, name in socket.if_nameindex()}
    found = node_module.find_network(debug_node(), {"TITAN_HEAD_ADDR": "127.0.0.1"})
    assert found == {"address": "127.0.0.1", "iface": "lo"} and found["iface"] in names


def test_a_scratch_directory_that_is_not_ours_is_not_used(
    node_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = {"TITAN_JOB_ID": "9"}
    ours = node_module.scratch_dir(env)
    assert ours.name == f"titan-{os.getuid()}-9" and ours.stat().st_mode & 0o077 == 0
    shutil.rmtree(ours)
    (tmp_path / "trap").mkdir()
    ours.symlink_to(tmp_path / "trap")
    assert node_module.scratch_dir(env) not in (ours, tmp_path / "trap")


def test_caches_go_where_the_job_script_said(cpu: Place) -> None:
    scratch = cpu.run_dir.parent / "job" / "scratch"
    for _ in range(2):  # it may be there already
        _, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu", TITAN_SCRATCH=str(scratch)))
        assert env["HF_HOME"] == f"{scratch}/huggingface" and scratch.stat().st_mode & 0o777 == 0o700
    assert not list(cpu.run_dir.parent.glob("titan-*"))


def test_caches_go_to_the_nodes_own_disk_where_the_profile_names_it(cpu: Place) -> None:
    nvme = cpu.run_dir.parent / "nvme"
    cpu.write_node({**cpu.node, "scratch": str(nvme)})
    _, env, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu", TITAN_JOB_ID="7"))
    assert env["HF_HOME"] == f"{nvme}/titan-{os.getuid()}-7/huggingface"
    assert cpu.record()["scratch"].startswith(f"{nvme}/titan-")
    cpu.write_node({**cpu.node, "scratch": "/proc/no-such-place"})
    assert "/proc/no-such-place, for caches, cannot be written" in cpu.refused()


def test_the_next_job_removes_the_caches_of_ended_ones_and_no_others(cpu: Place) -> None:
    nvme = cpu.run_dir.parent / "nvme"
    cpu.write_node({**cpu.node, "scratch": str(nvme)})
    fake_run = cpu.site / "torch" / "distributed" / "run.py"
    fake_run.write_text(FAKE_RUN + "if os.environ.get('HOLD'): print('READY', flush=True); sys.stdin.read()\n")
    started(cpu.start(FAKE_TORCH="2.13.0+cpu", TITAN_JOB_ID="1"))
    going = subprocess.Popen(
        [sys.executable, "-S", str(cpu.run_dir / "job" / "node.py"), f"{cpu.run_dir}/job/node.json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(cpu.site), "HOME": str(cpu.run_dir), "HOLD": "1",
             "TITAN_JOB_ID": "2", "FAKE_TORCH": "2.13.0+cpu", "SLURMD_NODENAME": "gpu001"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert going.stdout is not None and any("READY" in line for line in going.stdout)
        (nvme / f"titan-{os.getuid()}-9").mkdir()  # without a lock: not known to be ours
        for folder in nvme.iterdir():
            os.utime(folder, (1, 1))
        started(cpu.start(FAKE_TORCH="2.13.0+cpu", TITAN_JOB_ID="3"))
        assert sorted(path.name[-2:] for path in nvme.iterdir()) == ["-2", "-3", "-9"]
    finally:
        going.communicate("", timeout=60)
    os.utime(nvme / f"titan-{os.getuid()}-2", (1, 1))
    started(cpu.start(FAKE_TORCH="2.13.0+cpu", TITAN_JOB_ID="4"))
    assert sorted(path.name[-2:] for path in nvme.iterdir()) == ["-3", "-4", "-9"]


def test_a_shared_file_system_holds_no_caches(
    node_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import titan.caches  # type: ignore[import-not-found]  # as a run directory has it

    def filesystem_of(path: Path) -> str:
        return "nfs4" if "run" in path.parts else "xfs"

    monkeypatch.setattr(titan.caches, "filesystem_of", filesystem_of)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    env = {"TITAN_JOB_ID": "9", "TITAN_SCRATCH": str(tmp_path / "run" / "scratch")}
    assert node_module.scratch_dir(env).parent == tmp_path / "tmp"
    assert node_module.scratch_dir(env, str(tmp_path / "nvme")).parent == tmp_path / "nvme"


def test_the_kernel_says_which_file_system_a_path_is_on(node_module: ModuleType, tmp_path: Path) -> None:
    assert node_module.filesystem_of(Path("/proc/self")) == "proc"
    assert node_module.filesystem_of(tmp_path / "not" / "there") not in ("", "proc")


def test_a_readme_that_names_a_split_that_is_not_there(cpu: Place) -> None:
    for path in (cpu.data / "en").glob("c4-validation*"):
        path.unlink()
    line = cpu.refused()
    assert "names a validation split" in line and f"launcher stage c4 --to {cpu.data} --for " in line


def test_a_view_whose_data_is_not_on_the_node(cpu: Place) -> None:
    view.write(
        cpu.run_dir / "data",
        {"c4-train.00000-of-00002.json.gz": "../../../c4/en/c4-train.00000-of-00002.json.gz"},
    )
    cpu.write_node({**cpu.node, "data": f"{cpu.run_dir}/data"})
    arguments, _, _ = started(cpu.start(FAKE_TORCH="2.13.0+cpu"))
    assert f"--dataloader.dataset_path={cpu.run_dir}/data" in arguments
    assert cpu.record()["data_files"] == 1 and cpu.record()["data_source"] == str(cpu.data)
    cpu.data.rename(cpu.data.with_name("moved"))
    assert f"{cpu.data} is not a directory on this node" in cpu.refused()
