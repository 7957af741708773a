"""A run's view of the data: which files, where the links lead, and what the user is told about too few."""

from __future__ import annotations

import gzip
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config.layers import Layer, merge
from launcher.config.resolve import placed
from launcher.config.runtime import host_path, mounts
from launcher.config.spec import PlacedRun, node_config, validate
from launcher.stage.manifest import Manifest, StagedFile, write_manifest
from launcher.stage.target import at_work
from launcher.stage.view import choose, look, plan, train_files, two_ways, write
from tests.stage.test_stage_refusals import closed

DEGREES = st.integers(1, 40)
FILES = st.integers(0, 200).map(range)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 319338842\n"
SHARD = gzip.compress(b'{"text": "a", "timestamp": "2019-01-01T00:00:00Z", "url": "https://example.com"}\n')
MB = 1_000_000


def shard(index: int, split: str = "train", of: int = 1024) -> str:
    return f"c4-{split}.{index:05d}-of-{of:05d}.json.gz"


def c4(folder: Path, train: int = 8, validation: int = 1, bytes_each: int = 0) -> Path:
    """A directory in C4's form. With `bytes_each`, files of that size that take no room on the disk."""
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: en\n---\n")
    for split, count in (("train", train), ("validation", validation)):
        for index in range(count):
            path = folder / "en" / shard(index, split)
            path.write_bytes(SHARD)
            if bytes_each:
                os.truncate(path, bytes_each)
    return folder


def a_spec(data: Path | str, nodes: int = 1, gpus: int = 4, **values: Any) -> PlacedRun:
    """A run of three steps, without a container unless `job__runtime` says so; `job__x` stands for job.x."""
    given = {
        "job.name": "r",
        "job.gpu": "h200",
        "job.runs_dir": "/home/ada/runs",
        "job.runtime": "bare",
        "job.nodes": nodes,
        "job.data": str(data),
        "profile.gpus_per_node": gpus,
        "recipe.steps": 3,
        **{name.replace("__", "."): value for name, value in values.items()},
    }
    spec = placed(merge([Layer(given, dict.fromkeys(given, "test"))]))
    validate(spec)
    return spec


# Which files


@given(FILES, DEGREES, st.integers(1, 12))
def test_the_largest_multiple_of_the_degree_from_the_beginning_and_its_parts(files, degree, parts) -> None:
    """Parts share nothing, and together are the whole."""
    chosen = choose(files, degree)
    pieces = [choose(files, degree, part, parts) for part in range(1, parts + 1)]
    if len(files) >= degree:
        assert list(chosen) == list(files[: len(files) - len(files) % degree])
        assert [file for piece in pieces for file in piece] == list(chosen)
        assert all(len(piece) % degree == 0 for piece in pieces)
        assert max(map(len, pieces)) - min(map(len, pieces)) in (0, degree)
    else:
        assert list(chosen) == list(files)
        assert parts == 1 or not any(map(len, pieces))


@pytest.mark.parametrize(
    ("gpus", "nodes", "parallel", "files", "chosen"),
    [
        (4, 17, {}, 70, 68),
        (8, 9, {}, 1024, 1008),
        (8, 9, {"recipe__tensor_parallel": 8}, 70, 63),
        (8, 2, {"recipe__context_parallel": 2, "recipe__pipeline_parallel": 4}, 7, 6),
    ],
)
def test_the_degree_is_not_the_gpu_count(
    tmp_path: Path, gpus: int, nodes: int, parallel: dict[str, int], files: int, chosen: int
) -> None:
    spec, _ = plan(a_spec(c4(tmp_path / "c4", files), nodes, gpus, **parallel))
    assert train_files(spec) == [shard(index) for index in range(chosen)]
    assert node_config(spec)["placed"]["data"] == "/home/ada/runs/r/data"
    assert node_config(spec)["placed"]["data_source"] == str(tmp_path / "c4")


def test_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = c4(tmp_path / "c4", 0)
    for name in ("c4-train.10-of-12.json.gz", "c4-train.9-of-12.json.gz", "c4-train.00003-of-00012.json.gz"):
        (folder / "en" / name).write_bytes(SHARD)
    staged, _ = look(folder)
    assert [name.split(".")[1] for name in staged.train] == ["00003-of-00012", "9-of-12", "10-of-12"]
    assert staged.train_files_in_all == 12


def test_only_files_that_can_be_trained_on(tmp_path: Path) -> None:
    en = c4(tmp_path / "c4", 9) / "en"
    (en / shard(0)).write_bytes(POINTER)
    (en / shard(1)).write_bytes(b"")
    (en / shard(2)).write_bytes(b"<html>not found</html>")
    (en / shard(3)).unlink()
    (en / shard(3)).symlink_to("/nowhere/c4-train")
    (en / shard(4)).unlink()
    (en / shard(4)).mkdir()
    (en / f"{shard(5)}.aria2").write_bytes(b"x")
    (en / f".{shard(6)}.tmp").write_bytes(SHARD)
    staged, notes = look(tmp_path / "c4")
    assert staged.train == tuple(shard(index) for index in (5, 6, 7, 8)) and not notes
    assert list(staged.left_out) == [shard(index) for index in range(5)]
    why = list(staged.left_out.values())
    assert why[0].startswith("a Git LFS pointer") and why[1:3] == ["empty", "not a gzip file"]
    spec, notes = plan(a_spec(tmp_path / "c4", job__tokenizer="sample"))
    assert len(train_files(spec)) == 4
    stage = f"launcher stage c4 --to {tmp_path}/c4 --files 9"  # all nine that are there, the bad ones among them
    assert notes == [
        f"{tmp_path}/c4/en: {shard(0)} is a Git LFS pointer, not the data, and 4 more: left out; to repair: {stage}"
    ]


def a_manifest(folder: Path, sizes: dict[str, int], source: str = "hf://datasets/allenai/c4") -> None:
    files = {f"en/{name}": StagedFile(size, "0" * 64, 1) for name, size in sizes.items()}
    with at_work(folder, print) as work:
        write_manifest(work, Manifest("c4", source, "0" * 40, files, train_files_in_all=1024))


def test_a_manifest_decides(tmp_path: Path) -> None:
    folder = c4(tmp_path / "c4", 4)
    a_manifest(folder, {shard(0): len(SHARD), shard(1): len(SHARD) + 1, shard(7): len(SHARD)})
    staged, notes = look(folder)
    assert staged.train == (shard(0),) and staged.validation == () and not notes
    assert staged.left_out[shard(1)] == f"truncated: {len(SHARD)} of {len(SHARD) + 1} bytes"
    assert staged.left_out[shard(2)] == "not in the manifest"


def test_an_edited_manifest_is_named_and_the_files_count(tmp_path: Path) -> None:
    folder = c4(tmp_path / "c4", 4)
    a_manifest(folder, {shard(0): len(SHARD)})
    (folder / ".staged" / "manifest.json").write_text("{}")
    staged, (note,) = look(folder)
    assert len(staged.train) == 4 and "manifest.json: damaged or edited" in note


# Where the links lead


def test_links_hold_in_a_run_directory_behind_a_link(tmp_path: Path) -> None:
    c4(tmp_path / "disk" / "deep" / "c4")
    (tmp_path / "disk" / "deep" / "runs").mkdir()
    (tmp_path / "runs").symlink_to("disk/deep/runs")
    (tmp_path / "data").symlink_to("disk/deep")
    spec, _ = plan(a_spec(tmp_path / "data" / "c4", job__runs_dir=str(tmp_path / "runs")))
    write(Path(spec.run_dir) / "data", spec.view)
    links = list((tmp_path / "runs" / "r" / "data" / "en").iterdir())
    assert len(links) == 9 and all(link.is_symlink() and link.read_bytes() == SHARD for link in links)
    assert not any(os.readlink(link).startswith("/") for link in links)


def test_links_hold_inside_the_container_alone_where_a_mount_moves_the_data(tmp_path: Path) -> None:
    """With real mounts, in a name space of its own."""
    source, inside, runs = c4(tmp_path / "lustre" / "c4"), tmp_path / "data", tmp_path / "home" / "runs"
    for folder in (inside, runs, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    spec = a_spec(
        inside / "c4",
        job__runtime="pyxis",
        job__image="/i.sqsh",
        job__runs_dir=str(runs),
        profile__mounts=[f"{tmp_path}/elsewhere:{tmp_path}", f"{tmp_path}/lustre/:{inside}:ro"],
    )
    assert host_path(spec, spec.data_path) == str(source)
    assert not any(f":{inside}/c4" in mount for mount in mounts(spec))
    spec, notes = plan(spec)
    assert len(train_files(spec)) == 8 and not any("not on this machine" in note for note in notes)
    assert all(
        os.path.normpath(f"{spec.run_dir}/data/en/{to}") == f"{inside}/c4/en/{name}" for name, to in spec.view.items()
    )
    write(Path(spec.run_dir) / "data", spec.view)
    read = f"gzip -t {shlex.quote(spec.run_dir)}/data/en/*"
    assert subprocess.run(["bash", "-c", read], capture_output=True).returncode != 0
    mount = f"mount --bind {shlex.quote(str(source.parent))} {shlex.quote(str(inside))}"
    space = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    if subprocess.run([*space, mount], capture_output=True).returncode:
        pytest.skip("no mount name spaces for this user here")
    done = subprocess.run([*space, f"{mount} && {read}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_inside_a_container_there_are_no_links_on_the_way(tmp_path: Path) -> None:
    c4(tmp_path / "disk" / "deep" / "c4")
    (tmp_path / "data").symlink_to("disk/deep")
    run: dict[str, Any] = {
        "job__runtime": "apptainer",
        "job__image": "/i.sif",
        "job__runs_dir": str(tmp_path / "runs"),
    }
    spec, _ = plan(a_spec(tmp_path / "data" / "c4", **run))
    assert spec.view[shard(0)] == f"../../../../data/c4/en/{shard(0)}"


def test_a_link_out_of_what_the_container_sees_is_left_out(tmp_path: Path) -> None:
    """As in the Hub's own cache, whose snapshots are links to another folder."""
    folder = c4(tmp_path / "c4", 8)
    (tmp_path / "blob").write_bytes(SHARD)
    (folder / "en" / shard(3)).unlink()
    (folder / "en" / shard(3)).symlink_to("../../blob")
    pyxis: dict[str, Any] = {"job__runtime": "pyxis", "job__image": "/i.sqsh"}
    assert len(train_files(plan(a_spec(folder))[0])) == 8
    spec, notes = plan(a_spec(folder, **pyxis))
    assert len(train_files(spec)) == 4 and f"a link to {tmp_path}/blob" in notes[0]
    mounted = a_spec(folder, **pyxis, job__mounts=[f"{tmp_path}/blob:{tmp_path}/blob:ro"])
    assert len(train_files(plan(mounted)[0])) == 8


# What the user is told


def test_data_that_only_the_nodes_have(tmp_path: Path) -> None:
    asked = a_spec(tmp_path / "c4", 17, recipe__local_batch_size=5, recipe__steps=1000)
    spec, notes = plan(asked)
    assert (notes, spec.view, node_config(spec)["placed"]["data"]) == ([], {}, str(tmp_path / "c4"))
    command = f"launcher stage c4 --to {tmp_path}/c4 --files 68"
    assert two_ways(asked) == f"{command}; or text that the launcher makes: --data sample"


def test_the_hint_repairs_what_it_names(tmp_path: Path) -> None:
    folder = c4(tmp_path / "c4", 8)
    (folder / "en" / shard(7)).write_bytes(POINTER)
    (folder / "en" / shard(0, "validation")).write_bytes(b"")
    _, notes = plan(a_spec(folder, job__tokenizer="sample"))
    assert f"to repair: launcher stage c4 --to {folder} --files 8 --validation" in notes[0]
    a_manifest(folder, {shard(0): 1}, "s3://bucket/c4")
    note = plan(a_spec(folder, job__tokenizer="sample"))[1][0]
    assert f"--to {folder} --files 8 --from s3://bucket/c4 --validation" in note


def test_data_that_is_a_file_or_may_not_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LauncherError, match="a file, not a directory"):
        plan(a_spec(tmp_path / "file"))
    plan(a_spec(tmp_path / "none"))  # what is imported inside is imported
    with closed(tmp_path / "closed") as folder:
        spec, (note,) = plan(a_spec(folder / "c4"))
    assert not spec.view and "cannot be read here (Permission denied), so the run gets no view of it" in note


PLENTY = 320 * MB  # bytes of a file of C4
TOO_FEW: dict[str, tuple[tuple[int, int, int], dict[str, Any], str]] = {
    "fewer files than ranks": (
        (8, 1, PLENTY),
        {"nodes": 17},
        "8 train files for 68 data-parallel ranks: every rank reads all of them and keeps one document in 68; "
        "launcher stage c4 --to {} --files 68",
    ),
    "more ranks than C4 has files": (
        (1024, 1, PLENTY),
        {"nodes": 464},
        "keeps one document in 1856; tensor or pipeline parallelism needs fewer",
    ),
    "enough": ((4, 1, PLENTY), {"recipe__local_batch_size": 5, "recipe__steps": 4000}, ""),  # 655 M tokens
    "too few tokens": (
        (4, 1, PLENTY),
        {"recipe__local_batch_size": 5, "recipe__steps": 5000},
        "the run reads 819 M tokens, its 4 files have about 686 M tokens (estimated from their size): it reads them "
        "more than once; launcher stage c4 --to {} --files 8",
    ),
    "more of this size are not to be had": (
        (4, 1, 20 * MB),
        {"recipe__local_batch_size": 5, "recipe__steps": 4000},
        "it reads them more than once",
    ),
    "no validation, and none wanted": ((4, 0, PLENTY), {}, ""),
    "no validation": (
        (4, 0, PLENTY),
        {"titan__validation.enable": "true"},
        "has no validation files, but the run validates; launcher stage c4 --to {} --files 4 --validation",
    ),
    "none at all": (
        (0, 1, PLENTY),
        {},
        "en holds no train file of C4, so the run gets no view of it: launcher stage c4 --to {} --files 4",
    ),
}


@pytest.mark.parametrize("what", TOO_FEW)
def test_too_few_files(what: str, tmp_path: Path) -> None:
    (train, validation, size), run, words = TOO_FEW[what]
    folder = c4(tmp_path / "c 4", train, validation, size)
    spec, notes = plan(a_spec(folder, **run))
    assert len(train_files(spec)) == train and len(notes) == bool(words)
    assert "".join(notes).endswith(words.format(f"'{folder}'"))


def test_what_cannot_be_a_part(tmp_path: Path) -> None:
    folder = c4(tmp_path / "c4", 7)
    assert [len(train_files(plan(a_spec(folder, gpus=2, job__data_part=f"{part}/2"))[0])) for part in (1, 2)] == [4, 2]
    with pytest.raises(LauncherError) as caught:
        plan(a_spec(folder, job__data_part="1/2"))
    assert "need 8 train files, there are 7" in caught.value.what
    assert caught.value.fix == f"launcher stage c4 --to {folder} --files 8"
    with pytest.raises(LauncherError) as caught:
        plan(a_spec(tmp_path / "none", job__data_part="1/2"))
    assert caught.value.status == ExitStatus.NOT_FOUND and "not on this machine" in caught.value.what
    for part in ("0/2", "3/2", "1", "1/2/3", "-1/2", "a/b"):
        with pytest.raises(LauncherError, match="I from 1 to N"):
            a_spec(folder, job__data_part=part)
    with pytest.raises(LauncherError, match="no parts"):
        a_spec("hub", job__data_part="1/2")
