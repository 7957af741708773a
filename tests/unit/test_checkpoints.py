"""Which checkpoints of a run are whole, whose they are, and what the node check makes of them."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.base.errors import LauncherError
from launcher.config.render import render
from launcher.config.runtime import mounts
from launcher.config.spec import Job, PlacedRun, Profile, tables_of, validate
from launcher.preflight import here
from launcher.sweep.cells import _default_name
from launcher.titan import checkpoint_sizes, checkpoints
from launcher.titan.checkpoint_sizes import NO_METADATA
from launcher.titan.checkpoints import ASIDE, RECORD, folder_of, foreign, look, origin, record_of, set_aside, to_come
from launcher.titan.command import config_files, trainer_arguments
from launcher.titan.recipe import Recipe
from launcher.titan.weights import SHAPES
from tests.conftest import Launch
from tests.unit.checkpoint_files import metadata, write_checkpoint
from tests.unit.node_place import FAILED, Place, started
from tests.unit.test_titan_command import a_node, debug_node

__all__ = ["cpu"]


class Runs:
    """Touches a file where it is unpickled by something that calls what a pickle names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def link(path: Path) -> None:
    os.rename(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def says(data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / ".metadata").write_bytes(data)


UNREADABLE = ".metadata cannot be read"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to step-8, and what is said of it
    "cut": (lambda p: os.truncate(p / "__0_0.distcp", 12), "__0_0.distcp is cut: 12 of 40 bytes"),
    "missing": (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "not finished": (lambda p: (p / ".metadata").rename(p / ".metadata.tmp"), "it was not finished"),
    "no pickle": (says(b"\0" * 900), UNREADABLE),
    "empty": (says(b""), UNREADABLE),
    "another pickle": (says(pickle.dumps({"a": 1})), UNREADABLE),
    "no entries": (says(metadata({})), UNREADABLE),
    "64 GB of memo": (says(b"Nr\xff\xff\xff\xff."), UNREADABLE),
    "huge": (lambda p: os.truncate(p / ".metadata", checkpoints.MOST_METADATA + 1), UNREADABLE),
    "outside": (says(metadata({"../step-4/__0_0.distcp": 4})), "../step-4/__0_0.distcp is not a file of it"),
    "no name": (says(metadata({"\0\x1b[2J": 4})), r"\x00\x1b[2J is missing"),
    "a link for a file": (lambda p: link(p / "__0_0.distcp"), "__0_0.distcp is not a file of it"),
    "a link": (link, "it is a link"),
    "other name": (lambda p: p.rename(p.with_name("step-08")), "torchtitan would take it for step-8"),
    "copy": (lambda p: p.rename(p.with_name("old-step-8.bak")), "torchtitan would take it for step-8"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_checkpoint_is_named_and_set_aside(
    tmp_path: Path, harm: tuple[Callable[[Path], object], str]
) -> None:
    folder = tmp_path / "checkpoint"
    for step in (12, 4):
        write_checkpoint(folder, step)
    harm[0](write_checkpoint(folder, 8))
    (folder / "notes-on-step-9.txt").touch()
    whole, damaged = look(folder)
    assert whole == [4, 12]
    assert [(one.step, one.why) for one in damaged] == [(8, harm[1])]
    before = sorted(os.listdir(damaged[0].path)) if damaged[0].path.is_dir() else []
    set_aside(folder, damaged)
    assert look(folder) == ([4, 12], [])
    (moved,) = (folder / ASIDE).iterdir()
    assert moved.name == damaged[0].path.name and (sorted(os.listdir(moved)) if moved.is_dir() else []) == before
    set_aside(folder, [replace(damaged[0], path=write_checkpoint(folder, 8))])
    assert len(list((folder / ASIDE).iterdir())) == 2, "the second takes another name"


def test_a_last_checkpoint_in_the_hubs_format_is_left_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 8)
    (path / ".metadata").rename(path / checkpoints.INDEX)
    assert look(tmp_path) == ([8], [])


def test_nothing_of_a_pickle_is_executed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 8) / ".metadata"
    path.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert [one.why for one in look(tmp_path)[1]] == [".metadata cannot be read"]
    assert not (tmp_path / "ran").exists()


def test_a_file_system_that_fails_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 8)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="cannot be read"):
        look(tmp_path)


def test_the_reader_says_when_the_file_system_fails(tmp_path: Path) -> None:
    program = [sys.executable, checkpoint_sizes.__file__, str(tmp_path), "9"]  # a directory: EISDIR
    assert subprocess.run(program, capture_output=True).returncode not in (0, NO_METADATA)


def test_a_pickle_that_computes_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of a tuple in a tuple in a tuple, twice each time: one of 60 deep never ends."""
    path = write_checkpoint(tmp_path, 8) / ".metadata"
    deep = b"N\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    path.write_bytes(b"\x80\x04}" + deep + b"N\x86K\x01s.")
    monkeypatch.setattr(checkpoints, "CPU_S", 1)
    assert [one.why for one in look(tmp_path)[1]] == [".metadata cannot be read"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_stands_in_it_the_reader_ends_and_names_sizes(tmp_path: Path, data: st.DataObject) -> None:
    """In this process, and so without the bytes that ask for much memory: those are in HARMS."""
    good = metadata({"__0_0.distcp": 40})
    at = data.draw(st.integers(0, len(good) - 1))
    change = data.draw(st.binary(max_size=8).filter(lambda b: not {*b} & {*b"rjp\x8d\x8e\x96"}))
    text = data.draw(st.sampled_from([good[:at] + change + good[at + len(change) :], good[:at], change]))
    (tmp_path / "m").write_bytes(text)
    try:
        found = checkpoint_sizes.sizes(str(tmp_path / "m"))
    except Exception:
        return
    assert all(type(name) is str and type(size) is int and size >= 0 for name, size in found.items())


SHARED = {"checkpoint_dir": "/ck", "name": "one"}
RECORD_OF_36 = {"schema": 1, "run": "/runs/one", "model": "llama3 8B", "data_parallel": 36, "torchtitan": "0.2"}


# record, torchtitan, [job] -> what is of another kind
OTHERS: dict[str, tuple[dict[str, Any], str, dict[str, str], list[str]]] = {
    "its own": ({}, "0.2.2", {}, []),
    "no record": (dict.fromkeys(RECORD_OF_36), "0.2.2", {}, []),
    "flavor": ({"model": "llama3 70B"}, "0.2.2", {}, ["the model llama3 70B, not llama3 8B"]),
    "ranks": ({"data_parallel": 72}, "0.2.2", {}, ["data-parallel degree 72, not 36"]),
    "era": ({}, "0.3.0", {}, ["torchtitan 0.2, not 0.3"]),
    "version not known": ({}, "", {}, []),
    "another run's, by checkpoint.folder": ({"run": "/runs/two"}, "0.2.2", {}, []),
    "another run's, in the way": ({"run": "/runs/two"}, "0.2.2", SHARED, ["the run /runs/two, not /runs/one"]),
}


@pytest.mark.parametrize(("record", "version", "job", "wrong"), OTHERS.values(), ids=OTHERS)
def test_checkpoints_of_another_kind_are_known_by_their_record(
    record: dict[str, Any], version: str, job: dict[str, str], wrong: list[str]
) -> None:
    node = a_node()
    node["job"] |= job
    known = {key: value for key, value in (RECORD_OF_36 | record).items() if value is not None}
    assert foreign(known, node, version) == wrong
    assert foreign(origin(node, "0.3.0"), node, "0.3.1") == []


def test_room_is_wanted_for_as_many_as_lie_there_at_a_time() -> None:
    for needed, changes, whole in (
        (3, {}, []),
        (0, {"checkpoint_interval": 0}, []),
        (2, {"checkpoint_interval": 50}, []),
        (1, {"checkpoint_interval": 500}, []),
        (6, {"checkpoint_keep": 5}, []),
        (1, {}, [70, 80]),
        (1, {}, [70, 80, 90]),
        (0, {}, [90, 100]),
    ):
        recipe = {"checkpoint_interval": 10, "steps": 100, "checkpoint_keep": 2, **changes}
        assert to_come(recipe, whole) == needed


# --- settings ---------------------------------------------------------------------------------------------


def spec(recipe: Recipe | None = None, titan: dict[str, str] | None = None, **job: Any) -> PlacedRun:
    recipe = recipe or Recipe(checkpoint_interval=5)
    asked = Job(name="a", runs_dir="/runs", image="/i.sqsh", **job)
    return PlacedRun(job=asked, recipe=recipe, profile=Profile(device="cpu"), titan=titan or {})


REFUSED = {
    "at least 2: while one is written, the one before must stay": spec(Recipe(checkpoint_keep=1)),
    "must be an absolute path": spec(checkpoint_dir="ck"),
    "cannot be written in a Pyxis mount": spec(checkpoint_dir="/a,b"),
    "two places": spec(checkpoint_dir="/ck", titan={"checkpoint.folder": "x"}),
    "reports as the run's own": spec(titan={"checkpoint.keep-latest-k": "3"}),
    "does not divide 10 nodes": spec(nodes=9, spares=1, segment=9),
}


@pytest.mark.parametrize("why", REFUSED)
def test_settings_that_cannot_be_are_refused(why: str) -> None:
    with pytest.raises(LauncherError, match=why):
        validate(REFUSED[why])


def test_both_eras_save_while_training_goes_on_and_keep_as_many_as_asked() -> None:
    node = a_node({"checkpoint_interval": 5, "checkpoint_keep": 3})
    node["job"] |= {"checkpoint_dir": "/ck/it's", "name": "one"}
    wanted = ["enable", "interval=5", "async_mode=async", "keep_latest_k=3", "folder=/ck/it's/one"]
    assert {f"--checkpoint.{word}" for word in wanted} <= set(trainer_arguments(node, "0.3.0"))
    ((_, text),) = config_files(node, "0.2.2").items()
    assert 'folder = "/ck/it\'s/one"' in text and 'async_mode = "async"' in text and "keep_latest_k = 3" in text


def test_the_folder_is_found_in_old_and_new_runs() -> None:
    old = a_node()
    del old["job"]["checkpoint_dir"]
    assert folder_of(old) == Path("/runs/one/titan/checkpoint")
    assert folder_of({**old, "titan": {"checkpoint.folder": "/else/where"}}) == Path("/else/where")
    assert folder_of(tables_of(spec(checkpoint_dir="/ck"))) == Path("/ck/a")


def test_the_directory_is_mounted_to_be_written() -> None:
    made = replace(spec(checkpoint_dir="/ck"), sources={"/ck": "/mnt/ck"})
    assert "/mnt/ck:/ck" in mounts(made) and "/mnt/ck:/ck" in render(made)
    assert not any("/ck" in mount for mount in mounts(spec(checkpoint_dir="/ck/a", mounts=("/mnt:/ck",)))[:-1])


def test_old_sweeps_keep_their_names() -> None:
    plain = spec(Recipe())
    assert _default_name([plain]) != _default_name([spec(Recipe(checkpoint_keep=3))])
    fields = plain.values().keys() - {"recipe.checkpoint_keep", "job.checkpoint_dir"}
    assert "recipe.checkpoint_interval" in fields
    assert _default_name([plain]) == _default_name([spec(Recipe(checkpoint_keep=2), checkpoint_dir="")])


def test_the_options_make_the_run(launch: Launch, tmp_path: Path) -> None:
    asked = ("--checkpoint-every=50", "--keep=3", f"--checkpoint-dir={tmp_path}/ck", "--local", "--gpu=cpu")
    shown = json.loads(launch("config", "show", *asked, "--data=sample", "--json").stdout)
    keys = ("job.checkpoint_dir", "recipe.checkpoint_interval", "recipe.checkpoint_keep")
    assert [shown[key]["value"] for key in keys] == [f"{tmp_path}/ck", 50, 3]


def test_what_does_not_fit_is_said_before_the_run_queues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spec(Recipe(checkpoint_interval=50), checkpoint_dir=str(tmp_path))
    each = 12 * SHAPES["8B"].parameters
    assert 96e9 < each < 97e9
    monkeypatch.setattr(here, "free_bytes", lambda folder: 2 * each)
    assert here._checkpoint_space(made) == []
    monkeypatch.setattr(here, "free_bytes", lambda folder: 2 * each - 1)
    (found,) = here._checkpoint_space(made)
    assert (found.code, found.certain) == ("checkpoint-space-short", False) and found.facts["path"] == f"{tmp_path}/a"
    assert here._checkpoint_space(spec(Recipe())) == []
    (absent,) = [one for one in here.files(spec(checkpoint_dir="/no/such")) if one.facts.get("path") == "/no/such"]
    assert absent.code == here.ABSENT and absent.fix == "mkdir -p /no/such"


def test_plan_says_what_a_checkpoint_takes(launch: Launch) -> None:
    done = launch("plan", "--gpu", "gb200", "--nodes", "9", "--checkpoint-every", "10")
    assert "checkpoints 96.4 GB each, for a moment 3 of them" in done.stdout
    assert "checkpoints" not in launch("plan", "--gpu", "gb200", "--nodes", "9").stdout


# --- the node check ---------------------------------------------------------------------------------------


@pytest.fixture
def cpu(tmp_path: Path) -> Place:
    place = Place(tmp_path, debug_node())
    place.recipe(checkpoint_interval=4)
    return place


def test_the_node_sets_damaged_ones_aside_and_says_so(cpu: Place) -> None:
    folder = cpu.run_dir / "titan" / "checkpoint"
    write_checkpoint(folder, 4)
    os.truncate(write_checkpoint(folder, 8) / "__0_0.distcp", 12)
    done = cpu.start()
    started(done)
    assert "checkpoint step 8: __0_0.distcp is cut: 12 of 40 bytes" in done.stdout
    assert "training goes on from step 4" in done.stdout
    facts = cpu.record()
    assert facts["checkpoint_step"] == 4 and [one["name"] for one in facts["warnings"]] == ["checkpoint-damaged"]
    assert look(folder) == ([4], []) and (folder / ASIDE / "step-8").is_dir()
    assert json.loads((folder / RECORD).read_text()) == origin(cpu.node, "0.3.0")


def test_without_checkpoints_nothing_is_made(cpu: Place) -> None:
    cpu.recipe(checkpoint_interval=0)
    started(cpu.start())
    assert not (cpu.run_dir / "titan" / "checkpoint").exists() and "checkpoint_step" not in cpu.record()


def test_checkpoints_of_another_kind_stop_the_run_and_stay(cpu: Place) -> None:
    folder = cpu.run_dir / "titan" / "checkpoint"
    (write_checkpoint(folder, 4) / ".metadata").unlink()
    (folder / RECORD).write_text(json.dumps(origin(cpu.node, "0.2.2") | {"data_parallel": 4}))
    line = cpu.refused()
    assert "data-parallel degree 4, not 2; torchtitan 0.2, not 0.3" in line
    (found,) = cpu.record()["problems"]
    assert (found["name"], found["fault"]) == ("checkpoint-foreign", "run")
    assert (folder / "step-4").is_dir(), "what is not this run's is not touched"


def test_a_damaged_record_ends_no_check(tmp_path: Path) -> None:
    for text in ("", "[]", "{", "9" * 5000):
        (tmp_path / RECORD).write_text(text)
        assert record_of(tmp_path) == {}
    assert len(foreign({"model": 3, "data_parallel": []}, a_node())) == 2


def test_a_directory_that_cannot_be_written_stops_the_run(cpu: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cpu.node["job"] |= {"checkpoint_dir": str(tmp_path / "file"), "name": "run"}
    cpu.write_node(cpu.node)
    line = cpu.refused()
    assert f"the checkpoint directory {tmp_path}/file/run cannot be written: Not a directory" in line
    cpu.node["job"]["checkpoint_dir"] = str(tmp_path / "ck")
    cpu.write_node(cpu.node)
    assert "cannot be written: No such file or directory" in cpu.refused()
    (tmp_path / "ck").mkdir()
    arguments, _, _ = started(cpu.start())
    assert f"--checkpoint.folder={tmp_path}/ck/run" in arguments
    assert os.listdir(tmp_path / "ck" / "run") == [RECORD]


def test_the_node_looks_for_room(cpu: Place) -> None:
    """8B on a disk that has not 96 GB, or has them."""
    cpu.recipe(flavor="70B")
    free_gb = os.statvfs(cpu.run_dir).f_bavail * os.statvfs(cpu.run_dir).f_frsize / 1e9
    if free_gb > 800:
        pytest.skip("this disk has room for a checkpoint of 70B")
    assert "3 checkpoints take 2,540 GB" in cpu.refused()


def init_from_02(folder: Path, *, saves: bool = True) -> Place:
    place = Place(folder, debug_node(init_from="/gone"), titan="0.2.2")
    place.recipe(checkpoint_interval=4 if saves else 0)
    (place.site / "safetensors").mkdir()
    (place.site / "safetensors" / "__init__.py").touch()
    return place


def test_an_unfinished_first_checkpoint_is_no_random_start_in_02(tmp_path: Path) -> None:
    """torchtitan 0.2 starts from given weights only where there is no folder for checkpoints."""
    place = init_from_02(tmp_path)
    folder = place.run_dir / "titan" / "checkpoint"
    (write_checkpoint(folder, 4) / ".metadata").unlink()
    assert "/gone is not a directory" in place.refused(), "the weights are looked at again"
    assert not folder.exists()
    assert (folder.with_name(f"checkpoint-{ASIDE}") / ASIDE / "step-4").is_dir()
    folder.mkdir()
    (folder / "mine.txt").touch()
    done = place.start()
    assert done.returncode == FAILED and "would start from random weights" in done.stdout
    assert shlex.quote(f"rm -r {folder}")[1:-1] in done.stdout


def test_the_runs_own_checkpoint_wins_over_weights_that_are_gone(tmp_path: Path) -> None:
    place = init_from_02(tmp_path)
    own = write_checkpoint(place.run_dir / "titan" / "checkpoint", 4)
    started(place.start())
    assert place.record()["init_from"] == str(own)


WATCHED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from titan import checkpoints
checkpoints.free_bytes = lambda folder: 50
folder = Path(sys.argv[2])
checkpoints.watch(folder, lambda line: print(line, flush=True), every_s=0.01)
print("READY", flush=True)
os.execvp("cat", ["cat"])
"""


def test_after_each_checkpoint_the_job_says_when_the_next_does_not_fit(tmp_path: Path) -> None:
    """The watcher outlives an exec, as of torchrun, and ends with it."""
    folder = tmp_path / "checkpoint"
    (folder / "step-best").mkdir(parents=True)  # somebody's own copy
    (folder / "step-best/.metadata").touch()
    source = str(Path(checkpoints.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, source, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    with process.stdin:
        assert process.stdout.readline() == "READY\n"
        whole = write_checkpoint(tmp_path / "made", 4)
        whole.rename(folder / "step-4")
        line = process.stdout.readline()
        assert line.startswith("titan-checkpoint: warn step=4 ") and "does not fit" in line
    assert process.stdout.read() == "", "its end closes the pipe"
    assert process.wait() == 0
