"""Views as `launcher submit` makes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.unit.test_view import SHARD, c4, shard

OPTIONS = "--gpu h200 --runtime bare --gpus-per-node 3 --batch-size 2 --yes --data c4 --tokenizer sample"


@pytest.fixture
def submit(launch: Launch, workplace: Path, fake_slurm: Callable[[str, str], Path]) -> Launch:
    fake_slurm("sbatch", "echo 7")
    c4(workplace / "c4", 8)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return launch("submit", *OPTIONS.split(), *options)

    return run


def view_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "data" / "en").iterdir())


def test_submit_makes_the_view(submit: Launch, workplace: Path) -> None:
    done = submit("--name", "one")
    assert done.returncode == 0, done.stderr
    run = workplace / "runs" / "one"
    assert view_in(run) == [*(shard(index) for index in range(6)), shard(0, "validation")]
    assert all((run / "data" / "en" / name).samefile(workplace / "c4" / "en" / name) for name in view_in(run))
    assert json.loads((run / "job" / "node.json").read_text())["placed"]["data"] == f"{run}/data"
    header = (run / "data" / "README.md").read_text()
    assert "- config_name: en\n" in header and "split: validation" in header
    (workplace / "c4" / "en" / shard(0, "validation")).unlink()
    assert submit("--name", "two").returncode == 0
    assert "validation" not in (workplace / "runs" / "two" / "data" / "README.md").read_text()


def test_a_dry_run_names_the_view_and_writes_nothing(submit: Launch, workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    done = submit("--dry-run", "--name", "one")
    assert f"# Data: 6 train and 1 validation files of {workplace}/c4, for 3 data-parallel ranks\n" in done.stdout
    assert f"--dataloader.dataset_path={workplace}/runs/one/data" in done.stdout
    assert f'dataset_path = "{workplace}/runs/one/data"' in done.stdout
    assert sorted(workplace.rglob("*")) == before


def test_a_run_toml_submitted_again_gets_a_view_of_what_is_there_now(submit: Launch, launch: Launch, workplace) -> None:
    assert submit("--name", "one", "--data-part", "2/2").returncode == 0
    assert view_in(workplace / "runs" / "one")[:-1] == [shard(index) for index in (3, 4, 5)]
    for index in range(8, 13):
        (workplace / "c4" / "en" / shard(index)).write_bytes(SHARD)
    done = launch("submit", "runs/one/run.toml", "--name", "again", "--yes")
    assert done.returncode == 0, done.stderr
    assert view_in(workplace / "runs" / "again")[:-1] == [shard(index) for index in range(6, 12)]


def test_streaming_from_the_hub_has_no_view(submit: Launch, workplace: Path) -> None:
    assert submit("--name", "one", "--data", "hub").returncode == 0
    run = workplace / "runs" / "one"
    assert not (run / "data").exists()
    assert json.loads((run / "job" / "node.json").read_text())["placed"]["data"] == "hub"


def test_the_sample_is_read_through_a_view(launch: Launch, workplace: Path) -> None:
    options = "--gpu cpu --recipe debug --gpus-per-node 3 --batch-size 2 --local --dry-run --json"
    done = launch("submit", *options.split())
    answer = json.loads(done.stdout)
    assert answer["data"].startswith("3 train and 1 validation files of ")
    assert all(f"{answer['run_dir']}/data" in command for command in answer["torchrun"].values())
