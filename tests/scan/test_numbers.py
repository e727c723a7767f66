"""A scan is right, held against eager maps, for models of several kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from attncap.corpus import CorpusOptions
from attncap.models import load_model
from attncap.options import ScanOptions
from attncap.report.content import build_report
from attncap.scan import scan
from attncap.shards import one_thread_per_operator
from attncap.store import Run, RunMismatchError
from attncap.types import StatSpec
from tests import tiny
from tests.scan.scans import DOCUMENTS, run_scan

# What it says.


def eager_rows(folder: Path, documents: list[str]) -> dict[str, list[np.ndarray]]:
    """Statistic -> (layers, heads, rows) of each document, from the maps of the eager model in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModel.from_pretrained(folder / "model", attn_implementation="eager", dtype=torch.float64)
    rows: dict[str, list[np.ndarray]] = {}
    for text in documents:
        inputs = tokenizer(text, truncation=True, max_length=tiny.LONGEST, return_tensors="pt")
        with torch.no_grad(), one_thread_per_operator():
            maps = torch.cat(model.eval()(**inputs, output_attentions=True).attentions).numpy()
        tokens = inputs["input_ids"][0].numpy()
        position = np.arange(len(tokens))
        distance = np.abs(position[:, None] - position)
        after = np.concatenate([[-1], tokens[:-1]])
        entropy = -(maps * np.log(np.maximum(maps, 1e-300))).sum(-1)
        special = np.isin(tokens, tokenizer.all_special_ids)
        found = {
            "entropy": entropy,
            "relative_entropy": entropy / np.log(len(tokens)),
            "max_prob": maps.max(-1),
            "sink_mass": maps[..., :4].sum(-1),
            "diagonal_mass": (maps * (distance == 0)).sum(-1),
            "distance": (maps * distance).sum(-1),
            "collision": (maps**2).sum(-1),
            "offset_mass[-1]": (maps * (position[:, None] - position == 1)).sum(-1),
            "offset_mass[1]": (maps * (position[:, None] - position == -1)).sum(-1),
            "topk_mass": np.sort(maps, -1)[..., -8:].sum(-1),
            "received_mass": maps.sum(-2),
            "duplicate": (maps * (tokens[:, None] == tokens)).sum(-1),
            "induction": (maps * (tokens[:, None] == after)).sum(-1),
            "special_tokens": maps[..., special].sum(-1),
        }
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return rows


def test_every_number_is_that_of_the_eager_maps(folder: Path, finished: Run) -> None:
    expected = eager_rows(folder, tiny.texts(DOCUMENTS))
    table = finished.heads.to_pylist()
    assert {row["stat"] for row in table} == expected.keys() | {"lse", "max_logit"}
    assert len(table) == (len(expected) + 2) * tiny.LAYERS * tiny.HEADS
    for row in table:
        assert row["group"] == "all"
        assert row["module"] == f"encoder.layer.{row['layer']}.attention.self"
        if row["stat"] not in expected:
            continue
        values = np.concatenate([document[row["layer"], row["head"]] for document in expected[row["stat"]]])
        assert row["count"] == len(values)
        for name, wanted in (
            ("mean", values.mean()),
            ("std", values.std()),
            ("min", values.min()),
            ("max", values.max()),
        ):
            assert row[name] == pytest.approx(wanted, rel=1e-5, abs=2e-6), (row["stat"], name)
        for name, quantile in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            low, high = np.quantile(values, [max(quantile - 0.01, 0), min(quantile + 0.01, 1)])
            assert low - abs(low) / 32 - 1e-4 <= row[name] <= high + abs(high) / 32 + 1e-4, (row["stat"], name)


def test_a_scan_of_one_document_is_that_documents_map(folder: Path, tmp_path: Path) -> None:
    for number, text in enumerate(tiny.texts(4, seed=9)):
        corpus = tiny.write_jsonl(tmp_path / f"{number}.jsonl", [text])
        heads = scan(str(folder / "model"), [str(corpus)], tmp_path / f"run{number}").heads.to_pylist()
        maps = eager_rows(folder, [text])
        for row in heads:
            if row["stat"] in maps:
                wanted = maps[row["stat"]][0][row["layer"], row["head"]].mean()
                assert row["mean"] == pytest.approx(wanted, rel=1e-5, abs=2e-6)


def test_counts_are_those_of_the_corpus(folder: Path, finished: Run) -> None:
    lengths = [len(text.split()) + 2 for text in tiny.texts(DOCUMENTS)]
    assert finished.scan["counts"] == {
        "documents": DOCUMENTS,
        "tokens": sum(min(length, tiny.LONGEST) for length in lengths),
        "truncated_documents": sum(length > tiny.LONGEST for length in lengths),
        "empty_documents": 0,
        "failed_documents": 0,
        "nonfinite_rows": 0,
    }
    assert finished.scan["limits"] == {"max_tokens": tiny.LONGEST}
    assert finished.scan["progress"] == {"shards_done": 5, "shards_total": 5}


def test_scan_json_says_what_was_scanned(folder: Path, finished: Run) -> None:
    assert list(finished.scan) == [
        "format", "status", "model", "corpus", "spec", "tags", "features", "limits", "options", "versions", "impl",
        "counts", "progress", "heads_sha256",
    ]  # fmt: skip
    assert finished.scan["status"] == "complete"
    model = finished.scan["model"]
    assert (model["architecture"], model["layers"], model["heads"]) == ("BertModel", tiny.LAYERS, tiny.HEADS)
    assert finished.scan["corpus"]["sources"] == [str(folder / "corpus.jsonl")]
    assert finished.scan["spec"]["offsets"] == [-1, 1]


def test_empty_and_failed_documents_are_counted(folder: Path, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", ["ba be", "", 5, " \n", "di do"])
    options = CorpusOptions(on_error="skip")
    counts = scan(str(folder / "model"), [str(corpus)], tmp_path / "run", corpus_options=options).scan["counts"]
    assert (counts["documents"], counts["empty_documents"], counts["failed_documents"]) == (2, 2, 1)


def test_only_what_is_asked_for_is_captured(folder: Path, tmp_path: Path) -> None:
    spec = StatSpec(entropy=True, max=False, sink=0, diagonal=None, topk=0)
    run = run_scan(folder, tmp_path / "run", spec=spec, options=ScanOptions(tags=()))
    assert {row["stat"] for row in run.heads.to_pylist()} == {"lse", "entropy", "relative_entropy"}


def test_rows_that_are_not_finite_are_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(tmp_path / "model")
    model.embeddings.position_embeddings.weight.data[20] = torch.nan
    model.save_pretrained(tmp_path / "model")
    run = scan(str(tmp_path / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run")
    rows = [row for row in run.heads.to_pylist() if row["stat"] == "entropy"]
    lost = run.scan["counts"]["tokens"] * len(rows) - sum(row["count"] for row in rows)
    assert run.scan["counts"]["nonfinite_rows"] == lost > 0
    (said,) = (one for one in build_report(run).findings if "not finite" in one)
    assert f"{run.scan['counts']['nonfinite_rows']:,} rows" in said
    assert "--dtype float32" in said


# Sizes.


def test_the_size_of_shards_is_part_of_the_run(folder: Path, finished: Run, tmp_path: Path) -> None:
    run = run_scan(folder, tmp_path / "run", options=ScanOptions(shard_characters=6000))
    assert run.scan["progress"]["shards_total"] > 5
    assert run.scan["options"]["shard"]["characters"] == 6000
    for mine, theirs in zip(run.heads.to_pylist(), finished.heads.to_pylist(), strict=True):
        assert mine["count"] == theirs["count"]
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-6)
    with pytest.raises(RunMismatchError, match=r"options\.shard\.characters is 6000 there"):
        run_scan(folder, tmp_path / "run")


def test_the_size_of_batches_changes_rounding_at_most(folder: Path, finished: Run, tmp_path: Path) -> None:
    for batch_tokens in (1, 333):
        run = run_scan(folder, tmp_path / str(batch_tokens), options=ScanOptions(batch_tokens=batch_tokens))
        for mine, theirs in zip(run.heads.to_pylist(), finished.heads.to_pylist(), strict=True):
            assert mine["count"] == theirs["count"]
            assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-6)


# Other kinds of models.


def tiny_gpt2(**sizes: Any) -> Any:
    return transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=20, **sizes))


def tiny_roberta(**sizes: Any) -> Any:
    # Positions are counted from 2 on here, so that of 30 embeddings 28 can be used.
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.RobertaModel(
        transformers.RobertaConfig(**shape, **sizes, max_position_embeddings=30, pad_token_id=1)
    )


def tiny_t5(**sizes: Any) -> Any:
    return transformers.T5Model(transformers.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, **sizes))


@pytest.mark.parametrize(("build", "longest"), [(tiny_gpt2, 20), (tiny_roberta, 28), (tiny_t5, tiny.LONGEST)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_models_are_scanned_to_their_own_length(
    folder: Path, tmp_path: Path, build: Callable[..., Any], longest: int, dtype: str
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = load_model(str(folder / "model")).tokenizer
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    build(vocab_size=len(tokenizer), **special).save_pretrained(tmp_path / "model")
    heads: list[bytes] = []
    for workers in (1, 2):
        output = tmp_path / f"run{workers}"
        options = ScanOptions(workers=workers, dtype=dtype)
        run = scan(str(tmp_path / "model"), [str(folder / "corpus.jsonl")], output, options=options)
        heads.append((output / "heads.parquet").read_bytes())
        assert run.scan["limits"] == {"max_tokens": longest}
        assert run.scan["options"]["dtype"] == dtype
        assert run.scan["counts"]["documents"] == DOCUMENTS
        assert {row["layer"] for row in run.heads.to_pylist()} == {0, 1}
    assert heads[0] == heads[1]


@pytest.mark.slow
def test_minilm_has_a_previous_token_head(tmp_path: Path) -> None:
    run = scan("builtin:minilm", ["builtin:docstrings"], tmp_path / "run", corpus_options=CorpusOptions(limit=24))
    means = {(row["layer"], row["head"], row["stat"]): row["mean"] for row in run.heads.to_pylist()}
    assert means[0, 2, "offset_mass[-1]"] > 0.7
    assert run.scan["limits"] == {"max_tokens": 512}
