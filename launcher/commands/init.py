"""`init`: looks at the cluster once, and writes what it is into the user's file of defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.output import as_json, columns, confirm, echo, is_terminal, print_json, warn
from launcher.config.hardware import hardware
from launcher.config.layers import Layer, absolute, find, merge, read_layer
from launcher.config.options import FilePath
from launcher.config.spec import validate
from launcher.config.user_file import default_path
from launcher.config.write import save
from launcher.preflight.site import ABOUT, choices
from launcher.scheduler.detect import detect
from launcher.scheduler.facts import ClusterFacts


@click.command()
@click.option("--gpu", metavar="PROFILE", help="GPU profile, or a TOML file of your own.")
@click.option("--partition", "-p", help="Slurm partition.")
@click.option("--account", "-A", help="Slurm account.")
@click.option("--runs-dir", metavar="DIR", help="Where runs are created and looked for; every node must see it.")
@click.option("--data", metavar="DIR", help="Directory with C4, or 'sample' for generated text.")
@click.option("--tokenizer", metavar="DIR", help="Directory with tokenizer.json.")
@click.option("--image-dir", metavar="DIR", help="Where images are staged, and where --image NAME is looked for.")
@click.option(
    "--config",
    "-c",
    type=FilePath(path_type=Path),
    metavar="FILE",
    envvar="LAUNCHER_CONFIG",
    show_envvar=True,
    help="File to write.  [default: ~/.config/titan-launcher/config.toml]",
)
@click.option("--show", is_flag=True, help="Print what the file says, and change nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@as_json
def init(config: Path | None, show: bool, yes: bool, as_json: bool, **options: str | None) -> None:
    """Set up your defaults for this cluster.

    Finds the GPU type, the partition, your account, and the directories for runs, data, tokenizer and images. Shows
    what it found and why, asks once, and saves it in your settings file. Options that you give are saved, too. Other
    settings in the file stay as they are.

    \b
    launcher init
    launcher init --partition batch --runs-dir /data/$USER/runs --yes
    launcher init --show
    """
    path = config or default_path()
    saved = read_layer(path, f"file {path}") if os.path.lexists(path) else Layer({}, {})
    if show:
        return _show(path, saved, as_json)
    given = {key: (str(value), "your file") for key in ABOUT if (value := saved.values.get(f"job.{key}"))}
    for key, value in options.items():
        if value == "":
            raise click.UsageError(f"--{key.replace('_', '-')}: empty; to remove it, delete its line in {path}")
        if value is not None:
            given[key] = str(absolute(f"job.{key}", value, Path.cwd())), f"option --{key.replace('_', '-')}"
    if "gpu" in given:
        read_layer(find("profiles", given["gpu"][0], "launcher init --gpu"), "")
    found, proposal = choices(_facts(given), given)
    if not found[0].value:
        why = "; ".join(found[0].against) or "nothing names the GPU"
        fix = f"say which: launcher init --gpu {'|'.join(proposal.candidates or hardware())}"
        raise LauncherError("gpu-unknown", f"no GPU profile is certain: {why}", fix, status=ExitStatus.NOT_FOUND)
    for text in (text for choice in found for text in choice.against):
        warn(text)
    new = {c.key: c.value for c in found if c.value and c.value != saved.values.get(f"job.{c.key}")}
    values = {"job.name": "x", "job.image": "/x.sqsh", "job.runs_dir": "/runs"}
    values |= {f"job.{key}": value for key, value in new.items()}
    validate(merge([Layer(values, {key: f"launcher init --{key[4:].replace('_', '-')}" for key in values})]))
    if not as_json:
        rows = [(c.key, c.value or "-", c.evidence) for c in found]
        echo(f"For {path}:", *(f"  {line}" for line in columns(rows)))
    if not yes:
        if as_json or not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
            raise click.UsageError(f"no terminal to ask on; try {quoted('launcher', *sys.argv[1:], '--yes')}")
        confirm(f"Write it to {path}?", otherwise="nothing was written")
    save(path, new, ABOUT)
    if as_json:
        print_json({"file": str(path), "job": new, "choices": [asdict(choice) for choice in found]})
    else:
        echo(f"{path}: {'written' if new else 'nothing to change'}")
        echo("to go on:  launcher submit --image titan.sqsh --nodes 2 --data sample", err=True)


def _facts(given: Mapping[str, tuple[str, str]]) -> ClusterFacts:
    """What Slurm says of the cluster; nothing where it is silent and the GPU is known without it."""
    try:
        return detect().require(given.get("partition", ("", ""))[0])
    except LauncherError as error:
        if "gpu" not in given or error.status is not ExitStatus.CLUSTER:
            raise
        warn(f"not compared with the nodes: {error.what}")
        return ClusterFacts()


def _show(path: Path, saved: Layer, as_json: bool) -> None:
    # Its own keys alone: others of the file may be secrets.
    rows = {key: (saved.values.get(key, ""), saved.origin.get(key, "not set")) for key in (f"job.{k}" for k in ABOUT)}
    if as_json:
        values = {key: {"value": value, "origin": origin} for key, (value, origin) in rows.items()}
        return print_json({"file": str(path), "exists": os.path.exists(path), "values": values})
    echo(*columns([(key, str(value) or "-", f"({origin})") for key, (value, origin) in rows.items()]))
    echo("every setting and its origin:  launcher config show", err=True)
