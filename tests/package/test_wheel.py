"""The built wheel, alone in an empty environment, renders a job and submits one: nothing of the checkout is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from launcher.config.layers import names_of
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of a fresh virtual environment that holds the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "-w", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run([str(folder / "venv/bin/pip"), "install", *quiet, str(wheel)], check=True)
    return folder / "venv" / "bin" / "launcher"


def run(launcher: Path, workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([str(launcher), *arguments], cwd=workplace, capture_output=True, text=True, env=env)


def test_it_renders_a_job(launcher: Path, workplace: Path) -> None:
    done = run(
        launcher,
        workplace,
        "render",
        "--gpu",
        "gb200",
        "--nodes",
        "9",
        "--image",
        "titan.sqsh",
        "--name",
        "n",
    )
    assert done.returncode == 0, done.stderr
    assert f"--container-image={workplace}/titan.sqsh" in done.stdout


def test_it_brings_profiles_recipes_and_node_files(launcher: Path, workplace: Path) -> None:
    pairs = zip_longest(names_of("profiles"), names_of("recipes"))
    for gpu, recipe in pairs:
        words = ("--gpu", gpu or "h100", "--recipe", recipe or "debug", "--image", "/x.sqsh")
        done = run(launcher, workplace, "render", *words)
        assert done.returncode == 0, done.stderr
    done = run(
        launcher,
        workplace,
        "submit",
        "--local",
        "--gpu",
        "cpu",
        "--recipe",
        "debug",
        "--name",
        "r",
        "--python",
        "/bin/true",
        "--follow",
    )
    assert "r: COMPLETED" in done.stdout, done.stdout + done.stderr
    run_dir = workplace / "runs" / "r"
    assert (run_dir / "job" / "node.py").read_text() == (ROOT / "slurm" / "node.py").read_text()
    assert (run_dir / "job" / "titan" / "command.py").is_file()


def test_it_brings_the_known_errors(launcher: Path, workplace: Path) -> None:
    arguments = ("--local", "--gpu", "cpu", "--recipe", "debug", "--name", "r", "--python", "/bin/false", "--follow")
    done = run(launcher, workplace, "submit", *arguments)
    assert "r: FAILED" in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    run_dir = workplace / "runs" / "r"
    (run_dir / "logs" / "job.log").write_text("cp: error writing '/tmp/x': No space left on device\n")
    assert "cause: a disk of a node is full" in run(launcher, workplace, "status", "r").stderr


def test_it_is_a_small_install(launcher: Path, workplace: Path) -> None:
    """No torch, docker, spython or matplotlib reaches a login node."""
    listed = subprocess.run(
        [str(launcher.parent / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    assert {"click", "jinja2", "huggingface-hub", "rich"} <= {name.replace("_", "-") for name in names}
    assert not names & {"torch", "docker", "spython", "matplotlib", "torchtitan", "numpy"}
