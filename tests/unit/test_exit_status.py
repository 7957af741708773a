"""The documented exit codes are the ones in the code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from launcher import version
from launcher.base.errors import ExitStatus
from launcher.cli import launcher
from tests.conftest import ROOT, Launch

ERRORS = {"LauncherError", "Refusal", "Missing", "InDoubt", "_failed"}


def test_the_page_lists_every_code() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    listed = {int(code): name for code, name in re.findall(r"^\| (\d+) \| (\w+) \|", page, re.MULTILINE)}
    assert listed == {status.value: status.name for status in ExitStatus}


def test_the_page_lists_every_error_code() -> None:
    """Those that are written where an error is made; a check's own are in docs/preflight.md."""
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| .+ \|$", page, re.MULTILINE)
    made: set[object] = set()
    for path in (ROOT / "launcher").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if name in ERRORS and call.args and isinstance(call.args[0], ast.Constant):
                made.add(call.args[0].value)
    assert listed == sorted(map(str, made | {"sbatch-refused"}))


def test_an_error_ends_with_its_code(launch: Launch) -> None:
    assert launch("status", "none").stderr.splitlines()[0].endswith(" [run-missing]")
    assert launch("submit", "--set", "recipe.stepz=1", "--dry-run").stderr.splitlines()[0].endswith(" [key-unknown]")


def test_help_lists_them_too(launch: Launch) -> None:
    words = " ".join(launch("--help").stdout.split())
    for status in ExitStatus:
        assert re.search(rf"[ ,]{status.value} ", words), status


def leaves(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, *names, name)
        elif command and not command.hidden:
            yield *names, name


def test_every_command_has_help_and_json(launch: Launch) -> None:
    for command in leaves(launcher):
        done = launch(*command, "--help")
        assert done.returncode == 0 and "--json" in done.stdout, command


def test_colour_only_on_terminals(launch: Launch) -> None:
    assert "\x1b" not in launch("status", "none").stderr
    assert "\x1b" not in launch("config", "show", "--gpu", "cpu", "--local").stdout


def test_the_version_is_told_in_both_usual_ways(launch: Launch) -> None:
    assert launch("--version").stdout.strip() == f"launcher, version {version()}"
    assert f"launcher {version()}" in launch("version").stdout


def test_the_version_of_a_checkout_is_what_git_says_now(tmp_path: Path) -> None:
    """Not what was installed once; and without git and without metadata there is still an answer."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.com")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def told() -> str:
        say = "import sys; sys.path.insert(0, sys.argv[1]); import launcher; print(launcher.version())"
        bare = [sys.executable, "-S", "-I", "-c", say, str(tmp_path)]
        return subprocess.run(bare, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "launcher").mkdir()
    shutil.copy(ROOT / "launcher" / "__init__.py", tmp_path / "launcher")
    assert told() == "unknown"
    git("init", "--quiet")
    git("commit", "--allow-empty", "-m", "one")
    assert told() == "unknown"
    git("tag", "v9.8.7")
    assert told() == "9.8.7"
    git("commit", "--allow-empty", "-m", "two")
    assert re.fullmatch(r"9\.8\.7-1-g[0-9a-f]{7,}", told())


def test_settings_are_shown_before_there_is_an_image(launch: Launch) -> None:
    """What is missing is said in its place."""
    done = launch("config", "show", "--gpu", "gb200", "--nodes", "9")
    assert done.returncode == 0, done.stderr
    assert re.search(r'^job\.image +""  \(missing: --image FILE\)$', done.stdout, re.MULTILINE)
    assert re.search(r"^job\.nodes +9  \(option --nodes\)$", done.stdout, re.MULTILINE)
    assert launch("render", "--gpu", "gb200").returncode == ExitStatus.INVALID
