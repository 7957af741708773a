"""Does this container have what training needs? Run inside it, on any machine, without a GPU or a network:

    python3 /usr/local/share/titan/check.py [--json]

One line per check, exit code 1 when one failed. Standard library, and what the image has. `launcher image check`
runs this file in an image or a squashfs; on a cluster it is in the image already.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARE = Path("/usr/local/share/titan")
DESCRIPTION = Path("/etc/titan-image.json")
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

# Llama 3 8B: what torchtitan itself counts, in both eras. A change of either makes results incomparable.
PARAMETERS = 8_030_261_248
SEQ_LEN = 8192
FLOPS_PER_TOKEN = 57_914_449_920

# Of these, root alone may read some; nothing that a job needs is among them.
CLOSED = ("/etc/shadow", "/etc/gshadow", "/etc/passwd-", "/etc/.pwd.lock", "/etc/security", "/root", "/var")

# The kernels that MXFP8 and NVFP4 cast with, compiled for sm_100a without a GPU; torchao defines them if it sees one.
# MXFP8: of torchao's own casts this is the one that runs on both architectures and in both eras of torchtitan.
KERNELS = """
import importlib, sys, torch, torch.utils._triton
torch.utils._triton.has_triton = torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: (10, 0)
torch.version.cuda = torch.version.cuda or "13.0"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

nvfp4 = "torchao.prototype.moe_training.nvfp4_training."
tile = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP_SIZE_N": 8, "NUM_SMS": 148, "NUM_STAGES": 2}
kernels = {
    "mxfp8": [
        (
            *("torchao.prototype.mx_formats.kernels", "to_mxfp8_dim1_kernel", "*bf16 *fp8e4nv *u8 i32 i32"),
            {"ROW_TILE_SIZE": 128, "COL_TILE_SIZE": 128, "INNER_BLOCK_SIZE": 32, "SCALING_MODE": "rceil"},
        )
    ],
    "nvfp4": [
        (
            *(nvfp4 + "hadamard_amax_triton", "_hadamard_amax_kernel", "*bf16 *bf16 *fp32 *fp32 i32 i32"),
            tile | {"BLOCK_N": 64},
        ),
        (
            *(nvfp4 + "quantize_2d_triton", "triton_quantize_2d_weight"),
            *("*bf16 *u8 *fp8e4nv *u8 *fp8e4nv *fp32 i32 i32", tile),
        ),
        (
            *(nvfp4 + "hadamard_quantize_row_col_triton", "_hadamard_quantize_row_col_kernel"),
            "*bf16 *bf16 *fp32 *fp32 *u8 *fp8e4nv *u8 *fp8e4nv *i64 *i64 *i64 *i64 i32 i32",
            tile | {"STOCHASTIC_ROUNDING": True},
        ),
    ],
}
for name in sys.argv[1:]:
    for module, function, types, known in kernels[name]:
        kernel = getattr(importlib.import_module(module), function)
        while not isinstance(kernel, triton.JITFunction):
            kernel = kernel.fn
        asked = [argument for argument in kernel.arg_names if argument not in known]
        signature = dict(zip(asked, types.split(), strict=True)) | dict.fromkeys(known, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=known)
        made = triton.compile(source, target=GPUTarget("cuda", 100, 32)).asm
        assert ".target sm_100a" in made["ptx"] and len(made["cubin"]) > 1000, function
"""

Context = dict[str, Any]


class Failed(Exception):
    """What was found instead of what should be there."""


class Skipped(Exception):
    """Why there is nothing to look at."""


# ----------------------------------------------------------------------------------------- the checks


def check_description(context: Context) -> str:
    """/etc/titan-image.json is there and is about this machine's architecture."""
    about = context["about"]
    if about.get("schema") != 1:
        raise Failed(f"{DESCRIPTION} is missing or of another schema")
    if ARCHITECTURES.get(about["arch"]) != platform.machine():
        raise Failed(f"{DESCRIPTION} says {about['arch']}, Python says {platform.machine()}")
    return f"channel {about['channel']}, {about['arch']}, source {about['source_revision'][:12] or 'unknown'}"


def check_torch(context: Context) -> str:
    """The CUDA that the channel promises, and no other."""
    import torch

    expected = context["channel"].get("cuda") if context["channel"] else torch.version.cuda
    if torch.version.cuda != expected:
        raise Failed(f"torch {torch.__version__} is built with CUDA {torch.version.cuda}, not {expected}")
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"


def check_blackwell(context: Context) -> str:
    """Kernels for GB200, GB300 and B200 are in torch."""
    import torch

    if torch.version.cuda is None:
        raise Skipped("torch without CUDA")
    targets = torch.cuda.get_arch_list()
    if not any(re.fullmatch(r"sm_100[af]?", target) for target in targets):
        raise Failed(f"no sm_100 among {' '.join(targets)}")
    return " ".join(targets)


def check_triton(context: Context) -> str:
    """triton can be imported and, with CUDA, finds an assembler that knows Blackwell."""
    import torch
    import triton

    if torch.version.cuda is None:
        return str(triton.__version__)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    ptxas = os.environ.get("TRITON_PTXAS_BLACKWELL_PATH") or str(bundled)
    said = output(ptxas, "--version")
    release = re.search(r"release ([\d.]+)", said)
    return f"{triton.__version__}, ptxas {release[1] if release else '?'} for sm_100 and later"


def check_quantization(context: Context) -> str:
    """The recipes for speed can run: the parts go together, and triton makes their kernels for Blackwell."""
    expected = context["channel"].get("quantization")
    if not expected:
        raise Skipped("this channel's image needs none")
    found = context["about"].get("quantization") or []
    if missing := [name for name in ("none", *expected) if name not in found]:
        raise Failed(f"{' and '.join(missing)} cannot be imported, only {' '.join(found) or 'nothing'}")
    output(sys.executable, "-B", "-c", KERNELS, *(name for name in expected if name != "float8"))
    return f"{' '.join(found)}: as far as a machine without a GPU can tell"


def check_nccl(context: Context) -> str:
    """Two NCCLs in one process hang or crash; without CUDA there is none."""
    import torch

    found = [path for path in context["files"] if re.match(r"libnccl\.so", path.rpartition("/")[2])]
    expected = 0 if torch.version.cuda is None else 1
    if len(found) != expected:
        raise Failed(f"{len(found)} instead of {expected}: {' '.join(found) or 'none'}")
    if not found:
        return "none, as torch has no CUDA"
    return f"{'.'.join(map(str, torch.cuda.nccl.version()))} in {found[0]}"


def check_lock(context: Context) -> str:
    """What is installed is what the lock says, neither more nor less."""
    path = SHARE / "lock.txt"
    if not path.is_file():
        raise Failed(f"there is no {path}")
    expected = pinned(path.read_text(encoding="utf-8"))
    # Debian's and Ubuntu's own packages are not ours.
    found = {
        normalized(item.metadata["Name"]): item.version
        for item in importlib.metadata.distributions(path=[entry for entry in sys.path if "/usr/local/" in entry])
    }
    different = [
        f"{name} {found.get(name, 'missing')} (lock: {expected.get(name, 'not in it')})"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if different:
        raise Failed(f"{len(different)} differ: {', '.join(different[:5])}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if context["about"].get("lock_sha256") != digest:
        raise Failed(f"{path} is not the lock that {DESCRIPTION} names")
    return f"{len(found)} packages, lock {digest[:12]}"


def check_environment(context: Context) -> str:
    """Without these enroot shows no GPU, no IMEX channel and no InfiniBand device, or a home brings another torch."""
    wrong = []
    for name in ("NVIDIA_VISIBLE_DEVICES", "MELLANOX_VISIBLE_DEVICES"):
        value = os.environ.get(name, "")
        if not value or (value == "void" and context["channel"].get("cuda")):
            wrong.append(f"{name}={value}")
    capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "").split(",")
    if not {"compute", "utility"} <= set(capabilities) and "all" not in capabilities:
        wrong.append(f"NVIDIA_DRIVER_CAPABILITIES={','.join(capabilities)}")
    if not os.environ.get("PYTHONNOUSERSITE"):
        wrong.append("PYTHONNOUSERSITE=")
    if wrong:
        raise Failed(" ".join(wrong))
    return f"NVIDIA_VISIBLE_DEVICES={os.environ['NVIDIA_VISIBLE_DEVICES']}"


def check_login_shell(context: Context) -> str:
    """enroot starts a login shell, and the distribution's /etc/profile resets PATH."""
    clean = {"HOME": "/", "PATH": os.environ.get("PATH", "")}
    found = output("/bin/sh", "-lc", "command -v python3; command -v torchrun || true", env=clean).split()
    if not any(path.endswith("/torchrun") for path in found):
        raise Failed(f"no torchrun in the PATH of a login shell, only {' '.join(found) or 'nothing'}")
    return " ".join(found)


def check_compiler(context: Context) -> str:
    """triton and inductor compile against Python's headers while a job runs."""
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "x.cpp"
        source.write_text("#include <Python.h>\nint main() { return PY_MAJOR_VERSION - 3; }\n", encoding="utf-8")
        for compiler in ("gcc", "g++"):
            output(compiler, f"-I{include}", "-c", str(source), "-o", f"{folder}/x.o")
    return f"gcc and g++ {output('gcc', '-dumpfullversion').strip()}, {include}"


def check_network_libraries(context: Context) -> str:
    """NCCL over InfiniBand, and the lspci that torchtitan calls."""
    for name in ("libibverbs.so.1", "librdmacm.so.1"):
        ctypes.CDLL(name)
    providers = list(Path("/etc/libibverbs.d").glob("mlx5*"))
    if not providers:
        raise Failed("no mlx5 provider in /etc/libibverbs.d")
    output("lspci", "--version")
    return "libibverbs with mlx5, librdmacm, lspci"


def check_files(context: Context) -> str:
    """Everybody may read what is there, and nobody becomes root by running it."""
    raised = [path for path, info in context["files"].items() if info.st_mode & (stat.S_ISUID | stat.S_ISGID)]
    closed = [
        path
        for path, info in context["files"].items()
        if not info.st_mode & stat.S_IROTH and not path.startswith(CLOSED)
    ]
    if raised or closed:
        raise Failed(
            f"setuid or setgid: {' '.join(raised[:5]) or 'none'}; for root only: {' '.join(closed[:5]) or 'none'}"
        )
    return f"{len(context['files'])} files, none setuid, none for root only"


def check_byte_code(context: Context) -> str:
    """Byte code that is compared by time is stale in a squashfs, and is compiled again at every start."""
    compiled = [
        path
        for path in context["files"]
        if path.endswith(".pyc") and path.startswith(("/usr/lib/python3", "/usr/local/lib/python3"))
    ]
    # Bit 0: by hash; bit 1: compare the hash with the source (PEP 552).
    wrong = [path for path in compiled if flags(path) != 1]
    if wrong or not compiled:
        raise Failed(f"{len(wrong)} of {len(compiled)} .pyc are compared with their source: {' '.join(wrong[:3])}")
    loaded = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    bare = [
        spec.origin
        for spec in loaded
        if spec is not None and spec.cached and str(spec.origin).startswith("/usr/") and not os.path.exists(spec.cached)
    ]
    if bare:
        raise Failed(f"{len(bare)} imported modules have none: {' '.join(sorted(bare)[:3])}")
    return f"{len(compiled)} .pyc, never compared with their source"


def check_model(context: Context) -> str:
    """torchtitan builds Llama 3 8B and counts what the published results count."""
    import torch

    version = importlib.metadata.version("torchtitan")
    if version.startswith("0.2."):
        from torchtitan.models.llama3 import llama3_args
        from torchtitan.models.llama3.model.model import Transformer

        settings = llama3_args["8B"]
        with torch.device("meta"):
            model = Transformer(settings)
    else:
        from torchtitan.models.llama3 import model_registry

        settings = model_registry("8B").model
        with torch.device("meta"):
            model = settings.build()
    parameters, flops = settings.get_nparams_and_flops(model, SEQ_LEN)
    if (parameters, flops) != (PARAMETERS, FLOPS_PER_TOKEN):
        raise Failed(
            f"torchtitan {version}: {parameters:,} parameters and {flops:,} FLOPs per token at {SEQ_LEN}, "
            f"not {PARAMETERS:,} and {FLOPS_PER_TOKEN:,}"
        )
    return f"torchtitan {version}, Llama 3 8B: {parameters:,} parameters, {flops:,} FLOPs per token"


def check_size(context: Context) -> str:
    """Every node reads or unpacks this."""
    inodes = {(info.st_dev, info.st_ino): info.st_size for info in context["files"].values()}
    size = sum(inodes.values()) / 1e9
    allowed = context["channel"].get("max_gb")
    if allowed is not None and size > allowed:
        raise Failed(f"{size:.2f} GB unpacked, more than the {allowed} GB of channels.toml")
    return f"{size:.2f} GB unpacked" + (f" of {allowed} GB" if allowed is not None else "")


CHECKS: dict[str, Callable[[Context], str]] = {
    "description": check_description,
    "torch": check_torch,
    "blackwell": check_blackwell,
    "triton": check_triton,
    "quantization": check_quantization,
    "nccl": check_nccl,
    "lock": check_lock,
    "environment": check_environment,
    "login shell": check_login_shell,
    "compiler": check_compiler,
    "network libraries": check_network_libraries,
    "model": check_model,
    "byte code": check_byte_code,  # after the imports
    "files": check_files,
    "size": check_size,
}


# ----------------------------------------------------------------------------------------- what they use


def pinned(text: str) -> dict[str, str]:
    """Name -> version of every package in a lock, whether it is pinned by version or by address."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            found[normalized(match[1])] = match[2]
        elif match := re.match(r"([A-Za-z0-9._-]+) @ \S*/[^/\s-]+-([^/\s-]+)-[^/\s]+\.whl", line):
            found[normalized(match[1])] = match[2].replace("%2B", "+")
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def flags(path: str) -> int:
    """The flags of a .pyc: bytes 4 to 7."""
    with open(path, "rb") as stream:
        return int.from_bytes(stream.read(8)[4:], "little")


def output(*command: str, env: dict[str, str] | None = None) -> str:
    """What a command prints. Failed with its own words where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{command[0]}: {error}") from error
    if done.returncode:
        raise Failed(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def files_of_image() -> Iterator[tuple[str, os.stat_result]]:
    """Every regular file of the image; not what is mounted into the container, and not /tmp."""
    device = os.lstat("/").st_dev
    for folder, subfolders, names in os.walk("/"):
        inside = []
        for name in subfolders:
            path = os.path.join(folder, name)
            if path in ("/tmp", "/proc", "/sys", "/dev", "/run") or os.path.islink(path):
                continue
            with contextlib.suppress(OSError):
                if os.lstat(path).st_dev == device:
                    inside.append(name)
        subfolders[:] = inside
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                info = os.lstat(path)
                if stat.S_ISREG(info.st_mode):
                    yield path, info


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_channel(name: str) -> dict[str, Any]:
    """What channels.toml, as it is in the image, says about this image's channel."""
    try:
        import tomllib

        with (SHARE / "channels.toml").open("rb") as stream:
            return dict(tomllib.load(stream)[name])
    except (ImportError, OSError, KeyError, ValueError):
        return {}


def look() -> list[dict[str, str]]:
    """All checks, each on its own: one that fails does not hide another."""
    about = read_json(DESCRIPTION)
    context: Context = {"about": about, "channel": read_channel(str(about.get("channel", "")))}
    context["files"] = dict(files_of_image())
    results = []
    for name, check in CHECKS.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):
                status, found = "ok", check(context)
        except Skipped as reason:
            status, found = "skipped", str(reason)
        except Failed as reason:
            status, found = "failed", str(reason)
        except Exception as error:  # what the image's own modules raise
            status, found = "failed", f"{type(error).__name__}: {error}"
        results.append({"name": name, "status": status, "found": found})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Does this container have what training needs?")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    results = look()
    if arguments.json:
        print(json.dumps({"schema": 1, "checks": results}))
    else:
        for result in results:
            print(f"{result['status']:8} {result['name']:18} {result['found']}")
    return 1 if any(result["status"] == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
