"""The group of all commands, and what their errors become. A command is imported when it is asked for."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from launcher import version
from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import echo, never_fail, print_error

# Name -> where it is, below launcher.commands, and its line of --help.
COMMANDS = {
    "accept": ("judge:accept", "Judge a run: PASS, FAIL or CANNOT SAY, with reasons."),
    "archive": ("archive:archive", "Pack a run's logs, node checks, settings and versions for a support ticket."),
    "cancel": ("runs:cancel", "Cancel a run."),
    "cluster": ("cluster:cluster", "Show this Slurm cluster, and the nodes that are left out."),
    "compare": ("judge:compare", "Compare two results and show which differences exceed noise."),
    "completion": ("completion:completion", "Print the completion script for bash, zsh or fish."),
    "config": ("config:config", "Show settings and where they come from."),
    "image": ("image:image", "Build, convert, inspect and check the image that jobs run in."),
    "init": ("init:init", "Set up your defaults for this cluster."),
    "list": ("runs:list_", "List the runs, newest first."),
    "logs": ("runs:logs", "Print the logs of all nodes as one, each line with its node."),
    "plan": ("plan:plan", "Predict a run: memory, tokens/s, time, node-hours and C4 files."),
    "preflight": ("preflight:preflight", "Check a run before it queues."),
    "render": ("submit:render", "Print the job script, and nothing else."),
    "report": ("report:report", "Write runs as one HTML page with charts."),
    "resume": ("submit:resume", "Go on with an ended run from its last complete checkpoint."),
    "results": ("results:results", "Print results in the form of the published table."),
    "stage": ("stage:stage", "Download data, tokenizer, weights and images, and verify them."),
    "status": ("runs:status", "Show the state of runs (default: the newest), and why."),
    "submit": ("submit:submit", "Submit a run to Slurm, or start it on this machine with --local."),
    "sweep": ("sweep:sweep", "Submit a matrix of nodes, batch sizes and recipes."),
    "version": ("version:version", "Print the versions of the launcher and of what it uses."),
    "watch": ("runs:watch", "Follow a run (default: the newest) to its end."),
}


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """As in `launcher logs | head`, which is no error; click itself makes exit code 1 of it."""
    try:
        yield
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(ExitStatus.OK)


def _discard_stdout() -> None:
    """Otherwise Python complains once more, at its end, about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Commands(click.Group):
    """The commands of COMMANDS; help and completion name them without importing any."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _reader_may_go():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        with _reader_may_go():
            return super().invoke(context)

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(f"launcher.commands.{module}"), attribute)
        return command

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        from difflib import get_close_matches

        if args[0] not in COMMANDS and (near := get_close_matches(args[0], COMMANDS)):
            context.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(near)}?")
        return super().resolve_command(context, args)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(n, help=about) for n, (_, about) in COMMANDS.items() if n.startswith(incomplete)]
        return names + click.Command.shell_complete(self, context, incomplete)


def _version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        echo(f"launcher, version {version()}")
        context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def launcher() -> None:
    """Run torchtitan's Llama-3 training on a Slurm cluster or on this machine, and read the result.

    \b
    launcher submit --image titan.sqsh --nodes 9     submit to Slurm
    launcher submit --local --recipe debug           try it on this machine
    launcher watch                                   follow the newest run
    launcher results                                 its results row

    Exit codes: 0 done, 1 error, 2 usage, 3 invalid value or image, 4 not found, 5 run exists, 6 Slurm,
    7 file system, 8 job failed, 9 job's end unknown, 10 no data yet, 11 unfit nodes, 12 accept: FAIL,
    13 accept: CANNOT SAY, 130 interrupted.
    """


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
    except OSError as error:  # the output's own device, or a directory that went away under our feet
        _discard_stdout()
        if error.errno == errno.ENOENT and not error.filename:  # tempfile's, of all its places together
            echo("error: no place for temporary files [unwritable]", "  try: export TMPDIR=DIR", err=True)
        else:
            where = f"{error.filename}: " if error.filename else ""
            echo(f"error: {where}{error.strerror or error} [unwritable]", err=True)
        sys.exit(ExitStatus.FILESYSTEM)
