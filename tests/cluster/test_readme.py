"""The README's commands, typed as they stand: `make demo` here, the quick start on a real Slurm.

What the reader's cluster has and this one lacks is given to the quick start from outside: a file of defaults that
says that the GPU nodes' GPUs are made up, an image, and another folder than /data.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Cluster
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:^    .+\n)+", README, re.MULTILINE)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines()]


def block_with(text: str) -> list[str]:
    (found,) = [block for block in BLOCKS if text in block]
    return [line.strip() for line in found.splitlines()]


def test_make_demo() -> None:
    assert "make demo" in COMMANDS
    if not (Path(sys.prefix) / ".train").exists():
        pytest.skip("this is not the virtual environment that the Makefile makes")
    done = subprocess.run(
        ["make", "demo", f"VENV={sys.prefix}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "COMPLETED" in done.stdout and "step 20/20" in done.stdout
    assert re.search(r"^\|\S+ +\|1 \(\d+ (?:GPU|ranks)\) +\|4 +\|step: 20  loss: ", done.stdout, re.MULTILINE)
    shown = README.split("<!-- demo-output -->")[1]
    assert "COMPLETED" in shown and "step: 20  loss:" in shown, "the README shows what the demo prints"
    assert re.search(r"^report\.html: \d+ runs?, 0 incomplete$", done.stdout, re.MULTILINE)
    assert "report.html: " in shown and (ROOT / "report.html").read_text().startswith("<!doctype html>")


def test_every_other_command_is_tested_somewhere() -> None:
    known = {"make demo", "make test", *block_with("pip install ."), *block_with("config show")}
    # Built by tests/image/images.py, trained in by test_launcher_on_slurm.py; staged in tests/stage.
    known |= {*block_with("make image"), *block_with("launcher stage c4")}
    # Run by test_accept.py, test_sweep.py and tests/browser with other images and sizes.
    known |= set(block_with("launcher accept"))
    assert [command for command in COMMANDS if command not in known] == []
    assert re.search(r"^test:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_image_is_one_command_of_the_launcher() -> None:
    (make, _) = block_with("make image")
    shown = subprocess.run([*make.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"launcher image build 'stable' +--output \. --force", shown.stdout), shown.stdout


def test_the_quick_start(slurm: Cluster, train_image: Path, user_dir: Path) -> None:
    if slurm.record is None:
        pytest.skip("the quick start asks for nine nodes of the cluster that is there")
    (user_dir / "titan.sqsh").symlink_to(train_image)
    (user_dir / "site.toml").write_text('[job]\ngpu = "cpu"\n[profile]\ngres = "gpu"\n')
    env = (
        os.environ
        | slurm.env
        | {
            "HOME": str(user_dir),
            "LAUNCHER_CONFIG": str(user_dir / "site.toml"),
            "USER": "root",
            "PATH": f"{user_dir}/bin:{slurm.env['PATH']}",
        }
    )
    (user_dir / "bin").mkdir()
    (user_dir / "bin" / "python3").symlink_to(sys.executable)
    lines = block_with("pip install .")
    script = "set -x\n" + "\n".join(f'{line}\necho "rc=$? of {line.split("--")[0]}"' for line in lines)
    script = script.replace("cd /data/$USER", f"cd {user_dir}")
    script = script.replace("--data sample --yes", "--data sample --yes --force")  # five more than this cluster has
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    codes = re.findall(r"^rc=(\d+) of ", done.stdout, re.MULTILINE)
    assert len(codes) == len(lines), done.stdout + done.stderr
    # Nine nodes are more than there are here: that run waits, and has no result yet.
    assert codes == ["0"] * (len(lines) - 1) + ["10"], done.stdout + done.stderr
    assert "|CPU     |2 (4 ranks)                  |4         |step: 20  loss:" in done.stdout
    assert re.search(r"llama3-8b-cpu-9n-\S+: PENDING", done.stdout)
    cancel = [
        "bash",
        "-c",
        f"cd {user_dir}; ./titan/bin/launcher cancel $(./titan/bin/launcher list --json | grep -m1 '\"run\"' | "
        "cut -d'\"' -f4)",
    ]
    assert "cancelled (was PENDING)" in subprocess.run(cancel, env=env, capture_output=True, text=True).stdout


@pytest.mark.parametrize("command", block_with("config show"))
def test_commands_that_only_show(command: str, workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
