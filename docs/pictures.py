"""Makes the docs' pictures: the page of a dozen made-up runs, and a film of `launcher watch` during a real one.

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
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that isn't installed

from launcher import version
from launcher.report.page import page
from launcher.results.published import published
from tests.browser.sample_runs import sample

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "img"
COLUMNS = 80
ROW_PX = 24.4  # rich's
FRAMES_A_SECOND = 5  # `watch` draws about one a second
HELD_S = 4  # the last one
REDRAWN = re.compile(r"(?:\r?\x1b\[(?:1A|2K))+")  # how rich takes back the frame before
# After rich's own, which has one frame, and whose font would come from another server.
FILM = """\
<svg viewBox="0 0 994 OUTSIDE" xmlns="http://www.w3.org/2000/svg">
<style>
.w-matrix {{ font: 20px ui-monospace, Menlo, Consolas, monospace; transform: translateY(LAST); }}
@media (prefers-reduced-motion: no-preference) {{ .w-matrix {{ animation: film SECONDS infinite steps(STEPS); }} }}
@keyframes film {{ from {{ transform: none; }} PLAYED, to {{ transform: translateY(LAST); }} }}
{styles}
</style>
<rect fill="#292929" width="994" height="OUTSIDE" rx="8"/>
<g fill="#777"><circle cx="22" cy="20" r="7"/><circle cx="44" cy="20" r="7"/><circle cx="66" cy="20" r="7"/></g>
<svg x="9" y="41" width="976" height="HEIGHT">
<g class="w-matrix">
{matrix}
</g>
</svg>
</svg>
"""


def report(to: Path) -> None:
    """The first screen of the page, as a reader on a desk sees it."""
    runs = [run for run in sample() if re.fullmatch(r"gb200-[\w-]+", run.run) and not run.problems]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "page.html")
        release = version().partition(".dev")[0]
        file.write_text(page(runs, published(), made="2026-11-22 12:00 UTC", version=release, left_out=[]), "utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] * (os.geteuid() == 0))
        tab = browser.new_page(viewport={"width": 1100, "height": 1000}, color_scheme="light")
        tab.goto(file.as_uri())
        tab.screenshot(path=to)
        browser.close()


def watch(to: Path) -> None:
    """All of `launcher watch` from a run that trains here, several times as fast as it was."""
    with tempfile.TemporaryDirectory() as folder:
        terminal = {"COLUMNS": str(COLUMNS), "LINES": "24", "TERM": "xterm-256color", "NO_COLOR": ""}
        env = os.environ | terminal | {"PYTHONPATH": str(ROOT)}
        launcher = [sys.executable, "-m", "launcher"]
        name = ["--name", "my-run"]
        subprocess.run([*launcher, "submit", "--local", "--recipe", "debug", *name], cwd=folder, env=env, check=True)
        try:
            frames = _frames([*launcher, "watch"], folder, env)
        finally:
            subprocess.run([*launcher, "cancel", "my-run"], cwd=folder, env=env, check=True)
    to.write_text(_film(frames), encoding="utf-8")


def _frames(command: list[str], folder: str, env: dict[str, str]) -> list[str]:
    """What `command` shows on a terminal until it ends: its screens, each once."""
    ours, its = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=env, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    said = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as screen:  # Linux reports the end of a terminal as an error
        while more := screen.read(1 << 16):
            said += more
    assert process.wait() == 0, said
    screens = (frame.replace("\r", "").strip("\n") for frame in REDRAWN.split(said.decode("utf-8")))
    return list(dict.fromkeys(filter(None, screens)))


def _film(frames: list[str]) -> str:
    """All frames below each other, of which a window shows one after the other; where nothing moves, the last."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    shown = [Text.from_ansi(f"$ launcher watch\n{frame}").wrap(console, COLUMNS) for frame in frames]
    rows = max(map(len, shown))
    for lines in shown:
        console.print(*lines, *[""] * (rows - len(lines)), sep="\n")
    plays_s, last = len(frames) / FRAMES_A_SECOND, len(frames) - 1
    numbers = {
        "HEIGHT": f"{rows * ROW_PX:.1f}",
        "OUTSIDE": f"{rows * ROW_PX + 52:.1f}",
        "LAST": f"{-last * rows * ROW_PX:.1f}px",
        "STEPS": f"{last}",
        "SECONDS": f"{plays_s + HELD_S:.1f}s",
        "PLAYED": f"{100 * plays_s / (plays_s + HELD_S):.1f}%",
    }
    film = console.export_svg(code_format=re.sub("|".join(numbers), lambda key: numbers[key[0]], FILM), unique_id="w")
    no_use = r' clip-path="url\(#w-line-\d+\)"|<text[^>]*>\n</text>'  # no line is longer than the window is wide
    return re.sub(no_use, "", film)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    report(PICTURES / "page.png")
    watch(PICTURES / "watch.svg")
