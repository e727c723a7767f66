"""What notebooks show of runs, captures and statistics: small heat maps and tables as HTML that needs nothing else.

No style sheet and no script, so that it looks the same in every notebook, and in one that is not trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from attncap.colours import LIGHT, shade

_CELL, _GAP = 14, 2
_WIDEST = 240
_MOST_MAPS = 24
_QUIET = "opacity:.7;font-size:.85em"


@dataclass(frozen=True)
class SmallMap:
    """A grid of numbers: rows from top to bottom, NaN or None where there is none."""

    title: str
    rows: Sequence[Sequence[float | None]]


def maps_html(heading: str, note: str, maps: Iterable[SmallMap]) -> str:
    """Small heat maps side by side, each on its own scale, under a heading and a line of text.

    Args:
        note: plain text, such as what a row and a column are.
    """
    maps = list(maps)
    shown = "".join(_small(one) for one in maps[:_MOST_MAPS])
    more = f" {len(maps) - _MOST_MAPS} more are not shown." if len(maps) > _MOST_MAPS else ""
    return (
        f'<div><p style="margin:.2em 0"><b>{escape(heading)}</b><br/>'
        f'<span style="{_QUIET}">{escape(note + more)}</span></p>'
        f'<div style="display:flex;flex-wrap:wrap;gap:14px 18px">{shown}</div></div>'
    )


def table_html(heading: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts under a heading, the first column its names."""
    header = "".join(f'<th style="text-align:left">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div><p style="margin:.2em 0"><b>{escape(heading)}</b></p><table><thead><tr>{header}</tr></thead>'
        f'<tbody>{body}</tbody></table><p style="{_QUIET}">{escape(note)}</p></div>'
    )


def number_text(value: float | None) -> str:
    """Three figures; a dash for what is no number."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _small(one: SmallMap) -> str:
    known = [value for row in one.rows for value in row if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    span = high - low or 1.0
    columns = max((len(row) for row in one.rows), default=0)
    width, height = max(columns, 1) * _CELL, max(len(one.rows), 1) * _CELL
    squares = [
        f'<rect x="{column * _CELL}" y="{row * _CELL}" width="{_CELL - _GAP}" height="{_CELL - _GAP}" '
        f'fill="{shade(LIGHT, (value - low) / span)}"><title>{row}, {column}: {number_text(value)}</title></rect>'
        for row, values in enumerate(one.rows)
        for column, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    bounds = f"{number_text(low)} to {number_text(high)}" if known else "no numbers"
    label = escape(f"{one.title}: {bounds}", quote=True)
    return (
        f'<figure style="margin:0"><figcaption>{escape(one.title)} <span style="{_QUIET}">{bounds}</span></figcaption>'
        f'<svg role="img" aria-label="{label}" width="{min(width, _WIDEST)}" viewBox="0 0 {width} {height}">'
        f"{''.join(squares)}</svg></figure>"
    )
