"""Documents of a run as their tokens, and where the heads look in them, from rows.parquet.

L layers   H heads   T tokens   K keys of a row
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.models import load_tokenizer
from attncap.report.content import Report

MOST_TOKENS = 96
"""Of an example; what follows is cut."""

OUTSIDE = 255
"""The place of a key that was cut, or of none."""

RECEIVERS = 8
_EXAMPLES, _FEWEST_TOKENS, _KEYS = 3, 8, 4
_BUDGET = 2 << 20  # bytes of all examples together


@dataclass(frozen=True, eq=False)
class Example:
    """One document.

    Attributes:
        tokens: as text, at most `MOST_TOKENS`. cut: whether the document has more.
        keys: (L, H, T, K) uint8, places of the keys that each row looks at most, `OUTSIDE` where there is none.
        probabilities: (L, H, T, K), 0 where there is none.
    """

    document: int
    group: str
    tokens: tuple[str, ...]
    cut: bool
    keys: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Receivers:
    """The kinds of tokens that receive most of each head's attention, over all rows that were kept.

    Attributes:
        names: token as text.
        tokens: (L, H, RECEIVERS) places in `names`, -1 where there are fewer.
        shares: (L, H, RECEIVERS) of the attention on the keys that were kept.
        keys: how many keys of a row were kept.
    """

    names: tuple[str, ...]
    tokens: NDArray[np.int32]
    shares: NDArray[np.float32]
    keys: int


class ExampleReader:
    """Chooses documents to show, then takes the table a piece at a time.

    Args:
        documents: pieces with the columns document, group, position and token, each row of a document once.
        model: name of the model, whose tokenizer is asked for the tokens' text if it lies on this machine.
    """

    def __init__(self, documents: Iterable[Mapping[str, NDArray[Any]]], report: Report, model: str) -> None:
        self._shape = len(report.layers), report.heads
        self._tokens, groups = _documents(documents)
        chosen = _choose(self._tokens, groups, self._shape[0] * self._shape[1])
        self._chosen = {document: (groups[document], *_blank(self._shape, length)) for document, length in chosen}
        self._first = {document: place for place, document in enumerate(self._tokens)}
        lengths = [len(tokens) for tokens in self._tokens.values()]
        self._starts = np.cumsum([0, *lengths])
        whole = np.concatenate([*self._tokens.values(), np.zeros(0, np.int64)])
        self._of_images = not (whole >= 0).any()
        # As many numbers as heads times kinds of tokens: a small part of what the table has.
        self._kinds, self._kind = np.unique(whole, return_inverse=True)
        self._received = np.zeros((self._shape[0] * self._shape[1], len(self._kinds)))
        self._kept = 0
        self._model = model

    def add(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Take a piece of the table, with the columns document, place, position, topk_index and topk_prob."""
        if "topk_index" not in batch or not self._tokens or not batch["topk_index"].shape[-1]:
            return
        self._add_received(batch)
        for document, (_group, keys, probabilities) in self._chosen.items():
            length, kept = keys.shape[-2:]
            rows = (batch["document"] == document) & (batch["position"] < length)
            layer, head = np.divmod(batch["place"][rows], self._shape[1])
            key, probability = (batch[name][rows][:, :kept] for name in ("topk_index", "topk_prob"))
            inside = (key >= 0) & (key < length)
            position = batch["position"][rows]
            keys[layer, head, position, : key.shape[1]] = np.where(inside, key, OUTSIDE)
            probabilities[layer, head, position, : key.shape[1]] = np.where(key >= 0, probability, 0.0)

    def _add_received(self, batch: Mapping[str, NDArray[Any]]) -> None:
        key, probability = batch["topk_index"], batch["topk_prob"].astype(np.float64)
        self._kept = max(self._kept, key.shape[1])
        numbers, inverse = np.unique(batch["document"], return_inverse=True)
        document = np.array([self._first[number] for number in numbers.tolist()])[inverse]
        seen = key >= 0
        flat = (self._starts[document][:, None] + key)[seen]
        place = np.broadcast_to(batch["place"][:, None], key.shape)[seen]
        np.add.at(self._received, (place, self._kind[flat]), probability[seen])

    def examples(self) -> tuple[Example, ...]:
        """The documents that were chosen."""
        if not self._kept:
            return ()
        wanted = [token for document in self._chosen for token in self._tokens[document].tolist()]
        names = token_names(wanted, self._model)
        found = []
        for document, (group, keys, probabilities) in self._chosen.items():
            tokens, length = self._tokens[document].tolist(), keys.shape[-2]
            texts = tuple(names.get(token, f"{place}") for place, token in enumerate(tokens[:length]))
            found.append(Example(document, group, texts, len(tokens) > length, keys, probabilities))
        return tuple(found)

    def receivers(self) -> Receivers | None:
        """Which tokens receive most; None for images."""
        if not self._kept or self._of_images:
            return None
        most = min(RECEIVERS, len(self._kinds))
        order = np.argsort(-self._received, axis=1, kind="stable")[:, :most]
        sums = np.take_along_axis(self._received, order, axis=1)
        shares = sums / np.maximum(self._received.sum(1, keepdims=True), np.finfo(float).tiny)
        kinds, index = np.unique(self._kinds[order], return_inverse=True)
        names = token_names(kinds.tolist(), self._model)
        shape = *self._shape, most
        tokens = np.where(sums > 0, index.reshape(order.shape), -1)
        named = tuple(names.get(kind, "") for kind in kinds.tolist())
        return Receivers(
            named, tokens.reshape(shape).astype(np.int32), shares.reshape(shape).astype(np.float32), self._kept
        )


def token_names(tokens: Iterable[int], model: str) -> dict[int, str]:
    """Token id -> its text; "#id" where the model's tokenizer is not on this machine, nothing for negative ids."""
    wanted = sorted({token for token in tokens if token >= 0})
    tokenizer = load_tokenizer(model) if wanted else None
    if tokenizer is None or len(tokenizer) <= max(wanted, default=0):
        return {token: f"#{token}" for token in wanted}
    return {token: _text(tokenizer, token) for token in wanted}


def _text(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    if not text or "\ufffd" in text:  # part of a character
        text = str(tokenizer.convert_ids_to_tokens(token))
    shown = text.strip() or text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown or f"#{token}"


def _documents(
    pieces: Iterable[Mapping[str, NDArray[Any]]],
) -> tuple[dict[int, NDArray[np.int64]], dict[int, str]]:
    """(document -> its tokens by position, document -> its group); -1 for positions without a row."""
    found: dict[int, list[tuple[int, int]]] = {}
    groups: dict[int, str] = {}
    for piece in pieces:
        columns = (piece[name].tolist() for name in ("document", "group", "position", "token"))
        for document, group, position, token in zip(*columns, strict=True):
            found.setdefault(document, []).append((position, token))
            groups[document] = group
    tokens = {}
    for document, pairs in found.items():
        tokens[document] = np.full(max(position for position, _ in pairs) + 1, -1, np.int64)
        for position, token in pairs:
            tokens[document][position] = token
    return tokens, groups


def _choose(tokens: Mapping[int, NDArray[np.int64]], groups: Mapping[int, str], heads: int) -> list[tuple[int, int]]:
    """(document, how many of its tokens are shown): whole ones first, of different groups where there are several."""
    lengths = {document: len(one) for document, one in tokens.items()}
    fitting = [one for one, length in lengths.items() if _FEWEST_TOKENS <= length <= MOST_TOKENS]
    by_group: dict[str, list[int]] = {}
    for document in [*sorted(fitting, key=lambda one: -lengths[one]), *lengths]:
        listed = by_group.setdefault(groups[document], [])
        if document not in listed:
            listed.append(document)
    rounds = [
        document for turn in range(_EXAMPLES) for listed in by_group.values() for document in listed[turn : turn + 1]
    ]
    chosen: list[tuple[int, int]] = []
    left = _BUDGET
    for document in rounds[:_EXAMPLES]:
        length = min(lengths[document], MOST_TOKENS, left // (2 * heads * _KEYS))
        left -= 2 * heads * _KEYS * length
        if length > 1:
            chosen.append((document, length))
    return chosen


def _blank(shape: tuple[int, int], length: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    return np.full((*shape, length, _KEYS), OUTSIDE, np.uint8), np.zeros((*shape, length, _KEYS), np.float32)
