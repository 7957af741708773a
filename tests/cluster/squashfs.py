"""A squashfs image for the tests: a small Debian without torch, for jobs that train nothing.

Built once and kept in a cache directory under a name that says what is in it, so that the second
test run starts at once. Needs root, mmdebstrap, squashfs-tools and a Debian mirror.
"""

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

SUITE = "bookworm"
PACKAGES = ("python3", "ca-certificates")
ENVIRONMENT = "PATH=/usr/local/bin:/usr/bin:/bin\nLANG=C.UTF-8\nTEST_IMAGE=from the image\n"
"""The image's /etc/environment. A variable named here wins over the job's, as with a real image."""

COMPRESSION = ("-comp", "zstd", "-Xcompression-level", "3", "-b", "128K")
NOT_NEEDED = (  # below the root of the image; device nodes would break unprivileged users
    *("dev/*", "proc/*", "sys/*", "tmp/*", "run/*", "var/cache/*", "var/lib/apt/lists/*", "var/log/*"),
    *("usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*"),
)


def missing_image_packages() -> list[str]:
    """Debian packages without which no image can be built."""
    tools = {"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools", "unshare": "util-linux"}
    return [package for tool, package in tools.items() if not shutil.which(tool)]


def build_small_image(cache: Path, environment: str = ENVIRONMENT) -> Path:
    """Debian with sh, the core utilities and Python: 56 MB, and 45 s if it is not in the cache.

    `environment` becomes the image's /etc/environment.
    """

    def build(image: Path, scratch: Path) -> None:
        rootfs = scratch / "rootfs"
        packages = f"--include={','.join(PACKAGES)}"
        _run("mmdebstrap", "--mode=root", "--variant=minbase", packages, SUITE, rootfs)
        (rootfs / "etc" / "environment").write_text(environment)
        _run(
            "mksquashfs",
            rootfs,
            image,
            *COMPRESSION,
            "-quiet",
            "-no-progress",
            "-wildcards",
            "-e",
            *NOT_NEEDED,
        )

    key = _key([SUITE, environment, *PACKAGES, *COMPRESSION, *NOT_NEEDED])
    return _cached(cache, f"small-{SUITE}-{key}.sqsh", build)


def _cached(cache: Path, name: str, build: Callable[[Path, Path], None]) -> Path:
    """The image of that name in the cache; built, once, if it is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / name
    with (cache / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.exists():
            scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=cache))
            try:
                build(scratch / name, scratch)
                (scratch / name).rename(image)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return image


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def _run(*command: str | Path) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{words[0]} failed with code {done.returncode} while building a test image:\n{last}")
