"""Lines and statements of the code, as the project's goals count them.

python benchmarks/size.py
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = {"code": ("launcher", "slurm", "containers"), "tests": ("tests",)}


def main() -> None:
    print(f"{'':8} {'lines':>8} {'statements':>11} {'long lines':>11} {'formatter off':>14}")
    for name, folders in GROUPS.items():
        listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
        texts = [(ROOT / path).read_text(encoding="utf-8") for path in listed.stdout.split() if path.endswith(".py")]
        lines = [line for text in texts for line in text.splitlines()]
        statements = sum(isinstance(node, ast.stmt) for text in texts for node in ast.walk(ast.parse(text)))
        long = sum(len(line) > 120 for line in lines)
        off = sum("# fmt: " in line and '"' not in line for line in lines)
        print(f"{name:8} {len(lines):8,} {statements:11,} {long:11,} {off:14,}")


if __name__ == "__main__":
    main()
