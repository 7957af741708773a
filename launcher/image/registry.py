"""`launcher image build --push`: the image of each architecture into a registry, then one manifest list for all of
them.

The engine pushes, through docker-py. docker-py knows nothing of manifest lists: they are made by `docker manifest`,
which is in every docker command, needs neither buildx nor a running engine, and does its own logging in.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine

TIMEOUT_S = 300  # of a docker command that moves a few kB

# What an engine or the docker command says -> what it means and what to do. The first that matches is reported.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"denied|unauthorized|authentication required|no basic auth credentials|40[13] (?:Unauthorized|Forbidden)",
        "the registry {host} does not let this user write {reference}",
        "{login}",
    ),
    (
        r"server gave HTTP response to HTTPS client",
        "the registry {host} speaks plain HTTP, which the engine uses on the loopback interface only",
        'TLS for the registry, or {{"insecure-registries": ["{host}"]}} in the engine\'s /etc/docker/daemon.json',
    ),
    (
        r"connection refused|no such host|i/o timeout|no route to host|Temporary failure in name resolution|"
        r"network is unreachable|Client\.Timeout|request canceled while waiting|server misbehaving|TLS handshake "
        r"timeout",
        "the registry {host} does not answer",
        "check the name and the port in {reference}; does the registry run? curl --head http://{host}/v2/",
    ),
    (
        r"x509|certificate",
        "the certificate of the registry {host} is not trusted",
        "its authority's certificate as /etc/docker/certs.d/{host}/ca.crt",
    ),
    (
        r"no such manifest|manifest unknown|not found",
        # `docker manifest` says the same where this user may not read.
        "an image of the list {reference} is not in the registry {host}, or not for this user",
        "push it again: launcher image build CHANNEL --arch all --push {reference}; or: {login}",
    ),
)


@dataclass(frozen=True)
class Pushed:
    """The image of one architecture, as the registry has it."""

    arch: str  # Docker's word
    digest: str  # of its manifest, sha256:…
    reference: str  # registry.example.com/titan:stable-arm64


def check_push(reference: str) -> None:
    """Raises LauncherError for what would stop a push after minutes of building: a wrong name, no docker command."""
    _parse(reference)
    if not shutil.which("docker"):
        raise _no_docker()


def push(tag: str, reference: str, *, engine: Engine, say: Callable[[str], None]) -> Pushed:
    """Pushes the engine's image `tag` to `reference`, whose tag gets the architecture as its end.

    A registry keeps what has a tag: titan:stable becomes titan:stable-arm64, and titan:stable stays as it is until
    `manifest_list`. `say` gets a line when a layer begins and when it is there.
    Raises LauncherError: no such image, no login, no answer, a wrong name.
    """
    import docker
    import requests

    repository, list_tag = _parse(reference)
    arch = str(docker_engine.inspect(engine, tag)["Architecture"])
    target = f"{repository}:{list_tag}-{arch}"
    say(f"pushing {tag} to {target}")
    api = engine.client.api
    try:
        api.tag(tag, repository, f"{list_tag}-{arch}")
        error, digest = _follow(api.push(repository, f"{list_tag}-{arch}", stream=True, decode=True), say)
    except docker.errors.APIError as problem:
        error, digest = str(problem.explanation or problem), ""
    except (docker.errors.DockerException, requests.exceptions.RequestException) as problem:
        error, digest = f"the Docker engine stopped answering: {problem}", ""
    if error or not digest:
        raise _explain(error or "the engine named no digest", target)
    say(f"{target}: {digest}")
    return Pushed(arch, digest, target)


def manifest_list(
    reference: str, pushed: Sequence[Pushed], *, arches: Sequence[str], engine: Engine, say: Callable[[str], None]
) -> str:
    """Makes `reference` the list of these images, by their digests, and returns the list's own digest.

    Raises LauncherError, before anything is written, unless there is exactly one image for each of `arches`.
    """
    repository, list_tag = _parse(reference)
    found = sorted(image.arch for image in pushed)
    if found != sorted(set(arches)):
        missing = sorted(set(arches) - set(found))
        raise LauncherError(
            f"no list {reference}: "
            + (f"there is no image for {', '.join(missing)}" if missing else f"images for {', '.join(found)}"),
            f"build and push one image for each of {', '.join(sorted(set(arches)))}",
        )
    target = f"{repository}:{list_tag}"
    say(f"making {target} the list of {', '.join(found)}")
    insecure = ["--insecure"] if _is_loopback(_host(repository)) else []
    with tempfile.TemporaryDirectory(prefix="titan-manifest-") as folder:
        # `docker manifest` collects a list in this directory; what an earlier attempt left must not get into it.
        config = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
        (Path(folder) / "config.json").symlink_to(config.absolute())
        environment = os.environ | {
            "DOCKER_CONFIG": folder,
            "DOCKER_HOST": engine.host,
            "DOCKER_CLI_EXPERIMENTAL": "enabled",
        }
        images = [f"{repository}@{image.digest}" for image in pushed]
        _docker(["manifest", "create", *insecure, target, *images], target, environment)
        answer = _docker(["manifest", "push", *insecure, target], target, environment)
    digest = re.search(r"sha256:[0-9a-f]{64}", answer)
    if not digest:
        raise _explain(answer or "docker manifest push named no digest", target)
    say(f"{target}: {digest[0]}")
    return digest[0]


def _parse(reference: str) -> tuple[str, str]:
    """registry.example.com:5000/titan:stable -> its repository and its tag, `latest` where there is none."""
    from docker.utils import parse_repository_tag

    repository, tag = parse_repository_tag(reference)
    wrong = (
        "://" in reference
        or "@" in reference
        or reference[-1:] in ("", ":")
        or not re.fullmatch(r"[\w.-]{1,122}", tag or "latest")
    )
    if wrong or not re.fullmatch(r"\w[\w.-]*(?::\d+)?(?:/[a-z0-9._-]+)+|[a-z0-9][a-z0-9._-]*", repository):
        raise LauncherError(
            f"{reference}: not the name of an image in a registry",
            "registry.example.com/team/titan:stable, in small letters, without https:// and without a digest",
            status=ExitStatus.USAGE,
        )
    return repository, tag or "latest"


def _host(repository: str) -> str:
    """The registry's address in the name of an image; docker.io where none is named."""
    from docker.auth import resolve_repository_name

    return str(resolve_repository_name(repository)[0])


def _is_loopback(host: str) -> bool:
    """Where engines speak plain HTTP without being told."""
    name = host.rsplit(":", 1)[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _follow(answers: Any, say: Callable[[str], None]) -> tuple[str, str]:
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


def _docker(arguments: list[str], reference: str, environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            env=environment,
        )
    except FileNotFoundError:
        raise _no_docker() from None
    except subprocess.TimeoutExpired:
        raise _explain(f"i/o timeout: no answer within {TIMEOUT_S} s", reference) from None
    if done.returncode:
        raise _explain(done.stderr or done.stdout, reference)
    return done.stdout


def _no_docker() -> LauncherError:
    return LauncherError(
        "docker: no such command; a manifest list is made by it",
        "sudo apt-get install docker-cli    # or docker.io, docker-ce-cli",
        status=ExitStatus.ERROR,
    )


def _explain(text: str, reference: str) -> LauncherError:
    host = _host(reference.rsplit(":", 1)[0])
    login = "docker login" if host == "docker.io" else quoted("docker", "login", host)
    for pattern, what, fix in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            values = {"host": host, "reference": reference, "login": login}
            return LauncherError(what.format(**values), fix.format(**values), status=ExitStatus.ERROR, original=text)
    return LauncherError(
        f"the registry {host} did not take {reference}",
        "read its words below",
        status=ExitStatus.ERROR,
        original=text,
    )
