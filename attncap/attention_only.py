"""The forward of a model of which nothing but its attention is wanted: it ends with the last attention module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class _EndedError(Exception):
    """Every attention module has run."""


class AttentionOnly:
    """Runs a model no further than its statistics need.

    The first forward is a whole one. If each attention module ran once in it, later ones end when each has run once:
    what is left then (the last layer's other half, poolers, heads) changes no statistic. A forward in which one runs
    twice before all have run is not ended, and neither are those of models that

    - are of other code than Transformers' own, where what follows may depend on the input,
    - have hooks of Accelerate, which put weights back after their module.

    Args:
        layers: the modules that call attention, all of them; none where only running the model tells.

    One thread runs a model at a time.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._model = model
        followed = _is_fixed(model) and not any(hasattr(module, "_hf_hook") for module in model.modules())
        self._layers = frozenset(layers if followed else ())
        self._ran: Counter[nn.Module] = Counter()
        self._ends = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Follow the model inside the block."""
        with ExitStack() as undo:
            for layer in self._layers:
                undo.callback(layer.register_forward_hook(self._count).remove)
            yield

    def __call__(self, **inputs: Any) -> None:
        """Run the model on a batch."""
        self._ran.clear()
        try:
            self._model(**inputs)
        except _EndedError:
            return
        self._ends = bool(self._layers) and self._ran == Counter(self._layers)

    def _count(self, layer: nn.Module, _args: Any, _result: Any) -> None:
        self._ran[layer] += 1
        if self._ends and self._ran == Counter(self._layers):
            raise _EndedError


def _is_fixed(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.models.")
