"""The pictures of the guide: the report's colours on a white sheet, which dark pages leave as it is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from attncap.colours import DIVERGING_LIGHT, LIGHT
from attncap.parts import write_whole

BLUE, GREY, ORANGE, INK = "#3570c3", "#aab2bd", "#b6704c", "#3d4653"
SCALE = LinearSegmentedColormap.from_list("guide", LIGHT)
TWO_SIDES = LinearSegmentedColormap.from_list("guide", DIVERGING_LIGHT)
STYLE = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "attncap",  # the same numbers give the same files
}
"""Of every picture; axes take it when they are made, so pictures are made and saved inside `matplotlib.rc_context`."""


def sheet(panels: int, *, width: float = 8.0, height: float = 2.4, shares: Sequence[float] | None = None) -> Any:
    """(figure, list of axes in a row)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = None if shares is None else {"width_ratios": list(shares)}
    return figure, list(figure.subplots(1, panels, squeeze=False, gridspec_kw=ratios)[0])


def heat_map(
    figure: Any,
    axes: Any,
    grid: ArrayLike,
    title: str,
    *,
    bounds: tuple[float, float] | None = None,
    chosen: Sequence[tuple[int, int]] = (),
    written: bool = False,
    bar: bool = True,
) -> None:
    """Layers by heads; `chosen` heads are framed, and numbers `written` where the map is small."""
    numbers = np.asarray(grid, dtype=float)
    low, high = bounds or (min(0.0, float(np.nanmin(numbers))), float(np.nanmax(numbers)))
    image = axes.imshow(numbers, cmap=SCALE, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.set_xticks(range(numbers.shape[1]))
    axes.set_yticks(range(numbers.shape[0]))
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    for row, head in chosen:
        axes.add_patch(Rectangle((head - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=ORANGE, linewidth=1.6))
    if written:
        for (row, head), number in np.ndenumerate(numbers):
            colour = "white" if number > low + 0.38 * (high - low) else INK
            axes.text(head, row, f"{number:.2f}", ha="center", va="center", color=colour)
    if bar:
        figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).outline.set_visible(False)


def bars(axes: Any, numbers: Mapping[str, float], title: str, label: str, colours: Sequence[str] = (BLUE,)) -> None:
    """Horizontal bars, the first on top, each with its number."""
    names, lengths = list(numbers), list(numbers.values())
    chosen = [colours[place % len(colours)] for place in range(len(names))]
    axes.barh(range(len(names)), lengths, color=chosen, height=0.62)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for place, length in enumerate(lengths):
        axes.text(length, place, f" {length:.2f}", va="center", fontsize=7.5)
    axes.set(title=title, xlabel=label, xlim=(0, 1.18 * max(lengths)))


def dots(figure: Any, axes: Any, across: ArrayLike, up: ArrayLike, colour: ArrayLike, label: str) -> None:
    """A dot per head, coloured by a number."""
    points = axes.scatter(
        np.ravel(across), np.ravel(up), c=np.ravel(colour), cmap=SCALE, s=22, edgecolors=INK, linewidths=0.4
    )
    figure.colorbar(points, ax=axes, label=label, fraction=0.05, pad=0.02).outline.set_visible(False)


def name(axes: Any, place: tuple[float, float], text: str, away: tuple[float, float] = (5, 4)) -> None:
    """Write the name of a dot beside it."""
    side = "right" if away[0] < 0 else "left"
    axes.annotate(text, place, away, textcoords="offset points", fontsize=7, ha=side)


def save(pictures: Mapping[str, Any], folder: Path) -> list[Path]:
    """NAME.svg of each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for picture, figure in pictures.items():
            data = io.BytesIO()
            figure.savefig(data, format="svg", metadata={"Date": None})
            paths.append(folder / f"{picture}.svg")
            write_whole(paths[-1], data.getvalue())
    return paths
