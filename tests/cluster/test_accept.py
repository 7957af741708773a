"""Acceptance on a real Slurm: one run of the debug recipe, and all three verdicts out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.results.columns import as_dict
from tests.cluster.slurm_cluster import Cluster, User
from tests.cluster.test_launcher_on_slurm import CPU_ON_GPU_NODES, Launch, install
from tests.unit.outcomes import outcome, spread

ON_CPU = (
    "--gpu",
    "cpu",
    "--config",
    "cpu.toml",
    "--recipe",
    "debug",
    "--gpus-per-node",
    "1",
    "--steps",
    "14",
)


@pytest.fixture
def launch(slurm: Cluster, ordinary_user: User, app: Path, user_dir: Path) -> Iterator[Launch]:
    python = install(user_dir / "app", app, ordinary_user)
    made = Launch(slurm, ordinary_user, user_dir, (python, "-m", "launcher"))
    (user_dir / "cpu.toml").write_text(CPU_ON_GPU_NODES if slurm.gpus_per_node else "")
    yield made
    for run in json.loads(made("list", "--json").stdout):
        if run["state"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            made("cancel", run["run"])


def accepted_before(tps: float) -> str:
    """What an operator kept of an earlier run of the same recipe on one rank."""
    recipe: dict[str, Any] = {
        "flavor": "debugmodel",
        "seq_len": 256,
        "local_batch_size": 4,
        "param_dtype": "float32",
        "activation_checkpoint": "none",
        "steps": 14,
        "log_freq": 2,
    }
    settings = {f"recipe.{key}": value for key, value in recipe.items()}
    kept = outcome(
        run="in-june",
        gpu="CPU",
        nodes=1,
        gpus=1,
        local_batch_size=4,
        global_batch_size=4,
        seq_len=256,
        steps=14,
        step=14,
        precision="float32",
        tps=spread(tps),
        loss=None,
        settings={"profile.gpu": "CPU", **settings},
    )
    return json.dumps(as_dict(kept))


def test_pass_fail_and_cannot_say_of_one_run(launch: Launch, train_image: Path) -> None:
    # No machine is slower than the one or faster than the other: the verdicts do not depend on who runs this.
    for name, tps in (("slow", 0.01), ("fast", 1e9)):
        (launch.directory / f"{name}.json").write_text(accepted_before(tps))
    done = launch(
        "accept",
        "--image",
        train_image,
        "--nodes",
        "1",
        *ON_CPU,
        "--name",
        "mine",
        "--baseline",
        "slow.json",
        "--yes",
        timeout=900,
    )
    assert done.returncode == ExitStatus.OK, done.stdout + done.stderr + launch("logs", "mine").stdout[-4000:]
    first = done.stdout.splitlines()[0]
    assert first.startswith("PASS  mine: ") and first.endswith("of in-june's 0 (CPU, 1 node)")
    assert "step 14/14" in done.stderr and "step 14/14" not in done.stdout
    kept = launch.directory / "runs" / "mine" / "accept.json"
    assert json.loads(kept.read_text())["verdict"] == "PASS"

    done = launch("accept", "mine", "--baseline", "fast.json", "--json")
    assert done.returncode == ExitStatus.BELOW
    assert json.loads(done.stdout) == json.loads(kept.read_text()) and "FAIL" in done.stdout
    done = launch("accept", "mine")
    assert done.returncode == ExitStatus.CANNOT_SAY
    assert "there is no result for CPU to compare with" in done.stdout

    # Its own result, kept as a file, is a baseline for the next run, and none for itself.
    result = json.loads(launch("results", "mine", "--format", "json").stdout)
    (launch.directory / "mine.json").write_text(json.dumps(result))
    done = launch("accept", "runs/mine", "--baseline", "mine.json")
    assert done.returncode == ExitStatus.CANNOT_SAY and "the baseline is this run itself" in done.stdout
    (launch.directory / "other.json").write_text(json.dumps({**result, "run_dir": "/elsewhere/mine"}))
    done = launch("accept", "runs/mine", "--baseline", "other.json")
    assert done.returncode == ExitStatus.OK and "100.0% of mine's" in done.stdout
    done = launch("compare", "mine", "mine.json")
    assert done.returncode == 0 and "Settings and versions: none differ" in done.stdout
