"""`submit` looks at the image before anything queues: architecture, torchtitan, CUDA against the nodes' driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ExitStatus
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
        ({"arch": "amd64"}, ("--gpu", "gb200"), "the image is for x86_64, the nodes are aarch64"),
        ({"arch": "arm64"}, ("--gpu", "b200"), "launcher image build --arch amd64"),
        ({"versions": {"torchtitan": None}}, ("--gpu", "b200"), "no torchtitan in the image"),
        ({"versions": {"cuda": None}}, ("--gpu", "b200"), "is built without CUDA"),
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
        ({"versions": {"cuda": "13.0"}, "driver_min": "580"}, ("--gpu", "b200")),  # the driver is not known
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
