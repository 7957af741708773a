"""`launcher cluster show` and `launcher init` as a user calls them."""

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
from launcher.preflight.site import ABOUT
from launcher.stage import inventory, sample
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
        "Save it: launcher init --gpu gb200",
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
    assert "Save it: launcher init --gpu b200|h200" in text


def test_what_cannot_be_read_is_a_warning_and_no_guess(launch: Launch, fake_slurm: Fake) -> None:
    install({"nodes": CLUSTERS["managed-25.11"]["nodes"]}, fake_slurm)
    done = launch("cluster", "show")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "(name unknown), Slurm of unknown version" in text
    assert "accounting unknown" in text and "Pyxis unknown" in text and "no time limit" not in text
    assert "whether --segment works is unknown" in text and "partition all" not in text
    assert "Profile: h200" in text
    assert "warning: scontrol show config: scontrol failed (exit code 1): scontrol: error: no" in done.stderr


def test_no_slurm_is_an_error_with_its_own_words(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    for script, said in (
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "failed"),
        ("echo hello", "nonsense"),
        (":", "nonsense"),
    ):
        fake_slurm("scontrol", script)
        done = launch("cluster", "show")
        assert done.returncode == ExitStatus.CLUSTER
        assert said in done.stderr and "try:" in done.stderr
    for words in (("cluster", "show"), ("init", "--yes"), ("cluster", "nodes", "add", "n1", "--reason", "slow")):
        done = launch(*words, PATH=str(workplace / "empty"))
        assert done.returncode == ExitStatus.CLUSTER and "scontrol ping" not in done.stderr
        assert "error: scontrol is not installed here, or not in PATH [slurm-missing]\n  try: go to" in done.stderr
    done = launch("plan", PATH=str(workplace / "empty"))
    assert "[gpu-unknown]" in done.stderr and "without Slurm: --local" in done.stderr


def test_an_unknown_partition_is_answered_with_the_known_ones(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["terraform-24.11"], fake_slurm)
    for command in (("cluster", "show"), ("init", "--yes")):
        done = launch(*command, "--partition", "btach")
        assert done.returncode == ExitStatus.NOT_FOUND
        assert "it has batch, short" in done.stderr


# ------------------------------------------------------------------------------------------ init


@pytest.fixture
def staged(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `launcher stage` has brought to the usual places."""
    data = workplace / "data"
    sample.write_c4_sample(data / "c4", train_files=3, documents_per_file=5)
    sample.write_tokenizer(data / "tokenizers" / "Llama-3.1-8B")
    (data / "images").mkdir()
    (data / "images" / "titan.sqsh").touch()
    places = tuple(data / name for name in ("c4", "tokenizers", "models", "images"))
    monkeypatch.setattr(inventory, "PLACES", places)
    return data


def test_init_finds_all_of_it_and_writes_it_with_comments(
    launch: Launch, fake_slurm: Fake, workplace: Path, staged: Path
) -> None:
    install(CLUSTERS["terraform-24.11"], fake_slurm)
    file = workplace / "home" / ".config" / "titan-launcher" / "config.toml"
    asked = launch("init")
    assert (asked.returncode, file.exists()) == (ExitStatus.USAGE, False)
    assert "launcher init --yes" in asked.stderr, "no terminal to ask on: what it found, and the command that writes it"
    done = launch("init", "--yes")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "gpu gb200 GRES gpu:gb200:4(S:0-1), 4 GPUs a node, aarch64, 144 CPUs a node, 850 GiB of memory a node",
        "partition batch Slurm's default",
        "account - Slurm names no default account of yours",
        f"data {staged}/c4 3 train files",
        f"tokenizer {staged}/tokenizers/Llama-3.1-8B tokenizer.json and tokenizer_config.json can be read",
        f"image_dir {staged}/images 1 image",
    ):
        assert line in lines
    text = file.read_text()
    assert 'gpu = "gb200" # profile of the nodes\' GPUs\n' in text
    job = tomllib.loads(text)["job"]
    assert job == {
        "gpu": "gb200",
        "partition": "batch",
        "runs_dir": f"{workplace}/home/runs",
        "data": f"{staged}/c4",
        "tokenizer": f"{staged}/tokenizers/Llama-3.1-8B",
        "image_dir": f"{staged}/images",
    }
    assert "nothing to change" in launch("init", "--yes").stdout and file.read_text() == text
    shown = json.loads(launch("init", "--show", "--json").stdout)
    assert shown["values"]["job.gpu"] == {"value": "gb200", "origin": f"file {file}"}
    assert shown["values"]["job.account"]["origin"] == "not set"
    assert launch("init", "--account", "", "--yes").returncode == ExitStatus.USAGE  # what is not taken is refused
    secret = workplace / "secret.toml"
    secret.write_text('[job]\ngpu = "h100"\n[env]\nHF_TOKEN = "hf_not_shown_here_at_all"\n')
    assert "hf_not" not in launch("init", "--show", "--config", str(secret)).stdout
    shown = json.loads(launch("config", "show", "--image", "titan.sqsh", "--json").stdout)
    assert shown["job.image"]["value"] == f"{staged}/images/titan.sqsh"
    local = json.loads(launch("config", "show", "--local", "--json").stdout)
    assert [local[f"job.{key}"]["value"] for key in ("gpu", "partition")] == ["cpu", ""]
    debug = json.loads(launch("config", "show", "--recipe", "debug", "--image", "/x.sqsh", "--json").stdout)
    assert [debug[f"job.{key}"]["value"] for key in ("data", "tokenizer")] == ["sample", "sample"]


def test_init_keeps_what_the_file_says_and_takes_what_is_named(
    launch: Launch, fake_slurm: Fake, workplace: Path
) -> None:
    install(CLUSTERS["managed-25.11"], fake_slurm)
    before = '# mine\n[job]\npartition = "all" # ours\nnodes = 4\n[env]\nNCCL_DEBUG = "INFO"\n'
    (workplace / "mine.toml").write_text(before)
    done = launch("init", "--config", "mine.toml", "--gpu", "gb200", "--data", "nowhere", "--json", "--yes")
    said = json.loads(done.stdout)
    assert said["job"] == {"gpu": "gb200", "runs_dir": f"{workplace}/home/runs", "data": f"{workplace}/nowhere"}
    assert {c["key"]: c["evidence"] for c in said["choices"]}["partition"] == "your file"
    for text in ("gb200 does not fit 8 GPUs a node", "gb200 does not fit x86_64", "nowhere: No such file"):
        assert text in done.stderr
    text = (workplace / "mine.toml").read_text()
    assert text.startswith('# mine\n[job]\npartition = "all" # ours\nnodes = 4\n') and "NCCL_DEBUG" in text


def test_init_refuses_and_writes_nothing(launch: Launch, fake_slurm: Fake, workplace: Path) -> None:
    install(CONTRADICTORY, fake_slurm)
    for words, code, said in (
        ("--yes", ExitStatus.NOT_FOUND, "launcher init --gpu b200|h200"),
        ("--gpu=gb20", ExitStatus.NOT_FOUND, "launcher init --gpu gb200"),
        ("--gpu=h200 --yes --partition=a'b", ExitStatus.NOT_FOUND, "no partition"),
        ("--gpu=h200 --yes --account=a'b", ExitStatus.INVALID, "launcher init --account"),
        ("--gpu=h200 --yes --runs-dir=a'b", ExitStatus.INVALID, "launcher init --runs-dir"),
    ):
        done = launch("init", "--config", "mine.toml", *words.split())
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert not (workplace / "mine.toml").exists()


def test_cluster_use_names_what_replaced_it(launch: Launch) -> None:
    done = launch("cluster", "use", "h200", "--partition", "batch")
    assert done.returncode == ExitStatus.USAGE
    assert "launcher init --gpu h200 --partition batch" in done.stderr and "use" not in launch("cluster", "-h").stdout


def test_submit_takes_the_profile_that_show_proposes(launch: Launch, fake_slurm: Fake) -> None:
    install(CLUSTERS["managed-25.11"], fake_slurm)
    render = ("render", "--image", "/titan.sqsh")
    assert "--gres=gpu:8" in launch(*render).stdout
    install(CONTRADICTORY, fake_slurm)
    done = launch(*render)
    assert done.returncode == ExitStatus.NOT_FOUND
    assert "does not say clearly which GPU it has" in done.stderr and "node names b200-1 says b200" in done.stderr


# ------------------------------------------------------------------------------------------ the user's file


BEFORE = {  # the file as it was -> what of it stays
    "": "",
    "# mine": "# mine",
    '[env]\nA = "1" # one\n': '[env]\nA = "1" # one\n',
    '[job]\ngpu = "h100" # old\n': " # old\n",
    "[job] # x\nnodes = 2\n[env]\n": "[job] # x\nnodes = 2\n",
    '[env]\ngpu = "no"\n[job]\n  gpu=\'h100\'\n[titan]\ngpu = "no"\n': '[titan]\ngpu = "no"\n',
    '[job]\nmounts = [\n  "/a:/b",\n]\n': 'mounts = [\n  "/a:/b",\n]\n',
    "[gpu.h100.job]\nnodes = 2\n": "[gpu.h100.job]\nnodes = 2\n",
    'job.gpu = "h100"\n': "",
    'job = { gpu = "h100", nodes = 2 }\n': "job = { ",
    'a = """\n[job]\n"""\n': 'a = """\n[job]\n"""\n',
    '[job]\ngpu = """\nh100"""\n': "[job]\n",
}


def test_saving_keeps_all_else_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for before, kept in BEFORE.items():
        path.write_text(before)
        save(path, {"gpu": "b200"}, ABOUT)
        text, was = path.read_text(), tomllib.loads(before)
        assert kept in text and tomllib.loads(text) == was | {"job": was.get("job", {}) | {"gpu": "b200"}}
        save(path, {"gpu": "b200"}, ABOUT)
        assert path.read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_what_is_no_table_or_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for text in ("job = 3\n", "[job\n"):
        path.write_text(text)
        with pytest.raises(LauncherError) as raised:
            save(path, {"gpu": "b200"}, ABOUT)
        assert str(path) in raised.value.what and path.read_text() == text
    for place in (tmp_path, path / "config.toml"):
        with pytest.raises(LauncherError) as raised:
            save(place, {"gpu": "b200"}, ABOUT)
        assert raised.value.status is ExitStatus.FILESYSTEM


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=20))
def test_any_value_is_read_back_or_refused(value: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        save(path, {"gpu": value}, ABOUT)
        assert tomllib.loads(path.read_text(encoding="utf-8")) == {"job": {"gpu": value}}


def test_a_link_stays_one_and_the_mode_too(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("[job]\n")
    real.chmod(0o600)
    link = tmp_path / "config.toml"
    link.symlink_to(real)
    save(link, {"gpu": "b200"}, ABOUT)
    assert link.is_symlink() and "b200" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o600
