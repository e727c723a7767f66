"""The report in a real browser: what it shows, walked with the keyboard, read aloud, on paper; how fast it opens."""

from __future__ import annotations

import csv
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from attncap.analysis.compare import compare
from attncap.analysis.results import Column, Result, save_result
from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.report import write_report
from attncap.scan import DEFAULT_SPEC, scan
from attncap.store import Run, read_run
from tests import tiny
from tests.runs import head_rows, write_run

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    os.environ.get("ATTNCAP_CHROMIUM"),
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

HOSTILE = "<img src=x onerror=alert(1)>\"'&"
HEADS = [(layer, head) for layer in range(tiny.LAYERS) for head in range(tiny.HEADS)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as drive:
        # As root, in a container, Chromium has no sandbox; its graphics process is not needed.
        launched = drive.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run with two groups, both tables and three analyses, and a run of the same model over other texts."""
    folder = tmp_path_factory.mktemp("runs")
    model = str(tiny.save_model(folder / "model"))
    kept = ScanOptions(keep=("sequences", "rows"), workers=1)
    corpora = {"grouped": 5, "other": 6}
    for name, seed in corpora.items():
        lines = [f'{{"text": "{text}", "kind": "{"ab"[i % 2]}"}}' for i, text in enumerate(tiny.texts(20, seed))]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        corpus = CorpusOptions(limit=20, group_by="kind" if name == "grouped" else None)
        scan(
            model,
            [str(folder / f"{name}.jsonl")],
            folder / name,
            spec=DEFAULT_SPEC,
            corpus_options=corpus,
            options=kept,
        )
    for result in results():
        save_result(folder / "grouped", result)
    return {name: read_run(folder / name) for name in corpora}


def results() -> list[Result]:
    module = "encoder.layer.{}.attention.self"
    places = {"layer": [row for row, _ in HEADS], "module": [module.format(row) for row, _ in HEADS]}
    places["head"] = [head for _, head in HEADS]
    score = Column("score", "share", "How much.", zero=True)
    first, second = (Column(name, "nats", "A place.") for name in ("across", "up"))
    numbers = {"score": [0.5, -0.25, 0.125, 0.75], "across": [0.0, 1.0, 2.0, 3.0], "up": [0.0, 2.0, 1.0, 0.0]}
    pair = {name: values[:1] for name, values in places.items()}
    pair |= {f"other_{name}": values[3:] for name, values in places.items()}
    curve = {"removed": [0, 1, 2], "loss": [1.0, 1.5, 4.0]}
    heads = {**places, **numbers}
    plane = "across", "up"
    return [
        Result("likeness", "Heads alike", "Near heads are alike.", "heads", (score, first, second), heads, plane),
        Result("links", "Links", "Which reads which.", "pairs", (score,), {**pair, "score": [0.3]}),
        Result("loss", "Loss", "What it costs.", "curve", tuple(Column(name, "", name) for name in curve), curve),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs on one page."""
    return write_report([run.path for run in runs.values()], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that notes what must not be: messages on the console, errors, requests of anything but the file."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    made = context.new_page()
    bad: list[str] = []
    made.on("console", lambda message: bad.append(message.text))
    made.on("pageerror", lambda error: bad.append(str(error)))
    made.on("dialog", lambda dialog: bad.append(dialog.message))
    made.on("request", lambda request: request.url.startswith(("file:", "blob:", "data:")) or bad.append(request.url))
    yield made
    context.close()
    assert bad == []


def cells(page: Any, selector: str = "#chart") -> dict[tuple[int, int], str]:
    """(row, head) -> what a screen reader says of a cell."""
    found = page.eval_on_selector_all(
        f"{selector} [data-head]", "all => all.map(one => [one.dataset.row, one.dataset.head, one.ariaLabel])"
    )
    return {(int(row), int(head)): label for row, head, label in found}


def number_of(label: str) -> float:
    """The number in "layer 0 head 1: 0.250 probability"."""
    return float(label.split(": ", 1)[1].split(" ")[0])


def download(page: Any, selector: str) -> list[dict[str, str]]:
    with page.expect_download() as waiting:
        page.click(selector)
    return list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))


def test_the_map_shows_the_table_and_changes_with_the_choosers(page, report, runs):
    page.goto(report.as_uri())
    rows = runs["grouped"].heads.to_pylist()
    seen = set()
    for stat, group, measure in (("Breadth", "a", "mean"), ("Breadth", "b", "mean"), ("Entropy", "b", "p95")):
        page.select_option("#choose-stat", label=stat)
        page.select_option("#choose-group", label=group)
        page.select_option("#choose-measure", measure)
        name = {"Breadth": "relative_entropy", "Entropy": "entropy"}[stat]
        expected = {(r["layer"], r["head"]): r[measure] for r in rows if r["stat"] == name and r["group"] == group}
        shown = cells(page)
        assert set(shown) == set(HEADS)
        assert all(
            abs(number_of(label) - expected[place]) < 0.01 * abs(expected[place]) for place, label in shown.items()
        )
        seen.add(page.locator("#chart").screenshot())
    assert len(seen) == 3


def test_all_groups_together_and_the_difference_of_two(page, report, runs):
    page.goto(report.as_uri())
    page.select_option("#choose-stat", label="Breadth")
    means: dict[str, dict[tuple[int, int], tuple[float, int]]] = {"a": {}, "b": {}}
    for row in runs["grouped"].heads.to_pylist():
        if row["stat"] == "relative_entropy":
            means[row["group"]][row["layer"], row["head"]] = row["mean"], row["count"]
    for place, label in cells(page).items():
        (mean_a, count_a), (mean_b, count_b) = means["a"][place], means["b"][place]
        together = (mean_a * count_a + mean_b * count_b) / (count_a + count_b)
        assert number_of(label) == pytest.approx(together, abs=1e-3)
    page.select_option("#choose-group", label="a")
    page.select_option("#choose-less", label="b")
    for place, label in cells(page).items():
        assert number_of(label) == pytest.approx(means["a"][place][0] - means["b"][place][0], rel=1e-2)


def test_the_numbers_that_are_downloaded_are_those_of_the_table(page, report, runs):
    page.goto(report.as_uri())
    for label, run in zip(("grouped", "other"), runs.values(), strict=True):
        page.select_option("#choose-run", label=label)
        found = {}
        for row in download(page, "#save-csv"):
            found[row["layer"], row["head"], row["stat"], row["group"]] = row
        table = [row for row in run.heads.to_pylist() if row["count"]]
        assert len(found) == len(table)
        for row in table:
            shown = found[str(row["layer"]), str(row["head"]), row["stat"], row["group"]]
            for name in ("count", "mean", "std", "min", "max", "p05", "p50", "p95"):
                assert float(shown[name] or "nan") == pytest.approx(row[name], rel=0, abs=0, nan_ok=True)


def test_the_keyboard_reaches_everything(page, report):
    page.goto(report.as_uri())
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert {"theme", "choose-stat", "choose-group", "choose-measure", "tile", "save-csv", "choose-column"} <= {
        name.split(" ")[0] for name in reached
    }
    page.focus("#chart [data-head]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[document.activeElement.dataset.row, document.activeElement.dataset.head]") == ["1", "1"]
    assert "layer 1 head 1" in page.inner_text("#tip")
    page.keyboard.press("Enter")
    page.wait_for_selector("#head:not([hidden])")
    assert page.evaluate("document.activeElement.textContent") == "Layer 1 head 1"
    page.go_back()
    page.wait_for_selector("#overview:not([hidden])")
    assert page.evaluate("[document.activeElement.dataset.row, document.activeElement.dataset.head]") == ["1", "1"]


def test_the_page_of_a_head_has_its_roles_numbers_and_the_way_to_others(page, report, runs):
    page.goto(report.as_uri() + "#head-0-0-1")
    page.select_option("#head-group", label="a")
    text = page.inner_text("#head")
    assert "encoder.layer.0.attention.self · grouped · a" in text
    row = page.locator("#head tr", has_text="Entropy").first.inner_text().split()
    (mean,) = (
        row["mean"]
        for row in runs["grouped"].heads.to_pylist()
        if (row["layer"], row["head"], row["stat"], row["group"]) == (0, 1, "entropy", "a")
    )
    assert f"{mean:.2f}" in " ".join(row)
    headings = page.locator("#head h2").all_inner_texts()
    expected = ["Beside the other heads", "By group", "Between the runs", "In the analyses", "Where it looks"]
    assert headings == [*expected, "Tokens that receive most", "Distribution", "Profile", "Heads like it"]
    page.click("#head-steps a[rel=next]")
    page.wait_for_function("document.querySelector('#head-title').textContent === 'Layer 1 head 0'")


def test_a_token_says_where_it_looks(page, report, runs):
    page.goto(report.as_uri() + "#head-0-1-0")
    token = page.locator(".example .token").nth(2)
    token.hover()
    said = page.locator(".example .said").first.inner_text()
    assert said.startswith(f"{token.inner_text()} looks at: ")
    page.locator(".example .token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") == "1"


def test_two_runs_are_compared(page, report, runs):
    page.goto(report.as_uri())
    found = {
        (d.layer, d.head): d for d in compare(*(run.path for run in runs.values())).differences if d.stat == "entropy"
    }
    page.select_option("#comparison-0 .choose-stat", label="Entropy")
    for place, label in cells(page, "#comparison-0").items():
        assert number_of(label) == pytest.approx(found[place].effect, rel=0.01)
    rows = download(page, "#comparison-0 .save")
    assert {(int(r["layer"]), int(r["head"])): float(r["p_corrected"]) for r in rows if r["stat"] == "entropy"} == {
        place: one.p_corrected for place, one in found.items()
    }


def test_analyses_are_sections(page, report):
    page.goto(report.as_uri())
    assert number_of(cells(page, "#result-0-0")[1, 0]) == 0.125
    assert page.locator("#result-0-0 .scatter circle").count() == len(HEADS)
    assert [option.strip() for option in page.locator("#result-0-0 .choose-column").inner_text().split()] == ["score"]
    assert "layer 0 head 0 and layer 1 head 1 0.300 share" in page.inner_text("#result-0-1")
    assert page.locator("#result-0-2 polyline").count() == 1
    assert download(page, "#result-0-2 .save") == [
        {"removed": "0", "loss": "1"}, {"removed": "1", "loss": "1.5"}, {"removed": "2", "loss": "4"},
    ]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#head-0-1-1"])
def test_nothing_stands_in_the_way_of_a_screen_reader(browser, report, theme, address):
    """axe-core: names, roles, contrast, order of headings."""
    page = browser.new_page(color_scheme=theme)
    page.goto(report.as_uri() + address)
    violations = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == []
    page.close()


@pytest.mark.parametrize("address", ["", "#head-0-0-0", "#head-1-1-1"])
def test_it_fits_a_phone(page, report, address):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(report.as_uri() + address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_themes_change_the_colours_and_paper_is_white(page, report):
    page.goto(report.as_uri())
    cell, ground = (
        "document.querySelector('#chart [data-head]').style.backgroundColor",
        "getComputedStyle(document.body).backgroundColor",
    )
    light = page.evaluate(cell), page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(cell), page.evaluate(ground)
    assert light[0] != dark[0]
    assert light[1] == "rgb(255, 255, 255)" != dark[1]
    page.evaluate(f"window.addEventListener('beforeprint', () => {{ window.printed = {cell}; }})")
    assert len(page.pdf()) > 10_000
    assert page.evaluate("window.printed") == light[0]
    assert page.evaluate(cell) == dark[0]
    page.emulate_media(media="print")
    page.evaluate("document.querySelector('#chart').style.width = '150px'")  # paper is narrower than the screen was
    assert page.evaluate("document.querySelector('#chart table').offsetWidth") <= 150
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert not page.locator(".controls").first.is_visible()


def test_hostile_names_stay_text(page, tmp_path):
    rows = head_rows([2, 2], stats=(HOSTILE, "entropy"), module=HOSTILE + "{}", groups=(HOSTILE, "b"))
    path = write_run(tmp_path / "run", rows, model={"name": HOSTILE}, corpus={"sources": [HOSTILE]}, tags=[HOSTILE])
    page.goto(write_report(path, tmp_path / "report.html").as_uri())
    page.hover("#chart [data-head]")
    assert HOSTILE in page.inner_text("#tip")
    page.click("#chart [data-head]")
    assert HOSTILE + "0" in page.inner_text("#head")
    assert page.locator("img").count() == 0


def test_a_large_model_is_small_and_fast(page, tmp_path):
    """32 layers of 32 heads and 12 statistics, with both kinds of details: under 10 MB, on the screen within 2 s."""
    stats = [f"offset_mass[{offset}]" for offset in range(-6, 6)]
    modules = [f"model.layers.{layer}.self_attn" for layer in range(32)]
    layer, head, position = (one.ravel() for one in np.meshgrid(range(32), range(32), range(64), indexing="ij"))
    source = np.random.default_rng(0)
    key = source.integers(0, 64, (len(layer), 8)).astype(np.int32)
    columns = {
        "document": pa.array(np.zeros(len(layer), np.int64)),
        "group": pa.array(["all"] * len(layer)).dictionary_encode(),
        "layer": pa.array(layer.astype(np.int32)),
        "module": pa.DictionaryArray.from_arrays(pa.array(layer.astype(np.int32)), pa.array(modules)),
        "call": pa.array(np.zeros(len(layer), np.int32)),
        "head": pa.array(head.astype(np.int32)),
        "position": pa.array(position.astype(np.int32)),
        "token": pa.array((position % 30).astype(np.int32)),
        **{stat: pa.array(source.random(len(layer), np.float32)) for stat in stats},
        "topk_index": pa.array(list(key)),
        "topk_prob": pa.array(list(source.random(key.shape, np.float32))),
    }
    rows = head_rows([32] * 32, stats=stats, module="model.layers.{}.self_attn")
    run = write_run(tmp_path / "run", rows, tables={"rows": pa.table(columns)})
    report = write_report(run, tmp_path / "report.html")
    assert report.stat().st_size < 10_000_000
    seconds = []
    for address in ("", "#head-0-31-31"):
        begun = time.perf_counter()
        page.goto("about:blank")
        page.goto(report.as_uri() + address)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seconds.append(time.perf_counter() - begun)
    assert page.locator("#head .figures figure").count() == 2 * len(stats)
    # Two seconds on a machine of its own; tests share theirs.
    assert min(seconds) < 2
    assert max(seconds) < 4
