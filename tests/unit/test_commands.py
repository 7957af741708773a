"""The table by which commands are found without being imported says what they say of themselves."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from launcher.base.errors import ExitStatus
from launcher.cli import COMMANDS, launcher
from tests.conftest import Launch


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_each_command_in_its_own_words(name: str) -> None:
    command = launcher.get_command(click.Context(launcher), name)
    assert command and command.name == name and command.get_short_help_str(200) == COMMANDS[name][1]


def test_help_and_completion_import_no_command() -> None:
    program = (
        "import sys, click; from launcher.cli import launcher\n"
        "context = click.Context(launcher)\n"
        "launcher.get_help(context); assert [i.value for i in launcher.shell_complete(context, 'su')] == ['submit']\n"
        "print([name for name in sys.modules if name.startswith('launcher.commands')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_submit_imports_nothing_that_takes_long() -> None:
    """Of the network's modules it needs none before it looks into object storage."""
    slow = {"asyncio", "email", "httpx", "rich", "ssl"}
    program = f"import sys, launcher.commands.submit; print(sorted({slow} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_cancel_needs_a_name(launch: Launch) -> None:
    """A version of click takes the default of a required argument for its value: the newest run was cancelled."""
    done = launch("cancel")
    assert done.returncode == ExitStatus.USAGE and "RUN" in done.stderr
