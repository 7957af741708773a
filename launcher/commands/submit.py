"""The commands that make a run: `submit`, `preflight` before it, and `render`, which prints its script."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import click

from launcher.base.errors import LauncherError, quoted
from launcher.base.finding import OK, refusal, sentence
from launcher.base.output import as_json, echo, echo_file, is_terminal, plain, print_json, style, warn
from launcher.commands import retry
from launcher.commands.runs import follow_run
from launcher.config import resolve
from launcher.config.layers import Layer
from launcher.config.options import RunOptions, run_options
from launcher.config.render import render as render_script
from launcher.config.spec import RunSpec, node_config
from launcher.plan.plan import write_beside
from launcher.preflight.local_files import look_here
from launcher.preflight.readiness import look
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.detect import detected
from launcher.scheduler.parse import expand
from launcher.stage.view import describe
from launcher.titan.command import preview


@click.command()
@run_options
@click.option("--dry-run", is_flag=True, help="Print the script and the torchrun command; touch nothing.")
@click.option("--follow", "-f", is_flag=True, help="Follow the run after submitting it; Ctrl-C detaches.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before submitting.")
@click.option("--force", is_flag=True, help="Submit although a check says that it will wait for ever; do not ask.")
@click.option(
    "--retry-bad-nodes",
    "retries",
    type=click.IntRange(1, 9),
    metavar="N",
    help="Follow the run; where nodes fail their check, submit it again without them, at most N times.",
)
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
    asked = spec_of(options)
    if retries and (dry_run or asked.job.scheduler == "local"):
        raise click.UsageError(f"--retry-bad-nodes: not with {'--dry-run' if dry_run else '--local'}")
    secrets = resolve.secrets_of(asked, options.secrets, os.environ)
    spec = _looked_at(asked, force)
    if dry_run:
        return _print_plan(spec, as_json)
    spec = _checked(spec, force)
    quiet = yes or force or as_json or spec.job.scheduler == "local"
    asking = not quiet and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if asking and not click.confirm(plain(f"Submit {_describe(spec)}?"), default=True):
        raise click.Abort

    run = _start(spec, secrets, as_json)
    if retries:

        def again(name: str, origin: str, without: set[str]) -> Run:
            detected.cache_clear()
            spec = _checked(_looked_at(resolve.renamed(asked, name, origin), force), force)
            if kept := sorted(without.difference(spec.avoid, expand(spec.job.exclude))):
                raise LauncherError(f"{kept[0]} stays in the run", "leave it out of --nodelist; launcher cluster nodes")
            return _start(spec, secrets, as_json)

        retry.follow(run, retries, again, as_json)
    elif follow:
        follow_run(run, as_json)


@click.command()
@run_options
@as_json
def preflight(options: RunOptions, as_json: bool) -> None:
    """Check what can be known before a run queues.

    Nothing is submitted. The same checks come before every `submit`. Exit code 0: nothing stops the run; 3 or 4: `submit` would refuse it.

    \b
    launcher preflight --image titan.sqsh --nodes 9
    """
    spec, here = look_here(spec_of(options))
    spec, cluster = look(spec)
    checks = [*here, *cluster]
    refused = refusal(checks, force=False)
    if as_json:
        hidden = ("not_found", "error")
        rows = [{k: v for k, v in vars(check).items() if k not in hidden} for check in checks]
        print_json({"ok": refused is None, "segment": spec.job.segment, "checks": rows})
    else:
        for check in checks:
            mark = style(f"{check.status:<7}", fg=_CHECK_COLOURS[check.status])
            echo(f"{mark}  {check.name}: {check.what}")
            for text in filter(None, (check.why, check.fix and f"try: {check.fix}")):
                echo(*(f"           {line}" for line in text.splitlines()))
        echo(f"{_describe(spec)}: " + ("submit would refuse it" if refused else "nothing stops it"))
    if refused:
        sys.exit(refused.status)


@click.command()
@run_options
@as_json
def render(options: RunOptions, as_json: bool) -> None:
    """Print the job script, and nothing else. Image and data need not exist.

    \b
    launcher render --gpu gb200 --nodes 9 --image /data/titan.sqsh > job.sbatch
    """
    script = render_script(spec_of(options))
    if as_json:
        print_json({"script": script})
    else:
        echo_file(script)


def spec_of(options: RunOptions, image_needed: bool = True) -> RunSpec:
    """The run that the options ask for. Without `image_needed`, `job.image` may be missing, and is "" then."""

    def resolved(**more: str) -> RunSpec:
        origin = {**options.origin, **dict.fromkeys(more, "default")}
        layer = Layer({**options.values, **more}, origin, secret_env=options.secret_env)
        return resolve.resolve(layer, options.config, options.run_file, os.environ)

    try:
        return resolved()
    except LauncherError as error:
        if image_needed or "job.image" in options.values or not error.what.startswith("job.image = ''"):
            raise
    spec = resolved(**{"job.image": "/any.sqsh"})
    return replace(spec, job=replace(spec.job, image=""), origin={**spec.origin, "job.image": "missing: --image FILE"})


_CHECK_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def _looked_at(spec: RunSpec, force: bool) -> RunSpec:
    """The run with its view of the data. Warns, and raises LauncherError for an image, weights or data of no use."""
    spec, checks = look_here(spec)
    if refused := refusal(checks, force):
        raise refused
    for check in checks:
        if check.status != OK:
            warn(sentence(check))
    return spec


def _checked(spec: RunSpec, force: bool) -> RunSpec:
    """The run as the cluster can place it. Warns, and raises LauncherError where the run could not start."""
    if spec.job.scheduler != "slurm":
        return spec

    spec, checks = look(spec)
    refused = refusal(checks, force)
    for check in checks:
        if check.status == "warning" or (check.status == "error" and not refused):
            warn(sentence(check))
        elif check.name in ("placement", "excluded") and not refused:
            echo(f"{check.name}: {check.what}", err=True)
    if refused:
        raise refused
    return spec


def prepared(options: RunOptions, force: bool) -> tuple[RunSpec, dict[str, str]]:
    """A run as `submit` would submit it, and its secrets. Warns, and raises LauncherError where it could not start."""
    spec = spec_of(options)
    secrets = resolve.secrets_of(spec, options.secrets, os.environ)
    return _checked(_looked_at(spec, force), force), secrets


def _describe(spec: RunSpec) -> str:
    nodes = f"{spec.job.nodes} node{'s' if spec.job.nodes > 1 else ''}"
    return f"{spec.job.recipe} on {nodes} x {spec.profile.gpus_per_node} {spec.profile.gpu}"


def _print_plan(spec: RunSpec, as_json: bool) -> None:
    script, commands = render_script(spec), preview(node_config(spec), spec.job.python)
    if as_json:
        print_json({"run_dir": spec.run_dir, "data": describe(spec), "script": script, "torchrun": commands})
        return
    echo_file(script)
    if spec.job.scheduler == "slurm":
        echo("", "# submit adds --segment and --exclude as the cluster has them then")
    echo("", f"# Data: {describe(spec)}")
    for era, command in commands.items():
        lines = (f"# {line}".rstrip() for line in command.splitlines())
        echo("", f"# On each node, where the image has torchtitan {era}:", *lines)


def _start(spec: RunSpec, secrets: Mapping[str, str], as_json: bool) -> Run:
    """Submits the run, and says where it is."""

    def submitted(run: Run, job_id: str) -> None:
        if as_json:
            job = {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
            print_json(job, indent=None)
        else:
            where = "process" if spec.job.scheduler == "local" else "Slurm job"
            echo(f"{run.name}: {where} {job_id}, {_describe(spec)}")
            echo(f"  follow it:  {quoted('launcher', 'watch', run.reference)}")

    return control.submit(spec, secrets, submitted, also=partial(write_beside, spec))
