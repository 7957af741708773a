"""`version`: what this launcher is made of."""

from __future__ import annotations

import platform
from importlib import metadata

import click

import launcher
from launcher.base.output import as_json, echo, print_json


@click.command()
@as_json
def version(as_json: bool) -> None:
    """Print the versions of the launcher and of what it uses."""
    found = {"launcher": launcher.version(), "python": platform.python_version()}
    for package in ("click", "jinja2", "huggingface_hub", "rich", "torch", "torchtitan"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if as_json:
        print_json(found)
    else:
        echo(*(f"{name} {number}" for name, number in found.items()))
