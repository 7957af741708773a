"""A model's tokenizer, the few files that torchtitan needs, and its weights to start a training from."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.stage.fetch import open_repo
from launcher.stage.hub import Repo, find_token, list_files
from launcher.stage.source import RemoteFile

MODELS = {
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
}
# Without tokenizer_config.json the beginning and the end of a text silently have no token.
REQUIRED = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("special_tokens_map.json", "original/tokenizer.model")
INDEX = "model.safetensors.index.json"
CONFIG = ("config.json", "generation_config.json")
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def repo_name(model: str) -> str:
    """`8B`, `Llama-3.1-8B` or any `owner/name`. Raises LauncherError for another word."""
    for short, name in MODELS.items():
        if model.lower() in (short.lower(), short.lower().rpartition("-")[2]):
            return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        return model
    raise LauncherError(
        "name-unknown",
        f"there is no model {model[:80]!r}; known: {', '.join(MODELS)}",
        "Llama-3.1-8B, or OWNER/NAME on the Hub",
    )


def plan(
    kind: str, target: Path, model: str, revision: str | None = None, token_file: Path | None = None
) -> tuple[Repo, list[RemoteFile]]:
    """The repository at one commit, and the files of it that a tokenizer or a model (`kind`) is made of."""
    repo = open_repo(target, repo_name(model), "model", kind, revision, find_token(token_file))
    there = {file.path: file for file in list_files(repo, recursive=True)}
    where = f"{repo.page} at {repo.revision[:12]}"
    if missing := [path for path in REQUIRED if path not in there]:
        raise LauncherError(
            "repository-lacks",
            f"{where} has no {' and no '.join(missing)}",
            "another repository: launcher stage tokenizer OWNER/NAME --to DIR",
        )
    names = [*REQUIRED, *OPTIONAL]
    if kind == "model":
        shards = [match for path in there if (match := SHARD.fullmatch(path))]
        if shards and ({int(match[2]) for match in shards} != {len(shards)} or INDEX not in there):
            raise LauncherError("repository-lacks", f"{where}: some of its weights are missing", "--revision main")
        weights = [match[0] for match in shards] or [path for path in ("model.safetensors",) if path in there]
        if not weights or "config.json" not in there:
            raise LauncherError("repository-lacks", f"{where} has no weights as safetensors", "another repository")
        names += [*CONFIG, INDEX, *weights]
    return repo, [there[name] for name in names if name in there]


def kind_of(target: Path) -> str:
    """What a directory looks like, whoever made it: "model", "tokenizer", or nothing."""
    if any(target.glob("*.safetensors")):
        return "model"
    return "tokenizer" if any((target / name).is_file() for name in REQUIRED) else ""
