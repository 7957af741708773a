"""`launcher cluster show` and `cluster use` as a user calls them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus, LauncherError
from launcher.config.write import save
from tests.cluster_fixtures import CLUSTERS, FakeNode, cluster, install, partition_line
from tests.conftest import Launch

Fake = Callable[[str, str], Path]
CONTRADICTORY = cluster(
    "25.05.3",
    [FakeNode("b200-1", gres="gpu:h200:8", reason="a \x1b[31mred] reason", state="IDLE+DRAIN")],
    [partition_line("batch", "b200-1", default=True)],
    pyxis=False,
)


def test_show_says_what_the_cluster_is_and_why(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["terraform-24.11"], fake_slurm)
    done = launch("cluster", "show")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "cluster crusoe, Slurm 24.11",
        "topology block, --segment works",
        "accounting off: Slurm forgets a job minutes after its end",
        "partition batch* up, no time limit: 36 nodes (31 idle, 1 drained, 1 down, 1 mixed, 1 reserved, 1 allocated)",
        "partition short up, 30 min: 2 nodes (2 idle)",
        "18 x 4 GPUs (gb200), aarch64, 144 CPUs, 850 GiB: batch-compute-node-[019-036]",
        "drained batch-compute-node-003: NVLink [GPU 2] State=IDLE: xid 145 (see #7) [root@2026-03-04T05:06:07]",
        "down batch-compute-node-005: Not responding [root@2026-03-04T05:06:07]",
        "block rack1: 18 nodes, 13 idle",
        "block rack3: 0 nodes, 0 idle",
        "Profile: gb200",
        "for GRES gpu:gb200:4(S:0-1): gb200",
        "fits aarch64: gb200, gb300",
        "Save it: launcher cluster use gb200",
    ):
        assert line in lines
    assert any(line.startswith("Pyxis yes") for line in lines)


def test_show_as_json_has_every_node_of_the_partition(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["terraform-24.11"], fake_slurm)
    done = launch("cluster", "show", "--partition", "short", "--json")
    shown = json.loads(done.stdout)
    assert [shown[key] for key in ("slurm", "topology", "segment", "pyxis")] == [[24, 11], "block", True, ""]
    assert [shown[key] for key in ("notes", "unread", "squashfuse")] == [[], [], None]
    names = ["batch-compute-node-001", "batch-compute-node-002"]
    seen = [[n[key] for key in ("name", "state", "free", "block")] for n in shown["nodes"]]
    assert seen == [[name, "idle", True, "rack1"] for name in names]
    assert {p["name"]: p["guessed"] for p in shown["partitions"]} == {"batch": False, "short": False}
    assert [block["idle"] for block in shown["blocks"]] == [13, 18, 0]
    assert shown["proposal"]["profile"] == "gb200"
    sources = {evidence["source"] for evidence in shown["proposal"]["evidence"]}
    assert sources >= {"GRES", "count", "architecture", "CPUs", "memory"}


def test_evidence_that_disagrees_is_shown_from_both_sides(launch: Launch, fake_slurm: Fake) -> None:
    install(CONTRADICTORY, fake_slurm)
    done = launch("cluster", "show")
    text = " ".join(done.stdout.split())
    assert "Profile: none fits for sure" in text
    assert "against GRES gpu:h200:8 says h200; node names b200-1 says b200" in text
    assert "no --container-image in srun --help" in text
    assert "a ?[31mred] reason" in text, "nothing of a reason drives the terminal"
    assert "Save it: launcher cluster use b200|h200" in text


def test_what_cannot_be_read_is_a_warning_and_no_guess(launch: Launch, fake_slurm: Fake) -> None:
    install({"nodes": CLUSTERS["managed-25.11"]["nodes"]}, fake_slurm)
    done = launch("cluster", "show")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "(name unknown), Slurm of unknown version" in text
    assert "accounting unknown" in text and "Pyxis unknown" in text
    assert "Profile: h200" in text
    assert "warning: scontrol show config: scontrol failed (exit code 1): scontrol: error: no" in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "failed"),
        ("echo hello", "nonsense"),
        (":", "nonsense"),
    ],
)
def test_no_slurm_is_an_error_with_its_own_words(script: str, said: str, launch: Launch, fake_slurm: Fake) -> None:
    fake_slurm("scontrol", script)
    done = launch("cluster", "show")
    assert done.returncode == ExitStatus.CLUSTER
    assert said in done.stderr and "try:" in done.stderr


def test_commands_that_are_not_installed(launch: Launch, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    done = launch("cluster", "show", PATH=str(workplace / "empty"))
    assert done.returncode == ExitStatus.CLUSTER
    assert "scontrol is not installed here" in done.stderr


def test_an_unknown_partition_is_answered_with_the_known_ones(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["terraform-24.11"], fake_slurm)
    for command in ("show", "use"):
        done = launch("cluster", command, "--partition", "btach")
        assert done.returncode == ExitStatus.NOT_FOUND
        assert "it has batch, short" in done.stderr


# ------------------------------------------------------------------------------------------ use


def test_use_saves_the_profile_that_fits_as_a_default(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    install(CLUSTERS["managed-25.11"], fake_slurm)
    done = launch("cluster", "use", "--partition", "all")
    file = workplace / "home" / ".config" / "titan-launcher" / "config.toml"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"gpu = h200, partition = all: saved in {file}\n"
    shown = json.loads(launch("config", "show", "--image", "/titan.sqsh", "--json").stdout)
    assert shown["job.gpu"] == {"value": "h200", "origin": f"file {file}"}
    assert shown["job.partition"]["value"] == "all"


def test_use_warns_of_a_contradiction_and_obeys(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    install(CLUSTERS["managed-25.11"], fake_slurm)
    done = launch("cluster", "use", "gb200", "--config", "mine.toml")
    assert done.returncode == 0
    assert "gb200 does not fit 8 GPUs a node" in done.stderr
    assert "gb200 does not fit x86_64" in done.stderr
    assert (workplace / "mine.toml").read_text() == '[job]\ngpu = "gb200"\n'


def test_use_without_a_name_refuses_where_none_fits(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    install(CONTRADICTORY, fake_slurm)
    done = launch("cluster", "use", "--config", "mine.toml")
    assert done.returncode == ExitStatus.NOT_FOUND
    assert "says h200" in done.stderr and "launcher cluster use b200|h200" in done.stderr
    assert not (workplace / "mine.toml").exists()


def test_use_needs_a_profile_that_exists_and_no_slurm(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    done = launch("cluster", "use", "gb20")
    assert (done.returncode, "launcher cluster use gb200" in done.stderr) == (ExitStatus.NOT_FOUND, True)
    (workplace / "own.toml").write_text("[profile]\ngpus_per_node = 2\n")
    done = launch("cluster", "use", "./own.toml", "--config", "mine.toml", "--json")
    assert "not compared with the nodes" in done.stderr
    assert json.loads(done.stdout)["job"] == {"gpu": str(workplace / "own.toml")}


def test_submit_takes_the_profile_that_show_proposes(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["managed-25.11"], fake_slurm)
    render = ("render", "--image", "/titan.sqsh")
    assert "--gres=gpu:8" in launch(*render).stdout
    install(CONTRADICTORY, fake_slurm)
    done = launch(*render)
    assert done.returncode == ExitStatus.NOT_FOUND
    assert "does not say clearly which GPU it has" in done.stderr and "node names b200-1 says b200" in done.stderr


# ------------------------------------------------------------------------------------------ the user's file


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", ""),
        ("# mine", "# mine"),
        ('[env]\nA = "1" # one\n', '[env]\nA = "1" # one\n'),
        ('[job]\ngpu = "h100" # old\n', " # old\n"),
        ("[job] # x\nnodes = 2\n[env]\n", "[job] # x\nnodes = 2\n"),
        ('[env]\ngpu = "no"\n[job]\n  gpu=\'h100\'\n[titan]\ngpu = "no"\n', '[titan]\ngpu = "no"\n'),
        ('[job]\nmounts = [\n  "/a:/b",\n]\n', 'mounts = [\n  "/a:/b",\n]\n'),
        ("[gpu.h100.job]\nnodes = 2\n", "[gpu.h100.job]\nnodes = 2\n"),
        ('job.gpu = "h100"\n', ""),
        ('job = { gpu = "h100", nodes = 2 }\n', "job = { "),
        ('a = """\n[job]\n"""\n', 'a = """\n[job]\n"""\n'),
        ('[job]\ngpu = """\nh100"""\n', "[job]\n"),
    ],
)
def test_saving_keeps_all_else_in_the_file(before: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(before)
    save(path, "job", {"gpu": "b200"})
    text, was = path.read_text(), tomllib.loads(before)
    assert kept in text and tomllib.loads(text) == was | {"job": was.get("job", {}) | {"gpu": "b200"}}
    save(path, "job", {"gpu": "b200"})
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("text", ["job = 3\n", "[job\n"])
def test_what_is_no_table_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(LauncherError) as raised:
        save(path, "job", {"gpu": "b200"})
    assert str(path) in raised.value.what
    assert path.read_text() == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=20))
def test_any_value_is_read_back_or_refused(value: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        save(path, "job", {"gpu": value})
        assert tomllib.loads(path.read_text(encoding="utf-8")) == {"job": {"gpu": value}}


def test_a_link_stays_one_and_the_mode_too(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("[job]\n")
    real.chmod(0o600)
    link = tmp_path / "config.toml"
    link.symlink_to(real)
    save(link, "job", {"gpu": "b200"})
    assert link.is_symlink() and "b200" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "config.toml"):
        with pytest.raises(LauncherError) as raised:
            save(path, "job", {"gpu": "b200"})
        assert raised.value.status is ExitStatus.FILESYSTEM
