"""Groups and tables of single documents, and what may be a document: token ids and images beside text."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from attncap import cli
from attncap import scan as scan_module
from attncap.corpus import Corpus, CorpusError, CorpusOptions, ShardSize
from attncap.models import ModelError, load_model
from attncap.options import ScanOptions
from attncap.progress import Progress
from attncap.scan import scan
from attncap.store import Run, RunError, RunFolder, read_run
from attncap.types import StatSpec
from tests import tiny
from tests.test_scan import Messages

LANGUAGES = ("de", "en", "fr")
WORKERS = ScanOptions(workers=2)


@pytest.fixture(scope="module", autouse=True)
def _small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "SHARD_SIZE", ShardSize(documents=16))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model, a corpus with languages, and the corpus of each language by itself."""
    folder = tmp_path_factory.mktemp("documents")
    tiny.save_model(folder / "model")
    texts = tiny.texts(70, seed=5)
    lines = [{"text": text, "lang": LANGUAGES[place % 3]} for place, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place, language in enumerate(LANGUAGES):
        tiny.write_jsonl(folder / f"{language}.jsonl", texts[place::3])
    return folder


@pytest.fixture(scope="module")
def kept(folder: Path) -> Run:
    options = ScanOptions(workers=2, keep=("sequences",))
    corpus_options = CorpusOptions(group_by="lang")
    return scan(
        str(folder / "model"),
        [str(folder / "corpus.jsonl")],
        folder / "kept",
        corpus_options=corpus_options,
        options=options,
    )


# Groups.


def test_each_group_has_the_statistics_of_its_documents_alone(folder: Path, kept: Run) -> None:
    rows = kept.heads.to_pylist()
    assert {row["group"] for row in rows} == set(LANGUAGES)
    assert kept.scan["corpus"]["groups"] == {"de": 24, "en": 23, "fr": 23}
    for language in LANGUAGES:
        alone = scan(str(folder / "model"), [str(folder / f"{language}.jsonl")], folder / language, options=WORKERS)
        mine = [row for row in rows if row["group"] == language]
        for row, expected in zip(mine, alone.heads.to_pylist(), strict=True):
            assert [row[name] for name in ("layer", "head", "stat", "count")] == [
                expected[name] for name in ("layer", "head", "stat", "count")
            ]
            for name in ("mean", "std", "min", "max"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-6)


def test_groups_change_no_bit_with_the_number_of_workers(folder: Path, kept: Run, tmp_path: Path) -> None:
    options = ScanOptions(workers=1, keep=("sequences",))
    corpus_options = CorpusOptions(group_by="lang")
    corpus = [str(folder / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", corpus_options=corpus_options, options=options)
    for name in ("heads.parquet", "sequences.parquet", "scan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (kept.path / name).read_bytes()


def test_a_document_without_a_group_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "g": 1}\n{"text": "b", "g": null}\n{"text": "c"}\n{"text": "d", "g": true}\n')
    survey = Corpus([str(path)], CorpusOptions(group_by="g")).survey()
    assert survey.groups == {"1": 1, "True": 1}
    assert survey.faults == (
        f"{path}:2: expected the name of a group in 'g', got None",
        f"{path}:3: no column 'g'; there is 'text' (choose with --group-by)",
    )


def test_the_group_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(group: str) -> str:
        path = tmp_path / "c.jsonl"
        path.write_text(json.dumps({"text": "a", "g": group}))
        return Corpus([str(path)], CorpusOptions(group_by="g")).survey().fingerprint

    assert fingerprint("x") != fingerprint("y")


def test_files_without_columns_are_grouped_by_their_folders(tmp_path: Path) -> None:
    for name in ("good/a.txt", "bad/b.txt", "bad/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some words")
    corpus = Corpus([str(tmp_path)], CorpusOptions(group_by="folder"))
    assert corpus.survey().groups == {"bad": 2, "good": 1}
    for source in (str(tmp_path), "builtin:docstrings"):
        with pytest.raises(CorpusError, match="has no columns"):
            Corpus([source], CorpusOptions(group_by="lang")).survey()


def test_too_many_groups_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "id": number}) + "\n" for number in range(300)))
    with pytest.raises(CorpusError, match="--group-by id: more than 256 groups"):
        Corpus([str(path)], CorpusOptions(group_by="id")).survey()


# Tables of single documents.


@functools.cache
def eager_maps(folder: Path, document: int | str) -> tuple[np.ndarray, list[int]]:
    """(layers, heads, N, N) of the eager model over a document of the corpus, or a text, and its tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModel.from_pretrained(folder / "model", attn_implementation="eager").eval()
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


@pytest.mark.parametrize("damaged", ["00001.sequences.bin", "00002.bin", "sequences.parquet"])
def test_a_damaged_table_is_made_again(
    folder: Path, kept: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    arguments: dict[str, Any] = {"corpus_options": CorpusOptions(group_by="lang")}
    arguments["options"] = ScanOptions(workers=1, keep=("sequences",))
    model, corpus, run = str(folder / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan_module, "_SHARDS_BETWEEN_MERGES", 2)
    if damaged == "sequences.parquet":
        scan(model, corpus, run, **arguments)
        path = run / damaged
    else:
        with monkeypatch.context() as patch:
            patch.setattr(scan_module, "write_table", stop)
            with pytest.raises(KeyboardInterrupt):
                scan(model, corpus, run, **arguments)
        path = run / "parts" / damaged if damaged in ("00001.sequences.bin",) else run / "parts" / "00004.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    messages = Messages()
    scan(model, corpus, run, progress=messages, **arguments)
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


# Token ids and images.


def test_token_ids_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_model(str(folder / "model")).tokenizer
    texts = tiny.texts(30, seed=8, longest=20)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    pq.write_table(pa.table({"ids": ids}), tmp_path / "ids.parquet")
    options = CorpusOptions(text_column="ids")
    found = scan(
        str(folder / "model"),
        [str(tmp_path / "ids.parquet")],
        tmp_path / "ids",
        corpus_options=options,
        options=WORKERS,
    )
    expected = scan(
        str(folder / "model"), [str(tiny.write_jsonl(tmp_path / "c.jsonl", texts))], tmp_path / "texts", options=WORKERS
    )
    assert found.scan["counts"] == expected.scan["counts"]
    for mine, theirs in zip(found.heads.to_pylist(), expected.heads.to_pylist(), strict=True):
        assert (mine["stat"], mine["count"]) == (theirs["stat"], theirs["count"])
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-6)


def test_ids_that_the_model_does_not_know_are_faults(folder: Path, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "c.jsonl", [[2, 5, 3], [2, 99999, 3], [], [2, -1], "ba be"])
    messages = Messages()
    run = scan(str(folder / "model"), [str(corpus)], tmp_path / "run", progress=messages)
    counts = run.scan["counts"]
    assert (counts["documents"], counts["empty_documents"], counts["failed_documents"]) == (2, 1, 2)
    assert any("document 1: has the token id 99999, and the model knows 35 tokens" in said for said in messages.said)
    options = CorpusOptions(on_error="stop")
    ids = tiny.write_jsonl(tmp_path / "ids.jsonl", [[2, 99999, 3]])
    with pytest.raises(CorpusError, match=r"document 0: has the token id 99999.*--on-error stop"):
        scan(str(folder / "model"), [str(ids)], tmp_path / "stopped", corpus_options=options)


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a ViT "model" for images of 32 x 32 pixels in patches of 8, and the folder "images" of two classes."""
    folder = tmp_path_factory.mktemp("vision")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTModel(config).save_pretrained(folder / "model")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    for number in range(20):
        path = folder / "images" / ("cats" if number % 2 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    return folder


def test_images_are_scanned_in_groups_of_their_folders(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(image(3)[:200])
    messages = Messages()
    run = scan(
        str(vision / "model"),
        [str(vision / "images"), str(tmp_path / "broken.png")],
        tmp_path / "run",
        corpus_options=CorpusOptions(group_by="folder"),
        progress=messages,
    )
    assert run.scan["counts"]["documents"] == 20
    assert run.scan["counts"]["failed_documents"] == 1
    assert any("document 20: is not an image that can be read" in said for said in messages.said)
    rows = [row for row in run.heads.to_pylist() if row["stat"] == "entropy" and row["group"] == "cats"]
    assert [row["count"] for row in rows] == [10 * 17] * 4
    model = transformers.AutoModel.from_pretrained(vision / "model", attn_implementation="eager").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(vision / "model")
    files = sorted((vision / "images" / "cats").iterdir())
    inputs = processor(images=[Image.open(path) for path in files], return_tensors="pt")
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions)
    entropy = -(maps * maps.log()).sum(-1).mean((1, 3)).flatten()
    assert [row["mean"] for row in rows] == pytest.approx(entropy.tolist(), rel=1e-4)


def test_images_may_be_a_column_and_text_is_no_image(vision: Path, folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [image(number) for number in range(5)]}), tmp_path / "images.parquet")
    options = CorpusOptions(text_column="image")
    run = scan(str(vision / "model"), [str(tmp_path / "images.parquet")], tmp_path / "run", corpus_options=options)
    assert run.scan["counts"]["documents"] == 5
    mixed = tiny.write_jsonl(tmp_path / "c.jsonl", ["ba be"])
    messages = Messages()
    sources = [str(mixed), str(vision / "images")]
    counts = scan(str(folder / "model"), sources, tmp_path / "mixed", progress=messages).scan["counts"]
    assert (counts["documents"], counts["failed_documents"]) == (1, 20)
    assert any("document 1: is an image, and the model reads text" in said for said in messages.said)
    for keep in ((), ("sequences",)):
        with pytest.raises(CorpusError, match=r"no document that .* reads; 20 left out, 0 without a token"):
            scan(
                str(folder / "model"),
                [str(vision / "images")],
                tmp_path / "none",
                options=ScanOptions(keep=keep),
            )
        shutil.rmtree(tmp_path / "none")


# Datasets.


def test_datasets_are_read_by_the_librarys_builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = tiny.texts(40, seed=2)
    dataset = datasets.Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(40)]})
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "built").mkdir()
    dataset.to_parquet(tmp_path / "built" / "train.parquet")

    def read(source: str) -> list[Any]:
        corpus = Corpus([source])
        survey = corpus.survey(ShardSize(documents=15))
        shards = list(corpus.shards(survey))
        assert [shard for index in range(len(shards)) for shard in corpus.shards(survey, [index])] == shards
        return [text for shard in shards for text in shard.texts]

    assert read(str(tmp_path / "saved")) == texts
    assert read(str(tmp_path / "splits")) == texts
    assert read(f"dataset:{tmp_path / 'splits'}:test") == texts[:3]
    assert read(f"dataset:{tmp_path / 'built'}") == texts
    with pytest.raises(CorpusError, match="cannot be loaded as a dataset"):
        read(f"dataset:{tmp_path / 'built'}:validation")


def test_images_of_a_dataset_are_those_of_its_files(tmp_path: Path) -> None:
    files = [image(number) for number in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    corpus = Corpus([str(tmp_path / "saved")], CorpusOptions(text_column="image", group_by="label"))
    survey = corpus.survey()
    assert survey.groups == {"0": 2, "1": 1}
    (shard,) = corpus.shards(survey)
    for found, file in zip(shard.texts, files, strict=True):
        assert isinstance(found, bytes)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found))), np.asarray(Image.open(io.BytesIO(file))))


def test_a_damaged_row_group_of_a_parquet_file_is_left_out(tmp_path: Path) -> None:
    texts = [f"{number} " + str(random.Random(number).random()) * 20 for number in range(3000)]
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 400] = b"\xff" * 400
    path.write_bytes(data)
    corpus = Corpus([str(path)])
    survey = corpus.survey()
    assert (survey.documents, survey.failed) == (2000, 1000)
    assert survey.faults[0].startswith(f"{path}: rows 1001 to 2000 are damaged")
    assert [text for shard in corpus.shards(survey) for text in shard.texts] == texts[:1000] + texts[2000:]


def test_nothing_is_kept_where_nothing_is_asked_for(folder: Path, tmp_path: Path) -> None:
    spec = StatSpec(entropy=False, max=False, sink=0, diagonal=None, topk=0)
    options = ScanOptions(tags=(), keep=("sequences",))
    corpus = [str(folder / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", spec=spec, options=options, progress=Progress())
    table = pq.read_schema(tmp_path / "run" / "sequences.parquet")
    assert table.names == ["document", "group", "layer", "module", "call", "head", "tokens", "lse"]


# Models that are spread.


@pytest.mark.parametrize("placed", ["auto", {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}])
def test_a_device_map_is_handed_through_and_changes_no_number(folder: Path, tmp_path: Path, placed: Any) -> None:
    pytest.importorskip("accelerate")
    model, corpus = str(folder / "model"), [str(folder / "de.jsonl")]
    expected = scan(model, corpus, tmp_path / "whole")
    options = ScanOptions(model={"device_map": placed, "offload_folder": str(tmp_path / "offload")})
    found = scan(model, corpus, tmp_path / "spread", options=options)
    assert found.heads == expected.heads
    assert found.scan["model"]["fingerprint"] == expected.scan["model"]["fingerprint"]
    assert found.scan["options"]["model"]["device_map"] == placed


def test_options_of_the_model_come_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["scan", str(folder / "model"), str(folder / "de.jsonl"), "-o", str(tmp_path / "run")]
    options = ["--model-option", "attn_implementation=eager", "--model-option", 'max_memory={"cpu": "1GiB"}']
    assert cli.main([*arguments, *options]) == 0
    found = read_run(tmp_path / "run").scan["options"]["model"]
    assert found == {"attn_implementation": "eager", "max_memory": {"cpu": "1GiB"}}
    assert cli.main([*arguments, "--model-option", "device_map"]) == 2


def test_an_option_that_the_model_does_not_take_is_one_message(folder: Path, tmp_path: Path) -> None:
    options = ScanOptions(model={"colour": "red"})
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        scan(str(folder / "model"), [str(folder / "de.jsonl")], tmp_path / "run", options=options)
