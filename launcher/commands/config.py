"""`config`: settings and where they come from."""

from __future__ import annotations

import click

from launcher.base.output import as_json, echo, print_json, style
from launcher.commands.asked import spec_of
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_options


@click.group()
def config() -> None:
    """Show settings and where they come from."""


@config.command("show", cls=RunCommand)
@run_options
@as_json
def config_show(options: RunOptions, as_json: bool) -> None:
    """Print every setting with its value and its origin.

    \b
    launcher config show --gpu b200 --recipe llama3-8b --image titan.sqsh
    """
    spec = spec_of(options, image_needed=False)
    rows = [(key, value, spec.origin.get(key, "default")) for key, value in spec.values().items()]
    if as_json:
        print_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        text = str(list(value) if isinstance(value, tuple) else value if value != "" else '""')
        echo(f"{key:{width}}  {text}  {style(f'({origin})', dim=True)}")
