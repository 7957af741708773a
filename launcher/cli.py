"""The commands and their exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import ExitStatus, LauncherError
from launcher.options import RunOptions, run_options
from launcher.output import (
    PipedGroup,
    ReaderGone,
    as_json,
    colour,
    is_terminal,
    json_line,
    plain,
    print_error,
    print_json,
    warn,
)
from launcher.plan_commands import COMMANDS as PLAN_COMMANDS
from launcher.report.commands import COMMANDS as REPORT_COMMANDS
from launcher.results.commands import COMMANDS as RESULTS_COMMANDS
from launcher.results.judge_commands import COMMANDS as JUDGE_COMMANDS
from launcher.run_commands import COMMANDS, follow_run, reference
from launcher.sweep_commands import COMMANDS as SWEEP_COMMANDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.runs import Run
    from launcher.spec import RunSpec


@click.group(
    cls=PipedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
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


@launcher.command()
@run_options
@click.option("--dry-run", is_flag=True, help="Print the script and the torchrun command; touch nothing.")
@click.option("--follow", "-f", is_flag=True, help="Follow the run after submitting it; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option(
    "--force", is_flag=True, help="Submit although a check says that it will wait for ever; do not ask."
)
@click.option(
    "--retry-bad-nodes", "retries", type=click.IntRange(1, 9), metavar="N",
    help="Follow the run; where nodes fail their check, submit it again without them, at most N times.",
)  # fmt: skip
@as_json
def submit(
    options: RunOptions,
    dry_run: bool,
    follow: bool,
    yes: bool,
    force: bool,
    retries: int | None,
    as_json: bool,
) -> None:
    """Submit a run to Slurm, or with --local start it here.

    RUN.toml repeats an earlier run from its directory; options given beside it win. What `launcher preflight` checks
    is checked first.

    \b
    launcher submit --image titan.sqsh --nodes 9
    launcher submit --image titan.sqsh --nodes 2 --gpu h200 --recipe llama3-8b-fast --follow
    launcher submit --image titan.sqsh --nodes 9 --retry-bad-nodes 2
    launcher submit --local --recipe debug
    launcher submit runs/my-run/run.toml --name my-run-again
    """
    from launcher import resolve

    asked = _spec(options)
    if retries and (dry_run or asked.job.scheduler == "local"):
        raise click.UsageError(f"--retry-bad-nodes: not with {'--dry-run' if dry_run else '--local'}")
    secrets = resolve.secrets_of(asked, options.secrets, os.environ)
    spec = _looked_at(asked, force)
    if dry_run:
        return _print_plan(spec, as_json)
    spec = _checked(spec, force)
    quiet = yes or force or as_json or spec.job.scheduler == "local"
    asking = not quiet and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if asking and not click.confirm(f"Submit {_describe(spec)}?", default=True):
        raise click.Abort

    run = _start(spec, secrets, as_json)
    if retries:
        from launcher import retry
        from launcher.cluster.facts import detected
        from launcher.cluster.parse import expand

        def again(name: str, origin: str, without: set[str]) -> Run:
            detected.cache_clear()
            spec = _checked(_looked_at(resolve.renamed(asked, name, origin), force), force)
            if kept := sorted(without.difference(spec.avoid, expand(spec.job.exclude))):
                raise LauncherError(
                    f"{kept[0]} stays in the run", "leave it out of --nodelist; launcher cluster nodes"
                )
            return _start(spec, secrets, as_json)

        retry.follow(run, retries, again, as_json)
    elif follow:
        follow_run(run, as_json)


def _start(spec: RunSpec, secrets: Mapping[str, str], as_json: bool) -> Run:
    """Submits the run, and says where it is."""
    from launcher import control

    def submitted(run: Run, job_id: str) -> None:
        if as_json:
            json_line(
                {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
            )
        else:
            where = "process" if spec.job.scheduler == "local" else "Slurm job"
            click.echo(f"{run.name}: {where} {job_id}, {_describe(spec)}")
            click.echo(f"  follow it:  launcher watch {reference(run)}")

    return control.submit(spec, secrets, submitted)


@launcher.command()
@run_options
@as_json
def preflight(options: RunOptions, as_json: bool) -> None:
    """Check everything that can be known before a run queues, and submit nothing.

    The same checks come before every `submit`. Exit code 0: nothing stops the run; 3 or 4: `submit` would refuse it.

    \b
    launcher preflight --image titan.sqsh --nodes 9
    """
    from launcher import readiness

    spec, here = readiness.look_here(_spec(options))
    spec, cluster = readiness.look(spec)
    checks = [*here, *cluster]
    refused = readiness.refusal(checks, force=False)
    if as_json:
        hidden = ("not_found", "error")
        rows = [{k: v for k, v in vars(check).items() if k not in hidden} for check in checks]
        print_json({"ok": refused is None, "segment": spec.job.segment, "checks": rows})
    else:
        for check in checks:
            mark = click.style(f"{check.status:<7}", fg=_CHECK_COLOURS[check.status])
            click.echo(f"{mark}  {plain(check.name)}: {plain(check.what)}", color=colour())
            for text in filter(None, (check.why, check.fix and f"try: {check.fix}")):
                click.echo("\n".join(f"           {plain(line)}" for line in text.splitlines()))
        click.echo(f"{_describe(spec)}: " + ("submit would refuse it" if refused else "nothing stops it"))
    if refused:
        sys.exit(refused.status)


@launcher.command()
@run_options
@as_json
def render(options: RunOptions, as_json: bool) -> None:
    """Print the job script, and nothing else. Image and data need not exist.

    \b
    launcher render --gpu gb200 --nodes 9 --image /data/titan.sqsh > job.sbatch
    """
    from launcher.render import render as render_script

    script = render_script(_spec(options))
    if as_json:
        print_json({"script": script})
    else:
        click.echo(script, nl=False)


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
    spec = _spec(options)
    rows = [(key, value, spec.origin.get(key, "default")) for key, value in spec.values().items()]
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        text = str(list(value) if isinstance(value, tuple) else value if value != "" else '""')
        click.echo(f"{key:{width}}  {text}  {click.style(f'({origin})', dim=True)}", color=colour())


for _command in (
    *COMMANDS,
    *RESULTS_COMMANDS,
    *JUDGE_COMMANDS,
    *SWEEP_COMMANDS,
    *PLAN_COMMANDS,
    *REPORT_COMMANDS,
):
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
    """Bring tokenizer, training data and weights to the cluster's shared file system, verified.

    \b
    launcher stage c4 --to /data/c4 --for nodes=17,gpus=4,steps=1000,batch=5
    launcher stage tokenizer --to /data/tokenizers/Llama-3.1-8B
    launcher stage verify /data/c4
    """


@launcher.group(cls=_LaterGroup, module="launcher.cluster.commands")
def cluster() -> None:
    """Show what this Slurm cluster is, and save the GPU profile that fits it.

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

    from launcher import __version__

    found = {"launcher": __version__, "python": platform.python_version()}
    for package in ("click", "jinja2", "huggingface_hub", "rich", "torch", "torchtitan"):
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(f"{name} {number}" for name, number in found.items()))


def _spec(options: RunOptions) -> RunSpec:
    from launcher.layers import Layer
    from launcher.resolve import resolve

    layer = Layer(options.values, options.origin, secret_env=options.secret_env)
    return resolve(layer, options.config, options.run_file, os.environ)


_CHECK_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def _looked_at(spec: RunSpec, force: bool) -> RunSpec:
    """The run with its view of the data. Warns, and raises LauncherError for an image, weights or data of no use."""
    from launcher import readiness

    spec, checks = readiness.look_here(spec)
    if refused := readiness.refusal(checks, force):
        raise refused
    for check in checks:
        if check.status == "warning":
            warn(check.what)
    return spec


def _checked(spec: RunSpec, force: bool) -> RunSpec:
    """The run as the cluster can place it. Warns, and raises LauncherError where the run could not start."""
    if spec.job.scheduler != "slurm":
        return spec
    from launcher import readiness

    spec, checks = readiness.look(spec)
    refused = readiness.refusal(checks, force)
    for check in checks:
        if check.status == "warning" or (check.status == "error" and not refused):
            warn(plain(readiness.sentence(check)))
        elif check.name in ("placement", "excluded") and not refused:
            click.echo(plain(f"{check.name}: {check.what}"), err=True)
    if refused:
        raise refused
    return spec


def prepared(options: RunOptions, force: bool) -> tuple[RunSpec, dict[str, str]]:
    """A run as `submit` would submit it, and its secrets. Warns, and raises LauncherError where it could not start."""
    from launcher import resolve

    spec = _spec(options)
    secrets = resolve.secrets_of(spec, options.secrets, os.environ)
    return _checked(_looked_at(spec, force), force), secrets


def _describe(spec: RunSpec) -> str:
    nodes = f"{spec.job.nodes} node{'s' if spec.job.nodes > 1 else ''}"
    return f"{spec.job.recipe} on {nodes} x {spec.profile.gpus_per_node} {spec.profile.gpu}"


def _print_plan(spec: RunSpec, as_json: bool) -> None:
    from launcher.render import render as render_script
    from launcher.spec import node_config
    from launcher.stage.view import describe
    from launcher.titan.command import preview

    script, commands = render_script(spec), preview(node_config(spec), spec.job.python)
    if as_json:
        print_json({"run_dir": spec.run_dir, "data": describe(spec), "script": script, "torchrun": commands})
        return
    click.echo(script, nl=False)
    click.echo(plain(f"\n# Data: {describe(spec)}"))
    for era, command in commands.items():
        text = "\n".join(f"# {line}".rstrip() for line in command.splitlines())
        click.echo(f"\n# On each node, where the image has torchtitan {era}:\n{text}")


def main() -> None:
    """Entry point of the console script: errors become messages and exit codes."""
    try:
        launcher.main(prog_name="launcher", standalone_mode=False)
    except LauncherError as error:
        print_error(error)
        sys.exit(error.status)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except ReaderGone:  # `launcher logs | head`
        _discard_stdout()
        sys.exit(ExitStatus.OK)
    except OSError as error:  # the output's own device, or a directory that went away under our feet
        _discard_stdout()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        sys.exit(ExitStatus.FILESYSTEM)


def _discard_stdout() -> None:
    """Otherwise Python complains once more, at its end, about what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
