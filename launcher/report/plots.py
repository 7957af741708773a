"""The page's charts as SVG files that stand alone, for slides and reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from launcher.base.files import filesystem_error, write_text
from launcher.base.output import plain
from launcher.report.charts import Figure, of_gpu
from launcher.report.figures import gpu_types
from launcher.report.page import text_of
from launcher.report.svg import HEIGHT, WIDTH
from launcher.results.outcome import Outcome

MARGIN, LINE = 16, 20  # pixels; LINE is the height of a line of text


def write_plots(outcomes: Sequence[Outcome], published: Sequence[Outcome], folder: Path) -> list[Path]:
    """Writes each chart of the page to a file such as throughput-gb200.svg. Returns the files.

    Raises LauncherError when they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise filesystem_error(folder, error, "--plots DIR") from error
    written: list[Path] = []
    for place, gpu in enumerate(gpu_types(outcomes)):
        for figure in of_gpu(outcomes, published, gpu, place):
            kind = re.sub(r"[^a-z0-9]+", "-", f"{figure.ident.partition('-')[0]}-{gpu}".lower()).strip("-")
            same = sum(re.fullmatch(rf"{kind}(-\d+)?", path.stem) is not None for path in written)
            path = folder / f"{kind}{f'-{same + 1}' if same else ''}.svg"
            write_text(path, drawing(figure), option="--plots DIR")
            written.append(path)
    return written


def drawing(figure: Figure) -> str:
    """A chart with its title, legend and notes as one SVG, in the page's light colours."""
    colours = dict(re.findall(r"(--\w+): ([^;]+);", text_of("page.css").partition("@media")[0]))
    style = re.sub(r"var\((--\w+)\)", lambda name: colours[name[1]], text_of("chart.css"))
    parts = [_text(figure.title, MARGIN, LINE, bold=True)]
    parts.append(_placed(figure.chart, MARGIN, 1.5 * LINE, WIDTH, HEIGHT))
    y = HEIGHT + 2.5 * LINE
    for entry in figure.legend:
        parts += [_placed(entry.swatch, MARGIN, y - 11, 32, 14), _text(entry.text, MARGIN + 40, y)]
        y += LINE
    for note in figure.notes:
        parts.append(_text(note, MARGIN, y))
        y += LINE
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
        'font-family="system-ui, sans-serif"><style>{2}</style><rect width="100%" height="100%" fill="{3}"/>'
    ).format(WIDTH + 2 * MARGIN, y, Markup(style), colours["--bg"])
    return head + Markup("").join(parts) + Markup("</svg>\n")


def _text(text: str, x: float, y: float, bold: bool = False) -> Markup:
    words = plain(text)
    longest = (WIDTH + MARGIN - x) / 7  # characters of about 7 pixels: a longer text is squeezed, not cut off
    fit = Markup(' textLength="{}" lengthAdjust="spacingAndGlyphs"').format(WIDTH + MARGIN - x)
    weight = Markup(' font-weight="600"') if bold else ""
    return Markup('<text x="{}" y="{}"{}{}>{}</text>').format(x, y, weight, fit if len(words) > longest else "", words)


def _placed(drawn: Markup, x: float, y: float, width: float, height: float) -> Markup:
    at = Markup('<svg x="{}" y="{}" width="{}" height="{}" ').format(x, y, width, height)
    return Markup(drawn.replace("<svg ", at, 1))
