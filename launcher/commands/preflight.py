"""`preflight`: what can be known before a run queues."""

from __future__ import annotations

import sys

import click

from launcher.base.finding import refusal
from launcher.base.output import as_json, echo, print_json, style
from launcher.commands.asked import describe_run, spec_of
from launcher.config.options import RunOptions, run_options
from launcher.preflight.local_files import look_here
from launcher.preflight.readiness import look

_CHECK_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@run_options
@as_json
def preflight(options: RunOptions, as_json: bool) -> None:
    """Check what can be known before a run queues.

    Nothing is submitted. The same checks come before every `submit`. Exit code 0: nothing stops the run; 3 or 4:
    `submit` would refuse it.

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
        echo(f"{describe_run(spec)}: " + ("submit would refuse it" if refused else "nothing stops it"))
    if refused:
        sys.exit(refused.status)
