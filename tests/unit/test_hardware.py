"""Facts about GPUs stand once, in slurm/profiles: all of them, and a gap is told by its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.config import hardware as module
from launcher.config.hardware import hardware, of_gpu
from launcher.config.spec import Job, PlacedRun, Profile
from launcher.runs import directory
from launcher.titan.command import ERAS
from tests.conftest import ROOT


def test_every_gpu_profile_is_described() -> None:
    names = {path.stem for path in (ROOT / "slurm" / "profiles").glob("*.toml")} - {"cpu"}
    assert hardware().keys() == names
    releases = {newest[:3] for _, _, newest, _ in ERAS}
    for one in hardware().values():
        assert one.titan_peak_tflops.keys() == releases, "what each torchtitan divides by"
        figures = (one.memory_gib, one.cpus, one.peak_tflops, *one.compute_capability, *one.titan_peak_tflops.values())
        assert all(isinstance(figure, int | float) for figure in (*figures, one.nvlink_gpus, one.max_uptime_days))
    gb200 = of_gpu("gb200")
    assert gb200 and (gb200.memory_gib, gb200.nvlink_gpus, gb200.peaks) == (184.0, 72, (2250.0, 2450.0, 2500.0))
    assert of_gpu("GTX") is None


def test_a_gap_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "mine.toml", (ROOT / "slurm" / "profiles" / "gb200.toml").read_text()
    monkeypatch.setattr(module, "find", lambda _kind, _name: path)
    for before, after, named in (
        ("memory_gib = 184.0", "", "memory_gib"),
        ("memory_gib", "memory_gb", "memory_gb, memory_gib"),
        ("[hardware]", "[env2]", "cpus"),
    ):
        path.write_text(whole.replace(before, after, 1))
        with pytest.raises(LauncherError, match=f"missing or unknown: .*{named}"):
            module._of("mine")


@pytest.mark.parametrize(("gpu", "told"), [("B200", (2250, 55)), ("GTX", None)])
def test_the_check_on_the_nodes_is_told_of_its_gpu(
    gpu: str, told: tuple[int, int] | None, workplace: Path, image: Path
) -> None:
    job = Job(name="r", runs_dir=str(workplace / "runs"), image=str(image), gpu="b200")
    with directory.making(PlacedRun(job=job, profile=Profile(gpu=gpu)), {}, 0.0) as made:
        os.close(made[1])
    said = directory.Run(workplace / "runs" / "r").asked["hardware"]
    assert said == ({"peak_tflops": told[0], "max_uptime_days": told[1]} if told else {})
