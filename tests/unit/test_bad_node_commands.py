"""Nodes that failed their check: the file, the commands, and submissions that go on without them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.nodes import bad_nodes
from launcher.nodes.bad_nodes import DAY_S, KEEP_S
from tests.cluster_fixtures import FakeNode, install, partition_line
from tests.cluster_fixtures import cluster as answers_of
from tests.conftest import Launch
from tests.unit.bad_node_records import ECC, MOUNT, NO_DATA, NOW, Fake, record
from tests.unit.test_bad_nodes import bad

# ---------------------------------------------------------------- the file, and the commands

PAIR = answers_of(
    "25.05.3", [FakeNode(f"n{i}", arch="x86_64") for i in range(3)], [partition_line("batch", "n[0-2]", default=True)]
)
RUN = ("--runtime", "bare", "--recipe", "debug", "--data", "sample", "--tokenizer", "sample")
SUBMIT = ("submit", "--gpu", "h200", *RUN)


@pytest.fixture
def pair(fake_slurm: Fake) -> Fake:
    """A cluster of n0, n1 and n2, which takes every job."""
    install(PAIR, fake_slurm)
    fake_slurm("sbatch", "echo 42")
    return fake_slurm


def left_out(launch: Launch, run: str = "bad") -> list[str]:
    found: list[str] = json.loads(launch("status", run, "--json").stdout)["left_out"]
    return found


def unfit_run(workplace: Path, name: str, *records: Mapping[str, Any], ended_at: float = 0, code: int = 20) -> Path:
    """A run directory whose job stopped at the check of its nodes."""
    folder = workplace / "runs" / name
    for part in ("logs", "job", "nodes"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    about = {
        "job": {"nodes": len(records), "recipe": "debug"},
        "profile": {"gpu": "H200", "gpus_per_node": 8},
        "recipe": {"steps": 1},
        "placed": {"run_dir": str(folder)},
    }
    (folder / "job" / "node.json").write_text(json.dumps(about))
    (folder / "intent.json").write_text(json.dumps({"scheduler": "slurm", "at": time.time(), "job_name": name}))
    (folder / "job.json").write_text('{"job_id": "7"}')
    for number, entry in enumerate(records):
        (folder / "nodes" / f"{number:04d}-{entry.get('host')}.json").write_text(json.dumps(entry))
    end = {"job_id": "7", "exit_code": code, "signal": "", "slurm": "", "ended_at": ended_at or time.time()}
    (folder / "end.json").write_text(json.dumps(end))
    return folder


def listed(launch: Launch) -> dict[str, dict[str, Any]]:
    done = launch("cluster", "nodes", "--json")
    assert done.returncode == 0, done.stderr
    return {node["host"]: node for node in json.loads(done.stdout)["nodes"]}


def test_looking_at_the_run_remembers_and_a_release_lasts(launch: Launch, pair: Fake, workplace: Path) -> None:
    folder = unfit_run(workplace, "bad", record("n0"), record("n1", ECC))
    done = launch("status", "bad")
    assert done.returncode == ExitStatus.NODES_UNFIT
    assert "bad: FAILED (a node failed its check before training; from end.json)" in done.stdout
    assert "cause: node n1 is not fit to train: GPU 2 has ECC errors" in done.stderr
    assert "left out of new runs: n1, until " in done.stderr
    assert listed(launch)["n1"]["run"] == str(folder)
    assert oct((workplace / "home/.config/titan-launcher/nodes.json").stat().st_mode & 0o777) == "0o600"
    table = launch("cluster", "nodes").stdout
    assert table.startswith("node  since") and "GPU 2 has ECC errors" in table
    assert launch("cluster", "nodes", "release", "n1").returncode == 0
    assert left_out(launch) == [] and listed(launch) == {}
    unfit_run(workplace, "worse", record("n0"), record("n1", ECC))
    assert left_out(launch, "worse") == ["n1"]


def test_every_unfit_node_is_shown_with_all_that_is_wrong(launch: Launch, pair: Fake, workplace: Path) -> None:
    folder = unfit_run(workplace, "bad", record("n0", ECC, MOUNT), record("n1", NO_DATA), record("n2"))
    os.mkfifo(folder / "nodes" / "0009-n9.json")
    done = launch("status", "bad")
    said = [line.strip() for line in done.stderr.splitlines()]
    assert "cause: 2 nodes are not fit to train" in said
    assert [line for line in said if line.startswith("| n")] == [
        "| n0: GPU 2 has ECC errors; reset it",
        "| n0: /data is not mounted; mount it",
        "| n1: /data/c5: no such directory; --data DIR",
    ]
    assert any(line.startswith("left out of new runs: n0, until ") for line in said)
    failure = json.loads(launch("status", "bad", "--json").stdout)["failure"]
    assert (failure["known_error"], failure["log"]) == ("node-unfit", str(folder / "nodes"))


NOT_REMEMBERED = {
    "a week ago": ([record("n0"), record("n1", ECC)], {"ended_at": time.time() - KEEP_S - 60}),
    "the same everywhere": ([record("n0", MOUNT), record("n1", MOUNT)], {}),
    "no host's name": ([record("n0"), record("n1,n[0-9]", ECC)], {}),
    "options in a name": ([record("n0"), record("--nodes=9", ECC)], {}),
}


@pytest.mark.parametrize(("records", "values"), NOT_REMEMBERED.values(), ids=NOT_REMEMBERED.keys())
def test_not_remembered(
    records: list[Any], values: dict[str, Any], launch: Launch, pair: Fake, workplace: Path
) -> None:
    unfit_run(workplace, "bad", *records, **values)
    assert launch("status", "bad").returncode == ExitStatus.NODES_UNFIT
    assert listed(launch) == {}


def test_copies_and_other_failures_are_not_remembered(launch: Launch, pair: Fake, workplace: Path) -> None:
    """srun ends the other tasks by SIGTERM, and theirs is the higher code: it hides that of the check."""
    folder = unfit_run(workplace, "bad", record("n0"), record("n1", ECC))
    folder.rename(workplace / "runs" / "moved")
    assert left_out(launch, "moved") == []
    for name, problems, code, status in (
        ("trained", (), 1, ExitStatus.JOB_FAILED),
        ("crashed", (ECC,), 1, ExitStatus.JOB_FAILED),
        ("killed", (), 143, ExitStatus.JOB_FAILED),
        ("hidden", (ECC,), 143, ExitStatus.NODES_UNFIT),
    ):
        assert listed(launch) == {}
        unfit_run(workplace, name, record("n0"), record("n1", *problems), code=code)
        assert launch("status", name).returncode == status
    assert listed(launch).keys() == {"n1"}


def test_an_unfit_node_of_a_run_that_went_on_is_remembered(launch: Launch, pair: Fake, workplace: Path) -> None:
    """It had spares. Its own end is another matter, whatever srun's code would say of a run that has none."""
    unfit = [{"host": "n1", "name": "ecc", "why": "GPU 2 has ECC errors", "fix": "reset it", "fault": "node"}]
    verdict = {"ok": True, "nodes": 3, "chosen": ["n0", "n2"], "spare": [], "unfit": unfit}
    for code, status in ((0, ExitStatus.OK), (143, ExitStatus.JOB_FAILED)):
        folder = unfit_run(workplace, f"went{code}", record("n0"), record("n1", ECC), record("n2"), code=code)
        (folder / "nodes" / "check.json").write_text(json.dumps(verdict))
        done = launch("status", folder.name, "--json")
        assert done.returncode == status and json.loads(done.stdout)["left_out"] == ["n1"]
        assert listed(launch)["n1"]["run"] == str(folder)
        assert launch("cluster", "nodes", "release", "n1").returncode == 0
    (folder / "nodes" / "check.json").write_text('{"chosen": [7, "n0"], "unfit": 3, "nodes": "x"}')
    assert launch("status", folder.name).returncode == ExitStatus.JOB_FAILED


def test_submit_leaves_them_out_and_says_so(launch: Launch, pair: Fake, workplace: Path) -> None:
    """Of a run that nobody has looked at, too; and the next run forgets it with the node's release."""
    unfit_run(workplace, "bad", record("n0"), record("n1", ECC))
    done = launch(*SUBMIT, "--name", "next", "--nodes", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^excluded: n1 \(GPU 2 has ECC errors, \d+ s ago\); launcher cluster nodes$", done.stderr, re.M)
    assert "#SBATCH --exclude=n1\n" in (workplace / "runs/next/job.sbatch").read_text()
    assert 'exclude = ""' in (workplace / "runs/next/run.toml").read_text()
    short = launch(*SUBMIT, "--name", "all", "--nodes", "3")
    assert short.returncode == ExitStatus.INVALID and "has 2, without those that failed their check" in short.stderr
    assert launch("cluster", "nodes", "release", "--all").returncode == 0
    again = launch("submit", "runs/next/run.toml", "--name", "again", "--nodes", "3")
    assert again.returncode == 0, again.stderr
    assert "--exclude" not in (workplace / "runs/again/job.sbatch").read_text()


def test_added_by_hand(launch: Launch, pair: Fake, workplace: Path) -> None:
    done = launch("cluster", "nodes", "add", "n[0-1]", "nowhere", "--reason", "rack 3\nis warm", "--days", "2")
    assert done.returncode == 0 and "Slurm has no node nowhere" in done.stderr
    nodes = listed(launch)
    assert set(nodes) == {"n0", "n1", "nowhere"} and nodes["n0"]["reason"] == "rack 3 is warm"
    assert nodes["n0"]["until"] - nodes["n0"]["at"] == 2 * DAY_S
    checks = json.loads(launch("preflight", *SUBMIT[1:], "--json").stdout)["checks"]
    (said,) = [check["what"] for check in checks if check["name"] == "excluded"]
    assert said.startswith("n0 (rack 3 is warm, ") and ", n1 (rack 3 is warm, " in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("add", "a b", "--reason", "x"), ExitStatus.INVALID, "not a node's name"),
        (("add", "n[1-2", "--reason", "x"), ExitStatus.INVALID, "'n[1-2': not a node's name"),
        (("add", "n0"), ExitStatus.USAGE, "--reason"),
        (("release", "n0"), ExitStatus.NOT_FOUND, "n0 is not left out on crusoe"),
        (("release",), ExitStatus.USAGE, "either hosts or --all"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: ExitStatus, said: str, launch: Launch, pair: Fake) -> None:
    done = launch("cluster", "nodes", *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


AT = '{"schema": 1, "clusters": {"crusoe": [{"host": "n1", "reason": "", "run": "", "at": 0, "until": %s}]}}'
DAMAGED = (
    *("", "{", '{"schema": 2, "clusters": {}}', '{"schema": 1, "clusters": {"crusoe": [{"host": "a b"}]}}'),
    *('{"schema": 1, "clusters": {"crusoe": {"a": 1}}}', AT % "1e300", AT % ("9" * 400), AT % "NaN"),
)


def test_a_damaged_file_stops_no_look_at_a_run(launch: Launch, pair: Fake, workplace: Path) -> None:
    file = workplace / "home/.config/titan-launcher/nodes.json"
    file.parent.mkdir(parents=True)
    for text in DAMAGED:
        file.write_text(text)
        with pytest.raises(LauncherError, match="damaged"):
            bad_nodes.read()
    unfit_run(workplace, "bad", record("n0"), record("n1", ECC))
    status = launch("status", "bad")
    assert status.returncode == ExitStatus.NODES_UNFIT
    assert "warning: could not remember the nodes that failed their check" in status.stderr
    done = launch("cluster", "nodes")
    assert done.returncode == ExitStatus.INVALID and "nodes.json.damaged" in done.stderr
    submitted = launch(*SUBMIT, "--name", "next")
    assert submitted.returncode == 0 and "nodes that failed their check could not be left out" in submitted.stderr
    assert file.read_text() == text


def test_what_cannot_be_printed_is_replaced(launch: Launch, pair: Fake, workplace: Path) -> None:
    """A path that is not UTF-8 in a node's words; and a node that a person wrote into the file."""
    unfit_run(workplace, "bad", record("n0"), record("n1", {**ECC, "what": "/data/\udce9 is gone \x1b[31m"}))
    assert left_out(launch) == ["n1"]
    assert listed(launch)["n1"]["reason"] == "/data/? is gone \x1b[31m"
    assert "\x1b" not in launch("cluster", "nodes").stdout
    file = workplace / "home/.config/titan-launcher/nodes.json"
    by_hand = {"host": "n2", "reason": "\ud800", "run": "", "at": time.time(), "until": time.time() + DAY_S}
    file.write_text(json.dumps({"schema": 1, "clusters": {"crusoe": [by_hand]}}))
    assert listed(launch)["n2"]["reason"] == "?"


def test_of_clusters_that_share_a_home_the_jobs_own_counts(launch: Launch, pair: Fake, workplace: Path) -> None:
    unfit_run(workplace, "bad", record("n0", cluster="other"), record("n1", ECC, cluster="other"))
    assert left_out(launch) == ["n1"]
    assert listed(launch) == {} and [node.host for node in bad_nodes.read()["other"]] == ["n1"]


def test_several_at_once_lose_nothing(workplace: Path) -> None:
    def add(number: int) -> None:
        bad_nodes.change("c", lambda old: bad_nodes.added(old, [bad(f"n{number}")], NOW))

    with ThreadPoolExecutor(16) as pool:  # the lock is one of open files, not of processes
        list(pool.map(add, range(64)))
    assert len(bad_nodes.read()["c"]) == 64


def test_a_home_that_cannot_be_written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "file"))
    with pytest.raises(LauncherError) as error:
        bad_nodes.change("c", lambda old: [*old, bad("n1")])
    assert error.value.status is ExitStatus.FILESYSTEM and "XDG_CONFIG_HOME" in error.value.fix


def test_retry_bad_nodes_is_another_name(launch: Launch) -> None:
    """The run begins anew by itself, as with --max-restarts; test_again.py says on which nodes."""
    scripts = [
        launch(*SUBMIT, "--name", "r", "--dry-run", option, "2").stdout
        for option in ("--retry-bad-nodes", "--max-restarts")
    ]
    assert scripts[0] == scripts[1] and "#SBATCH --requeue" in scripts[0]
