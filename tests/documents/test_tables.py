"""Tables of single documents, and what can be computed from them."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from attncap import scan as scan_module
from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.progress import Progress
from attncap.scan import scan
from attncap.store import Run, RunError, RunFolder
from attncap.types import StatSpec
from tests import tiny
from tests.documents.languages import LANGUAGES
from tests.scan.scans import Messages


@functools.cache
def eager_model(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model)."""
    model = transformers.AutoModel.from_pretrained(folder / "model", attn_implementation="eager").eval()
    return transformers.AutoTokenizer.from_pretrained(folder / "model"), model


@functools.cache
def eager_maps(folder: Path, document: int | str) -> tuple[np.ndarray, list[int]]:
    """(layers, heads, N, N) of the eager model over a document of the corpus, or a text, and its tokens."""
    tokenizer, model = eager_model(folder)
    text = document if isinstance(document, str) else tiny.texts(70, seed=5)[document]
    inputs = tokenizer(text, truncation=True, max_length=tiny.LONGEST, return_tensors="pt")
    with torch.no_grad():
        maps = torch.cat(model(**inputs, output_attentions=True).attentions)
    return maps.numpy(), inputs["input_ids"][0].tolist()


def test_sequences_have_a_row_per_document_layer_and_head(folder: Path, kept: Run) -> None:
    table = pq.ParquetFile(kept.path / "sequences.parquet").read(use_threads=False)
    assert table.num_rows == 70 * tiny.LAYERS * tiny.HEADS
    rows = table.to_pylist()
    keys = [(row["document"], row["layer"], row["head"]) for row in rows]
    assert keys == sorted(keys)
    for row in rows[:40] + rows[-8:]:
        maps, tokens = eager_maps(folder, row["document"])
        p = maps[row["layer"], row["head"]]
        assert row["tokens"] == len(tokens)
        assert row["group"] == LANGUAGES[row["document"] % 3]
        assert row["module"] == f"encoder.layer.{row['layer']}.attention.self"
        assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
        assert row["sink_mass"] == pytest.approx(p[:, :4].sum(-1).mean(), rel=1e-4)
        assert row["received_mass_largest"] == pytest.approx(p.sum(0).max(), rel=1e-4)
        counts = np.bincount(p.argmax(-1))
        assert row["focus_key_share"] == pytest.approx(counts.max() / len(tokens))
        assert row["focus_key"] == counts.argmax()
        offsets = p.argmax(-1) - np.arange(len(tokens))
        assert row["focus_offset_share"] == pytest.approx((offsets == row["focus_offset"]).mean())


def test_means_of_sequences_are_those_of_the_heads(kept: Run) -> None:
    table = pq.ParquetFile(kept.path / "sequences.parquet").read(use_threads=False).to_pandas()
    for row in kept.heads.to_pylist():
        if row["stat"] in ("entropy", "topk_mass", "distance", "induction") and row["group"] == "en":
            mine = table[(table.group == "en") & (table.layer == row["layer"]) & (table["head"] == row["head"])]
            mean = (mine[row["stat"]] * mine.tokens).sum() / mine.tokens.sum()
            assert mean == pytest.approx(row["mean"], rel=1e-4)


def test_pandas_polars_and_duckdb_read_a_run_alike(kept: Run) -> None:
    path = str(kept.path / "sequences.parquet")
    # The sink rate of Gu 2025: sequences thresholded before they are averaged.
    frame = pd.read_parquet(path)
    by_pandas = (frame.sink_mass > 0.3).groupby([frame.layer, frame["head"]]).mean().to_numpy()
    by_polars = pl.read_parquet(path).group_by("layer", "head").agg((pl.col("sink_mass") > 0.3).mean())
    by_polars = by_polars.sort("layer", "head")["sink_mass"].to_numpy()
    query = f"select avg((sink_mass > 0.3)::int) from '{path}' group by layer, head order by layer, head"
    by_duckdb = np.array(duckdb.sql(query).fetchall())[:, 0]
    assert np.allclose(by_pandas, by_polars)
    assert np.allclose(by_pandas, by_duckdb)
    heads = str(kept.path / "heads.parquet")
    assert pd.read_parquet(heads).shape == pl.read_parquet(heads).shape
    assert duckdb.sql(f"select count(*) from '{heads}'").fetchall()[0][0] == kept.heads.num_rows


def test_rows_have_every_position_of_a_document(folder: Path, tmp_path: Path) -> None:
    options = ScanOptions(workers=1, keep=("rows",))
    corpus = [str(folder / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", corpus_options=CorpusOptions(limit=3), options=options)
    rows = pq.ParquetFile(tmp_path / "run" / "rows.parquet").read(use_threads=False).to_pylist()
    tokens = [eager_maps(folder, number)[1] for number in range(3)]
    assert len(rows) == sum(map(len, tokens)) * tiny.LAYERS * tiny.HEADS
    for row in rows[::7]:
        maps, _ = eager_maps(folder, row["document"])
        p = maps[row["layer"], row["head"], row["position"]]
        assert row["token"] == tokens[row["document"]][row["position"]]
        assert row["max_prob"] == pytest.approx(p.max(), rel=1e-4)
        assert row["topk_index"][0] == p.argmax()
        assert row["topk_prob"][0] == pytest.approx(p.max(), rel=1e-4)


def test_rows_need_a_limit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: rows is for single examples, so it needs a limit"):
        scan(str(folder / "model"), [str(folder / "corpus.jsonl")], tmp_path, options=ScanOptions(keep=("rows",)))


def test_sink_rate_and_focus_heads_can_be_computed_from_sequences(folder: Path, tmp_path: Path) -> None:
    """Gu 2025: documents whose first key has more than 0.3 of the mean row. Lyu 2022: most rows look at one key."""
    options = ScanOptions(workers=1, keep=("sequences",))
    arguments = {"spec": StatSpec(sink=1), "corpus_options": CorpusOptions(limit=20), "options": options}
    scan(str(folder / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run", **arguments)
    frame = pd.read_parquet(tmp_path / "run" / "sequences.parquet")
    by_head = frame.groupby(["layer", "head"])
    sink_rate = by_head.sink_mass.agg(lambda mass: (mass > 0.3).mean())
    focus = by_head.focus_key_share.agg(lambda share: (share > 0.5).mean())
    assert sink_rate.between(0.01, 0.99).any()
    assert focus.between(0.01, 0.99).any()
    maps = [eager_maps(folder, number)[0] for number in range(20)]  # (layers, heads, queries, keys) each
    for layer, head in sink_rate.index:
        probabilities = [one[layer, head] for one in maps]
        assert sink_rate[layer, head] == pytest.approx(np.mean([p[:, 0].mean() > 0.3 for p in probabilities]))
        most = [np.bincount(np.asarray(p.argmax(-1))).max() / len(p) for p in probabilities]
        assert focus[layer, head] == pytest.approx(np.mean([share > 0.5 for share in most]))


def test_the_retrieval_score_can_be_computed_from_rows(folder: Path, tmp_path: Path) -> None:
    """Wu 2024: the share of a needle's tokens that a head's top key copies while the answer repeats the needle."""
    needle, hay = tiny.texts(40, seed=8)[0].split()[:6], tiny.texts(40, seed=9)[3].split()[:8]
    text = " ".join([*needle, *hay, *needle])
    tiny.write_jsonl(tmp_path / "corpus.jsonl", [text])
    place, answer = range(1, 7), range(15, 21)  # after [CLS]

    options = ScanOptions(workers=1, keep=("rows",))
    corpus = [str(tmp_path / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", corpus_options=CorpusOptions(limit=1), options=options)
    frame = pd.read_parquet(tmp_path / "run" / "rows.parquet")
    maps, tokens = eager_maps(folder, text)
    scores = {}
    for (layer, head), rows in frame.groupby(["layer", "head"]):
        rows = rows.set_index("position")
        top = rows.topk_index.str[0]
        # The row before a token of the answer is the one that says it.
        copied = {
            rows.token[key]
            for said in answer
            if (key := top[said - 1]) in place and rows.token[key] == rows.token[said]
        }
        scores[layer, head] = len(copied) / len(set(rows.token[list(place)]))
        tops = np.asarray(maps[layer, head].argmax(-1))
        expected = {
            tokens[said] for said in answer if tops[said - 1] in place and tokens[tops[said - 1]] == tokens[said]
        }
        assert scores[layer, head] == len(expected) / len({tokens[key] for key in place})
    assert max(scores.values()) > 0


KEEPING: dict[str, Any] = {
    "corpus_options": CorpusOptions(group_by="lang"),
    "options": ScanOptions(workers=1, keep=("sequences",)),
}


@pytest.fixture(scope="module")
def unwritten(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its last shard, before its tables."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    run = tmp_path_factory.mktemp("unwritten") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_SHARDS_BETWEEN_MERGES", 2)
        patch.setattr(scan_module, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            scan(str(folder / "model"), [str(folder / "corpus.jsonl")], run, **KEEPING)
    return run


@pytest.mark.parametrize("damaged", ["parts/00001.sequences.bin", "parts/00004.bin", "sequences.parquet"])
def test_a_damaged_table_is_made_again(
    folder: Path, kept: Run, unwritten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    monkeypatch.setattr(scan_module, "_SHARDS_BETWEEN_MERGES", 2)
    run = shutil.copytree(kept.path if damaged == "sequences.parquet" else unwritten, tmp_path / "run")
    data = bytearray((run / damaged).read_bytes())
    data[len(data) // 2] ^= 255
    (run / damaged).write_bytes(data)
    messages = Messages()
    scan(str(folder / "model"), [str(folder / "corpus.jsonl")], run, progress=messages, **KEEPING)
    assert any("damaged" in said for said in messages.said)
    for name in ("heads.parquet", "sequences.parquet", "scan.json"):
        assert (run / name).read_bytes() == (kept.path / name).read_bytes()
    assert not list(run.glob("parts"))


def test_the_size_of_a_table_is_said_and_a_small_disk_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ScanOptions(keep=("sequences",))
    model, corpus = str(folder / "model"), [str(folder / "corpus.jsonl")]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    messages = Messages()
    with pytest.raises(RunError, match=r"--keep sequences may take .* are free; give --limit"):
        scan(model, corpus, tmp_path / "run", options=options, progress=messages)
    assert any("sequences.parquet: about 1 MiB at most" in said for said in messages.said)
    assert RunFolder(tmp_path / "run").read_scan() is None


def test_nothing_is_kept_where_nothing_is_asked_for(folder: Path, tmp_path: Path) -> None:
    spec = StatSpec(entropy=False, max=False, sink=0, diagonal=None, topk=0)
    options = ScanOptions(tags=(), keep=("sequences",))
    corpus = [str(folder / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", spec=spec, options=options, progress=Progress())
    table = pq.read_schema(tmp_path / "run" / "sequences.parquet")
    assert table.names == ["document", "group", "layer", "module", "call", "head", "tokens", "lse"]
