"""The sample data and tokenizer that the launcher makes itself."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from launcher.base.errors import LauncherError
from launcher.stage import sample


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_the_sample_has_the_form_of_c4_and_enough_for_the_debug_recipe(tmp_path: Path) -> None:
    sample.write_c4_sample(tmp_path)
    files = contents(tmp_path)
    shards = [f"en/c4-train.{n:05d}-of-00004.json.gz" for n in range(4)]
    assert list(files) == ["README.md", *shards, "en/c4-validation.00000-of-00001.json.gz"]
    assert len(set(files.values())) == 6 and sum(map(len, files.values())) < 1_000_000
    assert files["README.md"].startswith(b"---\n") and b"- config_name: en\n" in files["README.md"]
    found = [document for name in shards for document in documents(tmp_path / name)]
    assert all(set(document) == {"text", "timestamp", "url"} for document in found)
    assert all(200 < len(document["text"]) < 4000 and document["text"].isascii() for document in found)
    assert len({document["text"] for document in found}) == len(found)
    text = sum(len(document["text"]) for document in found)
    assert text > 20 * 4 * 4 * 256  # steps x local batch x ranks x sequence length, one token a byte


def test_the_same_seed_gives_the_same_bytes_whenever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write_c4_sample(tmp_path / "a", 2, 20, seed=7)
    monkeypatch.setattr("time.time", lambda: 9e8)  # gzip's own header counts seconds
    sample.write_c4_sample(tmp_path / "b", 2, 20, seed=7)
    sample.write_c4_sample(tmp_path / "c", 2, 20, seed=8)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert all(first[name] != other[name] for name in first if name.endswith(".gz"))


def test_a_write_that_fails_leaves_neither_half_a_file_nor_a_temporary_one(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LauncherError, match="No space"):
        sample.write_tokenizer(tmp_path)
    assert contents(tmp_path) == {}


def test_the_tokenizer_returns_every_byte_in_hugging_faces_library(tmp_path: Path) -> None:
    sample.write_tokenizer(tmp_path)
    assert set(contents(tmp_path)) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>" and config["eos_token"] == "<|end_of_text|>"
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(map(chr, range(256))) + "\u20ac \U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode("<|begin_of_text|><|end_of_text|>").ids == [256, 257]
