"""`submit` looks at the image before anything queues: architecture, torchtitan, CUDA against the nodes' driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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


@pytest.mark.parametrize(
    ("about", "arguments", "said"),
    [
        ({"arch": "amd64"}, ("--gpu", "gb200"), "the image is for x86_64, the GPU profile for aarch64"),
        ({"arch": "arm64"}, ("--gpu", "b200"), "launcher image build --arch amd64"),
        ({"versions": {"torchtitan": None}}, ("--gpu", "b200"), "no torchtitan in the image"),
        ({"versions": {"cuda": None}}, ("--gpu", "b200"), "is built without CUDA"),
        (
            {"quantization": ["none", "float8"]},
            ("--gpu", "b200", "--recipe", "llama3-8b-fast"),
            "the image cannot do mxfp8, only none, float8",
        ),
        (
            {"quantization": ["none", "float8", "mxfp8"]},
            ("--gpu", "b200", "--recipe", "llama3-8b-nvfp4"),
            "launcher image build nightly|stable; or a recipe that does not quantize",
        ),
        (
            {"quantization": ["none", "float8", "mxfp8"]},
            ("--gpu", "h100", "--recipe", "llama3-8b-fast", "--set", "recipe.quantize=mxfp8"),
            "mxfp8 needs a GPU of compute capability 10.0 or later, but H100 has 9.0",
        ),
        ({}, ("--gpu", "a100", "--set", "recipe.quantize=float8"), "try: --set recipe.quantize=none"),
        ({}, ("--gpu", "h200", "--recipe", "llama3-8b-nvfp4"), "try: --set recipe.quantize=float8"),
        # As with a triton that torchao is not made for: torchtitan itself cannot be imported where there is a GPU.
        ({"quantization": ["float8"]}, ("--gpu", "b200"), "the image cannot do none, only float8"),
        (
            {"versions": {"torchtitan": "0.2.2", "torchao": "0.18.0"}},
            ("--gpu", "b200", "--recipe", "llama3-8b-fast"),
            "torchtitan 0.2.2 needs torchao 0.16 for MXFP8, the image has 0.18.0",
        ),
        (
            {"versions": {"cuda": "13.0"}, "driver_min": "580"},
            ("--gpu", "b200", "--set", "profile.driver=570.172.08"),
            "CUDA 13.0 in the image needs driver 580, the nodes have 570.172.08",
        ),
    ],
)
def test_an_image_that_cannot_run_there_is_refused(
    launch: Launch, image: Path, about: dict[str, object], arguments: tuple[str, ...], said: str
) -> None:
    describe(image, **about)
    done = launch(*SUBMIT, *arguments)
    assert (done.returncode, said in done.stderr) == (ExitStatus.INVALID, True), done.stderr
    assert not (image.parent / "runs").exists()


@pytest.mark.parametrize(
    ("about", "arguments"),
    [
        ({"arch": "arm64"}, ("--gpu", "gb200")),
        ({"arch": "amd64", "versions": {"cuda": None}}, ("--gpu", "cpu")),
        ({}, ("--gpu", "h100", "--recipe", "llama3-8b-fast")),  # float8
        ({}, ("--gpu", "a100", "--set", "recipe.quantize=float8", "--force")),  # torchtitan can emulate it
        ({}, ("--gpu", "gb300", "--set", "profile.arch=x86_64", "--recipe", "llama3-8b-nvfp4")),
        ({"quantization": ["none", "mxfp8"]}, ("--gpu", "b200", "--recipe", "llama3-8b-fast")),
        ({"versions": {"torchtitan": "0.2.2", "torchao": "0.16.0"}}, ("--gpu", "b200", "--recipe", "llama3-8b-fast")),
        ({"versions": {"torchtitan": "0.3.0"}}, ("--gpu", "b200", "--recipe", "llama3-8b-fast")),
        (
            {"versions": {"cuda": "13.0"}, "driver_min": "580"},
            ("--gpu", "b200", "--set", "profile.driver=570.1", "--force"),
        ),  # by NVIDIA's forward compatibility
        ({"driver_min": "580"}, ("--gpu", "b200", "--set", "profile.driver=580.95.05")),
    ],
)
def test_an_image_that_fits_is_taken(
    launch: Launch, image: Path, about: dict[str, object], arguments: tuple[str, ...]
) -> None:
    describe(image, **about)
    done = launch(*SUBMIT, *arguments)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=1" in done.stdout


def test_an_old_driver_is_passed_by_force_alone(launch: Launch, image: Path) -> None:
    """NVIDIA's forward compatibility makes it run, where it is installed."""
    describe(image, driver_min="580", versions={"cuda": "13.0"})
    old = (*SUBMIT, "--gpu", "h200", "--set", "profile.driver=570.1")
    refused = launch(*old)
    assert refused.returncode == ExitStatus.INVALID
    assert (
        "needs driver 580, the nodes have 570.1: it runs there only with NVIDIA's forward compatibility"
        in refused.stderr
    )
    assert "--force submits it anyway" in refused.stderr
    forced = launch(*old, "--force")
    assert forced.returncode == 0 and "warning: CUDA 13.0 in the image needs driver 580" in forced.stderr


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
