"""Transformers models parts of which compute attention by torch's own functions: two adapters on one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from attncap.adapters import PREFILL, Sink, named_modules
from attncap.adapters.inspection import calls_torch_itself
from attncap.adapters.modules import ModuleAdapter
from attncap.adapters.served import ServedCall
from attncap.adapters.transformers import TransformersAdapter
from attncap.annotations import Annotations
from attncap.types import HeadStats, StatSpec


class ComposedAdapter:
    """Serves the calls of Transformers' registry as `TransformersAdapter` does, and torch's as `ModuleAdapter` does.

    Args:
        root: the captured module. hosts: the models in it that ask the registry.
    """

    complete = False

    def __init__(self, root: nn.Module, hosts: list[PreTrainedModel]) -> None:
        self._registry = TransformersAdapter(root, hosts)
        self._plain = ModuleAdapter(root, hosts=hosts)
        self.known_layers = self._known(root)

    def _known(self, root: nn.Module) -> tuple[str, ...] | None:
        """Names of the attention modules, as far as code tells; None where models without the registry are inside."""
        models = (module for module in root.modules() if isinstance(module, PreTrainedModel))
        if not all(model._can_set_attn_implementation() for model in models):
            return None
        registered = frozenset(self._registry.known_layers or ())
        return tuple(
            name
            for name, module in named_modules(root)
            if name in registered or isinstance(module, nn.MultiheadAttention) or calls_torch_itself(module)
        )

    @contextmanager
    def open(self, sink: Sink) -> Iterator[None]:
        """See `Adapter.open`."""
        with self._plain.open(sink), self._registry.open(_Noting(sink, self._plain)):
            yield


class _Noting:
    """The sink of the registry's calls, which tells the other adapter of them."""

    def __init__(self, sink: Sink, plain: ModuleAdapter) -> None:
        self._sink = sink
        self._plain = plain
        self.spec: StatSpec = sink.spec
        self.differentiable = sink.differentiable
        self.importance = sink.importance
        self.takes_dropout = sink.takes_dropout

    def selects(self, module: str) -> bool:
        """See `Sink`; asked once per call, before it is computed."""
        self._plain.note_call()
        return self._sink.selects(module)

    def counted(self, query_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """See `Sink`."""
        return self._sink.counted(query_mask, query)

    def annotate(self, batch: Mapping[str, Any]) -> Annotations | None:
        """See `Sink`."""
        return self._sink.annotate(batch)

    def record(
        self,
        module: str,
        stats: HeadStats,
        annotations: Annotations,
        seen_keys: Tensor | None,
        key_mask: Tensor | None,
        phase: str = PREFILL,
        *,
        width: int,
    ) -> None:
        """See `Sink`."""
        self._sink.record(module, stats, annotations, seen_keys, key_mask, phase, width=width)

    def record_gates(self, module: str, call: ServedCall, by_gate: Tensor) -> None:
        """See `Sink`."""
        self._sink.record_gates(module, call, by_gate)

    def watch(self, module: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        """See `Sink`."""
        self._sink.watch(module, call, out, stats)

    def forgotten(self, call: ServedCall) -> str:
        """See `Sink`."""
        return self._sink.forgotten(call)
