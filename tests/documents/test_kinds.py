"""What may be a document: token ids and images beside text, in files and datasets."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from attncap.corpus import Corpus, CorpusError, CorpusOptions, ShardSize
from attncap.models import load_model
from attncap.options import ScanOptions
from attncap.scan import scan
from tests import tiny
from tests.scan.scans import Messages

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
        options=ScanOptions(workers=2),
    )
    expected = scan(
        str(folder / "model"),
        [str(tiny.write_jsonl(tmp_path / "c.jsonl", texts))],
        tmp_path / "texts",
        options=ScanOptions(workers=2),
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
    fault = "document 1: is an image, and the model reads text, which must be strings and no bytes"
    assert any(fault in said for said in messages.said)
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


def test_a_folder_with_a_file_of_a_datasets_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "page.txt").write_text("a page")
    corpus = Corpus([str(tmp_path)])
    assert [text for shard in corpus.shards(corpus.survey()) for text in shard.texts] == ["a page"]


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
