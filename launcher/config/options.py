"""The options that decide a run, shared by submit, render and `config show`, and what they become."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from launcher.base.errors import LauncherError, quoted
from launcher.base.secret import PUBLIC, looks_secret, masked
from launcher.base.values import parse_toml
from launcher.config.help import RunOption, or_path
from launcher.config.layers import FIELDS, Layer, absolute, layer_of, names_of, unknown_key
from launcher.config.user_file import runs_dir as saved_runs_dir
from launcher.scheduler import slurm


class FilePath(click.Path):
    """A path in which ~ is the home directory, too: no shell expands it in --to=~/x, nor in quotes. Never empty."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        path = os.path.expanduser(value)
        if not str(path).strip() or "\0" in str(path):
            self.fail("the path is empty", parameter, context)
        if str(path).startswith("~"):
            self.fail(f"{path}: no such user's home; ./{path} for a name that begins so", parameter, context)
        return super().convert(path, parameter, context)


# Option -> the key of the spec that it sets: the field of `Job` of the same name, or one of these.
KEYS = {
    **{key.removeprefix("job."): key for key in FIELDS if key.startswith("job.")},
    "gpus_per_node": "profile.gpus_per_node",
    "batch_size": "recipe.local_batch_size",
    "seq_len": "recipe.seq_len",
    "steps": "recipe.steps",
    "checkpoint_every": "recipe.checkpoint_interval",
    "keep": "recipe.checkpoint_keep",
    "mount": "job.mounts",
}
OPTION = {"continues": "continue"}  # names of options that Python's own words forbid
for _without_option in ("scheduler", "mounts", "slurm_bin", "image_dir"):
    del KEYS[_without_option]


@dataclass(frozen=True)
class RunOptions(Layer):
    """The command line of a run: its layer, the files it names, and the values of secret variables."""

    secrets: Mapping[str, str] = field(default_factory=dict)
    config: Path | None = None
    run_file: Path | None = None


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds every option that decides a run; the command receives them as `options: RunOptions`."""

    @wraps(command)
    def with_options(**parameters: Any) -> Any:
        mine = {name: parameters.pop(name) for name in (*KEYS, "env", "settings", "local", "config", "run_file")}
        return command(options=collect(mine), **parameters)

    for decorate in reversed(OPTIONS):
        with_options = decorate(with_options)
    return with_options


def collect(given: Mapping[str, Any]) -> RunOptions:
    """Click's parameters as a layer; what was not given (None, empty) is not in it.

    Raises click.BadParameter for an --env or --set of the wrong form.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        what = "the working directory no longer exists"
        raise LauncherError("working-directory-gone", what, "cd to one that does") from None
    found: dict[str, tuple[Any, str]] = {}
    for name, key in KEYS.items():
        if given[name] == "":
            raise click.BadParameter("must not be empty", param_hint=f"--{name.replace('_', '-')}")
        if given[name] not in (None, ()):
            found[key] = absolute(key, given[name], here), f"option --{OPTION.get(name, name).replace('_', '-')}"
    if given["local"]:
        found["job.scheduler"] = "local", "option --local"
    secrets: dict[str, str | None] = {}  # None: the value is in the environment
    for text in given["env"]:
        name, equals, value = text.partition("=")
        if equals and PUBLIC.fullmatch(name) and not looks_secret(name, value):
            found[f"env.{name}"] = value, "option --env"
        else:
            secrets[name] = value if equals else secrets.get(name)
    for text in given["settings"]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{masked(text)[:80]!r} is not KEY=VALUE", param_hint="--set")
        ours = key.startswith(("recipe.", "profile."))
        if ours and key not in FIELDS:
            raise unknown_key(key, "--set")
        found[key if ours else f"titan.{key}"] = _toml_value(key, value) if ours else value, "option --set"
    layer = layer_of(found)
    return RunOptions(
        layer.values,
        {**layer.origin, **{f"secret_env.{name}": "option --env" for name in secrets}},
        secret_env=tuple(secrets),
        secrets={name: value for name, value in secrets.items() if value is not None},
        config=given["config"],
        run_file=given["run_file"],
    )


def _toml_value(key: str, text: str) -> Any:
    """`3`, `true`, `0.1` and `"x"` as in a TOML file; anything else is a string, and so is 570.1 where one is
    wanted.
    """
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
    return text if FIELDS[key].type == "str" and not isinstance(value, str) else value


def _names(kind: str) -> Callable[..., list[str]]:
    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in names_of(kind) if name.startswith(incomplete)]

    return complete


def _partitions(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    try:
        names = slurm.ask(("sinfo", "--noheader", "--format=%R")).split()
    except LauncherError:
        return []
    return sorted({name for name in names if name.startswith(incomplete)})


def _run_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    try:
        runs = context.params.get("runs_dir") or saved_runs_dir()
        names = (name for name in os.listdir(runs) if name.startswith(incomplete) and name[0] not in ".-")
        return sorted(name for name in names if quoted(name) == name)  # the shell takes it as it is
    except (OSError, LauncherError):
        return []


def run_or_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return or_path([CompletionItem(name) for name in _run_names(context, parameter, incomplete)], incomplete, "file")


def gone(option: str, instead: str, *, is_flag: bool = False) -> Callable[..., Any]:
    """An option of an earlier version: it is no longer shown, and answers with what to use instead (exit code 2)."""

    def refuse(_context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{option} is gone: {instead}")

    return click.option(option, hidden=True, expose_value=False, is_flag=is_flag, callback=refuse)


def runs_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--runs-dir",
        cls=RunOption,
        metavar="DIR",
        type=click.Path(path_type=Path),
        envvar="LAUNCHER_RUNS_DIR",
        default=saved_runs_dir,
        show_default="what launcher init saved, else runs",
        show_envvar=True,
        help="Directory that holds your runs.",
    )(command)


def run_argument(required: bool, several: bool = False) -> Callable[..., Any]:
    if several:
        return click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=_run_names)
    # No default where it is required: click 8.5 takes any, None included, for a value.
    if required:
        return click.argument("run", shell_complete=_run_names)
    return click.argument("run", required=False, default="", shell_complete=_run_names)


_option = partial(click.option, cls=RunOption)

OPTIONS = (
    click.argument(
        "run_file",
        required=False,
        type=click.Path(path_type=Path),
        metavar="[RUN.toml]",
        shell_complete=run_or_file,
    ),
    _option("--image", metavar="FILE", help="Container image: a .sqsh (Pyxis) or .sif (Apptainer) file."),
    _option("--nodes", type=int, help="Number of nodes.  [default: 1]"),
    _option(
        "--gpu",
        metavar="PROFILE",
        shell_complete=_names("profiles"),
        help=f"GPU profile: {', '.join(names_of('profiles'))}, or a TOML file.  [default: detected]",
    ),
    _option("--gpus-per-node", type=int, help="GPUs to use on each node; with the cpu profile, ranks."),
    _option(
        "--recipe",
        metavar="RECIPE",
        shell_complete=_names("recipes"),
        help=f"{', '.join(names_of('recipes'))}, or a TOML file.  [default: llama3-8b]",
    ),
    _option("--batch-size", type=int, help="Local batch size: sequences per GPU and step."),
    _option("--seq-len", type=int, help="Sequence length in tokens."),
    _option("--steps", type=int, help="Training steps.  [default: the recipe's]"),
    _option(
        "--data",
        metavar="DIR",
        help="Data: a directory in C4's layout, 'hub' or s3://bucket/prefix to stream, or 'sample' for generated "
        "text.  [default: /data/c4]",
    ),
    _option(
        "--data-part",
        metavar="I/N",
        help="Read only part I of N of the data. Parts share no file, so runs that continue each other see new data.",
    ),
    _option("--tokenizer", metavar="DIR", help="Directory with tokenizer.json, or 'sample' for a generated one."),
    _option(
        "--init-from",
        metavar="DIR",
        help="Start from the weights in DIR instead of random ones; `launcher stage model` downloads them.",
    ),
    _option("--checkpoint-every", metavar="STEPS", type=int, help="Save a checkpoint every STEPS steps; 0: none."),
    _option("--keep", metavar="N", type=int, help="Keep the newest N checkpoints, at least 2.  [default: 2]"),
    _option("--checkpoint-dir", metavar="DIR", help="Checkpoints go to DIR/NAME.  [default: in the run directory]"),
    _option("--partition", "-p", shell_complete=_partitions, help="Slurm partition."),
    _option("--account", "-A", help="Slurm account."),
    _option("--qos", "-q", help="Slurm QOS."),
    _option("--time", "-t", help="Slurm time limit.  [default: 01:00:00]"),
    _option("--reservation", help="Slurm reservation."),
    _option("--nodelist", "-w", help="Run on these nodes."),
    _option("--exclude", "-x", help="Never run on these nodes."),
    _option(
        "--segment",
        type=int,
        help="Keep groups of this many nodes in one topology block. 0: chosen for you where NVLink spans nodes.",
    ),
    _option("--constraint", "-C", metavar="FEATURES", help="Run only on nodes with these Slurm features."),
    _option(
        "--sbatch",
        multiple=True,
        metavar="OPTION[=VALUE]",
        help="Any other sbatch option; repeatable. OPTION=VALUE adds or replaces a line of the script, OPTION alone "
        "is a flag, and OPTION= removes a line: --sbatch mem= where a site refuses --mem.",
    ),
    _option(
        "--spares",
        type=int,
        metavar="K",
        help="Ask for K extra nodes. The node check chooses which train; when one of those fails, a spare replaces it.",
    ),
    _option(
        "--max-restarts",
        type=int,
        metavar="N",
        help="After a failure, start again from the last checkpoint, at most N times.  "
        "[default: 10 with --checkpoint-every, --spares or --continue, else 0]",
    ),
    _option(
        "--continue",
        "continues",
        type=int,
        metavar="N",
        help="When the time limit ends the run, queue it again from the last checkpoint, at most N times.",
    ),
    _option("--mount", multiple=True, metavar="SRC:DST[:FLAGS]", help="Mount SRC as DST in the container; repeatable."),
    _option(
        "--env",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Environment variable for the job. Its value travels in a file that only you can read and that the job "
        "deletes. Values are recorded only for library switches such as NCCL_*, TORCH* and CUDA_*, and only if they "
        "do not look like secrets.",
    ),
    _option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any torchtitan setting, or a key of the launcher that begins with recipe. or profile.",
    ),
    _option("--name", metavar="NAME", help="Name of the run.  [default: recipe, profile, nodes, time]"),
    _option(
        "--runs-dir",
        metavar="DIR",
        envvar="LAUNCHER_RUNS_DIR",
        show_envvar=True,
        help="Folder for run directories; every node must see it.  [default: what launcher init saved, else runs]",
    ),
    _option("--runtime", type=click.Choice(["pyxis", "apptainer", "bare"]), help="What starts the container, if any."),
    _option("--python", metavar="PATH", help="Python to run, inside the image or with --runtime bare on the node."),
    _option(
        "--check",
        type=click.Choice(["off", "quick", "full"]),
        help="How to check nodes before training; quick: without GPU and network benchmarks.  [default: full]",
    ),
    _option("--local", is_flag=True, help="Run on this machine, without Slurm."),
    _option(
        "--config",
        "-c",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file with your own settings.  [default: ~/.config/titan-launcher/config.toml]",
    ),
)
