"""Ready-made tags for `attncap.capture(model, tags=...)`.

A tag function takes the batch (the arguments of the model's forward, by name) and gives (query_tags, key_tags),
integers (B, N) each. The statistic is the probability that a query row gives to the keys with its tag::

    tag_mass_i = sum_j p_ij [query_tags_i == key_tags_j], a negative key tag matching nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_NOTHING = -1


def induction(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Probability on the keys that follow an occurrence of the query's own token (prefix matching, Olsson 2022).

    tag_mass_i = sum_j p_ij [token_i == token_{j-1}]

    In a causal model every such key but one follows an *earlier* occurrence, which is the induction pattern
    A B ... A -> B. The exception is j = i where the token repeats its predecessor (A A): there the query is itself
    the key after an earlier occurrence, and its mass counts, as it does in the usual detectors. In a bidirectional
    model keys after *later* occurrences count too, and so does j = i + 1, the query's own successor: the number is
    then the mass on any successor of the token, the query's own included.

    Args:
        batch: holds ``input_ids`` (B, N), and ``attention_mask`` (B, N) where there is padding.

    Raises:
        ValueError: the batch has no ``input_ids``.
    """
    tokens, keeps = _tokens(batch, "induction")
    before = torch.full_like(tokens, _NOTHING)
    # A padding token before the sequence (left padding) is no predecessor.
    before[:, 1:] = tokens[:, :-1].masked_fill(~keeps[:, :-1], _NOTHING)
    return tokens, before.masked_fill(~keeps, _NOTHING)


def duplicate(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Probability on keys that hold the query's own token, the query's own position included (Wang 2023).

    tag_mass_i = sum_j p_ij [token_i == token_j]

    Tags compare tokens, not positions, so the diagonal j = i, which always matches, is part of the sum. The mass on
    *other* occurrences, which duplicate-token heads are told by, is this mass less the row's ``diagonal_mass`` with
    ``StatSpec(diagonal=0)`` (the default); means subtract likewise::

        cap.mean("duplicate") - cap.mean("diagonal_mass")

    In a causal model the other occurrences are the earlier ones; in a bidirectional model the later ones too.

    Args:
        batch: holds ``input_ids`` (B, N), and ``attention_mask`` (B, N) where there is padding.

    Raises:
        ValueError: the batch has no ``input_ids``.
    """
    tokens, keeps = _tokens(batch, "duplicate")
    return tokens, tokens.masked_fill(~keeps, _NOTHING)


def segment(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Probability on keys of the query's own segment (the block pattern of Kovaleva 2019).

    tag_mass_i = sum_j p_ij [token_type_i == token_type_j]

    Args:
        batch: holds ``token_type_ids`` (B, N), and ``attention_mask`` (B, N) where there is padding.

    Raises:
        ValueError: the batch has no ``token_type_ids``.
    """
    types = _array(batch, "token_type_ids", "segment")
    return types, types.masked_fill(~_kept(batch, types), _NOTHING)


def token_set(ids: Iterable[int]) -> Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]:
    """A tag whose statistic is the probability on keys that hold one of these tokens (Clark 2019: [SEP], periods).

    tag_mass_i = sum_j p_ij [token_j in ids]

    Args:
        ids: token ids, for instance ``[tokenizer.sep_token_id]``.

    Returns:
        The tag function; its batch holds ``input_ids`` (B, N), and ``attention_mask`` where there is padding.

    Raises:
        ValueError: `ids` is empty; in the function: the batch has no ``input_ids``.
    """
    wanted = sorted({int(token) for token in ids})
    if not wanted:
        raise ValueError("ids: expected at least one token id, got none")

    def in_token_set(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tokens, keeps = _tokens(batch, "token_set")
        matches = torch.isin(tokens, torch.tensor(wanted, device=tokens.device)) & keeps
        return torch.zeros_like(tokens), torch.zeros_like(tokens).masked_fill(~matches, _NOTHING)

    return in_token_set


def _tokens(batch: Mapping[str, Any], tag: str) -> tuple[Tensor, Tensor]:
    """(token ids (B, N), which of them are not padding)."""
    tokens = _array(batch, "input_ids", tag)
    return tokens, _kept(batch, tokens)


def _kept(batch: Mapping[str, Any], tokens: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        return torch.ones_like(tokens, dtype=torch.bool)
    return mask.to(torch.bool)


def _array(batch: Mapping[str, Any], name: str, tag: str) -> Tensor:
    array = batch.get(name)
    if not isinstance(array, Tensor):
        raise ValueError(f"tags: {tag} needs {name} in the batch, which holds {', '.join(batch) or 'nothing'}")
    return array.to(torch.int64)
