"""The built wheel, alone in an empty environment, renders a job and submits one: nothing of the checkout is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import zip_longest
from pathlib import Path

import pytest

from launcher.config.layers import names_of
from tests.conftest import ROOT

QUIET = ("--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *QUIET, "--no-deps", "-w", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def version_of(built: Path) -> str:
    return built.name.removesuffix(".tar.gz").split("-")[1]


@pytest.fixture(scope="module")
def launcher(wheel: Path) -> Path:
    """The console script of a fresh virtual environment that holds the wheel and its base dependencies."""
    place = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    subprocess.run([str(place / "bin/pip"), "install", *QUIET, str(wheel)], check=True)
    return place / "bin" / "launcher"


def run(launcher: Path, workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([str(launcher), *arguments], cwd=workplace, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("tool", ["uv tool", "pipx"])
def test_it_installs_with(tool: str, wheel: Path, workplace: Path) -> None:
    """Into a place of its own, from which it needs nothing else on PATH; with pip all other tests here do."""
    program, *word = tool.split()
    found = str(Path(sys.executable).with_name(program))  # both come with the extra dev
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UV_TOOL", "PIPX_"))}
    for name in ("UV_TOOL_DIR", "UV_TOOL_BIN_DIR", "PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR"):
        env[name] = str(workplace / name)
    command = [found, *word, "install", "--python", sys.executable, str(wheel)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (launcher,) = workplace.glob("*_BIN_DIR/launcher")
    here = env | {"PATH": "/nowhere"}
    version = subprocess.run([launcher, "--version"], env=here, capture_output=True, text=True)
    assert version.stdout == f"launcher, version {version_of(wheel)}\n", version.stderr
    words = ("render", "--gpu", "gb200", "--nodes", "9", "--image", "/data/titan.sqsh", "--name", "n")
    rendered = subprocess.run([launcher, *words], env=here, capture_output=True, text=True)
    assert "--container-image=/data/titan.sqsh" in rendered.stdout, rendered.stderr


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is committed, as CI clones it: one commit, no tags."""
    if not (ROOT / ".git").exists():
        pytest.skip("these files are no checkout")
    git(tmp_path, "clone", "--depth=1", "--no-tags", ROOT.as_uri(), "checkout")
    return tmp_path / "checkout"


def built(source: Path, to: Path) -> list[str]:
    """The versions of the sdist, and of the wheel that is made from it."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(to), str(source)], check=True, capture_output=True)
    return [version_of(file) for file in sorted(to.iterdir(), key=lambda file: file.suffix)]


def test_the_version_is_the_tag(checkout: Path, tmp_path: Path) -> None:
    git(checkout, "tag", "v9.8.7")
    assert built(checkout, tmp_path / "dist") == ["9.8.7", "9.8.7"]
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        assert b"Version: 9.8.7\n" in wheel.read("titan_launcher-9.8.7.dist-info/METADATA")


def test_the_files_of_a_tag_without_git_have_its_version(checkout: Path, tmp_path: Path) -> None:
    """As GitHub offers them for each release."""
    git(checkout, "tag", "v9.8.7")
    git(checkout, "archive", "--prefix=files/", "--output=../files.tar", "v9.8.7")
    with tarfile.open(tmp_path / "files.tar") as files:
        files.extractall(tmp_path, filter="data")
    assert built(tmp_path / "files", tmp_path / "dist") == ["9.8.7", "9.8.7"]


def test_without_a_tag_it_installs_under_a_version_that_is_no_release(checkout: Path, tmp_path: Path) -> None:
    assert all(
        re.fullmatch(r"0\.0\.1\.dev\d+\+g[0-9a-f.d]+", version) for version in built(checkout, tmp_path / "dist")
    )
    shutil.rmtree(checkout / ".git")
    (checkout / ".git_archival.txt").unlink()
    assert built(checkout, tmp_path / "copied") == ["0.0.0", "0.0.0"]


def test_a_tag_that_is_not_the_changelogs_newest_part_is_refused() -> None:
    """Its notes are that part. What the workflow runs, run here."""
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    step = re.search(r"name: The tag is the newest of the changelog\n.*?run: (\S[^\n]*)", text, re.DOTALL)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert step and newest
    for tag, status in ((f"v{newest[1]}", 0), ("v9.8.7", 1), (f"v{newest[1]}.1", 1), (f"v{newest[1][:-1]}", 1)):
        done = subprocess.run(["bash", "-ec", step[1]], cwd=ROOT, env=os.environ | {"TAG": tag}, capture_output=True)
        assert done.returncode == status, tag


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
