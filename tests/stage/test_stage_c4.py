"""`launcher stage c4` from a Hub that behaves: what is planned, what comes, what a second call does."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.stage.c4 import demand_from, plan_c4
from launcher.stage.fetch import fetch
from launcher.stage.progress import JOBS, Progress, each
from launcher.stage.shards import TOKENS_PER_FILE, files_for
from launcher.stage.source import RemoteFile
from launcher.stage.view import files_needed
from tests.conftest import Launch
from tests.stage import hub_server
from tests.stage.hub_server import Hub


def stage_c4(target: Path, jobs: int = JOBS, **wanted: Any) -> Any:
    """What the command does, without a process."""
    plan = plan_c4(target, **wanted)
    return fetch(target, plan.repo, plan.files, "c4", jobs, plan.train_files_in_all)


def staged(target: Path) -> list[str]:
    """Paths of everything that has a final name."""
    return sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file() and ".staged" not in p.parts)


def train(*numbers: int) -> list[str]:
    return [f"en/c4-train.{n:05d}-of-00012.json.gz" for n in numbers]


def test_files_come_verified_with_readme_and_manifest(launch: Launch, hub: Hub, workplace: Path, c4_files):
    """And the content servers never see the token."""
    hub.tokens.add("hf_mine")
    (workplace / "c4/lost+found").mkdir(parents=True)  # as a new file system has it
    done = launch("stage", "c4", "--to", "c4", "--files", "3", "--json", HF_TOKEN="hf_mine")
    assert done.returncode == 0, done.stderr
    target = workplace / "c4"
    assert staged(target) == ["README.md", *train(0, 1, 2)]
    assert all((target / name).read_bytes() == c4_files[name] for name in staged(target))
    manifest = json.loads((target / ".staged/manifest.json").read_text())
    assert manifest["revision"] == "a" * 40 and manifest["train_files_in_all"] == 12
    assert manifest["source"] == "hf://datasets/allenai/c4"
    assert sorted(manifest["files"]) == staged(target)
    assert json.loads(done.stdout)["downloaded"] == 4
    seen = {where: {r.authorization for r in hub.requests if r.where == where} for where in ("api", "hub", "cdn")}
    assert seen == {"api": {"Bearer hf_mine"}, "hub": {"Bearer hf_mine"}, "cdn": {""}}
    assert not list((target / ".staged/partial").iterdir())


def test_later_calls_keep_the_revision_and_what_is_there(hub: Hub, tmp_path: Path):
    stage_c4(tmp_path / "c4", files=2)
    hub.requests.clear()
    outcome = stage_c4(tmp_path / "c4", files=2)
    assert (outcome.present, outcome.downloaded) == (3, 0)
    assert {request.where for request in hub.requests} == {"api"}
    hub.commits["dataset", "allenai/c4"] = "c" * 40
    with pytest.raises(LauncherError, match="no revision"):  # this Hub knows only the newest commit
        stage_c4(tmp_path / "c4", files=3)
    hub.commits["dataset", "allenai/c4"] = "a" * 40
    outcome = stage_c4(tmp_path / "c4", files=3, validation=True)
    assert (outcome.present, outcome.downloaded) == (3, 2)
    assert "en/c4-validation.00000-of-00001.json.gz" in staged(tmp_path / "c4")


def test_what_does_not_mix(launch: Launch, hub: Hub, tmp_path: Path):
    stage_c4(tmp_path / "c4", files=1)
    done = launch("stage", "tokenizer", "--to", str(tmp_path / "c4"))
    assert done.returncode == 3 and "holds c4 from hf://datasets/allenai/c4" in done.stderr
    hub.commits["dataset", "allenai/c4"] = "c" * 40
    with pytest.raises(LauncherError, match="holds revision a"):
        stage_c4(tmp_path / "c4", files=1, revision="main")


def test_files_that_another_program_brought_are_checked_and_kept(hub: Hub, tmp_path: Path, c4_files):
    target = tmp_path / "c4"
    (target / "en").mkdir(parents=True)
    good, bad = train(4, 7)
    (target / good).write_bytes(c4_files[good])
    (target / bad).write_bytes(c4_files[bad][:-1] + b"?")
    outcome = stage_c4(target, files=2)
    assert (outcome.present, outcome.downloaded) == (1, 2)  # README.md, and the one with other bytes
    assert staged(target) == ["README.md", good, bad]
    assert (target / bad).read_bytes() == c4_files[bad]
    assert not hub.asked(good)


def test_dry_run_writes_nothing(launch: Launch, hub: Hub, workplace: Path):
    done = launch("stage", "c4", "--to", "c4", "--for", "nodes=3,gpus=4,steps=10,batch=5", "--dry-run")
    assert done.returncode == 0 and not (workplace / "c4").exists()
    assert done.stdout.splitlines() == ["README.md", *train(*range(12))]
    assert "are 1 file, and 12 are a multiple of its 12 data-parallel ranks" in done.stderr
    assert "12 of 12 train files" in done.stderr and "2.05 G tokens" in done.stderr


@pytest.mark.parametrize(
    ("text", "ranks", "files"),
    [
        ("nodes=17,gpus=4,steps=100,batch=5", 68, 68),  # two files have the tokens; 68 ranks want one each
        ("nodes=17,gpus=4,steps=10000,batch=5", 68, 204),  # 163 files' tokens, rounded up
        ("nodes=9,gpus=4,steps=1000,batch=5", 36, 36),
        ("nodes=9,gpus=4,steps=1000,batch=5,tp=4", 9, 9),
        ("nodes=18,gpus=4,steps=100000,batch=5", 72, 1008),  # more than all of C4: what divides evenly
        ("nodes=464,gpus=4,steps=100,batch=1", 1856, 1024),
    ],
)
def test_files_for_a_run(text: str, ranks: int, files: int):
    spec, _ = demand_from(text)
    assert (spec.data_parallel, files_needed(spec, 1024)) == (ranks, files)
    assert files_for(ranks * TOKENS_PER_FILE, ranks, 2048) == ranks
    assert files_for(ranks * TOKENS_PER_FILE + 1, ranks, 4096) == 2 * ranks


def test_files_for_a_run_that_was_made(launch: Launch, hub: Hub, workplace: Path):
    (workplace / "run.toml").write_text(
        "run = 1\n[profile]\ngpus_per_node = 4\n[recipe]\nsteps = 10\ntensor_parallel = 2\n[job]\nnodes = 3\n"
    )
    done = launch("stage", "c4", "--to", "c4", "--for", "run.toml", "--dry-run", "--json")
    assert json.loads(done.stdout)["train_files"] == 6


def test_a_listing_of_several_pages_is_read_to_its_end(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hub_server, "PAGE", 5)
    assert len(stage_c4(tmp_path / "c4", everything=True).manifest.files) == 13


def test_on_a_terminal_the_progress_stays_on_its_line(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def work(_file: RemoteFile, progress: Progress) -> None:
        progress.add(1000)
        progress.say("a: again [x]")

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert list(each("staging", [RemoteFile("a", 1000)], work))
    shown = screen.getvalue()
    assert "staging 0 of 1 file: " in shown and "\na: again [x]\n" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", shown)
    assert shown.count("\n") == 2  # the words, and the end
