"""What is in a squashfs image, without mounting it, without root, whatever its architecture and whoever made it.

The sidecar file answers at once; else /etc/titan-image.json inside; else what the files themselves give away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.values import parse_json
from launcher.config.hardware import hardware
from launcher.image import DOCKER
from launcher.image.channels import channels
from launcher.image.squashfs_file import (
    METADATA,
    ImageFacts,
    Superblock,
    described,
    elf_machine,
    follow,
    is_metadata,
    known,
    superblock,
)
from launcher.image.squashfs_tools import INSTALL, Tree

METADATA_BYTES = 1 << 20  # of /etc/titan-image.json, which has some 2 kB
HEAD = 4096  # bytes of a program that are read for its ELF header
PROGRAMS = ("bin/sh", "usr/bin/env", "bin/bash", "usr/bin/python3", "usr/local/bin/python3")
# The oldest driver branch that runs programs of a CUDA major version, by minor-version compatibility.
# Source: CUDA Toolkit release notes, table "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility"; containers/describe.py has it, too, for images that are made here.
DRIVERS = {"11": "450", "12": "525", "13": "580"}
# Distribution name -> key in `versions`; the CUDA 12 and 13 packages differ in their suffix.
DISTRIBUTIONS = {
    r"torch": "torch",
    r"torchtitan": "torchtitan",
    r"triton|pytorch_triton": "triton",
    r"torchao": "torchao",
    r"nvidia_nccl(_cu\d+)?": "nccl",
    r"nvidia_cuda_runtime(_cu\d+)?": "cuda",
}
_DIST_INFO = re.compile(r"^((?:.*/)?(?:site|dist)-packages)/([^/-]+)-([^/-]+)\.dist-info$")


def inspect(path: Path, *, required: bool = True) -> ImageFacts:
    """Facts about the image; raises LauncherError for a file that is no complete squashfs.

    `required=False` is for `submit`: where unsquashfs is not installed, it answers with what the
    superblock says instead of an error.
    """
    block = superblock(path)
    if facts := known(path, block):
        return facts
    try:
        tree = Tree(path)
    except LauncherError:
        if required:
            raise
        note = f"no tool here can look into it: {INSTALL}"
        return ImageFacts(str(path), "", "superblock", block.compressor, block.file_size, notes=(note,))
    if about := description(tree):
        return described(path, block, about, "image")
    return _guess(path, block, tree)


def embedded_metadata(path: Path) -> dict[str, Any] | None:
    """/etc/titan-image.json of the image, if it has one and something here can read it."""
    superblock(path)
    try:
        tree = Tree(path)
    except LauncherError:
        return None
    return description(tree)


def problems(
    facts: ImageFacts, profile_arch: str, profile_device: str, driver: str, quantize: str = "none"
) -> list[tuple[str, str]]:
    """(what, fix) for everything that would fail on the nodes; what is not known is not held against the image.

    `profile_arch` is uname's word, `profile_device` cuda or cpu, `driver` the nodes' NVIDIA driver
    such as 580.95.05, empty where it is not known; `quantize` is the recipe's.
    """
    found = []
    if facts.arch and profile_arch and facts.arch != profile_arch:
        # What the nodes are is not known here: the image may be the right one, and the profile wrong.
        build = f"launcher image build --arch {DOCKER.get(profile_arch, profile_arch)}"
        fitting = "|".join(name for name, gpu in hardware().items() if gpu.arch == facts.arch) or "NAME"
        what = f"the image is for {facts.arch}, the GPU profile for {profile_arch}"
        found.append((what, f"--gpu {fitting} where the nodes are {facts.arch} (launcher cluster show), else {build}"))
    if facts.source == "superblock":
        return found
    missing = [name for name in ("torch", "torchtitan") if not facts.versions.get(name)]
    if missing:
        found.append((f"no {' and no '.join(missing)} in the image", "launcher image build"))
    if profile_device != "cuda":
        return found
    if facts.versions.get("torch") and facts.versions.get("cuda", "unknown") is None:
        what = f"torch {facts.versions['torch']} in the image is built without CUDA"
        found.append((what, "launcher image build stable, or --gpu cpu"))
    if why := _cannot_quantize(facts, quantize):
        able = [name for name, ours in channels().items() if ours.cuda and quantize in ("none", *ours.quantization)]
        other = "" if quantize == "none" else "; or a recipe that does not quantize"
        found.append((why, f"launcher image build {'|'.join(able)}{other}"))
    if is_too_old(driver, facts):
        fix = "an image with an older CUDA, or a newer driver: nvidia-smi on a node; or NVIDIA's cuda-compat"
        found.append((f"{needed_driver(facts)}, the nodes have {driver}", fix))
    return found


def _cannot_quantize(facts: ImageFacts, quantize: str) -> str:
    """Why, or "". Of images that do not say what they can do, the releases that are known not to go together."""
    torchtitan, torchao = facts.versions.get("torchtitan") or "", facts.versions.get("torchao") or ""
    if facts.quantization:
        known = quantize in facts.quantization
        return "" if known else f"the image cannot do {quantize}, only {', '.join(facts.quantization)}"
    if quantize == "mxfp8" and torchtitan.startswith("0.2.") and torchao and _numbers(torchao) >= (0, 17):
        return f"torchtitan {torchtitan} needs torchao 0.16 for MXFP8, the image has {torchao}"
    return ""


def is_too_old(driver: str, facts: ImageFacts) -> bool:
    """By its own, this driver does not run the image's CUDA; NVIDIA's forward compatibility may make it."""
    return bool(driver and facts.driver_min) and _numbers(driver) < _numbers(facts.driver_min or "")


def needed_driver(facts: ImageFacts) -> str:
    """Which driver the image needs, in words; "" where that is not known."""
    cuda = facts.versions.get("cuda")
    who = f"CUDA {cuda} in the image" if cuda else "the image"
    return f"{who} needs driver {facts.driver_min}" if facts.driver_min else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version))


def description(tree: Tree) -> dict[str, Any] | None:
    """What an image says of itself in /etc/titan-image.json; None where this launcher does not understand it."""
    try:
        value = parse_json(tree.read(METADATA, METADATA_BYTES) or b"null")
    except ValueError:
        return None
    return value if isinstance(value, dict) and is_metadata(value) else None


def architecture(tree: Tree, names: set[str], links: Mapping[str, str]) -> str:
    """uname's word, from the header of a program; "" where there is none."""
    for program in PROGRAMS:
        real = follow(program, links)
        if real in names and (arch := elf_machine(tree.read(real, HEAD) or b"")):
            return arch
    return ""


def _guess(path: Path, block: Superblock, tree: Tree) -> ImageFacts:
    """An image that somebody else made."""
    names, links = tree.entries()
    versions, notes = _versions(tree, names)
    arch = architecture(tree, names, links)
    if not arch:
        notes.append("its architecture is unknown: no program to read it from")
    cuda = versions.get("cuda")
    return ImageFacts(
        str(path),
        arch,
        "guessed",
        block.compressor,
        block.file_size,
        versions=versions,
        driver_min=DRIVERS.get(cuda.split(".")[0]) if cuda else None,
        notes=tuple(notes),
    )


def _versions(tree: Tree, names: set[str]) -> tuple[dict[str, str | None], list[str]]:
    """From the names of *.dist-info directories; CUDA from torch's own word, which also knows a CPU build."""
    found: dict[str, dict[str, str | None]] = {}
    for name in names:
        if match := _DIST_INFO.match(name):
            folder, package, version = match.groups()
            for pattern, key in DISTRIBUTIONS.items():
                if re.fullmatch(pattern, re.sub(r"[-_.]+", "_", package.lower())):
                    found.setdefault(folder, {})[key] = version
    notes = []
    # The one that has the most of it; among equals a fixed one.
    order = sorted(found, key=lambda folder: ("torch" not in found[folder], -len(found[folder]), folder))
    versions = found[order[0]] if order else {}
    if more := [f"/{folder}" for folder in order[1:] if "torch" in found[folder]]:
        notes.append(f"torch is installed more than once; /{order[0]} was read, not {', '.join(more)}")
    if cuda := versions.get("cuda"):
        versions["cuda"] = ".".join(cuda.split(".")[:2])
    text = tree.read(f"{order[0]}/torch/version.py", 1 << 16) if order else None
    if said := re.search(rb"^cuda\b[^=\n]*=\s*(?:None|['\"](\d+\.\d+)[^'\"]*['\"])", text or b"", re.M):
        versions["cuda"] = said[1].decode() if said[1] else None
    source = sorted(name for name in names if name.endswith("/torchtitan/train.py"))
    if source and not versions.get("torchtitan"):
        versions["torchtitan"] = "unknown"
        notes.append(f"torchtitan is not installed, but its source is there: /{source[0]}")
    pythons = [re.search(r"python(3\.\d+)(?=/|$)", name) for name in [*order[:1], *sorted(names)]]
    if python := next((match[1] for match in pythons if match), None):
        versions["python"] = python
    return versions, notes
