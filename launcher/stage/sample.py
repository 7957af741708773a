"""A small C4 and a small tokenizer, so that a run needs neither the network nor a licence. Standard library only."""

from __future__ import annotations

import gzip
import io
import json
import random
from functools import cache
from pathlib import Path

from launcher.base.files import write_bytes

TRAIN_FILES = 4
SPLITS = (("train", TRAIN_FILES), ("validation", 1))
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # Llama 3's names

README = """\
---
license: odc-by
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---

# A sample in the form of C4

Written by the launcher: sentences from a small grammar, in the layout and with the fields of allenai/c4's `en`.
"""

# A line for each kind of word.
_GRAMMAR = """\
the engineer, a student, the captain, my neighbour, the old gardener, a young doctor, the operator, our teacher, \
the driver, a painter
the machine, a small boat, the long report, an empty house, the garden, a red lamp, the broken clock, a heavy \
door, the map, a warm coat, the bridge, a quiet room
repaired, found, painted, described, measured, sold, opened, carried, watched, remembered
near the river, at the station, in the village, behind the hill, on the coast, under the roof, beside the road, \
in the north
in the morning, last winter, after the rain, every Sunday, before noon, that evening, two years ago, at the end \
of May
because the weather was good, since nobody else wanted to, although it was late, so that everyone could see it, \
while the others were asleep, as the letter had asked
"""
_PEOPLE, _THINGS, _ACTIONS, _PLACES, _TIMES, _REASONS = (line.split(", ") for line in _GRAMMAR.splitlines())
_OPENINGS = ("However,", "Later,", "In the end,", "For that reason,", "At first,", "Of course,")
_SITES = ("example.com", "example.org", "example.net")


def write_c4_sample(
    directory: Path, train_files: int = TRAIN_FILES, documents_per_file: int = 200, seed: int = 1
) -> None:
    """Writes README.md, `en/c4-train.*.json.gz` (`train_files` of them) and one validation file below `directory`.

    The same arguments give the same bytes. Each file is written under a temporary name and renamed.
    """
    (directory / "en").mkdir(parents=True, exist_ok=True)
    for split, files in (("train", train_files), ("validation", 1)):
        for index, name in enumerate(file_names(split, files)):
            write_bytes(directory / "en" / name, _shard(f"{seed} {split} {index}", documents_per_file))
    write_bytes(directory / "README.md", README.encode())


def file_names(split: str, files: int) -> list[str]:
    """C4's names of the files of a split that has so many."""
    return [f"c4-{split}.{index:05d}-of-{files:05d}.json.gz" for index in range(files)]


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level tokenizer of 258 entries: every byte, beginning and end of text. No merges."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in _tokenizer_files().items():
        write_bytes(directory / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@cache  # a sweep writes it for each of its runs
def _shard(seed: str, documents: int) -> bytes:
    rng, lines = random.Random(seed), []
    for _ in range(documents):
        day = f"2019-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:00:00Z"
        url = f"https://{rng.choice(_SITES)}/{rng.randint(1000, 9999)}"
        lines.append(json.dumps({"text": _document(rng), "timestamp": day, "url": url}) + "\n")
    packed = io.BytesIO()
    # Without a time and a name in its header, a file depends on its content alone.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:
        stream.write("".join(lines).encode())
    return packed.getvalue()


def _document(rng: random.Random) -> str:
    """Two to five paragraphs about one person and one thing: repetition is what a model learns first."""
    person, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
    paragraphs = []
    for _ in range(rng.randint(2, 5)):
        sentences = [_sentence(rng, person, thing) for _ in range(rng.randint(3, 6))]
        paragraphs.append(" ".join(sentences))
    return "\n".join(paragraphs)


def _sentence(rng: random.Random, person: str, thing: str) -> str:
    words = [rng.choice(_OPENINGS)] if rng.random() < 0.25 else []
    words += [person, rng.choice(_ACTIONS), thing if rng.random() < 0.6 else rng.choice(_THINGS)]
    words += [rng.choice(_PLACES)] if rng.random() < 0.5 else []
    words += [rng.choice(_TIMES if rng.random() < 0.6 else _REASONS)]
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, in the order of the bytes.

    Visible Latin-1 characters stand for themselves, the others take the code points from 256 on (GPT-2's table).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, next_free = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in visible else next_free))
        next_free += byte not in visible
    return characters


def _tokenizer_files() -> dict[str, object]:
    vocabulary = {character: index for index, character in enumerate(_byte_characters())}
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {256: {"content": BEGIN, **special}, 257: {"content": END, **special}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": index, **token} for index, token in added.items()],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(index): token for index, token in added.items()},
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": BEGIN, "eos_token": END},
    }
