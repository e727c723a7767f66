"""What tables of single documents add to a report, against pandas on the same tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.report.content import build_report, pooled
from attncap.report.details import BINS, LENGTH, POSITION, read_details
from attncap.report.examples import OUTSIDE, token_names
from attncap.scan import DEFAULT_SPEC, scan
from attncap.store import Run, RunError, read_run
from tests import tiny
from tests.runs import head_rows, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("details")
    model = str(tiny.save_model(folder / "model"))
    corpus = str(tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(12, seed=3)))
    options = ScanOptions(keep=("sequences", "rows"), workers=1)
    return scan(
        model, [corpus], folder / "run", spec=DEFAULT_SPEC, corpus_options=CorpusOptions(limit=12), options=options
    )


@pytest.fixture(scope="module")
def rows(run: Run) -> pd.DataFrame:
    return pd.read_parquet(run.path / "rows.parquet")


def without_rows(run: Run, folder: Path) -> Run:
    """The same run that kept sequences alone."""
    copy = read_run(run.path)
    (folder / "sequences.parquet").write_bytes((run.path / "sequences.parquet").read_bytes())
    return Run(path=folder, heads=copy.heads, scan=copy.scan)


def of_head(table: pd.DataFrame, layer: int, head: int) -> pd.DataFrame:
    return table[(table["layer"] == layer) & (table["head"] == head)]


def test_distributions_count_every_row(run, rows):
    details = read_details(run, build_report(run))
    assert details.distributions.of == "tokens"
    for place, stat in enumerate(details.stats):
        values = of_head(rows, 1, 0)[stat].dropna()
        low, high = details.distributions.ends[place]
        counts, _ = np.histogram(values.clip(low, high), bins=BINS, range=(low, high))
        shares = details.distributions.shares[place, 1, 0]
        assert shares.sum() == pytest.approx(1)
        # A value on the edge of two bins may fall on either side by rounding.
        assert np.abs(np.cumsum(shares) - np.cumsum(counts) / len(values)).max() <= 1.5 / len(values)


def test_profiles_are_means_by_position(run, rows):
    details = read_details(run, build_report(run))
    assert details.profiles.over == POSITION
    bins = pd.cut(of_head(rows, 0, 1)["position"], details.profiles.edges, right=False)
    means = of_head(rows, 0, 1).groupby(bins, observed=False)["entropy"].mean()
    found = details.profiles.means[details.stats.index("entropy"), 0, 1]
    np.testing.assert_allclose(found, means, rtol=1e-6)
    assert details.profiles.edges[-1] == rows["position"].max() + 1


def test_sequences_alone_give_documents_and_their_lengths(run, tmp_path):
    details = read_details(without_rows(run, tmp_path), build_report(run))
    table = of_head(pd.read_parquet(run.path / "sequences.parquet"), 1, 1)
    assert (details.distributions.of, details.profiles.over) == ("documents", LENGTH)
    assert details.examples == ()
    assert details.receivers is None
    means = table.groupby(pd.cut(table["tokens"], details.profiles.edges, right=False), observed=False)[
        "distance"
    ].mean()
    np.testing.assert_allclose(details.profiles.means[details.stats.index("distance"), 1, 1], means, rtol=1e-6)


def test_the_tokens_that_receive_most(run, rows):
    receivers = read_details(run, build_report(run)).receivers
    tokens = of_head(rows, 0, 0).set_index(["document", "position"])["token"]
    sums: dict[int, float] = {}
    for row in of_head(rows, 1, 1).itertuples():
        for key, probability in zip(row.topk_index, row.topk_prob, strict=True):
            if key >= 0:
                token = int(tokens[row.document, key])
                sums[token] = sums.get(token, 0.0) + float(probability)
    names = token_names(sums, run.scan["model"]["name"])
    expected = sorted(((total / sum(sums.values()), names[token]) for token, total in sums.items()), reverse=True)
    found = [receivers.names[place] for place in receivers.tokens[1, 1]]
    assert found[0] == expected[0][1]
    np.testing.assert_allclose(receivers.shares[1, 1], [share for share, _ in expected[: len(found)]], rtol=1e-5)


def test_examples_are_documents_and_where_each_token_looks(run, rows):
    examples = read_details(run, build_report(run)).examples
    assert len(examples) == 3
    for one in examples:
        table = of_head(rows, 1, 0)
        table = table[table["document"] == one.document].sort_values("position")
        assert one.tokens[0] == "[CLS]"
        assert len(one.tokens) == len(table)
        keys = np.stack(table["topk_index"])[:, : one.keys.shape[-1]]
        np.testing.assert_array_equal(one.keys[1, 0], np.where(keys < 0, OUTSIDE, keys))
        np.testing.assert_array_equal(one.probabilities[1, 0], np.stack(table["topk_prob"])[:, : one.keys.shape[-1]])


def test_tokens_have_numbers_where_the_tokenizer_is_gone(tmp_path):
    assert token_names([3, 1, -1], str(tmp_path / "gone")) == {1: "#1", 3: "#3"}


def test_a_run_without_tables_has_no_details(tmp_path):
    run = read_run(write_run(tmp_path / "run", head_rows([2, 2])))
    assert read_details(run, build_report(run)) is None


def test_a_damaged_table_is_refused_by_name(run, tmp_path):
    damaged = without_rows(run, tmp_path)
    (tmp_path / "sequences.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"sequences\.parquet: damaged .*delete the file for a report without it"):
        read_details(damaged, build_report(run))


def test_groups_are_pooled_as_their_rows_would_be():
    source = np.random.default_rng(0)
    values = [source.normal(size=(3, 2, count)) for count in (5, 50)]
    nothing = {name: np.full((3, 2), np.nan) for name in ("mean", "std", "min", "max", "p05", "p50", "p95")}
    groups = [
        {
            **nothing,
            "mean": one.mean(-1),
            "std": one.std(-1),
            "min": one.min(-1),
            "max": one.max(-1),
            "count": np.full((3, 2), one.shape[-1]),
        }
        for one in values
    ]
    whole, found = np.concatenate(values, -1), pooled([*groups, {**nothing, "count": np.zeros((3, 2))}])
    for name, expected in (
        ("mean", whole.mean(-1)),
        ("std", whole.std(-1)),
        ("min", whole.min(-1)),
        ("max", whole.max(-1)),
    ):
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
    assert np.all(found["count"] == 55)
    assert np.isnan(found["p50"]).all()
