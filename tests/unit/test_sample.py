"""The sample data and tokenizer that the launcher makes itself."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.stage import sample


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_files_are_named_as_on_the_hub(tmp_path: Path) -> None:
    sample.write_c4_sample(tmp_path, train_files=2, documents_per_file=3)
    assert list(contents(tmp_path)) == [
        "README.md",
        "en/c4-train.00000-of-00002.json.gz",
        "en/c4-train.00001-of-00002.json.gz",
        "en/c4-validation.00000-of-00001.json.gz",
    ]


def test_the_readme_has_the_header_that_names_the_configuration(tmp_path: Path) -> None:
    sample.write_c4_sample(tmp_path, 1, 1)
    lines = (tmp_path / "README.md").read_text().splitlines()
    header = lines[1 : lines.index("---", 1)]
    assert lines[0] == "---" and "- config_name: en" in header and "    path: en/c4-train.*.json.gz" in header


def test_a_document_has_c4s_three_fields_and_some_text(tmp_path: Path) -> None:
    sample.write_c4_sample(tmp_path, 1, 50)
    found = documents(tmp_path / "en" / "c4-train.00000-of-00001.json.gz")
    assert len(found) == 50
    assert all(set(document) == {"text", "timestamp", "url"} for document in found)
    assert all(200 < len(document["text"]) < 4000 and document["text"].isascii() for document in found)
    assert len({document["text"] for document in found}) == 50


def test_the_same_seed_gives_the_same_bytes_whenever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write_c4_sample(tmp_path / "a", 2, 20, seed=7)
    monkeypatch.setattr(time, "time", lambda: 1.9e9)  # gzip's own header counts seconds
    sample.write_c4_sample(tmp_path / "b", 2, 20, seed=7)
    sample.write_c4_sample(tmp_path / "c", 2, 20, seed=8)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert all(first[name] != other[name] for name in first if name.endswith(".gz"))


def test_no_two_files_hold_the_same(tmp_path: Path) -> None:
    sample.write_c4_sample(tmp_path, 4, 20)
    shards = [content for name, content in contents(tmp_path).items() if name.endswith(".gz")]
    assert len(set(shards)) == len(shards) == 5


def test_the_default_is_small_and_quick_and_enough_for_the_debug_recipe(tmp_path: Path) -> None:
    began = time.perf_counter()
    sample.write_c4_sample(tmp_path)
    assert time.perf_counter() - began < 10
    assert sum(map(len, contents(tmp_path).values())) < 1_000_000
    shards = (tmp_path / "en").glob("*train*")
    text = sum(len(document["text"]) for shard in shards for document in documents(shard))
    assert text > 20 * 4 * 4 * 256  # steps x local batch x ranks x sequence length, one token a byte


@pytest.mark.parametrize(("files", "count"), [(0, 1), (1, 0)])
def test_an_empty_sample_is_refused(tmp_path: Path, files: int, count: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        sample.write_c4_sample(tmp_path, files, count)


def test_a_write_that_fails_leaves_neither_half_a_file_nor_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LauncherError, match="No space"):
        sample.write_tokenizer(tmp_path)
    assert contents(tmp_path) == {}


def test_the_tokenizer_knows_every_byte_once_and_two_special_tokens(tmp_path: Path) -> None:
    sample.write_tokenizer(tmp_path)
    assert set(contents(tmp_path)) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    assert vocabulary["A"] == 65 and vocabulary["\u0120"] == 32  # the space of every byte-level tokenizer
    assert [(token["id"], token["content"]) for token in tokenizer["added_tokens"]] == [
        (256, "<|begin_of_text|>"),
        (257, "<|end_of_text|>"),
    ]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>" and config["eos_token"] == "<|end_of_text|>"


def test_hugging_faces_library_reads_it_and_returns_every_byte(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    sample.write_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Every byte: \x00\t\n ~\x7f \u00e9 \u20ac \U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode("<|end_of_text|>").ids == [257]
