"""`attncap analyse`: what a run's model and documents say is kept in the run, once; what cannot be had is said."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attncap.analysis import (
    circuits,
    dependency_accuracy,
    head_importance,
    mixing_ratio,
    output_weight,
    positional_heads,
    read_conllu,
    word_encoder,
)
from attncap.analysis.of_run import NAMES, analyse
from attncap.analysis.results import CURVE, PAIRS, Result, read_results
from attncap.corpus import CorpusOptions
from attncap.models import load_model
from attncap.options import ScanOptions
from attncap.progress import Progress
from attncap.scan import scan
from attncap.store import RunError, RunMismatchError
from tests import tiny

RESULTS = {
    "circuits", "composition", "groups", "output_weight", "mixing", "positional", "similarity", "head_distances",
    "importance", "pruning",
}  # fmt: skip


def scanned(folder: Path, model: Path, groups: bool = False) -> Path:
    """A run of the model over 40 texts, of two groups or of one."""
    corpus = folder / "texts.jsonl"
    lines = [{"text": text, "kind": "ab"[place % 2]} for place, text in enumerate(tiny.texts(40, seed=3, longest=30))]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ScanOptions(keep=("sequences",) if groups else (), workers=1)
    corpus_options = CorpusOptions(group_by="kind" if groups else None)
    return scan(str(model), [str(corpus)], folder / "run", corpus_options=corpus_options, options=options).path


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    return scanned(folder, tiny.save_model(folder / "model"), groups=True)


def causal_model(folder: Path) -> Path:
    """A GPT-2 with its language-modelling head, and the tokenizer of `tiny.save_gpt2`."""
    tiny.save_gpt2(folder)
    config = transformers.GPT2Config.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def of_layers(result: Result, column: str) -> list[list[float]]:
    """The numbers of every layer, by head."""
    found = result.by_head(column)
    layers = range(max(layer for layer, _ in found) + 1)
    return [[found[layer, head] for head in range(sum(at == layer for at, _ in found))] for layer in layers]


def batches_of(run: Path, model: Any, number: int) -> list[dict[str, Any]]:
    """Documents evenly spaced over the 40, one a batch."""
    texts = [json.loads(line)["text"] for line in (run.parent / "texts.jsonl").read_text().splitlines()]
    chosen = [texts[place * 40 // number] for place in range(number)]
    encoded = [model.tokenizer(text, truncation=True, return_tensors="pt") for text in chosen]
    return [{name: one[name] for name in one} for one in encoded if one["input_ids"].shape[1] > 1]


def close(found: Sequence[Sequence[float]], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-4, atol=1e-6)


def test_every_analysis_of_a_model_without_a_head(bert_run: Path) -> None:
    before = {path.name: path.read_bytes() for path in bert_run.iterdir() if path.is_file()}
    found = analyse(bert_run, documents=12)
    assert found.refused == {}
    assert set(found.results) == RESULTS
    assert found.computed == tuple(name for name in NAMES if name != "syntax")  # for which no sentences were given
    assert set(read_results(bert_run)) == RESULTS
    assert {path.name: path.read_bytes() for path in bert_run.iterdir() if path.is_file()} == before

    loaded = load_model(str(bert_run.parent / "model"))
    batches = batches_of(bert_run, loaded, 12)
    results = found.results
    close(of_layers(results["circuits"], "copying"), circuits(loaded.model).copying)
    close(of_layers(results["output_weight"], "share"), output_weight(loaded.model, batches).share)
    close(of_layers(results["mixing"], "ratio"), mixing_ratio(loaded.model, batches).head)
    shares = [head.share for head in positional_heads(loaded.model, batches)]
    assert results["positional"].data["share"] == pytest.approx(shares)
    assert results["composition"].kind == PAIRS
    assert results["composition"].rows == tiny.HEADS**2
    assert results["head_distances"].rows == 6  # two of four heads
    assert results["similarity"].plane == ("x", "y")
    assert "40" not in results["mixing"].text
    assert results["mixing"].made_from["documents"] == len(batches)
    assert "of importance with the share of the layer's output" in results["importance"].text
    assert "no language-modelling head" in results["importance"].text
    curve = results["pruning"]
    assert curve.kind == CURVE
    assert curve.data["removed"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [values[0] for name, values in curve.data.items() if name != "removed"] == pytest.approx([0.0] * 6, abs=1e-6)
    assert len({round(values[-1], 9) for name, values in curve.data.items() if name != "removed"}) == 1


def test_what_is_there_is_not_computed_again(bert_run: Path) -> None:
    analyse(bert_run, documents=12)
    files = {path: path.stat().st_mtime_ns for path in (bert_run / "analyses").iterdir()}
    again = analyse(bert_run, documents=12)
    assert again.computed == ()
    assert set(again.results) == RESULTS
    assert {path: path.stat().st_mtime_ns for path in (bert_run / "analyses").iterdir()} == files

    mixing, leftover = bert_run / "analyses" / "mixing.parquet", bert_run / "analyses" / "mixing.parquet.ab12.tmp"
    whole = mixing.read_bytes()
    mixing.write_bytes(whole[: len(whole) // 2])
    leftover.write_bytes(b"")
    assert analyse(bert_run, documents=12).computed == ("mixing",)
    assert not leftover.exists()
    assert set(analyse(bert_run, only=["circuits", "positional"], documents=6).computed) == {"positional"}


def test_a_language_model_is_held_to_its_own_loss(tmp_path: Path) -> None:
    run = scanned(tmp_path, causal_model(tmp_path / "model"))
    found = analyse(run, only=["importance"], documents=8)
    result = found.results["importance"]
    assert result.columns[0].unit == "nats per token"
    assert "cross-entropy of the next token" in result.text
    loaded = load_model(str(tmp_path / "model"))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    batches = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in batches_of(run, loaded, 8)]
    expected = head_importance(model, batches, lambda model, one: model(**one).loss * (one["labels"].shape[1] - 1))
    close(of_layers(result, "importance"), expected)
    with torch.no_grad():
        whole = sum(float(model(**one).loss) for one in batches) / len(batches)
    assert found.results["pruning"].data["importance"][0] == pytest.approx(whole, rel=1e-5)


def test_a_masked_language_model_too(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    config = transformers.BertConfig.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForPreTraining(config).save_pretrained(folder)
    run = scanned(tmp_path, folder)
    found = analyse(run, only=["importance"], documents=8)
    assert "masked" in found.results["importance"].text
    assert min(found.results["importance"].data["importance"]) > 0
    again = analyse(run, only=["importance"], documents=7)
    assert again.computed == ("importance",)


def test_sentences_with_dependencies_make_syntax(tmp_path: Path, bert_run: Path) -> None:
    path = tmp_path / "sentences.conllu"
    words = ("ba", "de", "fi", "go", "ku")
    lines = [f"{place + 1}\t{word}\t_\t_\t_\t_\t{place}\tnext\t_\t_\n" for place, word in enumerate(words)]
    path.write_text("".join(lines) + "\n")
    result = analyse(bert_run, only=["syntax"], conllu=path).results["syntax"]
    loaded = load_model(str(bert_run.parent / "model"))
    direct = dependency_accuracy(loaded.model, word_encoder(loaded.tokenizer), read_conllu(path))
    expected = direct.accuracy[direct.relations.index("next"), 0]
    assert result.by_head("to_head", "next") == pytest.approx(
        {(layer, head): float(expected[layer, head]) for layer in range(2) for head in range(2)}
    )
    assert set(result.data["group"]) == {"all", "next"}
    assert set(result.by_head("baseline", "next").values()) == {1.0}
    assert analyse(bert_run, only=["syntax"], conllu=path).computed == ()
    path.write_text("".join(lines[:3]) + "\n")
    assert analyse(bert_run, only=["syntax"], conllu=path).computed == ("syntax",)
    with pytest.raises(ValueError, match="conllu: expected a CoNLL-U file for syntax, got none"):
        analyse(bert_run, only=["syntax"])
    with pytest.raises(ValueError, match="no such file"):
        analyse(bert_run, conllu=tmp_path / "none")


def test_a_vision_model(digit_runs: tuple[Path, Path]) -> None:
    found = analyse(digit_runs[0], documents=10)
    assert found.refused == {}
    assert set(found.results) == RESULTS
    assert len(found.results["mixing"].data["ratio"]) == 8


def test_what_cannot_be_had_is_said_and_the_rest_is_done(tmp_path: Path) -> None:
    tiny.save_gpt2(tmp_path / "model")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=40, use_parallel_residual=True
    )
    transformers.GPTNeoXModel(config).save_pretrained(tmp_path / "model")
    found = analyse(scanned(tmp_path, tmp_path / "model"), only=["groups", "mixing", "circuits"], documents=4)
    assert set(found.results) == {"circuits"}
    assert "scan with --group-by" in found.refused["groups"]
    assert "does not simply add its attention" in found.refused["mixing"]


def test_another_model_or_corpus_than_was_scanned_is_refused(tmp_path: Path) -> None:
    run = scanned(tmp_path, tiny.save_model(tmp_path / "model"))
    corpus = tmp_path / "texts.jsonl"
    text = corpus.read_text()
    corpus.write_text(text + json.dumps({"text": "ba be"}) + "\n")
    with pytest.raises(RunMismatchError, match="made from another corpus"):
        analyse(run)
    assert set(analyse(run, only=["circuits"]).results) == {"circuits"}  # for which no corpus is read
    corpus.write_text(text)
    tiny.save_model(tmp_path / "other", seed=1)
    (tmp_path / "model" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(RunMismatchError, match="made with other weights"):
        analyse(run)


def test_bad_arguments(bert_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only: expected names out of circuits, .*, got 'colour'"):
        analyse(bert_run, only=["colour"])
    with pytest.raises(ValueError, match="documents: expected at least 1, got 0"):
        analyse(bert_run, documents=0)
    with pytest.raises(RunError, match="no run of attncap"):
        analyse(tmp_path)


def test_the_command(host: tiny.CommandHost, bert_run: Path) -> None:
    code, _ = host.run(["analyse", bert_run, "--only", "circuits,mixing", "--documents", "5"])
    assert (code, "2 results under" in host.log()) == (0, True)
    assert f"mixing: {bert_run}/analyses/mixing.parquet" in host.log()
    code, _ = host.run(["analyse", bert_run, "--only", "colour"])
    assert code == 2
    assert "--only: expected names out of circuits" in host.log()
    code, _ = host.run(["report", bert_run])
    assert code == 0


def test_a_killed_command_goes_on_after_what_it_finished(host: tiny.CommandHost, tmp_path: Path) -> None:
    run = scanned(tmp_path, tiny.save_model(tmp_path / "model"), groups=True)
    first = run / "analyses" / "circuits.parquet"
    code, _ = host.run(["analyse", run, "--documents", "40"], signal=signal.SIGINT, after=first)
    assert code in (0, 130)  # it may have been done by then
    assert (code == 130) == ("finished analyses are kept" in host.log())
    written = first.stat().st_mtime_ns
    code, _ = host.run(["analyse", run, "--documents", "40"])
    assert code == 0
    assert first.stat().st_mtime_ns == written
    assert set(read_results(run)) == RESULTS


def test_a_run_with_analyses_is_still_finished(bert_run: Path) -> None:
    class Said(Progress):
        def message(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    analyse(bert_run, only=["circuits"])
    options = ScanOptions(keep=("sequences",), workers=1)
    model, corpus = str(bert_run.parent / "model"), [str(bert_run.parent / "texts.jsonl")]
    again = scan(
        model, corpus, bert_run, corpus_options=CorpusOptions(group_by="kind"), options=options, progress=Said()
    )
    assert any("complete and intact, nothing to do" in text for text in said)
    assert "circuits" in read_results(again.path)
    (bert_run / "scan.json").unlink()  # lost: the folder is still known as a run's, and the scan makes it anew
    scan(model, corpus, bert_run, corpus_options=CorpusOptions(group_by="kind"), options=options)
    assert "circuits" in read_results(bert_run)


def test_a_checkpoint_that_lacks_a_weight_is_the_same_model_each_time(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(folder)).save_pretrained(folder)
    state = torch.get_rng_state()
    first, second = load_model(str(folder)), load_model(str(folder))
    assert first.model.pooler is not None
    assert first.fingerprint == second.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


GUIDE = (Path(__file__).parent.parent / "docs" / "analyses.md").read_text(encoding="utf-8")


def test_the_guide_names_every_analysis_and_its_example_runs(
    bert_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE) == list(NAMES)
    analyse(bert_run, only=["circuits"])
    monkeypatch.chdir(bert_run.parent)
    example = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[0]
    exec(compile(example, "docs/analyses.md", "exec"), {})
    assert "Circuits heads ['copying', 'output_norm', 'ov_norm', 'qk_norm']" in capsys.readouterr().out
