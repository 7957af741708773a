"""`preflight`: what can be known before a run queues."""

from __future__ import annotations

import sys

import click

from launcher.base.finding import OK
from launcher.base.output import as_json, echo, print_json, style
from launcher.commands.asked import describe_run, looked_at, spec_of
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_options
from launcher.preflight.text import as_dict, refusal, words

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command(cls=RunCommand)
@run_options
@as_json
def preflight(options: RunOptions, as_json: bool) -> None:
    """Check a run before it queues.

    Submits nothing. `submit` makes the same checks first. Exit code 0: the run can be submitted; 3, 4 or 6: `submit`
    would refuse it.

    \b
    launcher preflight --image titan.sqsh --nodes 9
    """
    spec, findings = looked_at(spec_of(options, image_needed=False), force=None)
    refused = refusal(findings, force=False)
    if as_json:
        rows = [as_dict(finding) for finding in findings]
        print_json({"ok": refused is None, "segment": spec.segment, "checks": rows})
    else:
        for finding in findings:
            name, what, why = words(finding)
            code = "" if finding.status == OK else f" [{finding.code}]"
            echo(f"{style(f'{finding.status:<7}', fg=_COLOURS[finding.status])}  {name}: {what}{code}")
            for text in filter(None, (why, finding.fix and f"try: {finding.fix}")):
                echo(*(f"           {line}" for line in text.splitlines()))
        echo(f"{describe_run(spec)}: " + ("submit would refuse it" if refused else "nothing stops it"))
    if refused:
        sys.exit(refused.status)
