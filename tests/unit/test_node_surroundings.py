"""Where slurm/node.py finds itself: networks, scratch directories, caches, views of the data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from launcher.stage import view
from tests.unit.node_place import FAKE_RUN, Place, as_in_a_run, cpu, started
from tests.unit.test_submission import wait_for
from tests.unit.test_titan_command import debug_node

__all__ = ["cpu"]  # fixtures


@pytest.fixture
def node_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return as_in_a_run(monkeypatch, "node")


def test_the_interface_towards_a_head_node(node_module: ModuleType) -> None:
    from check.network import interface_of  # as a run directory has it

    assert node_module.find_network(debug_node(), {"TITAN_HEAD_ADDR": "127.0.0.1"}) == {
        "address": "127.0.0.1",
        "iface": "lo",
    }
    assert interface_of("203.0.113.77") == ""


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
        _, env, _ = started(cpu.start(TITAN_SCRATCH=str(scratch)))
        assert env["HF_HOME"] == f"{scratch}/huggingface" and scratch.stat().st_mode & 0o777 == 0o700
    assert not list(cpu.run_dir.parent.glob("titan-*"))


def test_caches_go_to_the_nodes_own_disk_where_the_profile_names_it(cpu: Place) -> None:
    nvme = cpu.run_dir.parent / "nvme"
    cpu.change(scratch=str(nvme))
    _, env, _ = started(cpu.start(TITAN_JOB_ID="7"))
    assert env["HF_HOME"] == f"{nvme}/titan-{os.getuid()}-7/huggingface"
    assert cpu.record()["scratch"].startswith(f"{nvme}/titan-")
    cpu.change(scratch="/proc/no-such-place")
    assert "/proc/no-such-place, for caches, cannot be written" in cpu.refused()


def test_the_next_job_removes_the_caches_of_ended_ones_and_no_others(cpu: Place) -> None:
    nvme = cpu.run_dir.parent / "nvme"
    cpu.change(scratch=str(nvme))
    hold = cpu.run_dir.parent / "hold"
    hold.touch()
    waits = "import time\nwhile os.path.exists(os.environ.get('HOLD', '')): time.sleep(0.05)\n"
    (cpu.site / "torch" / "distributed" / "run.py").write_text(FAKE_RUN + waits)

    def left_by(job: str) -> list[str]:
        """Once that job has begun, long after the others were seen."""
        for folder in nvme.glob("*"):
            os.utime(folder, (1, 1))
        started(cpu.start(TITAN_JOB_ID=job))
        return sorted(path.name[-2:] for path in nvme.iterdir())

    assert left_by("1") == ["-1"]
    going = cpu.process(cpu.environment(TITAN_JOB_ID="2", HOLD=str(hold)))
    wait_for(lambda: "STARTED" in going.said())
    (nvme / f"titan-{os.getuid()}-9").mkdir()  # without a lock: not known to be ours
    assert left_by("3") == ["-2", "-3", "-9"]
    hold.unlink()
    going.end()
    assert left_by("4") == ["-4", "-9"]


def test_a_shared_file_system_holds_no_caches(
    node_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import titan.caches  # as a run directory has it

    monkeypatch.setattr(titan.caches, "filesystem_of", lambda path: "nfs4" if "run" in path.parts else "xfs")
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
        cpu.run_dir / "data", {"c4-train.00000-of-00002.json.gz": "../../../c4/en/c4-train.00000-of-00002.json.gz"}
    )
    cpu.change(data=f"{cpu.run_dir}/data")
    arguments, _, _ = started(cpu.start())
    assert f"--dataloader.dataset_path={cpu.run_dir}/data" in arguments
    assert cpu.record()["data_files"] == 1 and cpu.record()["data_source"] == str(cpu.data)
    cpu.data.rename(cpu.data.with_name("moved"))
    assert f"{cpu.data} is not a directory on this node" in cpu.refused()
