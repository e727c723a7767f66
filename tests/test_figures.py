"""Figures for papers: every picture of a report as SVG and PNG, the same bytes each time."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

from PIL import Image

from attncap.analysis.results import Column, Result, save_result
from attncap.colours import DARK, DIVERGING_DARK, DIVERGING_LIGHT, LIGHT
from attncap.report import write_figures
from attncap.report.page import ReportError
from tests.runs import head_rows, write_run

STATS = ("offset_mass[-1]", "entropy")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", head_rows([3, 2], stats=STATS, means={(STATS[0], 0, 1): 0.9}))


def test_each_statistic_and_each_number_of_an_analysis_has_a_figure(run, tmp_path):
    places = {"layer": [0, 1], "module": ["encoder.layer.0.attention", "encoder.layer.1.attention"], "head": [1, 0]}
    score = Column("score", "share", "How much.", zero=True)
    save_result(run, Result("links", "Links", "", "heads", (score,), {**places, "score": [0.5, -0.5]}))
    curve = tuple(Column(name, "", name) for name in ("removed", "loss"))
    save_result(run, Result("loss", "Loss", "", "curve", curve, {"removed": [0, 1], "loss": [1.0, 2.0]}))
    paths = write_figures(run, tmp_path / "figures")
    names = ["heads_entropy", "heads_offset_mass_-1", "links_score", "loss", "overview"]
    assert sorted(path.name for path in paths) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert np.asarray(Image.open(path).convert("L")).std() > 1


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    first, second = (write_figures(run, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_two_runs_have_figures_of_each_and_of_what_differs(run, tmp_path):
    other = write_run(tmp_path / "other", head_rows([3, 2], stats=STATS))
    names = {path.stem for path in write_figures([run, other], tmp_path / "figures")}
    assert {"run_overview", "other_heads_entropy", "comparison_entropy", "comparison_offset_mass_-1"} <= names


def test_a_folder_that_cannot_be_made_says_what_to_do(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="give another --figures folder"):
        write_figures(run, tmp_path / "file" / "figures")


def lightness(colour: str) -> float:
    """L of OKLab, which is made so that equal differences look equal."""
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    return float(np.array([0.2104542553, 0.7936177850, -0.0040720468]) @ np.cbrt(np.array(to_cones) @ linear))


@pytest.mark.parametrize("scale", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_rise_evenly_in_lightness(scale):
    steps = np.diff([lightness(colour) for colour in scale])
    assert np.abs(steps - steps.mean()).max() < 0.01


@pytest.mark.parametrize("scale", [DIVERGING_LIGHT, DIVERGING_DARK], ids=["light", "dark"])
def test_both_sides_of_zero_are_equally_far_from_the_middle(scale):
    lights = np.array([lightness(colour) for colour in scale])
    np.testing.assert_allclose(lights, lights[::-1], atol=0.01)
    assert np.abs(np.abs(np.diff(lights)) - abs(lights[5] - lights[0]) / 5).max() < 0.01
