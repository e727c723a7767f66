"""What a model is measured by where nobody gives a loss: the one its checkpoint was trained with, or its own output.

B sequences   N tokens   E embedding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap.analysis.batches import Loss, run
from attncap.models import CAUSAL, LoadedModel, load_with_head

_MASKED_SHARE = 0.15
_IGNORED = -100


@dataclass(frozen=True)
class Objective:
    """A model and its loss on batches.

    Attributes:
        loss: mean over the tokens of a batch.
        total: the sum of the same, whose gradient tells importance; None where it has none: a distance from the
            model's own output is smallest where nothing is changed.
        what: the loss in words. unit: of it.
    """

    model: nn.Module
    loss: Loss
    total: Loss | None
    what: str
    unit: str


def objective_of(
    loaded: LoadedModel, batches: Sequence[Mapping[str, Tensor]], *, dtype: str, options: Mapping[str, Any]
) -> Objective:
    """The loss that a checkpoint can be held to, on these batches.

    With a language-modelling head it is the cross-entropy of the next token, or of tokens that are masked (the same
    15 % of a batch on every call). Without one, it is how far the last hidden states are from those of the whole
    model: 1 - cosine, the mean over tokens.

    Args:
        loaded: as `attncap.models.load_model` gave it. dtype, options: what it was loaded with.
        batches: the only ones that the loss is asked for.
    """
    found = load_with_head(loaded.name, dtype, str(loaded.device), options) if loaded.tokenizer is not None else None
    if found is not None:
        kind, model = found
        if kind == CAUSAL:
            return _of_tokens(model, _NextToken(), "cross-entropy of the next token")
        if loaded.tokenizer.mask_token_id is not None:
            masked = _Masked(loaded.tokenizer.mask_token_id, loaded.tokenizer.all_special_ids)
            return _of_tokens(model, masked, "cross-entropy of 15 % of the tokens, masked")
    what = "distance of the last hidden states from those of the whole model"
    return Objective(loaded.model, _OwnOutput(loaded.model, batches), None, what, "1 - cosine")


class _Labelled(Protocol):
    """Gives the inputs of a batch and the labels (B, N) of its tokens, `_IGNORED` where there is none."""

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]: ...


def _of_tokens(model: nn.Module, labelled: _Labelled, what: str) -> Objective:
    def cross_entropy(reduction: str) -> Loss:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, labels = labelled(batch)
            logits: Tensor = run(model, inputs).logits.flatten(0, 1).float()
            return F.cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction=reduction)

        return loss

    return Objective(model, cross_entropy("mean"), cross_entropy("sum"), what, "nats per token")


class _NextToken:
    """A token's label is the one after it."""

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        labels = _labels(batch)
        return batch, torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], _IGNORED)], 1)


class _Masked:
    """The labels are the tokens that were masked."""

    def __init__(self, mask_token: int, special: Sequence[int]) -> None:
        self._mask_token, self._special = mask_token, torch.tensor(list(special))

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        labels = _labels(batch)
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(0)
        allowed = (labels != _IGNORED) & ~torch.isin(ids, self._special.to(ids.device))
        chosen = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(~allowed, 2.0)
        # Of every sequence at least one, so that no batch is without.
        number = (allowed.sum(-1, keepdim=True) * _MASKED_SHARE).ceil()
        masked = allowed & (chosen.argsort(-1).argsort(-1) < number)
        inputs = {**batch, "input_ids": ids.masked_fill(masked, self._mask_token)}
        return inputs, labels.masked_fill(~masked, _IGNORED)


class _OwnOutput:
    """1 - cosine between hidden states and those that the model gave before anything was changed."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        with torch.no_grad():
            self._own = [run(model, batch)[0].cpu() for batch in batches]
        self._batches = batches

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        own = next(own for own, known in zip(self._own, self._batches, strict=True) if known is batch)
        states = run(model, batch)[0]
        apart = 1 - F.cosine_similarity(states.double(), own.to(states.device).double(), dim=-1)
        mask = batch.get("attention_mask")
        return apart.mean() if mask is None else apart[mask.bool()].mean()


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
