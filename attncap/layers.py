"""Which attention modules a capture wants."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any


class LayerSelection:
    """Modules chosen by name or by index in order.

    Args:
        layers: names and indices; None for all.
        known: names of the attention modules in order, or None where only running the model tells; indices are then
            counted in order of first execution.
        modules: names of all modules of the model.

    Raises:
        TypeError: something else than a sequence of names and ints.
        ValueError: there is no such module; the message lists those that are.
    """

    def __init__(
        self, layers: Sequence[str | int] | None, known: Sequence[str] | None, modules: Collection[str]
    ) -> None:
        self._everything = layers is None
        self._known = known
        self._names: set[str] = set()
        self._indices: set[int] = set()
        self._executed: list[str] = []
        if layers is None:
            return
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
            raise TypeError(f"layers: expected a list of names and indices, got {layers!r}")
        for layer in layers:
            if isinstance(layer, str):
                available = modules if known is None else known
                if layer not in available:
                    raise ValueError(f"layers: no attention module is called {layer!r}; {_listed(available)}")
                self._names.add(layer)
            elif known is not None:
                self._names.add(known[_index(layer, len(known), known)])
            else:
                index = _index(layer, len(modules), modules)
                if operator.index(layer) < 0:
                    raise ValueError(f"layers: expected an index from 0 for this model, got {layer}")
                self._indices.add(index)

    def selects(self, module: str) -> bool:
        """Whether this module's calls are wanted; the first question about a module gives it its index."""
        if self._everything:
            return True
        if module not in self._executed:
            self._executed.append(module)
        return module in self._names or self._executed.index(module) in self._indices

    def refuse_unused(self) -> None:
        """ValueError for a name or index that no module turned out to have, once the model ran."""
        if self._known is not None or not self._executed:
            return
        wrong: list[str | int] = sorted(self._names - set(self._executed))
        wrong += sorted(index for index in self._indices if index >= len(self._executed))
        if wrong:
            raise ValueError(f"layers: {wrong[0]!r} made no attention call; {_listed(self._executed)}")


def _index(layer: Any, length: int, available: Collection[str]) -> int:
    try:
        index = operator.index(layer)
    except TypeError:
        index = None
    if index is None or isinstance(layer, bool):
        raise TypeError(f"layers: expected names and indices, got {layer!r}")
    if not -length <= index < length:
        raise ValueError(f"layers: no attention module has the index {index}; {_listed(available)}")
    return index % length


def _listed(available: Collection[str]) -> str:
    return "there are: " + ", ".join(f"{place} {name!r}" for place, name in enumerate(available))
