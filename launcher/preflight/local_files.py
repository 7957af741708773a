"""What a run needs of the files on this machine. Asks Slurm nothing: `submit --dry-run` imports no more than this."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError, install, quoted
from launcher.base.files import data_dir
from launcher.base.finding import ERROR, OK, WARNING, Check
from launcher.config.runtime import host_path, mounts
from launcher.config.spec import HUB, S3, RunSpec
from launcher.image.inspect import inspect, is_too_old, needed_driver, problems
from launcher.image.squashfs_file import ImageFacts
from launcher.stage import view
from launcher.titan import Refused
from launcher.titan.weights import check_weights as check


def look_here(spec: RunSpec) -> tuple[RunSpec, list[Check]]:
    """What `submit` looks at without Slurm, as checks: image, weights, data, tokenizer."""
    found: list[Check] = []
    of_image: list[Check] = []
    for name, look_at in (("image", check_image), ("weights", check_weights)):
        try:
            of_image += look_at(spec) or []
        except LauncherError as error:
            found.append(_stopped(name, error))
        else:
            if name == "image" and spec.job.image:
                found.append(Check(name, OK, spec.job.image))
    found += _of_a_local_run(spec) if spec.job.scheduler == "local" else []
    notes = warnings(spec)
    try:
        spec, of_the_data = view.plan(spec)
    except LauncherError as error:
        found.append(_stopped("data", error))
    else:
        notes += of_the_data
        if not of_the_data:
            found.append(Check("data", OK, view.describe(spec)))
    return spec, [*found, *of_image, *(Check("files", WARNING, note) for note in notes)]


def _stopped(name: str, error: LauncherError) -> Check:
    return Check(name, ERROR, error.what, error.original, error.fix, certain=True, error=error)


def check_image(spec: RunSpec) -> list[Check]:
    """Refuses an image that no container can start from, or that cannot train on the profile's nodes.

    Returns what could not be looked at, and what else there is to say of it.
    """
    path = spec.job.image
    if spec.job.runtime == "bare":
        return []
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(Path(path).parent.glob("*.sqsh"))[:3] if Path(path).parent.is_dir() else []
        there = f"there is: {', '.join(str(p) for p in near)}" if near else f"ls -l {quoted(Path(path).parent)}"
        hint = f"{there}; to make one: make image, or launcher image build --help"
        raise LauncherError(f"--image {path}: no such file", hint) from None
    except OSError as error:
        raise LauncherError(
            f"--image {path}: {error.strerror}",
            f"ls -ld {quoted(Path(path).parent)}",
            status=ExitStatus.FILESYSTEM,
        ) from None
    if spec.job.runtime == "apptainer":
        _check_sif(path)
        return []

    facts = inspect(Path(path), required=False)
    found = problems(facts, spec.profile.arch, spec.profile.device, driver="")
    if found:
        raise LauncherError(
            f"--image {path}: {'; '.join(what for what, _ in found)}",
            found[0][1],
            original="\n".join(facts.notes),
        )
    notes = [Check("files", WARNING, f"--image {path}: {note}") for note in facts.notes]
    return [*_driver(spec, facts), *notes]


def _driver(spec: RunSpec, facts: ImageFacts) -> list[Check]:
    """CUDA needs a driver of its time; with NVIDIA's forward compatibility, an older one may do."""
    needed, driver = needed_driver(facts), spec.profile.driver
    if not needed or spec.profile.device != "cuda":
        return []
    if not driver:
        where = f" -p {quoted(spec.job.partition)}" if spec.job.partition else ""
        gres = f" --gres={quoted(spec.profile.gres)}:1" if spec.profile.gres else ""
        ask = f"srun -N1{where}{gres} nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        what = f"{needed}; which one the nodes have is not known here"
        old = [seen for seen in _published_drivers(spec.profile.gpu) if is_too_old(seen, facts)]
        # Said with every submission only where such nodes are known with an older one.
        status, why = (WARNING, f"{spec.profile.gpu} clusters have run with {old[0]}") if old else (OK, "")
        return [Check("driver", status, what, why, f"{ask}; then --set profile.driver=VERSION")]
    if not is_too_old(driver, facts):
        return [Check("driver", OK, f"{needed}, the nodes have {driver}")]
    return [
        Check(
            "driver",
            ERROR,
            f"{needed}, the nodes have {driver}",
            "only NVIDIA's forward compatibility (cuda-compat), in the image or on the nodes, makes it run there",
            "an image with an older CUDA, or a newer driver: nvidia-smi on a node",
        )
    ]


def _published_drivers(gpu: str) -> list[str]:
    """The drivers that published runs of this GPU had."""
    with (data_dir("slurm") / "reference-results.csv").open(encoding="utf-8", newline="") as stream:
        return [row["driver"] for row in csv.DictReader(stream) if row["gpu"] == gpu]


def check_weights(spec: RunSpec) -> None:
    """Refuses an --init-from that this machine sees and that the model cannot start from.

    A directory that is not here may still be on the nodes, which check it too: `warnings` says so.
    """
    if not spec.job.init_from:
        return

    path = host_path(spec, spec.job.init_from)
    if not os.path.exists(path):
        return
    try:
        check(Path(path), spec.recipe.flavor)
    except Refused as refused:
        raise LauncherError(f"--init-from {refused.why}", refused.fix) from None
    if spec.job.runtime == "bare":
        return
    # A snapshot in the Hub's cache is all links: the container would see them and nothing behind them.
    seen = [mount.split(":")[1].rstrip("/") for mount in mounts(spec)]
    for name in sorted(os.listdir(path)):
        target = os.path.realpath(f"{path}/{name}")
        if not any(target.startswith(f"{place}/") for place in (os.path.realpath(path), *seen)):
            folder = os.path.dirname(target)
            raise LauncherError(
                f"--init-from {path}/{name}: a link to {target}, which the container does not see",
                f"launcher stage model --to DIR, or {quoted('--mount', f'{folder}:{folder}:ro')}",
            )


def _check_sif(path: str) -> None:
    try:
        with open(path, "rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise LauncherError(f"--image {path}: {error.strerror}", f"ls -ld {quoted(path)}") from None
    if b"SIF_MAGIC" not in head:
        raise LauncherError(f"--image {path}: not an Apptainer image (SIF)", "--runtime pyxis for a squashfs file")


def _missing(spec: RunSpec) -> list[str]:
    """Paths of tokenizer and weights that are not here; for the data see launcher/stage/view.py."""
    paths = (path for path in (spec.tokenizer_path, spec.job.init_from) if path.startswith("/"))
    return [path for path in paths if not path.startswith(spec.run_dir) and not os.path.exists(path)]


def _of_a_local_run(spec: RunSpec) -> list[Check]:
    """This machine is the node: what it lacks, the run lacks."""
    found = [
        Check("files", ERROR, f"{path}: not on this machine", "", f"ls -ld {quoted(path)}", certain=True)
        for path in _missing(spec)
    ]
    own = spec.job.runtime == "bare" and shutil.which(spec.job.python) == shutil.which(sys.executable)
    lacking = [name for name in ("torch", "torchtitan") if own and find_spec(name) is None]
    if lacking:
        fix = f"{install('train')}; or --python PATH of one that has them"
        what = f"{' and '.join(lacking)}: not installed for {sys.executable}"
        found.append(Check("software", ERROR, what, "the run is trained by this Python", fix, certain=True))
    if spec.profile.device == "cuda" and not shutil.which("nvidia-smi"):
        what = f"--gpu {spec.job.gpu}: this machine has no NVIDIA driver (no nvidia-smi)"
        found.append(Check("GPUs", ERROR, what, "", "--gpu cpu --recipe debug"))
    return found


def warnings(spec: RunSpec) -> list[str]:
    """Paths that this machine does not have. The nodes may: the job's own check decides there."""
    found = [
        f"{path}: not on this machine; if the nodes do not have it either, the job stops at once"
        for path in _missing(spec)
        if spec.job.scheduler == "slurm"
    ]
    if spec.job.data.startswith(S3) and not any(name.startswith("AWS_") for name in (*spec.env, *spec.secret_env)):
        found.append(
            f"--data {spec.job.data}: the job gets no credentials for it, which is right where the nodes have "
            "their own "
            "or none are needed; otherwise: --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"
        )
    if spec.job.data == HUB and spec.job.scheduler == "slurm" and "HF_TOKEN" not in (*spec.env, *spec.secret_env):
        found.append(
            "--data hub: the ranks ask the Hub without a token, which it refuses sooner (429): --env HF_TOKEN; better, "
            "launcher stage c4 before the job"
        )
    if spec.job.runtime == "bare" and spec.job.scheduler == "local" and not shutil.which(spec.job.python):
        found.append(f"{spec.job.python}: no such program")
    return found
