"""Options of sbatch that the launcher has none for: `--sbatch OPTION[=VALUE]`, and in a file `sbatch = [...]`. Pure.

OPTION=VALUE adds a line to the script or replaces the launcher's own, OPTION alone is a flag, OPTION= removes the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launcher.base.values import guessed

OPTION_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]+")
LONGEST = 1000  # of a value; sbatch reads a line into 8 KiB
# The launcher's own options that are sbatch's, word for word: fields of Job.
PLACEMENT = ("partition", "account", "qos", "reservation", "nodelist", "constraint")
# What the launcher reports, checks or relies on: by its own options, ...
OWN = {
    **{name: f"--{name}" for name in (*PLACEMENT, "exclude", "segment", "nodes", "time")},
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"), "--gpus-per-node"),
    **dict.fromkeys(("export", "export-file", "get-user-env"), "--env NAME=VALUE"),
    "job-name": "--name",
    "nodefile": "--nodelist",
    "gres": "--gpus-per-node N; the resource's name: --set profile.gres=NAME",
    "clusters": "SLURM_CLUSTERS=NAME in your environment",
}
# ... and by none. With the last rows sbatch would do something else than submit the script and say its number.
FIXED = (
    *("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "tasks-per-node"),
    *("output", "error", "input", "open-mode", "requeue", "no-requeue", "array", "container", "container-id"),
    *("help", "usage", "version", "parsable", "quiet", "verbose", "test-only", "wait", "wrap", "uid", "gid"),
)
# sbatch's other options, of 22.05 to 25.11. It takes the beginning of one for the whole: other lines than we think
# would be replaced.
FREE = (
    *("acctg-freq", "batch", "bb", "bbf", "begin", "chdir", "cluster-constraint", "comment", "consolidate-segments"),
    *("contiguous", "core-spec", "cores-per-socket", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline"),
    *("delay-boot", "dependency", "distribution", "exclusive", "extra", "extra-node-info", "gpu-bind", "gpu-freq"),
    *("gres-flags", "hint", "hold", "ignore-pbs", "kill-on-invalid-dep", "licenses", "mail-type", "mail-user"),
    *("mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "no-kill"),
    *("oom-kill-step", "overcommit", "oversubscribe", "power", "prefer", "priority", "profile", "propagate", "reboot"),
    *("resv-ports", "signal", "sockets-per-node", "spread-job", "stepmgr", "switches", "thread-spec"),
    *("threads-per-core", "time-min", "tmp", "tres-bind", "tres-per-task", "use-min-nodes", "wait-all-nodes", "wckey"),
)
REMOVABLE = ("mem", "exclusive")  # the lines of the script that it works without


def split(item: str) -> tuple[str, str | None]:
    """Name and value; None for a flag. `--name=value`, as in a script, is the same."""
    name, equals, value = item.partition("=")
    return name.removeprefix("--"), value if equals else None


def merged(lower: Sequence[str], upper: Sequence[str]) -> tuple[str, ...]:
    """Both, option by option: where both have one, that of `upper`; OPTION= takes one of `lower` back."""
    below, above = dict(map(split, lower)), dict(map(split, upper))
    gone = {name for name, value in above.items() if value == "" and name in below and name not in REMOVABLE}
    found = {name: value for name, value in (below | above).items() if name not in gone}
    return tuple(name if value is None else f"{name}={value}" for name, value in found.items())


def problem(item: str) -> tuple[str, str]:
    """Why `item` cannot be given to sbatch, and what to type instead; ("", "") when it can."""
    name, value = split(item)
    if not OPTION_NAME.fullmatch(name):
        return "not a long option of sbatch's", "--sbatch licenses=ansys:1, --sbatch contiguous, --sbatch mem="
    options = (*OWN, *FIXED, *FREE)
    meant = [name] if name in options else [full for full in options if full.startswith(name)]
    if meant and all(full in OWN or full in FIXED for full in meant):
        return f"the launcher sets sbatch's --{meant[0]} itself", OWN.get(meant[0], "")
    if name.startswith(("container-", "no-container-")):
        return "the container is started by the script, on every node", "--image, --mount, --env"
    if meant and name not in meant:
        ends = "" if value is None else f"={value}"
        return "the beginning of " + ", ".join(f"--{full}" for full in meant), f"--sbatch {meant[0]}{ends}"
    if value == "" and name not in REMOVABLE:
        near = guessed(name, REMOVABLE) or REMOVABLE
        return "the script has no such line to remove", " or ".join(f"--sbatch {full}=" for full in near)
    if value and (len(value) > LONGEST or not value.isprintable()):
        return f"the value holds a control character, or more than {LONGEST} characters", ""
    return "", ""


def lines(ours: Mapping[str, str | None], asked: Sequence[str]) -> list[str]:
    """The options of the script, as they stand behind #SBATCH: `ours`, changed by what is `asked`."""
    given = dict(map(split, asked))
    kept = dict(ours)
    if given.get("mem-per-cpu") or given.get("mem-per-gpu"):
        kept.pop("mem", None)  # sbatch takes one of the three
    return [_line(name, value) for name, value in (kept | given).items() if value != ""]


def _line(name: str, value: str | None) -> str:
    """Quoted by sbatch's own rules, which are not the shell's: a backslash counts in every quote."""
    if value is None:
        return f"--{name}"
    if re.search(r"[\s'\"\\#]", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"--{name}={value}"
