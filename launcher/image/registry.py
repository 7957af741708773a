"""`launcher image build --push`: the image of each architecture into a registry, then one manifest list for all of
them.

The engine pushes, through docker-py. docker-py knows nothing of manifest lists: they are made by `docker manifest`,
which is in every docker command, needs neither buildx nor a running engine, and does its own logging in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.output import say
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine, asking

# `docker manifest` calls an image missing that this user may not read.
_DENIED = (
    r"denied|unauthorized|authentication required|no basic auth credentials|40[13] (?:Unauth|Forb)|no such manifest"
)


@dataclass(frozen=True)
class Pushed:
    """The image of one architecture, as the registry has it."""

    arch: str  # Docker's word
    digest: str  # of its manifest, sha256:…
    reference: str  # registry.example.com/titan:stable-arm64


def push(tag: str, reference: str, *, engine: Engine) -> Pushed:
    """Pushes the engine's image `tag` to `reference`, whose tag gets the architecture as its end.

    A registry keeps what has a tag: titan:stable becomes titan:stable-arm64, and titan:stable stays as it is until
    `manifest_list`. It is said when a layer begins and when it is there.
    Raises LauncherError: no such image, no login, no answer.
    """
    import docker

    repository, list_tag = _parse(reference)
    arch = str(docker_engine.inspect(engine, tag)["Architecture"])
    arch_tag = f"{list_tag}-{arch}"
    target = f"{repository}:{arch_tag}"
    say(f"pushing {tag} to {target}")
    api = engine.client.api
    with asking(engine, f"the Docker engine did not push {tag}"):
        try:
            api.tag(tag, repository, arch_tag)
            error, digest = _follow(api.push(repository, arch_tag, stream=True, decode=True))
        except docker.errors.APIError as problem:
            error, digest = str(problem.explanation or problem), ""
    if error or not digest:
        raise _refused(target, error or "the engine named no digest")
    say(f"{target}: {digest}")
    return Pushed(arch, digest, target)


def manifest_list(reference: str, pushed: Sequence[Pushed], *, engine: Engine) -> str:
    """Makes `reference` the list of these images, by their digests, and returns the list's own digest."""
    repository, list_tag = _parse(reference)
    target = f"{repository}:{list_tag}"
    say(f"making {target} the list of {', '.join(sorted(image.arch for image in pushed))}")
    # Where engines speak plain HTTP without being told.
    insecure = ["--insecure"] if re.match(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?/", target) else []
    # `docker manifest` collects a list in the user's files: what an earlier attempt left must not get into it.
    docker_engine.command(engine, ["manifest", "rm", target])
    answer = ""
    for arguments in (
        ["create", *insecure, target, *(f"{repository}@{image.digest}" for image in pushed)],
        ["push", "--purge", *insecure, target],
    ):
        code, answer = docker_engine.command(engine, ["manifest", *arguments])
        if code:
            raise _refused(target, answer)
    digest = re.search(r"sha256:[0-9a-f]{64}", answer)
    if not digest:
        raise _refused(target, answer or "docker manifest push named no digest")
    say(f"{target}: {digest[0]}")
    return digest[0]


def _parse(reference: str) -> tuple[str, str]:
    """registry.example.com:5000/titan:stable -> its repository and its tag, `latest` where there is none."""
    from docker.utils import parse_repository_tag

    repository, tag = parse_repository_tag(reference)
    return repository, tag or "latest"


def _follow(answers: Any) -> tuple[str, str]:
    """The error and the digest in the stream of a push; a line for each layer that begins or ends."""
    error = digest = ""
    last: dict[str, str] = {}
    for answer in answers:
        error = str(answer.get("error") or error)
        digest = str((answer.get("aux") or {}).get("Digest") or digest)
        layer, status = str(answer.get("id", "")), str(answer.get("status", ""))
        if layer and status in ("Pushing", "Pushed", "Layer already exists") and last.get(layer) != status:
            size = (answer.get("progressDetail") or {}).get("total")
            say(f"{layer} {status}" + (f" {size / 1e6:,.0f} MB" if size and status == "Pushing" else ""))
            last[layer] = status
    return error, digest


def _refused(reference: str, text: str) -> LauncherError:
    """In the words of Docker, which are clear; with what to do."""
    from docker.auth import resolve_repository_name

    host = str(resolve_repository_name(reference.rpartition(":")[0])[0])
    if re.search(_DENIED, text, re.IGNORECASE):
        fix = "docker login" if host == "docker.io" else quoted("docker", "login", host)
    else:
        fix = f"read its words below; does it answer? curl --head https://{host}/v2/"
    return LauncherError(
        "push-failed", f"the registry {host} did not accept {reference}", fix, status=ExitStatus.ERROR, original=text
    )
