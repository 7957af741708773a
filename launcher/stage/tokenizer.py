"""A model's tokenizer: the few files that torchtitan needs, which are gated on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.base.errors import LauncherError
from launcher.stage.fetch import Outcome, fetch, open_repo
from launcher.stage.hub import HubFile, Repo, find_token, list_files
from launcher.titan import read_text

MODELS = {
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
}
# Without tokenizer_config.json the beginning and the end of a text silently have no token.
REQUIRED = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("special_tokens_map.json", "original/tokenizer.model")


def repo_name(model: str) -> str:
    """`8B`, `Llama-3.1-8B` or any `owner/name`. Raises LauncherError for another word."""
    known = {alias.lower(): name for short, name in MODELS.items() for alias in (short, short.rsplit("-", 1)[1])}
    if name := known.get(model.lower()):
        return name
    owner, slash, name = model.partition("/")
    if (
        slash
        and owner
        and name
        and all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, name))
    ):
        return model
    raise LauncherError(
        f"there is no model {model[:80]!r}; known: {', '.join(MODELS)}",
        "Llama-3.1-8B, or OWNER/NAME on the Hub",
    )


def plan_tokenizer(
    target: Path, model: str, revision: str | None = None, token_file: Path | None = None
) -> tuple[Repo, list[HubFile]]:
    """The repository at one commit, and the files that are needed of it."""
    repo = open_repo(target, repo_name(model), "model", "tokenizer", revision, find_token(token_file))
    return repo, choose(repo, list_files(repo, recursive=True))


def choose(repo: Repo, files: list[HubFile]) -> list[HubFile]:
    """The tokenizer's files among all. Raises LauncherError when one that is required is not there."""
    there = {file.path: file for file in files}
    if missing := [path for path in REQUIRED if path not in there]:
        raise LauncherError(
            f"{repo.page} at {repo.revision[:12]} has no {' and no '.join(missing)}",
            "another repository: launcher stage tokenizer OWNER/NAME --to DIR",
        )
    return [there[path] for path in (*REQUIRED, *OPTIONAL) if path in there]


def bring(target: Path, repo: Repo, files: list[HubFile], jobs: int) -> Outcome:
    outcome = fetch(target, repo, files, "tokenizer", looks_like_tokenizer, jobs)
    check_json(target)
    return outcome


def check_json(target: Path) -> None:
    for name in REQUIRED:
        try:
            good = isinstance(json.loads(read_text(target / name)), dict)
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise LauncherError(f"{target / name}: as on the Hub, but not a tokenizer's file", "--revision main")


def looks_like_tokenizer(target: Path) -> bool:
    return any((target / name).is_file() for name in REQUIRED)
