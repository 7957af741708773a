"""The job script of every profile and runtime, as a file that a reviewer can read.

After a change that is meant: python -m tests.golden.test_golden
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.config.layers import Layer, find, merge, names_of, read_layer
from launcher.config.render import render
from launcher.config.spec import RunSpec, validate

HERE = Path(__file__).parent
RUNTIMES = ("pyxis", "apptainer", "bare")
CASES = [
    *((f"slurm-{gpu}-{runtime}", gpu, runtime) for gpu in names_of("profiles") for runtime in RUNTIMES),
    ("local-cpu-bare", "cpu", "bare"),
    ("local-h200-apptainer", "h200", "apptainer"),
    ("slurm-gb200-everything", "gb200", "pyxis"),
]


def spec_of(case: str, gpu: str, runtime: str) -> RunSpec:
    values: dict[str, object] = {
        "job.name": "accept-1",
        "job.gpu": gpu,
        "job.nodes": 9,
        "job.runtime": runtime,
        "job.runs_dir": "/home/ada/runs",
        "job.image": {"pyxis": "/data/images/titan.sqsh", "apptainer": "/data/images/titan.sif", "bare": ""}[runtime],
    }
    if case.startswith("local"):
        values |= {
            "job.scheduler": "local",
            "job.nodes": 1,
            "job.recipe": "debug",
            "job.python": "/venv/bin/python",
        }
    if case.endswith("everything"):
        values |= {
            "job.partition": "batch",
            "job.account": "ops",
            "job.qos": "high",
            "job.reservation": "acceptance",
            "job.nodelist": "gpu-[001-009]",
            "job.exclude": "gpu-004",
            "job.segment": 9,
            "job.time": "1-02:00:00",
            "job.image": "/data/my images/ada's titan.sqsh",
            "job.mounts": ["/scratch/local:/scratch", "/opt:/opt:ro"],
            "job.data": "/data/c4 $(en)",
            "env.GREETING": 'it\'s, "quoted" $HOME',
            "titan.training.max_norm": "2.0",
        }
    layers = [
        read_layer(find("profiles", gpu), ""),
        read_layer(find("recipes", str(values.get("job.recipe", "llama3-8b"))), "", gpu),
    ]
    secrets = ("HF_TOKEN",) if case.endswith("everything") else ()
    spec = merge([*layers, Layer(values, dict.fromkeys(values, "test"), secret_env=secrets)])
    validate(spec)
    return spec


@pytest.mark.parametrize(("case", "gpu", "runtime"), CASES, ids=[case[0] for case in CASES])
def test_the_script_is_the_one_on_file(case: str, gpu: str, runtime: str) -> None:
    assert render(spec_of(case, gpu, runtime)) == (HERE / f"{case}.sbatch").read_text(encoding="utf-8")


def test_no_file_is_left_over() -> None:
    assert sorted(p.stem for p in HERE.glob("*.sbatch")) == sorted(case[0] for case in CASES)


@pytest.mark.parametrize("case", [case[0] for case in CASES])
def test_bash_can_parse_it(case: str) -> None:
    done = subprocess.run(["bash", "-n", str(HERE / f"{case}.sbatch")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed: apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    files = [str(HERE / f"{case[0]}.sbatch") for case in CASES]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_rules_of_a_pyxis_job() -> None:
    script = render(spec_of("slurm-gb200-pyxis", "gb200", "pyxis"))
    assert script.count("--container-image=") == 1 and script.count("\nsrun ") == 1
    assert "--mpi" not in script and "--container-name" not in script
    for needed in (
        "--kill-on-bad-exit=1",
        "--propagate=NONE",
        "--ntasks-per-node=1",
        "--no-container-mount-home",
    ):
        assert needed in script
    assert "\nset -euo pipefail\n" in script and "ENROOT_LOGIN_SHELL=no" in script and "export=NIL" in script


def test_no_secret_and_no_clock() -> None:
    spec = spec_of("slurm-gb200-everything", "gb200", "pyxis")
    assert render(spec) == render(spec)
    assert "HF_TOKEN=" not in render(spec)


if __name__ == "__main__":
    for old in HERE.glob("*.sbatch"):
        old.unlink()
    for case, gpu, runtime in CASES:
        (HERE / f"{case}.sbatch").write_text(render(spec_of(case, gpu, runtime)), encoding="utf-8")
