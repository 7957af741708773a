"""What a squashfs format costs and brings, as ratios on one tree in one run; prints a Markdown table.

    python benchmarks/squashfs.py --tree .venv/lib/python3.11/site-packages

Compares the launcher's conversion of an exported image with the steps of `enroot import dockerd://`: unpack the
export, mksquashfs with enroot's default options, remove the tree. Limits that the project sets itself: a quarter of
its CPU, half its size, and an `import torch` from cold caches within 15% of the best format. As root, and with
squashfuse installed, the import is timed through the kernel's squashfs and through squashfuse; otherwise those
columns stay empty. Needs torch in the tree and room for six times its size in --work.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from launcher.image.convert import convert
from launcher.image.export import ImageConfig
from launcher.image.squashfs_tools import FORMATS, SquashfsFormat

ENROOT = "enroot (lzo -noD 128K)"
# Its default of ENROOT_SQUASH_OPTIONS; what surrounds it in `measure` is what `enroot import dockerd://` does.
ENROOT_OPTIONS = "-comp lzo -noD -exit-on-error"
CANDIDATES = {
    "lz4 128K": SquashfsFormat("lz4", 128),
    "zstd-1 128K": SquashfsFormat("zstd", 128, 1),
    "zstd-3 64K": SquashfsFormat("zstd", 64, 3),
    "zstd-3 128K": SquashfsFormat("zstd", 128, 3),
    "zstd-3 256K": SquashfsFormat("zstd", 256, 3),
    "zstd-3 1M": SquashfsFormat("zstd", 1024, 3),
    "gzip 128K": SquashfsFormat("gzip", 128),
}
SLOW = ("gzip 128K",)  # minutes of CPU
PACKAGES = f"usr/local/lib/python3.{sys.version_info[1]}/site-packages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tree", type=Path, help="a directory of installed packages, torch among them")
    parser.add_argument("--work", type=Path, help="where the trial files go (default: a temporary directory)")
    parser.add_argument("--runs", type=int, default=3, help="imports of each kind; the best one counts")
    parser.add_argument("--conversions", type=int, default=1, help="of each kind; the best one counts")
    parser.add_argument("--formats", nargs="*", default=[n for n in CANDIDATES if n not in SLOW], choices=CANDIDATES)
    parser.add_argument("--convert", nargs=3, metavar=("FORMAT", "TAR", "SQSH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert_one(*options.convert)
        return
    tree = options.tree or Path(sys.prefix) / "lib" / Path(PACKAGES).parent.name / "site-packages"
    if not (tree / "torch").is_dir():
        parser.error(f"no torch in {tree}: name a tree with --tree")
    with tempfile.TemporaryDirectory(prefix="squashfs-", dir=options.work) as folder:
        measure(tree.resolve(), Path(folder), options.formats, options.runs, options.conversions)


def convert_one(name: str, tar: str, output: str) -> None:
    """In a process of its own, so that its CPU time can be told from the benchmark's."""

    def chunks() -> Iterator[bytes]:
        with open(tar, "rb") as stream:
            while chunk := stream.read(1 << 16):
                yield chunk

    convert(chunks(), ImageConfig("amd64", cmd=("sh",)), Path(output), fmt=CANDIDATES[name])


def measure(tree: Path, folder: Path, formats: list[str], runs: int, conversions: int) -> None:
    tar, root = folder / "export.tar", folder / "root"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:  # what Docker writes
        archive.add(os.path.realpath("/bin/sh"), "bin/sh", filter=whole_seconds)
        archive.add(tree, PACKAGES, filter=whole_seconds)
    size = tar.stat().st_size

    def sqsh(name: str) -> Path:
        return folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.sqsh"

    commands = {name: [sys.executable, __file__, "--convert", name, str(tar), str(sqsh(name))] for name in formats}
    root_, tar_, out = (shlex.quote(str(path)) for path in (root, tar, sqsh(ENROOT)))
    unpacked = f"mkdir {root_}; tar -xpf {tar_} -C {root_}"
    squash = f"mksquashfs {root_} {out} -all-root {ENROOT_OPTIONS} -noappend -quiet -no-progress"
    commands[ENROOT] = ["sh", "-ec", f"{unpacked}; {squash}; rm -rf {root_}"]
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(conversions):
        for name, command in commands.items():
            subprocess.run(["cat", str(tar)], stdout=subprocess.DEVNULL, check=True)  # into the page cache
            cpu[name].append(cpu_seconds(command))
            print(f"{name}: {cpu[name][-1]:.1f} s of CPU", file=sys.stderr)
    subprocess.run(["sh", "-ec", unpacked], check=True)
    tar.unlink()

    kernel, fuse, unpacking = Times(), Times(), Times()
    plain = "unpacked tree"
    for _ in range(runs):  # in turn, so that a machine whose speed drifts treats all alike
        for name in (plain, *commands):
            path = root if name == plain else sqsh(name)
            if os.geteuid() == 0:
                imports(
                    name,
                    path,
                    None if name == plain else ["mount", "-t", "squashfs", "-o", "loop,ro"],
                    kernel,
                )
            if os.geteuid() == 0 and name != plain and shutil.which("squashfuse"):
                imports(name, path, ["squashfuse"], fuse)
            if name != plain:
                unpacking.setdefault((name, ""), []).append(unpack(path))

    base_cpu, base_size = min(cpu[ENROOT]), sqsh(ENROOT).stat().st_size
    print(
        f"{size / 1e6:,.0f} MB. The best of {conversions} conversions and {runs} imports, seconds; in brackets: "
        "to the best\n"
    )
    print("| format | MB | of enroot's | CPU s | of enroot's | kernel cold | warm | squashfuse cold | warm | unpack |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in (plain, *commands):
        cells = [f"**{name}**" if CANDIDATES.get(name) == FORMATS["unpack"] else name]
        if name == plain:
            cells += [f"{size / 1e6:,.0f}", "", "", ""]
        else:
            seconds, bytes_ = min(cpu[name]), sqsh(name).stat().st_size
            cells += [
                f"{bytes_ / 1e6:,.0f}",
                f"{bytes_ / base_size:.2f}",
                f"{seconds:.1f}",
                f"{seconds / base_cpu:.2f}",
            ]
        columns = [(kernel, "cold"), (kernel, "warm"), (fuse, "cold"), (fuse, "warm"), (unpacking, "")]
        cells += [best(times, name, kind) for times, kind in columns]
        print(f"| {' | '.join(cells)} |")


Times = dict[tuple[str, str], list[float]]


def best(times: Times, name: str, kind: str) -> str:
    """Whatever else runs on the machine only ever makes a time longer. With its ratio to the best of all formats."""
    values = {key[0]: min(found) for key, found in times.items() if key[1] == kind}
    if name not in values:
        return ""
    least = min(value for key, value in values.items() if key in CANDIDATES)
    return f"{values[name]:.2f} ({values[name] / least:.2f})"


def whole_seconds(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """As in an engine's export; and no hard links, which `cp -al` made."""
    info.mtime = int(info.mtime)
    return info


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and of its children."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {status}")
    return usage.ru_utime + usage.ru_stime


def imports(name: str, path: Path, mount: list[str] | None, times: Times) -> None:
    """`import torch` twice, first with cold caches: squashfuse's own go with its process."""
    drop_caches()
    with mounted(path, mount) as where:
        for kind in ("cold", "warm"):
            times.setdefault((name, kind), []).append(import_seconds(where))


@contextmanager
def mounted(path: Path, mount: list[str] | None) -> Iterator[Path]:
    if mount is None:
        yield path
        return
    where = path.parent / "mnt"
    where.mkdir(exist_ok=True)
    subprocess.run([*mount, str(path), str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def import_seconds(root: Path) -> float:
    """The host's Python, warmed up, with nothing but the tree's packages."""
    python = getattr(sys, "_base_executable", sys.executable)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(root / PACKAGES),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run([python, "-S", "-c", "import json"], check=True, env=environment)
    begin = time.perf_counter()
    subprocess.run([python, "-c", "import torch"], check=True, env=environment, cwd="/")
    return time.perf_counter() - begin


def unpack(path: Path) -> float:
    target = path.parent / "unpacked"
    os.sync()
    command = ["unsquashfs", "-quiet", "-no-progress", "-d", str(target), str(path)]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
