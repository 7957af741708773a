"""Makes the docs' pictures: the page of a dozen made-up runs, and `launcher watch` in the middle of a real one.

make pictures        needs Chromium, and torchtitan for the run (a minute on a CPU)
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that isn't installed

from launcher import __version__
from launcher.report.page import page
from launcher.results.published import published
from tests.browser.sample_runs import sample

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "img"
COLUMNS = 100
REDRAWN = re.compile(r"(?:\r?\x1b\[(?:1A|2K))+")  # how rich takes back the frame before
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich's would come from another server
SHOWN = 12  # the step of 20 at which the picture is taken


def report(to: Path) -> None:
    """The first screen of the page, as a reader on a desk sees it."""
    runs = [run for run in sample() if re.fullmatch(r"gb200-[\w-]+", run.run) and not run.problems]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "page.html")
        file.write_text(page(runs, published(), made="2026-11-22 12:00 UTC", version=__version__, left_out=[]), "utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] * (os.geteuid() == 0))
        tab = browser.new_page(viewport={"width": 1100, "height": 1000}, color_scheme="light")
        tab.goto(file.as_uri())
        tab.screenshot(path=to)
        browser.close()


def watch(to: Path) -> None:
    """One frame of `launcher watch`, from a run that trains here."""
    with tempfile.TemporaryDirectory() as folder:
        terminal = {"COLUMNS": str(COLUMNS), "LINES": "30", "TERM": "xterm-256color", "NO_COLOR": ""}
        env = os.environ | terminal | {"PYTHONPATH": str(ROOT)}
        launcher = [sys.executable, "-m", "launcher"]
        name = ["--name", "my-run"]
        subprocess.run([*launcher, "submit", "--local", "--recipe", "debug", *name], cwd=folder, env=env, check=True)
        try:
            frame = _frame([*launcher, "watch"], folder, env)
        finally:
            subprocess.run([*launcher, "cancel", "my-run"], cwd=folder, env=env, check=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print("$ launcher watch")
    console.print(Text.from_ansi(frame))
    to.write_text(FONT.sub("", console.export_svg(title="launcher watch")), encoding="utf-8")


def _frame(command: list[str], folder: str, env: dict[str, str]) -> str:
    """What `command` shows on a terminal when step SHOWN was logged."""
    ours, its = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=env, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    said = ""
    while not re.search(rf"step {SHOWN}/", said):
        said += os.read(ours, 1 << 16).decode("utf-8", "replace")
    said += os.read(ours, 1 << 16).decode("utf-8", "replace")  # the rest of that frame
    process.terminate()
    process.wait()
    os.close(ours)
    frames = [frame for frame in REDRAWN.split(said) if f"step {SHOWN}/" in frame]
    return frames[0].replace("\r", "").rstrip()


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    report(PICTURES / "page.png")
    watch(PICTURES / "watch.svg")
