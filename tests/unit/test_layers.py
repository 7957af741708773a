"""The merge order, the origin of each value, and what is said about files that are wrong."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config.layers import Layer, find, merge, names_of, read_layer
from launcher.config.resolve import placed, resolve
from launcher.config.spec import RunSpec, validate
from launcher.config.write import run_toml

PROFILES = ["a100", "b200", "b300", "cpu", "gb200", "gb300", "h100", "h200"]
RECIPES = "debug llama3-70b llama3-70b-tp llama3-8b llama3-8b-fast llama3-8b-finetune llama3-8b-nvfp4"
ODD = "x,y'\"$é"


def options(**values: object) -> Layer:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return Layer(named, dict.fromkeys(named, "option"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_what_travels_with_the_launcher() -> None:
    assert names_of("profiles") == PROFILES
    assert " ".join(names_of("recipes")) == RECIPES
    for name in PROFILES:
        assert merge([read_layer(find("profiles", name), "")]).profile.gpu == name.upper()


def test_the_published_batch_sizes(workplace: Path) -> None:
    for gpu, batch in (("gb200", 5), ("b200", 5), ("h200", 4), ("h100", 2)):
        spec = resolve(options(job__gpu=gpu, job__image="/x.sqsh"), None, None, {})
        recipe = spec.recipe
        assert recipe.local_batch_size == batch
        assert (recipe.seq_len, recipe.steps, recipe.log_freq, recipe.compile) == (8192, 100, 10, False)
        assert recipe.activation_checkpoint == "selective"
        assert spec.origin["recipe.local_batch_size"] == f"recipe llama3-8b, for {gpu}"


def test_defaults_then_profile_then_recipe_then_file_then_options(workplace: Path) -> None:
    file = write(workplace / "mine.toml", "[recipe]\nsteps = 50\nlr = 1e-3\n[env]\nNCCL_IB_SL = 7\nMINE = 'yes'\n")
    spec = resolve(options(job__gpu="b200", job__image="/x.sqsh", recipe__steps=7), file, None, {})
    assert spec.recipe.steps == 7
    assert spec.recipe.lr == 1e-3
    assert spec.recipe.local_batch_size == 5
    assert (spec.env["NCCL_IB_SL"], spec.env["MINE"], spec.env["NCCL_NVLS_ENABLE"]) == ("7", "yes", "1")
    assert spec.origin["recipe.steps"] == "option"
    assert spec.origin["recipe.lr"] == f"file {file}"
    assert spec.origin["env.NCCL_NVLS_ENABLE"] == "profile b200"
    assert spec.origin["recipe.seed"] == "default"


def test_slurms_own_environment_is_written_down_and_loses_to_the_file(workplace: Path) -> None:
    file = write(workplace / "mine.toml", "[job]\npartition = 'mine'\n")
    environ = {"SBATCH_PARTITION": "theirs", "SBATCH_ACCOUNT": "acct"}
    spec = resolve(options(job__gpu="b200", job__image="/x.sqsh"), file, None, environ)
    assert (spec.job.partition, spec.job.account) == ("mine", "acct")
    assert spec.origin["job.account"] == "environment SBATCH_ACCOUNT"


def test_paths_in_a_file_are_relative_to_the_file(workplace: Path) -> None:
    (workplace / "conf").mkdir()
    file = write(workplace / "conf" / "mine.toml", "[job]\nimage = '../titan.sqsh'\nruns_dir = 'r'\n")
    spec = resolve(options(job__gpu="b200"), file, None, {})
    assert spec.job.image == f"{workplace}/titan.sqsh"
    assert spec.run_dir.startswith(f"{workplace}/conf/r/")


def test_a_profile_and_a_recipe_of_ones_own(workplace: Path) -> None:
    profile = write(workplace / "x9.toml", "[profile]\ngpu = 'X9'\ngpus_per_node = 16\n")
    recipe = write(workplace / "mine.toml", "[recipe]\nflavor = '8B'\nsteps = 3\n")
    spec = resolve(options(job__gpu=str(profile), job__recipe=str(recipe), job__image="/x"), None, None, {})
    assert (spec.profile.gpu, spec.gpus, spec.recipe.steps) == ("X9", 16, 3)
    assert spec.job.name.startswith("mine-x9-1n-")


def test_a_run_file_repeats_the_run(workplace: Path) -> None:
    asked = {"job__gpu": "h200", "job__nodes": 3, "job__image": "/i.sqsh", "recipe__steps": 9}
    first = resolve(options(**asked, env__A=ODD, titan__training__z="1"), None, None, {})
    (workplace / "old").mkdir()
    file = write(workplace / "old" / "run.toml", run_toml(placed(first)))
    again = resolve(options(job__name="again", job__nodes=4), None, file, {})
    assert again.job.nodes == 4
    for part in ("recipe", "profile", "env", "titan"):
        assert getattr(again, part) == getattr(first, part)
    assert again.job.image == first.job.image
    with pytest.raises(LauncherError, match="already holds"):
        resolve(options(job__recipe="debug"), None, file, {})


@given(
    value=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029")),
    name=st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True),
    number=st.floats(1e-12, 99, allow_nan=False),
    steps=st.integers(1, 10**9),
)
def test_any_value_survives_run_toml(
    value: str, name: str, number: float, steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layer = options(recipe__lr=number, recipe__steps=steps)
    layer = Layer({**layer.values, f"env.{name}": value}, {**layer.origin, f"env.{name}": "option"})
    spec = merge([layer])
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(run_toml(placed(spec)), encoding="utf-8")
    again = merge([read_layer(path, "file")])
    assert (again.env, again.recipe) == (spec.env, spec.recipe)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[job]\nnodes = = 3\n", "mine.toml:2:9: TOML syntax"),
        ("[job\n", "mine.toml:1:5: TOML syntax"),
        ("x = [1", "mine.toml (at its end): TOML syntax"),
        ("[job]\nnoodes = 3\n", "unknown key 'job.noodes'"),
        ("[jobs]\nnodes = 3\n", "unknown key 'jobs'"),
        ("job = 3\n", "job must be a table"),
        ("[job]\nnodes = '3'\n", "must be a whole number"),
        ("[job]\nnodes = true\n", "must be a whole number"),
        ("[job]\nnodes = 2.5\n", "must be a whole number"),
        ("[recipe]\ncompile = 1\n", "must be true or false"),
        ("[job]\nmounts = 'a:b'\n", "must be a list of strings"),
        ("[env]\nA = [1]\n", "must be a string"),
        ("gpu = 3\n", "gpu must be tables"),
        ("run = 99\n", "run file format 99"),
        ("secret_env = 'x'\n", "secret_env must be a list"),
        ("[recipe]\nlocal_batchsize = 3\n", "did you mean recipe.local_batch_size"),
        ("[profile]\ndriver = 570.1\n", 'must be a string; driver = "570.1"'),  # a number in TOML
    ],
)
def test_a_wrong_file_is_named_with_the_place(text: str, expected: str, workplace: Path) -> None:
    file = write(workplace / "mine.toml", text)
    with pytest.raises(LauncherError) as caught:
        resolve(options(job__gpu="b200", job__image="/x"), file, None, {})
    assert expected in f"{caught.value.what}; {caught.value.fix}"
    assert caught.value.status is ExitStatus.INVALID


def test_files_that_cannot_be_read_and_names_that_nothing_has(workplace: Path) -> None:
    (workplace / "b.toml").write_bytes(b"\xff\xfe")
    for name, said in (("none.toml", "No such file"), (".", "Is a directory"), ("b.toml", "not UTF-8")):
        with pytest.raises(LauncherError, match=said):
            read_layer(workplace / name, "x")
    with pytest.raises(LauncherError, match="no profile 'gb20'") as caught:
        find("profiles", "gb20")
    assert caught.value.fix == "--gpu gb200"
    with pytest.raises(LauncherError, match="no recipe 'llama'"):
        find("recipes", "llama")


def test_config_show_gives_value_and_origin(launch, workplace: Path) -> None:
    done = launch("config", "show", "--gpu", "gb200", "--nodes", "9", "--image", "x.sqsh", "--json")
    shown = json.loads(done.stdout)
    assert shown["job.nodes"] == {"value": 9, "origin": "option --nodes"}
    assert shown["profile.gpus_per_node"] == {"value": 4, "origin": "profile gb200"}
    assert shown["recipe.local_batch_size"] == {"value": 5, "origin": "recipe llama3-8b, for gb200"}
    text = launch("config", "show", "--gpu", "gb200", "--image", "x.sqsh").stdout
    assert "recipe.local_batch_size" in text and "(recipe llama3-8b, for gb200)" in text


@given(st.text(string.printable, max_size=80))
def test_a_name_is_taken_whole_or_refused(name: str) -> None:
    spec = merge([options(job__name=name, job__image="/x", job__runs_dir="/r", job__gpu="b200")])
    try:
        validate(spec)
    except LauncherError:
        return
    assert isinstance(spec, RunSpec) and spec.run_dir == f"/r/{name}"
    assert not set(name) & set(" '\"$`\\\n;&|/")


def test_a_segment_of_version_0_1_is_repeated_where_it_was_asked_for(tmp_path: Path) -> None:
    for origin, kept in (("option --segment", 2), ("chosen from the topology, blocks of 18", 0)):
        file = write(tmp_path / "run.toml", f'run = 1\n[job]\nsegment = 2\n[origin]\n"job.segment" = "{origin}"\n')
        assert merge([read_layer(file, "file")]).job.segment == kept


def test_a_secret_takes_the_place_of_a_value_below_and_a_value_that_of_a_secret() -> None:
    """Otherwise the value would stand in the script beside the secret, or the secret win over what was asked last."""
    value, secret = Layer({"env.X": "seen"}, {"env.X": "file"}), Layer({}, {}, secret_env=("X",))
    assert [(spec.env, spec.secret_env) for spec in (merge([value, secret]), merge([secret, value]))] == [
        ({}, ("X",)),
        ({"X": "seen"}, ()),
    ]
