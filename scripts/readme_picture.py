"""Draws the README's picture from a run: python scripts/readme_picture.py RUN docs/heads.svg

The picture in the repository was made from the run of `make demo`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from xml.sax.saxutils import escape

from attncap.colours import DARK, LIGHT, shade
from attncap.report.content import HeatMap, Report, bounds_of, build_report
from attncap.store import read_run, write_whole

SHOWN = ("offset_mass[-1]", "offset_mass[1]", "sink_mass", "duplicate", "relative_entropy", "distance")
COLUMNS = 3
CELL, GAP, MARGIN, TITLE, PAD = 18, 2, 16, 40, 30
STEPS = 24  # shades told apart, each a class that the two themes colour


def main() -> None:
    """Read the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    write_whole(arguments.output, draw(build_report(read_run(arguments.run))).encode())


def draw(report: Report) -> str:
    """The picture as SVG, for light and dark pages."""
    maps = [one for name in SHOWN for one in report.maps if one.stat == name]
    tile_width, tile_height = report.heads * CELL, TITLE + len(report.layers) * CELL
    rows = -(-len(maps) // COLUMNS)
    width = 2 * MARGIN + COLUMNS * tile_width + (COLUMNS - 1) * PAD
    height = 2 * MARGIN + rows * tile_height + (rows - 1) * PAD + 24
    tiles = []
    for index, one in enumerate(maps):
        x = MARGIN + (index % COLUMNS) * (tile_width + PAD)
        y = MARGIN + (index // COLUMNS) * (tile_height + PAD)
        tiles.append(f'<g transform="translate({x} {y})">{tile(one)}</g>')
    footer = f"{len(report.layers)} layers (rows) x {report.heads} heads of {report.model} over {report.corpus}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(footer)}</title><style>{style()}</style>"
        f'<rect width="{width}" height="{height}" rx="10" class="page"/>{"".join(tiles)}'
        f'<text x="{MARGIN}" y="{height - MARGIN + 2}" class="quiet">{escape(footer)}</text></svg>\n'
    )


def tile(one: HeatMap) -> str:
    """One statistic: title, range, and a square per head."""
    grid = one.grids["mean"]
    low, high = bounds_of(grid, one.statistic.from_zero)
    squares = [
        f'<rect x="{head * CELL}" y="{TITLE + layer * CELL}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2" '
        f'class="c{round((STEPS - 1) * (value - low) / (high - low))}"/>'
        for layer, row in enumerate(grid.tolist())
        for head, value in enumerate(row)
        if math.isfinite(value)
    ]
    scale = f"{number(low)} to {number(high)} {one.statistic.unit}"
    return (
        f'<text y="12">{escape(one.statistic.title)}</text><text y="29" class="quiet">{escape(scale)}</text>'
        + "".join(squares)
    )


def number(value: float) -> str:
    """Two figures, and no powers of ten."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def style() -> str:
    """Colours of both themes; a viewer without themes shows the light one."""
    text = "text{font:600 15px system-ui,sans-serif;fill:#1a1f27}.quiet{font-size:12.5px;font-weight:400;fill:#566070}"
    dark = "text{fill:#e8ecf2}.quiet{fill:#9aa6b6}.page{fill:#10141a}"
    return f"{text}.page{{fill:#fff}}{shades(LIGHT)}@media(prefers-color-scheme:dark){{{dark}{shades(DARK)}}}"


def shades(scale: tuple[str, ...]) -> str:
    """A class for each step of a colour scale."""
    return "".join(f".c{step}{{fill:{shade(scale, step / (STEPS - 1))}}}" for step in range(STEPS))


if __name__ == "__main__":
    main()
