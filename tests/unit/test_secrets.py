"""Secrets reach the job and nothing else: no record, message or table holds one, whatever its variable is called."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import print_error
from launcher.base.secret import looks_secret, masked
from launcher.logs.known_errors import Failure
from launcher.results.settings import settings_of
from launcher.runs.directory import Run
from tests.conftest import Launch
from tests.unit.test_submission import SUBMIT, Fake, slurm

__all__ = ["slurm"]  # a fixture

ADDRESS = "http://ada:hunter2@proxy:3128"
SECRET_NAMES = (
    "WANDB_KEY DB_PASS DB_PWD GH_PAT SSH_PRIVATE_KEY X_AUTH HF_TOKEN HFTOKEN HF_TOKEN_READ MY_APIKEY GCP_CREDS "
    "PGPASS DBPASS USERPWD SIGNINGKEY HF_TOKENS NVIDIA_API_TOKENS"
)
OPEN_NAMES = (
    "TOKENIZERS_PARALLELISM XAUTHORITY SSH_AUTH_SOCK PATH NCCL_IB_PKEY MAX_TOKENS COMPASS GIT_AUTHOR_NAME "
    "HF_TOKEN_PATH PATTERN PASSES titan.model.n_key_heads titan.model.eos_token titan.compile.pass_pipeline "
    "titan.parallelism.context_parallel_ptrr_mask_key titan.training.max_tokens job.tokenizer"
)


@pytest.mark.parametrize("name", [*SECRET_NAMES.split(), "titan.metrics.api_key"])
def test_a_name_that_gives_a_secret_away(name: str) -> None:
    assert looks_secret(name, "hunter2") and not looks_secret(name, "0") and not looks_secret(name, "true")


@pytest.mark.parametrize("name", OPEN_NAMES.split())
def test_a_name_that_only_sounds_like_it(name: str) -> None:
    assert not looks_secret(name, "hunter2")


@pytest.mark.parametrize(
    ("value", "is_secret"),
    [
        (ADDRESS, True),
        ("ada:hunter2@proxy:3128", True),
        ("redis://:hunter2@db", True),
        ("https://b.example/x?X-Amz-Signature=0123abcd", True),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", True),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", True),
        ("https://abcdef0123456789abcdef@sentry.io/1", True),
        ("host=h user=u password=hunter22", True),
        ("machine h login u password hunter22", True),
        ("sv=2020&sig=0123abcd0123", True),
        ("X-Api-Key: hunter22", True),
        ("Basic dXNlcjpodW50ZXIyMng=", True),
        ("Bearer abcdefgh", True),
        ("sk-proj-abcDEF123_456-abcdefghijklmnop", True),
        ("https://user:pa/ss@host/", True),
        ("https://proxy:3128/path@2", False),
        ("ssh://git@github.com/x", False),
        ("docker://reg:5000/titan@sha256:0123", False),
        ("/data/hf_datasets_of_english_text", False),
        ("docker://titan:1.0@sha256:0123", False),
        ("/a:/b:ro", False),
        ("mlx5_0:1,mlx5_1:1", False),
    ],
)
def test_a_value_that_gives_a_secret_away(value: str, is_secret: bool) -> None:
    assert looks_secret("job.x", value) is is_secret


def test_a_long_text_of_others_is_looked_at_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    text = "//a:b" * 200_000  # without a limit, hours
    assert not looks_secret("x", text) and len(masked(text)) < 20_000
    print_error(LauncherError("x", "what", original=f"{text}\n{text}"))
    assert len(capsys.readouterr().err) < 3000


def test_words_of_others_are_shown_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(LauncherError("x", "what", original=f"cannot reach {ADDRESS}"))
    said = capsys.readouterr().err
    assert "cannot reach" in said and "hunter2" not in said


def test_values_of_variables_are_recorded_only_where_they_are_public(launch: Launch, slurm: Fake, image: Path) -> None:
    private = {name: f"hunter2'{name}" for name in (*SECRET_NAMES.split(), "MINE", "NCCL_TOKEN")}
    private |= {"HTTPS_PROXY": ADDRESS, "NVIDIA_PROXY": ADDRESS}
    public = {"NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/opt/lib", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    given = [word for name, value in (private | public).items() for word in ("--env", f"{name}={value}")]
    done = launch(*SUBMIT, *given)
    assert done.returncode == 0, done.stderr
    run = image.parent / "runs" / "r"
    said = shlex.split((run / "secret.env").read_text())
    assert {f"{name}={value}" for name, value in private.items()} <= {*said}
    for path in (p for p in run.rglob("*") if p.is_file() and p.name != "secret.env"):
        assert "hunter2" not in path.read_text(errors="replace"), path
    script = (run / "job.sbatch").read_text()
    assert all(f"export {name}={value}\n" in script for name, value in public.items())
    assert (run / "secret.env").stat().st_mode & 0o777 == 0o600 and "hunter2" not in done.stdout + done.stderr
    assert "hunter2" not in launch("config", "show", "--gpu", "b200", "--image", "titan.sqsh", *given).stdout
    again = launch("submit", str(run / "run.toml"), "--name", "again")
    assert (again.returncode, "no such variable in your environment" in again.stderr) == (ExitStatus.INVALID, True)
    assert launch("submit", str(run / "run.toml"), "--name", "again", **private).returncode == 0


def test_with_apptainer_the_jobs_variable_wins_over_the_images(launch: Launch, slurm: Fake, workplace: Path) -> None:
    (workplace / "titan.sif").write_bytes(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0")
    words = ("submit", "--gpu", "b200", "--image", "titan.sif", "--runtime", "apptainer", "--name", "r", "--force")
    done = launch(*words, "--env", "MINE=x")
    assert done.returncode == 0, done.stderr
    assert (workplace / "runs/r/secret.env").read_text() == "export MINE=x\nexport APPTAINERENV_MINE=x\n"
    assert "MINE=x" not in (workplace / "runs/r/job.sbatch").read_text()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ('[env]\nWANDB_KEY = "hunter2"\n', (), "secret_env"),
        (f'[env]\nMINE = "{ADDRESS}"\n', (), "secret_env"),
        ('[env]\nHF_TOKEN = "hunter2\n', (), "f.toml:2:"),
        ('[env]\nX = """a\nhunter2 \\q"""\n', (), "TOML syntax"),
        ('[env]\nMINE = ["hunter2"]\n', (), "must be a string"),
        ('[env]\nMINE = "hunter2\\u0001"\n', (), "control character"),
        ('[titan.metrics]\napi_key = ["hunter2"]\n', (), "must be a string"),
        ('[titan.metrics]\napi_key = "hunter2"\n', (), "secret"),
        ('secret_env = "hunter2"\n', (), "list of names"),
        ('secret_env = ["HF_TOKEN=hunter2"]\n', (), "not a variable's name"),
        ('HF_TOKEN = "hunter2"\n', (), "unknown key"),
        ("", ("--set", "metrics.api_key=hunter2"), "--env NAME"),
        ("", ("--set", "metrics.save_tb_folder=" + ADDRESS), "--env NAME"),
        ("", ("--set", "recipe.steps=" + ADDRESS), "must be a whole number"),
        ("", ("--set", ADDRESS), "not KEY=VALUE"),
        ("", ("--data", ADDRESS), "job.data"),
        ("", ("--data", "s3://key:hunter2@bucket/c4"), "job.data"),
        ("", ("--image", "docker://ada:hunter2@registry/x"), "job.image"),
        ("", ("--tokenizer", ADDRESS), "job.tokenizer"),
        ("", ("--recipe", ADDRESS), "cannot read"),
        ("", ("--env", "A=hunter2\n"), "control character"),
    ],
)
def test_no_message_tells_a_secret(text: str, options: tuple[str, ...], said: str, launch: Launch, image: Path) -> None:
    (image.parent / "f.toml").write_text(text)
    for command in (("submit", "--force"), ("config", "show", "--json")):
        done = launch(*command, "--gpu", "b200", "--image", "titan.sqsh", "-c", "f.toml", *options)
        assert "hunter2" not in done.stdout + done.stderr
        if command[0] == "submit":
            assert done.returncode != 0 and said in done.stderr


def test_a_run_of_an_older_launcher_is_read_and_not_repeated(launch: Launch, slurm: Fake, image: Path) -> None:
    words = ("sweep", "--gpu", "b200", "--image", "titan.sqsh", "--data", "sample", "--name", "s")
    assert launch(*words).returncode == 0
    (run,) = (image.parent / "runs").iterdir()
    old = (run / "run.toml").read_text().replace("\n[env]\n", '\n[env]\nWANDB_KEY = "hunter2"\n')
    (run / "run.toml").write_text(old)
    assert settings_of(Run(run))[0]["env.WANDB_KEY"] == "(hidden)"
    assert [row["run"] for row in json.loads(launch("list", "--json").stdout)] == [run.name]
    again = launch("submit", str(run / "run.toml"), "--name", "again")
    assert (again.returncode, "secret_env" in again.stderr) == (ExitStatus.INVALID, True)
    swept = launch(*words)
    assert swept.returncode == ExitStatus.EXISTS and "WANDB_KEY" in swept.stderr
    assert "hunter2" not in again.stdout + again.stderr + swept.stdout + swept.stderr


def test_an_excerpt_of_a_log_does_not_tell_a_password() -> None:
    failure = Failure("x", "", "", Path("/l"), (f"ProxyError: cannot reach {ADDRESS}/x",), True)
    assert "hunter2" not in f"{failure.as_json()} {failure.as_text()}" and "proxy:3128" in str(failure.as_text())
