"""--data s3://bucket/prefix: the run streams C4 from object storage (moto's server), as the real trainer reads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.config.runtime import mounts
from launcher.config.spec import PlacedRun
from launcher.stage import view
from launcher.titan import Refused
from launcher.titan.data import check_streamed
from tests.conftest import Launch
from tests.stage.test_s3 import ADDRESS, Store, server, store
from tests.unit import test_view as view_of
from tests.unit.node_place import Place, started
from tests.unit.test_titan_command import LLAMA3_8B, changed

__all__ = ["server", "store"]  # fixtures
PYTHONS = os.environ.get("LAUNCHER_TRAIN_PYTHON", sys.executable).split(":")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
SUBMIT = ("submit", "--local", "--recipe", "debug", "--data", ADDRESS, "--tokenizer", "sample")
ENV = [word for name in CREDENTIALS for word in ("--env", name)]


def a_spec(address: str = ADDRESS, gpus: int = 4, **values: Any) -> PlacedRun:
    return view_of.a_spec(address, gpus=gpus, **{"recipe__steps": 1, "recipe__seq_len": 64, **values})


def train(spec: PlacedRun) -> list[int]:
    """The numbers of the train files in the run's view."""
    return [int(name.split(".")[1].split("-")[0]) for name in view.train_files(spec)]


# ---------------------------------------------------------------------------------------------------------- the view


@pytest.mark.parametrize(("gpus", "part", "numbers"), [(4, "", range(12)), (5, "", range(10)), (4, "2/3", range(4, 8))])
def test_the_choice_is_that_of_a_directory(gpus: int, part: str, numbers: range, store: Store) -> None:
    os.environ.pop("SSL_CERT_FILE", None)
    before = dict(os.environ)
    spec, notes = view.plan(a_spec(f"{ADDRESS}/", gpus, job__data_part=part))
    assert dict(os.environ) == before, "a job on this machine has certificates of its own"
    assert train(spec) == list(numbers)
    assert all(target == f"{ADDRESS}/en/{name}" for name, target in spec.view.items())
    assert not [note for note in notes if "more than once" not in note]
    contained = a_spec(job__runtime="pyxis", job__image="/data/titan.sqsh")
    assert not any("s3://" in mount or ADDRESS in mount for mount in mounts(contained))


def test_more_ranks_than_objects_and_parts_that_cannot_be(store: Store) -> None:
    spec, notes = view.plan(a_spec(gpus=16))
    assert train(spec) == list(range(12)) and "12 train files for 16 data-parallel ranks" in notes[0]
    with pytest.raises(LauncherError, match="need 32 train files, there are 12") as caught:
        view.plan(a_spec(gpus=16, job__data_part="1/2"))
    assert "another --data" in caught.value.fix


def test_objects_that_are_no_data_are_left_out(store: Store) -> None:
    store.put("en/c4-train.00000-of-00012.json.gz", b"")
    store.put("en/c4-train.00001-of-00012.json.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    spec, notes = view.plan(a_spec(gpus=2))
    assert train(spec) == list(range(2, 12))
    assert "c4-train.00000-of-00012.json.gz is empty, and 1 more: left out" in notes[0]
    assert f"aws s3 sync DIR {ADDRESS}" in notes[0]


def test_a_bucket_without_train_files_and_another_data_set(store: Store) -> None:
    store.put("other/en/c4-validation.00000-of-00001.json.gz", b"\x1f\x8b")
    with pytest.raises(LauncherError, match="holds no train file"):
        view.plan(a_spec(f"{ADDRESS}/other"))
    with pytest.raises(LauncherError, match="only C4 is streamed"):
        view.plan(a_spec(recipe__dataset="c4_test"))


def test_the_run_directory(store: Store, launch: Launch, workplace: Path) -> None:
    """Without any option for credentials submit says which there are; with them no file names a secret's value."""
    shown = launch(*SUBMIT, "--dry-run")
    assert shown.returncode == 0 and "--env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY" in shown.stderr
    assert f"12 train and 1 validation files of {ADDRESS}, for 2 data-parallel ranks" in shown.stdout
    shown = launch(*SUBMIT, *ENV, "--dry-run")
    assert shown.returncode == 0 and "no credentials" not in shown.stderr
    done = launch(*SUBMIT, *ENV, "--name", "r", "--python", "/bin/true")
    assert done.returncode == 0, done.stderr
    run = workplace / "runs/r"
    assert [path.name for path in (run / "data").iterdir()] == ["README.md"]
    assert json.loads((run / "job/node.json").read_text())["placed"]["data"] == str(run / "data")
    assert "s3 = titan.s3:S3FileSystem" in (run / "job/titan_s3-1.dist-info/entry_points.txt").read_text()
    assert f'data = "{ADDRESS}"' in (run / "run.toml").read_text()
    holding = []
    for path in run.rglob("*"):
        with suppress(OSError):  # the job removes its secrets meanwhile
            holding += [(path.name, path.stat().st_mode & 0o777)] if b"very-secret" in path.read_bytes() else []
    assert set(holding) <= {("secret.env", 0o600)}
    again = launch("submit", str(run / "run.toml"), "--name", "again", "--dry-run")
    assert again.returncode == 0 and f"validation files of {ADDRESS}" in again.stdout


# ----------------------------------------------------------------------------------------------------- on the nodes


def a_view(folder: Path) -> Path:
    view.write(
        folder,
        {name: f"{ADDRESS}/en/{name}" for name in [f"c4-train.{n:05d}-of-00012.json.gz" for n in (0, 1)]},
    )
    return folder


def test_the_node_reads_the_beginning_of_an_object(store: Store, tmp_path: Path, monkeypatch) -> None:
    folder = a_view(tmp_path / "data")
    assert check_streamed(folder, ADDRESS) == 2
    store.put("en/c4-train.00000-of-00012.json.gz", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Refused, match="not a gzip file"):
        check_streamed(folder, ADDRESS)
    store.client.delete_object(Bucket="corpora", Key="text/c4/en/c4-train.00000-of-00012.json.gz")
    with pytest.raises(Refused, match="FileNotFoundError"):
        check_streamed(folder, ADDRESS)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Refused, match="NoCredentialsError") as refused:
        check_streamed(folder, ADDRESS)
    assert "--env AWS_ACCESS_KEY_ID" in refused.value.fix


FAKE_S3FS = """
class S3FileSystem:
    def __init__(self, **options):
        pass
    def cat_file(self, url, start, end):
        return b"\\x1f\\x8b"
"""


def test_the_job_finds_the_file_system_on_a_gpu_node_too(tmp_path: Path) -> None:
    """There nothing else of the launcher's is imported by the trainer."""
    place = Place(tmp_path, changed(LLAMA3_8B, nodes=1))
    place.change(data=str(a_view(tmp_path / "data")), data_source=ADDRESS)
    refused = place.refused()
    assert "s3fs, which is not installed" in refused
    assert f"launcher stage c4 --from {ADDRESS} --to DIR --files 2, then --data DIR" in refused
    (place.site / "s3fs.py").write_text(FAKE_S3FS)
    arguments, env, _ = started(place.start())
    assert not any(argument.startswith("titan.") for argument in arguments)
    assert env["PYTHONPATH"].split(os.pathsep)[0] == f"{place.run_dir}/job"
    assert env["HF_HUB_OFFLINE"] == "1" and place.record()["data_files"] == 2


@pytest.mark.parametrize("python", PYTHONS)
def test_the_real_trainer_streams_its_data(python: str, store: Store, launch: Launch, workplace, c4_files) -> None:
    if subprocess.run([python, "-c", "import torchtitan, s3fs"], capture_output=True).returncode:
        pytest.skip(f"{python} has no torchtitan or no s3fs: set LAUNCHER_TRAIN_PYTHON, pip install s3fs there")
    options = ["--steps", "4", "--set", "recipe.log_freq=1", "--name", "r", "--python", python, *ENV, "--follow"]
    done = launch(*SUBMIT, *options, timeout=400)
    said = done.stdout + done.stderr
    logs = "\n".join(path.read_text(errors="replace") for path in (workplace / "runs/r/logs").glob("*.*"))
    assert done.returncode == 0, said[-3000:] + logs[-3000:]
    assert re.search(r"step: +4 ", logs) and "very-secret" not in said + logs
    (record,) = (workplace / "runs/r/nodes").glob("0*.json")
    facts = json.loads(record.read_text())
    assert facts["data_source"] == ADDRESS and facts["data_files"] == 13
    assert facts["environment"]["HF_HUB_OFFLINE"] == "1"
