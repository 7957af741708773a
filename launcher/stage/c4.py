"""C4: which of its files a run needs, and bringing them. A staged directory is what `--data` takes.

torchtitan reads C4's files (launcher/stage/shards.py) in parallel only when their number is a multiple of the
data-parallel degree, and reads and throws away nearly everything otherwise; so the least is one file per rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import LauncherError, quoted
from launcher.base.output import counted
from launcher.base.values import whole
from launcher.config.layers import Layer, merge, read_layer
from launcher.config.spec import RunSpec
from launcher.stage.fetch import open_repo
from launcher.stage.hub import Repo, find_token, list_files
from launcher.stage.s3 import Bucket, open_bucket
from launcher.stage.shards import IN_EN, SHARD, TOKENS_PER_FILE, TRAIN_FILES
from launcher.stage.source import RemoteFile
from launcher.stage.target import STATE, gigabytes, scaled
from launcher.stage.view import files_needed, tokens_of

REPO = "allenai/c4"
README = "README.md"
EXAMPLE = "--for nodes=17,gpus=4,steps=1000,batch=5"


@dataclass(frozen=True)
class Plan:
    """The files to be brought, and why so many."""

    repo: Repo | Bucket
    files: Sequence[RemoteFile]  # README.md among them
    train_files: int
    train_files_in_all: int
    notes: Sequence[str]

    @property
    def tokens(self) -> int:
        return self.train_files * TOKENS_PER_FILE

    def line(self) -> str:
        size = gigabytes(sum(file.bytes for file in self.files))
        return (
            f"{self.train_files} of {self.train_files_in_all} train files, {size}, about "
            f"{scaled(self.tokens, ' tokens')}, revision {self.repo.revision[:12]}"
        )


# A run in words: what stands for which of its settings.
FOR = {
    "nodes": ("job.nodes", 1),
    "gpus": ("profile.gpus_per_node", 8),
    "steps": ("recipe.steps", 100),
    "batch": ("recipe.local_batch_size", 5),
    "seq": ("recipe.seq_len", 8192),
    "tp": ("recipe.tensor_parallel", 1),
    "cp": ("recipe.context_parallel", 1),
    "pp": ("recipe.pipeline_parallel", 1),
}


def demand_from(text: str) -> tuple[RunSpec, str]:
    """`nodes=17,gpus=4,steps=1000,batch=5`, or the run.toml of a run: what reads the files, and what to call it.

    Raises LauncherError naming the part that is wrong.
    """
    where = f"--for {text[:80]}"
    in_words = "=" in text and not text.endswith(".toml")
    layer = _in_words(text, where) if in_words else read_layer(Path(os.path.expanduser(text)), text)
    if not (in_words or layer.complete):
        fix = f"--for runs/NAME/run.toml, or {EXAMPLE}"
        raise LauncherError("not-a-run-file", f"--for {text}: not the run.toml of a run", fix)
    spec = merge([layer])
    ways, gpus = spec.model_parallel, spec.profile.gpus_per_node
    if ways < 1 or spec.gpus < 1 or spec.gpus % ways:
        raise LauncherError(
            "value", f"{where}: {spec.gpus} GPUs cannot be divided into groups of {ways} (tp x cp x pp)"
        )
    run = f"{spec.job.nodes} x {gpus} GPUs" if in_words else text
    return spec, f"{run}, {spec.recipe.steps:,} steps"


def _in_words(text: str, where: str) -> Layer:
    values = dict(FOR.values())
    names = list(FOR)
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        count = whole(number) or 0
        if name not in names or not 1 <= count <= 10**9:
            known = ", ".join(f"{name}=N" for name in FOR)
            raise LauncherError("value", f"{where}: {part.strip()[:40]!r} is not one of {known}, each once", EXAMPLE)
        names.remove(name)
        values[FOR[name][0]] = count
    return Layer(values, dict.fromkeys(values, where))


def check_count(count: int, in_all: int = TRAIN_FILES) -> None:
    """Raises LauncherError for a number of train files that C4 cannot have."""
    if not 1 <= count <= in_all:
        raise LauncherError(
            "value", f"--files {count}: C4 has {in_all} train files", f"--files N, from 1 to {in_all}, or --all"
        )


def plan_c4(
    target: Path,
    *,
    files: int | None = None,
    runs: Sequence[str] = (),
    everything: bool = False,
    validation: bool = False,
    revision: str | None = None,
    token_file: Path | None = None,
    source: str = "",
) -> Plan:
    """Asks the Hub, or the object storage that `source` names (s3://bucket/prefix), what there is, and chooses.

    Files that `target` holds already come first, then the lowest numbers. `runs` as `demand_from` takes them.
    """
    if files is not None and (files < 1 or not source):
        check_count(files)  # what needs no network comes first
    demands = [demand_from(text) for text in runs]
    repo: Repo | Bucket
    if source:
        repo, found = open_bucket(source)
    else:
        repo = hub = open_repo(target, REPO, "dataset", "c4", revision, find_token(token_file))
        found = [*list_files(hub), *list_files(hub, "en")]
    readme = [file for file in found if file.path == README]
    split: dict[str, list[RemoteFile]] = {"train": [], "validation": []}
    for file in found:
        if match := IN_EN.fullmatch(file.path):
            split[match[1]].append(file)
    in_all = len(split["train"])
    if not readme or not in_all:
        raise LauncherError(
            "repository-lacks",
            f"{repo.source} at {repo.revision[:12]} has no {README} or no en/c4-train files",
            f"copy them there, {README} with its header, too: aws s3 sync DIR {quoted(source)}"
            if source
            else "--revision main",
        )
    _refuse_another_c4(target, split["train"])
    count, notes = _count(files, demands, everything, in_all)
    chosen = sorted(split["train"], key=lambda file: not os.path.lexists(target / file.path))[:count]
    chosen.sort(key=lambda file: file.path)
    wanted = (*readme, *chosen, *(split["validation"] if validation else []))
    if unknown := sum(not (file.sha256 or file.blob) for file in wanted):
        notes.append(
            f"{counted(unknown, 'file')} not in {source}/{STATE}/manifest.json: nothing but sizes can be compared"
        )
    return Plan(repo, wanted, count, in_all, notes)


def _refuse_another_c4(target: Path, train: Sequence[RemoteFile]) -> None:
    """A sample, or a C4 that was split anew: a run would read its files and ours together."""
    ours = {file.path[-13:] for file in train}  # "01024.json.gz": files in all
    for name in shard_names(target):
        if name.startswith("c4-train") and name[-13:] not in ours:
            what = f"--to {target}: holds another C4 (en/{name}; to come are {Path(train[0].path).name}, …)"
            raise LauncherError("target-holds-other", what, "name another directory")


def shard_names(target: Path) -> list[str]:
    """What `en/` has of C4, verified or not, also of a copy or clone that another program made."""
    try:
        return sorted(path.name for path in (target / "en").iterdir() if SHARD.fullmatch(path.name))
    except OSError:
        return []


def _count(
    files: int | None, demands: Sequence[tuple[RunSpec, str]], everything: bool, in_all: int
) -> tuple[int, list[str]]:
    """How many train files, and a line about each run that decided it."""
    if everything:
        return in_all, ["all"]
    if files is not None:
        check_count(files, in_all)
        return files, []
    notes, count = [], 0
    for spec, words in demands:
        tokens, ranks, needed = tokens_of(spec), spec.data_parallel, files_needed(spec, in_all)
        least, count = max(-(-tokens // TOKENS_PER_FILE), 1), max(count, needed)
        note = f"{words}: {scaled(tokens, ' tokens')} are {counted(least, 'file')}, and "
        if needed % ranks:
            note += f"{ranks} data-parallel ranks are more than C4 has files, so all of them"
        else:
            note += f"{needed} are a multiple of its {ranks} data-parallel ranks"
        notes.append(note + ("; the run reads them more than once" if least > needed else ""))
    return count, notes
