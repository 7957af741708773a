"""From a run that was asked for to one that is submitted: the checks of the cluster, the submission, the retries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from launcher.base.errors import LauncherError, quoted
from launcher.base.finding import OK
from launcher.base.output import echo, print_error, print_json
from launcher.commands.asked import describe_run, looked_at, spec_of, tell
from launcher.commands.runs import exit_for, watch_to_end
from launcher.config import resolve
from launcher.config.options import RunOptions
from launcher.config.spec import PlacedRun, RunSpec
from launcher.plan.plan import memory_findings, write_beside
from launcher.preflight.cluster import look
from launcher.preflight.text import words
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.detect import detected
from launcher.scheduler.parse import compress, expand

NAME_CHARS = 56  # of the first run's name: "-retry9" fits behind it


def checked(spec: PlacedRun, force: bool) -> PlacedRun:
    """The run as the cluster can place it. Warns, and raises LauncherError where the run could not start."""
    spec, findings = look(spec)
    findings += memory_findings(spec)
    tell(findings, force)
    for finding in findings:
        name, what, _ = words(finding)
        if finding.status == OK and name in ("placement", "excluded"):
            echo(f"{name}: {what}", err=True)
    return spec


def prepared(options: RunOptions, force: bool) -> tuple[PlacedRun, dict[str, str]]:
    """A run as `submit` would submit it, and its secrets. Warns, and raises LauncherError where it could not start."""
    spec = spec_of(options)
    secrets = resolve.secrets_of(spec, options.secrets, os.environ)
    return checked(looked_at(spec, force), force), secrets


def start(spec: PlacedRun, secrets: Mapping[str, str], as_json: bool) -> Run:
    """Submits the run, and says where it is."""

    def submitted(run: Run, job_id: str) -> None:
        if as_json:
            job = {"run": run.name, "run_dir": str(run.path), "job_id": job_id, "scheduler": spec.job.scheduler}
            print_json(job, indent=None)
        else:
            where = "process" if spec.job.scheduler == "local" else "Slurm job"
            echo(f"{run.name}: {where} {job_id}, {describe_run(spec)}")
            echo(f"  follow it:  {quoted('launcher', 'watch', run.reference)}")

    return control.submit(spec, secrets, submitted, also=partial(write_beside, spec))


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
            run = start(checked(looked_at(spec, force), force), secrets, as_json)
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
