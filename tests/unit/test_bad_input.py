"""Bad input gets the thing, the cause and the next command, a documented exit code, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.files import write_text
from tests.conftest import Launch, squashfs_head
from tests.unit.outcomes import write_run

GOOD = ("submit", "--gpu", "b200", "--image", "titan.sqsh", "--data", "sample")
OF_THE_SCRIPT = ("run_dir", "job_id", "signal", "UID", "BASH_ENV", "SLURM_JOB_ID", "TITAN_HEAD_ADDR", "PATH")


def nothing_left(workplace: Path) -> bool:
    return not (workplace / "runs").exists() or not list((workplace / "runs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--image", "none.sqsh"), ExitStatus.INVALID, "no such file"),
        (("--image", "."), ExitStatus.INVALID, "not a file"),
        (("--image", "empty.sqsh"), ExitStatus.INVALID, "the file is empty"),
        (("--image", "text.sqsh"), ExitStatus.INVALID, "not a squashfs file"),
        (("--image", "short.sqsh"), ExitStatus.INVALID, "cut off: 2,000 of 4,096 bytes"),
        (("--image", ""), ExitStatus.USAGE, "must not be empty"),
        (("--image", "docker://ubuntu"), ExitStatus.INVALID, "registry"),
        (("--image", "nvcr.io/nvidia/pytorch:25.01-py3"), ExitStatus.INVALID, "image convert nvcr.io/nvidia/pytorch:"),
        (("--image", "docker://nvcr.io#nvidia/pytorch:1"), ExitStatus.INVALID, "convert nvcr.io/nvidia/pytorch:1 "),
        (("--image", "ghcr.io/ours/titan"), ExitStatus.INVALID, "every node would fetch and unpack"),
        (("--image", "titan:stable-arm64"), ExitStatus.INVALID, "launcher image convert titan:stable-arm64"),
        (("--image", "images.d/titan"), ExitStatus.INVALID, "images.d/titan: no such file"),
        (("--image", "titan.sqsh", "--runtime", "apptainer"), ExitStatus.INVALID, "not an Apptainer image"),
        (("--image", "titan.sqsh", "--runtime", "bare"), ExitStatus.INVALID, "starts no container"),
        (("--image", "titan.sqsh", "--local"), ExitStatus.INVALID, "starts no container"),
        (("--runtime", "pyxis"), ExitStatus.INVALID, "an image is needed"),
        (("--nodes", "0"), ExitStatus.INVALID, "at least 1 and at most 10,000"),
        (("--nodes", "many"), ExitStatus.USAGE, "not a valid integer"),
        (("--gpus-per-node", "0"), ExitStatus.INVALID, "at least 1"),
        (("--gpus-per-node", "100000"), ExitStatus.INVALID, "at most 64"),
        (("--batch-size", "0"), ExitStatus.INVALID, "recipe.local_batch_size"),
        (("--steps", "-1"), ExitStatus.INVALID, "recipe.steps"),
        (("--gpu", "b20"), ExitStatus.NOT_FOUND, "there is no profile 'b20'"),
        (("--gpu", "./none.toml"), ExitStatus.NOT_FOUND, "No such file"),
        (("--recipe", "lama3-8b"), ExitStatus.NOT_FOUND, "there is no recipe 'lama3-8b'"),
        (("--mount", "/a,b:/c"), ExitStatus.INVALID, "Pyxis separates mounts at commas"),
        (("--mount", "/a\nb:/c"), ExitStatus.INVALID, "newline"),
        (("--mount", "/a"), ExitStatus.INVALID, "SRC:DST"),
        (("--mount", "a:/b"), ExitStatus.INVALID, "absolute"),
        (("--mount", "/a:/b:ro:x"), ExitStatus.INVALID, "SRC:DST"),
        (("--mount", "/a:/b:RO!"), ExitStatus.INVALID, "flags"),
        (("--name", "$(touch pwned)"), ExitStatus.INVALID, "job.name"),
        (("--name", "größe"), ExitStatus.INVALID, "job.name"),
        (("--name", "x" * 300), ExitStatus.INVALID, "job.name"),
        (("--env", "NOT_SET_ANYWHERE"), ExitStatus.INVALID, "no such variable in your environment"),
        *((("--env", f"{name}=x"), ExitStatus.INVALID, "[env-reserved]") for name in OF_THE_SCRIPT),
        (("--set", "steps"), ExitStatus.USAGE, "not KEY=VALUE"),
        (("--set", "a b=3"), ExitStatus.INVALID, "not a torchtitan setting"),
        (("--partition", "a b"), ExitStatus.INVALID, "job.partition"),
        (("--time", "soon"), ExitStatus.INVALID, "time limit"),
        (("--nodelist", "a;b"), ExitStatus.INVALID, "job.nodelist"),
        (("--segment", "-1"), ExitStatus.INVALID, "must be at least 0"),
        (("--data", "gs://bucket/c4"), ExitStatus.INVALID, "absolute path"),
        (("--data", "s3://Bucket/c4"), ExitStatus.INVALID, "not an address of object storage"),
        (("--data", "s3://bucket/../c4"), ExitStatus.INVALID, "not an address of object storage"),
        (("--tokenizer", "hub"), ExitStatus.INVALID, "not fetched during a job"),
        (("--runs-dir", "a b"), ExitStatus.INVALID, "job.runs_dir"),
        (("--runs-dir", "titan.sqsh/runs"), ExitStatus.FILESYSTEM, "Not a directory"),
        (("--config", "none.toml"), ExitStatus.NOT_FOUND, "No such file"),
        (("none/run.toml",), ExitStatus.NOT_FOUND, "No such file"),
        (("mine.toml",), ExitStatus.INVALID, "not a run.toml"),
        (("--local", "--nodes", "2"), ExitStatus.INVALID, "one node"),
        (("--config", "mine.toml", "--gpus-per-node", "7"), ExitStatus.INVALID, "recipe.tensor_parallel = '2'"),
        (("--set", "recipe.dp_replicate=5"), ExitStatus.INVALID, "recipe.dp_replicate = '5'"),
        (("--nonsense",), ExitStatus.USAGE, "No such option"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_refused(
    arguments: tuple[str, ...], status: ExitStatus, said: str, launch: Launch, image: Path, fake_slurm: object
) -> None:
    workplace = image.parent
    (workplace / "empty.sqsh").touch()
    (workplace / "text.sqsh").write_text("hello, I am not an image at all\n" * 9)
    (workplace / "short.sqsh").write_bytes(squashfs_head(4096).ljust(2000, b"\0"))
    (workplace / "mine.toml").write_text("[recipe]\ntensor_parallel = 2\n")
    no_image = "--local" in arguments or arguments == ("--runtime", "pyxis") or "--runtime" in arguments
    done = launch(*(GOOD[:3] if no_image else GOOD), *arguments)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert nothing_left(workplace) and not (workplace / "pwned").exists()


def test_a_mistyped_command_is_answered_with_its_like(launch: Launch) -> None:
    for word, like in (("statsu", "Did you mean status?"), ("xyzzy", "No such command 'xyzzy'.\n")):
        done = launch(word)
        assert done.returncode == ExitStatus.USAGE and like in done.stderr


def without_roots_rights(*arguments: str) -> subprocess.CompletedProcess[str]:
    setpriv = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    return subprocess.run(
        [*setpriv, sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, check=False
    )


needs_setpriv = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")


@needs_setpriv
def test_somebody_elses_run_is_named_and_hides_none(workplace: Path) -> None:
    for name in ("mine", "theirs"):
        write_run(workplace / "runs" / name)
    theirs = workplace / "runs" / "theirs"
    theirs.chmod(0)
    os.chown(theirs, 65534, 65534)
    for command in (("list",), ("results", "--all"), ("report", "-o", "page.html")):
        done = without_roots_rights(*command)
        assert done.returncode == 0, done.stderr
        assert "theirs: skipped, because it cannot be read: Permission denied" in done.stderr
    done = without_roots_rights("results", "theirs")
    assert (done.returncode, "Permission denied" in done.stderr) == (ExitStatus.FILESYSTEM, True)


@needs_setpriv
def test_an_image_that_cannot_be_read_and_a_directory_that_cannot_be_written(image: Path, fake_slurm: object) -> None:
    folder = image.parent / "theirs"
    folder.mkdir()
    (folder / "titan.sqsh").write_bytes(image.read_bytes())
    (folder / "titan.sqsh").chmod(0o600)
    for path in (folder, folder / "titan.sqsh"):
        os.chown(path, 65534, 65534)

    unreadable = without_roots_rights("submit", "--gpu", "b200", "--image", "theirs/titan.sqsh")
    assert unreadable.returncode == ExitStatus.FILESYSTEM, unreadable
    assert "Permission denied" in unreadable.stderr
    unwritable = without_roots_rights(*GOOD, "--runs-dir", "theirs")
    assert unwritable.returncode == ExitStatus.FILESYSTEM, unwritable
    assert "Permission denied" in unwritable.stderr and "--runs-dir" in unwritable.stderr
    assert os.listdir(folder) == ["titan.sqsh"]


def test_a_full_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LauncherError, match="No space left on device") as caught:
        write_text(workplace / "x", "text")
    assert caught.value.status is ExitStatus.FILESYSTEM and "df -h" in caught.value.fix
    assert os.listdir(workplace) == ["home"]


def test_a_run_name_that_exists_and_one_that_is_misspelt(launch: Launch, image: Path, fake_slurm) -> None:
    fake_slurm("sbatch", "echo 42")
    assert launch(*GOOD, "--name", "acceptance").returncode == ExitStatus.OK
    run_toml = image.parent / "runs" / "acceptance" / "run.toml"
    before = run_toml.read_text()
    again = launch(*GOOD, "--name", "acceptance", "--nodes", "3")
    assert again.returncode == ExitStatus.EXISTS and "--name" in again.stderr
    assert run_toml.read_text() == before
    assert "did you mean acceptance?" in launch("status", "aceptance").stderr


@pytest.mark.parametrize("command", ["status", "watch", "logs", "cancel", "results"])
def test_runs_that_do_not_exist(command: str, launch: Launch, workplace: Path) -> None:
    for name in ("none", "x" * 300, "../..", "a b", "/", ""):
        done = launch(command, name, "--runs-dir", "nowhere")
        assert (done.returncode, "no run" in done.stderr) == (ExitStatus.NOT_FOUND, True), done.stderr


def test_damaged_run_directories_do_not_stop_the_list(launch: Launch, workplace: Path) -> None:
    intents = {"half": '{"sched', "list": "[]", "binary": "\xff\0", "words": '{"at": "soon"}', "good": '{"at": 2}'}
    intents["bare"] = '{"at": 1, "scheduler": "slurm"}'
    (workplace / "runs" / "empty").mkdir(parents=True)
    (workplace / "runs" / "file").touch()
    for name, text in intents.items():
        (workplace / "runs" / name).mkdir()
        (workplace / "runs" / name / "intent.json").write_text(text, encoding="latin-1")
    listed = launch("list", "--json")
    assert [row["run"] for row in json.loads(listed.stdout)] == ["good", "bare"], listed.stderr


def test_dry_run_and_render_touch_nothing(launch: Launch, image: Path) -> None:
    before = sorted(p for p in image.parent.rglob("*"))
    dry = launch(*GOOD, "--nodes", "2", "--dry-run")
    assert dry.returncode == 0 and dry.stdout.startswith("#!/bin/bash\n")
    assert "torch.distributed.run" in dry.stdout and "--container-image=" in dry.stdout
    shown = json.loads(launch(*GOOD, "--dry-run", "--json").stdout)
    assert shown["script"].startswith("#!/bin/bash\n") and len(shown["torchrun"]) == 2
    rendered = launch("render", "--gpu", "gb200", "--image", "/not/here.sqsh", "--name", "x")
    assert rendered.returncode == 0 and "--container-image=/not/here.sqsh" in rendered.stdout
    assert sorted(p for p in image.parent.rglob("*")) == before
