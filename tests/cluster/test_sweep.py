"""A sweep on a real Slurm: one job after another, kept in order by Slurm alone, and its table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import Cluster, User, slurm_run
from tests.cluster.test_launcher_on_slurm import CPU_ON_GPU_NODES, Launch, install

NAME = "debug-scaling"
NODES = (1, 2)


def sweep(image: Path) -> tuple[str | Path, ...]:
    """The command: the debug recipe on one and on two nodes with one rank each, a few steps."""
    lists = ("--nodes", ",".join(map(str, NODES)), "--batch-size", "4", "--recipe", "debug")
    short = ("--gpus-per-node", "1", "--steps", "6", "--set", "recipe.log_freq=1")
    return ("sweep", "--gpu", "cpu", "--config", "cpu.toml", "--image", image, *lists, *short, "--name", NAME, "--yes")


@pytest.fixture
def launch(slurm: Cluster, ordinary_user: User, app: Path, user_dir: Path) -> Iterator[Launch]:
    made = Launch(slurm, ordinary_user, user_dir, (install(user_dir / "app", app, ordinary_user), "-m", "launcher"))
    (user_dir / "cpu.toml").write_text(CPU_ON_GPU_NODES if slurm.gpus_per_node else "")
    yield made
    for run in json.loads(made("list", "--json").stdout):
        if run["state"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            made("cancel", run["run"])


def test_a_sweep_of_one_and_two_nodes(launch: Launch, train_image: Path) -> None:
    first, second = (f"{NAME}-debug-{nodes}n-b4" for nodes in NODES)
    done = launch(*sweep(train_image))
    assert done.returncode == 0, done.stderr
    assert f"{second}: Slurm job " in done.stdout and f", after job {launch.job_id(first)}" in done.stdout
    status = json.loads(launch("status", second, "--json").stdout)
    assert (status["state"], status["reason"]) == ("PENDING", "Dependency"), done.stdout
    waiting = slurm_run(launch.slurm, ["scontrol", "show", "job", launch.job_id(second)], launch.user).stdout
    assert f"Dependency=afterany:{launch.job_id(first)}" in waiting

    # The launcher has ended; Slurm starts the second. Calling again only waits for the end of both.
    table = launch(*sweep(train_image), "--follow", timeout=900)
    logs = "".join(launch("logs", run).stdout[-4000:] for run in (first, second))
    assert table.returncode == 0, table.stdout + table.stderr + logs
    assert "Slurm job" not in table.stdout
    lines = table.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [[first, "COMPLETED"], [second, "COMPLETED"]]
    assert "100% of 1n" in lines[1] and "% of 1n" in lines[2] and "node-hours used" in lines[3]

    found = json.loads(launch(*sweep(train_image), "--json").stdout)
    one, two = found["cells"]
    assert (one["complete"], two["complete"], two["gpus"]) == (True, True, 2)
    assert two["scaling"] == pytest.approx(two["tps"] / one["tps"])
    assert found["node_hours"] > 0 and found["node_hours_complete"]
    assert len(json.loads(launch("list", "--json").stdout)) == 2  # nothing was submitted again
    began = [json.loads((launch.directory / "runs" / run / "end.json").read_text()) for run in (first, second)]
    assert began[0]["ended_at"] <= began[1]["began_at"]

    compared = launch("compare", first, second)
    assert compared.returncode == 0 and "job.nodes" in compared.stdout, compared.stdout + compared.stderr
    assert "tokens/s per rank" in compared.stdout and "not comparable" not in compared.stdout
    page = launch("report", "-o", "page.html", "--json")
    assert page.returncode == 0, page.stderr
    assert json.loads(page.stdout)["runs"] == 2 and json.loads(page.stdout)["incomplete"] == []
    text = (launch.directory / "page.html").read_text()
    assert all(run in text for run in (first, second)) and "Scaling of CPU" not in text  # a line has three points


def test_a_job_that_slurm_has_forgotten_holds_nothing_up(launch: Launch) -> None:
    """What `sweep` relies on when the job that it would wait for has just left Slurm's memory."""
    script = launch.directory / "empty.sbatch"
    script.write_text("#!/bin/sh\n")
    done = slurm_run(
        launch.slurm,
        ["sbatch", "--parsable", "--dependency=afterany:9999999", str(script)],
        launch.user,
        launch.directory,
    )
    assert done.returncode == 0, done.stderr
    job = ["scontrol", "-o", "show", "job", done.stdout.strip()]
    wait_for(lambda: "JobState=COMPLETED" in slurm_run(launch.slurm, job).stdout, "the job", 60)
