"""The report: one file that is whole, right, offline and safe against the names in it; and the terminal table."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("jinja2")
rich_console = pytest.importorskip("rich.console")

from attncap.analysis.results import Column, Result, save_result  # noqa: E402
from attncap.report import content, print_highlights, write_report  # noqa: E402
from attncap.report.page import ReportError  # noqa: E402
from attncap.store import RunError, RunMismatchError, read_run  # noqa: E402
from tests.runs import STATS, head_rows, write_run  # noqa: E402

HOSTILE = "<script>alert(1)</script>\"'&[bold]"


@pytest.fixture
def run(tmp_path):
    means = {("offset_mass[-1]", 0, 2): 0.93, ("sink_mass", 1, 0): 0.7}
    return write_run(tmp_path / "run", head_rows([4, 3], means=means))


def chart_data(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def unpacked(packed: dict) -> np.ndarray:
    kind = {"f8": "<f8", "f4": "<f4", "i4": "<i4", "u1": "u1"}[packed["type"]]
    return np.frombuffer(base64.b64decode(packed["data"]), kind).reshape(packed["shape"])


def grids_of(data: dict, run: int = 0) -> dict[tuple[str, str, str], np.ndarray]:
    """(stat, group, measure) -> layers x heads."""
    of = data["runs"][run]
    numbers = unpacked(of["numbers"])
    return {
        (stat["stat"], group, measure): numbers[i, j, k]
        for i, stat in enumerate(of["stats"])
        for j, group in enumerate(of["groups"])
        for k, measure in enumerate(data["measures"])
    }


class Page(HTMLParser):
    """Collects what would fetch something, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.elements: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_report_holds_every_number_of_the_table(run, tmp_path):
    html = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    data = chart_data(html)
    grids = grids_of(data)
    assert {stat for stat, _, _ in grids} == set(STATS)
    for row in read_run(run).heads.to_pylist():
        for measure in content.MEASURES:
            assert grids[row["stat"], "all", measure][row["layer"], row["head"]] == row[measure]
    assert [layer["module"] for layer in data["runs"][0]["layers"]] == [
        "encoder.layer.0.attention",
        "encoder.layer.1.attention",
    ]


def test_heads_that_a_layer_lacks_are_blank(run):
    report = content.build_report(read_run(run))
    assert report.heads == 4
    assert all(np.isnan(one.grids["mean"][1, 3]) for one in report.maps)


def test_numbers_that_are_not_finite_are_blank(tmp_path):
    rows = head_rows([2], stats=("entropy",))
    rows[0] |= {"count": 0, "mean": math.nan, "p05": math.nan, "max": -math.inf}
    html = write_report(write_run(tmp_path / "run", rows), tmp_path / "report.html").read_text(encoding="utf-8")
    grids = grids_of(chart_data(html))
    assert np.isnan(grids["entropy", "all", "mean"][0, 0])
    assert np.isnan(grids["entropy", "all", "max"][0, 0])


def test_report_needs_nothing_from_outside(run, tmp_path):
    html = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(reference.startswith("#") for reference in Page(html).references)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html


def test_names_are_escaped_wherever_they_stand(tmp_path):
    rows = head_rows([2], stats=(HOSTILE, "sink_mass"), module=HOSTILE + "{}", groups=(HOSTILE,))
    model = {"name": HOSTILE, "fingerprint": HOSTILE, "architecture": HOSTILE, "layers": 1, "heads": 2}
    scan = {"model": model, "corpus": {"sources": [HOSTILE]}, "tags": [HOSTILE], "impl": HOSTILE}
    path = write_run(tmp_path / "run", rows, **scan)
    html = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    parsed = Page(html)
    assert parsed.elements.count("script") == 2
    assert parsed.text.count(HOSTILE) >= 4
    assert chart_data(html)["runs"][0]["layers"][0]["module"] == HOSTILE + "0"

    console = rich_console.Console(file=io.StringIO(), width=200)
    print_highlights(path, console)
    assert "[bold]" in console.file.getvalue()


def test_groups_can_be_chosen(tmp_path):
    path = write_run(tmp_path / "run", head_rows([2], groups=("news", "code")))
    html = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert chart_data(html)["runs"][0]["groups"] == ["", "news", "code"]


def test_two_modules_of_one_layer_are_two_rows(tmp_path):
    rows = head_rows([2], module="self_attention") + head_rows([3], module="cross_attention")
    report = content.build_report(read_run(write_run(tmp_path / "run", rows)))
    assert [(layer.number, layer.module, layer.heads) for layer in report.layers] == [
        (0, "cross_attention", 3),
        (0, "self_attention", 2),
    ]


def test_what_stands_out_is_said(run):
    findings = " ".join(content.build_report(read_run(run)).findings)
    assert "One of 7 heads has more than half of its attention on the previous token: layer 0 head 2" in findings
    assert "No head passes the threshold for: next token" in findings
    assert "1 of 10 documents was cut" in findings


@pytest.mark.parametrize(
    "stat", ["offset_mass[-1]", "diagonal_mass", "entropy", "topk_mass", "induction", "some_feature"]
)
def test_every_statistic_has_a_title_a_unit_and_an_explanation(stat):
    described = content.describe(stat, {"diagonal": 0, "topk": 8}, tags=("induction",))
    assert described.title
    assert described.unit
    assert described.explanation.endswith(".")


def test_spec_of_a_run_shows_in_the_titles():
    assert content.describe("sink_mass", {"sink": 1}).title == "First token"
    assert content.describe("diagonal_mass", {"diagonal": 2}).title == "Within 2"
    assert content.describe("topk_mass", {"topk": 3}).title == "Top 3"


def test_an_old_report_is_replaced_whole_or_kept(run, tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    output.write_text("old")

    def fail(*_arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("attncap.store.os.replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_report(run, output)
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    assert write_report(run, output) == output
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_says_what_to_do(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="is a folder; give a file"):
        write_report(run, tmp_path)
    with pytest.raises(ReportError, match=r"page\.html: the report cannot be written .*give another file with -o"):
        write_report(run, tmp_path / "file" / "page.html")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no scan\.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_terminal_names_the_head_its_mean_and_the_threshold(run):
    console = rich_console.Console(file=io.StringIO(), width=100)
    print_highlights(run, console)
    lines = [line for line in console.file.getvalue().splitlines() if "previous token" in line]
    assert re.search(r"previous token +layer 0 head 2 +0\.93 +> 0\.50", lines[0])


def test_a_mean_that_would_look_like_the_threshold_has_a_third_digit(tmp_path):
    path = write_run(tmp_path / "run", head_rows([2], means={("offset_mass[-1]", 0, 1): 0.4981}))
    console = rich_console.Console(file=io.StringIO(), width=120)
    print_highlights(path, console)
    assert re.search(r"previous token +layer 0 head 1 +0\.498 +> 0\.50, not passed", console.file.getvalue())
    assert "closest: layer 0 head 1, 0.498" in " ".join(content.build_report(read_run(path)).findings)


def test_an_empty_table_says_why(tmp_path):
    rows = [{**row, "count": 0, "mean": math.nan} for row in head_rows([2])]
    for name, given, why in (("nothing", [], "holds no statistic"), ("lost", rows, "not finite")):
        console = rich_console.Console(file=io.StringIO(), width=300)
        print_highlights(write_run(tmp_path / name, given), console)
        assert why in console.file.getvalue()


def test_short_documents_are_a_caveat(tmp_path):
    counts = {"documents": 10, "tokens": 60}
    (said,) = (
        one
        for one in content.build_report(read_run(write_run(tmp_path / "run", head_rows([2]), counts=counts))).findings
        if "on average" in one
    )
    assert said.startswith("Documents have 6.0 tokens on average: their first 4 tokens make up to 67% of all keys")


def test_the_sentence_on_induction_says_what_is_subtracted(tmp_path):
    stats = (*STATS, "induction")
    rows = head_rows([2], stats=stats, means={("induction", 0, 1): 0.9})
    findings = content.build_report(read_run(write_run(tmp_path / "run", rows, tags=["induction"]))).findings
    assert any(
        "what followed the token elsewhere, that on the next token subtracted: layer 0" in one for one in findings
    )


def test_a_run_without_rows_gives_a_report(tmp_path):
    path = write_run(tmp_path / "run", [])
    html = write_report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert chart_data(html)["runs"][0]["stats"] == []
    print_highlights(path, rich_console.Console(file=io.StringIO()))


def test_groups_that_the_page_has_no_room_for_are_counted(tmp_path, monkeypatch):
    rows = head_rows([2], groups=("a", "b", "c"))
    for row in rows:
        row["count"] = {"a": 10, "b": 30, "c": 20}[row["group"]]
    path = write_run(tmp_path / "run", rows)
    monkeypatch.setattr("attncap.report.data.BUDGET", 3 * len(STATS) * len(content.MEASURES) * 2 * 8)
    data = chart_data(write_report(path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert data["runs"][0]["groups"] == ["", "b", "c"]
    assert data["runs"][0]["dropped"] == 1


def test_heads_in_sentences_lead_to_their_pages(run, tmp_path):
    html = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'previous token: <a href="#head-0-0-2">layer 0 head 2</a> (mean 0.93)' in html


def test_the_groups_that_differ_most_are_named(tmp_path):
    rows = head_rows([2], groups=("news", "code"))
    for row in rows:
        if (row["stat"], row["head"], row["group"]) == ("sink_mass", 1, "code"):
            row["mean"] = 0.75
    findings = content.build_report(read_run(write_run(tmp_path / "run", rows))).findings
    assert any("Groups differ most at layer 0 head 1" in one and "0.75 for code and 0." in one for one in findings)


def test_several_runs_stand_on_one_page(run, tmp_path):
    other = write_run(tmp_path / "other", head_rows([4, 3], means={("sink_mass", 1, 0): 0.2}), model={"name": "tuned"})
    html = write_report([run, other], tmp_path / "report.html").read_text(encoding="utf-8")
    data = chart_data(html)
    assert [one["label"] for one in data["runs"]] == ["run", "other"]
    (comparison,) = data["comparisons"]
    stat = next(place for place, one in enumerate(comparison["stats"]) if one["stat"] == "sink_mass")
    mean_a, mean_b, difference, _, p = unpacked(comparison["numbers"])[stat, :, 1, 0]
    assert (mean_a, mean_b) == (0.7, 0.2)
    assert difference == pytest.approx(0.5)
    assert np.isnan(p)
    text = Page(html).text
    assert "The runs are of two models, tiny (A) and tuned (B)" in text
    assert "Nothing was tested: not both runs have sequences.parquet" in text


def test_runs_that_cannot_be_compared_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="given twice"):
        write_report([run, run], tmp_path / "report.html")
    other = write_run(tmp_path / "other", head_rows([4, 4, 4]), model={"name": "larger"})
    with pytest.raises(
        RunMismatchError, match=r"7 heads \(tiny\) and 12 \(larger\); compare runs of models of one shape"
    ):
        write_report([run, other], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_is_not_finished_is_refused(run, tmp_path):
    unfinished = write_run(tmp_path / "unfinished", head_rows([2]), status="running")
    with pytest.raises(RunError, match=r"not finished .*finishes it"):
        write_report(unfinished, tmp_path / "report.html")


def test_of_many_pairs_each_head_keeps_its_largest_and_smallest(run, tmp_path, monkeypatch):
    monkeypatch.setattr("attncap.report.data.MOST_PAIRS", 10)
    monkeypatch.setattr("attncap.report.data._PAIRS_OF_A_HEAD", 1)
    heads = [(0, head) for head in range(4)] + [(1, head) for head in range(3)]
    pairs = [(one, other) for place, one in enumerate(heads) for other in heads[place + 1 :]]
    module = "encoder.layer.{}.attention"
    places = {}
    for prefix, side in (("", 0), ("other_", 1)):
        places[f"{prefix}layer"] = [pair[side][0] for pair in pairs]
        places[f"{prefix}module"] = [module.format(pair[side][0]) for pair in pairs]
        places[f"{prefix}head"] = [pair[side][1] for pair in pairs]
    values = np.random.default_rng(0).random(len(pairs)).tolist()
    save_result(run, Result("links", "Links", "", "pairs", (Column("link", "", ""),), {**places, "link": values}))
    data = chart_data(write_report(run, tmp_path / "report.html").read_text(encoding="utf-8"))
    (result,) = data["runs"][0]["results"]
    kept = unpacked(result["numbers"])[0]
    assert result["dropped"] == len(pairs) - len(kept) > 0
    assert {max(values), min(values)} <= set(kept.tolist())


def test_results_of_heads_that_the_run_lacks_are_left_out(run, tmp_path):
    places = {"layer": [0, 9], "module": ["another name", "none"], "head": [1, 0]}
    save_result(run, Result("score", "Score", "", "heads", (Column("score", "", ""),), {**places, "score": [0.5, 1.0]}))
    data = chart_data(write_report(run, tmp_path / "report.html").read_text(encoding="utf-8"))
    grid = unpacked(data["runs"][0]["results"][0]["numbers"])[0, 0]
    assert grid[0, 1] == 0.5
    assert np.isfinite(grid).sum() == 1
