"""The commands that make a run: `submit`, and `render`, which prints its script."""

from __future__ import annotations

import sys
from typing import Any

import click

from launcher.base.output import as_json, confirm, echo, echo_file, is_terminal, print_json
from launcher.commands.asked import describe_run, looked_at, secrets_of, spec_of, tell
from launcher.config import resolve
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_options
from launcher.config.render import render as render_script
from launcher.config.spec import PlacedRun, node_config
from launcher.stage.view import describe
from launcher.titan.command import preview


@click.command(cls=RunCommand)
@run_options
@click.option("--dry-run", is_flag=True, help="Print the script and the torchrun command, and change nothing.")
@click.option(
    "--prove", "proved", is_flag=True, help="Have torchtitan build the run before it queues, as `plan --prove` does."
)
@click.option("--follow", "-f", is_flag=True, help="Follow the run after submitting it; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit even if a check says that the job would never start. Does not ask.")
@click.option(
    "--retry-bad-nodes",
    "retries",
    type=click.IntRange(1, 9),
    metavar="N",
    help="Follow the run. If nodes fail their check, submit it again without them, up to N times.",
)
@as_json
def submit(
    options: RunOptions,
    dry_run: bool,
    proved: bool,
    follow: bool,
    yes: bool,
    force: bool,
    retries: int | None,
    as_json: bool,
) -> None:
    """Submit a run to Slurm, or start it on this machine with --local.

    To repeat an earlier run, name its RUN.toml; options on the command line override it. The checks of `launcher
    preflight` run first.

    \b
    launcher submit --image titan.sqsh --nodes 9
    launcher submit --image titan.sqsh --nodes 2 --gpu h200 --recipe llama3-8b-fast --follow
    launcher submit --image titan.sqsh --nodes 9 --retry-bad-nodes 2
    launcher submit --local --recipe debug
    launcher submit runs/my-run/run.toml --name my-run-again
    """
    asked = spec_of(options)
    if retries and (dry_run or asked.job.scheduler == "local"):
        raise click.UsageError(f"--retry-bad-nodes: not with {'--dry-run' if dry_run else '--local'}")
    secrets = secrets_of(asked, options)
    run, findings = looked_at(asked, force, ask_slurm=not dry_run)
    tell(findings, force)
    if dry_run:
        return _print_plan(run, _proof(run) if proved else None, as_json)
    # Here, so that a dry run answers in half the time.
    from launcher.commands import start as starting
    from launcher.commands.runs import follow_run

    starting.say_where(findings)
    if proved:
        _proof(run)
    quiet = yes or force or as_json or run.job.scheduler == "local"
    asking = not quiet and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if asking:
        confirm(f"Submit {describe_run(run)} ({starting.node_hours(run)})?")

    made = starting.start(run, secrets, as_json)
    if retries:
        starting.start_with_retries(asked, made, secrets, retries, force, as_json)
    elif follow:
        follow_run(made, as_json)


@click.command(cls=RunCommand)
@run_options
@as_json
def render(options: RunOptions, as_json: bool) -> None:
    """Print the job script, and nothing else. Image and data need not exist.

    \b
    launcher render --gpu gb200 --nodes 9 --image /data/titan.sqsh > job.sbatch
    """
    script = render_script(resolve.placed(spec_of(options)))
    if as_json:
        print_json({"script": script})
    else:
        echo_file(script)


def _proof(spec: PlacedRun) -> dict[str, Any]:
    """Said beside the output, which is the script's or the job's. Raises LauncherError for a run that is refused."""
    from launcher.plan import proof

    facts = proof.prove(spec)
    proof.check(facts)
    echo(*proof.lines(facts), err=True)
    return facts


def _print_plan(spec: PlacedRun, proof: dict[str, Any] | None, as_json: bool) -> None:
    script, commands = render_script(spec), preview(node_config(spec), spec.job.python)
    if as_json:
        known = {"run_dir": spec.run_dir, "data": describe(spec), "script": script, "torchrun": commands}
        print_json(known | ({"proof": proof} if proof else {}))
        return
    echo_file(script)
    if spec.job.scheduler == "slurm":
        echo("", "# submit also adds --segment and --exclude, as the cluster then needs them")
    echo("", f"# Data: {describe(spec)}")
    for era, command in commands.items():
        lines = (f"# {line}".rstrip() for line in command.splitlines())
        echo("", f"# On each node, where the image has torchtitan {era}:", *lines)
