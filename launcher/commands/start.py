"""From a run that is placed to one that is submitted, and the retries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.base.errors import LauncherError, quoted
from launcher.base.files import write_json
from launcher.base.finding import OK, Finding
from launcher.base.output import echo, print_error, print_json
from launcher.commands.asked import describe_run, looked_at, tell
from launcher.commands.runs import exit_for, watch_to_end
from launcher.config import resolve
from launcher.config.spec import PlacedRun, RunSpec
from launcher.plan.plan import plan, prediction
from launcher.preflight.text import words
from launcher.runs import control
from launcher.runs.directory import Run, making
from launcher.scheduler.detect import detected
from launcher.scheduler.parse import compress, expand
from launcher.stage.view import write_data

NAME_CHARS = 56  # of the first run's name: "-retry9" fits behind it


def say_where(findings: Sequence[Finding]) -> None:
    """How the nodes were chosen."""
    for name, what, _ in (words(finding) for finding in findings if finding.status == OK):
        if name in ("placement", "excluded"):
            echo(f"{name}: {what}", err=True)


def node_hours(spec: PlacedRun) -> str:
    """What the run may cost, said before the question: as its plan and its time limit have it."""
    found = plan(spec)
    parts = [] if found.node_hours is None else [f"about {found.node_hours:.2f} node-hours"]
    if found.limit_s:
        parts.append(f"at most {spec.allocated * found.limit_s / 3600:.2f}" + ("" if parts else " node-hours"))
    return ", ".join(parts) or "without a time limit"


@contextmanager
def submitted(spec: PlacedRun, secrets: Mapping[str, str], after: str = "") -> Iterator[tuple[Run, str]]:
    """The run, submitted, and the number of its job: step by step, for every command. Ctrl-C waits for the block's end,
    which says so.

    Afterwards directory and job exist or, when refused, neither. `after`: the job that this one waits for.
    """
    control.forget_secrets_in(Path(spec.job.runs_dir))
    with control.signals_deferred():
        with making(spec, secrets, time.time()) as (directory, lock_fd):
            write_data(spec, directory)
            write_json(directory / "plan.json", prediction(spec))
        run = Run(Path(spec.run_dir))
        job_id = control.submit(run, lock_fd, after)
        yield run, job_id


def start(spec: PlacedRun, secrets: Mapping[str, str], as_json: bool) -> Run:
    """Submits the run, and says where it is."""
    with submitted(spec, secrets) as (run, job_id):
        if as_json:
            job = {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
            print_json(job, indent=None)
        else:
            where = "process" if spec.job.scheduler == "local" else "Slurm job"
            echo(f"{run.name}: {where} {job_id}, {describe_run(spec)}")
            echo(f"  follow it:  {quoted('launcher', 'watch', run.reference)}")
    return run


def start_with_retries(
    asked: RunSpec, run: Run, secrets: Mapping[str, str], retries: int, force: bool, as_json: bool
) -> None:
    """`submit --retry-bad-nodes`: follows the run; where nodes fail their check, submits `asked` again without them, at
    most `retries` times. Exits with the last run's status.
    """
    first, without = run.name[:NAME_CHARS], set[str]()
    for number in range(1, retries + 2):
        last = number > retries
        state, left_out = watch_to_end(run, as_json, "" if last else "; it is not retried then")
        if not state.unfit or last:
            break
        if not left_out:
            _say_of(run, "not retried: there is no node to leave out", as_json)
            break
        hosts = {node.host for node in left_out}
        name = f"{first}-retry{number}"
        _say_of(run, f"retry {number} of {retries} without {', '.join(sorted(hosts))}: {name}", as_json)
        without |= hosts
        detected.cache_clear()
        exclude = compress(sorted({*expand(asked.job.exclude), *without}))
        spec = replace(asked, job=replace(asked.job, exclude=exclude))
        spec = resolve.renamed(spec, name, f"retry {number} of {first}")
        try:
            if named := sorted(hosts.intersection(expand(asked.job.nodelist))):
                fix = "leave it out of --nodelist; launcher cluster nodes"
                raise LauncherError("node-left-out", f"--nodelist asks for {named[0]}", fix)
            placed_run, findings = looked_at(spec, force)
            tell(findings, force)
            say_where(findings)
            run = start(placed_run, secrets, as_json)
        except LauncherError as error:
            what = f"not retried: {error.what}"
            if as_json:
                _say_of(run, what, as_json)
            print_error(LauncherError(error.code, f"{run.name}: {what}", error.fix, original=error.original))
            break
    exit_for(state)


def _say_of(run: Run, text: str, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.name, "retry": text}, indent=None)
    else:
        echo(f"{run.name}: {text}", err=True)
