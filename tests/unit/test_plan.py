"""What `launcher plan` predicts, held against the published rows, and what it must not claim."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.spec import MAX_NODES, Job, Profile, RunSpec
from launcher.plan import plan
from launcher.results.outcome import Outcome
from launcher.results.published import LIMITED, published, unlike
from launcher.titan.recipe import Recipe
from launcher.titan.weights import SHAPES
from tests.conftest import Launch
from tests.unit.test_submission import Fake, slurm

__all__ = ["slurm"]  # a fixture

GB200 = """\
llama3-8b on 9 nodes x 4 GB200, batch 5, 100 steps of 1,474,560 tokens

memory      159.3 GiB of 184 (87%): fits
            weights and optimizer 2.5, saved activations 77.5, recomputed 7.0, logits 68.5, gathered weights 3.7
tokens/s    17,975 per GPU, as published (Crusoe, 9 x GB200)
wall time   6 min 48 s, of it 3 min 00 s assumed for the start; after the queue
node-hours  1.02; --time 01:00:00 allows 9.00
C4 files    36 of 1024: launcher stage c4 --to /data/c4 --files 36
"""


def a_spec(gpu: str = "GB200", nodes: int = 9, gpus: int = 4, time: str = "01:00:00", **recipe: Any) -> RunSpec:
    """llama3-8b in the published settings; `recipe` are fields of Recipe."""
    return RunSpec(
        profile=Profile(gpu=gpu, gpus_per_node=gpus),
        recipe=Recipe(**{"local_batch_size": 5, **recipe}),
        job=Job(nodes=nodes, recipe="llama3-8b", time=time),
    )


OF_TORCHTITAN = [row for row in published() if row.settings["framework"] == "torchtitan"]
EAGER = [row for row in OF_TORCHTITAN if not row.compile and LIMITED not in row.settings]


def spec_of(row: Outcome) -> RunSpec:
    settings = {key.removeprefix("recipe."): value for key, value in row.settings.items() if key.startswith("recipe.")}
    return a_spec(row.gpu, row.nodes, row.gpus // row.nodes, **settings)


@pytest.mark.parametrize("row", EAGER, ids=lambda row: f"{row.gpu}-{row.gpus}-step{row.step}")
def test_memory_of_every_published_eager_row(row: Outcome) -> None:
    found = plan.plan(spec_of(row))
    assert len(EAGER) == 12 and row.memory_gib and found.memory_gib
    assert found.memory_gib == pytest.approx(row.memory_gib.median, rel=plan.MEMORY_IS_GOOD_TO)
    assert found.verdict == "fits"  # it ran


@pytest.mark.parametrize("row", OF_TORCHTITAN, ids=lambda row: f"{row.run}-{row.precision}-{row.compile}")
def test_a_run_in_the_settings_of_a_row_has_a_row_s_speed(row: Outcome) -> None:
    """Its own, unless one of the same settings says more: 100 steps, full power, or a later date."""
    found = plan.plan(spec_of(row))
    alike = [other for other in OF_TORCHTITAN if other.gpu == row.gpu and not unlike(row, other)]
    assert found.tps in [other.median_tps for other in alike]
    assert all(text.endswith("GPUs, not 16: not adjusted") for text in found.differs)
    if (row.step, row.gpu) != (10, "B200") and LIMITED not in row.settings:
        assert (found.tps, found.differs) == (row.median_tps, ())


def test_other_frameworks_predict_nothing() -> None:
    (row, *_) = [row for row in published() if row.settings["framework"] != "torchtitan"]
    assert row.gpu == "GB300" and plan.plan(spec_of(row)).tps is None


def test_what_does_not_fit_and_what_would() -> None:
    found = plan.plan(a_spec("H100", 2, 8, local_batch_size=3))
    assert found.verdict == "does not fit" and found.memory_gib and found.memory_gib > 79.2
    assert found.advice == ("--batch-size 2", "--set recipe.activation_checkpoint=full")
    for batch, mode in ((2, "selective"), (3, "full")):
        changed = a_spec("H100", 2, 8, local_batch_size=batch, activation_checkpoint=mode)
        assert plan.plan(changed).verdict == "fits"
    large = a_spec("H100", 2, 8, flavor="70B", local_batch_size=1, activation_checkpoint="full")
    (advice,) = plan.plan(large).advice
    nodes = int(advice.removeprefix("--nodes "))
    assert plan.plan(replace(large, job=replace(large.job, nodes=nodes))).verdict == "fits"
    assert plan.plan(replace(large, job=replace(large.job, nodes=nodes - 1))).verdict != "fits"


def test_advice_keeps_to_what_a_run_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 nodes at most; many nodes or sequences are not tried one by one, which made `submit` slow."""
    small = a_spec("A100", 1, 2, flavor="70B", local_batch_size=1, activation_checkpoint="full")
    assert plan.plan(small).advice == ("--nodes 10",)
    large = a_spec("H100", MAX_NODES, 8, flavor="70B", local_batch_size=10**9, activation_checkpoint="full")
    assert plan.plan(large).advice == ("--batch-size 2",)
    absurd = a_spec("A100", 5000, 1, flavor="70B", local_batch_size=1, activation_checkpoint="full")
    monkeypatch.setitem(SHAPES, "70B", replace(SHAPES["70B"], intermediate_size=36_000_000))  # 20,000 nodes
    assert plan.plan(absurd).advice == ()


def test_few_shards_need_whole_states_at_the_optimizer() -> None:
    """One GPU: 16 bytes a parameter, 119.7 GiB, also where activations are small."""
    memory = plan.memory_of(a_spec("H200", 1, 1, local_batch_size=1, seq_len=512, activation_checkpoint="full"))
    assert memory and memory.total == memory.at_optimizer == pytest.approx(119.66, abs=0.01)


def test_parallelism_divides() -> None:
    one, replicated = plan.memory_of(a_spec()), plan.memory_of(a_spec(dp_replicate=9))
    assert one and replicated and replicated.states == pytest.approx(9 * one.states)
    tensor = plan.memory_of(a_spec(tensor_parallel=4))
    assert tensor and tensor.saved == pytest.approx(one.saved / 4) and tensor.states == pytest.approx(one.states)
    context = plan.memory_of(a_spec(context_parallel=2))
    assert context and context.logits == pytest.approx(one.logits / 2)
    assert context.states == pytest.approx(one.states)
    assert plan.plan(a_spec(pipeline_parallel=2)).memory is None


def test_activation_checkpointing_orders_memory() -> None:
    modes = ("full", "selective", "none")
    full, selective, none = (plan.memory_of(a_spec(activation_checkpoint=mode)) for mode in modes)
    assert full and selective and none and full.total < selective.total < none.total


def test_compile_is_about_and_never_surely_fits() -> None:
    """Its saving is published as "about half the activation memory": no base for a verdict without a doubt."""
    found = plan.plan(a_spec(local_batch_size=6, compile=True))
    assert found.memory and found.memory_gib and found.memory_gib < 184 < found.memory.total
    assert found.verdict == "tight"
    full = plan.plan(a_spec(activation_checkpoint="full", compile=True))  # it saves the layers' inputs alone
    assert full.memory and full.memory_gib == pytest.approx(full.memory.total - full.memory.recomputed / 2)


def test_memory_of_the_published_70b_rows_with_tensor_parallelism() -> None:
    """Both are float8 and of 2024: they had more, and the plan says so."""
    rows = [row for row in OF_TORCHTITAN if row.memory_gib and row.settings.get("recipe.tensor_parallel") == 8]
    found = [plan.plan(spec_of(row)) for row in rows]
    pairs = ((row.memory_gib, it.memory_gib) for row, it in zip(rows, found, strict=True))
    more = [published.median / predicted for published, predicted in pairs if published and predicted]
    assert sorted(more) == [pytest.approx(1.08, abs=0.01), pytest.approx(1.15, abs=0.01)]
    assert all("up to 15% more" in " ".join(it.notes) for it in found) and not plan.plan(a_spec()).notes


@pytest.mark.parametrize(
    ("spec", "tps", "said"),
    [
        (a_spec(compile=True), 17975, "compile true, not false: not adjusted"),
        (a_spec("B200", 2, 8, compile=True, quantize="mxfp8"), 17500, "quantisation mxfp8, not none: not adjusted"),
        (a_spec(activation_checkpoint="full"), 17975, "activation checkpointing full, not selective: not adjusted"),
        (a_spec(local_batch_size=4), 17975, "local batch size 4, not 5: not adjusted"),
        (a_spec("H100", 1, 8, local_batch_size=2), 8714, "8 GPUs, not 16: not adjusted"),  # not 500 W's 5,762
        (a_spec(nodes=18), 17581, "72 GPUs, not 68: not adjusted"),
    ],
)
def test_what_is_not_adjusted_is_said(spec: RunSpec, tps: float, said: str) -> None:
    found = plan.plan(spec)
    assert found.tps == tps
    assert said in found.differs


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (a_spec("GB300"), "no published row of GB300"),
        (a_spec("A100", 2, 8), "no published row of A100"),
        (a_spec(flavor="70B"), "no published row of GB200 with this run's size of the model"),
        (a_spec("H100", 2, 8, flavor="70B"), "no published row of H100 with this run's tensor parallel degree"),
        (a_spec(seq_len=4096), "no published row of GB200 with this run's sequence length"),
        (a_spec(tensor_parallel=4), "no published row of GB200 with this run's tensor parallel degree"),
        (a_spec(param_dtype="float32"), "no published row of GB200 with this run's precision"),
    ],
)
def test_no_row_no_speed(spec: RunSpec, said: str) -> None:
    found = plan.plan(spec)
    assert (found.tps, found.wall_s, found.node_hours, found.basis) == (None, None, None, "")
    assert found.differs == (said,)
    assert "null" in json.dumps(plan.as_dict(found))


def test_the_wall_time_and_the_limit(launch: Launch) -> None:
    found = plan.plan(a_spec(steps=10_000))
    assert found.wall_s == pytest.approx(10_000 * 5 * 8192 / 17975 + plan.START_S)  # as every GPU has its batch
    assert found.wall_s and found.node_hours == pytest.approx(9 * found.wall_s / 3600)
    accumulated = plan.plan(a_spec(steps=100, global_batch_size=360))
    assert accumulated.wall_s == pytest.approx(100 * 10 * 8192 / 17975 + plan.START_S)
    done = launch("plan", "--gpu", "gb200", "--nodes", "9", "--steps", "10000", "--time", "90")
    assert "--time 90 allows 13.50: TOO SHORT, try --time 07:40:00" in done.stdout


def test_for_people(launch: Launch) -> None:
    done = launch("plan", "--gpu", "gb200", "--nodes", "9")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", GB200)


def test_json(launch: Launch) -> None:
    found = json.loads(launch("plan", "--gpu", "h100", "--nodes", "4", "--json").stdout)
    assert [found[key] for key in ("tps", "c4_files", "parameters")] == [7582, 32, 8030261248]
    assert found["verdict"] == "fits"
    assert launch("plan", "--gpu", "h100", "--nodes", "0").returncode == 3


def test_a_cpu_has_no_gpus_memory_and_no_image_is_asked_for(launch: Launch) -> None:
    for arguments in (("--local", "--recipe", "debug"), ("--runtime", "bare"), ("--image", "nowhere.sqsh")):
        done = launch("plan", "--gpu", "cpu", *arguments)
        assert done.returncode == 0 and "cannot say: no published row of CPU" in done.stdout, done.stderr
        assert "memory      cannot say" in done.stdout and "the formula is for a GPU's memory" in done.stdout
        assert ("C4 files" in done.stdout) is ("debug" not in arguments)  # the sample needs none
    assert launch("plan", "--gpu", "cpu", "--runtime", "bare", "--image", "x.sqsh").returncode == 3


def test_a_gpu_of_unknown_memory_has_no_verdict() -> None:
    found = plan.plan(a_spec("GB999"))
    assert found.memory and (found.verdict, found.advice) == ("", ())
    assert found.notes == ("how much memory a GB999 has is not known here",)


def test_submit_writes_the_prediction(launch: Launch, slurm: Fake, image: Any) -> None:
    run = ("--gpu", "gb200", "--nodes", "9", "--image", "titan.sqsh", "--name", "r", "--force")
    assert launch("submit", *run).returncode == 0
    found = json.loads((image.parent / "runs" / "r" / "plan.json").read_text())
    known = [found[key] for key in ("tps", "memory_gib", "wall_s", "node_hours")]
    assert known == [17975, 159.27, 407.9, 1.0197]
    assert (found["c4_files"], found["basis"]) == (36, "published (Crusoe, 9 x GB200)")


def test_a_prediction_never_stops_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Outcome]:
        raise ValueError("the table is damaged")

    monkeypatch.setattr(plan, "published", broken)
    assert plan.prediction(a_spec()) == {"notes": ["no prediction: the table is damaged"]}
