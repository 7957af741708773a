"""--sbatch and --constraint: what reaches sbatch, in which layers it stands, and what is refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.base.errors import ExitStatus
from launcher.config import sbatch
from launcher.config.help import SECTIONS
from launcher.config.layers import Layer, merge
from launcher.config.render import _options
from launcher.config.sbatch import FIXED, FREE, OWN, REMOVABLE
from launcher.config.spec import Job, PlacedRun, RunSpec
from launcher.sweep.cells import _comparable
from tests.conftest import ROOT, Launch
from tests.unit.test_preflight import SCONTROL, Fake, slurm

__all__ = ["slurm"]  # a fixture
FEATURES = SCONTROL.replace("Gres=gpu:8", "Gres=gpu:8 ActiveFeatures=nvl,a,b")
RUN = ("--gpu", "b200", "--image", "titan.sqsh", "--data", "sample", "--name", "r")


def as_sbatch_reads(line: str) -> list[str]:
    """The words of a line behind #SBATCH, by the rules of Slurm's src/sbatch/opt.c, _get_argument()."""
    words: list[str] = []
    word, at, quote, begun = "", 0, "", False
    while at < len(line):
        char, at = line[at], at + 1
        if char == "\\":
            word, at, begun = word + line[at : at + 1], at + 1, True
        elif quote and char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote, begun = char, True
        elif not quote and char == "#":
            break
        elif not quote and char.isspace():
            words, word, begun = [*words, word] if begun else words, "", False
        else:
            word, begun = word + char, True
    return [*words, word] if begun else words


@given(st.text(min_size=1, max_size=60) | st.text(" '\"\\#$`=;", min_size=1, max_size=20))
@example("a b'c\"d\\\\e#f $(id) `id`")
def test_any_value_reaches_sbatch_unchanged_or_is_refused(value: str) -> None:
    item = f"comment={value}"
    if not sbatch.problem(item)[0]:
        (line,) = sbatch.lines({}, [item])
        assert "\n" not in line and as_sbatch_reads(line) == [f"--comment={value}"]
    else:
        assert not value.isprintable()


def test_each_option_of_ours_is_sbatchs_and_reaches_the_script() -> None:
    ours = {*SECTIONS["Slurm"].split()} - {"sbatch"}
    assert ours <= OWN.keys() and not {*FREE} & OWN.keys()
    for name in ours - {"segment"}:  # what the topology decides
        asked = merge([Layer({f"job.{name}": "7"}, {f"job.{name}": "option"})])
        assert _options(PlacedRun(**vars(asked)))[name] == "7"


def test_adds_replaces_and_removes() -> None:
    ours = {"nodes": "2", "exclusive": None, "mem": "0"}
    assert sbatch.lines(ours, []) == ["--nodes=2", "--exclusive", "--mem=0"]
    more = ["--nodes=2", "--exclusive", "--mem=900G", "--contiguous"]
    assert sbatch.lines(ours, ["mem=900G", "--contiguous"]) == more
    assert sbatch.lines(ours, ["mem=", "exclusive="]) == ["--nodes=2"]
    assert sbatch.lines(ours, ["mem-per-gpu=8G"]) == ["--nodes=2", "--exclusive", "--mem-per-gpu=8G"]
    assert sbatch.merged(["mem=5G", "comment=x"], ["mem=", "comment="]) == ("mem=",)  # the script has a line of its own
    assert sbatch.lines(ours, ["mem-per-gpu="]) == ["--nodes=2", "--exclusive", "--mem=0"]


@pytest.mark.parametrize(
    ("item", "fix"),
    [
        ("job-name=x", "--name"),
        ("nodes=4", "--nodes"),
        ("job-na=x", "--name"),  # sbatch takes the beginning of an option for it
        ("mem-per-c=8G", "--sbatch mem-per-cpu=8G"),
        ("mem-per-=8G", "--sbatch mem-per-cpu=8G"),
        ("contig", "--sbatch contiguous"),
        ("exclusiv=", "--sbatch exclusive="),
        ("memory=", "--sbatch mem="),
        ("mincpus=", "--sbatch mem= or --sbatch exclusive="),
        ("gres=gpu:2", "--gpus-per-node"),
        ("export=ALL", "--env"),
        ("constraint=x", "--constraint"),
        ("container-image=x", "--image"),
        ("container-name=x", "--image"),
        ("clusters=b", "SLURM_CLUSTERS"),
        ("nodes=", "--nodes"),
        *((name, "") for name in ("output=x", "ntasks-per-node=4", "wrap=id", "parsable", "pars", "wait", "array=1-3")),
        *((name, "--sbatch") for name in ("", "=x", "-C", "C=x", "a b", "--", "x;y=1")),
        ("comment=a\nb", ""),
        ("comment=" + "x" * 1001, ""),
    ],
)
def test_what_would_break_the_run_is_refused(launch: Launch, image: Path, item: str, fix: str) -> None:
    done = launch("render", *RUN, f"--sbatch={item}")
    assert done.returncode == ExitStatus.INVALID and "job.sbatch" in done.stderr and "[value]" in done.stderr
    assert f"try: {fix}" in done.stderr if fix else "try:" not in done.stderr


def test_a_run_that_continues_needs_the_signal_and_checkpoints(launch: Launch, image: Path) -> None:
    """Without either, it would be trained from step 1 up to the time limit again and again, or not be continued."""
    whole = ("render", *RUN, "--continue", "2", "--checkpoint-every", "10")
    assert "--signal=B:USR1@" in launch(*whole).stdout
    assert "needs sbatch's --signal" in launch(*whole, "--sbatch", "signal=TERM@60").stderr
    assert "try: --checkpoint-every STEPS" in launch(*whole[:-2]).stderr


def test_spares_are_a_choice_without_restarts_too(launch: Launch, image: Path) -> None:
    script = launch("render", *RUN, "--spares", "1", "--max-restarts", "0").stdout
    assert "export TITAN_NODES=${#hosts[@]}" in script


def test_secrets_are_refused_and_not_shown(launch: Launch, image: Path) -> None:
    for item in ("comment=hf_" + "a" * 30, "my-token=abcdefgh"):
        done = launch("render", *RUN, "--sbatch", item)
        assert done.returncode == ExitStatus.INVALID and "[secret-exposed]" in done.stderr
        assert item.partition("=")[2] not in done.stderr


def test_it_lands_everywhere_and_is_repeated(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", FEATURES)
    config = image.parent / "mine.toml"
    config.write_text('[job]\nsbatch = ["mem=", "comment=of the file"]\n')
    mine = ("--config", str(config), "--constraint", "a&b", "--sbatch", "comment=it's mine", "--sbatch", "contiguous")
    wanted = ["mem=", "comment=it's mine", "contiguous"]
    shown = json.loads(launch("config", "show", *RUN, *mine, "--json").stdout)
    assert shown["job.sbatch"] == {"value": wanted, "origin": f"file {config}, option --sbatch"}
    assert launch("submit", *RUN, *mine, "--yes").returncode == 0
    run = image.parent / "runs" / "r"
    script = (run / "job.sbatch").read_text()
    assert script == launch("render", *RUN, *mine).stdout
    lines = ["#SBATCH --constraint=a&b\n", '#SBATCH --comment="it\'s mine"\n', "#SBATCH --contiguous\n"]
    assert all(line in script for line in lines) and "--mem" not in script
    job = json.loads((run / "job" / "node.json").read_text())["job"]
    assert (job["sbatch"], job["constraint"]) == (wanted, "a&b")
    done = launch("submit", str(run / "run.toml"), "--name", "again", "--sbatch", "mem=5G", "--yes")
    assert done.returncode == 0, done.stderr
    again = (image.parent / "runs" / "again" / "job.sbatch").read_text()
    assert "#SBATCH --mem=5G\n" in again and all(line in again for line in lines)
    sweep = launch("sweep", *RUN[:6], "--nodes", "1,2", *mine, "--name", "s", "--yes")
    assert sweep.returncode == 0, sweep.stderr
    assert "#SBATCH --contiguous\n" in (image.parent / "runs" / "s-llama3-8b-1n-b5" / "job.sbatch").read_text()


def test_what_a_file_added_can_be_taken_back(launch: Launch, image: Path, workplace: Path) -> None:
    config = workplace / "mine.toml"
    config.write_text('[job]\nsbatch = ["comment=x", "site-plugin=1", "mem="]\n')
    back = ("--sbatch=comment=", "--sbatch=site-plugin=")
    shown = launch("config", "show", *RUN, "--config", str(config), *back, "--json")
    assert json.loads(shown.stdout)["job.sbatch"]["value"] == ["mem="]
    done = launch("render", *RUN, "--sbatch=site-plugin=1")  # of a plugin of the site's
    assert done.returncode == 0 and "#SBATCH --site-plugin=1\n" in done.stdout


def test_a_sweep_in_order_refuses_another_dependency(launch: Launch, slurm: Fake, image: Path) -> None:
    words = ("sweep", *RUN, "--sbatch", "dependency=afterok:7", "--yes")
    done = launch(*words)
    assert done.returncode == ExitStatus.USAGE and "--parallel" in done.stderr
    assert launch(*words, "--parallel").returncode == 0


def test_a_sweep_keeps_the_name_that_it_had_before_there_were_newer_settings() -> None:
    """Else one that is half done is not found again. Where this fails: the new key belongs into NEWER or WHERE."""
    first = (ROOT / "tests" / "compat" / "v0.1" / "runs" / "completed" / "run.toml").read_text()
    known = {f"{table}.{key}" for table, keys in tomllib.loads(first).items() if isinstance(keys, dict) for key in keys}
    assert _comparable(RunSpec()).keys() <= known


def test_what_the_script_says_can_be_given_in_one_way_only() -> None:
    written = _options(PlacedRun(job=Job(name="r")))
    assert written.keys() <= {*OWN, *FIXED, *REMOVABLE}


def test_variables_that_are_not_followed_are_named(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("scontrol", FEATURES)
    mine = {"SBATCH_CONSTRAINT": "nvl", "SBATCH_MEM_PER_NODE": "5G", "SBATCH_EXCLUSIVE": "", "SBATCH_CLUSTERS": "b"}
    for more in (["--dry-run"], []):
        done = launch("submit", *RUN, *more, **mine, SBATCH_WCKEY="k")
        assert done.returncode == 0, done.stderr
        assert "ignores SBATCH_MEM_PER_NODE, SBATCH_WCKEY from your environment" in done.stderr.replace(" and ", ", ")
    assert "#SBATCH --constraint=nvl\n" in (image.parent / "runs" / "r" / "job.sbatch").read_text()
