"""Shard views: which of the staged files a run reads, as a directory of links in the run directory.

    <run_dir>/data/README.md                  the header by which `datasets` finds the two splits
    <run_dir>/data/en/c4-train.*.json.gz      links; their number is a multiple of the data-parallel degree
    <run_dir>/data/en/c4-validation.*.json.gz

Of data in object storage there is README.md alone, and it names the objects.

`datasets` gives every rank files of its own when their number is a multiple of the ranks
(datasets.distributed.split_dataset_by_node). Otherwise each rank reads, inflates and parses all of them and throws
away what belongs to the others: benchmarks/loader.py measures it, docs/data.md has the table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.config.runtime import host_path, mounts
from launcher.config.spec import S3, SAMPLE, PlacedRun, RunSpec
from launcher.stage import sample
from launcher.stage.manifest import read_manifest, wrong_size
from launcher.stage.shards import (
    SHARD,
    SMALL,
    TOKENS_PER_BYTE,
    TRAIN_FILES,
    files_for,
    wrong_start,
)
from launcher.stage.target import scaled
from launcher.titan import LFS_POINTER, Refused
from launcher.titan.data import check_data, check_shards

DATASETS = ("c4", "c4_validation")  # torchtitan's names of what such a directory holds
ESTIMATE_IS_GOOD_TO = 0.02  # tokens from bytes: C4's files differ by a percent, text of another kind by more

T = TypeVar("T")


@dataclass(frozen=True)
class Staged:
    """What a directory in C4's form holds that can be trained on, in numerical order."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    bytes: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # file -> why
    train_files_in_all: int = TRAIN_FILES
    staged_from: str = ""  # by its manifest


def choose(files: Sequence[T], degree: int, part: int = 1, parts: int = 1) -> Sequence[T]:
    """The longest beginning of `files` whose length is a multiple of `degree`, or one of `parts` disjoint pieces of it.

    The pieces are multiples too, differ by at most `degree`, and have that beginning as their sum. Where not even
    `degree` files are there, no choice helps: all of them, and none for a piece. Pieces may also be empty.
    """
    groups = len(files) // degree
    if not groups and parts == 1:
        return files
    each, rest = divmod(groups, parts)
    first = (part - 1) * each + min(part - 1, rest)
    return files[first * degree : (first + each + (part <= rest)) * degree]


def plan(spec: PlacedRun) -> tuple[PlacedRun, list[str]]:
    """The run with its view, where there can be one, and what the user should know. Looks at the data, writes nothing.

    Raises LauncherError where a part was asked for (`--data-part`) that cannot be given, and for streamed data that
    cannot be listed.
    """
    data, streamed = spec.job.data, spec.job.data.startswith(S3)
    if spec.recipe.dataset not in DATASETS or not (data == SAMPLE or data.startswith(("/", S3))):
        if spec.job.data_part:
            what = f"--data {data} with the dataset {spec.recipe.dataset}"
            raise LauncherError(
                "data-part", f"--data-part {spec.job.data_part}: {what} has no parts", "--data DIR, a copy of C4"
            )
        if streamed:
            raise LauncherError(
                "dataset-not-streamed",
                f"--data {data}: only C4 is streamed from object storage, not {spec.recipe.dataset}",
                f"--set recipe.dataset={DATASETS[0]}",
            )
        return spec, []
    if data == SAMPLE:
        return _view_of_sample(spec), []
    place = spec.data_path.rstrip("/") if streamed else host_path(spec, spec.data_path)
    if os.path.isfile(place):
        raise LauncherError(
            "not-a-directory",
            f"--data {place}: a file, not a directory",
            "launcher stage c4 --to DIR --files N, then --data DIR",
        )
    notes: list[str] = []
    try:
        if streamed:
            staged = _look_in_bucket(spec.data_path)
        else:
            staged, notes = look(Path(place), lambda name: mount_for(spec, f"{spec.data_path}/en/{name}".rstrip("/")))
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        where = f"{place}/en" if os.path.isdir(place) else place
        why = f"{where}: " + ("not on this machine" if missing else f"cannot be read here ({error.strerror})")
        if spec.job.data_part or spec.job.scheduler == "local":
            if not missing:
                fix = quoted("ls", "-ld", where)
                raise LauncherError("unreadable", why, fix, status=ExitStatus.FILESYSTEM) from error
            raise LauncherError("data-missing", why, two_ways(spec), status=ExitStatus.NOT_FOUND) from error
        return spec, [] if missing else [f"{why}, so the run gets no view of it: {two_ways(spec)}"]
    stage = _stage_command(spec, staged)
    if staged.left_out:
        name, why = next(iter(staged.left_out.items()))
        more = f", and {len(staged.left_out) - 1} more" if len(staged.left_out) > 1 else ""
        notes.append(f"{place}/en: {name} is {why}{more}: left out; to repair: {stage}")
    if not staged.train:
        why = f"{place}/en holds no train file of C4"
        if spec.job.data_part or streamed:
            raise LauncherError("no-train-files", why, stage, original="\n".join(notes))
        return spec, [*notes, f"{why}, so the run gets no view of it: {stage}"]
    spec = _with_view(spec, staged)
    return spec, [*notes, *_shortages(spec, staged)]


def _look_in_bucket(address: str) -> Staged:
    """What can be trained on there."""
    from launcher.stage.s3 import open_bucket  # with ssl, every submission would start a third slower

    found, before = [], set(os.environ)
    try:
        bucket, objects = open_bucket(address)
        for file in objects:
            if file.path.startswith("en/") and (shard := SHARD.fullmatch(file.path.removeprefix("en/"))):
                why = wrong_start(bucket.head(file.path, len(LFS_POINTER))) if file.bytes < SMALL else ""
                found.append((shard, file.bytes, why))
    finally:  # the certificates that our client trusts are named in variables; a job on this machine has its own
        for name in set(os.environ) - before:
            del os.environ[name]
    return _in_order(found)


def check(spec: PlacedRun) -> None:
    """Raises Refused for data that is seen here and that the node check will refuse.

    What cannot be read here, and what a link leads to that leads nowhere here, the nodes may have.
    """
    directory = Path(host_path(spec, spec.data_path))
    if not spec.job.data.startswith("/") or not directory.is_dir():
        return
    folder, placed = directory / "en", {"data": str(directory), "data_source": str(directory), "run_dir": ""}
    with suppress(OSError):
        names = train_files(spec)[:1] or (sorted(os.listdir(folder)) if folder.exists() else [])
        if not all((folder / name).exists() for name in names):
            return
        check_links(spec, [f"{spec.data_path}/en", *(f"{spec.data_path}/en/{name}" for name in names)])
        try:
            if spec.view:  # of the files in use, the small ones have been looked at
                check_shards([folder / name for name in names], "")
            else:
                check_data({"placed": placed})
        except Refused as refused:
            count = files_needed(spec, TRAIN_FILES)
            raise Refused(refused.why, f"launcher stage c4 --to {quoted(directory)} --files {count}") from None


def check_links(spec: PlacedRun, paths: Iterable[str]) -> None:
    """Raises Refused for the first of the job's paths that is a link which its container cannot follow."""
    for path in paths:
        if mount := mount_for(spec, path):
            target = os.path.realpath(host_path(spec, path))
            why = f"{path}: a link to {target}, which the container does not see"
            raise Refused(why, quoted("--mount", mount))


def mount_for(spec: PlacedRun, path: str) -> str:
    """The --mount that shows the container what the link `path` leads to; "" for what it sees, and for no link."""
    targets = [mount.split(":")[1].rstrip("/") for mount in mounts(spec)]
    host = host_path(spec, path)
    for _ in range(40 if spec.job.runtime != "bare" else 0):  # as many links as Linux follows
        if not os.path.islink(host):
            break
        link = os.readlink(host)
        path = os.path.normpath(os.path.join(os.path.dirname(path), link))
        host = os.path.join(os.path.realpath(os.path.dirname(host)), link)
        if not any(f"{path}/".startswith(f"{target}/") for target in targets):
            return f"{os.path.dirname(os.path.realpath(host))}:{os.path.dirname(path)}:ro"
    return ""


def look(directory: Path, mount_of: Callable[[str], str] = lambda name: "") -> tuple[Staged, list[str]]:
    """The usable files in DIR/en, and what is wrong with the manifest. With one, only what it lists counts.

    `mount_of`: the mount that the link DIR/en/NAME lacks; without it the job cannot follow the link. Raises OSError.
    """
    notes: list[str] = []
    listed: Mapping[str, int] | None = None
    in_all, staged_from = 0, ""
    if (directory / ".staged" / "manifest.json").exists():
        try:
            if manifest := read_manifest(directory):
                listed = {path.removeprefix("en/"): file.bytes for path, file in manifest.files.items()}
                in_all, staged_from = manifest.train_files_in_all, manifest.source
        except LauncherError as error:
            notes.append(f"{error.what}: its files are taken as they are; {error.fix}")
    found = []
    of_all = mount_of("")
    with os.scandir(directory / "en") as entries:
        for entry in entries:
            if shard := SHARD.fullmatch(entry.name):
                size, why = _problem(entry, listed)
                mount = of_all or (mount_of(entry.name) if entry.is_symlink() else "")
                if mount and os.path.exists(entry.path):
                    why = f"a link to {os.path.realpath(entry.path)}, which the container sees with --mount {mount}"
                found.append((shard, size, why))
    return _in_order(found, in_all, staged_from), notes


def _in_order(found: Iterable[tuple[re.Match[str], int, str]], in_all: int = 0, staged_from: str = "") -> Staged:
    """From the names of shards, their sizes, and why one is no data."""
    numbered: dict[str, dict[tuple[int, int], str]] = {"train": {}, "validation": {}}
    sizes: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for shard, size, problem in sorted(found, key=lambda each: each[0][0]):
        if problem:
            left_out[shard[0]] = problem
        else:
            sizes[shard[0]] = size
            numbered[shard[1]][int(shard[3]), int(shard[2])] = shard[0]
    train, validation = (tuple(names for _, names in sorted(numbered[split].items())) for split in numbered)
    in_all = in_all or max((total for total, _ in numbered["train"]), default=0) or TRAIN_FILES
    return Staged(train, validation, sizes, left_out, in_all, staged_from)


def _problem(entry: os.DirEntry[str], listed: Mapping[str, int] | None) -> tuple[int, str]:
    """Size, and why the file cannot be read as training data; empty when it can."""
    try:
        size = entry.stat().st_size
        if listed is not None and entry.name not in listed:
            return size, "not in the manifest"
        why = wrong_size(Path(entry.path), size if listed is None else listed[entry.name])
        if not why and size < SMALL:
            with open(entry.path, "rb") as stream:
                why = wrong_start(stream.read(len(LFS_POINTER)))
        return size, why
    except OSError as error:
        return 0, f"unreadable ({error.strerror})"


def write_data(spec: PlacedRun, run_dir: Path) -> None:
    """What a run directory holds of its data: the sample, the view. Raises OSError or LauncherError."""
    if SAMPLE in (spec.job.data, spec.job.tokenizer):
        sample.write_c4_sample(run_dir / "sample" / "c4")
        sample.write_tokenizer(run_dir / "sample" / "tokenizer")
    if spec.view:
        write(run_dir / "data", spec.view)


def write(directory: Path, links: Mapping[str, str]) -> None:
    """Makes `directory` (<run_dir>/data) from PlacedRun.view; of objects in a bucket, only a README.md that names them.

    Its header names nothing that is not there: `datasets` would refuse all splits. In the job, objects take titan.s3
    and s3fs in the image. Raises OSError; the caller makes run directories whole.
    """
    directory.mkdir(parents=True)
    lines = ["---", "configs:", "- config_name: en", "  data_files:"]
    for split in ("train", "validation"):
        targets = {name: target for name, target in links.items() if name.startswith(f"c4-{split}.")}
        paths = [target for target in targets.values() if target.startswith(S3)]
        for name in targets.keys() if not paths else ():
            (directory / "en").mkdir(exist_ok=True)
            os.symlink(links[name], directory / "en" / name)
            paths = [f"en/c4-{split}.*.json.gz"]
        if paths:
            lines += [f"  - split: {split}", "    path:", *(f"    - {path}" for path in paths)]
    lines += ["---", "", "The files that this run reads, made by the launcher.", ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def train_files(spec: PlacedRun) -> list[str]:
    """The train files in the run's view."""
    return [name for name in spec.view if name.startswith("c4-train.")]


def describe(spec: PlacedRun) -> str:
    """One line about what the trainer reads."""
    if not spec.view:
        return spec.data_path
    train = train_files(spec)
    return (
        f"{len(train)} train and {len(spec.view) - len(train)} validation files of {spec.data_path}, "
        f"for {spec.data_parallel} data-parallel ranks"
    )


def _with_view(spec: PlacedRun, staged: Staged) -> PlacedRun:
    part, parts = _part(spec)
    chosen = choose(staged.train, spec.data_parallel, part, parts)
    needed = spec.data_parallel * parts
    if parts > 1 and len(staged.train) < needed:
        elsewhere = spec.job.data == SAMPLE or spec.job.data.startswith(S3) or needed > staged.train_files_in_all
        raise LauncherError(
            "data-part",
            f"--data-part {spec.job.data_part}: {parts} parts for {spec.data_parallel} data-parallel ranks need "
            f"{needed} train files, there are {len(staged.train)}",
            "fewer parts, or another --data" if elsewhere else _stage_command(spec, staged),
        )
    return replace(spec, view={name: f"{_way_to_data(spec)}/en/{name}" for name in (*chosen, *staged.validation)})


def _view_of_sample(spec: PlacedRun) -> PlacedRun:
    """A file for each rank, as many as there are: links to the few that are written, whose text repeats anyway."""
    written, validation = (tuple(sample.file_names(*split)) for split in sample.SPLITS)
    train = sample.file_names("train", max(len(written), spec.data_parallel))
    target = {name: f"{_way_to_data(spec)}/en/{written[at % len(written)]}" for at, name in enumerate(train)}
    spec = _with_view(spec, Staged(tuple(train), validation))
    return replace(spec, view={name: target.get(name, link) for name, link in spec.view.items()})


def _way_to_data(spec: RunSpec) -> str:
    """From <run_dir>/data/en to the data, as the job walks it.

    Inside a container both are mounted under the names that they have here, so there are no links on the way. Outside,
    `..` leads up from where a linked directory really is.
    """
    data, run_dir = spec.data_path, spec.run_dir
    if data.startswith(S3):
        return data.rstrip("/")
    if spec.job.runtime == "bare" and spec.job.data != SAMPLE:
        data, run_dir = os.path.realpath(data), f"{os.path.realpath(spec.job.runs_dir)}/{spec.job.name}"
    return os.path.relpath(data, f"{run_dir}/data/en")


def _part(spec: RunSpec) -> tuple[int, int]:
    part, _, parts = (spec.job.data_part or "1/1").partition("/")
    return int(part), int(parts)


def tokens_of(spec: RunSpec) -> int:
    """What the run reads in all its steps."""
    recipe = spec.recipe
    batch = recipe.global_batch_size
    if batch < 1:
        batch = recipe.local_batch_size * spec.data_parallel
    return recipe.steps * batch * recipe.seq_len


def files_needed(spec: RunSpec, in_all: int) -> int:
    """How many full C4 files the run, or all parts of it, needs: what `launcher stage c4 --for` would say."""
    _, parts = _part(spec)
    return files_for(tokens_of(spec) * parts, spec.data_parallel * parts, in_all)


def two_ways(spec: RunSpec) -> str:
    """To a run that has data: the data set, or none of it."""
    return f"{_stage_command(spec, Staged(()))}; or text that the launcher makes: --data sample"


def _stage_command(spec: RunSpec, staged: Staged, validation: bool = False) -> str:
    """What gives the run enough, and repairs what is left out now.

    Staging takes the files that are there first, the damaged ones among them: as many as there are cover them all.
    """
    bad = [match[1] for name in staged.left_out if (match := SHARD.fullmatch(name))]
    in_all, streamed = staged.train_files_in_all, spec.job.data.startswith(S3)
    count = max(files_needed(spec, in_all), min(len(staged.train) + bad.count("train"), in_all))
    words = f"launcher stage c4 --to {'DIR' if streamed else quoted(host_path(spec, spec.data_path))} --files {count}"
    if staged.staged_from.startswith(S3):
        words += f" --from {quoted(staged.staged_from)}"
    if validation or "validation" in bad:
        words += " --validation"
    return f"{words}, then: aws s3 sync DIR {quoted(spec.data_path)}" if streamed else words


def _shortages(spec: PlacedRun, staged: Staged) -> list[str]:
    """Warnings about too few files, with the command that stages enough where C4 has enough."""
    notes, train, degree = [], train_files(spec), spec.data_parallel
    enough = files_needed(spec, staged.train_files_in_all)
    more = f"; {_stage_command(spec, staged)}" if enough > len(staged.train) else ""
    if len(train) % degree:
        help_ = more if degree <= staged.train_files_in_all else "; tensor or pipeline parallelism needs fewer"
        notes.append(
            f"{spec.data_path}: {len(train)} train files for {degree} data-parallel ranks: every rank reads all "
            f"of them and keeps one document in {degree}{help_}"
        )
    needed = tokens_of(spec)
    there = sum(staged.bytes[name] for name in train) * TOKENS_PER_BYTE
    # The estimate is for Llama 3's tokenizer: the sample's makes three times as many tokens.
    if needed > there * (1 + ESTIMATE_IS_GOOD_TO) and spec.job.tokenizer != SAMPLE:
        notes.append(
            f"{spec.data_path}: the run reads {scaled(needed, ' tokens')}, its {len(train)} files have about "
            f"{scaled(there, ' tokens')} (estimated from their size): it reads them more than once{more}"
        )
    validates = [spec.titan.get(key, "").lower() for key in ("validation.enable", "validator.enable")]
    if not staged.validation and "true" in validates:
        stage = _stage_command(spec, staged, validation=True)
        notes.append(f"{spec.data_path} has no validation files, but the run validates; {stage}")
    return notes
