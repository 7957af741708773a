"""RunSpec: everything that decides a run, as frozen values. No I/O, no clock, no environment.

The fields of the three dataclasses are the allowed keys of a TOML file's sections `[profile]`, `[recipe]` and
`[job]`; launcher/config/layers.py merges the files and says where each value came from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.base.errors import LauncherError, quoted
from launcher.base.secret import looks_secret
from launcher.config import sbatch
from launcher.titan.command import NODE_SCHEMA
from launcher.titan.recipe import CHOICES as RECIPE_CHOICES
from launcher.titan.recipe import Recipe

NODE_LISTS = ("nodelist", "exclude")
RESTARTS = 10  # of a run that can go on from somewhere, where nothing else is asked for
DIRS = ("init_from", "checkpoint_dir")  # of the job, that need not be
MAX_NODES = 10_000  # more than any Slurm cluster this was written for; a typing slip otherwise waits for ever
SAMPLE = "sample"  # `data` and `tokenizer`: small ones, written into the run directory
HUB = "hub"  # `data`: streamed from the Hugging Face Hub while training
S3 = "s3://"  # `data` that begins so: streamed from object storage while training


@dataclass(frozen=True)
class Profile:
    """What a GPU type needs. Facts about the hardware, not choices about training."""

    gpu: str = "CPU"  # as the results table writes it
    device: str = "cuda"  # "cuda", or "cpu" with gloo: never chosen silently
    gpus_per_node: int = 8
    arch: str = "x86_64"  # of the compute nodes, in uname's words
    driver: str = ""  # NVIDIA's driver on the nodes, such as 580.95.05; empty: not known
    gres: str = "gpu"  # generic resource to ask Slurm for; empty asks for none
    mounts: tuple[str, ...] = ()  # SRC:DST[:FLAGS] that this kind of node needs
    scratch: str = ""  # directory on each node's own disk, for caches; empty: TMPDIR or /tmp of the container


@dataclass(frozen=True)
class Job:
    """Where and under which name it runs."""

    name: str = ""
    gpu: str = ""  # profile: a name, or a path to a TOML file
    recipe: str = "llama3-8b"  # a name, or a path to a TOML file
    scheduler: str = "slurm"
    runtime: str = "pyxis"
    image: str = ""  # absolute path; empty with runtime "bare"
    nodes: int = 1
    time: str = "01:00:00"  # Slurm's time limit
    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    nodelist: str = ""
    exclude: str = ""
    segment: int = 0  # nodes per block with topology/block; 0: not asked for
    constraint: str = ""  # features of nodes
    sbatch: tuple[str, ...] = ()  # OPTION[=VALUE] of sbatch's; launcher/config/sbatch.py
    mounts: tuple[str, ...] = ()  # SRC:DST[:FLAGS], beside those of the profile
    data: str = "/data/c4"
    data_part: str = ""  # I/N: the I-th of N parts of the files that share none; for restarts
    tokenizer: str = "/data/tokenizers/Llama-3.1-8B"
    init_from: str = ""  # directory of safetensors in the Hub's format; empty: a random start
    checkpoint_dir: str = ""  # where the run gets a folder of its name for checkpoints; empty: in the run directory
    runs_dir: str = "runs"
    image_dir: str = ""  # where an image that is not in the working directory is looked for
    python: str = "python3"  # inside the container; with "bare" on the node
    check: str = "full"  # of the nodes before training: "off", "quick" or "full"; docs/node-check.md
    spares: int = 0  # nodes beside those that train, to replace one that fails
    max_restarts: int = -1  # after a failure; -1: RESTARTS where the run can go on from somewhere or has spares, else 0
    continues: int = 0  # how often it is queued again after its time limit
    slurm_bin: str = "/usr/bin"  # where sbatch was found: the job starts with an empty environment


@dataclass(frozen=True)
class RunSpec:
    """A whole run as it was asked for. `origin` says, per dotted key, which layer the value came from."""

    profile: Profile = field(default_factory=Profile)
    recipe: Recipe = field(default_factory=Recipe)
    job: Job = field(default_factory=Job)
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: tuple[str, ...] = ()  # names only: their values travel in a 0600 file
    titan: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    gpu_gib: float = 0.0  # memory of one GPU, where Slurm names less than the profile's has; 0: the profile's

    @property
    def run_dir(self) -> str:
        return f"{self.job.runs_dir}/{self.job.name}"

    @property
    def gpus(self) -> int:
        return self.job.nodes * self.profile.gpus_per_node

    @property
    def allocated(self) -> int:
        """Nodes that Slurm is asked for."""
        return self.job.nodes + self.job.spares

    @property
    def restarts(self) -> int:
        """How often the run begins anew after a failure."""
        if self.job.max_restarts >= 0:
            return self.job.max_restarts
        return RESTARTS if self.recipe.checkpoint_interval or self.job.spares or self.job.continues else 0

    @property
    def begins_anew(self) -> bool:
        """Whether the job may have several attempts, or chooses its nodes among more."""
        return bool(self.restarts or self.job.continues or self.job.spares)

    @property
    def data_parallel(self) -> int:
        """The data-parallel degree: how many ranks read data of their own."""
        return self.gpus // self.model_parallel

    @property
    def model_parallel(self) -> int:
        """How many ranks read the same data."""
        return self.recipe.tensor_parallel * self.recipe.context_parallel * self.recipe.pipeline_parallel

    @property
    def data_path(self) -> str:
        """The data as the job's user names it; what the trainer reads may be a view of it (launcher/stage/view.py)."""
        return f"{self.run_dir}/sample/c4" if self.job.data == SAMPLE else self.job.data

    @property
    def tokenizer_path(self) -> str:
        return f"{self.run_dir}/sample/tokenizer" if self.job.tokenizer == SAMPLE else self.job.tokenizer

    @property
    def job_name(self) -> str:
        """Slurm's job name: the run's, made unique by its place, so that a lost job id can be found again."""
        return f"{self.job.name}.{hashlib.sha256(self.run_dir.encode()).hexdigest()[:8]}"

    def values(self) -> dict[str, Any]:
        """Every dotted key with its value, in the order of the dataclasses."""
        flat: dict[str, Any] = {}
        for section in ("job", "profile", "recipe"):
            part = getattr(self, section)
            flat |= {f"{section}.{f.name}": getattr(part, f.name) for f in dataclasses.fields(part)}
        flat |= {f"env.{name}": value for name, value in self.env.items()}
        flat |= {f"secret_env.{name}": "(from the environment)" for name in self.secret_env}
        flat |= {f"titan.{key}": value for key, value in self.titan.items()}
        return flat


@dataclass(frozen=True)
class PlacedRun(RunSpec):
    """A run as it is submitted: what was asked for, and what the cluster and the data decided."""

    sources: Mapping[str, str] = field(default_factory=dict)  # path -> where its links lead, for mounts
    view: Mapping[str, str] = field(default_factory=dict)  # file of run_dir/data/en -> link's target, or s3://
    avoid: tuple[str, ...] = ()  # nodes left out beside job.exclude: they failed their check
    segment: int = 0  # nodes per block: job.segment, or chosen from the topology; 0: none


CHOICES = {
    "profile.device": ("cuda", "cpu"),
    "profile.arch": ("aarch64", "x86_64"),
    **{f"recipe.{key}": allowed for key, allowed in RECIPE_CHOICES.items()},
    "job.scheduler": ("slurm", "local"),
    "job.runtime": ("pyxis", "apptainer", "bare"),
    "job.check": ("off", "quick", "full"),
}
LEAST = {
    **dict.fromkeys(("profile.gpus_per_node", "job.nodes"), 1),
    **{f"recipe.{key}": 1 for key in ("seq_len", "local_batch_size", "steps", "log_freq")},
    **{f"recipe.{key}_parallel": 1 for key in ("tensor", "context", "pipeline")},
    **{f"recipe.{key}": 0 for key in ("checkpoint_interval", "seed", "warmup_steps")},
    "recipe.dp_replicate": 1,
    **{f"job.{key}": 0 for key in ("segment", "spares", "continues")},
    "job.max_restarts": -1,
}
MOST = {"job.nodes": MAX_NODES, "job.spares": MAX_NODES, "profile.gpus_per_node": 64}
# Settings of torchtitan's that the launcher reports as the run's own: changed behind its back, a row would be false.
OWNED = {
    "training.local_batch_size": "--batch-size N",
    "training.seq_len": "--seq-len N",
    "training.steps": "--steps N",
    "training.global_batch_size": "--set recipe.global_batch_size=N",
    "metrics.log_freq": "--set recipe.log_freq=N",
    "compile.enable": "--set recipe.compile=true",
    "parallelism.data_parallel_replicate_degree": "--set recipe.dp_replicate=N",
    "parallelism.data_parallel_shard_degree": "--set recipe.dp_shard=N",
    "parallelism.tensor_parallel_degree": "--set recipe.tensor_parallel=N",
    "parallelism.context_parallel_degree": "--set recipe.context_parallel=N",
    "parallelism.pipeline_parallel_degree": "--set recipe.pipeline_parallel=N",
    "activation_checkpoint.mode": "--set recipe.activation_checkpoint=full",
    "checkpoint.enable": "--checkpoint-every STEPS",
    "checkpoint.interval": "--checkpoint-every STEPS",
    "checkpoint.keep_latest_k": "--keep N",
    "checkpoint.load_only": "--checkpoint-every 0",
    "checkpoint.initial_load_path": "--init-from DIR",
    "checkpoint.initial_load_in_hf": "--init-from DIR",
    "checkpoint.initial_load_model_only": "--init-from DIR",
}
DATA_PART = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})", re.ASCII)
S3_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[\w.=+@-]+)*)/?", re.ASCII)
# An image as Docker or enroot names it, with a tag or a digest, or a registry's host: nvcr.io/nvidia/pytorch:25.01-py3.
REGISTRY_NAME = re.compile(
    r"[a-z0-9][a-z0-9.-]*(:\d+)?([/#][\w.-]+)*(:[\w.-]+|@sha256:[0-9a-f]{64})"
    r"|[a-z0-9-]+(\.[a-z0-9-]+)+(:\d+)?([/#][\w-]+){2,}",
    re.ASCII,
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TITAN_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
# Variables of slurm/job.sbatch.j2, which would lose the run's record, and those that bash does not let anybody set.
SCRIPTS_OWN = {
    *("PATH", "run_dir", "job_id", "began_at", "signal", "step", "code", "slurm", "home", "name", "problem", "end"),
    *("hosts", "peer", "node_addr", "mark", "pid", "UID", "EUID", "PPID", "SHELLOPTS", "IFS", "ENV"),
    *("restart", "attempt", "attempt_began", "time_is_up", "allocated", "nodelist", "in_job", "verdict"),
}
SLURM_WORD = r"[A-Za-z0-9_.,@+/:-]*"
SLURM_NODES = r"[A-Za-z0-9_.,\[\]-]*"
SLURM_TIME = r"\d{1,9}(:\d{1,2}){0,2}|\d{1,6}-\d{1,2}(:\d{1,2}){0,2}"
SAFE_DIR = r"/[\w./@+=~-]*"
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\u2028\u2029]")
PRINTABLE = rf"[^{CONTROL.pattern[1:-1]}]*"
# What a text must look like, how a refusal says it, and what to type.
FORMS = {
    "job.name": (
        NAME.pattern,
        "a name has 1 to 63 letters, digits, '.', '_' or '-', and begins with a letter or digit",
        "--name my-run-1",
    ),
    "job.partition": (SLURM_WORD, "not a partition name", "list them: sinfo -s"),
    **{f"job.{key}": (SLURM_WORD, f"not a {key} name", f"--{key} NAME") for key in ("account", "qos", "reservation")},
    "job.constraint": (r"[\w.,@+/:&|*()\[\]!-]*", "not a constraint of Slurm's", "--constraint 'a100&nvlink'"),
    **{f"job.{key}": (SLURM_NODES, "not a list of nodes", f"--{key} 'gpu-[001-004,007]'") for key in NODE_LISTS},
    "job.time": (SLURM_TIME, "not a time limit of Slurm's", "--time 01:30:00 (or 90, or 1-12:00:00)"),
    "profile.gres": (SLURM_WORD, "not a generic resource's name", 'gres = "gpu"'),
    "profile.scratch": (
        rf"|(?!/$){SAFE_DIR}",
        "must be an absolute path of letters, digits and ._-+@=~",
        'scratch = "/scratch/local"',
    ),
    "job.runs_dir": (
        SAFE_DIR,
        "Slurm's own file name patterns need a path of letters, digits and ._-+@=~ with at most 200 characters",
        "--runs-dir ~/runs",
    ),
    "job.python": (rf"[^-]{PRINTABLE}", "not a program", "--python python3"),
}


def refuse(key: str, value: object, why: str, fix: str = "", origin: str = "") -> LauncherError:
    where = f" (from {origin})" if origin and not origin.startswith("default") else ""
    told = "" if key.startswith("env.") or looks_secret(key, value) else f" = {str(value)[:120]!r}"
    return LauncherError("value", f"{key}{told}{where}: {why}", fix)


def validate(spec: RunSpec, image_needed: bool = True) -> None:
    """Refuses every value that cannot work or cannot reach Slurm, Pyxis or the trainer unchanged.

    Without `image_needed`, there may be no image. Raises LauncherError naming the key, the value, its origin and what
    to type instead.
    """
    values = spec.values()
    for key, value in values.items():  # first of all: no other refusal tells a secret
        items = [(key, item) for item in (value if isinstance(value, tuple) else (value,))]
        if key == "job.sbatch":
            items += map(sbatch.split, value)
        if not key.startswith("secret_env.") and any(looks_secret(*item) for item in items):
            name = key[4:] if key.startswith("env.") else "NAME"
            raise LauncherError(
                "secret-exposed",
                f"{spec.origin.get(key, 'a file')}: {key} looks like a secret, and others can read it there",
                f'export {name}=..., then --env {name}, or in a file, above its tables: secret_env = ["{name}"]',
            )

    def bad(key: str, why: str, fix: str = "") -> LauncherError:
        return refuse(key, values[key], why, fix, spec.origin.get(key, ""))

    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise bad(key, f"must be one of {', '.join(allowed)}")
    for key, least in LEAST.items():
        if not least <= values[key] <= MOST.get(key, values[key]):
            most = f" and at most {MOST[key]:,}" if key in MOST else ""
            raise bad(key, f"must be at least {least}{most}")
    for key, (form, why, fix) in FORMS.items():
        if not re.fullmatch(form, values[key], re.ASCII):
            raise bad(key, why, fix)
    if spec.recipe.checkpoint_keep < 2:
        why = "must be at least 2: while one is written, the one before must stay, and torchtitan refuses less"
        raise bad("recipe.checkpoint_keep", why, "--keep 2")
    if not 0 < spec.recipe.lr < 100:
        raise bad("recipe.lr", "must be above 0 and below 100")
    if spec.job.segment and spec.allocated % spec.job.segment:
        raise bad("job.segment", f"does not divide {spec.allocated} nodes: Slurm would refuse the job", "--segment 0")
    if len(spec.run_dir) > 200:
        raise bad("job.runs_dir", *FORMS["job.runs_dir"][1:])
    if spec.job.continues and not spec.recipe.checkpoint_interval:
        raise bad("job.continues", "without checkpoints every job would begin at step 1", "--checkpoint-every STEPS")
    for item in spec.job.sbatch:
        why, fix = sbatch.problem(item)
        if spec.job.continues and sbatch.split(item)[0] == "signal":
            why, fix = "--continue needs sbatch's --signal itself", "one of the two"
        if why:
            raise refuse("job.sbatch", item, why, fix, spec.origin.get("job.sbatch", ""))
    _validate_data(spec, bad)
    _validate_runtime(spec, bad, image_needed)
    _validate_parallelism(spec, bad)
    for key, value in spec.titan.items():
        if not TITAN_KEY.fullmatch(key):
            raise bad(f"titan.{key}", "the key is not a torchtitan setting", "--set training.max_norm=2.0")
        if CONTROL.search(value):
            raise bad(f"titan.{key}", "the value holds a control character")
        if spec.job.checkpoint_dir and key.replace("-", "_") == "checkpoint.folder":
            raise bad(f"titan.{key}", "the checkpoints have two places", "--checkpoint-dir alone, or --set alone")
        if owned := OWNED.get(key.replace("-", "_")):
            raise bad(f"titan.{key}", "a setting that the launcher reports as the run's own", owned)
    for name in (*spec.env, *spec.secret_env):
        if not ENV_NAME.fullmatch(name):
            what = f"--env {name.partition('=')[0][:80]!r}: not a variable's name"
            raise LauncherError("env-name", what, "--env NAME=VALUE")
        if name.startswith(("SLURM_", "TITAN_", "BASH")) or name in SCRIPTS_OWN:
            raise LauncherError("env-reserved", f"--env {name}: the job script sets this variable itself")
    for name, value in spec.env.items():
        if CONTROL.search(value):
            raise bad(f"env.{name}", "a control character (a newline, say) would not reach the container intact")
    for key, value in values.items():  # of whatever has no form of its own: in the script it would begin a line
        if isinstance(value, str) and CONTROL.search(value):
            raise bad(key, "holds a control character", "the same without line breaks")


def _validate_data(spec: RunSpec, bad: Callable[..., LauncherError]) -> None:
    job = spec.job
    for key, named in (("data", (SAMPLE, HUB)), ("tokenizer", (SAMPLE, HUB)), *((key, ("",)) for key in DIRS)):
        value, option = getattr(job, key), f"--{key.replace('_', '-')}"
        if value in named:
            continue
        if value.startswith(S3) and key == "data":
            if not S3_ADDRESS.fullmatch(value) or ".." in value:
                raise bad("job.data", "not an address of object storage", "--data s3://bucket/prefix")
        elif not value.startswith("/"):
            raise bad(f"job.{key}", "must be an absolute path", f"{option} /data/...")
        elif CONTROL.search(value) or any(mark in value for mark in ",:"):
            raise bad(f"job.{key}", "a comma, colon or control character cannot be written in a Pyxis mount")
    if job.data_part and (not (part := DATA_PART.fullmatch(job.data_part)) or int(part[1]) > int(part[2])):
        raise bad("job.data_part", "must be I/N with I from 1 to N, and N at most 9999", "--data-part 1/2")
    if job.data_part and job.data == HUB:
        raise bad("job.data_part", "what the Hub streams has no parts", "launcher stage c4 --to DIR")
    if job.tokenizer == HUB:
        raise bad("job.tokenizer", "the tokenizer is not fetched during a job", "--tokenizer DIR")


def _validate_runtime(spec: RunSpec, bad: Callable[..., LauncherError], image_needed: bool) -> None:
    job = spec.job
    if job.runtime == "bare":
        if job.image:
            raise bad("job.image", "the bare runtime starts no container", "leave out --image, or --runtime pyxis")
    elif "://" in job.image or REGISTRY_NAME.fullmatch(job.image):
        name = quoted(job.image.rpartition("://")[2].replace("#", "/"))
        why = "a registry's image, which every node would fetch and unpack: convert it to a file once"
        fix = f"launcher image convert {name} (docker pull {name} before), then --image with the file that it makes"
        raise bad("job.image", why, fix)
    elif not job.image.startswith("/") and (image_needed or job.image):
        refused = bad("job.image", "an image is needed", "--image titan.sqsh (or --runtime bare)")
        raise refused if job.image else LauncherError("image-not-named", refused.what, refused.fix)
    no_more = "a local run has one node and no time limit", "leave it out"
    for key, is_wrong, why, fix in (
        ("nodes", job.nodes != 1, "the local scheduler has one node: this machine", "--nodes 1"),
        *((key, getattr(job, key), *no_more) for key in ("spares", "continues")),
        ("runtime", job.runtime == "pyxis", "Pyxis is a part of Slurm", "--runtime bare, or --runtime apptainer"),
    ):
        if job.scheduler == "local" and is_wrong:
            raise bad(f"job.{key}", why, fix)
    for key, mounts in (("profile.mounts", spec.profile.mounts), ("job.mounts", job.mounts)):
        for mount in mounts:
            if problem := mount_problem(mount):
                raise refuse(key, mount, problem, "--mount /host/dir:/container/dir[:ro]", spec.origin.get(key, ""))


def mount_problem(mount: str) -> str:
    """Why `mount` cannot be given to Pyxis as SRC:DST[:FLAGS]; empty when it can."""
    parts = mount.split(":")
    if CONTROL.search(mount):
        return "holds a newline or another control character"
    if "," in mount:
        return "Pyxis separates mounts at commas: a path with one cannot be mounted"
    if len(parts) not in (2, 3):
        return "must be SRC:DST or SRC:DST:FLAGS"
    if not parts[0].startswith("/") or not parts[1].startswith("/"):
        return "both paths must be absolute"
    if len(parts) == 3 and not re.fullmatch(r"[a-z]+(\+[a-z]+)*", parts[2]):
        return "flags are words like ro, rw or ro+rbind"
    return ""


def _validate_parallelism(spec: RunSpec, bad: Callable[..., LauncherError]) -> None:
    recipe = spec.recipe
    other = spec.model_parallel * recipe.dp_replicate
    if recipe.dp_shard == 0 or recipe.dp_shard < -1:
        raise bad("recipe.dp_shard", "must be -1 (all that are left) or at least 1")
    if recipe.dp_shard > 0 and other * recipe.dp_shard != spec.gpus:
        raise bad("recipe.dp_shard", f"the degrees multiply to {other * recipe.dp_shard}, the run has {spec.gpus} GPUs")
    product = 1
    for degree in ("tensor_parallel", "context_parallel", "pipeline_parallel", "dp_replicate"):
        product *= getattr(recipe, degree)
        if spec.gpus % product:
            why = f"{spec.gpus} GPUs are not a multiple of the parallel degrees' product, {other}"
            raise bad(f"recipe.{degree}", why, "choose --nodes and --gpus-per-node so that their product is a multiple")


def tables_of(run: PlacedRun) -> dict[str, dict[str, Any]]:
    """The whole run under the keys of run.toml and job/node.json; `placed`: what the cluster and the data decided."""
    return {
        "job": dataclasses.asdict(run.job),
        "profile": dataclasses.asdict(run.profile),
        "recipe": dataclasses.asdict(run.recipe),
        "env": dict(run.env),
        "titan": dict(run.titan),
        "placed": {
            "run_dir": run.run_dir,
            "data": f"{run.run_dir}/data" if run.view else run.data_path,  # what the trainer reads
            "data_source": run.data_path,
            "tokenizer": run.tokenizer_path,
            "exclude": list(run.avoid),
            "segment": run.segment,
            "restarts": run.restarts,
        },
    }


def node_config(run: PlacedRun) -> dict[str, Any]:
    """The content of `job/node.json`, which slurm/node.py reads on each node."""
    return {"schema": NODE_SCHEMA, **tables_of(run)}
