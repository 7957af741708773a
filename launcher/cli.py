"""The commands and their exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from launcher import __version__, plan_commands, run_commands, submit_commands, sweep_commands
from launcher.errors import ExitStatus, LauncherError
from launcher.options import RunOptions, run_options
from launcher.output import PipedGroup, ReaderGone, as_json, echo, never_fail, print_error, print_json, style
from launcher.report import commands as report_commands
from launcher.results import commands as results_commands
from launcher.results import judge_commands
from launcher.submit_commands import spec_of


@click.group(cls=PipedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="launcher")
def launcher() -> None:
    """Run torchtitan's Llama-3 training on a Slurm cluster, or here, and read the result.

    \b
    launcher submit --image titan.sqsh --nodes 9     submit to Slurm
    launcher submit --local --recipe debug           try it on this machine
    launcher watch                                   follow the newest run
    launcher results                                 its results row

    Exit codes: 0 done, 1 error, 2 usage, 3 invalid value or image, 4 not found, 5 run exists, 6 Slurm,
    7 file system, 8 job failed, 9 job's end unknown, 10 no data yet, 11 unfit nodes, 12 accept: FAIL,
    13 accept: CANNOT SAY, 130 interrupted.

    \b
    Shell completion: eval "$(_LAUNCHER_COMPLETE=bash_source launcher)"     (or zsh_source, fish_source)
    """


@launcher.group()
def config() -> None:
    """Settings and where they come from."""


@config.command("show")
@run_options
@as_json
def config_show(options: RunOptions, as_json: bool) -> None:
    """Print every setting with its value and its origin.

    \b
    launcher config show --gpu b200 --recipe llama3-8b --image titan.sqsh
    """
    spec = spec_of(options, image_needed=False)
    rows = [(key, value, spec.origin.get(key, "default")) for key, value in spec.values().items()]
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        text = str(list(value) if isinstance(value, tuple) else value if value != "" else '""')
        echo(f"{key:{width}}  {text}  {style(f'({origin})', dim=True)}")


for _module in (
    submit_commands,
    run_commands,
    results_commands,
    judge_commands,
    sweep_commands,
    plan_commands,
    report_commands,
):
    for _command in _module.COMMANDS:
        launcher.add_command(_command)


class _LaterGroup(click.Group):
    """Its commands, COMMANDS in `module`, are imported when one is asked for: the others start faster without."""

    def __init__(self, *arguments: Any, module: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.module = module

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self._commands())

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        return self._commands().get(name)

    def _commands(self) -> dict[str, click.Command]:
        from importlib import import_module

        commands: dict[str, click.Command] = import_module(self.module).COMMANDS
        return commands


@launcher.group(cls=_LaterGroup, module="launcher.image.commands")
def image() -> None:
    """Build, convert, inspect and check the image that jobs run in.

    \b
    launcher image build cpu -o .                       build it and write titan-cpu-amd64.sqsh
    launcher image inspect titan-cpu-amd64.sqsh         what is in it
    """


@launcher.group(cls=_LaterGroup, module="launcher.stage.commands")
def stage() -> None:
    """Stage data, tokenizer, weights and images, verified.

    They come to the file system that all nodes share.

    \b
    launcher stage c4 --to /data/c4 --for nodes=17,gpus=4,steps=1000,batch=5
    launcher stage tokenizer --to /data/tokenizers/Llama-3.1-8B
    launcher stage verify /data/c4
    """


@launcher.group(cls=_LaterGroup, module="launcher.cluster.commands")
def cluster() -> None:
    """Show what this Slurm cluster is, and save its GPU profile.

    \b
    launcher cluster show                       Slurm, nodes, blocks, and the profile with its evidence
    launcher cluster use gb200                  from now on the default of submit
    launcher cluster nodes                      which nodes are left out, and why
    """


@launcher.command()
@as_json
def version(as_json: bool) -> None:
    """Print the versions of the launcher and of what it uses."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = {"launcher": __version__, "python": platform.python_version()}
    for package in ("click", "jinja2", "huggingface_hub", "rich", "torch", "torchtitan"):
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        print_json(found)
    else:
        echo(*(f"{name} {number}" for name, number in found.items()))


def main() -> None:
    """Entry point of the console script: errors become messages and exit codes."""
    never_fail(sys.stdout, sys.stderr)
    try:
        launcher.main(prog_name="launcher", standalone_mode=False)
    except LauncherError as error:
        print_error(error)
        sys.exit(error.status)
    except click.Abort:
        echo("interrupted", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    except click.ClickException as error:
        error.show(said := io.StringIO())
        echo(*said.getvalue().rstrip("\n").split("\n"), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except ReaderGone:  # `launcher logs | head`
        _discard_stdout()
        sys.exit(ExitStatus.OK)
    except OSError as error:  # the output's own device, or a directory that went away under our feet
        _discard_stdout()
        where = f"{error.filename}: " if error.filename else ""
        echo(f"error: {where}{error.strerror or error}", err=True)
        sys.exit(ExitStatus.FILESYSTEM)


def _discard_stdout() -> None:
    """Otherwise Python complains once more, at its end, about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
