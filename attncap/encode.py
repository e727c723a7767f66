"""Documents as model inputs: token ids or pixels, in batches of like length.

B sequences   N tokens
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attncap.corpus import Shard
from attncap.corpus_readers import Document
from attncap.extras import require
from attncap.models import LoadedModel

MOST_PADDING = 0.05
"""Share of the tokens that are computed, in each batch."""


@dataclass(frozen=True)
class Encoded:
    """One document as the inputs of a model.

    Attributes:
        number: of the document in the corpus. group: whose statistics it counts for.
        inputs: name -> ids of the tokens, or the pixels of an image.
        length: number of tokens, or of patches.
    """

    number: int
    group: str
    inputs: Mapping[str, list[int] | Tensor]
    length: int


@dataclass(frozen=True)
class EncodedShard:
    """A shard as model inputs per document, in order, and what was counted while they were made.

    `faults` says which documents the model cannot read.
    """

    index: int
    sequences: list[Encoded]
    counts: dict[str, int]
    faults: list[str] = field(default_factory=list)


def encode(shard: Shard, loaded: LoadedModel, max_tokens: int | None) -> EncodedShard:
    """Texts with special tokens, cut at `max_tokens`; token ids as they are, cut there; images as the model takes them.

    A document without any token is left out and counted among the empty ones, one of another kind than the model reads
    among the failed ones.
    """
    found: dict[int, Encoded] = {}
    faults: list[str] = []
    numbered = list(enumerate(shard.documents, start=shard.first))
    texts = [(number, one) for number, one in numbered if isinstance(one.content, str)]
    truncated = 0
    if loaded.image_processor is not None:
        for number, document in numbered:
            pixels = _pixels(document, loaded.image_processor)
            if isinstance(pixels, str):
                faults.append(f"document {number}: {pixels}")
            else:
                found[number] = Encoded(number, document.group, pixels, loaded.patches)
    else:
        encoded, truncated = _tokens([document.content for _, document in texts], loaded.tokenizer, max_tokens)
        for (number, document), inputs in zip(texts, encoded, strict=True):
            found[number] = Encoded(number, document.group, inputs, len(inputs["input_ids"]))
        for number, document in numbered:
            if isinstance(document.content, tuple):
                fault, ids = _checked_ids(document.content, loaded), list(document.content[:max_tokens])
                truncated += len(ids) < len(document.content)
                found[number] = Encoded(number, document.group, {"input_ids": ids}, len(ids))
                if fault is not None:
                    found.pop(number)
                    faults.append(f"document {number}: {fault}")
            elif isinstance(document.content, bytes):
                fault = "is an image, and the model reads text, which must be strings and no bytes"
                faults.append(f"document {number}: {fault}")
    kept = [found[number] for number in sorted(found) if found[number].length]
    counts = {
        "documents": len(kept),
        "tokens": sum(sequence.length for sequence in kept),
        "truncated_documents": truncated,
        "empty_documents": len(found) - len(kept),
        "failed_documents": len(faults),
    }
    return EncodedShard(shard.index, kept, counts, faults)


def _tokens(texts: Sequence[Any], tokenizer: Any, max_tokens: int | None) -> tuple[list[dict[str, list[int]]], int]:
    """(inputs of each text, how many of them were cut)."""
    if not texts:
        return [], 0
    cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    encoded = tokenizer(list(texts), add_special_tokens=True, padding=False, verbose=False, **cut)
    names = [name for name in encoded if name in ("input_ids", "token_type_ids")]
    sequences = [{name: list(encoded[name][place]) for name in names} for place in range(len(texts))]
    return sequences, _cut(texts, encoded, tokenizer, max_tokens)


def _cut(texts: Sequence[Any], encoded: Any, tokenizer: Any, max_tokens: int | None) -> int:
    """How many texts have more tokens than `encoded` holds of them."""
    if max_tokens is None:
        return 0
    if encoded.encodings is not None:  # a tokenizer that keeps what it cut off
        return sum(bool(one.overflowing) for one in encoded.encodings)
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) == max_tokens]
    # One token more than fits tells which of these are longer, without an end to how much more they are.
    longer = tokenizer(full, truncation=True, max_length=max_tokens + 1, verbose=False)["input_ids"] if full else []
    return sum(len(ids) > max_tokens for ids in longer)


def _checked_ids(ids: tuple[int, ...], loaded: LoadedModel) -> str | None:
    """Why ids cannot be those of the model's tokens."""
    known = loaded.vocabulary
    largest = max(ids, default=0)
    return f"has the token id {largest}, and the model knows {known} tokens" if known and largest >= known else None


def _pixels(document: Document, processor: Any) -> dict[str, Tensor] | str:
    """An image as the model takes it, (channels, height, width), or why it cannot be read."""
    if not isinstance(document.content, bytes):
        return "is text, and the model reads images"
    pillow = require("PIL.Image", "images")
    try:
        with pillow.open(io.BytesIO(document.content)) as image:
            inputs = processor(images=image.convert("RGB"), return_tensors="pt")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises at broken files
        return f"is not an image that can be read ({(str(error) or type(error).__name__).splitlines()[0]})"
    return {"pixel_values": inputs["pixel_values"][0]}


def batches(sequences: Sequence[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    """Sequences by (length, order), together while number times longest stays within `batch_tokens`.

    A batch ends before its padding would be more than `MOST_PADDING` of what is computed. Sequences with other inputs
    (token types or none) are in other batches.
    """
    batch: list[Encoded] = []
    tokens = 0
    for sequence in sorted(sequences, key=lambda one: (tuple(one.inputs), one.length)):
        computed = (len(batch) + 1) * sequence.length
        padding = computed - tokens - sequence.length
        differs = bool(batch) and batch[0].inputs.keys() != sequence.inputs.keys()
        if batch and (differs or computed > batch_tokens or padding > MOST_PADDING * computed):
            yield batch
            batch, tokens = [], 0
        batch.append(sequence)
        tokens += sequence.length
    if batch:
        yield batch


def pad(batch: Sequence[Encoded], tokenizer: Any) -> dict[str, Tensor]:
    """(B, N) tensors, padded on the right, with the ``attention_mask`` that says so; images as they are."""
    if isinstance(pixels := batch[0].inputs.get("pixel_values"), Tensor):
        return {"pixel_values": torch.stack([torch.as_tensor(one.inputs["pixel_values"]) for one in batch]).to(pixels)}
    longest = max(sequence.length for sequence in batch)
    fill = {"input_ids": (tokenizer.pad_token_id if tokenizer is not None else None) or 0, "token_type_ids": 0}
    inputs = {
        name: torch.tensor(
            [[*sequence.inputs[name], *[fill[name]] * (longest - sequence.length)] for sequence in batch]
        )
        for name in batch[0].inputs
    }
    lengths = torch.tensor([sequence.length for sequence in batch])
    inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
    return inputs
