"""Whether the word a head looks at most is the one that a word depends on: heads against CoNLL-U dependencies.

After Clark et al. 2019 (What Does BERT Look At?, section 4.2). Attention between words is summed over the sub-word
tokens of the word looked at and averaged over those of the word that looks. It is made a few rows at a time
(`attncap.analysis.row_blocks`), of which the largest entries are kept, so memory does not grow with the square of a
sentence.

H heads   N tokens   W words   R words of one block
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import run
from attncap.analysis.row_blocks import row_block, rows_at_once
from attncap.capture import Capture
from attncap.extras import require
from attncap.types import AttncapError, HeadStats, StatSpec

TO_HEAD, FROM_HEAD = "to head", "from head"
DIRECTIONS = (TO_HEAD, FROM_HEAD)
ALL = "all"
"""The relation that is all of them together."""

Encode = Callable[[Sequence[str]], "tuple[Any, Sequence[int | None]]"]
"""Words -> (a batch of one sequence, the word of each of its tokens, None for tokens that are no word's)."""


class ConlluError(AttncapError, ValueError):
    """A file is not CoNLL-U; the message says where."""


@dataclass(frozen=True)
class Sentence:
    """Words and what each depends on.

    Attributes:
        heads: index of the word that each depends on, -1 for the root. relations: name of each dependency.
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.words)
        if not count == len(self.heads) == len(self.relations):
            got = f"{len(self.heads)} and {len(self.relations)}"
            raise ValueError(f"heads, relations: expected one for each of {count} words, got {got}")
        for word, head in enumerate(self.heads):
            if not -1 <= head < count or head == word:
                raise ValueError(f"heads: expected another of {count} words, or -1, got {head} for word {word}")


@dataclass(frozen=True)
class BestHead:
    """The head that finds a relation best, and the best that a fixed offset does.

    Attributes:
        count: of dependencies. direction: "to head": the dependent looks at its head; "from head": of all words its
            head looks at it most.
        offset: the commonest place of the head, counted in words from the dependent. baseline: its share.
    """

    relation: str
    count: int
    layer: int
    module: str
    head: int
    direction: str
    accuracy: float
    offset: int
    baseline: float


@dataclass(frozen=True)
class Syntax:
    """Accuracies of all heads.

    Attributes:
        layers: names of the attention modules.
        relations: by falling number, `ALL` first. counts: how many dependencies each has.
        accuracy: (relations, directions, layers, heads) float64, NaN where a layer has fewer heads. The best of many
            heads is good by chance where a relation has few dependencies.
        offsets, baseline: the commonest offset of each relation and its share.
        left_out: sentences with words that have no tokens, or were cut.
    """

    layers: tuple[str, ...]
    relations: tuple[str, ...]
    counts: tuple[int, ...]
    accuracy: Tensor
    offsets: tuple[int, ...]
    baseline: tuple[float, ...]
    left_out: int

    def best(self, fewest: int = 1) -> list[BestHead]:
        """The best head of each relation with so many dependencies or more."""
        return [self._best(place) for place, count in enumerate(self.counts) if count >= fewest]

    def _best(self, place: int) -> BestHead:
        table = self.accuracy[place].nan_to_num(-1.0)
        direction, layer, head = (int(index) for index in torch.unravel_index(table.argmax(), table.shape))
        return BestHead(
            relation=self.relations[place],
            count=self.counts[place],
            layer=layer,
            module=self.layers[layer],
            head=head,
            direction=DIRECTIONS[direction],
            accuracy=float(table[direction, layer, head]),
            offset=self.offsets[place],
            baseline=self.baseline[place],
        )


def read_conllu(path: str | os.PathLike[str]) -> list[Sentence]:
    """The sentences of a CoNLL-U file; multi-word tokens and empty nodes are left out, as their words are there.

    Raises:
        ConlluError: it is not CoNLL-U, or a word has no head.
        MissingExtraError: the package conllu is not installed.
    """
    conllu = require("conllu", "syntax")
    try:
        parsed = conllu.parse(Path(path).read_text(encoding="utf-8"))
    except (conllu.exceptions.ParseException, UnicodeDecodeError) as error:
        raise ConlluError(f"{path}: is not CoNLL-U ({error})") from error
    found = []
    for number, tokens in enumerate(parsed, start=1):
        words = [token for token in tokens if isinstance(token["id"], int)]
        place = {token["id"]: index for index, token in enumerate(words)}
        try:
            heads = tuple(-1 if token["head"] == 0 else place[token["head"]] for token in words)
            relations = tuple(str(token["deprel"]) for token in words)
            found.append(Sentence(tuple(token["form"] for token in words), heads, relations))
        except (KeyError, ValueError) as error:
            raise ConlluError(f"{path}: sentence {number} has a word whose head is no word of it ({error})") from error
    if not found:
        raise ConlluError(f"{path}: has no sentence")
    return found


def word_encoder(tokenizer: Any, device: torch.device | str = "cpu", max_tokens: int | None = None) -> Encode:
    """Encodes with a fast tokenizer of Transformers, special tokens added, cut at `max_tokens`."""

    def encode(words: Sequence[str]) -> tuple[Any, Sequence[int | None]]:
        cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
        encoded = tokenizer(list(words), is_split_into_words=True, return_tensors="pt", **cut)
        return {name: encoded[name].to(device) for name in encoded}, encoded.word_ids(0)

    return encode


def dependency_accuracy(model: nn.Module, encode: Encode, sentences: Iterable[Sentence]) -> Syntax:
    """How often the word with the largest attention is the head of a dependency, for every head, relation, direction.

    With a_uw the attention of word u on word w, the sum over the tokens of w, the mean over those of u::

        to head    argmax_{w != d} a_dw    is the head of the dependent d
        from head  argmax_{w != d} a_wd    is the head of the dependent d

    Tokens that are no word's ([CLS], [SEP]) and a word itself are not predicted (Clark et al. 2019). The baseline of a
    relation is always to predict the word at its commonest offset. Roots have no dependency.

    Args:
        model: what `capture` serves; run under no_grad, a sentence at a time.
        encode: words -> batch and the word of each token; see `word_encoder`.

    Raises:
        ValueError: no dependencies; `encode` gives another number of tokens than the attention has.
    """
    hits: dict[str, Tensor] = {}  # relation -> (directions, layers, heads), grown when it is first seen
    offsets: dict[str, Counter[int]] = {ALL: Counter()}
    layers: dict[str, Tensor] = {}  # of one sentence: module -> (directions, H, W) predicted words
    word_of: Sequence[int | None] = ()
    left_out = 0

    def watch(name: str, call: ServedCall, _out: Tensor, _stats: HeadStats) -> None:
        if not call.crosses:
            layers[name] = _predicted(call, word_of)

    with torch.no_grad(), Capture(model, StatSpec.none(), watch=watch):
        for sentence in sentences:
            batch, word_of = encode(sentence.words)
            if set(word_of) - {None} != set(range(len(sentence.words))):
                left_out += 1
                continue
            layers.clear()
            run(model, batch)
            for word, head, relation in zip(
                range(len(sentence.words)), sentence.heads, sentence.relations, strict=True
            ):
                if head < 0:
                    continue
                right = torch.stack([_padded(words[..., word] == head, layers) for words in layers.values()], 1)
                for name in (ALL, relation):
                    hits[name] = hits.get(name, 0) + right
                    offsets.setdefault(name, Counter())[head - word] += 1
    if not hits:
        raise ValueError("sentences: expected some with dependencies whose words all have tokens, got none")
    return _table(tuple(layers), hits, offsets, left_out)


def _table(
    layers: tuple[str, ...], hits: Mapping[str, Tensor], offsets: Mapping[str, Counter[int]], left_out: int
) -> Syntax:
    counts = {name: of.total() for name, of in offsets.items()}
    relations = sorted(hits, key=lambda name: (name != ALL, -counts[name], name))
    commonest = {name: min(of.items(), key=lambda entry: (-entry[1], abs(entry[0]))) for name, of in offsets.items()}
    return Syntax(
        layers=layers,
        relations=tuple(relations),
        counts=tuple(counts[name] for name in relations),
        accuracy=torch.stack([hits[name] / counts[name] for name in relations]),
        offsets=tuple(commonest[name][0] for name in relations),
        baseline=tuple(commonest[name][1] / counts[name] for name in relations),
        left_out=left_out,
    )


def _padded(right: Tensor, layers: Mapping[str, Tensor]) -> Tensor:
    """(directions, heads) float64 of (directions, H) bool, filled up with NaN."""
    most = max(words.shape[1] for words in layers.values())
    return nn.functional.pad(right.double(), (0, most - right.shape[1]), value=torch.nan)


def _predicted(call: ServedCall, word_of: Sequence[int | None]) -> Tensor:
    """(directions, H, W) int64: of each word the one it looks at most, and the one that looks at it most."""
    _, heads, rows, _ = call.query.shape
    if rows != len(word_of):
        raise ValueError(f"encode: expected a word for each of {rows} tokens, got {len(word_of)}")
    device = call.query.device
    word_N = torch.tensor([-1 if word is None else word for word in word_of], device=device)
    words = int(word_N.max()) + 1
    looks_at = torch.zeros(heads, words, dtype=torch.int64, device=device)
    looked_at_by = torch.zeros_like(looks_at)
    largest = torch.full((heads, words), -1.0, dtype=torch.float64, device=device)
    for first, last in _blocks(word_N.tolist(), rows_at_once(heads, rows)):
        attention_HRW = _between_words(call, word_N, words, first, last)
        own = torch.arange(first, last, device=device)
        attention_HRW[:, own - first, own] = -1.0
        looks_at[:, first:last] = attention_HRW.argmax(-1)
        value, row = attention_HRW.max(1)
        looked_at_by = torch.where(value > largest, row + first, looked_at_by)
        largest = torch.maximum(largest, value)
    return torch.stack([looks_at, looked_at_by]).cpu()


def _between_words(call: ServedCall, word_N: Tensor, words: int, first: int, last: int) -> Tensor:
    """(H, R, W) of the words first .. last - 1."""
    mine = ((word_N >= first) & (word_N < last)).nonzero()[:, 0]
    start, stop = int(mine[0]), int(mine[-1]) + 1
    prob_HRN, _ = row_block(call, 0, start, stop)
    prob_HRN = prob_HRN[:, mine - start]
    counted = word_N >= 0
    summed = prob_HRN.new_zeros(*prob_HRN.shape[:2], words).index_add_(-1, word_N[counted], prob_HRN[..., counted])
    of_word = word_N[mine] - first
    total = summed.new_zeros(len(summed), last - first, words).index_add_(1, of_word, summed)
    return total / torch.bincount(of_word, minlength=last - first)[:, None]


def _blocks(word_of: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive words, (first, last + 1), with about so many tokens together."""
    sizes = Counter(word for word in word_of if word >= 0)
    first, tokens = 0, 0
    for word in sorted(sizes):
        if tokens and tokens + sizes[word] > rows:
            yield first, word
            first, tokens = word, 0
        tokens += sizes[word]
    yield first, len(sizes)
