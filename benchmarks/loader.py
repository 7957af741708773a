"""Documents per CPU second of one rank, by data-parallel degree, with and without a view of the data.

    PYTHONPATH=. PYTHON_WITH_TORCHTITAN benchmarks/loader.py

Reads with torchtitan's own dataset class and the real `datasets`, from 1,024 hard links to one generated file in C4's
form. Tokenizing is left out: it costs the same in every row. Prints a Markdown table; exits with 1 when the rows with
a view that divides are not within 15% of degree 1. Seconds are of the CPU, so another process on the machine does not
count much; each number is the median of ROUNDS, taken in turn, so that a slow minute does not hit one row alone.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before `datasets` is imported

from launcher import sample
from launcher.stage.view import choose, write

DEGREES = (1, 4, 16, 36, 64, 68, 72, 512, 1856)
FILES = 1024
DOCUMENTS = 4000  # in a file, about 4 MB of JSON
ROUNDS = 9
FILES_READ = 2  # per measurement, whole ones: `datasets` parses a file in pieces, ahead of what it hands out
FLAT = 0.15


class Counting:
    """In the place of a tokenizer: three tokens a document, so that almost nothing but loading is measured."""

    def encode(self, text: str, **_ends: bool) -> list[int]:
        return [0, 1, 2]


def directory_of(place: Path) -> Path:
    """A directory in C4's form with FILES train files, all the same one."""
    sample.write_c4_sample(place / "one", train_files=1, documents_per_file=DOCUMENTS)
    source = place / "one" / "en" / sample.file_names("train", 1)[0]
    (place / "c4" / "en").mkdir(parents=True)
    (place / "c4" / "README.md").write_text((place / "one" / "README.md").read_text())
    for split, files in (("train", FILES), ("validation", 1)):
        for name in sample.file_names(split, files):
            os.link(source, place / "c4" / "en" / name)
    return place / "c4"


def view_of(data: Path, place: Path, degree: int) -> tuple[Path, int]:
    """A view as `launcher submit` makes it, and the number of its train files."""
    names = choose(sample.file_names("train", FILES), degree)
    folder = place / f"view-{degree}"
    write(folder, {name: os.path.relpath(data / "en" / name, folder / "en") for name in names})
    return folder, len(names)


def documents_per_second(path: Path, files: int, degree: int) -> float:
    """Kept by one rank, per CPU second, after its first file."""
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

    tokenizer: Any = (
        Counting()
    )  # three tokens are one sequence of length 2 in both eras: one `next`, one document
    dataset = HuggingFaceTextDataset("c4", str(path), tokenizer, 2, degree // 2, degree, infinite=True)
    documents = iter(dataset)
    own_files = files % degree == 0
    a_file = DOCUMENTS if own_files else max(DOCUMENTS // degree, 1)
    count = a_file * FILES_READ
    for _ in range(a_file):
        next(documents)
    began = time.process_time()
    for _ in range(count):
        next(documents)
    return count / (time.process_time() - began)


def main() -> int:
    logging.disable(logging.WARNING)
    measured: dict[tuple[int, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = directory_of(Path(folder))
        views = {degree: view_of(data, Path(folder), degree) for degree in DEGREES}
        for _ in range(ROUNDS):
            for degree in DEGREES:
                for with_view, (path, files) in ((False, (data, FILES)), (True, views[degree])):
                    rate = documents_per_second(path, files, degree)
                    measured.setdefault((degree, with_view), []).append(rate)
    found = {row: statistics.median(rates) for row, rates in measured.items()}
    print("| data-parallel degree | without a view, documents per CPU second | files in the view | with it |")
    print("|---:|---:|---:|---:|")
    for degree in DEGREES:
        files = views[degree][1]
        note = "" if files % degree == 0 else " (fewer files than ranks)"
        print(f"| {degree:,} | {found[degree, False]:,.0f} | {files:,}{note} | {found[degree, True]:,.0f} |")
    even = [found[degree, True] for degree in DEGREES if views[degree][1] % degree == 0]
    worst = max(abs(rate / even[0] - 1) for rate in even)
    print(f"\nWith a view that divides: at most {worst:.0%} from degree 1 (target: {FLAT:.0%}).")
    return worst > FLAT


if __name__ == "__main__":
    sys.exit(main())
