"""Which heads prefer groups: the share of variance is that of the formula, and tests are right about chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from attncap.analysis import group_preference
from attncap.analysis.permutation import by_group
from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.store import RunMismatchError, read_run
from tests import tiny, trained
from tests.digit_runs import A_CLASS
from tests.runs import head_rows, write_run


def test_eta_squared_and_its_p_are_those_of_an_analysis_of_variance() -> None:
    source = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 15, 25])
    values = source.normal(size=(60, 5)) + labels[:, None] * np.array([0.0, 0.1, 0.2, 0.4, 1.0])
    found = by_group(values, labels, permutations=20_000, seed=0)
    for head in range(5):
        parts = [values[labels == label, head] for label in range(3)]
        test = scipy.stats.f_oneway(*parts)
        assert found.eta_squared[head] == pytest.approx(2 * test.statistic / (2 * test.statistic + 57))
        assert found.p[head] == pytest.approx(test.pvalue, abs=0.015)
    assert (found.p_corrected >= found.p).all()


def test_the_correction_bounds_the_probability_of_one_false_head() -> None:
    false = 0
    labels = np.repeat([0, 1, 2], 8)
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=(24, 30))
        false += bool((by_group(values, labels, 200, seed).p_corrected <= 0.05).any())
    assert false / 200 <= 0.09  # 0.05, and what chance adds in 200 trials


def test_heads_without_variance_prefer_nothing_and_groups_without_variance_everything() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    values = np.stack([np.full(6, 0.1), labels * 0.3], 1)
    found = by_group(values, labels, 500, seed=0)
    assert found.eta_squared.tolist() == pytest.approx([0, 1])
    assert found.p[0] == 1
    assert found.p[1] == pytest.approx(0.1, abs=0.05)  # 2 of the 20 ways to split six into threes


def test_without_the_table_of_documents_rows_are_what_varies(tmp_path: Path) -> None:
    rows = head_rows([2], stats=("entropy",), groups=("a", "b"))
    means = {("a", 0): 1.0, ("b", 0): 1.2, ("a", 1): 2.0, ("b", 1): 2.0}
    for row in rows:
        row["mean"], row["std"] = means[row["group"], row["head"]], 0.1
    found = group_preference(write_run(tmp_path / "run", rows))
    assert [one.eta_squared for one in found.heads] == pytest.approx([0.5, 0.0])  # 0.1² between, 0.1² within
    assert [one.p for one in found.heads] == [None, None]
    assert "scan --keep sequences" in found.why_untested
    assert found.found() == []
    assert found.heads[0].highest == "b"


def test_heads_of_a_vision_transformer_prefer_classes(digit_runs: tuple[Path, Path], digits_model: Any) -> None:
    pixels, digit = (part[trained.held_out()] for part in trained.digits())
    assert trained.accuracy(digits_model(pixel_values=pixels).logits, digit) > 0.85
    by_class, by_chance = (group_preference(run, stats=["entropy", "distance"], permutations=400) for run in digit_runs)
    assert by_class.sizes == {str(number): A_CLASS for number in range(10)}
    found = by_class.found(0.01)
    assert len(found) >= 4  # of 16: 8 heads, two statistics
    assert found[0].eta_squared > 3 * by_class.expected
    assert by_chance.found(0.01) == []
    # The same heads, documents and statistics, so the variances are the same: only what they are of differs.
    assert max(one.eta_squared for one in by_chance.heads) < found[0].eta_squared


def test_a_heads_numbers_are_those_of_its_documents(digit_runs: tuple[Path, Path]) -> None:
    pandas = pytest.importorskip("pandas")
    run = digit_runs[0]
    table = pandas.read_parquet(run / "sequences.parquet")
    for one in group_preference(run, stats=["entropy"], groups=["1", "8"], permutations=1).heads:
        rows = table[(table.layer == one.layer) & (table["head"] == one.head) & table.group.isin(["1", "8"])]
        entropy = rows.entropy.astype("float64")
        total = ((entropy - entropy.mean()) ** 2).sum()
        parts = [entropy[rows.group == group] for group in ("1", "8")]
        between = sum(len(part) * (part.mean() - entropy.mean()) ** 2 for part in parts)
        assert one.eta_squared == pytest.approx(between / total, rel=1e-5)
        assert one.means["8"] == pytest.approx(rows.entropy[rows.group == "8"].mean(), rel=1e-5)
        assert one.highest == max(one.means, key=lambda group: one.means[group])


def test_text_groups_are_tasks(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    words = tiny.texts(30, seed=1, longest=20)
    repeating = [" ".join([text.split()[0]] * len(text.split())) for text in words]
    path = tmp_path / "texts.csv"
    lines = [f"{text},copying" for text in repeating] + [f"{text},prose" for text in words]
    path.write_text("text,task\n" + "\n".join(lines) + "\n")
    run = scan(
        str(model), [str(path)], tmp_path / "run", corpus_options=CorpusOptions(group_by="task"),
        options=ScanOptions(keep=("sequences",), workers=1),
    )  # fmt: skip
    found = group_preference(run, permutations=200)
    duplicate = [one for one in found.found(0.05) if one.stat == "duplicate"]
    assert len(duplicate) == tiny.LAYERS * tiny.HEADS
    assert {one.highest for one in duplicate} == {"copying"}
    assert group_preference(run.path, permutations=200) == found


def test_what_cannot_be_compared_is_refused(tmp_path: Path, digit_runs: tuple[Path, Path]) -> None:
    one_group = write_run(tmp_path / "run", head_rows([2]))
    with pytest.raises(RunMismatchError, match="at least two groups, got none but all; scan with --group-by"):
        group_preference(one_group)
    with pytest.raises(RunMismatchError, match="has no group 'x'; there is 0, 1"):
        group_preference(digit_runs[0], groups=["0", "x"])
    with pytest.raises(RunMismatchError, match="at least two groups, got one"):
        group_preference(digit_runs[0], groups=["0"])
    with pytest.raises(RunMismatchError, match=r"stats: 'colour' is not in .*; there is"):
        group_preference(digit_runs[0], stats=["colour"])
    with pytest.raises(ValueError, match="permutations: expected at least 1"):
        group_preference(digit_runs[0], permutations=0)
    assert read_run(digit_runs[0]).scan["corpus"]["groups"]["0"] == A_CLASS
