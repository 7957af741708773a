"""From a run that was asked for to one that is submitted: the checks of the cluster, the submission, the retries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from launcher.base.errors import LauncherError, quoted
from launcher.base.finding import ERROR, WARNING
from launcher.base.output import echo, print_json, warn
from launcher.commands import retry
from launcher.commands.asked import describe_run, looked_at, spec_of
from launcher.config import resolve
from launcher.config.options import RunOptions
from launcher.config.spec import PlacedRun, RunSpec
from launcher.plan.plan import memory_findings, write_beside
from launcher.preflight.cluster import look
from launcher.preflight.text import refusal, sentence, words
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.detect import detected
from launcher.scheduler.parse import compress, expand


def checked(spec: PlacedRun, force: bool) -> PlacedRun:
    """The run as the cluster can place it. Warns, and raises LauncherError where the run could not start."""
    spec, findings = look(spec)
    findings += memory_findings(spec)
    refused = refusal(findings, force)
    for finding in findings:
        name, what, _ = words(finding)
        if finding.status == WARNING or (finding.status == ERROR and not refused):
            warn(sentence(finding))
        elif name in ("placement", "excluded") and not refused:
            echo(f"{name}: {what}", err=True)
    if refused:
        raise refused
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
    """Follows the run, and where nodes fail their check submits `asked` again without them, at most `retries` times."""

    unfit: set[str] = set()

    def again(name: str, origin: str, without: set[str]) -> Run:
        if named := sorted(without.intersection(expand(asked.job.nodelist))):
            raise LauncherError(
                "node-left-out", f"--nodelist asks for {named[0]}", "leave it out of --nodelist; launcher cluster nodes"
            )
        unfit.update(without)
        detected.cache_clear()
        exclude = compress(sorted({*expand(asked.job.exclude), *unfit}))
        spec = replace(asked, job=replace(asked.job, exclude=exclude))
        return start(checked(looked_at(resolve.renamed(spec, name, origin), force), force), secrets, as_json)

    retry.follow(run, retries, again, as_json)
