"""Writes the tables of the known errors into docs/errors.md, from launcher/logs/known_errors.toml: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that isn't installed

from launcher.logs.known_errors import SMALLER, Known, known_errors

PAGE = Path(__file__).with_name("errors.md")
MARKED = re.compile(r"(<!-- errors of (\w+), .*?-->\n\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "| name | what is printed | cause | try |\n|---|---|---|---|\n"
PLACES = {"again": "RUN/run.toml", "run_dir": "RUN", "smaller": SMALLER}  # any other name: in capitals


def _cells(known: Known) -> tuple[str, ...]:
    examples = "\n".join(known.example).splitlines() if known.pattern else []
    lines = (line for line in examples if re.search(known.pattern, line))
    ended = ", ".join(f"{name} {value}" for name, value in (known.ended[0] if known.ended else {}).items())
    printed = next(lines, ended)
    texts = (re.sub(r"{(\w+)}", lambda m: PLACES.get(m[1], m[1].upper()), text) for text in (known.cause, known.fix))
    return f"`{known.code}`", f"`{printed.strip()}`", *texts


def page(text: str) -> str:
    """docs/errors.md, which reads `text`, with the tables as they should be."""

    def section(marked: re.Match[str]) -> str:
        rows = (_cells(known) for known in known_errors() if known.family == marked[2])
        lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
        return marked[1] + HEAD + "".join(f"| {line} |\n" for line in lines) + "\n"

    return MARKED.sub(section, text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
