"""A sweep on a real Slurm: one job after another, kept in order by Slurm alone, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import AS_USER, Launch
from tests.cluster.daemons import wait_for
from tests.cluster.slurm_cluster import slurm_run

pytestmark = AS_USER
NAME = "debug-scaling"
NODES = (1, 2)


def sweep(image: Path) -> tuple[str | Path, ...]:
    """The command: the debug recipe on one and on two nodes with one rank each, a few steps."""
    lists = ("--nodes", ",".join(map(str, NODES)), "--batch-size", "4", "--recipe", "debug")
    short = ("--gpus-per-node", "1", "--steps", "6", "--set", "recipe.log_freq=1")
    return ("sweep", "--gpu", "cpu", "--config", "cpu.toml", "--image", image, *lists, *short, "--name", NAME, "--yes")


def test_a_sweep_of_one_and_two_nodes(launch: Launch, train_image: Path) -> None:
    first, second = (f"{NAME}-debug-{nodes}n-b4" for nodes in NODES)
    done = launch(*sweep(train_image))
    assert done.returncode == 0, done.stderr
    assert f"{second}: Slurm job " in done.stdout and f", after job {launch.status(first)['job_id']}" in done.stdout
    status = launch.status(second)
    assert (status["state"], status["reason"]) == ("PENDING", "Dependency"), done.stdout
    waiting = slurm_run(launch.slurm, ["scontrol", "show", "job", status["job_id"]], launch.user).stdout
    assert f"Dependency=afterany:{launch.status(first)['job_id']}" in waiting

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
    began = [json.loads((launch.run(run) / "end.json").read_text()) for run in (first, second)]
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
    script = str(launch.script("empty.sbatch", "#!/bin/sh\n"))
    words = ["sbatch", "--parsable", "--dependency=afterany:9999999", script]
    done = slurm_run(launch.slurm, words, launch.user, launch.directory)
    assert done.returncode == 0, done.stderr
    job = ["scontrol", "-o", "show", "job", done.stdout.strip()]
    wait_for(lambda: "JobState=COMPLETED" in slurm_run(launch.slurm, job).stdout, "the job", 60)
