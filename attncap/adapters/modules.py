"""Plain torch modules that call `attncap.scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from attncap.adapters import Sink, named_modules
from attncap.annotations import Annotations
from attncap.sdpa import recording
from attncap.types import HeadStats, StatSpec, UnsupportedError


class ModuleAdapter:
    """Names each call after the innermost module whose forward made it."""

    known_layers: tuple[str, ...] | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[tuple[nn.Module, str]] = []
        self._calls = 0
        self._sink: Sink | None = None

    @property
    def spec(self) -> StatSpec:
        """What to capture: the recorder's side of `attncap.sdpa.recording`."""
        assert self._sink is not None
        if self._running and self._sink.selects(self._running[-1][1]):
            return self._sink.spec
        return StatSpec.none()

    @contextmanager
    def open(self, sink: Sink) -> Iterator[None]:
        """See `Adapter.open`."""
        self._sink, self._calls = sink, 0
        with ExitStack() as undo:
            for name, module in named_modules(self._model):
                self._follow(undo, module, name)
            undo.callback(self._model.register_forward_hook(self._refuse_silence).remove)
            undo.callback(self._running.clear)
            undo.enter_context(recording(self))
            yield

    def record_call(self, stats: HeadStats) -> None:
        """Take the statistics of one call."""
        assert self._sink is not None
        self._calls += 1
        if self._running and self._sink.selects(name := self._running[-1][1]):
            self._sink.record(name, stats, Annotations(), None, None)

    def _follow(self, undo: ExitStack, module: nn.Module, name: str) -> None:
        def enter(module: nn.Module, _args: Any) -> None:
            self._running.append((module, name))

        def leave(module: nn.Module, _args: Any, _result: Any) -> None:
            # A hook of someone else may have raised before `enter` ran: then there is nothing to leave.
            if any(entry[0] is module for entry in self._running):
                while self._running.pop()[0] is not module:
                    pass

        undo.callback(module.register_forward_pre_hook(enter).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _refuse_silence(self, module: nn.Module, _args: Any, _result: Any) -> None:
        if not self._calls:
            raise UnsupportedError(
                f"model: {type(module).__name__} made no attention call that attncap can see; a plain torch module is "
                "captured where it calls attncap.scaled_dot_product_attention"
            )
