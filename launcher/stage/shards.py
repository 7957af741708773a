"""C4's `en` in numbers: its files, their names and sizes, and how many of them a run needs. Imports nothing heavy."""

from __future__ import annotations

import re

from launcher.titan import GZIP_MAGIC, LFS_POINTER

SHARD = re.compile(r"c4-(train|validation)\.(\d+)-of-(\d+)\.json\.gz")
IN_EN = re.compile(f"en/{SHARD.pattern}")
TRAIN_FILES = 1024

# From the data set's card on the Hub: download_size 326,778,635,540 bytes for 364,868,892 train and 364,608 validation
# documents. (Its prose says 305 GB and means GiB.) Train files alone are 0.999 of that: 319 MB each.
BYTES_IN_ALL = 326_778_635_540
TRAIN_BYTES = BYTES_IN_ALL * 364_868_892 // (364_868_892 + 364_608)
# 356,000 documents in a file, 480 tokens in a document (Llama 3's tokenizer), on average. Files differ by a percent.
TOKENS_PER_FILE = 356_000 * 480
TOKENS_PER_BYTE = TOKENS_PER_FILE * TRAIN_FILES / TRAIN_BYTES

SMALL = 1024  # bytes; Git LFS pointers are smaller, by their specification, so only such files are opened


def files_for(tokens: int, ranks: int, in_all: int) -> int:
    """The least number that has the tokens and is a multiple of the ranks; where C4 ends, the most that divides evenly.

    All of them, where there are more ranks than files.
    """
    rounded = ranks * max(-(-tokens // (TOKENS_PER_FILE * ranks)), 1)
    if rounded <= in_all:
        return rounded
    return in_all - in_all % ranks if ranks <= in_all else in_all


def wrong_start(head: bytes) -> str:
    """Why a file that begins so is no data; empty when it may be."""
    if not head:
        return "empty"
    if head == LFS_POINTER:
        return "a Git LFS pointer, not the data"
    return "" if head.startswith(GZIP_MAGIC) else "not a gzip file"
