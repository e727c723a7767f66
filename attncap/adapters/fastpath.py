"""nn.TransformerEncoder gives zeros on padding where its fused kernels run; a capture keeps that.

B batch  N tokens  E embedding
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.frames import Signature


class _Running(threading.local):
    """The forward of an encoder that one thread runs; several may run it."""

    padding: Tensor | None = None  # (B, N) bool, True for padding


def follow_padded_rows(undo: ExitStack, model: nn.Module) -> None:
    """Have the last layer of every nn.TransformerEncoder give 0 on padding where torch alone would; until `undo`."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and len(module.layers):
            _follow(undo, module)


def _follow(undo: ExitStack, encoder: nn.TransformerEncoder) -> None:
    signature = Signature(encoder)
    running = _Running()

    def enter(_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.padding = None
        mask = signature.bind(args, kwargs).get("src_key_padding_mask")
        compiling = torch.compiler.is_compiling()  # torch does not use those kernels then
        if not compiling and isinstance(mask, Tensor) and _drops_padding(encoder, args, kwargs):
            running.padding = mask if mask.dtype == torch.bool else mask != 0

    def clear_rows(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        padding = running.padding
        return None if padding is None else output.masked_fill(padding[..., None], 0.0)

    def leave(_encoder: nn.Module, _args: Any, _output: Any) -> None:
        running.padding = None

    undo.callback(encoder.register_forward_pre_hook(enter, with_kwargs=True).remove)
    undo.callback(encoder.layers[-1].register_forward_hook(clear_rows).remove)
    undo.callback(encoder.register_forward_hook(leave, always_call=True).remove)


def _drops_padding(encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch alone would leave the padding out, which its own forward says, run here without its layers."""
    if type(encoder).forward is not nn.TransformerEncoder.forward:
        return False
    layers = _Layers(encoder.layers[0])
    twin = copy.copy(encoder)
    # The copy shares its dictionaries with the encoder: it gets its own, and an attribute comes before a module.
    twin.__dict__["_modules"] = {}
    twin.__dict__.update(layers=layers, norm=None)
    with torch._C.DisableTorchFunction():
        twin.forward(*args, **kwargs)
    return layers.nested


class _Layers:
    """Stands for the layers of an encoder: has the first of them, runs none."""

    def __init__(self, first: nn.Module) -> None:
        self._first = first
        self.nested = False

    def __getitem__(self, _index: int) -> nn.Module:
        return self._first

    def __iter__(self) -> Iterator[Any]:
        yield self._look

    def _look(self, output: Tensor, **_: Any) -> Tensor:
        self.nested = output.is_nested
        return output
