"""The commands `launcher cluster nodes ...`: which nodes are left out of what is submitted, and why."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import click

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import as_json, clock, columns, echo, plain, print_json, warn
from launcher.nodes import hardware
from launcher.nodes.bad_nodes import DAY_S, HOST, BadNode, added, change, of_cluster
from launcher.runs.directory import Run
from launcher.scheduler.detect import detect
from launcher.scheduler.parse import expand
from launcher.scheduler.slurm import cluster_name


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def nodes(context: click.Context, as_json: bool) -> None:
    """List the nodes that failed their check.

    New runs do without them until their time is over.

    `submit` and `status` add a node by themselves, for 7 days, if the fault was its own.

    \b
    launcher cluster nodes                                        which, why, and until when
    launcher cluster nodes add gpu-007 --reason "slow NVLink"     leave one out
    launcher cluster nodes release gpu-007                        it is repaired
    """
    if context.invoked_subcommand:
        return

    cluster = cluster_name()
    found = of_cluster(cluster, time.time())
    if as_json:
        print_json({"cluster": cluster, "nodes": [asdict(node) for node in found]})
    elif not found:
        echo(f"{cluster}: no node is left out", err=True)
    else:
        rows = [(node.host, clock(node.at), clock(node.until), node.reason, node.run) for node in found]
        rows.insert(0, ("node", "since", "until", "reason", "run"))
        echo(*columns(rows))
        for node in found:
            faults = [one for one in hardware.of_run(Run(Path(node.run))) if one.host == node.host] if node.run else []
            for fault in faults or [hardware.SendBack(node.host, node.reason, "isolate")]:
                echo("", *map(plain, fault.lines()))


@nodes.command()
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option("--reason", required=True, metavar="TEXT", help="Reason, which the list shows.")
@click.option("--days", type=click.IntRange(1, 365), default=7, show_default=True, help="How long.")
@as_json
def add(hosts: tuple[str, ...], reason: str, days: int, as_json: bool) -> None:
    """Leave nodes out of new runs. HOST may be a Slurm host list.

    \b
    launcher cluster nodes add gpu-007 --reason "slow NVLink"
    launcher cluster nodes add 'gpu-[010-012]' --reason "rack 3 is too warm" --days 1
    """
    known, cluster, now_s = {node.name for node in detect().require("").nodes}, cluster_name(), time.time()
    names, text = _names(hosts), " ".join(reason.split())
    if not text:
        raise click.UsageError("--reason: must not be empty")
    if unknown := [name for name in names if name not in known]:
        warn(f"Slurm has no node {unknown[0]}: it will be left out if it appears")
    new = [BadNode(name, text, "", now_s, now_s + days * DAY_S) for name in names]
    # What was known of these nodes goes.
    change(cluster, lambda old: added([*(node for node in old if node.host not in names), *new], (), now_s))
    _say(new, f"left out until {clock(new[0].until)}", cluster, as_json)


@nodes.command()
@click.argument("hosts", nargs=-1, metavar="[HOST...]")
@click.option("--all", "everything", is_flag=True, help="Release all of them.")
@as_json
def release(hosts: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Use nodes again. Only a new failure puts them back. HOST may be a Slurm host list.

    \b
    launcher cluster nodes release gpu-007
    launcher cluster nodes release --all
    """
    if bool(hosts) == everything:
        raise click.UsageError("either hosts or --all")
    cluster, now_s = cluster_name(), time.time()
    listed = of_cluster(cluster, now_s)
    names = [node.host for node in listed] if everything else _names(hosts)
    if unknown := [name for name in names if name not in {node.host for node in listed}]:
        what = f"{unknown[0]} is not left out on {cluster}"
        raise LauncherError("node-not-left-out", what, "launcher cluster nodes", status=ExitStatus.NOT_FOUND)
    change(cluster, lambda old: [replace(n, released=now_s) if n.host in names else n for n in old])
    _say([node for node in listed if node.host in names], "used again", cluster, as_json)


def _names(hosts: tuple[str, ...]) -> list[str]:
    """The hosts of several host lists. Raises LauncherError for what is none."""
    names = [name for text in hosts for name in expand(text) or (text,)]
    if wrong := [name for name in names if not HOST.fullmatch(name)]:
        raise LauncherError("node-name", f"{wrong[0][:80]!r}: not a node's name", "list them: sinfo -N -h -o %N")
    return list(dict.fromkeys(names))


def _say(found: list[BadNode], what: str, cluster: str, as_json: bool) -> None:
    if as_json:
        print_json({"cluster": cluster, "nodes": [node.host for node in found]})
        return
    for node in found:
        echo(f"{node.host}: {what}")
    if not found:
        echo(f"{cluster}: no node is left out", err=True)
