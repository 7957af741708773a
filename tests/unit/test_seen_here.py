"""Data and tokenizers that the nodes' own check will refuse, and that are seen before the job queues."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from tests.conftest import Launch
from tests.unit.test_view import POINTER, c4, shard

Fake = Callable[[str, str], Path]
FILES = ("tokenizer.json", "tokenizer_config.json")


def submit(launch: Launch, image: Path, *options: str) -> tuple[int, str]:
    names = ["--gpu", "h200", "--recipe", "debug", "--gpus-per-node", "1", "--name", "r", "--yes"]
    done = launch("submit", "--image", str(image), *names, *options)
    return done.returncode, done.stderr


def tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("{}")
    return folder


def only_the_old_tokenizer(here: Path) -> None:
    for name in FILES:
        (here / "tok" / name).unlink()
    (here / "tok" / "tokenizer.model").write_text("IQ== 0")


def in_shards(data: bytes) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for path in (here / "c4" / "en").iterdir():
            path.write_bytes(data)

    return spoil


def other_names(here: Path) -> None:
    for path in (here / "c4" / "en").iterdir():
        path.rename(path.with_name(f"part-{path.name}.txt"))


def emptied(here: Path) -> None:
    (here / "c4").rename(here / "other")
    (here / "c4").mkdir()


def a_pointer(here: Path) -> None:
    (here / "tok" / FILES[0]).write_bytes(POINTER)


TOKENIZER = "--tokenizer {here}/tok/tokenizer.json"
UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "an empty directory": (emptied, "--data {here}/c4/README.md: No such file or directory"),
    "no shards": (other_names, "--data {here}/c4/en holds no *.json.gz"),
    "shards of text": (in_shards(b"text\n" * 3000), f"--data {{here}}/c4/en/{shard(0)} is not a gzip file"),
    "shards that Git LFS has not fetched": (in_shards(POINTER), "are Git LFS pointers, not data"),
    "tokenizer.model alone": (only_the_old_tokenizer, f"{TOKENIZER}: No such file"),
    "a tokenizer that Git LFS has not fetched": (a_pointer, f"{TOKENIZER} is a Git LFS pointer, not data"),
}


@pytest.mark.parametrize(("spoil", "said"), UNFIT.values(), ids=UNFIT.keys())
def test_what_every_node_would_refuse_needs_force(
    spoil: Callable[[Path], None], said: str, launch: Launch, fake_slurm: Fake, image: Path, workplace: Path
) -> None:
    fake_slurm("sbatch", "echo 7")
    c4(workplace / "c4")
    tokenizer(workplace / "tok")
    options = ("--data", "c4", "--tokenizer", "tok")
    assert submit(launch, image, *options, "--dry-run")[0] == 0
    spoil(workplace)
    code, stderr = submit(launch, image, *options)
    assert code == ExitStatus.INVALID and not (workplace / "runs").exists()
    assert said.format(here=workplace) in stderr and "-unfit]" in stderr
    assert "launcher stage" in stderr and "run.toml" not in stderr and "--force submits it anyway" in stderr
    code, stderr = submit(launch, image, *options, "--force")
    assert code == 0 and said.format(here=workplace) in stderr


def test_what_is_not_here_may_be_on_the_nodes(launch: Launch, fake_slurm: Fake, image: Path, workplace: Path) -> None:
    fake_slurm("sbatch", "echo 7")
    (workplace / "c4").mkdir()
    (workplace / "c4" / "README.md").write_text("---\nconfigs:\n- config_name: en\n---\n")
    (workplace / "c4" / "en").mkdir()
    (workplace / "c4" / "en" / shard(0)).symlink_to("/on/the/nodes/alone")
    for options in (("--data", "nowhere", "--tokenizer", "neither"), ("--data", "c4", "--tokenizer", "sample")):
        code, stderr = submit(launch, image, *options, "--dry-run")
        assert code == 0 and "warning: " in stderr and "unfit" not in stderr, stderr


def test_data_that_is_staged_nowhere_is_not_waited_for(
    launch: Launch, fake_slurm: Fake, image: Path, workplace: Path
) -> None:
    fake_slurm("sbatch", "echo 7")
    code, stderr = submit(launch, image, "--data", "nowhere", "--tokenizer", "neither")
    assert (code, (workplace / "runs").exists()) == (ExitStatus.INVALID, False)
    ways = (f"launcher stage c4 --to {workplace}/nowhere --files 1", "--data sample", "launcher stage tokenizer --to")
    assert "[path-absent]" in stderr and all(way in stderr for way in ways), stderr
    assert submit(launch, image, "--data", "nowhere", "--tokenizer", "neither", "--force")[0] == 0
    shown = ("--mount", f"{workplace}/tok:{workplace}/neither", "--data", "sample", "--tokenizer", "neither")
    tokenizer(workplace / "tok")
    assert submit(launch, image, *shown, "--name", "s")[0] == 0, "a mount may show it under that name"
    whole = ("--recipe", "llama3-8b", "--data", "sample", "--nodes", "2", "--gpus-per-node", "8", "--name", "t")
    code, stderr = submit(launch, image, *whole)
    assert code == 0, f"nor does generated text need a tokenizer: {stderr}"


def test_on_this_machine_it_cannot_work(launch: Launch, workplace: Path) -> None:
    (workplace / "tok").mkdir()
    run = ("--local", "--gpu", "cpu", "--recipe", "debug", "--data", "sample", "--tokenizer", "tok", "--json")
    checks = json.loads(launch("preflight", *run).stdout)["checks"]
    assert [check["certain"] for check in checks if check["code"] == "tokenizer-unfit"] == [True]


def in_the_hubs_cache(folder: Path, files: Path) -> Path:
    """As huggingface_hub lays out what it has downloaded: a snapshot is links to blobs beside it."""
    snapshot = folder / "snapshots" / "1588ec45"
    (folder / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in files.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(folder / "blobs" / str(number))
        link.symlink_to(Path(*[".."] * (len(link.relative_to(folder).parts) - 1)) / "blobs" / str(number))
    return snapshot


@pytest.mark.parametrize("option", ["--data", "--tokenizer"])
@pytest.mark.parametrize("linked", [False, True])
def test_the_hubs_cache_needs_the_one_mount_that_is_named(
    option: str, linked: bool, launch: Launch, fake_slurm: Fake, image: Path, workplace: Path
) -> None:
    """Also where the way to the cache has a link, which the container does not have."""
    fake_slurm("sbatch", "echo 7")
    files = c4(workplace / "c4") if option == "--data" else tokenizer(workplace / "tok")
    snapshot = in_the_hubs_cache(workplace / "disk" / "hub", files)
    if linked:
        (workplace / "cache").symlink_to("disk")
        snapshot = workplace / "cache" / snapshot.relative_to(workplace / "disk")
    given = {"--data": "sample", "--tokenizer": "sample"} | {option: str(snapshot)}
    options = [word for pair in given.items() for word in pair]
    code, stderr = submit(launch, image, *options)
    assert code == ExitStatus.INVALID and "which the container does not see" in stderr
    fix = re.search(r"--mount \S+:ro", stderr.split("try: ")[1])
    assert fix and fix[0] == f"--mount {workplace}/disk/hub/blobs:{snapshot.parent.parent}/blobs:ro"
    code, stderr = submit(launch, image, *options, *shlex.split(fix[0]))
    assert code == 0 and "container" not in stderr, stderr
