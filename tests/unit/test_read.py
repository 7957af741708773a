"""A run directory as an Outcome: every figure from where it stands, and what is missing, mixed or damaged said."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.results.columns import as_dict
from launcher.results.outcome import NO_STEP_COUNTS, NON_FINITE, RESTARTED, Outcome, Startup
from launcher.results.read import outcome_of
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState
from tests.unit.outcomes import SOFTWARE
from tests.unit.outcomes import outcome as usual
from tests.unit.test_tensorboard import scalar
from tests.unit.titan_log import STEPS, T0
from tests.unit.titan_log import step as line

DONE, RUNNING, FAILED = (JobState("COMPLETED"), JobState("RUNNING"), JobState("FAILED", "end.json", "ended by SIGKILL"))
DAMAGED = "run.toml is damaged: what was asked for is known in part"
OF_RECIPE = {key.removeprefix("recipe."): value for key, value in usual().settings.items() if "recipe." in key}
RECIPE = OF_RECIPE | {"name": "./mine/fast.toml", "quantize": "float8", "compile": True, "tensor_parallel": 2}
NODE = {
    "job": {"nodes": 2, "gpu": "gb200", "recipe": "./mine/fast.toml"},
    "profile": {"gpu": "GB200", "device": "cuda", "gpus_per_node": 4},
    "recipe": RECIPE,
}
RUN_TOML = """run = 1
secret_env = []
[job]
name = "r"
gpu = "gb200"
recipe = "./mine/fast.toml"
nodes = 2
image = "{image}"
[profile]
gpu = "GB200"
gpus_per_node = 4
left_behind = 0.0
[recipe]
model = "llama3"
seq_len = 8192
local_batch_size = 5
steps = 100
log_freq = 10
param_dtype = "bfloat16"
[titan]
"training.max_norm" = "2.0"
[origin]
"job.name" = "option"
"""
RECORD = SOFTWARE | {"ok": True, "gpu": "NVIDIA GB200", "gpu_names": ["NVIDIA GB200"] * 4}
RECORD |= {"time": int(T0) + 50, "check_s": 10.0, "utc_offset_s": 0}


def log(tps: int = 17581, steps: tuple[int, ...] = STEPS, **more: Any) -> str:
    return "".join(line(step, 900 if step == 1 else tps, **{"at": T0 + 100 + step, **more}) for step in steps)


class Made:
    """A run directory of two nodes that ended well; a test changes one thing in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, Run(path)
        for folder in ("job", "logs", "nodes", "claim"):
            (path / folder).mkdir(parents=True)
        self.write("job/node.json", {**NODE, "placed": {"run_dir": str(path)}})
        self.write("run.toml", RUN_TOML.replace("{image}", ""))
        self.write("intent.json", {"scheduler": "slurm", "job_name": "r", "at": T0})
        self.write("end.json", {"exit_code": 0, "began_at": int(T0) + 30, "ended_at": int(T0) + 999})
        self.write("logs/0000-a.log", log(17500))
        self.write("logs/0001-b.log", log(17600))
        self.write("nodes/0000-a.json", RECORD)
        self.write("nodes/0001-b.json", {**RECORD, "time": int(T0) + 55, "check_s": 12.5})

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / name).write_text(text)

    def change(self, *names: str, **changes: Any) -> None:
        """Sets keys of JSON files; None removes one."""
        for name in names:
            found = {**json.loads((self.path / name).read_text()), **changes}
            self.write(name, {key: value for key, value in found.items() if value is not None})

    def logs(self, text: str) -> None:
        """What both nodes logged."""
        for name in ("0000-a", "0001-b"):
            self.write(f"logs/{name}.log", text)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink()

    def outcome(self, state: JobState = DONE) -> Outcome:
        found = outcome_of(self.run, state)
        assert found is not None
        json.dumps(as_dict(found), allow_nan=False)
        return found


RECORDS = ("nodes/0000-a.json", "nodes/0001-b.json")


def said(outcome: Outcome) -> tuple[str, ...]:
    return tuple(problem.text for problem in outcome.problems)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "r")


def test_a_whole_run(made: Made) -> None:
    found = made.outcome()
    assert found.complete and (said(found), found.notes) == ((), ())
    assert (found.run, found.state, found.date) == ("r", "COMPLETED", "2026-11-22T07:10:00Z")
    assert (found.gpu, found.nodes, found.gpus, found.recipe) == ("GB200", 2, 8, "fast")
    assert (found.local_batch_size, found.global_batch_size, found.seq_len) == (5, 20, 8192)  # tensor parallel 2
    assert (found.precision, found.compile, found.steps, found.step) == ("bfloat16 + float8", True, 100, 100)
    assert (found.loss, found.grad_norm, found.memory_pct) == (6.4277, 2.9062, 86.2)
    assert found.tps is not None and found.tflops is not None and found.memory_gib is not None
    assert (found.tps.median, found.tps.low, found.tps.high, found.tps.count) == (17550, 17500, 17600, 18)
    assert (found.tflops.median, found.memory_gib.median) == (1018.2, 158.61)
    assert (found.mfu_pct, found.peak_tflops) == (45.25, 2250)
    assert [node.host for node in found.by_node] == ["a", "b"] and len(found.series) == 11
    assert found.slowest is not None and found.slowest.host == "a"
    assert found.startup == Startup(queue_s=30, container_s=25, check_s=12.5, first_step_s=T0 + 101 - (T0 + 67.5))
    assert found.versions == SOFTWARE
    assert found.settings["titan.training.max_norm"] == "2.0" and found.settings["recipe.steps"] == 100
    assert found.settings["profile.left_behind"] == 0.0  # of an older launcher, and still told
    assert "job.name" not in found.settings and not any(key.startswith("origin") for key in found.settings)
    assert (found.cluster, found.data_share, found.prediction) == ("", None, {})


def test_a_run_that_cannot_be_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert outcome_of(Run(tmp_path / "empty"), DONE) is None
    assert outcome_of(Run(tmp_path / "none"), DONE) is None
    made.logs("starting\n")
    assert outcome_of(made.run, RUNNING) is None
    found = made.outcome(FAILED)
    assert said(found) == ("FAILED (ended by SIGKILL)", "no step of 100 was logged") and not found.complete
    assert (found.tps, found.step, found.loss) == (None, None, None)


@pytest.mark.parametrize(
    ("steps", "state", "problems"),
    [
        ((1, 10, 20, 30, 40), FAILED, ("FAILED (ended by SIGKILL)", "step 40 of 100")),
        ((1, 10, 20, 30, 40), RUNNING, ("still RUNNING", "step 40 of 100")),
        ((1, 10, 20, 30, 40), DONE, ("step 40 of 100",)),
        ((1,), DONE, ("step 1 of 100",)),
        (STEPS, JobState("UNKNOWN", "", "nobody knows"), ("its end is UNKNOWN (nobody knows)",)),
        (STEPS, JobState("TIMEOUT"), ("TIMEOUT",)),
        (STEPS[5:], DONE, ("5 logged steps missing",)),
        ((*STEPS[:3], *STEPS[4:]), DONE, ("1 logged step missing",)),
        ((*STEPS, 110), DONE, ("step 110 of 100",)),  # a log of another run
    ],
)
def test_what_is_missing_is_said(
    made: Made, steps: tuple[int, ...], state: JobState, problems: tuple[str, ...]
) -> None:
    made.logs(log(steps=steps))
    found = made.outcome(state)
    assert said(found) == problems and not found.complete


def test_a_run_of_one_step_has_no_figure(made: Made) -> None:
    made.change("job/node.json", recipe={**RECIPE, "steps": 1})
    made.write("run.toml", "")
    made.logs(line(1))
    assert said(made.outcome()) == (NO_STEP_COUNTS.text,) and made.outcome().tps is None


def test_a_node_that_logged_fewer_steps_is_named_and_takes_nothing_from_the_result(made: Made) -> None:
    made.write("logs/0001-b.log", log(steps=(*STEPS[:5], STEPS[-1])))
    found = made.outcome()
    assert said(found) == () and found.notes == ("fewer logged steps than on other nodes: b",)


def test_all_the_time_after_warm_up(made: Made) -> None:
    """Three of nine intervals at half speed: the median does not show it, tokens over time do."""
    steps = [line(step, 17500 // (2 if step in (30, 60, 90) else 1)) for step in STEPS]
    made.logs("".join(steps))
    found = made.outcome()
    assert found.tps is not None and found.tps.median == 17500
    assert found.overall_tps == pytest.approx(9 / (6 / 17500 + 3 / 8750))
    assert found.wall_s == 999 - 30


def test_restarts_and_nan(made: Made) -> None:
    made.write("logs/0001-b.log", log(steps=STEPS[:4]) + log(steps=STEPS[2:], at=T0 + 5000))
    assert said(made.outcome()) == (RESTARTED.text,)
    made.write("logs/0001-b.log", log().replace(" 6.42770", "     nan", 3))
    assert said(made.outcome()) == (NON_FINITE.text,)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("gpu", "NVIDIA GB200 NVL4", "mixed gpu: NVIDIA GB200 (a), NVIDIA GB200 NVL4 (b)"),
        ("driver", "570.1", "mixed driver: 580.95.05 (a), 570.1 (b)"),
        ("torch", "2.13.0", "mixed torch: 2.14.1 (a), 2.13.0 (b)"),
        ("torchtitan", "0.3.0", "mixed torchtitan: 0.2.2 (a), 0.3.0 (b)"),
        ("gpu_names", ["A", "B"], "mixed gpu in b: A, B"),
        ("ok", False, "b failed its check"),
    ],
)
def test_mixed_nodes(made: Made, key: str, value: Any, problem: str) -> None:
    made.change("nodes/0001-b.json", **{key: value})
    assert said(made.outcome()) == (problem,)


def test_gpus_that_are_not_the_profiles(made: Made) -> None:
    made.change(*RECORDS, gpu="NVIDIA B200")
    assert "the profile says GB200, a has NVIDIA B200" in said(made.outcome())
    made.change(*RECORDS, gpu="a name that nobody knows")
    assert said(made.outcome()) == ()


def test_edited_settings(made: Made) -> None:
    made.write("run.toml", RUN_TOML.replace("local_batch_size = 5", "local_batch_size = 6"))
    found = made.outcome()
    assert said(found) == ("edited: run.toml and job/node.json differ in recipe.local_batch_size",)
    assert found.local_batch_size == found.settings["recipe.local_batch_size"] == 5  # what the job was told


def test_what_is_no_run_toml_is_not_waited_for(made: Made) -> None:
    made.write("run.toml", "[recipe]\nlocal_batch_size = 6\n#" + "x" * 2**20)
    assert said(made.outcome()) == (DAMAGED,)
    (made.path / "run.toml").unlink()
    os.mkfifo(made.path / "run.toml")
    assert said(made.outcome()) == (DAMAGED,)


@pytest.mark.parametrize(
    "text", ["", "run = ", "[job]\nname = 1979-05-27\n[recipe]\nsteps = 100\n[titan]\nx = 07:32:00\n", "\udc80"]
)
def test_either_file_of_settings_is_enough(made: Made, text: str) -> None:
    made.path.joinpath("run.toml").write_text(text, errors="surrogateescape")
    found = made.outcome()
    damaged = text in ("run = ", "\udc80")
    assert (found.gpu, said(found)) == ("GB200", (DAMAGED,) if damaged else ())
    (made.path / "run.toml").unlink()
    assert made.outcome().complete
    made.write("run.toml", RUN_TOML)
    (made.path / "job" / "node.json").unlink()
    found = made.outcome()
    assert (found.gpu, found.gpus, found.local_batch_size, found.complete) == ("GB200", 8, 5, True)


def test_an_older_run(made: Made) -> None:
    """Node records without times, then without records at all; nothing is made up."""
    made.change(*RECORDS, time=None, check_s=None, utc_offset_s=None)
    found = made.outcome()
    assert found.complete and found.startup == Startup(queue_s=30)
    made.remove(*RECORDS)
    found = made.outcome()
    assert found.complete and found.notes == ("none of 2 nodes left a record of their versions",)
    (made.path / "nodes").rmdir()
    assert made.outcome().versions == {}


# --- beside the logs -----------------------------------------------------------------------------------------


def test_the_share_of_waiting_for_data(made: Made) -> None:
    folder = made.path / "titan" / "tb" / "20261122-0710"
    folder.mkdir(parents=True)
    share, seconds = "time_metrics/data_loading(%)", "time_metrics/end_to_end(s)"
    values = {step: (50.0, 100.0) if step <= 10 else (2.0, 1.0) for step in STEPS}
    values[100] = (10.0, 3.0)  # as long as three others
    text = b"".join(
        scalar(s, share, a) + scalar(s, seconds, b) + scalar(s, "mfu(%)", 1.0) for s, (a, b) in values.items()
    )
    path = folder / "events.out.tfevents.1.a.1.0"
    path.write_bytes(text)
    assert made.outcome().data_share == pytest.approx((8 * 2 + 3 * 10) / 11 / 100)
    assert outcome_of(made.run, DONE, with_data_share=False) == replace(made.outcome(), data_share=None)
    path.write_bytes(scalar(50, share, 200.0) + scalar(50, seconds, 1.0))
    assert made.outcome().data_share is None
    path.write_bytes(b"")
    assert made.outcome().data_share is None


def test_the_images_digest_is_the_sidecars(made: Made, image: Path) -> None:
    made.write("run.toml", RUN_TOML.replace("{image}", str(image)))
    sidecar = image.with_name(f"{image.name}.json")
    about = json.loads(sidecar.read_text())
    about["squashfs"]["sha256"] = "cd" * 32
    sidecar.write_text(json.dumps(about))
    assert made.outcome().versions["image"] == image.name
    assert "digest" not in made.outcome().versions  # the image is newer than the run
    made.change("intent.json", at=image.stat().st_mtime + 5)
    assert made.outcome().versions["digest"] == "cd" * 32


def test_cluster_and_prediction(made: Made) -> None:
    made.change("intent.json", cluster="crusoe")
    assert made.outcome().cluster == "crusoe"
    made.change("intent.json", cluster=None, scheduler="local")
    assert made.outcome().cluster == "local"
    made.change("intent.json", scheduler="slurm")
    made.change("nodes/0001-b.json", cluster="of the node")
    assert made.outcome().cluster == "of the node"
    made.write("plan.json", {"tps": 17000.0})
    assert made.outcome().prediction == {"tps": 17000.0}
    made.write("plan.json", "[")
    assert made.outcome().prediction == {}


# --- logs as they come -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        lambda text: "".join(f"17: {row}\n" for row in text.splitlines()),  # srun's label
        lambda text: text.replace("step:", "\x1b[31mstep:").replace("  tps:", "  \x1b[34mtps:"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("[rank0]:[titan]", "[default0]:[rank0]:[titan]"),
        lambda text: (
            f"half a line of step: 5  loss: 1{text}validate step:  100  loss:  7.9  memory:  0.67GiB(2.8%)  tps: 5\n"
        ),
        lambda text: text + text.splitlines()[-1][:-3],  # cut short
    ],
)
def test_prefixes_colours_and_cuts_change_nothing(made: Made, shape: Any) -> None:
    usual = made.outcome()
    for name in ("0000-a", "0001-b"):
        path = made.path / "logs" / f"{name}.log"
        path.write_text(shape(path.read_text()), newline="")
    assert made.outcome() == usual


def test_old_and_quantised_lines(made: Made) -> None:
    made.logs(log().replace("45.25%", "N/A"))
    found = made.outcome()
    assert found.complete and (found.mfu_pct, found.peak_tflops) == (None, None)
    old = [f"step: {s}  loss:  7.9794  memory: 33.40GiB(35.15%)  wps: 5,762  mfu: 33.57%\n" for s in STEPS]
    made.logs("".join(old))
    found = made.outcome()
    assert found.complete and found.tps is not None
    assert (found.tps.median, found.tflops, found.grad_norm, found.startup.first_step_s) == (5762, None, None, None)


def test_what_another_user_may_not_show(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith("0001-b.log"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)
    found = made.outcome()
    assert said(found)[0].endswith("logs/0001-b.log: Permission denied") and not found.complete
    assert said(found)[1] == "only 1 of 2 nodes logged"


def test_files_that_are_none(made: Made) -> None:
    (made.path / "logs" / "0002-c.log").mkdir()
    os.mkfifo(made.path / "logs" / "0003-d.log")
    (made.path / "nodes" / "0002-c.json").mkdir()
    found = made.outcome()
    assert said(found) == ("cannot read nodes/0002-c.json, or it is damaged",)
    made.remove(*RECORDS)
    (made.path / "nodes" / "0002-c.json").rmdir()
    (made.path / "nodes").rmdir()
    made.write("nodes", "a file")
    assert "Not a directory" in said(made.outcome())[0]


def test_a_run_with_a_spare_and_an_unfit_node_is_whole(made: Made) -> None:
    """What was found about nodes that did not train says nothing of the result, nor when it began."""
    made.write("nodes/0002-c.json", {**RECORD, "ok": False, "torch": "2.13.0", "time": int(T0) + 500})
    made.write("nodes/0003-d.json", {**RECORD, "spare": True, "driver": "570.1", "check_s": 300.0})
    made.write("nodes/check.json", {"ok": True, "nodes": 4, "chosen": ["a", "b"], "spare": ["d"], "unfit": []})
    for name in ("0002-c", "0003-d"):
        made.write(f"logs/{name}.log", "titan-check: spare node=3 host=d (chosen: a, b)\n")
    found = made.outcome()
    assert found.complete and (said(found), found.notes) == ((), ())
    assert found.startup == Startup(30.0, 25.0, 12.5, 33.5) and len(found.by_node) == 2
    made.write("nodes/check.json", {"ok": False, "nodes": 4})
    assert "c failed its check" in said(made.outcome())
