"""The commands `launcher stage ...`: what they take and what they print. Progress goes to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import as_json, counted, echo, print_error, print_json, say
from launcher.config.layers import Layer
from launcher.config.options import FilePath
from launcher.config.user_file import user_layer
from launcher.image import ARCHES, DOCKER
from launcher.stage import inventory, models
from launcher.stage.c4 import plan_c4, shard_names
from launcher.stage.fetch import Outcome, fetch
from launcher.stage.image import of_release, stage_image
from launcher.stage.inventory import reports
from launcher.stage.shards import TRAIN_BYTES, TRAIN_FILES
from launcher.stage.target import gigabytes, refuse_foreign

PUBLISHED = ("nightly", "stable", "reference")  # channels of a release: .github/workflows/image.yml
_path = FilePath(path_type=Path)
_to = click.option("--to", "target", type=_path, required=True, metavar="DIR", help="Directory to write to.")
_revision = click.option("--revision", metavar="REV", help="Branch, tag or commit.  [default: what DIR has, else main]")
_token_file = click.option(
    "--token-file",
    type=_path,
    metavar="FILE",
    help="File with your Hugging Face token.  [default: HF_TOKEN, `hf auth login`]",
)
_jobs = click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Parallel downloads.")
_dry_run = click.option("--dry-run", is_flag=True, help="Print what would be downloaded, and write nothing.")


def _from_the_hub(command: Callable[..., Any]) -> Callable[..., Any]:
    return _revision(_token_file(_jobs(_dry_run(as_json(command)))))


def _of_a_model(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("model", default="Llama-3.1-8B")(_to(_from_the_hub(command)))


@click.command()
@_to
@click.option("--files", type=int, metavar="N", help="Number of train files.")
@click.option(
    "--for",
    "runs",
    multiple=True,
    metavar="RUN",
    help="The files that a run needs: its run.toml, or nodes=17,gpus=4,steps=1000,batch=5[,seq=8192,tp=1,cp=1,pp=1] "
    "(GPUs per node, sequences per GPU); repeatable.",
)
@click.option("--all", "everything", is_flag=True, help=f"All {TRAIN_FILES:,} train files, {TRAIN_BYTES / 1e9:.0f} GB.")
@click.option("--validation", is_flag=True, help="Also download the validation files.")
@click.option(
    "--from",
    "source",
    default="",
    metavar="S3",
    help="Copy from s3://bucket/prefix instead of the Hub; credentials "
    "and endpoint come from AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws.",
)
@_from_the_hub
def c4(target: Path, jobs: int, dry_run: bool, as_json: bool, **wanted: Any) -> None:
    """Download the C4 files that a run needs, and verify them. Run it again to continue, add or repair files.

    Say which files with --for, --files or --all.

    \b
    launcher stage c4 --to /data/c4 --for nodes=17,gpus=4,steps=1000,batch=5
    launcher stage c4 --to /data/c4 --files 68 --validation
    """
    if sum((wanted["files"] is not None, bool(wanted["runs"]), wanted["everything"])) != 1:
        raise click.UsageError("one of --files N, --for RUN and --all is needed")
    if wanted["source"] and (wanted["revision"] or wanted["token_file"]):
        raise click.UsageError("--revision and --token-file are for the Hub, and cannot be combined with --from")
    refuse_foreign(target, shard_names)
    plan = plan_c4(target, **wanted)
    echo(*plan.notes, plan.line(), err=True)
    facts = {
        "train_files": plan.train_files,
        "train_files_in_all": plan.train_files_in_all,
        "tokens": plan.tokens,
        "revision": plan.repo.revision,
        "notes": list(plan.notes),
    }
    if dry_run:
        _print_dry_run(target, plan.files, facts, as_json)
    else:
        _print_outcome(fetch(target, plan.repo, plan.files, "c4", jobs, plan.train_files_in_all), facts, as_json)


@click.command()
@_of_a_model
def tokenizer(**options: Any) -> None:
    """Download the tokenizer of a Llama 3 model.

    MODEL is Llama-3.1-8B (or 8B), Llama-3.1-70B (or 70B), or OWNER/NAME on the Hub. Llama models are gated: accept the
    licence on the Hub first, then pass your token with HF_TOKEN, `hf auth login` or --token-file.

    \b
    launcher stage tokenizer --to /data/tokenizers/Llama-3.1-8B
    """
    _stage_model("tokenizer", **options)


@click.command()
@_of_a_model
def model(**options: Any) -> None:
    """Download weights to start training from.

    Downloads the model's safetensors, configuration and tokenizer.

    \b
    launcher stage model --to /data/models/Llama-3.1-8B
    """
    _stage_model("model", **options)


def _stage_model(kind: str, *, target: Path, jobs: int, dry_run: bool, as_json: bool, **wanted: Any) -> None:
    refuse_foreign(target, models.kind_of)
    repo, files = models.plan(kind, target, **wanted)
    size = gigabytes(sum(file.bytes for file in files))
    say(f"{repo.name}: {counted(len(files), 'file')}, {size}, revision {repo.revision[:12]}")
    if dry_run:
        _print_dry_run(target, files, {"source": repo.source, "revision": repo.revision}, as_json)
    else:
        _print_outcome(fetch(target, repo, files, kind, jobs), {}, as_json)


def _print_outcome(outcome: Outcome, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts | outcome.as_dict())
    else:
        echo(outcome.line())


def _print_dry_run(target: Path, files: Any, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sizes = {file.path: file.bytes for file in files}
        print_json(facts | {"directory": str(target), "bytes": sum(sizes.values()), "files": sizes})
    else:
        echo(*(file.path for file in files))


@click.command()
@click.argument("directory", type=_path)
@click.option("--deep", is_flag=True, help="Read and hash every file, not only those that were touched.")
@as_json
def verify(directory: Path, deep: bool, as_json: bool) -> None:
    """Check a staged directory against its manifest. Exit code 3 when something is missing or wrong.

    Images, which `stage image` names by their checksum, are always read and hashed.

    \b
    launcher stage verify /data/c4
    """
    found = reports(directory, deep, read_images=True)
    if as_json:
        first, *more = [report.as_dict() for report in found]
        print_json(first | {"deep": deep} | ({"images": more[0]} if more else {}))
    for report in () if as_json else found:
        echo(*report.lines())
        if report.problems:
            echo(f"  repair: {report.repair}", err=True)
    if any(report.problems for report in found):
        sys.exit(ExitStatus.INVALID)


@click.command("list")
@click.argument("directories", nargs=-1, type=_path)
@as_json
def list_(directories: tuple[Path, ...], as_json: bool) -> None:
    """List what is staged, and how many ranks it is enough for.

    Looks below /data by default, and only at names and sizes. Exit code 0: done, even if something is INCOMPLETE or
    DAMAGED (`verify` then exits with 3); 4: a directory that you named does not exist.

    \b
    launcher stage list /data/c4 /data/tokenizers
    """
    places = directories or inventory.PLACES
    reports: list[inventory.Report] = []
    errors: list[LauncherError] = []
    for directory in directories:
        try:
            inventory.require_directory(directory)
        except LauncherError as error:
            errors.append(error)
    status = max((error.status for error in errors), default=ExitStatus.OK)
    for directory in inventory.staged_below(places):
        try:
            reports += inventory.reports(directory)
        except LauncherError as error:
            errors.append(error)
    if as_json:
        print_json([report.as_dict() for report in reports] + [{"error": found.what} for found in errors])
    else:
        for report in reports:
            echo(*report.lines(), *([f"  repair: {report.repair}"] if report.problems else []))
        for found in errors:
            print_error(found)
        if not (reports or errors):
            where = ", ".join(map(str, places))
            echo(f"nothing staged in {where}; start: launcher stage c4 --to /data/c4 --files 8", err=True)
    sys.exit(status)


@click.command()
@click.argument("source", metavar="[SOURCE]", required=False)
@click.option("--to", "target", type=_path, metavar="DIR", help="Directory.  [default: what launcher init saved]")
@click.option("--release", default="", metavar="TAG", help="Take the image of this release instead of SOURCE.")
@click.option("--channel", type=click.Choice(PUBLISHED), default="stable", show_default=True, help="Its channel.")
@click.option(
    "--arch", type=click.Choice(["auto", *ARCHES]), default="auto", help="Its architecture.  [default: the nodes']"
)
@as_json
def image(source: str | None, target: Path | None, release: str, channel: str, arch: str, as_json: bool) -> None:
    """Put an image on the shared file system.

    The checksum becomes part of its name. SOURCE is a .sqsh file or the URL of one. With --release, LAUNCHER_RELEASES
    says where releases are.

    \b
    launcher stage image titan-stable-arm64.sqsh --to /shared/images
    launcher stage image --release v0.1.0 --to /shared/images
    """
    if bool(source) == bool(release):
        raise click.UsageError("one of SOURCE and --release TAG is needed")
    if target is None:
        if not (saved := user_layer(None, os.environ).values.get("job.image_dir")):
            raise click.UsageError("--to DIR is needed, or: launcher init --image-dir DIR")
        target = Path(saved)
    wanted = source or of_release(release, channel, _arch_of_nodes() if arch == "auto" else arch)
    path = stage_image(wanted, target, say=say)
    if as_json:
        print_json({"path": click.format_filename(path), "bytes": path.stat().st_size})
    else:
        echo(str(path))


def _arch_of_nodes() -> str:
    """As a run without options would have them: the login node often is of another."""
    from launcher.config.resolve import resolve

    layer = Layer({"job.image": "/any.sqsh"}, {"job.image": "default"})
    try:
        return DOCKER[resolve(layer, None, None, os.environ).profile.arch]
    except LauncherError as error:
        raise LauncherError(error.code, error.what, f"--arch {'|'.join(ARCHES)}", status=error.status) from error


@click.group()
def stage() -> None:
    """Download data, tokenizer, weights and images, and verify them.

    Puts them on a file system that all nodes share.

    \b
    launcher stage c4 --to /data/c4 --for nodes=17,gpus=4,steps=1000,batch=5
    launcher stage tokenizer --to /data/tokenizers/Llama-3.1-8B
    launcher stage verify /data/c4
    """


for _command in (c4, tokenizer, model, image, verify, list_):
    stage.add_command(_command)
