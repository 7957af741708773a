"""What `submit` and `preflight` look at: the same, once, and every trap that can be known before a job queues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.cluster_fixtures import CLUSTERS, FakeNode, cluster, install, partition_line
from tests.conftest import Launch, say_it_trains, squashfs_head

Fake = Callable[[str, str], Path]
SUBMIT = ("--recipe", "debug", "--data", "sample", "--tokenizer", "sample")
H200 = cluster("25.05.3", [FakeNode(f"n{i}") for i in range(4)], [partition_line("batch", "n[0-3]", default=True)])


def test_slurm_is_asked_once(launch: Launch, fake_slurm: Fake, image: Path, workplace: Path) -> None:
    """Without --gpu, the profile is detected and the run compared with the nodes: from the same answers."""
    install(CLUSTERS["terraform-25.05"], fake_slurm)
    fake_slurm("sbatch", "echo 42")
    scontrol = workplace / "slurm-bin" / "scontrol"
    script = scontrol.read_text()
    scontrol.write_text(script.replace("\n", f'\necho "$*" >>{workplace}/asked\n', 1))
    done = launch("submit", "--image", str(image), *SUBMIT, "--name", "r", "--nodes", "2")
    assert done.returncode == 0, done.stderr
    assert 'gpu = "gb200"' in (workplace / "runs/r/run.toml").read_text()
    asked = (workplace / "asked").read_text().splitlines()
    assert sorted(asked) == ["-o show node", "-o show partition", "-o show topology", "show config"]


WRONG = {
    "no image": (("--image", "none.sqsh"), "--image {here}/none.sqsh: no such file"),
    "a damaged image": (("--image", "cut.sqsh"), "cut.sqsh"),
    "another architecture": (("--image", "arm.sqsh"), "aarch64"),
    "weights of another model": (("--image", "good.sqsh", "--init-from", "weights"), "--init-from"),
    "data that is a file": (("--image", "good.sqsh", "--data", "cut.sqsh"), "a file, not a directory"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_submit_and_preflight_refuse_the_same(
    arguments: tuple[str, ...], said: str, launch: Launch, fake_slurm: Fake, workplace: Path
) -> None:
    install(H200, fake_slurm)
    for name in ("good", "arm", "cut"):
        path = workplace / f"{name}.sqsh"
        path.write_bytes(squashfs_head(4096).ljust(4096, b"\0"))
        say_it_trains(path, "aarch64" if name == "arm" else "")
    path.write_bytes(squashfs_head(4096))
    (workplace / "weights").mkdir()
    command = ("--gpu", "h200", *SUBMIT, *arguments)
    looked = launch("preflight", *command, "--json")
    submitted = launch("submit", *command)
    assert looked.returncode == submitted.returncode == ExitStatus.INVALID, looked.stdout + submitted.stderr
    assert said.format(here=workplace) in submitted.stderr
    first = next(check for check in json.loads(looked.stdout)["checks"] if check["status"] == "error")
    assert f"error: {first['what']}" in submitted.stderr
    assert first["fix"] in submitted.stderr and "--force" not in submitted.stderr
    assert not (workplace / "runs").exists()


def test_without_an_image_the_rest_is_checked(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    install(H200, fake_slurm)
    options = ("--gpu", "h200", *SUBMIT, "--nodes", "9", "--time", "3:00:00")
    looked = launch("preflight", *options, "--json")
    checks = {check["code"]: check for check in json.loads(looked.stdout)["checks"]}
    assert looked.returncode == ExitStatus.INVALID and {"nodes-too-few", "partition", "data"} <= checks.keys()
    assert checks["image-not-named"]["fix"] == "--image titan.sqsh (or --runtime bare)" and "image" not in checks
    submitted = launch("submit", *options)
    assert submitted.returncode == looked.returncode and "[image-not-named]" in submitted.stderr
    assert "image-not-named" not in launch("preflight", *options, "--runtime", "bare", "--json").stdout


def test_the_profile_may_be_the_wrong_one(launch: Launch, fake_slurm: Fake, image: Path) -> None:
    """--gpu h100 on a cluster of GB200, with the image that its nodes need."""
    install(CLUSTERS["terraform-25.05"], fake_slurm)
    say_it_trains(image, "arm64")
    done = launch("submit", "--gpu", "h100", "--image", str(image), *SUBMIT)
    assert done.returncode == ExitStatus.INVALID and "nodes are x86_64" not in done.stderr
    assert "the image is for aarch64, the GPU profile for x86_64" in done.stderr
    assert "try: --gpu gb200|gb300 where the nodes are aarch64" in done.stderr


# Traps of the clusters that need no question to Slurm: what is typed, and what the user reads before the job queues.
TRAPS = (
    ("LD_PRELOAD=/x.so", "--env LD_PRELOAD=/x.so: the container does not have the host's library"),
    ("/nowhere/at/all:/x", "--mount /nowhere/at/all: not on this machine"),
    ("hub", "--data hub: the job has no token for the Hub"),
)


def test_traps_are_named_before_the_job_queues(launch: Launch, fake_slurm: Fake, image: Path) -> None:
    install(H200, fake_slurm)
    fake_slurm("sbatch", "echo 42")
    submit = ("submit", "--gpu", "h200", "--image", str(image), *SUBMIT)
    asked = [
        word
        for option, (value, _) in zip(("--env", "--mount", "--data"), TRAPS, strict=True)
        for word in (option, value)
    ]
    done = launch(*submit, *asked, "--name", "a")
    assert done.returncode == 0 and all(f"warning: {said}" in done.stderr for _, said in TRAPS), done.stderr
    done = launch(*submit, "--data", "hub", "--env", "HF_TOKEN", "--name", "b", HF_TOKEN="hf_x")
    assert done.returncode == 0 and "no token" not in done.stderr


def test_pyxis_never_sees_a_relative_path(launch: Launch, fake_slurm: Fake, image: Path) -> None:
    """It would take it for an image of a registry."""
    script = launch("render", "--gpu", "h200", "--image", image.name).stdout
    assert f"--container-image={image}" in script
