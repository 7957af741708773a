"""What the options ask for, and what of it can be seen on this machine: for every command that takes a run's
options.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from launcher.base.finding import ERROR, WARNING, Finding
from launcher.base.output import size, warn
from launcher.config import resolve
from launcher.config.options import RunOptions
from launcher.config.spec import PlacedRun, RunSpec
from launcher.preflight.here import ABSENT, NO_ROOM, look_here
from launcher.preflight.text import refusal, sentence


def spec_of(options: RunOptions, image_needed: bool = True) -> RunSpec:
    """The run that the options ask for. Without `image_needed`, `job.image` may be missing, and is "" then."""
    return resolve.resolve(options, options.config, options.run_file, os.environ, image_needed)


def secrets_of(spec: RunSpec, options: RunOptions) -> dict[str, str]:
    return resolve.secrets_of(spec, options.secrets, os.environ)


def looked_at(asked: RunSpec, force: bool | None, ask_slurm: bool = True) -> tuple[PlacedRun, list[Finding]]:
    """The run as it would be submitted, and all that is found on the way: step by step, for every command.

    Without `ask_slurm`, what the cluster would add is not in it; nor where this machine alone shows that the run would
    be refused with `force`: a silent Slurm keeps nobody waiting for that. None looks at all of it.
    """
    run = resolve.placed(asked)
    run, findings = look_here(run)
    if not ask_slurm:  # nothing is queued, and what is absent may come until then
        findings = [replace(one, status=WARNING) if one.code in (ABSENT, NO_ROOM) else one for one in findings]
    if ask_slurm and (force is None or not refusal(findings, force)):
        # Here, so that a dry run answers in half the time.
        from launcher.plan.plan import memory_findings
        from launcher.preflight.cluster import look

        run, of_cluster = look(run)
        findings += [*of_cluster, *memory_findings(run)]
    return run, findings


def tell(findings: Sequence[Finding], force: bool) -> None:
    """Warns of what was found, once of each, and raises LauncherError where the run could not start."""
    refused = refusal(findings, force)
    bad = [one for one in findings if one.status == WARNING or (one.status == ERROR and not refused)]
    for text in dict.fromkeys(map(sentence, bad)):
        warn(text)
    if refused:
        raise refused


def describe_run(spec: RunSpec) -> str:
    profile = spec.profile
    return f"{spec.job.recipe} on {size(spec.job.nodes, profile.gpus_per_node, profile.gpu, profile.device == 'cpu')}"
