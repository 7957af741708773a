"""`--init-from`: what is accepted as a checkpoint in the Hub's format, where it is checked, and what the job is
told.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config.layers import find, merge, read_layer
from launcher.config.runtime import mounts
from launcher.config.spec import Job, PlacedRun
from launcher.preflight.here import check_weights as check_at_submit
from launcher.preflight.here import files
from launcher.titan import Refused
from launcher.titan.checkpoints import INDEX
from launcher.titan.command import common_settings, config_files, trainer_arguments
from launcher.titan.recipe import Recipe
from launcher.titan.weights import SHAPES, check_weights, starting_weights, wanted_tensors
from tests.conftest import Launch
from tests.unit.node_place import Place
from tests.unit.test_titan_command import a_node, debug_node

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A file of the right length with a hole in the place of the numbers: 70B takes no room."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)


def write_checkpoint(folder: Path, flavor: str = "debugmodel", shards: int = 2) -> Path:
    folder.mkdir()
    shape = SHAPES[flavor]
    names = list(wanted := wanted_tensors(shape))
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for index, file in enumerate(files):
        write_safetensors(folder / file, {name: wanted[name] for name in names[index::shards]})
    weight_map = {name: files[index % shards] for index, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", **vars(shape), "rope_theta": 500000.0, "rope_scaling": SCALING}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "weights")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_checkpoint_fits_its_flavor(tmp_path: Path) -> None:
    for flavor, shards in (("debugmodel", 1), ("8B", 4), ("70B", 30)):
        assert check_weights(write_checkpoint(tmp_path / flavor, flavor, shards), flavor) == shards
    assert SHAPES["8B"].parameters == 8_030_261_248  # as the Hub tells it
    folder = tmp_path / "debugmodel"
    (folder / INDEX).unlink()  # one file needs none, and transformers 5 has another table
    edit_config(folder, rope_scaling=None, rope_theta=None, rope_parameters={**SCALING, "rope_theta": 500000.0})
    assert check_weights(folder, "debugmodel") == 1


def halved() -> dict[str, tuple[int, ...]]:
    """The weights of the first of two files."""
    return dict(list(wanted_tensors(SHAPES["debugmodel"]).items())[::2])


def without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


FIRST = "model-00001-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda f: shutil.rmtree(f), "weights is not a directory"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "another model": (lambda f: edit_config(f, model_type="mistral"), "model_type is 'mistral', not 'llama'"),
    "another size": (
        lambda f: edit_config(f, hidden_size=4096, vocab_size=128256),
        "not that of debugmodel: hidden_size is 4096, not 256, vocab_size is 128256, not 2048",
    ),
    "other key heads": (lambda f: edit_config(f, num_key_value_heads=8), "num_key_value_heads is 8, not 16"),
    "Llama 3 before 3.1": (lambda f: edit_config(f, rope_scaling=None), "is not Llama 3.1's"),
    "other positions": (lambda f: edit_config(f, rope_theta=10000.0), "rope_theta 10000.0"),
    "no shard": (lambda f: (f / FIRST).unlink(), f"1 of 2 shards are missing: {FIRST}"),
    "no weights": (without_weights, "holds no *.safetensors"),
    "a pointer": (
        lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        f"{FIRST} is a Git LFS pointer, not data",
    ),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} is empty"),
    "cut in its length": (lambda f: (f / FIRST).write_bytes(b"abc"), f"{FIRST} is cut off"),
    "cut in its header": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:99]), f"{FIRST} is cut off"),
    "cut in its data": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]), "bytes, its header says"),
    "something else": (lambda f: (f / FIRST).write_bytes(b"<!DOCTYPE html>" * 9), "is not a safetensors file"),
    "a header of nonsense": (
        lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 12) + b'{"a": [1, 2]'),
        "is not a safetensors file",
    ),
    "endless numbers": (
        lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 26) + b'{"a":{"shape":[Infinity]}}'),
        "is not a safetensors file",
    ),
    "quantised": (
        lambda f: write_safetensors(f / FIRST, {"model.norm.weight": (256,)}, "F8_E4M3"),
        "model.norm.weight is F8_E4M3",
    ),
    "twice": (lambda f: shutil.copy(f / FIRST, f / "old.safetensors"), "is also in another file"),
    "weights left out": (
        lambda f: write_safetensors(f / FIRST, {}),
        "29 of 57 weights of debugmodel are missing: model.embed_tokens.weight",
    ),
    "another shape": (
        lambda f: write_safetensors(f / FIRST, {**halved(), "model.embed_tokens.weight": (2000, 256)}),
        "embed_tokens.weight has the shape [2000, 256], debugmodel needs [2048, 256]",
    ),
    "index without files": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_everything_else_is_refused_with_the_command_that_repairs_it(weights: Path, damage: str) -> None:
    break_it, words = DAMAGE[damage]
    break_it(weights)
    with pytest.raises(Refused) as refused:
        check_weights(weights, "debugmodel")
    assert words in refused.value.why
    other = ("another model", "another size", "Llama 3 before", "other ")  # not repaired by fetching it again
    assert f"launcher stage model --to {'DIR' if damage.startswith(other) else weights}" in refused.value.fix


def test_the_command_names_the_model_and_survives_a_shell(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "it's 70B", "70B")
    (folder / FIRST).unlink()
    with pytest.raises(Refused) as refused:
        check_weights(folder, "70B")
    assert shlex.split(refused.value.fix) == ["launcher", "stage", "model", "Llama-3.1-70B", "--to", str(folder)]


def test_a_runs_own_checkpoint_wins_even_when_the_weights_are_gone() -> None:
    own = Path("step-10")
    assert starting_weights(debug_node(), own) == {}  # without the option
    assert starting_weights(debug_node(init_from="/gone"), own) == {"init_from": "step-10"}


@pytest.mark.parametrize(("interval", "load_only"), [(0, True), (50, False)])
def test_both_eras_load_the_hubs_format_and_save_only_when_asked(interval: int, load_only: bool) -> None:
    node = a_node({"checkpoint_interval": interval}, init_from="/data/models/it's")
    arguments = trainer_arguments(node, "0.3.0")
    assert [argument for argument in arguments if argument.startswith("--checkpoint.")] == [
        "--checkpoint.enable",
        f"--checkpoint.interval={interval or 500}",
        "--checkpoint.no_last_save_model_only",
        *([] if load_only else ["--checkpoint.async_mode=async", "--checkpoint.keep_latest_k=2"]),
        "--checkpoint.initial_load_path=/data/models/it's",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.initial_load_model_only",
        "--checkpoint.load_only" if load_only else "--checkpoint.no_load_only",
    ]
    (text,) = config_files(node, "0.2.2").values()
    told = tomllib.loads(text)["checkpoint"].items()
    assert {f"checkpoint.{key}": value for key, value in told}.items() <= common_settings(node).items()
    assert len(told) == len([argument for argument in arguments if argument.startswith("--checkpoint.")])


def spec(init_from: Path | str, flavor: str = "debugmodel", **job: Any) -> PlacedRun:
    return PlacedRun(job=Job(name="a", runs_dir="/runs", init_from=str(init_from), **job), recipe=Recipe(flavor=flavor))


def test_submit_refuses_what_it_can_see(weights: Path) -> None:
    for seen in (spec(weights), spec("/data/weights", mounts=(f"{weights.parent}:/data",)), spec("/nowhere/weights")):
        check_at_submit(seen)  # where a mount takes it from; what only the nodes have may be whole
    with pytest.raises(
        LauncherError, match=r"--init-from .*config.json is not that of 8B: hidden_size is 256"
    ) as error:
        check_at_submit(spec(weights, "8B"))
    assert error.value.status == ExitStatus.INVALID and "launcher stage model" in error.value.fix
    (weights / FIRST).unlink()
    with pytest.raises(LauncherError, match="shards are missing"):
        check_at_submit(spec("/data/weights", mounts=(f"{weights.parent}:/data",)))
    assert "/nowhere/weights" in [finding.facts.get("path") for finding in files(spec("/nowhere/weights"))]
    assert "" not in [finding.facts.get("path") for finding in files(spec(""))]


def test_links_that_lead_out_of_the_container_are_refused(tmp_path: Path, weights: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    weights.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(LauncherError, match=r"a link to .*/blobs/.*, which the container does not see") as error:
        check_at_submit(spec(snapshot))
    assert f"--mount {blobs}:{blobs}:ro" in error.value.fix
    check_at_submit(spec(snapshot, mounts=(f"{blobs}:{blobs}:ro",)))
    check_at_submit(spec(snapshot, runtime="bare"))


def test_the_directory_is_mounted_read_only_at_its_own_path(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "link").symlink_to(weights)
    given = str(tmp_path / "link")
    resolved = PlacedRun(job=spec(given).job, sources={given: str(weights)})
    assert f"{weights}:{given}:ro" in mounts(resolved)
    assert not [mount for mount in mounts(spec("")) if mount.startswith(":")]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ('titan."checkpoint.initial_load_path" = "/x"', "--init-from DIR"),
        ('titan."checkpoint.initial-load-in-hf" = true', "--init-from DIR"),
        ('titan."checkpoint.load_only" = true', "--checkpoint-every 0"),
        ('titan."checkpoint.enable" = true', "--checkpoint-every STEPS"),
        ('titan."checkpoint.interval" = 5', "--checkpoint-every STEPS"),
        *((f'job.init_from = "{place}"', "job.init_from") for place in ("s3://bucket/weights", "hub", "/a,b", "/a:b")),
    ],
)
def test_contradictions_and_places_that_cannot_be_mounted_are_refused(launch: Launch, asked: str, said: str) -> None:
    Path("mine.toml").write_text(f"{asked}\n")
    done = launch("render", "--gpu", "b200", "--image", "/x.sqsh", "--config", "mine.toml")
    assert done.returncode == ExitStatus.INVALID and said in done.stderr


def test_the_recipe_for_fine_tuning_is_llama3_8b_from_its_weights() -> None:
    for gpu in ("gb200", "b200", "h200", "h100"):
        tuned, plain = (
            merge([read_layer(find("recipes", name), "", gpu)]) for name in ("llama3-8b-finetune", "llama3-8b")
        )
        assert tuned.job.init_from == "/data/models/Llama-3.1-8B" and plain.job.init_from == ""
        assert tuned.recipe.lr == 1e-5 and tuned.recipe.warmup_steps == 10 < tuned.recipe.steps
        assert tuned.recipe == Recipe(**{**vars(plain.recipe), "lr": 1e-5, "warmup_steps": 10})


def test_a_node_says_where_its_weights_come_from_or_refuses_them(tmp_path: Path, weights: Path) -> None:
    node = Place(tmp_path, debug_node(init_from=str(weights)))
    assert "safetensors is not installed for" in node.refused(FAKE_TORCH="2.14.0+cpu")
    (node.site / "safetensors").mkdir()
    (node.site / "safetensors" / "__init__.py").touch()
    assert f"--checkpoint.initial_load_path={weights}" in node.start(FAKE_TORCH="2.14.0+cpu").stdout
    assert (node.record()["init_from"], node.record()["init_from_files"]) == (str(weights), 2)
    (weights / FIRST).unlink()
    line = node.refused(FAKE_TORCH="2.14.0+cpu")
    assert "1 of 2 shards are missing" in line and f"launcher stage model --to {weights}" in line
