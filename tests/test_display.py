"""What notebooks show: every number where it belongs, names escaped, nothing fetched."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

from attncap import StatSpec, attention, capture
from attncap.display import SmallMap, maps_html, table_html
from tests.runs import STATS, head_rows, write_run

HOSTILE = "<script>alert(1)</script>\"'&"


def figures_of(html: str) -> dict[str, list[list[str]]]:
    """Title of each map -> its cells' texts, by row."""
    found = {}
    for figure in ElementTree.fromstring(html).iter("figure"):
        caption, cells = figure.find("figcaption"), list(figure.iter("title"))
        rows: dict[str, list[str]] = {}
        for cell in cells:
            row, _, text = re.fullmatch(r"(\d+), (\d+): (.*)", cell.text).groups()
            rows.setdefault(row, []).append(text)
        found[caption.text.strip()] = list(rows.values())
    return found


def test_a_map_has_every_number_and_leaves_out_what_is_none():
    html = maps_html("a", "b", [SmallMap("entropy", [[1.0, 2.5], [None, float("nan")]]), SmallMap("nothing", [[None]])])
    assert figures_of(html) == {"entropy": [["1", "2.5"]], "nothing": []}
    assert "1 to 2.5" in html
    assert "no numbers" in html


def test_names_are_escaped():
    html = maps_html(HOSTILE, HOSTILE, [SmallMap(HOSTILE, [[1.0]])]) + table_html(
        HOSTILE, HOSTILE, [HOSTILE], [[HOSTILE]]
    )
    assert "<script" not in html
    ElementTree.fromstring(f"<div>{html}</div>")


def test_a_run_shows_its_means(tmp_path):
    pytest.importorskip("pyarrow")
    from attncap.store import read_run

    run = read_run(write_run(tmp_path / "run", head_rows([2, 2], means={("entropy", 1, 0): 0.123})))
    shown = figures_of(run._repr_html_())
    assert list(shown) == list(STATS)
    assert shown["entropy"][1][0] == "0.123"


def test_a_comparison_shows_the_heads_that_differ(tmp_path):
    pytest.importorskip("pyarrow")
    from attncap.analysis.compare import compare

    means = {("entropy", 1, 0): 0.9}
    runs = [write_run(tmp_path / name, head_rows([2, 2], means=given)) for name, given in (("a", means), ("b", {}))]
    table = ElementTree.fromstring(compare(*runs)._repr_html_())
    rows = [[cell.text for cell in row] for row in table.iter("tr")]
    assert rows[0][:3] == ["statistic", "head", "mean A"]
    assert rows[1][:3] == ["entropy", "layer 1 head 0", "0.9000"]
    assert rows[1][5] == "not tested"


def test_statistics_show_their_means_over_rows_that_see_a_key():
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 2:] = False
    _, stats = attention(query, key, value, StatSpec(offsets=(-1, 1)), attn_mask=mask)
    shown = figures_of(stats._repr_html_())
    assert shown["entropy"][0][1] == f"{stats.entropy[0, 1, :2].mean():.3g}"
    assert "offset_mass[..., 1]" in shown
    assert "nan" not in stats._repr_html_()


def test_a_capture_shows_its_means():
    class Attend(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model = torch.nn.Sequential(Attend(), Attend())
    with capture(model) as cap:
        model(torch.randn(1, 4, 6, 8))
    shown = figures_of(cap._repr_html_())
    assert shown["entropy"][1][3] == f"{cap.mean('entropy')[1, 3]:.3g}"
