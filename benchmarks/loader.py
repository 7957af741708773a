"""Documents per CPU second of one rank, by data-parallel degree, with and without a view of the data.

    PYTHONPATH=. PYTHON_WITH_TORCHTITAN benchmarks/loader.py

Reads with torchtitan's own dataset class and the real `datasets`, from 1,024 hard links to one generated file in C4's
form. Tokenizing is left out: it costs the same in every row. Each measurement is one file long and follows one of the
baseline, degree 1 without a view, because the same work takes 20% more or less a minute later on a shared machine: the
table has medians of the quotients, times the baseline's median. Exits with 1 when a row with a view that divides is
not within 15% of the baseline.
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

from launcher.stage import sample
from launcher.stage.view import choose, write

DEGREES = (1, 4, 16, 36, 64, 68, 72, 512, 1856)
FILES = 1024
DOCUMENTS = 4000  # in a file, about 4 MB of JSON
ROUNDS = 11
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


class Reader:
    """One rank's documents, one file's worth at a time: `datasets` parses a file ahead of what it hands out."""

    def __init__(self, path: Path, files: int, degree: int) -> None:
        from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

        tokenizer: Any = Counting()  # three tokens are one sequence of length 2 in both eras: one `next`, one document
        dataset = HuggingFaceTextDataset("c4", str(path), tokenizer, 2, degree // 2, degree, infinite=True)
        self.documents = iter(dataset)
        self.count = DOCUMENTS if files % degree == 0 else max(DOCUMENTS // degree, 1)
        self.rate()

    def rate(self) -> float:
        """Documents kept per CPU second."""
        began = time.process_time()
        for _ in range(self.count):
            next(self.documents)
        return self.count / (time.process_time() - began)


def main() -> int:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        data = directory_of(Path(folder))
        views = {degree: view_of(data, Path(folder), degree) for degree in DEGREES}
        readers = {(degree, False): Reader(data, FILES, degree) for degree in DEGREES}
        readers |= {(degree, True): Reader(*views[degree], degree) for degree in DEGREES}
        base = Reader(data, FILES, 1)
        baseline: list[float] = []
        quotients: dict[tuple[int, bool], list[float]] = {row: [] for row in readers}
        for _ in range(ROUNDS):
            for row, reader in readers.items():
                baseline.append(base.rate())
                quotients[row].append(reader.rate() / baseline[-1])
    level = statistics.median(baseline)
    found = {row: statistics.median(values) for row, values in quotients.items()}
    print("| data-parallel degree | without a view, documents per CPU second | files in the view | with it |")
    print("|---:|---:|---:|---:|")
    for degree in DEGREES:
        files = views[degree][1]
        note = "" if files % degree == 0 else " (fewer files than ranks)"
        with_view, without = found[degree, True] * level, found[degree, False] * level
        print(f"| {degree:,} | {without:,.0f} | {files:,}{note} | {with_view:,.0f} |")
    worst = max(abs(found[degree, True] - 1) for degree in DEGREES if views[degree][1] % degree == 0)
    print(f"\nWith a view that divides: at most {worst:.0%} from degree 1 without one (target: {FLAT:.0%}).")
    return worst > FLAT


if __name__ == "__main__":
    sys.exit(main())
