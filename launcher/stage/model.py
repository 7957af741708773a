"""A model's weights in the Hub's format, to start a training from: safetensors, their index, and the tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.stage import tokenizer
from launcher.stage.fetch import Outcome, fetch, open_repo
from launcher.stage.hub import HubFile, Repo, find_token, list_files

INDEX = "model.safetensors.index.json"
CONFIG = ("config.json", "generation_config.json")
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def plan_model(
    target: Path, model: str, revision: str | None = None, token_file: Path | None = None
) -> tuple[Repo, list[HubFile]]:
    """The repository at one commit, and the files that are needed of it."""
    name = tokenizer.repo_name(model)
    repo = open_repo(target, name, "model", "model", revision, find_token(token_file))
    files = list_files(repo, recursive=True)
    there = {file.path: file for file in files}
    weights = [there[path] for path in there if SHARD.fullmatch(path)]
    shards = {int(match[2]) for file in weights if (match := SHARD.fullmatch(file.path))}
    if weights and (len(shards) != 1 or len(weights) != shards.pop() or INDEX not in there):
        raise LauncherError(f"{repo.page} at {repo.revision[:12]}: some of its weights are missing", "--revision main")
    if not weights and "model.safetensors" in there:
        weights = [there["model.safetensors"]]
    if not weights or "config.json" not in there:
        raise LauncherError(f"{repo.page} at {repo.revision[:12]} has no weights as safetensors", "another repository")
    small = [there[path] for path in (*CONFIG, INDEX) if path in there]
    return repo, [*small, *tokenizer.choose(repo, files), *weights]


def bring(target: Path, repo: Repo, files: list[HubFile], jobs: int) -> Outcome:
    return fetch(target, repo, files, "model", looks_like_model, jobs)


def looks_like_model(target: Path) -> bool:
    return tokenizer.looks_like_tokenizer(target) or any(target.glob("*.safetensors"))
