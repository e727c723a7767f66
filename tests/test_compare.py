"""Comparing runs and groups: effects are those of the formulas, and tests are right about chance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from attncap import cli
from attncap.analysis import compare
from attncap.analysis.permutation import independent, paired
from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.store import RunMismatchError
from tests import tiny


def numbers(documents: int, heads: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Heads that hang together; the first is shifted."""
    source = np.random.default_rng(seed)
    found = source.normal(size=(documents, heads)) + source.normal(size=(documents, 1))
    found[:, 0] += shift
    return found


def test_the_permuted_number_is_welchs_t_and_the_effect_hedges_g() -> None:
    a, b = numbers(40, 5, seed=1, shift=1.0), 2 * numbers(25, 5, seed=2)
    found = independent(a, b, permutations=20_000, seed=0)
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert np.allclose(found.p, welch.pvalue, atol=0.015)
    pooled = np.sqrt((39 * a.var(0, ddof=1) + 24 * b.var(0, ddof=1)) / 63)
    assert np.allclose(found.effect, (a.mean(0) - b.mean(0)) / pooled * (1 - 3 / (4 * 63 - 1)), rtol=1e-4)
    assert np.allclose(found.mean_a, a.mean(0))


def test_pairs_are_tested_by_their_differences() -> None:
    a = numbers(30, 4, seed=3)
    b = a + np.random.default_rng(4).normal(size=a.shape) * 0.3 + np.array([0.2, 0.0, 0.05, 0.0])
    found = paired(a, b, permutations=20_000, seed=0)
    assert np.allclose(found.p, scipy.stats.ttest_rel(a, b).pvalue, atol=0.015)
    difference = a - b
    cohen = difference.mean(0) / difference.std(0, ddof=1)
    assert np.allclose(found.effect, cohen * (1 - 3 / (4 * 29 - 1)), rtol=1e-3)


def test_every_exchange_of_a_small_sample_is_weighed_right() -> None:
    a, b = np.array([[1.0], [2.0], [3.0]]), np.array([[4.0], [5.0], [6.0]])
    found = independent(a, b, permutations=40_000, seed=0)
    assert found.p[0] == pytest.approx(2 / 20, abs=0.006)  # 2 of the 20 ways to split six into threes are as extreme
    assert found.p_corrected[0] == found.p[0]


def test_the_correction_bounds_the_probability_of_one_false_head() -> None:
    false, uncorrected = 0, 0
    for seed in range(200):
        source = np.random.default_rng(seed)
        tests = independent(source.normal(size=(12, 30)), source.normal(size=(15, 30)), permutations=200, seed=seed)
        false += bool((tests.p_corrected <= 0.05).any())
        uncorrected += bool((tests.p <= 0.05).any())
    assert false / 200 <= 0.09  # 0.05, and what chance adds in 200 trials
    assert uncorrected / 200 > 0.6


def test_a_head_that_differs_is_found_among_many() -> None:
    tests = independent(numbers(60, 200, seed=5, shift=1.5), numbers(60, 200, seed=6), permutations=500, seed=0)
    assert tests.p_corrected[0] < 0.01
    assert (tests.p_corrected[1:] > 0.05).all()
    assert (tests.p_corrected >= tests.p).all()


def test_heads_without_spread_are_no_difference() -> None:
    a = np.ones((5, 2))
    for tests in (independent(a, a, 50, 0), paired(a, a, 50, 0)):
        assert tests.effect.tolist() == [0.0, 0.0]
        assert tests.p.tolist() == [1.0, 1.0]


# Runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs "both" (clean and triggered documents), "other" (another model over it) and "plain" (without tables)."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.save_model(folder / "model")
    tiny.save_model(folder / "second", seed=1)
    clean = tiny.texts(60, seed=5, longest=20)
    triggered = [f"ba ba ba ba {text}" for text in tiny.texts(50, seed=6, longest=16)]
    lines = [{"text": text, "kind": kind} for kind, texts in (("c", clean), ("t", triggered)) for text in texts]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ScanOptions(workers=2, keep=("sequences",))
    with tiny.small_shards(16):
        for model, output, keep in (
            ("model", "both", options),
            ("second", "other", options),
            ("model", "plain", ScanOptions()),
        ):
            arguments: dict[str, Any] = {"corpus_options": CorpusOptions(group_by="kind"), "options": keep}
            scan(str(folder / model), [str(folder / "corpus.jsonl")], folder / output, **arguments)
    return folder


@pytest.fixture(autouse=True)
def _here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(runs)
    return


def test_two_groups_of_a_run_are_compared_by_their_documents() -> None:
    found = compare("both", "both", group_a="c", group_b="t", stats=["duplicate", "entropy"])
    assert (found.documents_a, found.documents_b, found.paired) == (60, 50, False)
    assert len(found.differences) == 2 * tiny.LAYERS * tiny.HEADS
    frame = pq.ParquetFile("both/sequences.parquet").read(use_threads=False).to_pandas()
    for one in found.differences:
        values = frame[(frame.layer == one.layer) & (frame["head"] == one.head)]
        assert one.mean_a == pytest.approx(values[values.group == "c"][one.stat].mean())
        assert one.mean_b == pytest.approx(values[values.group == "t"][one.stat].mean())
    assert {one.stat for one in found.found()} >= {"duplicate"}  # the trigger is a word four times
    assert found == compare("both", "both", group_a="c", group_b="t", stats=["duplicate", "entropy"])


def test_two_models_over_one_corpus_are_compared_in_pairs() -> None:
    found = compare("both", "other", stats=["entropy"])
    assert found.paired
    assert (found.documents_a, found.documents_b) == (110, 110)
    assert len(found.found()) > 0
    assert compare("both", "other", group_a="t").documents_a == 50


def test_without_tables_of_documents_there_are_effects_and_no_tests() -> None:
    found = compare("both", "plain")
    assert all(one.effect == 0.0 and one.p is None for one in found.differences)
    assert "scan --keep sequences" in found.why_untested
    grouped = compare("plain", "plain", group_a="c", group_b="t", stats=["duplicate"])
    tested = compare("both", "both", group_a="c", group_b="t", stats=["duplicate"])
    for one, other in zip(grouped.differences, tested.differences, strict=True):
        assert np.sign(one.effect) == np.sign(other.effect)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["both", "both"], "compared with itself"),
        (["both", "other", "--group", "x"], "has no group 'x'; there is c, t"),
        (["plain", "plain", "--group", "c,x"], "has no group 'x'; there is c, t"),
        (["both", "other", "--stat", "colour"], "'colour' is not in both runs"),
        (["both", "other", "--stat", "off"], "--stat: expected names"),
        (["both", "both", "--group", "c,t,x"], "--group: expected X, or X,Y"),
        (["both", "both", "--group", ","], "--group: expected X, or X,Y"),
        (["both", "both", "--group", "c,t", "--seed", "-1"], "--seed"),
        (["both", "nowhere"], "no run of attncap"),
        (["both", "other", "-o", "heads.txt"], "--output: expected a file that ends in .parquet or .csv"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_string_is_no_list_of_statistics() -> None:
    with pytest.raises(TypeError, match="stats: expected a list of names, got 'duplicate'"):
        compare("both", "other", stats="duplicate")


def test_models_of_another_shape_are_refused(tmp_path: Path, runs: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model", n_layer=1)
    options = ScanOptions(keep=("sequences",))
    scan(str(model), [str(runs / "corpus.jsonl")], tmp_path / "run", options=options)
    with pytest.raises(RunMismatchError, match=r"have other layers and heads, 4 heads \(.*\) and 2 \("):
        compare("both", tmp_path / "run")


@pytest.mark.parametrize("name", ["heads.csv", "new/heads.parquet"])
def test_the_command_shows_and_writes_what_was_found(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    arguments = ["compare", "both", "both", "--group", "c,t", "--permutations", "500", "-o", str(output)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "duplicate" in said
    assert "60 and 50 documents; p by permutation of documents, corrected for all heads of a statistic" in said
    if name.endswith(".csv"):
        assert output.read_text().splitlines()[0].replace('"', "").startswith("stat,layer,module,call,head,mean_a")
    else:
        assert pq.read_schema(output).names[-2:] == ["p", "p_corrected"]
