"""Runs torchtitan's Llama-3 training on Slurm clusters: see README.md."""

from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def version() -> str:
    """The tag that this was built from. Modules that most commands do without are imported where it is asked for."""
    import subprocess
    from importlib import metadata

    checkout = Path(__file__).parents[1]
    if (checkout / ".git").exists():  # an editable install's metadata is as old as the install
        with suppress(OSError, subprocess.CalledProcessError):
            ask = ("git", "describe", "--tags", "--match=v*")
            tag = subprocess.check_output(ask, cwd=checkout, stderr=subprocess.DEVNULL, text=True)
            return tag.strip().removeprefix("v")
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("titan-launcher")
    return "unknown"
