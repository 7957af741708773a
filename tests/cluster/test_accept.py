"""Acceptance on a real Slurm: one run of the debug recipe, and all three verdicts out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus
from launcher.results.columns import as_dict
from tests.cluster.conftest import AS_USER, Launch
from tests.unit.outcomes import outcome, spread

SIZE = "--nodes 1 --gpus-per-node 1 --steps 14"
ON_CPU = ("--gpu", "cpu", "--config", "cpu.toml", "--recipe", "debug", *SIZE.split())


def accepted_before(tps: float) -> str:
    """What an operator kept of an earlier run of the same recipe on one rank."""
    both: dict[str, Any] = {"seq_len": 256, "local_batch_size": 4, "steps": 14}
    recipe = {"flavor": "debugmodel", "param_dtype": "float32", "activation_checkpoint": "none", "log_freq": 2, **both}
    settings = {"profile.gpu": "CPU", **{f"recipe.{key}": value for key, value in recipe.items()}}
    size = {"gpu": "CPU", "nodes": 1, "gpus": 1, "global_batch_size": 4, "step": 14, "precision": "float32", **both}
    return json.dumps(as_dict(outcome(run="in-june", tps=spread(tps), loss=None, settings=settings, **size)))


@AS_USER
def test_pass_fail_and_cannot_say_of_one_run(launch: Launch, train_image: Path) -> None:
    # No machine is slower than the one or faster than the other: the verdicts do not depend on who runs this.
    for name, tps in (("slow", 0.01), ("fast", 1e9)):
        (launch.directory / f"{name}.json").write_text(accepted_before(tps))
    words = ("--image", train_image, "--name", "mine", "--baseline", "slow.json", "--yes")
    done = launch("accept", *ON_CPU, *words, timeout=900)
    assert done.returncode == ExitStatus.OK, done.stdout + done.stderr + launch("logs", "mine").stdout[-4000:]
    first = done.stdout.splitlines()[0]
    assert first.startswith("PASS  mine: ") and first.endswith("of in-june's 0 (CPU, 1 node)")
    assert "step 14/14" in done.stderr and "step 14/14" not in done.stdout
    kept = launch.run("mine") / "accept.json"
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
