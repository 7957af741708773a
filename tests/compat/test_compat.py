"""What earlier versions have written is read, continued and repeated, and `--json` keeps its keys and types.

v0.1 was made by make.py with the version whose output it is, answers.json included: what that version said of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from launcher import cli
from tests.compat import make
from tests.conftest import ROOT, in_process

VERSIONS = sorted(path for path in Path(__file__).parent.glob("v*") if path.is_dir())
ANSWERS = [(version, answer) for version in VERSIONS for answer in json.loads((version / "answers.json").read_text())]
# Words may become plainer, and these change with the machine and the day: of them the type has to stay.
FREE = {
    *("age_s", "data_share", "date", "advice", "basis", "block", "cause", "command", "differs", "explained", "fix"),
    *("headline", "job.name", "lines", "line", "mtime_ns", "name", "note", "notes", "problems", "reason", "reasons"),
    *("said", "script", "source", "summary", "text", "torchrun", "tps_high", "value", "waiting", "what", "why", "run"),
    *("page", "figures", "settings", "until", "huggingface_hub", "click", "jinja2", "rich", "torch", "torchtitan"),
    *("python", "launcher"),
    "counted_by",  # depended on what was installed beside the launcher
}


REPLACED = {"cluster use": "launcher init"}  # commands that are gone: exit code 2, with what to use


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A working directory with everything that a version left there, on the day it left it: bad nodes expire."""

    def make_it(version: Path) -> Path:
        since_s = time.time() - json.loads((version / "made.json").read_text())["at"]
        clock = time.time
        monkeypatch.setattr(time, "time", lambda: clock() - since_s)
        for path in version.rglob("*"):
            target = tmp_path / path.relative_to(version)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                target.symlink_to(os.readlink(path))
            elif path.is_dir():
                target.mkdir(exist_ok=True)
            elif path.suffix in (".gz", ".sqsh"):
                shutil.copyfile(path, target)
            else:
                text = path.read_bytes().replace(b"@PLACE@", os.fsencode(tmp_path))
                target.write_bytes(text.replace(b"@CHECKOUT@", os.fsencode(ROOT)))
        make.fake_slurm(tmp_path)
        for name, value in make.environment(tmp_path, ROOT).items():
            monkeypatch.setenv(name, value)
        for name in ("XDG_CONFIG_HOME", "LAUNCHER_RUNS_DIR", "LAUNCHER_CONFIG"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make_it


def ask(line: str) -> tuple[int, Any, str]:
    """Runs a command in process: its exit code, the JSON that it printed, and its errors."""
    done = in_process(shlex.split(line), {})
    return done.returncode, make.values(done.stdout), done.stderr


def lost(before: Any, now: Any, where: str = "", free: bool = False) -> list[str]:
    """What of `before` is not in `now`: keys, types, and values that are facts."""
    if isinstance(before, dict) and isinstance(now, dict):
        gone = [f"{where}.{key} is gone" for key in before.keys() - now.keys()]
        return gone + [
            problem
            for key in before.keys() & now.keys()
            for problem in lost(before[key], now[key], f"{where}.{key}", free or key in FREE)
        ]
    if isinstance(before, list) and isinstance(now, list):
        if free:  # there may be more or fewer of them, with the same keys and types
            kept = [item for item in before if not now or any(not lost(item, other, free=True) for other in now)]
            return [] if kept == before else [f"{where}: none is like one of {before!r}"]
        if len(before) != len(now):
            return [f"{where}: {len(now)} instead of {len(before)}"]
        return [p for at, pair in enumerate(zip(before, now, strict=True)) for p in lost(*pair, f"{where}[{at}]")]
    if before is None or now is None:
        return [] if free or before is now else [f"{where}: {now!r} instead of {before!r}"]
    kinds = [float if type(value) is int else type(value) for value in (before, now)]
    if kinds[0] is not kinds[1]:
        return [f"{where}: a {kinds[1].__name__} instead of a {kinds[0].__name__}"]
    same = before == now or (kinds[0] is float and now == pytest.approx(before))
    return [] if free or same else [f"{where}: {now!r} instead of {before!r}"]


@pytest.mark.parametrize(("version", "answer"), ANSWERS, ids=[answer["command"] for _, answer in ANSWERS])
def test_what_was_said_is_still_said(place: Any, version: Path, answer: dict[str, Any]) -> None:
    here = place(version)
    code, said, errors = ask(answer["command"])
    if instead := REPLACED.get(" ".join(answer["command"].split()[:2])):
        assert (code, instead in errors) == (2, True)
        return
    assert code == answer["code"], errors
    said = json.loads(json.dumps(said).replace(str(here), "@PLACE@").replace(str(ROOT), "@CHECKOUT@"))
    assert lost(answer["said"], said) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_that_was_queued_before_an_upgrade_ends_after_it(place: Any, version: Path) -> None:
    run = place(version) / "runs" / "waiting"
    make._ended(run, 0, "", "")
    code, said, _ = ask("status waiting --json")
    assert (code, said["state"]) == (0, "COMPLETED")
    code, said, _ = ask("results waiting --json")
    assert (code, said["step"], said["nodes"]) == (0, 100, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_staging_goes_on_where_an_earlier_version_was_stopped(
    place: Any, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place(version)
    with make._hub(here) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        code, said, errors = ask("stage c4 --to c4-half --files 4 --json")
    assert (code, said["present"], said["downloaded"]) == (0, 4, 1), errors
    (new,) = {path.name for path in (here / "c4-half" / "en").iterdir()} - {
        p.name for p in (version / "c4-half" / "en").iterdir()
    }
    assert (here / "c4-half" / "en" / new).read_bytes() == (here / "c4" / "en" / new).read_bytes()
    assert not list((here / "c4-half" / ".staged" / "partial").iterdir())
    assert ask("stage verify c4-half --json")[0] == 0


def test_every_command_that_prints_json_is_asked() -> None:
    context = click.Context(cli.launcher)

    def names(group: click.Group, before: str = "") -> list[str]:
        found = []
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                found += names(command, f"{before}{name} ")
            if command and any(parameter.name == "as_json" for parameter in command.params):
                found.append(f"{before}{name}")
        return found

    asked = {answer["command"] for _, answer in ANSWERS}
    # These need a Docker engine or a Hub, or are newer; their own tests hold their keys.
    elsewhere = {"init", *(f"image {name}" for name in ("build", "convert", "check", "lock", "sif"))}
    elsewhere |= {*(f"stage {name}" for name in ("c4", "tokenizer", "model")), "completion", "resume", "archive"}
    missing = [name for name in names(cli.launcher) if not any(line.startswith(f"{name} ") for line in asked)]
    assert set(missing) <= elsewhere
