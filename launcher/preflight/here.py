"""What a run needs of this machine: image, weights, data, tokenizer. Asks Slurm nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from launcher.base.errors import LauncherError, install, quoted
from launcher.base.files import data_dir, unreadable
from launcher.base.finding import ERROR, Finding, error, impossible, ok, warning
from launcher.config.hardware import of_gpu
from launcher.config.resolve import ignored
from launcher.config.runtime import host_path
from launcher.config.spec import HUB, S3, SAMPLE, PlacedRun, RunSpec, tables_of
from launcher.image.inspect import inspect, is_too_old, needed_driver, problems
from launcher.image.squashfs_file import ImageFacts
from launcher.preflight.settings import unknown_settings
from launcher.stage import view
from launcher.stage.target import gigabytes
from launcher.titan import Refused
from launcher.titan.checkpoints import folder_of, free_bytes, to_come
from launcher.titan.data import check_tokenizer
from launcher.titan.recipe import NEEDS_CAPABILITY
from launcher.titan.weights import SHAPES
from launcher.titan.weights import check_weights as check

ABSENT, NO_ROOM = "path-absent", "checkpoint-space-short"


def look_here(spec: PlacedRun) -> tuple[PlacedRun, list[Finding]]:
    """The run with its view of the data, and all that can be found without Slurm."""
    found: list[Finding] = []
    more: list[Finding] = []
    if not spec.job.image and spec.job.runtime != "bare":
        found.append(impossible("image-not-named", "--image titan.sqsh (or --runtime bare)"))
    if spec.origin.get("recipe.local_batch_size") == "default":
        fix = "--batch-size N; launcher plan --batch-size N says what fits"
        found.append(warning("batch-size-not-named", fix, recipe=spec.job.recipe, gpu=spec.profile.gpu))
    for name, look_at in (("image", check_image), ("weights", check_weights)):
        try:
            more += look_at(spec)
        except LauncherError as failed:
            found.append(_stopped(name, failed))
        else:
            if name == "image" and spec.job.image:
                found.append(ok("image", path=spec.job.image))
    found += _quantization(spec)
    found += _local(spec) if spec.job.scheduler == "local" else _not_followed()
    found += _checkpoint_space(spec)
    more += files(spec)
    try:
        spec, notes = view.plan(spec)
    except LauncherError as failed:
        found.append(_stopped("data", failed))
    else:
        more += [warning("data-note", said=note) for note in notes]
        unfit = _unfit(spec, "data-unfit", view.check)
        absent = not spec.view and any(one.code == ABSENT for one in more)
        found += unfit if notes or unfit or absent else [ok("data", said=view.describe(spec))]
    return spec, [*found, *_unfit(spec, "tokenizer-unfit", _check_tokenizer), *more]


def _quantization(spec: RunSpec) -> list[Finding]:
    """The image may be able to do it, and the GPU not."""
    quantize = spec.recipe.quantize
    needed = NEEDS_CAPABILITY.get(quantize)
    known = of_gpu(spec.profile.gpu) if needed else None  # seldom: it reads all profiles
    if not known or not needed or tuple(known.compute_capability) >= needed:
        return []
    able = [word for word, least in NEEDS_CAPABILITY.items() if tuple(known.compute_capability) >= least] or ["none"]
    fix = f"--set recipe.quantize={able[-1]}"
    facts = {"needed": "{}.{}".format(*needed), "there": "{}.{}".format(*known.compute_capability)}
    return [error("gpu-quantization", fix, quantize=quantize, gpu=known.gpu, **facts)]


def _checkpoint_space(spec: PlacedRun) -> list[Finding]:
    """A full disk ends the run in the middle of a checkpoint. Quotas show only when writing."""
    shape, shared = SHAPES.get(spec.recipe.flavor), host_path(spec, spec.job.checkpoint_dir)
    count, folder = to_come(vars(spec.recipe), []), Path(host_path(spec, str(folder_of(tables_of(spec)))))
    needed, free = count * shape.checkpoint_bytes if shape else 0, None
    with suppress(OSError):  # submitting says why
        free = free_bytes(folder) if needed and (not shared or os.path.isdir(shared)) else None
    if free is None or free >= needed:
        return []
    facts = {"needed": gigabytes(needed), "there": gigabytes(free), "path": str(folder)}
    fix = f"df -h {quoted(folder.parent)}; a smaller --keep, another --checkpoint-dir, or --checkpoint-every 0"
    return [error(NO_ROOM, fix, count=count, **facts)]


def _not_followed() -> list[Finding]:
    """A user whose shell sets these variables would otherwise wonder where an option has gone."""
    fix = "--sbatch OPTION=VALUE, or the launcher's own option, passes it to sbatch"
    return [warning("sbatch-variables", fix, names=tuple(names))] if (names := ignored(os.environ)) else []


def _unfit(spec: PlacedRun, code: str, look_at: Callable[[PlacedRun], None]) -> list[Finding]:
    """What every node would refuse, as far as it is seen here; the nodes may have something else under that path."""
    try:
        look_at(spec)
    except Refused as refused:
        return [(impossible if spec.job.scheduler == "local" else error)(code, refused.fix, why=refused.why)]
    return []


def _stopped(name: str, failed: LauncherError) -> Finding:
    facts = {"what": failed.what, "why": failed.original}
    return Finding(f"{name}-refused", ERROR, facts, failed.fix, certain=True, error=failed)


def check_image(spec: RunSpec) -> list[Finding]:
    """Refuses an image that no container can start from, or that cannot train on the profile's nodes.

    Returns what could not be looked at, and what else there is to say of it. None is for `preflight` alone.
    """
    path = spec.job.image
    if spec.job.runtime == "bare":
        own, installed = _by_this_python(spec), ""
        from importlib.metadata import PackageNotFoundError, version  # slow to import, for runs on this machine alone

        with suppress(PackageNotFoundError):
            installed = version("torchtitan") if own else ""
        return unknown_settings(spec, installed)
    if not path:
        return unknown_settings(spec, "")
    folder = Path(path).parent
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(folder.glob("*.sqsh"))[:3] if folder.is_dir() else []
        there = f"there is: {', '.join(map(str, near))}" if near else f"ls -l {quoted(folder)}"
        hint = f"{there}; to make one: make image, or launcher image build --help"
        raise LauncherError("image-missing", f"--image {path}: no such file", hint) from None
    except OSError as failed:
        raise unreadable(Path(path), failed, f"ls -ld {quoted(folder)}") from None
    if spec.job.runtime == "apptainer":
        _check_sif(path)
        return unknown_settings(spec, "")
    facts = inspect(Path(path), required=False)
    found = problems(facts, spec.profile.arch, spec.profile.device, "", spec.recipe.quantize)
    if found:
        what = f"--image {path}: {'; '.join(what for what, _ in found)}"
        raise LauncherError("image-unfit", what, found[0][1], original="\n".join(facts.notes))
    of_titan = unknown_settings(spec, facts.versions.get("torchtitan") or "")
    return [*_driver(spec, facts), *of_titan, *(warning("image-note", path=path, said=note) for note in facts.notes)]


def _check_sif(path: str) -> None:
    try:
        with open(path, "rb") as stream:
            head = stream.read(64)
    except OSError as failed:
        raise unreadable(Path(path), failed) from None
    if b"SIF_MAGIC" not in head:
        what = f"--image {path}: not an Apptainer image (SIF)"
        raise LauncherError("not-sif", what, "--runtime pyxis for a squashfs file")


def _driver(spec: RunSpec, facts: ImageFacts) -> list[Finding]:
    """CUDA needs a driver of its time; with NVIDIA's forward compatibility, an older one may do."""
    needed, driver, job = needed_driver(facts), spec.profile.driver, spec.job
    if not needed or spec.profile.device != "cuda":
        return []
    if driver and not is_too_old(driver, facts):
        return [ok("driver", needed=needed, driver=driver)]
    if driver:
        fix = "an image with an older CUDA, or a newer driver: nvidia-smi on a node"
        return [error("driver-old", fix, needed=needed, driver=driver)]
    where = f" -p {quoted(job.partition)}" if job.partition else ""
    gres = f" --gres={quoted(spec.profile.gres)}:1" if spec.profile.gres else ""
    fix = f"srun -N1{where}{gres} nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    fix += "; then --set profile.driver=VERSION"
    import csv  # seldom needed

    with (data_dir("slurm") / "reference-results.csv").open(encoding="utf-8", newline="") as stream:
        published = [row["driver"] for row in csv.DictReader(stream) if row["gpu"] == spec.profile.gpu]
    # Said with every submission only where such nodes are known with an older one.
    old = [seen for seen in published if is_too_old(seen, facts)]
    return [(warning if old else ok)("driver-unknown", fix, needed=needed, seen=old[0] if old else "")]


def check_weights(spec: PlacedRun) -> list[Finding]:
    """Refuses an --init-from that this machine sees and that the model cannot start from.

    A directory that is not here may still be on the nodes, which check it too: `files` says so.
    """
    path = host_path(spec, spec.job.init_from) if spec.job.init_from else ""
    if not path or not os.path.exists(path):
        return []
    try:
        check(Path(path), spec.recipe.flavor)
    except Refused as refused:
        raise LauncherError("weights", f"--init-from {refused.why}", refused.fix) from None
    try:  # a snapshot in the Hub's cache is all links: the container would see them and nothing behind them
        view.check_links(spec, [f"{spec.job.init_from}/{name}" for name in sorted(os.listdir(path))])
    except Refused as refused:
        fix = f"launcher stage model --to DIR, or {refused.fix}"
        raise LauncherError("link-outside", f"--init-from {refused.why}", fix) from None
    return []


def _check_tokenizer(spec: PlacedRun) -> None:
    """Raises Refused for a tokenizer that is seen here and that the node check will refuse."""
    path = Path(host_path(spec, spec.tokenizer_path))
    if spec.job.tokenizer == SAMPLE or not path.exists():
        return
    check_tokenizer(path)
    view.check_links(spec, [f"{spec.tokenizer_path}/{name}" for name in ("tokenizer.json", "tokenizer_config.json")])


def _absent(spec: RunSpec) -> dict[str, str]:
    """What the run reads and this machine does not see, with what brings it; local data: launcher/stage/view.py."""
    data, weights, c4 = spec.data_path.rstrip("/"), spec.job.init_from, spec.recipe.dataset in view.DATASETS
    data += "/en" if c4 and os.path.isdir(host_path(spec, data)) else ""
    wanted = {
        data if spec.job.scheduler == "slurm" else "": view.two_ways(spec) if c4 else f"ls -ld {quoted(data)}",
        spec.tokenizer_path: f"launcher stage tokenizer --to {quoted(spec.tokenizer_path)}; or --tokenizer sample",
        weights: f"launcher stage model --to {quoted(weights)}",
        spec.job.checkpoint_dir: f"mkdir -p {quoted(spec.job.checkpoint_dir)}",
    }
    seen = (spec.run_dir + "/", *(path for path in wanted if os.path.lexists(host_path(spec, path))))
    return {path: fix for path, fix in wanted.items() if path.startswith("/") and not path.startswith(seen)}


def _by_this_python(spec: RunSpec) -> bool:
    return spec.job.runtime == "bare" and shutil.which(spec.job.python) == shutil.which(sys.executable)


def _local(spec: RunSpec) -> list[Finding]:
    """This machine is the node: what it lacks, the run lacks."""
    found = [impossible("path-absent-here", fix, path=path) for path, fix in _absent(spec).items()]
    own = _by_this_python(spec)
    if lacking := [name for name in ("torch", "torchtitan") if own and find_spec(name) is None]:
        fix = f"{install('train')}; or --python PATH of one that has them"
        found.append(impossible("software-absent", fix, lacking=" and ".join(lacking), python=sys.executable))
    if spec.profile.device == "cuda" and not shutil.which("nvidia-smi"):
        found.append(error("no-nvidia-driver", "--gpu cpu --recipe debug", profile=spec.job.gpu))
    if spec.job.runtime == "bare" and not shutil.which(spec.job.python):
        found.append(warning("python-absent", python=spec.job.python))
    return found


def files(spec: RunSpec) -> list[Finding]:
    """What the job will look for. The nodes may have what this machine lacks: the job's own check decides there."""
    found, given, job = [], (*spec.env, *spec.secret_env), spec.job
    if "LD_PRELOAD" in spec.env and job.runtime != "bare":
        fix = "leave it out: the image brings its own NCCL"
        found.append(warning("preload", fix, value=spec.env["LD_PRELOAD"]))
    if job.data.startswith(S3) and not any(name.startswith("AWS_") for name in given):
        fix = "--env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"
        found.append(warning("s3-no-credentials", fix, data=job.data))
    if job.scheduler != "slurm":
        return found
    if job.data == HUB and "HF_TOKEN" not in given:
        found.append(warning("hub-no-token", "--env HF_TOKEN; better, launcher stage c4 before the job"))
    found += [error(ABSENT, fix, path=path) for path, fix in _absent(spec).items()]
    own = [mount.split(":")[0] for mount in job.mounts]
    for source in dict.fromkeys((*own, *(mount.split(":")[0] for mount in spec.profile.mounts))):
        if job.runtime == "bare" or os.path.exists(source):
            continue
        if source in own:
            found.append(warning("mount-absent", f"ls -ld {quoted(source)}", source=source))
        else:
            fix = f"srun -N1 ls -ld {quoted(source)}; without it: --set 'profile.mounts=[]'"
            found.append(ok("mount-of-profile-absent", fix, source=source, profile=job.gpu))
    return found
