"""Which attention calls a capture wants: of which modules and heads, in which steps, and which of their rows.

B batch  Q query rows
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attncap.types import UnsupportedError

Layers = Sequence["str | int"] | Mapping["str | int", "Sequence[int] | None"]
"""Names of modules or their indices, with the numbers of their heads where it is a mapping."""


class LayerSelection:
    """Modules chosen by name or by index in order, and heads of them.

    Args:
        layers: names and indices, or a mapping of them to numbers of heads (None for all of them); None for all.
        known: names of the attention modules in order, or None where only running the model tells; indices are then
            counted in order of first execution.
        modules: names of all modules of the model.

    Raises:
        TypeError: something else than a sequence or mapping of names and ints.
        ValueError: there is no such module; the message lists those that are.
    """

    def __init__(self, layers: Layers | None, known: Sequence[str] | None, modules: Collection[str]) -> None:
        self._everything = layers is None
        self._known = known
        self._names: set[str] = set()
        self._indices: set[int] = set()
        self._executed: dict[str, int] = {}  # in order; a dictionary, so that two threads do not number a module twice
        self._heads: dict[str | int, tuple[int, ...]] = {}
        if layers is None:
            return
        if isinstance(layers, (str, bytes)) or not isinstance(layers, (Sequence, Mapping)):
            raise TypeError(f"layers: expected a list of names and indices, or a mapping of them, got {layers!r}")
        heads = layers if isinstance(layers, Mapping) else dict.fromkeys(layers)
        for layer, numbers in heads.items():
            place = self._placed(layer, known, modules)
            if numbers is not None:
                self._heads[place] = _heads(layer, numbers)

    def _placed(self, layer: Any, known: Sequence[str] | None, modules: Collection[str]) -> str | int:
        """Note one of the layers; gives its name, or its index where only running the model tells the name."""
        if isinstance(layer, str):
            available = modules if known is None else known
            if layer not in available:
                raise ValueError(f"layers: no attention module is called {layer!r}; {_listed(available)}")
            self._names.add(layer)
            return layer
        if known is not None:
            name = known[_index(layer, len(known), known)]
            self._names.add(name)
            return name
        index = _index(layer, len(modules), modules)
        if operator.index(layer) < 0:
            raise ValueError(f"layers: expected an index from 0 for this model, got {layer}")
        self._indices.add(index)
        return index

    def selects(self, module: str) -> bool:
        """Whether this module's calls are wanted; the first question about a module gives it its index."""
        if self._everything:
            return True
        if module not in self._executed:
            self._executed.setdefault(module, len(self._executed))
        return module in self._names or self._executed[module] in self._indices

    def heads_of(self, module: str, heads: int) -> tuple[int, ...] | None:
        """The heads of a module that are wanted, of so many; None for all of them.

        Args:
            module: its name.

        Raises:
            ValueError: it has no such head.
        """
        wanted = self._heads.get(module)
        if wanted is None and module in self._executed:
            wanted = self._heads.get(self._executed[module])
        if wanted is not None and max(wanted) >= heads:
            raise ValueError(f"layers: {module!r} has the heads 0 to {heads - 1}, got {max(wanted)}")
        return wanted

    def refuse_unused(self) -> None:
        """ValueError for a name or index that no module turned out to have, once the model ran."""
        if self._known is not None or not self._executed:
            return
        wrong: list[str | int] = sorted(self._names - set(self._executed))
        wrong += sorted(index for index in self._indices if index >= len(self._executed))
        if wrong:
            raise ValueError(f"layers: {wrong[0]!r} made no attention call; {_listed(self._executed)}")


def is_backward_running() -> bool:
    """Whether torch's autograd runs this code: a forward in it is one that activation checkpointing runs once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def module_of(call: str) -> str:
    """The name of the module that made a call, without the number ("#1") or the kind (":cross") of the call."""
    return re.split("[#:]", call)[0]


class Steps:
    """Which forwards of a model are wanted: every n-th one, from the first on.

    Raises:
        TypeError, ValueError: `every` is not an int from 1.
    """

    def __init__(self, every: int) -> None:
        self._every = checked_count("every", every)
        self._begun = 0
        self._newest_skips = False
        self._lock = threading.Lock()  # several threads may run the model
        self._of_thread = threading.local()

    @property
    def wanted(self) -> bool:
        """Whether the forward that this thread runs is wanted; what runs outside any is.

        What activation checkpointing runs once more is taken for a part of the newest forward.
        """
        if self._every == 1:
            return True
        return not (self._newest_skips if is_backward_running() else getattr(self._of_thread, "skips", False))

    def follow(self, undo: ExitStack, model: nn.Module) -> None:
        """Count the forwards of a model until `undo`."""
        if self._every > 1:
            undo.callback(model.register_forward_pre_hook(self._begin, prepend=True).remove)
            undo.callback(model.register_forward_hook(self._end, always_call=True).remove)
            undo.callback(self._of_thread.__dict__.clear)

    def _begin(self, _model: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "every: the forwards of a model inside a compiled graph cannot be counted; capture what torch.compile "
                "gave"
            )
        with self._lock:
            self._of_thread.skips = self._newest_skips = self._begun % self._every != 0
            self._begun += 1

    def _end(self, _model: nn.Module, _args: Any, _result: Any) -> None:
        self._of_thread.skips = False


class LastRows:
    """Which query rows count: all, or the last tokens of each sequence alone.

    Raises:
        TypeError, ValueError: `queries` is neither None nor an int from 1.
    """

    def __init__(self, queries: int | None) -> None:
        self._queries = None if queries is None else checked_count("queries", queries)

    def among(self, query_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """(B, Q) bool: the rows that count of those that are tokens by `query_mask`; None for all.

        Args:
            query: (B, H, Q, D).
        """
        if self._queries is None:
            return query_mask
        if query_mask is None:
            query_mask = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
        from_the_end = query_mask.flip(-1).cumsum(-1).flip(-1)
        return query_mask & (from_the_end <= self._queries)


def checked_count(argument: str, number: Any) -> int:
    """`number`, an int from 1; TypeError or ValueError that names the argument."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{argument}: expected an int, got {number!r}")
    if number < 1:
        raise ValueError(f"{argument}: expected at least 1, got {number}")
    return number


def _heads(layer: str | int, numbers: Any) -> tuple[int, ...]:
    """The numbers of heads in order, each once."""
    whole = isinstance(numbers, Sequence) and all(type(number) is int for number in numbers)
    if not whole:
        raise TypeError(f"layers[{layer!r}]: expected a list of numbers of heads, or None for all, got {numbers!r}")
    if not numbers or min(numbers) < 0:
        raise ValueError(f"layers[{layer!r}]: expected numbers of heads from 0, at least one, got {numbers!r}")
    return tuple(sorted(set(numbers)))


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
