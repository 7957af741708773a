"""A node as slurm/node.py sees it: a run directory, data, and stand-ins for torch and torchtitan."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.stage import sample
from tests.conftest import Forked
from tests.unit.test_titan_command import LLAMA3_8B, changed, debug_node

ROOT = Path(__file__).parent.parent.parent
FAILED = 20
STANDARD = {path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib")}
STANDARD |= {f"{path}/lib-dynload" for path in STANDARD}

FAKE_TORCH = """
import os
if os.environ.get("FAKE_TORCH_BROKEN"):
    raise ImportError("libcudart.so.13: cannot open shared object file")
__version__ = os.environ.get("FAKE_TORCH", "2.14.1+cu130")
class version:
    cuda = None if "+cpu" in __version__ else "13.0"
class cuda:
    device_count = staticmethod(lambda: int(os.environ.get("FAKE_GPUS", "4")))
    get_device_name = staticmethod(lambda index: "NVIDIA GB200")
    class nccl:
        version = staticmethod(lambda: (2, 30, 7))
    @staticmethod
    def init():
        if os.environ.get("FAKE_CUDA_ERROR"):
            raise RuntimeError(os.environ["FAKE_CUDA_ERROR"])
"""
FAKE_RUN = "import json, os, sys\nprint('STARTED', json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"


def as_in_a_run(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of slurm/, with `titan` and `check` beside it as in a run directory."""
    for folder in ("launcher", "slurm"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module(name)


def lay_out(run_dir: Path, node: dict[str, Any]) -> Path:
    """A run directory's job as `launcher submit` makes it; returns its node.json."""
    job = run_dir / "job"
    job.mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "node.py", job)
    for part in (ROOT / "launcher" / "titan", ROOT / "slurm" / "check"):
        shutil.copytree(part, job / part.name, ignore=shutil.ignore_patterns("__pycache__"))
    (job / "node.json").write_text(json.dumps(changed(node, run_dir=str(run_dir))))
    return job / "node.json"


def fake_site(site: Path, more: str = "", distributed: str = "", run: str = FAKE_RUN, titan: str = "0.3.0") -> Path:
    """A folder of packages that stand in for torch and torchtitan."""
    for file, text in {
        "torch/__init__.py": FAKE_TORCH + more,
        "torch/distributed/__init__.py": distributed,
        "torch/distributed/run.py": run,
        "torchtitan/__init__.py": "",
        f"torchtitan-{titan}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: torchtitan\nVersion: {titan}\n",
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    return site


class Place:
    """A run directory as `launcher submit` makes it, and a folder of made-up packages."""

    def __init__(self, folder: Path, node: dict[str, Any], titan: str = "0.3.0") -> None:
        self.run_dir, self.site = folder / "run", folder / "site"
        lay_out(self.run_dir, node)
        self.data, self.tokenizer = folder / "c4", folder / "tokenizer"
        sample.write_c4_sample(self.data, train_files=2, documents_per_file=3)
        sample.write_tokenizer(self.tokenizer)
        self.write_node(changed(node, data=str(self.data), data_source=str(self.data), tokenizer=str(self.tokenizer)))
        fake_site(self.site, titan=titan)

    def change(self, **changes: Any) -> None:
        self.write_node(changed(self.node, **changes))

    def recipe(self, **changes: Any) -> None:
        self.write_node({**self.node, "recipe": {**self.node["recipe"], **changes}})

    def write_node(self, node: dict[str, Any]) -> None:
        self.node = changed(node, run_dir=str(self.run_dir))
        (self.run_dir / "job" / "node.json").write_text(json.dumps(self.node))

    def start(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = self.start_unchecked(*arguments, **env)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def start_unchecked(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.process(self.environment(**env), *arguments).end()

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.site),
            "HOME": str(self.run_dir),
            "SLURMD_NODENAME": "gpu001",
            "TITAN_JOB_ID": f"t{os.getpid()}",
            "TMPDIR": str(self.run_dir.parent),
            **({"FAKE_TORCH": "2.13.0+cpu"} if self.node["profile"]["device"] == "cpu" else {}),
            **more,
        }

    def process(self, env: Mapping[str, str], *arguments: str) -> Forked:
        """The node's process, with the standard library and the packages of `site` alone."""
        program = str(self.run_dir / "job" / "node.py")

        def node() -> None:
            sys.path[:] = [str(self.run_dir / "job"), str(self.site), *(p for p in sys.path if p in STANDARD)]
            for name in [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]:
                del sys.modules[name]
            runpy.run_path(program, run_name="__main__")

        return Forked(node, [program, *(arguments or [f"{self.run_dir}/job/node.json"])], env)

    def refused(self, *arguments: str, **env: str) -> str:
        """The FAIL line of a start that must fail, without anything having been started."""
        done = self.start(*arguments, **env)
        lines = done.stdout.splitlines()
        assert done.returncode == FAILED, done
        assert len(lines) == 1 and lines[0].startswith("titan-node: FAIL node="), lines
        assert ' why="' in lines[0] and lines[0].endswith('"') and ' fix=""' not in lines[0], lines
        return lines[0]

    def record(self, name: str = "0000-gpu001") -> dict[str, Any]:
        value = json.loads((self.run_dir / "nodes" / f"{name}.json").read_text())
        assert isinstance(value, dict)
        return value


@pytest.fixture
def cpu(tmp_path: Path) -> Place:
    return Place(tmp_path, debug_node())


@pytest.fixture
def gpu(tmp_path: Path) -> Place:
    return Place(tmp_path, changed(LLAMA3_8B, nodes=1))


def started(done: subprocess.CompletedProcess[str]) -> tuple[list[str], dict[str, str], str]:
    """Arguments, environment and directory that torchrun was given."""
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and last.startswith("STARTED "), done
    arguments, environment, directory = json.loads(last.removeprefix("STARTED "))
    return arguments, environment, directory
