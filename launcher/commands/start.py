"""From a run that is placed to one that is submitted, for the first time or again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.base.errors import quoted
from launcher.base.files import write_json
from launcher.base.finding import OK, Finding
from launcher.base.output import confirm, echo, is_terminal, print_json
from launcher.commands.asked import describe_run
from launcher.config.spec import PlacedRun
from launcher.plan.plan import plan, prediction
from launcher.preflight.text import words
from launcher.runs import control
from launcher.runs.directory import Run, making, remaking, restore
from launcher.stage.view import write_data


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


@contextmanager
def resumed(run: Run, spec: PlacedRun, secrets: Mapping[str, str], after: str = "") -> Iterator[tuple[Run, str]]:
    """A run that has ended, submitted as its next attempt, and the number of its job. When refused, it is as before."""
    before = run.submission
    control.check_ended(run)  # since it was last asked, somebody else may have resumed it
    with control.signals_deferred(), remaking(run, before, spec, secrets, time.time()) as lock_fd:
        job_id = control.submit(run, lock_fd, after, undo=restore)
        yield run, job_id


def ask_first(question: Callable[[], str], quiet: bool, err: bool = False) -> None:
    """Asks on a terminal, and ends the program where the answer is no. Predictions in it are made for that alone."""
    if not quiet and is_terminal(sys.stdin) and is_terminal(sys.stderr if err else sys.stdout):
        confirm(question(), err=err)


def say_started(run: Run, spec: PlacedRun, job_id: str, as_json: bool) -> None:
    """Where the run is."""
    if as_json:
        job = {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
        print_json(job, indent=None)
    else:
        where = "process" if spec.job.scheduler == "local" else "Slurm job"
        echo(f"{run.name}: {where} {job_id}, {describe_run(spec)}")
        echo(f"  follow it:  {quoted('launcher', 'watch', run.reference)}")
