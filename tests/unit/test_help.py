"""Help in sections and completion: from one place for every command that takes a run's options."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.help import SECTIONS, USUAL
from launcher.config.options import KEYS
from tests.conftest import Launch
from tests.unit.outcomes import write_run

COMMANDS = ("submit", "render", "preflight", "plan", "sweep", "accept", "config show")


def listed(text: str, title: str) -> list[str]:
    """The options that a section explains."""
    section = text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  (?:-\w, )?(--[\w-]+)", section, re.M)


def test_every_option_of_a_run_has_its_section() -> None:
    placed = " ".join(SECTIONS.values()).split()
    assert len(placed) == len(set(placed)) and set(KEYS) | set(USUAL) <= set(placed)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usual_options_come_first_and_the_rest_is_named(launch: Launch, command: str) -> None:
    short, full = (launch(*command.split(), flag).stdout for flag in ("--help", "--help-all"))
    assert listed(short, "Usual options") == [f"--{name}" for name in USUAL]
    assert "--json" in listed(short, f"Options of {command.split()[-1]}")
    named = set(re.findall(r"--[a-z][\w-]+", short))
    explained = [option for title in SECTIONS for option in listed(full, title)]
    assert len(explained) == len(set(explained)) and set(explained) <= named
    assert {"--sbatch", "--mount", "--runs-dir", "--seq-len"} <= set(explained)
    assert max(map(len, full.splitlines())) <= 110


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("submit --partition ba", "plain,batch"),
        ("submit --image ti", "file,ti"),
        ("submit --data da", "dir,da"),
        ("submit --gpu gb2", "plain,gb200"),
        ("submit --recipe ./my", "file,./my"),
        ("submit my", "plain,my-run"),
        ("accept my", "plain,my-run"),
        ("watch my", "plain,my-run"),
        ("list --runs-dir ru", "dir,ru"),
    ],
)
def test_tab_completes(
    launch: Launch, workplace: Path, fake_slurm: Callable[[str, str], Path], typed: str, expected: str
) -> None:
    fake_slurm("sinfo", "printf 'batch\\nlong\\nbatch\\n'")
    (workplace / "runs" / "my-run").mkdir(parents=True)
    words = {"COMP_WORDS": f"launcher {typed}", "COMP_CWORD": str(len(typed.split()))}
    assert launch(_LAUNCHER_COMPLETE="bash_complete", **words).stdout.split() == [expected]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(launch: Launch, shell: str) -> None:
    script = launch("completion", shell).stdout
    assert f"_LAUNCHER_COMPLETE={shell}_complete" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_runs_are_found_from_anywhere(launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's file names the directory; and a run to repeat is named as everywhere else."""
    run = write_run(workplace / "far" / "mine", name="mine", end='{"exit_code": 1}')
    (run / "run.toml").write_text("run = 2\n")
    config = workplace / "config.toml"
    config.write_text(f'[job]\nruns_dir = "{workplace}/far"\n')
    here = {"LAUNCHER_CONFIG": str(config)}
    assert [row["run"] for row in json.loads(launch("list", "--json", **here).stdout)] == ["mine"]
    assert f"{run}/run.toml: written in run file format 2" in launch("submit", "mine", "--dry-run", **here).stderr
    assert "everything: launcher logs mine" in launch("status", **here).stderr
    assert f"everything: launcher logs {run}" in launch("status", "far/mine").stderr
    assert launch("init", "--gpu", "h200", "--runs-dir", "far", "--yes").returncode == 0  # saved as a whole path
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    for words in (("status",), ("results", "mine"), ("accept", "mine")):
        assert "mine" in launch(*words).stdout
    assert launch("list", LAUNCHER_RUNS_DIR="none").stderr.startswith("No runs yet in none")
