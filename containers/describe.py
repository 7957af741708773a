"""Writes /etc/titan-image.json: what is in this image. Runs once, in the last step of the Dockerfile.

Standard library only. What is not installed is null; nothing is guessed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

LOCK = Path("/usr/local/share/titan/lock.txt")
DESCRIPTION = Path("/etc/titan-image.json")

# The oldest driver branch that runs a CUDA major version (CUDA Toolkit release notes, table of driver versions).
DRIVER_MIN = {"12": "525", "13": "580"}

# A process of its own: torch writes caches, and may not be there at all.
ASK_TORCH = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "sm": torch.cuda.get_arch_list()}))
"""


# A GPU that is not there: with one, torchao defines its Triton kernels, and a triton that they are not made for fails.
GPU = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (10, 0)
"""
# What training needs, by the words of recipe.quantize: each is imported, since releases of torchtitan, torchao and
# triton that do not go together fail there.
NEEDED = {
    "none": """
import importlib.metadata
if not importlib.metadata.version("torchtitan").startswith("0.2."):
    import torchtitan.models.llama3.config_registry
""",
    "float8": "from torchao.float8 import Float8LinearConfig; import torchtitan.components.quantization.float8",
    "mxfp8": """
import importlib.metadata, triton
if importlib.metadata.version("torchtitan").startswith("0.2."):
    from torchao.prototype.mx_formats.config import MXFP8Dim1CastKernelChoice, MXLinearConfig
else:
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchtitan.components.quantization.mx import MXFP8Linear
    assert MXFP8Linear is not None
""",
    "nvfp4": """
from torchtitan.components.quantization.nvfp4 import NVFP4Linear
assert NVFP4Linear is not None
""",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("channel", "source-revision", "sbom", "created"):
        parser.add_argument(f"--{option}", default="")
    arguments = parser.parse_args()
    architecture = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True)
    torch = ask_torch()
    cuda = torch["cuda"]
    description = {
        "schema": 1,
        "channel": arguments.channel,
        "arch": architecture.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch["version"],
            "cuda": cuda,
            "nccl": installed("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
            "torchtitan": installed("torchtitan", "torchtitan-nightly"),
            "triton": installed("triton", "pytorch-triton"),
            "torchao": installed("torchao"),
        },
        "quantization": quantization(torch),
        "driver_min": DRIVER_MIN.get(cuda.split(".")[0]) if cuda else None,
        "sm": torch["sm"],
        "source_revision": arguments.source_revision,
        "lock_sha256": hashlib.sha256(LOCK.read_bytes()).hexdigest(),
        "sbom": arguments.sbom,
        "created": arguments.created,
    }
    DESCRIPTION.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    DESCRIPTION.chmod(0o644)
    print(DESCRIPTION.read_text(encoding="utf-8"))


def installed(*names: str) -> "str | None":
    """The version of the first of these packages that is there."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def quantization(torch: "dict[str, object]") -> "list[str]":
    """The quantizations whose parts go together here."""
    found = []
    for name, program in NEEDED.items():
        with_gpu = GPU if torch["cuda"] else ""
        done = subprocess.run([sys.executable, "-B", "-c", with_gpu + program], capture_output=True, text=True)
        if done.returncode == 0:
            found.append(name)
        else:
            print(f"cannot do {name}: {done.stderr.strip()[-300:]}")
    return found


def ask_torch() -> "dict[str, object]":
    """torch's own words. An image whose torch cannot be imported must not be built."""
    if installed("torch") is None:
        return {"version": None, "cuda": None, "sm": []}
    asked = subprocess.run([sys.executable, "-B", "-c", ASK_TORCH], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"torch is installed but cannot be imported:\n{asked.stderr.strip()}")
    return json.loads(asked.stdout)


if __name__ == "__main__":
    main()
