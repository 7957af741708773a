"""A loopback Hub with a small C4 and a small gated model, and an environment that knows nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.stage import sample, web
from tests.stage.hub_server import Hub, running_hub

TRAIN_FILES = 12
GOOD_TOKEN = "hf_" + "g" * 34


@pytest.fixture(scope="session")
def c4_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """C4 as the Hub has it, smaller: README.md, 12 train files and 1 validation file, by path."""
    folder = tmp_path_factory.mktemp("c4-on-the-hub")
    sample.write_c4_sample(folder, train_files=TRAIN_FILES, documents_per_file=40)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    # Other files of the real repository, which nobody asked for.
    return files | {
        "multilingual/c4-af.00000-of-00001.json.gz": b"other",
        ".gitattributes": b"*.gz filter=lfs",
    }


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model-on-the-hub")
    sample.write_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    return files | {
        "original/tokenizer.model": b"merges " * 100,
        "original/consolidated.00.pth": b"not wanted",
        "config.json": b"{}",
        "generation_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"first half" * 1000,
        "model-00002-of-00002.safetensors": b"second half" * 1000,
        "LICENSE": b"words",
    }


@pytest.fixture
def hub(
    workplace: Path,
    c4_files: dict[str, bytes],
    model_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Hub]:
    """The Hub, at HF_ENDPOINT. Waits between attempts are short, so that a fault costs no minute."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(workplace / "huggingface"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(web, "BACKOFF_S", 0.01)
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.add("dataset", "allenai/c4", c4_files)
        server.add("model", "meta-llama/Llama-3.1-8B", model_files, "b" * 40)
        server.gated["meta-llama/Llama-3.1-8B"] = {GOOD_TOKEN: "ok"}
        server.tokens.add(GOOD_TOKEN)
        yield server


def reader(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Credentials of object storage at `endpoint`, and nothing else that a person's shell says of it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
