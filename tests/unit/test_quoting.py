"""Any string in a path, mount or environment value reaches the process unchanged, or is refused.

The rendered script runs for real under bash; only srun is replaced, by a program that writes down the arguments
and the environment it got.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import LauncherError
from launcher.config.layers import Layer, merge
from launcher.config.render import render
from launcher.config.spec import PlacedRun, validate

NASTY = "a b'c\"d$(touch pwned)`id`\\ \\n;&|<>*?[x]{y}~#!%é漢🙂\t"
TEXT = st.one_of(st.text(min_size=1, max_size=60), st.text(" '\"$()`\\;&|*#!%,:=/", min_size=1, max_size=30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quoting")
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(folder / 'seen.json')!r}, 'w').write(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    srun.chmod(0o755)
    return folder


def run(folder: Path, **values: object) -> tuple[list[str], dict[str, str], PlacedRun] | None:
    """Arguments and environment as srun sees them; None when the spec is refused."""
    keys = {k.replace("__", ".", 1): v for k, v in values.items()}
    keys |= {
        "job.name": "r",
        "job.runs_dir": str(folder),
        "job.gpu": "b200",
        "job.slurm_bin": f"{folder}/bin",
    }
    keys.setdefault("job.image", "/x.sqsh")
    asked = merge([Layer(keys, dict.fromkeys(keys, "test"))])
    try:
        validate(asked)
    except LauncherError:
        return None
    spec = PlacedRun(**vars(asked))
    shutil.rmtree(folder / "r", ignore_errors=True)
    (folder / "r").mkdir()
    script = folder / "r" / "job.sbatch"
    script.write_text(render(spec), encoding="utf-8")
    done = subprocess.run(
        ["bash", str(script)],
        cwd=folder / "r",
        env={"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder / "r")) == ["claim", "end.json", "job.sbatch"]
    arguments, environment = json.loads((folder / "seen.json").read_text())
    return arguments, environment, spec


def option(arguments: list[str], name: str) -> str:
    return next(a.removeprefix(f"--{name}=") for a in arguments if a.startswith(f"--{name}="))


@given(TEXT)
@example(NASTY.strip("\t"))
@example("x,y")
def test_environment_values(folder: Path, value: str) -> None:
    if seen := run(folder, env__MINE=value):
        assert seen[1]["MINE"] == value
        assert "MINE" in option(seen[0], "container-env").split(",")


@given(TEXT)
@example(NASTY.strip("\t"))
def test_image_path(folder: Path, value: str) -> None:
    if seen := run(folder, job__image=f"/i/{value}"):
        assert option(seen[0], "container-image") == f"/i/{value}"


@given(TEXT, TEXT)
@example("a b'c", "$(id)")
@example("a,b", "c")
@example("a:b", "c")
@example("a\nb", "c")
def test_mounts(folder: Path, source: str, target: str) -> None:
    if seen := run(folder, job__mounts=[f"/{source}:/{target}"]):
        assert f"/{source}:/{target}" in option(seen[0], "container-mounts").split(",")


@given(TEXT)
@example("c4 with 'quotes' and $(id)")
def test_data_path(folder: Path, value: str) -> None:
    if seen := run(folder, job__data=f"/{value}"):
        assert f"/{value}:/{value}:ro" in option(seen[0], "container-mounts").split(",")


@given(TEXT)
@example("/usr/bin/my python")
def test_the_command_of_a_bare_job(folder: Path, value: str) -> None:
    if seen := run(folder, job__runtime="bare", job__image="", job__python=value):
        assert seen[0][-3:] == [value, f"{folder}/r/job/node.py", f"{folder}/r/job/node.json"]


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "a\rb", "\x1b[31m", "\ud800"])
def test_what_cannot_travel_is_refused(folder: Path, value: str) -> None:
    assert run(folder, env__MINE=value) is None
    assert run(folder, job__image=f"/{value}") is None
    assert run(folder, job__mounts=[f"/{value}:/x"]) is None
    assert run(folder, job__data=f"/{value}") is None


@pytest.mark.parametrize("name", ["A-B", "1A", "A B", "", "A\nB", "$(id)", "SLURM_JOB_ID", "TITAN_JOB_ID", "PATH"])
def test_names_of_variables(folder: Path, name: str) -> None:
    assert run(folder, **{f"env__{name}": "x"}) is None


@pytest.mark.parametrize("value", ["/a b", "/a'b", "/a%j", "/a,b", "/a:b", "/a\nb", "rel", "/" + "x" * 300])
def test_runs_directories_that_slurm_or_pyxis_would_change(folder: Path, value: str) -> None:
    values = {"job.name": "r", "job.image": "/x", "job.runs_dir": value}
    spec = merge([Layer(values, dict.fromkeys(values, "test"))])
    with pytest.raises(LauncherError, match=r"job\.runs_dir"):
        validate(spec)
