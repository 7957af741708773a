"""The commands and their exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import ExitStatus, LauncherError
from launcher.options import RunOptions, run_argument, run_options, runs_dir_option
from launcher.output import (
    PipedGroup,
    ReaderGone,
    age,
    colour,
    is_terminal,
    json_line,
    plain,
    print_error,
    print_json,
    warn,
)

if TYPE_CHECKING:
    from launcher.cluster.state import JobState
    from launcher.known_errors import Failure
    from launcher.runs import Run
    from launcher.spec import RunSpec

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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
    7 file system, 8 job failed, 9 job's end unknown, 10 no data yet, 130 interrupted.

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
@as_json
def submit(options: RunOptions, dry_run: bool, follow: bool, yes: bool, force: bool, as_json: bool) -> None:
    """Submit a run to Slurm, or with --local start it here.

    RUN.toml repeats an earlier run from its directory; options given beside it win. What `launcher preflight` checks
    is checked first.

    \b
    launcher submit --image titan.sqsh --nodes 9
    launcher submit --image titan.sqsh --nodes 2 --gpu h200 --recipe llama3-8b-fast --follow
    launcher submit --local --recipe debug
    launcher submit runs/my-run/run.toml --name my-run-again
    """
    from launcher import resolve
    from launcher.stage import view

    spec = _spec(options)
    secrets = resolve.secrets_of(spec, options.secrets, os.environ)
    of_image = resolve.check_image(spec)
    resolve.check_weights(spec)
    spec, notes = view.plan(spec)
    for text in (*of_image, *resolve.warnings(spec), *notes):
        warn(text)
    if dry_run:
        return _print_plan(spec, as_json)
    spec = _checked(spec, force)
    quiet = yes or force or as_json or spec.job.scheduler == "local"
    asking = not quiet and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if asking and not click.confirm(f"Submit {_describe(spec)}?", default=True):
        raise click.Abort

    from launcher import control

    def submitted(run: Run, job_id: str) -> None:
        if as_json:
            json_line(
                {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
            )
        else:
            where = "process" if spec.job.scheduler == "local" else "Slurm job"
            click.echo(f"{run.name}: {where} {job_id}, {_describe(spec)}")
            click.echo(f"  follow it:  launcher watch {_reference(run)}")

    run = control.submit(spec, secrets, submitted)
    if follow:
        _follow(run, as_json)


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
        rows = [{k: v for k, v in vars(check).items() if k != "not_found"} for check in checks]
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


@launcher.command("list")
@runs_dir_option
@as_json
def list_(runs_dir: Path, as_json: bool) -> None:
    """List the runs, newest first."""
    from launcher import control, runs

    found = runs.all_runs(runs_dir)
    states = control.states(found)
    rows = [_summary(run, states[run.name]) | {"reason": states[run.name].reason} for run in found]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"no runs in {runs_dir}; start one: launcher submit --local --recipe debug", err=True)
    else:
        width = max(len(row["run"]) for row in rows)
        for row in rows:
            size = plain(f"{row['nodes']} x {row['gpus_per_node']} {row['gpu']}")
            state = click.style(f"{row['state']:<13}", fg=_STATE_COLOURS.get(row["state"]))
            click.echo(
                f"{plain(row['run']):{width}}  {state}  {row['job_id']:>9}  {size:<14}  {plain(row['recipe']):<14}  "
                f"{age(row['age_s'])}",
                color=colour(),
            )
        for reason in sorted({row["reason"] for row in rows if row["state"] == "UNKNOWN" and row["reason"]}):
            click.echo(f"UNKNOWN: {plain(reason)}", err=True)


@launcher.command()
@run_argument(required=False)
@runs_dir_option
@as_json
def status(run: str, runs_dir: Path, as_json: bool) -> None:
    """Tell the state of a run (default: the newest) and how that is known.

    Exit code 0: going, waiting or completed; 8: failed; 9: unknown.
    """
    from launcher import control, runs

    found = runs.open_run(run, runs_dir)
    state = control.state(found)
    row = _summary(found, state)
    waiting = _why_waiting(found, state)
    failure = _failure(found, state)
    if as_json:
        more = {
            "source": state.source,
            "reason": state.reason,
            "exit_code": state.exit_code,
            "waiting": waiting,
            "failure": failure.as_json() if failure else None,
        }
        print_json(row | more)
    else:
        detail = "; ".join(text for text in (state.reason, state.source and f"from {state.source}") if text)
        click.echo(plain(f"{found.name}: {state.name}" + (f" ({detail})" if detail else "")))
        click.echo(f"  job {row['job_id'] or 'none'}, submitted {age(row['age_s'])} ago, {found.path}")
        for line in waiting:
            click.echo(f"  {line}")
        if failure:
            _print_failure(found, failure)
        elif not state.known:
            click.echo(f"  look: launcher logs {_reference(found)}")
            click.echo(f"  again: launcher cancel {_reference(found)}; launcher submit {found.path}/run.toml")
    _exit_for(state)


@launcher.command()
@run_argument(required=False)
@runs_dir_option
@as_json
def watch(run: str, runs_dir: Path, as_json: bool) -> None:
    """Follow a run (default: the newest) to its end. Ctrl-C detaches; the run goes on.

    With --json, one object per logged step.
    """
    from launcher import runs

    _follow(runs.open_run(run, runs_dir), as_json)


@launcher.command()
@run_argument(required=False)
@runs_dir_option
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends; Ctrl-C stops reading.")
@as_json
def logs(run: str, runs_dir: Path, follow: bool, as_json: bool) -> None:
    """Print the logs of all nodes as one, each line with its node.

    The files themselves are RUN/logs/NNNN-<node>.log and RUN/logs/job.log.
    """
    from launcher import attach, runs

    found = runs.open_run(run, runs_dir)
    for node, line in attach.log_lines(found, follow):
        if as_json:
            json_line({"node": node, "line": line})
        else:
            click.echo(f"{click.style(node, fg='cyan')}: {line}", color=colour())


@launcher.command()
@run_argument(required=True)
@runs_dir_option
@as_json
def cancel(run: str, runs_dir: Path, as_json: bool) -> None:
    """Cancel a run. One whose submission was cut off can never start afterwards."""
    from launcher import control, runs

    found = runs.open_run(run, runs_dir)
    before, cancelled = control.cancel(found)
    if as_json:
        print_json({"run": found.name, "was": before.name, "cancelled": cancelled})
    elif cancelled:
        click.echo(f"{found.name}: cancelled (was {before.name})")
    elif before.known:
        click.echo(f"{found.name}: already ended: {before.name}")
    else:
        click.echo(f"{found.name}: nothing to cancel: {before.reason}")


@launcher.command()
@run_argument(required=False)
@runs_dir_option
@as_json
def results(run: str, runs_dir: Path, as_json: bool) -> None:
    """Print a run's results row (default: the newest run's), as the published table has it.

    \b
    launcher results
    launcher results my-run --json
    """
    from launcher import control, runs
    from launcher.results.rows import markdown_header, markdown_row, row_as_dict, summary_line
    from launcher.results.run import row_of

    found = runs.open_run(run, runs_dir)
    state = control.states([found])[found.name]
    row = row_of(found, state)
    if row is None:
        raise LauncherError(
            f"{found.name} ({state.name}) has logged no step yet",
            f"launcher watch {_reference(found)}" if state.active else f"launcher logs {_reference(found)}",
            status=ExitStatus.NO_DATA,
        )
    if as_json:
        print_json({"run": found.name, "state": state.name} | row_as_dict(row))
    else:
        click.echo(f"{markdown_header()}\n{markdown_row(row)}\n\n{summary_line(row)}")


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


_STATE_COLOURS = {
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "FAILED": "red",
    "UNKNOWN": "yellow",
    "TIMEOUT": "red",
}


def _spec(options: RunOptions) -> RunSpec:
    from launcher.layers import Layer
    from launcher.resolve import resolve

    layer = Layer(options.values, options.origin, secret_env=options.secret_env)
    return resolve(layer, options.config, options.run_file, os.environ)


_CHECK_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


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
        elif check.name == "placement" and not refused:
            click.echo(plain(f"placement: {check.what}"), err=True)
    if refused:
        raise refused
    return spec


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


def _follow(run: Run, as_json: bool) -> None:
    """Shows the run's progress until it ends, then its results row. Exits with the run's own status."""
    from launcher import attach, control
    from launcher.results.rows import markdown_row, row_as_dict, summary_line
    from launcher.results.run import row_of

    try:
        attach.wait_for_start(run, None if as_json else lambda text: _say_waiting(run, text))
        if as_json:
            for snapshot in attach.progress_of(run):
                json_line(attach.as_dict(snapshot))
        else:
            attach.show(run, sys.stdout)
    except KeyboardInterrupt:
        click.echo(f"\ndetached; {run.name} goes on: launcher watch {_reference(run)}", err=True)
        sys.exit(ExitStatus.INTERRUPTED)
    state = control.state(run)
    row, failure = row_of(run, state), _failure(run, state)
    if as_json:
        result = row_as_dict(row) if row else None
        ended = {"run": run.name, "state": state.name, "result": result}
        json_line(ended | {"failure": failure.as_json() if failure else None})
    else:
        click.echo(plain(f"{run.name}: {state.name}" + (f" ({state.reason})" if state.reason else "")))
        if row:
            click.echo(f"\n{markdown_row(row)}\n{summary_line(row)}")
        if failure:
            _print_failure(run, failure)
    _exit_for(state)


def _why_waiting(run: Run, state: JobState) -> list[str]:
    from launcher.cluster.state import WAITING

    if run.is_local or state.name not in WAITING:
        return []
    from launcher.readiness import why_waiting

    return [plain(line) for line in why_waiting(run, state)]


def _say_waiting(run: Run, text: str) -> None:
    """`watch` tells each new reason, and what it means."""
    from launcher.cluster.state import JobState

    click.echo(plain(f"{run.name}: {text}"), err=True)
    name, _, reason = text.partition(" ")
    for line in _why_waiting(run, JobState(name, "squeue", reason)):
        click.echo(f"  {line}", err=True)


def _failure(run: Run, state: JobState) -> Failure | None:
    if not state.failed:
        return None
    from launcher.known_errors import explain, how_it_ended

    ended = how_it_ended(state.name, state.reason, state.exit_code, run.logs)
    return explain(run.logs, ended, _reference(run), run.path)


def _print_failure(run: Run, failure: Failure) -> None:
    for line in failure.as_text():
        click.echo(f"  {plain(line.expandtabs())}", err=True)
    click.echo(f"  everything: launcher logs {_reference(run)}", err=True)


def _summary(run: Run, state: JobState) -> dict[str, Any]:
    from launcher import runs

    spec = run.spec
    return {
        "run": run.name,
        "state": state.name,
        "job_id": str((run.job or {}).get("job_id", "")),
        "gpu": str(spec.get("gpu", "?")),
        "nodes": spec.get("nodes", 0),
        "gpus_per_node": spec.get("gpus_per_node", 0),
        "recipe": str(spec.get("recipe", {}).get("name", "?")),
        "run_dir": str(run.path),
        "age_s": round(runs.age_s(run)),
    }


def _reference(run: Run) -> str:
    """How to name the run in a command typed here: its name where runs/ is below, else its path."""
    default = os.environ.get("LAUNCHER_RUNS_DIR") or "runs"
    return run.name if run.path.parent == Path(default).resolve() else str(run.path)


def _exit_for(state: JobState) -> None:
    if state.failed:
        sys.exit(ExitStatus.JOB_FAILED)
    if not state.known:
        sys.exit(ExitStatus.JOB_UNKNOWN)


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
