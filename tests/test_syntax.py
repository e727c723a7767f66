"""Dependencies: read as CoNLL-U has them, found where a head was made to find them, and counted as the maps have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap.analysis import dependency_accuracy, read_conllu, row_blocks, word_encoder
from attncap.analysis.syntax import ALL, FROM_HEAD, TO_HEAD, ConlluError, Sentence
from attncap.models import load_model
from tests import maps, models

SAMPLE = Path(__file__).parent / "sample.conllu"
FIRST, DETERMINER, NOUN, ADVERB, VERB, VERB_END = range(6)


def test_sentences_are_read_with_their_words_alone() -> None:
    found = read_conllu(SAMPLE)
    assert len(found) == 8
    second = found[1]
    assert second.words == ("She", "does", "n't", "read", "the", "newspaper", ".")  # doesn't is no word of its own
    assert second.heads == (3, 3, 3, -1, 5, 3, 3)
    assert second.relations[:3] == ("nsubj", "aux", "advmod")


class TwoHeads(nn.Module):
    """Head 0: nouns look at verbs, determiners at nouns. Head 1: verbs look at nouns. Others look everywhere alike."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = nn.Parameter(torch.zeros(2, 6, 6), requires_grad=False)
        self.looks[0, NOUN, VERB] = self.looks[0, NOUN, VERB_END] = 6.0
        self.looks[0, DETERMINER, NOUN] = self.looks[1, VERB, NOUN] = self.looks[1, VERB_END, NOUN] = 6.0

    def forward(self, input_ids: Tensor) -> Tensor:
        one_hot = F.one_hot(input_ids, 6).float()[:, None]
        query, key = one_hot @ self.looks, one_hot.expand(-1, 2, -1, -1)
        return F.scaled_dot_product_attention(query, key, key, scale=1.0)


def encode(words: Sequence[str]) -> tuple[Any, list[int | None]]:
    """A first token that is no word's, and verbs of two tokens."""
    ids, word_of = [FIRST], [None]
    for place, word in enumerate(words):
        tokens = {"det": [DETERMINER], "noun": [NOUN], "adv": [ADVERB], "verb": [VERB, VERB_END]}[word]
        ids += tokens
        word_of += [place] * len(tokens)
    return torch.tensor([ids]), word_of


def sentence(adverbs: int) -> Sentence:
    words = ("det", "noun", *["adv"] * adverbs, "verb")
    verb = adverbs + 2
    return Sentence(words, (1, verb, *[verb] * adverbs, -1), ("det", "nsubj", *["advmod"] * adverbs, "root"))


def test_heads_that_were_made_to_find_a_relation_find_it() -> None:
    found = dependency_accuracy(TwoHeads(), encode, [sentence(adverbs) for adverbs in range(4)])
    assert found.relations == (ALL, "advmod", "det", "nsubj")
    assert found.counts == (14, 6, 4, 4)
    accuracy = {
        (relation, direction): found.accuracy[place, side, 0].tolist()
        for place, relation in enumerate(found.relations)
        for side, direction in enumerate((TO_HEAD, FROM_HEAD))
    }
    assert accuracy["nsubj", TO_HEAD][0] == 1
    assert accuracy["nsubj", FROM_HEAD][1] == 1
    assert accuracy["det", TO_HEAD][0] == 1
    best = {one.relation: one for one in found.best()}
    assert (best["nsubj"].head, best["nsubj"].direction, best["nsubj"].accuracy) == (0, TO_HEAD, 1.0)
    assert (best["nsubj"].offset, best["nsubj"].baseline) == (1, 0.25)  # the verb is 1, 2, 3 or 4 words behind
    assert (best["det"].offset, best["det"].baseline) == (1, 1.0)
    assert [one.relation for one in found.best(fewest=5)] == [ALL, "advmod"]


def word_map(prob: Tensor, word_of: Sequence[int | None], words: int) -> Tensor:
    """(H, W, W): summed over the tokens looked at, averaged over those that look; no word looks at itself."""
    member = torch.tensor([[word == place for word in word_of] for place in range(words)]).double()
    found = (member / member.sum(-1, keepdim=True)) @ prob.double() @ member.T
    return found - 2 * torch.eye(words)


@pytest.mark.parametrize("block", [1, 60, 1 << 20])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_accuracies_are_those_of_the_maps(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK", block)
    model = models.text_model(kind)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (4, 12), generator=generator)
    word_of = [None, 0, 1, 1, 2, 3, 3, 3, 4, 5, 5, None]
    heads = torch.randint(5, (4, 6), generator=generator)
    sentences = []
    for row in heads:
        others = [int(head) + (int(head) >= word) for word, head in enumerate(row)]
        sentences.append(Sentence(tuple("abcdef"), tuple(others), ("x", "y", "x", "y", "x", "y")))
    batches = iter([{"input_ids": row[None]} for row in ids])
    found = dependency_accuracy(model, lambda words: (next(batches), word_of), sentences)
    hits = torch.zeros(2, 2, 2, 4, dtype=torch.float64)
    for row, one in zip(ids, sentences, strict=True):
        with torch.no_grad():
            attentions = maps.eager(model)(input_ids=row[None], output_attentions=True).attentions
        for layer, prob in enumerate(attentions):
            between = word_map(prob[0], word_of, 6)
            for word, head in enumerate(one.heads):
                relation = word % 2
                hits[relation, 0, layer] += between[:, word].argmax(-1) == head
                hits[relation, 1, layer] += between[:, :, word].argmax(-1) == head
    assert found.relations == (ALL, "x", "y")
    torch.testing.assert_close(found.accuracy[1:], hits / 12)
    torch.testing.assert_close(found.accuracy[0], hits.sum(0) / 24)


def test_minilm_has_heads_that_find_determiners_and_subjects() -> None:
    minilm = load_model("builtin:minilm")
    found = dependency_accuracy(minilm.model, word_encoder(minilm.tokenizer), read_conllu(SAMPLE))
    best = {one.relation: one for one in found.best(5)}
    assert found.left_out == 0
    assert best["det"].accuracy > best["det"].baseline + 0.3
    assert best["nsubj"].accuracy > best["nsubj"].baseline + 0.2


def test_sentences_that_do_not_fit_are_left_out() -> None:
    minilm = load_model("builtin:minilm")
    found = dependency_accuracy(minilm.model, word_encoder(minilm.tokenizer, max_tokens=11), read_conllu(SAMPLE))
    tokens = [
        len(minilm.tokenizer(list(one.words), is_split_into_words=True)["input_ids"]) for one in read_conllu(SAMPLE)
    ]
    assert found.left_out == sum(number > 11 for number in tokens) == 4
    with pytest.raises(ValueError, match="sentences: expected some with dependencies"):
        dependency_accuracy(minilm.model, word_encoder(minilm.tokenizer, max_tokens=3), read_conllu(SAMPLE))


def test_what_is_no_conllu_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.conllu"
    line = "1\ta\ta\tX\t_\t_\t{}\tdep\t_\t_\n"
    for content, message in (
        ("one two three\n", "is not CoNLL-U"),
        ("", "has no sentence"),
        (line.format(7), "sentence 1 has a word whose head is no word of it"),
        (line.format("_"), "sentence 1 has a word whose head is no word of it"),
        (line.format(1), "expected another of 1 words"),
    ):
        path.write_text(content)
        with pytest.raises(ConlluError, match=message):
            read_conllu(path)
    with pytest.raises(ValueError, match="expected one for each of 2 words, got 1 and 2"):
        Sentence(("a", "b"), (1,), ("x", "y"))
    with pytest.raises(ValueError, match="encode: expected a word for each of 3 tokens, got 2"):
        dependency_accuracy(
            TwoHeads(), lambda _: (torch.tensor([[1, 2, 3]]), [0, 1]), [Sentence(("a", "b"), (1, -1), ("x", "y"))]
        )
