"""From options and files to a RunSpec: layers are merged, and what only this machine or Slurm knows is filled in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.config.layers import Layer, find, layer_of, merge, names_of, read_layer
from launcher.config.spec import CONTROL, SAMPLE, PlacedRun, RunSpec, validate
from launcher.config.user_file import runs_dir, user_layer
from launcher.scheduler import slurm

# Defaults that Slurm's own commands take from the environment; the script says them instead.
ENVIRONMENT = {f"SBATCH_{k.upper()}": f"job.{k}" for k in ("account", "constraint", "partition", "qos", "reservation")}

# In a file: not of this machine.
OF_CLUSTER = tuple(f"job.{k}" for k in ("gpu", "image", "nodes", "python", "runtime", "partition", "account"))
OF_DATA = ("job.data", "job.tokenizer")


def resolve(
    options: Layer,
    config: Path | None,
    run_file: Path | None,
    environ: Mapping[str, str],
    image_needed: bool = True,
) -> RunSpec:
    """Merges every layer, fills in what only this machine knows, and validates.

    `run_file` is a run.toml to repeat: it stands for defaults, profile, recipe and user file together. Without
    `image_needed`, `job.image` may be missing, and is "" then.
    """
    user = user_layer(config, environ) if run_file is None else _repeated(run_file, options)
    is_local = {**user.values, **options.values}.get("job.scheduler") == "local"
    if is_local and not user.complete:
        user = _without(user, OF_CLUSTER)
    slurms = layer_of(
        {key: (environ[name], f"environment {name}") for name, key in ENVIRONMENT.items() if environ.get(name)}
    )
    chosen = {**slurms.values, **user.values, **options.values}
    if user.complete:
        layers = [user, options]
    else:
        gpu, gpu_origin = _chosen_gpu(chosen, options, user)
        recipe = str(chosen.get("job.recipe", "llama3-8b"))
        profile = read_layer(find("profiles", gpu), f"profile {gpu}")
        kind = str(profile.values.get("profile.gpu", gpu)).lower()
        of_recipe = read_layer(find("recipes", recipe), f"recipe {recipe}", kind)
        user = _without(user_layer(config, environ, kind), OF_CLUSTER if is_local else ())
        if config is None and "job.data" in of_recipe.values:
            user = _without(user, OF_DATA)  # where C4 is, for all runs, does not take the debug recipe's sample away
        layers = [_machine(chosen, gpu, gpu_origin), profile, of_recipe, slurms, user, options]
        if is_local:
            layers.insert(0, layer_of({"job.runtime": ("bare", "default with --local")}))
    spec = merge(layers)
    folder, name = os.path.split(spec.job.image)
    staged = os.path.join(spec.job.image_dir, name)
    if os.path.isfile(staged) and not os.path.lexists(spec.job.image) and folder == os.getcwd():
        layers.append(layer_of({"job.image": (staged, f"job.image_dir, from {spec.origin['job.image_dir']}")}))
    if spec.job.data == SAMPLE and spec.origin["job.tokenizer"] == "default":
        layers.append(layer_of({"job.tokenizer": (SAMPLE, f"job.data, from {spec.origin['job.data']}")}))
    if not spec.job.name:
        layers.append(layer_of({"job.name": (_free_name(spec), "default, from recipe, profile and time")}))
    if not (image_needed or spec.job.image or spec.job.runtime == "bare"):
        layers.append(layer_of({"job.image": ("", "missing: --image FILE")}))
    spec = merge(layers)
    validate(spec, image_needed)
    return spec


def renamed(spec: RunSpec, name: str, origin: str) -> RunSpec:
    """The same run under another name, with what follows from its name. Raises LauncherError for no valid name."""
    origins = {**spec.origin, "job.name": origin}
    spec = replace(spec, job=replace(spec.job, name=name), origin=origins)
    validate(spec)
    return spec


def placed(spec: RunSpec) -> PlacedRun:
    """The run with what this machine's file system decides: where the links lead that the container cannot follow."""
    paths = (spec.data_path, spec.tokenizer_path, spec.job.init_from, spec.job.checkpoint_dir)
    sources = {path: os.path.realpath(path) for path in paths if path.startswith("/")}
    return PlacedRun(**vars(spec), sources=sources, segment=spec.job.segment)


def secrets_of(spec: RunSpec, options: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Values of the secret variables, from --env NAME=VALUE or the environment; never written into the spec."""
    missing = [name for name in spec.secret_env if name not in options and name not in environ]
    if missing:
        what = f"--env {missing[0]}: no such variable in your environment"
        raise LauncherError("env-not-set", what, f"export {quoted(missing[0])}=..., then again")
    values = {name: options.get(name, environ.get(name, "")) for name in spec.secret_env}
    for name, value in values.items():
        if CONTROL.search(value):
            raise LauncherError("env-value", f"--env {name}: its value holds a newline or another control character")
    return values


def _without(layer: Layer, keys: tuple[str, ...]) -> Layer:
    return Layer({k: v for k, v in layer.values.items() if k not in keys}, layer.origin, secret_env=layer.secret_env)


def ignored(environ: Mapping[str, str]) -> list[str]:
    """Variables by which sbatch would take options, and which no run follows."""
    followed = (*ENVIRONMENT, "SBATCH_CLUSTERS")
    return sorted(name for name in environ if name.startswith("SBATCH_") and environ[name] and name not in followed)


def _repeated(run_file: Path, options: Layer) -> Layer:
    named = Path(options.values.get("job.runs_dir") or runs_dir(), run_file)  # a run's name, as `watch` takes it
    if run_file.name == str(run_file) and os.path.isfile(named / "run.toml"):
        run_file = named
    run_file = run_file / "run.toml" if os.path.isdir(run_file) else run_file
    layer = read_layer(run_file, f"file {run_file}")
    if not layer.complete:
        fix = quoted("launcher", "submit", "--config", run_file)
        raise LauncherError("not-a-run-file", f"{run_file}: not a run.toml", fix)
    for key, option in (("job.gpu", "--gpu"), ("job.recipe", "--recipe")):
        if key in options.values:
            what = f"{option} with {run_file}: that file already holds every value of its profile and recipe"
            fix = f"leave out {option}, or start from the recipe: launcher submit --recipe ..."
            raise LauncherError("run-file-decides", what, fix)
    kept = {k: v for k, v in layer.values.items() if k not in ("job.name", "job.runs_dir", "job.slurm_bin")}
    kept |= {"job.runs_dir": os.path.abspath(runs_dir()), "job.slurm_bin": slurm.bin_dir() or "/usr/bin"}
    return Layer(kept, {k: layer.origin.get(k, "detected") for k in kept}, True, layer.secret_env)


def _chosen_gpu(chosen: Mapping[str, object], options: Layer, user: Layer) -> tuple[str, str]:
    if gpu := str(chosen.get("job.gpu", "")):
        return gpu, options.origin.get("job.gpu", user.origin.get("job.gpu", ""))
    if chosen.get("job.scheduler") == "local":
        return _local_gpu()
    return _cluster_gpu(str(chosen.get("job.partition", "")))


def _machine(chosen: Mapping[str, object], gpu: str, gpu_origin: str) -> Layer:
    """What follows from where this runs: absolute runs_dir, the local scheduler's Python, Slurm's folder."""
    found = {"job.gpu": (gpu, gpu_origin), "job.runs_dir": (os.path.abspath("runs"), "default")}
    if chosen.get("job.scheduler") == "local":
        if chosen.get("job.runtime") != "apptainer":
            found["job.python"] = (sys.executable, "the launcher's own Python")
    elif folder := slurm.bin_dir():
        found["job.slurm_bin"] = (folder, "detected: which sbatch")
    return layer_of(found)


def _free_name(spec: RunSpec) -> str:
    recipe, gpu = (re.sub(r"[^A-Za-z0-9._-]", "-", Path(n).stem) for n in (spec.job.recipe, spec.job.gpu))
    base = f"{recipe}-{gpu}-{spec.job.nodes}n"[:40].lstrip("._-") + f"-{datetime.now():%Y%m%d-%H%M%S}"
    names = [base, *(f"{base}-{n}" for n in range(2, 100))]
    return next((name for name in names if not os.path.lexists(f"{spec.job.runs_dir}/{name}")), base)


def _local_gpu() -> tuple[str, str]:
    """The profile of this machine's GPUs as nvidia-smi names them; "cpu" where there are none."""
    from launcher.config.propose import named

    command, out = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], ""
    with suppress(OSError, subprocess.TimeoutExpired):
        out = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    if not lines:
        return "cpu", "detected: no GPU on this machine"
    if found := named(lines[:1]):
        return found[0], f"detected: {lines[0]}"
    raise _which_gpu(f"this machine has {lines[0]}, and no profile is called that")


def _cluster_gpu(partition: str) -> tuple[str, str]:
    """The profile of a partition's nodes, where something names it, something else agrees and nothing contradicts it.

    Otherwise the user is asked.
    """
    # Here, for a dry run that names its GPU.
    from launcher.config.propose import propose
    from launcher.scheduler.detect import detected

    try:
        nodes = detected().require(partition).nodes_of(partition)
    except LauncherError as error:
        if error.status is not ExitStatus.CLUSTER:
            raise
        what = f"the nodes' GPU cannot be detected: {error.what}"
        raise _which_gpu(what, error, ExitStatus.CLUSTER) from error
    proposal = propose(nodes)
    where = f"partition {partition}" if partition else "the default partition"
    seen = ", ".join(evidence.what for evidence in proposal.evidence)
    if proposal.profile and not proposal.contradictions:
        return proposal.profile, f"detected: {where}: {seen}"
    why = "; ".join(proposal.contradictions) or "none of this names one profile for sure"
    raise _which_gpu(f"{where} does not say clearly which GPU it has ({seen or 'no GPUs'}): {why}")


def _which_gpu(what: str, why: LauncherError | None = None, status: ExitStatus = ExitStatus.NOT_FOUND) -> LauncherError:
    fix = f"say it: --gpu {'|'.join(names_of('profiles'))}"
    if why and why.code == "slurm-missing":
        fix += "; or train on this machine, without Slurm: --local"
    return LauncherError("gpu-unknown", what, fix, status=status, original=why.original if why else "")
