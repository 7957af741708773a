"""What torchtitan's own loader makes of a view, and the debug recipe trained through one. See test_real_trainer.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.config.layers import Layer, merge
from launcher.config.resolve import placed
from launcher.config.spec import PlacedRun
from launcher.stage import sample
from launcher.stage.view import plan, train_files, write, write_data
from tests.conftest import ROOT, Launch
from tests.train.test_real_trainer import PYTHONS, answer, losses, python

__all__ = ["python"]  # a fixture

# Reads every rank's share to the end, with a tokenizer that remembers the documents instead of splitting them.
READ = """
import json, logging, sys
logging.disable(logging.WARNING)
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

class Remember(list):
    def encode(self, text, **ends):
        self.append(text)
        return [0, 1, 2]

answer = []
for path, name, degree in json.load(sys.stdin):
    ranks, files = [], []
    for rank in range(degree):
        seen = Remember()
        dataset = HuggingFaceTextDataset(name, path, seen, 2, rank, degree, infinite=False)
        sum(1 for _ in dataset)
        ranks.append(seen)
        files.append(dataset._data.num_shards)
    answer.append([ranks, files])
print("ANSWER" + json.dumps(answer))
"""

# The first ranks' and the last one's batches, with torchtitan's own tokenizer and loader.
LOAD = """
import json, logging, sys, time
logging.disable(logging.WARNING)
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

answer = []
for path, tokens, degree, batch, length, steps in json.load(sys.stdin):
    tokenizer = HuggingFaceTokenizer(tokenizer_path=tokens)
    for rank in {0, degree // 2, degree - 1}:
        dataset = HuggingFaceTextDataset("c4", path, tokenizer, length, rank, degree, infinite=True)
        began, shapes, largest = time.monotonic(), set(), 0
        batches = iter(ParallelAwareDataloader(dataset, dp_rank=rank, dp_world_size=degree, batch_size=batch))
        for _ in range(steps):
            inputs, labels = next(batches)
            shapes |= {tuple(inputs["input"].shape), tuple(labels.shape)}
            largest = max(largest, int(labels.max()))
        answer.append([degree, dataset._data.num_shards, sorted(shapes), largest, time.monotonic() - began])
print("ANSWER" + json.dumps(answer))
"""


def a_spec(data: Path, runs_dir: Path, name: str, degree: int, **job: str) -> PlacedRun:
    values = {
        "job.name": name,
        "job.runs_dir": str(runs_dir),
        "job.runtime": "bare",
        "job.data": str(data),
        "profile.gpus_per_node": degree,
        **{f"job.{key}": value for key, value in job.items()},
    }
    return placed(merge([Layer(values, dict.fromkeys(values, "test"))]))


def documents(*files: Path) -> list[str]:
    import gzip

    return [json.loads(line)["text"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def test_every_rank_gets_documents_of_its_own_and_together_all_of_the_view(python: str, tmp_path: Path) -> None:
    data = tmp_path / "c4"
    sample.write_c4_sample(data, train_files=14, documents_per_file=5)
    no_validation = tmp_path / "no-validation"
    shutil.copytree(data, no_validation)
    for path in (no_validation / "en").glob("c4-validation.*"):
        path.unlink()
    specs = [
        *(a_spec(data, tmp_path / "runs", f"d{degree}", degree) for degree in (1, 3, 4, 6, 14)),
        *(a_spec(data, tmp_path / "runs", f"part{part}", 4, data_part=f"{part}/3") for part in (1, 2, 3)),
        a_spec(no_validation, tmp_path / "runs", "no-validation", 3),
        a_spec(data, tmp_path / "runs", "too-few", 16),
    ]
    tasks, expected = [], []
    for asked in specs:
        spec, _ = plan(asked)
        view = Path(spec.run_dir) / "data"
        write(view, spec.view)
        tasks.append((str(view), "c4", spec.data_parallel))
        expected.append((documents(*(data / "en" / name for name in train_files(spec))), len(train_files(spec))))
    tasks.append((tasks[1][0], "c4_validation", 3))
    answers = answer(python, READ, given=tasks, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    for spec, (_, _, degree), (ranks, files), (texts, count) in zip(specs, tasks, answers, expected, strict=False):
        together = [text for rank in ranks for text in rank]
        assert sorted(together) == sorted(texts), f"{spec.job.name}: all, and each once"
        if spec.job.name == "too-few":
            assert files == [count] * degree, "every rank reads every file"
        else:
            assert files == [count // degree] * degree and all(len(rank) == len(texts) // degree for rank in ranks)
    parts = [{text for rank in ranks for text in rank} for ranks, _ in answers[5:8]]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]
    ranks, _ = answers[-1]
    assert sorted(text for rank in ranks for text in rank) == sorted(documents(*(data / "en").glob("c4-validation.*")))


def test_the_sample_gives_any_number_of_ranks_full_batches_for_as_many_steps_as_asked(
    python: str, tmp_path: Path
) -> None:
    batch, length, steps = 5, 8192, 12  # llama3-8b's on a GB200; a rank's file holds text for four steps
    tasks = []
    for degree in (1, 5, 68, 1000):  # as many as files, more, and more than documents
        asked = a_spec(Path("sample"), tmp_path / "runs", f"d{degree}", degree, tokenizer="sample")
        spec, notes = plan(asked)
        write_data(spec, Path(spec.run_dir))
        assert not notes and len(train_files(spec)) == max(sample.TRAIN_FILES, degree)
        tasks.append((f"{spec.run_dir}/data", spec.tokenizer_path, degree, batch, length, steps))
    answers = answer(python, LOAD, given=tasks, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert {degree for degree, *_ in answers} == {1, 5, 68, 1000}
    for degree, files, shapes, largest, _ in answers:
        assert (files, shapes) == (4 if degree == 1 else 1, [[batch, length]]) and largest < 258


def test_the_debug_recipe_trains_at_a_degree_that_does_not_divide_its_files(
    python: str, launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if python != PYTHONS[0]:
        return  # the loaders of both eras are above
    assert sample.TRAIN_FILES % 3, "otherwise this shows nothing"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    size = ("--gpu", "cpu", "--gpus-per-node", "3", "--steps", "4", "--set", "recipe.local_batch_size=1")
    words = ("submit", "--local", "--recipe", "debug", *size, "--name", "r", "--python", python, "--follow")
    done = launch(*words, timeout=500)
    run = workplace / "runs" / "r"
    log = next((run / "logs").glob("0000-*.log")).read_text()
    assert done.returncode == 0, done.stderr + log[-3000:]
    assert f"Preparing c4 dataset from {run}/data" in log and "dp_shard=3" in log
    assert len(list((run / "data" / "en").glob("c4-train.*"))) == 3
    assert list(losses(log)) == [1, 2, 4]
    row = json.loads(launch("results", "r", "--json").stdout)
    assert row["state"] == "COMPLETED" and row["nodes"] == 1
    (record,) = (run / "nodes").glob("0*.json")
    facts = json.loads(record.read_text())
    assert facts["data"] == f"{run}/data" and facts["data_files"] == 3
    assert facts["environment"]["HF_HUB_OFFLINE"] == facts["environment"]["HF_DATASETS_OFFLINE"] == "1"
