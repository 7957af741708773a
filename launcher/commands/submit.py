"""The commands that make a run: `submit`, and `render`, which prints its script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from launcher.base.output import as_json, echo, echo_file, print_json
from launcher.commands.asked import describe_run, looked_at, secrets_of, spec_of, tell
from launcher.config import resolve
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_argument, run_options, runs_dir_option
from launcher.config.render import render as render_script
from launcher.config.spec import PlacedRun, node_config
from launcher.stage.view import describe
from launcher.titan.command import preview


@click.command(cls=RunCommand)
@run_options
@click.option("--dry-run", is_flag=True, help="Print the job script and the torchrun command, and submit nothing.")
@click.option(
    "--prove", "proved", is_flag=True, help="First have torchtitan build the run at full size, without GPUs (a minute)."
)
@click.option("--follow", "-f", is_flag=True, help="Follow the run after submitting it; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit even if a check says that the job would never start. Does not ask.")
@click.option("--retry-bad-nodes", "retries", type=click.IntRange(1, 9), hidden=True, help="--max-restarts --follow")
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
    launcher submit --image titan.sqsh --nodes 9 --spares 1 --checkpoint-every 100
    launcher submit --local --recipe debug
    launcher submit runs/my-run/run.toml --name my-run-again
    """
    if retries:
        values = {"job.max_restarts": retries, **options.values}
        options = replace(options, values=values, origin={"job.max_restarts": "option", **options.origin})
    asked = spec_of(options)
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
    starting.ask_first(lambda: f"Submit {describe_run(run)} ({starting.node_hours(run)})?", quiet)
    with starting.submitted(run, secrets) as (made, job_id):
        starting.say_started(made, run, job_id, as_json)
    if follow or retries:
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


@click.command()
@run_argument(required=True)
@runs_dir_option
@click.option("--steps", type=int, help="Train to this step.  [default: as before]")
@click.option("--time", "-t", help="Slurm time limit.  [default: as before]")
@click.option("--exclude", "-x", help="Never run on these nodes.  [default: as before]")
@click.option("--follow", "-f", is_flag=True, help="Follow the run after submitting it; Ctrl-C detaches.")
@click.option("--force", is_flag=True, help="Submit even if a check says that the job would never start.")
@as_json
def resume(
    run: str,
    runs_dir: Path,
    steps: int | None,
    time: str | None,
    exclude: str | None,
    follow: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Go on with an ended run from its last complete checkpoint.

    Submits a new job for the run, with the same name, directory, settings and place in the data. Nodes that failed
    their check are left out. If there is no checkpoint, training begins at step 1.

    \b
    launcher resume my-run
    launcher resume my-run --steps 2000 --time 2-00:00:00
    """
    # Here, so that a dry run of `submit` answers in half the time.
    from launcher.commands import start as starting
    from launcher.commands.runs import follow_run
    from launcher.runs import directory as runs
    from launcher.runs.control import check_resumable

    found = runs.open_run(run, runs_dir)
    given: dict[str, Any] = {"recipe.steps": steps, "job.time": time, "job.exclude": exclude}
    values = {key: value for key, value in given.items() if value is not None}
    origin = {key: f"option --{key.partition('.')[2]}" for key in values}
    own = {"job.name": found.made_at.name, "job.runs_dir": str(found.made_at.parent)}  # a run.toml has none
    values, origin = values | own, origin | dict.fromkeys(own, "launcher resume")
    options = RunOptions(values, origin, run_file=found.path / "run.toml")
    asked = spec_of(options)
    step = check_resumable(found, asked)
    secrets = secrets_of(asked, options)
    spec, findings = looked_at(asked, force)
    tell(findings, force)
    with starting.resumed(found, spec, secrets) as (_, job_id):
        starting.say_started(found, spec, job_id, as_json)
    if not as_json:
        echo(f"  from step:  {step}" if step else "  from the beginning: it has no complete checkpoint")
    if follow:
        follow_run(found, as_json)


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
        where = "On this machine" if spec.job.scheduler == "local" else "On each node"
        what = "image" if spec.job.image else "Python"
        echo("", f"# {where}, if the {what} has torchtitan {era}:", *lines)
