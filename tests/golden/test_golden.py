"""Job scripts as files that a reviewer can read, one per scheduler and runtime, and one with everything.

After a change that is meant: python -m tests.golden.test_golden
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.config.layers import Layer, find, merge, names_of, read_layer
from launcher.config.render import render
from launcher.config.resolve import placed
from launcher.config.spec import PlacedRun, validate

HERE = Path(__file__).parent
RUNTIMES = ("pyxis", "apptainer", "bare")
CASES = [
    ("slurm-gb200-pyxis", "gb200", "pyxis"),
    ("slurm-b200-apptainer", "b200", "apptainer"),
    ("slurm-cpu-bare", "cpu", "bare"),
    ("local-cpu-bare", "cpu", "bare"),
    ("local-h200-apptainer", "h200", "apptainer"),
    ("slurm-gb200-everything", "gb200", "pyxis"),
    ("slurm-gb200-restarts", "gb200", "pyxis"),
    ("local-cpu-restarts", "cpu", "bare"),
]


class Profile(NamedTuple):
    """What a profile changes in a script."""

    gpus: int
    hca: str = ""  # the first and the last InfiniBand port
    topology: str = ""  # NCCL's file about the node
    nvlink: bool = False  # across nodes
    nvls: bool = True


PROFILES = {
    "a100": Profile(8, "1-8", "a100-80gb-sxm", nvls=False),
    "h100": Profile(8, "1-8", "h100-80gb-sxm"),
    "h200": Profile(8, "1-8", "h200-141gb-sxm"),
    "b200": Profile(8, "5-12", "b200-180gb-sxm"),
    "b300": Profile(8, "5-12", "b300-288gb-sxm"),
    "gb200": Profile(4, nvlink=True),
    "gb300": Profile(4, nvlink=True),
    "cpu": Profile(2, nvls=False),
}


def exports_of(profile: Profile) -> dict[str, str]:
    """The variables by which NCCL finds its way, as Crusoe's nodes need them."""
    found = {"NCCL_NVLS_ENABLE": "1"} if profile.nvls else {}
    if profile.nvlink:
        names = ("NCCL_CUMEM_ENABLE", "NCCL_MNNVL_ENABLE", "NCCL_NET_GDR_C2C")
        found |= dict.fromkeys(names, "1") | {"UCX_TLS": "tcp"}
    if profile.hca:
        first, last = map(int, profile.hca.split("-"))
        found |= {
            "NCCL_IBEXT_DISABLE": "1",
            "NCCL_IB_HCA": ",".join(f"mlx5_{port}" for port in range(first, last + 1)),
            "NCCL_IB_MERGE_VFS": "0",
            "NCCL_IB_PCI_RELAXED_ORDERING": "1",
            "NCCL_IB_QPS_PER_CONNECTION": "2",
            "NCCL_IB_SL": "1",
            "NCCL_IB_SPLIT_DATA_ON_QPS": "0",
            "NCCL_TOPO_FILE": f"/etc/crusoe/nccl_topo/{profile.topology}-ib-cloud-hypervisor.xml",
        }
    return found


def spec_of(case: str, gpu: str, runtime: str) -> PlacedRun:
    values: dict[str, object] = {
        "job.name": "accept-1",
        "job.gpu": gpu,
        "job.nodes": 9,
        "job.runtime": runtime,
        "job.runs_dir": "/home/ada/runs",
        "job.image": {"pyxis": "/data/images/titan.sqsh", "apptainer": "/data/images/titan.sif", "bare": ""}[runtime],
    }
    if case.startswith("local"):
        values |= {"job.scheduler": "local", "job.nodes": 1, "job.recipe": "debug", "job.python": "/venv/bin/python"}
    if case.endswith("restarts"):
        values |= {"recipe.checkpoint_interval": 100, "job.max_restarts": 5}
    if case == "slurm-gb200-restarts":
        values |= {"job.spares": 1, "job.segment": 5, "job.continues": 2, "job.checkpoint_dir": "/data/checkpoints"}
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
    spec = placed(merge([*layers, Layer(values, dict.fromkeys(values, "test"), secret_env=secrets)]))
    validate(spec)
    return spec


@pytest.mark.parametrize(("case", "gpu", "runtime"), CASES, ids=[case[0] for case in CASES])
def test_the_script_is_the_one_on_file(case: str, gpu: str, runtime: str) -> None:
    assert render(spec_of(case, gpu, runtime)) == (HERE / f"{case}.sbatch").read_text(encoding="utf-8")


def test_each_profile_has_a_row() -> None:
    assert sorted(PROFILES) == names_of("profiles")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("gpu", PROFILES)
def test_what_a_profile_changes(gpu: str, runtime: str) -> None:
    wanted, script = PROFILES[gpu], render(spec_of(f"slurm-{gpu}-{runtime}", gpu, runtime))
    exports = dict(re.findall(r"^export ((?:NCCL|UCX)_\w+)=(\S+)$", script, re.MULTILINE))
    assert exports == exports_of(wanted)
    gres = re.findall(r"^#SBATCH --gres=(.*)$", script, re.MULTILINE)
    assert gres == ([] if gpu == "cpu" else [f"gpu:{wanted.gpus}"])
    assert f", 9 nodes x {wanted.gpus}, recipe llama3-8b." in script
    assert ("/etc/crusoe:/etc/crusoe:ro" in script) is (bool(wanted.hca) and runtime != "bare")
    if runtime == "pyxis":  # a variable of the image's own would win over one that is not named
        assert set(exports) <= set(re.findall(r"--container-env=(\S+)", script)[0].split(","))
    if runtime == "apptainer":
        assert all(f"APPTAINERENV_{name}={value}" in script for name, value in exports.items())


@pytest.mark.parametrize("gpu", PROFILES)
def test_each_recipe_is_a_job_on_each_profile(gpu: str) -> None:
    for recipe in names_of("recipes"):
        values: dict[str, object] = {"job.name": "r", "job.gpu": gpu, "job.recipe": recipe, "job.image": "/x.sqsh"}
        values |= {"job.nodes": 8, "job.runs_dir": "/r"}
        layers = [read_layer(find("profiles", gpu), ""), read_layer(find("recipes", recipe), "", gpu)]
        spec = placed(merge([*layers, Layer(values, dict.fromkeys(values, "test"))]))
        validate(spec)
        assert f", recipe {recipe}." in render(spec)


def test_no_file_is_left_over_and_bash_can_parse_each() -> None:
    assert sorted(p.stem for p in HERE.glob("*.sbatch")) == sorted(case[0] for case in CASES)
    for path in HERE.glob("*.sbatch"):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
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
    for needed in ("--kill-on-bad-exit=1", "--propagate=NONE", "--ntasks-per-node=1", "--no-container-mount-home"):
        assert needed in script
    assert "\nset -euo pipefail\n" in script and "ENROOT_LOGIN_SHELL=no" in script and "export=NIL" in script


def test_every_step_has_the_jobs_environment() -> None:
    """sbatch --export=NIL holds for srun, too: a step that does not say otherwise has no PATH."""
    scripts = [path.read_text(encoding="utf-8").replace("\\\n", " ") for path in HERE.glob("slurm-*.sbatch")]
    steps = [line for text in scripts for line in text.splitlines() if re.search(r"^[^#]*\bsrun +-", line)]
    assert len(steps) > len(scripts)
    assert [line for line in steps if "--export=ALL" not in line] == []


def test_no_secret_and_no_clock() -> None:
    spec = spec_of("slurm-gb200-everything", "gb200", "pyxis")
    assert render(spec) == render(spec)
    assert "HF_TOKEN=" not in render(spec)


if __name__ == "__main__":
    for old in HERE.glob("*.sbatch"):
        old.unlink()
    for case, gpu, runtime in CASES:
        (HERE / f"{case}.sbatch").write_text(render(spec_of(case, gpu, runtime)), encoding="utf-8")
