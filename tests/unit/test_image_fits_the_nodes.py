"""`submit` looks at the image before anything queues: architecture, torchtitan, CUDA against the nodes' driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config import resolve
from launcher.config.layers import Layer
from launcher.preflight.here import check_image
from tests.conftest import Launch

SUBMIT = ("submit", "--image", "titan.sqsh", "--yes", "--dry-run")


def describe(image: Path, **changes: object) -> None:
    sidecar = image.with_name(image.name + ".json")
    about = json.loads(sidecar.read_text())
    about["versions"] |= changes.pop("versions", {})
    sidecar.write_text(json.dumps(about | changes))


class Fit(NamedTuple):
    said: str  # of the refusal; "" for none
    options: str
    about: dict[str, Any] | None = None


FAST, NVFP4 = "--recipe llama3-8b-fast", "--recipe llama3-8b-nvfp4"
CUDA_13 = {"versions": {"cuda": "13.0"}, "driver_min": "580"}
NO_NVFP4 = {"quantization": ["none", "float8", "mxfp8"]}
TITAN_02 = {"torchtitan": "0.2.2", "torchao": "0.18.0"}
MXFP8_ON_H100 = "mxfp8 needs a GPU of compute capability 10.0 or later, but H100 has 9.0"


@pytest.mark.parametrize(
    "case",
    [
        Fit("the image is for x86_64, the GPU profile for aarch64", "--gpu gb200", {"arch": "amd64"}),
        Fit("launcher image build --arch amd64", "--gpu b200", {"arch": "arm64"}),
        Fit("", "--gpu gb200", {"arch": "arm64"}),
        Fit("no torchtitan in the image", "--gpu b200", {"versions": {"torchtitan": None}}),
        Fit("no torch and no torchtitan in", "--gpu cpu", {"versions": {"torch": None, "torchtitan": None}}),
        Fit("is built without CUDA", "--gpu b200", {"versions": {"cuda": None}}),
        Fit("", "--gpu cpu", {"arch": "amd64", "versions": {"cuda": None}}),
        Fit("cannot do mxfp8, only none, float8", f"--gpu b200 {FAST}", {"quantization": ["none", "float8"]}),
        Fit("build nightly|stable; or a recipe that does not quantize", f"--gpu b200 {NVFP4}", NO_NVFP4),
        Fit("", f"--gpu b200 {FAST}", NO_NVFP4),
        Fit(MXFP8_ON_H100, f"--gpu h100 {FAST} --set recipe.quantize=mxfp8", NO_NVFP4),
        Fit("", f"--gpu h100 {FAST}"),  # float8
        Fit("try: --set recipe.quantize=none", "--gpu a100 --set recipe.quantize=float8"),
        Fit("", "--gpu a100 --set recipe.quantize=float8 --force"),  # torchtitan can emulate it
        Fit("try: --set recipe.quantize=float8", f"--gpu h200 {NVFP4}"),
        Fit("", f"--gpu gb300 --set profile.arch=x86_64 {NVFP4}"),
        # As with a triton that torchao is not made for: torchtitan itself cannot be imported where there is a GPU.
        Fit("the image cannot do none, only float8", "--gpu b200", {"quantization": ["float8"]}),
        Fit("0.2.2 needs torchao 0.16 for MXFP8, the image has 0.18.0", f"--gpu b200 {FAST}", {"versions": TITAN_02}),
        Fit("", f"--gpu b200 {FAST}", {"versions": TITAN_02 | {"torchao": "0.16.0"}}),
        Fit("", f"--gpu b200 {FAST}", {"versions": {"torchtitan": "0.3.0"}}),
        Fit(
            "13.0 in the image needs driver 580, the nodes have 570.172.08",
            "--gpu b200 --set profile.driver=570.172.08",
            CUDA_13,
        ),
        Fit("--force submits it anyway", "--gpu h200 --set profile.driver=570.1", CUDA_13),
        Fit(
            "", "--gpu h200 --set profile.driver=570.1 --force", CUDA_13
        ),  # NVIDIA's forward compatibility makes it run
        Fit("needs driver 580.65.06", "--gpu b200 --set profile.driver=580.9", {"driver_min": "580.65.06"}),
        Fit("", "--gpu b200 --set profile.driver=580.95.05", {"driver_min": "580"}),
        Fit("", "--gpu cpu --set profile.driver=570", {"driver_min": "580"}),
        Fit("", "--gpu b200 --set profile.driver=470"),
    ],
    ids=lambda case: case.options,
)
def test_an_image_that_cannot_run_there_is_refused_and_any_other_taken(launch: Launch, image: Path, case: Fit) -> None:
    describe(image, **(case.about or {}))
    done = launch(*SUBMIT, *case.options.split())
    assert (done.returncode, case.said in done.stderr) == (ExitStatus.INVALID if case.said else 0, True), done.stderr
    assert ("#SBATCH --nodes=1" in done.stdout) == (not case.said) and not (image.parent / "runs").exists()
    if "--force" in case.options and case.about:
        assert "warning: CUDA 13.0 in the image needs driver 580" in done.stderr
        assert "570.1: it runs there only with NVIDIA's forward compatibility" in done.stderr


def test_a_driver_that_is_not_known_is_asked_for(launch: Launch, image: Path) -> None:
    describe(image, driver_min="580", versions={"cuda": "13.0"})
    done = launch(*SUBMIT, "--gpu", "h200", "--partition", "batch")
    assert done.returncode == 0
    assert "warning: CUDA 13.0 in the image needs driver 580; the nodes' driver is not known" in done.stderr
    assert "srun -N1 -p batch --gres=gpu:1 nvidia-smi --query-gpu=driver_version" in done.stderr
    assert "similar clusters have run with 570" in done.stderr
    for quiet in ("cpu", "b200"):  # B200s were published with 580
        assert "driver" not in launch(*SUBMIT, "--gpu", quiet).stderr


def test_an_image_that_nothing_here_can_look_into_is_taken_with_a_warning(launch: Launch, image: Path) -> None:
    image.with_name(image.name + ".json").unlink()
    head = bytearray(image.read_bytes())
    head[20] = 5  # lz4, which no library here reads
    image.write_bytes(head)
    done = launch(*SUBMIT, "--gpu", "b200", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert f"warning: --image {image}: no tool here can look into it: apt-get install squashfs-tools" in done.stderr


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root may look everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_an_image_where_this_user_may_not_look(image: Path, request: pytest.FixtureRequest) -> None:
    chosen = {"job.image": str(image), "job.gpu": "b200"}
    spec = resolve.resolve(Layer(chosen, dict.fromkeys(chosen, "test")), None, None, {})
    closed = image.parent / "closed"
    closed.mkdir()
    closed.chmod(0)
    spec = replace(spec, job=replace(spec.job, image=str(closed / "x.sqsh")))
    request.getfixturevalue("ordinary_user")
    with pytest.raises(LauncherError) as error:
        check_image(spec)
    assert (error.value.status, "x.sqsh: Permission denied" in error.value.what) == (ExitStatus.FILESYSTEM, True)
    assert "no such file" not in error.value.what


def test_a_reader_that_goes_away_is_no_error(launch: Launch, image: Path) -> None:
    """`launcher submit --dry-run | head -1` under pipefail; here the reader is gone before the first line."""
    for arguments in ((*SUBMIT, "--gpu", "b200"), ("--help",)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments], stdout=write, stderr=subprocess.PIPE, text=True
        )
        os.close(write)
        assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
