"""`write_figures`: each picture of a report as an SVG and a PNG file, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.analysis.results import CURVE, HEADS, Result
from attncap.colours import DIVERGING_LIGHT, LIGHT
from attncap.extras import require
from attncap.parts import whole_file
from attncap.report.content import ALL_TOGETHER, Grid, HeatMap, Layer, Report, bounds_of
from attncap.report.data import RunContent, pair_places, result_grids
from attncap.report.details import BINS, Details
from attncap.report.differences import LEVEL, Differences
from attncap.report.page import ReportError, RunPath, read_contents

_MOST_GROUPS = 4
_DPI = 200
_BLUE, _GREY, _ORANGE = "#3570c3", "#b9c0ca", "#b6704c"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#545d6b",
    "xtick.color": "#545d6b",
    "ytick.color": "#545d6b",
    "axes.labelcolor": "#545d6b",
    "svg.hashsalt": "attncap",  # the same run gives the same files
}


def write_figures(run_paths: RunPath | Sequence[RunPath], folder: RunPath) -> tuple[Path, ...]:
    """Write the figures of the report of these runs into `folder`, NAME.svg and NAME.png each; gives their paths.

    Of a run: ``overview``, ``heads_STAT`` (with a panel for each of up to four groups), ``profile_STAT`` and
    ``distribution_STAT`` where it kept tables, ``NAME_COLUMN`` for its analyses. Of two: ``comparison_STAT``. With
    several runs each name begins with that of the run's folder.

    Raises:
        RunError, RunMismatchError: as `write_report`.
        MissingExtraError: matplotlib or pyarrow is not installed; the message names the extra.
        ReportError: a file cannot be written.
    """
    require("matplotlib", "report")
    contents, comparisons = read_contents(run_paths)
    paths: list[Path] = []
    for name, figure in _all(contents, comparisons):
        paths += _save(Path(folder), name, figure)
    return tuple(paths)


def _all(contents: Sequence[RunContent], comparisons: Sequence[Differences]) -> Iterator[tuple[str, Any]]:
    """(name, figure) of everything, one at a time."""
    with require("matplotlib", "report").rc_context(_STYLE):
        for content in contents:
            prefix = f"{content.label}_" if len(contents) > 1 else ""
            for name, figure in _of_run(content):
                yield prefix + name, figure
        for found in comparisons:
            prefix = f"{found.label_a}_{found.label_b}_" if len(comparisons) > 1 else ""
            for one in found.maps:
                yield f"{prefix}comparison_{one.stat}", _comparison(found, one.grids, one.statistic.title)


def _of_run(content: RunContent) -> Iterator[tuple[str, Any]]:
    report = content.report
    if not report.maps:
        return
    yield "overview", _overview(report)
    for one in report.overview:
        groups = [other for other in report.maps if other.stat == one.stat and other.group != ALL_TOGETHER]
        panels = [one, *groups] if one.group == ALL_TOGETHER and len(groups) <= _MOST_GROUPS else [one]
        yield f"heads_{one.stat}", _statistic(report, panels)
    if content.details is not None:
        for place, stat in enumerate(content.details.stats):
            yield f"profile_{stat}", _profile(report, content.details, place)
            yield f"distribution_{stat}", _distribution(report, content.details, place)
    for result in content.results:
        yield from _result(result, report)


def _save(folder: Path, name: str, figure: Any) -> list[Path]:
    safe = re.sub(r"[^\w.-]+", "_", name).strip("_")
    paths = [folder / f"{safe}.svg", folder / f"{safe}.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            with whole_file(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=_DPI, metadata=metadata)
            figure.set_layout_engine("none")  # the second file has the layout of the first
    except OSError as error:
        reason = error.strerror or str(error)
        raise ReportError(f"{folder}: figures cannot be written ({reason}); give another --figures folder") from error
    return paths


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """(figure, axes (rows, columns)), without the global state that pyplot keeps."""
    made = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def _scale(middle: bool) -> Any:
    colours = require("matplotlib.colors", "report")
    made = colours.LinearSegmentedColormap.from_list("attncap", DIVERGING_LIGHT if middle else LIGHT)
    return made.with_extremes(bad="#eceef1")


def _draw_map(axes: Any, layers: Sequence[Layer], grid: Grid, bounds: tuple[float, float], middle: bool = False) -> Any:
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap=_scale(middle),
        vmin=bounds[0],
        vmax=bounds[1],
        aspect="auto",
        interpolation="none",
    )
    step = max(1, -(-len(layers) // 16))
    axes.set_yticks(range(0, len(layers), step), [str(layer.number) for layer in layers[::step]])
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(12, integer=True))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _overview(report: Report) -> Any:
    columns = 4
    rows = -(-len(report.overview) // columns)
    figure, axes = _figure(9.0, 1.7 * rows, rows, columns)
    for place, one in enumerate(report.overview):
        box = axes[divmod(place, columns)]
        measure = one.statistic.measure
        grid = one.grids[measure]
        image = _draw_map(box, report.layers, grid, bounds_of(grid, one.statistic.from_zero))
        box.set_title(one.statistic.title, fontsize=8)
        figure.colorbar(image, ax=box, fraction=0.05, pad=0.02).outline.set_visible(False)
        box.tick_params(labelsize=6)
    for box in axes.flat[len(report.overview) :]:
        box.set_visible(False)
    figure.supxlabel("head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    return figure


def _size(layers: int, heads: int) -> tuple[float, float]:
    """Inches of a map."""
    return min(7.0, 1.6 + 0.36 * heads), min(7.0, 0.9 + 0.3 * layers)


def _statistic(report: Report, panels: Sequence[HeatMap]) -> Any:
    width, height = _size(len(report.layers), report.heads)
    figure, axes = _figure(width * len(panels), height, 1, len(panels))
    measure, about = panels[0].statistic.measure, panels[0].statistic
    bounds = bounds_of(np.stack([one.grids[measure] for one in panels]), about.from_zero)
    for box, one in zip(axes.flat, panels, strict=True):
        image = _draw_map(box, report.layers, one.grids[measure], bounds)
        group = "all groups" if one.group == ALL_TOGETHER else one.group
        box.set_title(about.title if len(panels) == 1 else f"{about.title}: {group}")
        box.set_xlabel("head")
        if one.threshold is not None and measure == "mean":
            _outline(box, one.grids["mean"] > one.threshold)
    axes[0, 0].set_ylabel("layer")
    _colour_bar(figure, image, axes, f"{measure} ({about.unit})")
    return figure


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)


def _outline(box: Any, chosen: NDArray[np.bool_]) -> None:
    patches = require("matplotlib.patches", "report")
    for row, head in np.argwhere(chosen):
        box.add_patch(patches.Rectangle((head - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_ORANGE, linewidth=1.5))


def _comparison(found: Differences, grids: dict[str, Grid], title: str) -> Any:
    figure, axes = _figure(*_size(len(found.layers), found.heads))
    box = axes[0, 0]
    image = _draw_map(box, found.layers, grids["effect"], bounds_of(grids["effect"], False, middle=True), middle=True)
    rows, heads = np.nonzero(grids["p"] <= LEVEL)
    box.plot(heads, rows, linestyle="", marker="o", markersize=2.5, color="black")
    box.set_title(f"{title}: {found.label_a} less {found.label_b}")
    box.set_xlabel(f"head (dots: corrected p at most {LEVEL:g})" if len(rows) else "head")
    box.set_ylabel("layer")
    _colour_bar(figure, image, box, "effect (standard deviations)")
    return figure


def _furthest(report: Report, stat: str) -> tuple[int, int]:
    """The head whose mean is furthest from that of all heads."""
    means = next(one for one in report.overview if one.stat == stat).grids["mean"]
    apart = np.abs(means - np.nanmean(means)) if np.isfinite(means).any() else np.zeros(means.shape)
    row, head = np.unravel_index(np.nan_to_num(apart).argmax(), apart.shape)
    return int(row), int(head)


def _profile(report: Report, details: Details, place: int) -> Any:
    figure, axes = _figure(4.2, 2.6)
    box, profiles = axes[0, 0], details.profiles
    about = next(one.statistic for one in report.overview if one.stat == details.stats[place])
    middles = np.sqrt(np.maximum(profiles.edges[:-1], 0.7) * np.maximum(profiles.edges[1:] - 1, 0.7))
    lines = profiles.means[place]
    box.plot(middles, lines.reshape(-1, lines.shape[-1]).T, color=_GREY, linewidth=0.5)
    row, head = _furthest(report, details.stats[place])
    box.plot(
        middles, lines[row, head], color=_BLUE, linewidth=2, label=f"layer {report.layers[row].number} head {head}"
    )
    box.set_xscale("log", base=2)
    box.xaxis.set_major_formatter(require("matplotlib.ticker", "report").FormatStrFormatter("%d"))
    box.set(xlabel=f"{profiles.over} (tokens)", ylabel=about.unit, title=about.title)
    box.legend(frameon=False, fontsize=8)
    return figure


def _distribution(report: Report, details: Details, place: int) -> Any:
    figure, axes = _figure(4.2, 2.6)
    box, found = axes[0, 0], details.distributions
    about = next(one.statistic for one in report.overview if one.stat == details.stats[place])
    edges = np.linspace(found.ends[place, 0], found.ends[place, 1], BINS + 1)
    row, head = _furthest(report, details.stats[place])
    box.stairs(
        found.shares[place, row, head],
        edges,
        fill=True,
        color=_BLUE,
        label=f"layer {report.layers[row].number} head {head}",
    )
    there = found.shares[place].reshape(-1, BINS)
    there = there[there.any(1)]
    if len(there):
        box.stairs(there.mean(0), edges, color="#545d6b", label="mean of all heads")
    box.set(xlabel=f"{about.title} ({about.unit})", ylabel=f"share of {found.of}", title=about.title)
    box.legend(frameon=False, fontsize=8)
    return figure


def _result(result: Result, report: Report) -> Iterator[tuple[str, Any]]:
    if result.kind == CURVE:
        yield result.name, _curve(result)
        return
    if result.kind != HEADS:
        yield from _pairs(result, report)
        return
    groups, grids = result_grids(result, report)
    if result.plane:
        yield f"{result.name}_plane", _plane(result, report, grids)
    for place, column in enumerate(result.columns):
        if column.name in result.plane:
            continue
        for at, group in enumerate(groups):
            figure, axes = _figure(*_size(len(report.layers), report.heads))
            bounds = bounds_of(grids[place], False, middle=column.zero)
            image = _draw_map(axes[0, 0], report.layers, grids[place, at], bounds, column.zero)
            axes[0, 0].set(title=result.title, xlabel="head", ylabel="layer")
            words = column.name.replace("_", " ")
            _colour_bar(figure, image, axes, f"{words} ({column.unit})" if column.unit else words)
            yield f"{result.name}_{column.name}" + (f"_{group}" if len(groups) > 1 else ""), figure


def _pairs(result: Result, report: Report) -> Iterator[tuple[str, Any]]:
    places = pair_places(result, report)
    heads = len(report.layers) * report.heads
    there = (places >= 0).all(0)
    one, other = (places[at, there] * report.heads + places[at + 1, there] for at in (0, 2))
    for column in result.columns:
        grid = np.full((heads, heads), np.nan)
        grid[one, other] = np.asarray(result.data[column.name], dtype=np.float64)[there]
        figure, axes = _figure(5.0, 4.4)
        bounds = bounds_of(grid, False, middle=column.zero)
        box = axes[0, 0]
        masked = np.ma.masked_invalid(grid)
        image = box.imshow(masked, cmap=_scale(column.zero), vmin=bounds[0], vmax=bounds[1], interpolation="none")
        for axis in (box.xaxis, box.yaxis):
            axis.set_ticks(range(0, heads, report.heads), [str(layer.number) for layer in report.layers])
        box.set(title=result.title, xlabel="other head, by layer", ylabel="head, by layer")
        words = column.name.replace("_", " ")
        _colour_bar(figure, image, axes, f"{words} ({column.unit})" if column.unit else words)
        yield f"{result.name}_{column.name}", figure


def _plane(result: Result, report: Report, grids: NDArray[np.float64]) -> Any:
    figure, axes = _figure(5.0, 4.4)
    names = [column.name for column in result.columns]
    across, up = (grids[names.index(name), 0] for name in result.plane)
    row, head = np.nonzero(np.isfinite(across) & np.isfinite(up))
    box = axes[0, 0]
    points = box.scatter(
        across[row, head], up[row, head], c=row, cmap=_scale(False), edgecolors="#545d6b", linewidths=0.4
    )
    if len(row) <= 200:
        for one, other in zip(row, head, strict=True):
            label = f"{report.layers[one].number}.{other}"
            box.annotate(label, (across[one, other], up[one, other]), (3, 2), textcoords="offset points", fontsize=6)
    box.set(title=result.title, xlabel=result.plane[0], ylabel=result.plane[1], aspect="equal")
    _colour_bar(figure, points, box, "layer")
    return figure


def _curve(result: Result) -> Any:
    figure, axes = _figure(4.6, 3.0)
    box, (first, *lines) = axes[0, 0], result.columns
    for place, column in enumerate(lines):
        style = ("-", "--", ":", "-.")[place % 4]
        box.plot(result.data[first.name], result.data[column.name], style, label=column.name.replace("_", " "))
    words = first.name.replace("_", " ")
    units = sorted({column.unit for column in lines if column.unit})
    box.set(title=result.title, xlabel=f"{words} ({first.unit})" if first.unit else words, ylabel=", ".join(units))
    box.legend(frameon=False, fontsize=8)
    return figure
