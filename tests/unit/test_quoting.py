"""Any string in a path, mount or environment value reaches the process unchanged, or is refused.

The rendered script runs for real under bash; only srun is replaced, by one that writes down the arguments
and the environment it got.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import LauncherError
from launcher.config.layers import Layer, merge
from launcher.config.render import render
from launcher.config.spec import Job, PlacedRun, Profile, validate
from launcher.titan.recipe import Recipe

NASTY = "a b'c\"d$(touch pwned)`id`\\ \\n;&|<>*?[x]{y}~#!%é漢🙂\t"
TEXT = st.one_of(st.text(min_size=1, max_size=60), st.text(" '\"$()`\\;&|*#!%,:=/", min_size=1, max_size=30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quoting")
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" >{folder}/arguments\ncat /proc/self/environ >{folder}/environment\n"
    )
    srun.chmod(0o755)
    srun.with_name("scontrol").write_text("#!/bin/sh\necho JobId=7 JobState=RUNNING Reason=None\n")
    srun.with_name("scontrol").chmod(0o755)
    return folder


def accepted(folder: Path, **values: object) -> PlacedRun | None:
    """The run with these values; None when it is refused."""
    keys: dict[str, object] = {"job.name": "r", "job.runs_dir": str(folder), "job.gpu": "b200", "job.image": "/x.sqsh"}
    keys |= {"job.slurm_bin": f"{folder}/bin", **{k.replace("__", ".", 1): v for k, v in values.items()}}
    asked = merge([Layer(keys, dict.fromkeys(keys, "test"))])
    try:
        validate(asked)
    except LauncherError:
        return None
    return PlacedRun(**vars(asked))


def run(folder: Path, spec: PlacedRun) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment as srun sees them."""
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
    arguments, environment = (
        os.fsdecode((folder / name).read_bytes()).split("\0")[:-1] for name in ("arguments", "environment")
    )
    return arguments, dict(entry.split("=", 1) for entry in environment)


def option(arguments: list[str], name: str) -> str:
    return next(a.removeprefix(f"--{name}=") for a in arguments if a.startswith(f"--{name}="))


@given(TEXT, TEXT, TEXT, TEXT, TEXT)
@example(*[NASTY.strip("\t")] * 5)
@example("x,y", "c4 with 'quotes' and $(id)", "a", "a b'c", "$(id)")
@example("a", "a", "a", "a,b", "c")
@example("a", "a", "a", "a:b", "c")
@example("a", "a", "a", "a\nb", "c")
def test_values_in_the_script(folder: Path, value: str, image: str, data: str, source: str, target: str) -> None:
    """Each by itself, where it is not refused, and all of these in one script."""
    mount = f"/{source}:/to/{target}"
    asked = {"env__MINE": value, "job__image": f"/i/{image}", "job__data": f"/c4/{data}", "job__mounts": [mount]}
    taken = {key: value for key, value in asked.items() if accepted(folder, **{key: value})}
    spec = accepted(folder, **taken)
    assert spec is not None
    seen = run(folder, spec)
    mounts = option(seen[0], "container-mounts").split(",")
    if "env__MINE" in taken:
        assert seen[1]["MINE"] == value
        assert "MINE" in option(seen[0], "container-env").split(",")
    if "job__image" in taken:
        assert option(seen[0], "container-image") == f"/i/{image}"
    assert (f"/c4/{data}:/c4/{data}:ro" in mounts) is ("job__data" in taken)
    assert (mount in mounts) is ("job__mounts" in taken)


@given(TEXT)
@example("/usr/bin/my python")
def test_the_command_of_a_bare_job(folder: Path, value: str) -> None:
    if spec := accepted(folder, job__runtime="bare", job__image="", job__python=value):
        assert run(folder, spec)[0][-3:] == [value, f"{folder}/r/job/node.py", f"{folder}/r/job/node.json"]


def test_what_cannot_travel_is_refused(folder: Path) -> None:
    for value in ("a\nb", "a\0b", "a\rb", "\x1b[31m", "\ud800"):
        assert accepted(folder, env__MINE=value) is None
        assert accepted(folder, job__image=f"/{value}") is None
        assert accepted(folder, job__mounts=[f"/{value}:/x"]) is None
        assert accepted(folder, job__data=f"/{value}") is None
    for section, kind in (("job", Job), ("profile", Profile), ("recipe", Recipe)):
        for each in (each.name for each in fields(kind) if each.type == "str"):
            assert accepted(folder, **{f"{section}__{each}": "a\nb"}) is None, each
    for name in ("A-B", "1A", "A B", "", "A\nB", "$(id)", "SLURM_JOB_ID", "TITAN_JOB_ID", "PATH"):
        assert accepted(folder, **{f"env__{name}": "x"}) is None
    for place in ("/a b", "/a'b", "/a%j", "/a,b", "/a:b", "/a\nb", "rel", "/" + "x" * 300):
        values = {"job.name": "r", "job.image": "/x", "job.runs_dir": place}
        with pytest.raises(LauncherError, match=r"job\.runs_dir"):
            validate(merge([Layer(values, dict.fromkeys(values, "test"))]))
