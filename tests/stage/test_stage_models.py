"""`launcher stage tokenizer` and `model`: exactly the needed files, and the answers of a gated repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.stage.conftest import GOOD_TOKEN
from tests.stage.hub_server import GATED_WORDS, Hub
from tests.stage.test_stage_c4 import staged

MODEL = "meta-llama/Llama-3.1-8B"
TOKENIZER = ["original/tokenizer.model", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


WEIGHTS = ["config.json", "generation_config.json", "model.safetensors.index.json"]
WEIGHTS += [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_exactly_the_needed_files_of_a_tokenizer_that_grows_into_a_model(launch: Launch, hub, workplace, model_files):
    for kind, names, present in (("tokenizer", TOKENIZER, 0), ("model", [*TOKENIZER, *WEIGHTS], 4)):
        done = launch("stage", kind, "--to", "it", "--json", HF_TOKEN=GOOD_TOKEN)
        assert done.returncode == 0 and json.loads(done.stdout)["present"] == present, done.stderr
        assert staged(workplace / "it") == sorted(names)
        assert all((workplace / "it" / name).read_bytes() == model_files[name] for name in names)
    assert launch("stage", "tokenizer", "--to", "it", HF_TOKEN=GOOD_TOKEN).returncode == 0
    report = json.loads(launch("stage", "verify", "it", "--json").stdout)
    assert (report["kind"], report["files"], report["complete"]) == ("model", 9, True)
    for path in workplace.rglob("*"):
        assert not path.is_file() or GOOD_TOKEN.encode() not in path.read_bytes(), path


def test_the_larger_models_and_any_other(launch: Launch, hub: Hub, workplace: Path, model_files):
    hub.add("model", "meta-llama/Llama-3.1-70B", model_files)
    hub.add("model", "me/mine", model_files)
    for asked, name in (("Llama-3.1-70B", "Llama-3.1-70B"), ("me/mine", "me/mine"), ("70b", "Llama-3.1-70B")):
        assert launch("stage", "tokenizer", asked, "--to", name).returncode == 0
        manifest = json.loads((workplace / name / ".staged/manifest.json").read_text())
        assert manifest["source"].endswith(name) and manifest["kind"] == "tokenizer"
    done = launch("stage", "tokenizer", "Llama-9", "--to", "x")
    assert done.returncode == 3 and "known: Llama-3.1-8B, Llama-3.1-70B" in done.stderr


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("tokenizer_config.json", "has no tokenizer_config.json"),  # beginning and end of text would be missing
        ("model-00002-of-00002.safetensors", "some of its weights are missing"),
        ("config.json", "has no weights as safetensors"),
    ],
)
def test_a_repository_that_lacks_something(lacks: str, words: str, launch: Launch, hub: Hub, model_files):
    hub.add("model", "me/mine", {name: data for name, data in model_files.items() if name != lacks})
    done = launch("stage", "model", "me/mine", "--to", "x")
    assert done.returncode == 3 and words in done.stderr


def test_answers_of_a_gated_repository(launch: Launch, hub: Hub, workplace: Path):
    """Why a token has no access stands in the Hub's own words, which are printed."""
    states = {"none": "hf_stranger", "pending": "hf_waiting", "rejected": "hf_rejected", "fine": "hf_finegrained"}
    hub.gated[MODEL] |= {token: state for state, token in states.items()}
    hub.tokens |= set(states.values())
    tokens = {"needs a token, and there is none": "", "invalid or has expired": "hf_invalid"}
    tokens |= {f"| {GATED_WORDS[state].format(MODEL)}": token for state, token in states.items()}
    for words, token in tokens.items():
        done = launch("stage", "tokenizer", "--to", "x", **({"HF_TOKEN": token} if token else {}))
        assert done.returncode == 3 and words in done.stderr and "try:" in done.stderr
        assert not (token and token in done.stderr + done.stdout)
        assert ("account or token has no access" in done.stderr) == (token in states.values())
        assert staged(workplace / "x") == []


def test_the_token_from_a_file_and_from_the_login(launch: Launch, hub: Hub, workplace: Path):
    (workplace / "token").write_text(f"{GOOD_TOKEN}\n")
    assert launch("stage", "tokenizer", "--to", "a", "--token-file", "token").returncode == 0
    (workplace / "huggingface").mkdir(exist_ok=True)
    (workplace / "huggingface/token").write_text(GOOD_TOKEN)
    afresh = {"HF_HUB_DISABLE_TELEMETRY": "1"}  # the library reads where its files are while it is imported
    assert launch("stage", "tokenizer", "--to", "b", **afresh).returncode == 0


@pytest.mark.parametrize("content", ["", "two tokens", b"\xff\xfe".decode("latin-1")])
def test_a_token_file_that_holds_none(launch: Launch, hub: Hub, workplace: Path, content: str):
    (workplace / "token").write_bytes(content.encode("latin-1"))
    done = launch("stage", "tokenizer", "--to", "x", "--token-file", "token")
    assert done.returncode == 3 and "must hold one token" in done.stderr
    assert launch("stage", "tokenizer", "--to", "x", "--token-file", "none").returncode == 7
