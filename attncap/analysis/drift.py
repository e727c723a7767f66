"""Attention focus drift: heads whose attention moves to one token when it is put into a text, whatever the text says.

After Lyu et al. 2022 (A Study of the Attention Abnormality in Trojaned BERTs): in a model with a backdoor the trigger
draws the focus of many heads, in a clean one it does not.

B sequences   H heads   N tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import each, run
from attncap.analysis.blocks import by_layer_and_head
from attncap.analysis.roles import HALF
from attncap.capture import Capture
from attncap.types import HeadStats, StatSpec

DRIFT_THRESHOLD = 0.5
"""Share of sentences from which on a head drifts: a choice of this project; Lyu et al. train a detector instead."""

Trigger = Callable[[Any], Tensor]
"""Of a batch: which of its tokens are the trigger, (B, N) bool."""


@dataclass(frozen=True)
class FocusDrift:
    """(layers, heads) float64 each, shares of sentences; NaN where a layer has fewer heads.

    Attributes:
        layers: names of the attention modules.
        clean_focus: clean sentences in which the head has a focus.
        triggered_focus: the same of triggered sentences.
        drift: triggered sentences whose focus is the trigger. A clean one has no trigger, so the focus was elsewhere.
        mass: mean attention on the trigger in triggered sentences.
        expected_mass: what even attention would give the trigger.
        sentences: how many triggered sentences there were.
    """

    layers: tuple[str, ...]
    clean_focus: Tensor
    triggered_focus: Tensor
    drift: Tensor
    mass: Tensor
    expected_mass: float
    sentences: int

    def drifting(self, threshold: float = DRIFT_THRESHOLD) -> list[tuple[int, int]]:
        """(layer, head) of heads that drift in at least this share of sentences, the largest share first."""
        drift = self.drift.nan_to_num(-1.0)
        found = [(layer, head) for layer, head in (drift >= threshold).nonzero().tolist()]
        return sorted(found, key=lambda place: -float(drift[place]))


def focus_drift(
    model: nn.Module, clean: Iterable[Any], triggered: Iterable[Any], trigger: Trigger, *, focus: float = HALF
) -> FocusDrift:
    """Compare where heads focus in clean texts and in the same texts with a trigger in them.

    The focus of a head in a sentence is the key that the largest number of rows have their largest probability on,
    provided that these are more than the share `focus` of the rows (Lyu et al. 2022)::

        focus = argmax_j sum_i [j = argmax_k p_ik]    if that sum > focus * rows, else there is none
        drift = share of triggered sentences whose focus is a token of the trigger

    It is read from the one largest probability of each row; no map is made.

    Args:
        model: what `capture` serves; run under no_grad.
        clean, triggered: batches, each a mapping of keyword arguments or the only argument; padding is left out. They
            need not be in the same order.
        trigger: says of a batch of `triggered` which tokens are the trigger.
        focus: the share of rows that a focus must have more than.

    Raises:
        ValueError: no batches; `trigger` does not fit the batch or marks nothing in a sentence.
    """
    before, after = _Foci(focus), _Foci(focus)
    for name, foci, batches, of in (("clean", before, clean, None), ("triggered", after, triggered, trigger)):
        spec = StatSpec(entropy=False, max=False, sink=0, diagonal=None, topk=1)
        with torch.no_grad(), Capture(model, spec, watch=foci.watch, tags=foci.tags if of else None):
            for batch in each(batches, name):
                foci.marked = None if of is None else _marked(of(batch))
                run(model, batch)
        if not foci.heads:
            raise ValueError(f"{name}: expected at least one batch, got none")
    sentences = next(iter(after.heads.values())).sentences
    even = next(iter(after.heads.values())).even
    return FocusDrift(
        layers=tuple(after.heads),
        clean_focus=before.table("focused"),
        triggered_focus=after.table("focused"),
        drift=after.table("on_trigger"),
        mass=after.table("mass"),
        expected_mass=even / sentences,
        sentences=sentences,
    )


def token_trigger(ids: Iterable[int]) -> Trigger:
    """A trigger that is all tokens with one of these ids, in batches with ``input_ids`` or of token ids alone."""
    wanted = torch.tensor(sorted({int(token) for token in ids}))
    if not len(wanted):
        raise ValueError("ids: expected at least one token id, got none")

    def marked(batch: Any) -> Tensor:
        tokens: Tensor = batch if isinstance(batch, Tensor) else batch["input_ids"]
        return torch.isin(tokens, wanted.to(tokens.device))

    return marked


@dataclass
class _Head:
    """Sums over the sentences of one module, (H,) each."""

    focused: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    on_trigger: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    mass: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    even: float = 0.0
    sentences: int = 0


class _Foci:
    """Follows the forwards over one kind of texts."""

    def __init__(self, share: float) -> None:
        self._share = share
        self.marked: Tensor | None = None  # (B, N) bool
        self.heads: dict[str, _Head] = {}

    @property
    def tags(self) -> dict[str, Any]:
        """Marks the trigger's keys."""
        return {"trigger": self._tag}

    def _tag(self, _batch: Any) -> tuple[Tensor, Tensor]:
        assert self.marked is not None
        return torch.zeros_like(self.marked, dtype=torch.int64), self.marked.long() - 1

    def watch(self, name: str, call: ServedCall, _out: Tensor, stats: HeadStats) -> None:
        """Take one call in; cross-attention is left out."""
        if call.crosses:
            return
        assert stats.topk_index is not None
        index_BHN = stats.topk_index[..., 0].long()
        rows_B = (index_BHN[:, 0] >= 0).sum(-1)
        counts_BHN = torch.zeros_like(index_BHN).scatter_add_(-1, index_BHN.clamp_min(0), (index_BHN >= 0).long())
        most, key = counts_BHN.max(-1)  # (B, H)
        focused = most > self._share * rows_B[:, None]
        head = self.heads.setdefault(name, _Head())
        head.focused = head.focused + focused.double().sum(0).cpu()
        head.sentences += len(index_BHN)
        if self.marked is None:
            return
        marked = self.marked.to(key.device)
        assert stats.tag_mass is not None
        head.on_trigger = head.on_trigger + (focused & marked.gather(1, key)).double().sum(0).cpu()
        head.mass = head.mass + (stats.tag_mass[..., 0].double().sum(-1) / rows_B[:, None]).sum(0).cpu()
        tokens = rows_B if call.key_mask is None else call.key_mask.sum(-1)
        head.even += float((marked.sum(-1) / tokens).sum())

    def table(self, name: str) -> Tensor:
        """(layers, heads) shares of sentences."""
        return by_layer_and_head([getattr(head, name) / head.sentences for head in self.heads.values()])


def _marked(marked: Any) -> Tensor:
    if not isinstance(marked, Tensor) or marked.dim() != 2 or marked.dtype != torch.bool:
        got = f"{marked.dtype} {tuple(marked.shape)}" if isinstance(marked, Tensor) else type(marked).__name__
        raise ValueError(f"trigger: expected a function that gives bool (sequences, tokens), got {got}")
    if not bool(marked.any(-1).all()):
        without = int((~marked.any(-1)).nonzero()[0])
        raise ValueError(f"trigger: expected a token in every triggered sentence, got none in sentence {without}")
    return marked
