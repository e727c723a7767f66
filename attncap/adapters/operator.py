"""The operator attncap::served: an attention call that a capture serves, with a gradient or inside a compiled graph.

Its outputs are what a backward starts from, and of what it is given only that is kept which the output depends on: a
layer that activation checkpointing runs once more may no longer know the batch's padding, tags and features.

B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from attncap import api, autograd, dispatch, ops, validation
from attncap.adapters import Sink
from attncap.adapters.served import ServedCall, refusal_once_more
from attncap.annotations import Annotations
from attncap.layers import is_backward_running
from attncap.types import StatSpec, UnsupportedError


class Server(Protocol):
    """Who computes served calls and takes their statistics."""

    def serve(self, call: ServedCall) -> tuple[Tensor, Tensor]:
        """(out (B, H, Q, E), lse (B, H, Q) of every row)."""

    @property
    def wants_gates(self) -> bool:
        """Whether `saw_gates` is to be called."""

    def saw_gates(self, call: ServedCall, by_gate: Tensor) -> None:
        """The backward of a call runs: `by_gate` (B, H, Q) is <dloss / dout_i, out_i>."""


# An operator names its server by number: it takes no other Python objects.
_servers: weakref.WeakValueDictionary[int, Server] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_CALL = (
    "int server, str name, bool crosses, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? sink_logits, bool causal, float? scale, int[]? window, float? softcap, SymInt query_offset, "
    "Tensor? query_mask"
)
torch.library.define(
    "attncap::served",
    f"({_CALL}, Tensor? key_mask, Tensor? seen_keys, str[] tag_names, Tensor? query_tags, Tensor? key_tags, "
    "str[] feature_names, Tensor? key_features, str phase) -> (Tensor, Tensor)",
)
torch.library.define(
    "attncap::served_backward",
    f"({_CALL}, Tensor out, Tensor lse, Tensor derivative, str[] wanted) -> Tensor[]",
)
# Where they stand among the arguments of both.
_DIFFERENTIABLE = {"query": 3, "key": 4, "value": 5, "attn_mask": 6, "sink_logits": 7}
_QUERY_MASK = 13


def number_of(server: Server) -> int:
    """A number by which operators find a server, as long as it is there."""
    number = next(_numbers)
    _servers[number] = server
    return number


def served(server: Server, number: int, call: ServedCall, sink: Sink) -> Tensor:
    """Out of `Server.serve`: by the operator where torch must know of the call, in a graph or to differentiate it.

    Args:
        number: that of the server. sink: who is told of the call.
    """
    inputs = (call.query, call.key, call.value, call.attn_mask, call.sink_logits)
    api.refuse_forward_mode(*inputs[:3], validation.Extras(attn_mask=call.attn_mask, sink_logits=call.sink_logits))
    if torch.compiler.is_compiling():
        if sink.differentiable:
            raise UnsupportedError("differentiable: statistics do not leave a compiled graph; capture without it")
        return _by_operator(number, call)
    has_gradient = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    refusal = refusal_once_more(call, sink) if is_backward_running() else ""
    out = _by_operator(number, call) if has_gradient and not sink.differentiable else server.serve(call)[0]
    _refuse_gradient(out, refusal)
    return out


def _refuse_gradient(out: Tensor, refusal: str) -> None:
    """Raise UnsupportedError where a backward comes by, unless there is nothing to say."""

    def refuse(_derivative: Tensor) -> None:
        raise UnsupportedError(refusal)

    if refusal and out.requires_grad:
        out.register_hook(refuse)  # type: ignore[no-untyped-call]


def observe(server: Server, call: ServedCall, sink: Sink, out: Tensor, by_rows: Callable[[Tensor], Tensor]) -> None:
    """Take the statistics of a call that the model's own attention computes, with dropout: as they are without it.

    Args:
        out: what the model's attention gave, in any shape.
        by_rows: of a tensor shaped as `out` without its last dimension, the same as (B, H, Q).
    """
    refusal = refusal_once_more(call, sink) if is_backward_running() else ""
    if sink.differentiable or not is_backward_running():
        with gradients_of(sink):
            server.serve(call)
    _refuse_gradient(out, refusal)
    if not (server.wants_gates and out.requires_grad):
        return
    kept = out.detach()
    precise = torch.promote_types(out.dtype, torch.float32)

    def saw(derivative: Tensor) -> None:
        by_gate = (kept.to(precise) * derivative.to(precise)).sum(-1)
        server.saw_gates(call, by_rows(by_gate))

    out.register_hook(saw)  # type: ignore[no-untyped-call]


def gradients_of(sink: Sink) -> AbstractContextManager[None]:
    """Where a call is computed beside the model's own attention, for its statistics alone: they may have gradients."""
    return torch.set_grad_enabled(sink.differentiable and torch.is_grad_enabled())


def _by_operator(number: int, call: ServedCall) -> Tensor:
    notes = call.annotations
    out: Tensor
    out, _ = torch.ops.attncap.served(
        number,
        call.name,
        call.crosses,
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        call.sink_logits,
        call.causal,
        call.scale,
        call.window,
        call.softcap,
        call.query_offset,
        call.query_mask,
        call.key_mask,
        call.seen_keys,
        list(notes.tag_names),
        notes.query_tags,
        notes.key_tags,
        list(notes.feature_names),
        notes.key_features,
        call.phase,
    )
    return out


def _call(
    name: str,
    crosses: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sink_logits: Tensor | None,
    causal: bool,
    scale: float | None,
    window: list[int] | None,
    softcap: float | None,
    query_offset: int,
    query_mask: Tensor | None,
    **others: Any,
) -> ServedCall:
    return ServedCall(
        name=name,
        crosses=crosses,
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        causal=causal,
        scale=scale,
        query_mask=query_mask,
        query_offset=query_offset,
        window=None if window is None else (window[0], window[1]),
        softcap=softcap,
        sink_logits=sink_logits,
        **others,
    )


@torch.library.impl("attncap::served", "CompositeExplicitAutograd")
def _served(number: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, key_mask, seen_keys, tag_names, query_tags, key_tags, feature_names, key_features, phase = arguments
    notes = Annotations(tuple(tag_names), query_tags, key_tags, tuple(feature_names), key_features)
    call = _call(*given, key_mask=key_mask, seen_keys=seen_keys, annotations=notes, phase=phase)
    out, lse = _servers[number].serve(call)
    return out.contiguous(), lse


@torch.library.register_fake("attncap::served")  # type: ignore[untyped-decorator]
def _served_fake(
    _number: int, _name: str, _crosses: bool, query: Tensor, _key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.shape[:3]
    return value.new_empty(*rows, value.shape[-1]), query.new_empty(rows, dtype=compute)


@torch.library.impl("attncap::served_backward", "CompositeExplicitAutograd")
def _served_backward(number: int, *arguments: Any) -> list[Tensor]:
    *given, out, lse, derivative, wanted = arguments
    call = _call(*given, key_mask=None, annotations=Annotations())
    server = _servers.get(number)
    watched = server is not None and server.wants_gates
    extras = validation.check_extras(call.query, call.key, attn_mask=call.attn_mask, sink_logits=call.sink_logits)
    impl = dispatch.choose("auto", call.query, call.key, call.value, StatSpec.none(), extras)
    found = ops.backward_of_out(
        call.query, call.key, call.value, call.options, extras, impl, out, lse, derivative,
        [*wanted, "level"] if watched else wanted,
    )  # fmt: skip
    if server is not None and watched:
        server.saw_gates(call, found.pop())
    places = [_DIFFERENTIABLE[name] - 1 for name in wanted]
    return [gradient.view(given[place].shape) for gradient, place in zip(found, places, strict=True)]


@torch.library.register_fake("attncap::served_backward")  # type: ignore[untyped-decorator]
def _served_backward_fake(*arguments: Any) -> list[Tensor]:
    return [torch.zeros_like(arguments[_DIFFERENTIABLE[name]]) for name in arguments[-1]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(inputs[place] for place in _DIFFERENTIABLE.values()), *output)
    ctx.mark_non_differentiable(output[1])
    # A mask of rows is not saved but held, for it may be missing when a layer is run once more.
    ctx.others = tuple(None if place in _DIFFERENTIABLE.values() else one for place, one in enumerate(inputs))


def _backward(ctx: Any, derivative: Tensor | None, _of_lse: None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    arguments, result = list(ctx.others), [None] * len(ctx.others)
    if derivative is None:
        return tuple(result)
    for place, tensor in zip(_DIFFERENTIABLE.values(), inputs, strict=True):
        arguments[place] = tensor
    wanted = [name for name, place in _DIFFERENTIABLE.items() if ctx.needs_input_grad[place]]
    call = arguments[: _QUERY_MASK + 1]
    found = torch.ops.attncap.served_backward(*call, out, lse, derivative, wanted)
    for name, gradient in zip(wanted, found, strict=True):
        result[_DIFFERENTIABLE[name]] = gradient
    return tuple(result)


torch.library.register_autograd("attncap::served", _backward, setup_context=_save)
torch.library.register_autograd("attncap::served_backward", autograd.refuse_second)
