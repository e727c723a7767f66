"""The torch operators attncap::attention and attncap::attention_varlen, and their backwards.

Statistics are outputs, never side effects, so that torch.compile keeps them: each operator gives [out, *statistics
that were asked for, in the order of HeadStats]. Its lse is that of every row; what `query_mask` leaves out is hidden
from the user when the operator has run. A backward gives the gradients of the inputs named in `wanted`, from the
derivatives of the outputs named in `arrived`; "level" among the wanted is what kernels know of each row: dout . out,
where the loss depends on the output alone. Launchers are imported when an operator first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from attncap import autograd, dispatch
from attncap.types import STATISTIC_NAMES, HeadStats, StatSpec
from attncap.validation import Call, Extras, Gradients, Options, Upstream

# The numbers of StatSpec (diagonal None as -1) and of Options, in the order of their fields.
_NUMBERS = (
    "bool entropy, bool max, int sink, int diagonal, int topk, int[] offsets, bool distance, bool collision, "
    "bool received, bool causal, float scale, int[] window, float softcap"
)
_EXTRAS = "Tensor? sink_logits, Tensor? query_mask, Tensor? query_tags, Tensor? key_tags, Tensor? key_features"

_DENSE = (
    f"Tensor query, Tensor key, Tensor value, Tensor? attn_mask, {_EXTRAS}, {_NUMBERS}, SymInt query_offset, str impl"
)
_PACKED = (
    f"Tensor query, Tensor key, Tensor value, int[] bounds_q, int[] bounds_k, {_EXTRAS}, {_NUMBERS}, "
    "int? query_offset, str impl"
)
_BACKWARD = "Tensor[] outputs, Tensor[] upstream, str[] arrived, str[] wanted"

torch.library.define("attncap::attention", f"({_DENSE}) -> Tensor[]")
torch.library.define("attncap::attention_varlen", f"({_PACKED}) -> Tensor[]")
torch.library.define("attncap::attention_backward", f"({_DENSE}, {_BACKWARD}) -> Tensor[]")
torch.library.define("attncap::attention_varlen_backward", f"({_PACKED}, {_BACKWARD}) -> Tensor[]")

_SPEC_FIELDS = tuple(field.name for field in fields(StatSpec))


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, options: Options, extras: Extras, impl: str
) -> tuple[Tensor, HeadStats]:
    """Run attncap::attention on checked arguments, served by `impl`."""
    offset = key.shape[2] - query.shape[2] if options.query_offset is None else options.query_offset
    outputs = _run_dense(
        query, key, value, extras.attn_mask, *_optional(extras), *_numbers(spec, options), offset, impl
    )
    return _unpack(outputs, spec, extras)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    spec: StatSpec,
    options: Options,
    extras: Extras,
    impl: str,
) -> tuple[Tensor, HeadStats]:
    """Run attncap::attention_varlen on checked arguments, served by `impl`."""
    outputs = _run_packed(
        query, key, value, bounds_q, bounds_k, *_optional(extras), *_numbers(spec, options), options.query_offset, impl
    )
    return _unpack(outputs, spec, extras)


def backward_of_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    extras: Extras,
    impl: str,
    out: Tensor,
    lse: Tensor,
    derivative: Tensor,
    wanted: list[str],
) -> list[Tensor]:
    """Run attncap::attention_backward where the loss depends on `out` alone: the gradients of inputs `wanted`.

    "level" among them is dout . out of every row, (B, H, Q).
    """
    offset = key.shape[2] - query.shape[2] if options.query_offset is None else options.query_offset
    numbers = _numbers(StatSpec.none(), options)
    found: list[Tensor] = torch.ops.attncap.attention_backward(
        query, key, value, extras.attn_mask, *_optional(extras), *numbers, offset, impl,
        [out, lse], [derivative], ["out"], wanted,
    )  # fmt: skip
    return found


def _numbers(spec: StatSpec, options: Options) -> tuple[object, ...]:
    diagonal = -1 if spec.diagonal is None else spec.diagonal
    statistics = (diagonal if name == "diagonal" else getattr(spec, name) for name in _SPEC_FIELDS)
    return (*statistics, options.causal, options.scale, options.window, options.softcap)


@functools.lru_cache(maxsize=256)  # a program makes the same call over and over
def _spec_of(statistics: tuple[Any, ...]) -> StatSpec:
    given = dict(zip(_SPEC_FIELDS, statistics, strict=True))
    return StatSpec(**(given | {"diagonal": None if given["diagonal"] < 0 else given["diagonal"]}))


def _optional(extras: Extras) -> tuple[Tensor | None, ...]:
    return (extras.sink_logits, extras.query_mask, extras.query_tags, extras.key_tags, extras.key_features)


def _statistics(spec: StatSpec, extras: Extras) -> tuple[str, ...]:
    """Names of the statistics asked for, in the order of an operator's outputs."""
    asked = {
        "lse": True,
        "max_logit": spec.max,
        "entropy": spec.entropy,
        "collision": spec.collision,
        "sink_mass": spec.sink > 0,
        "diagonal_mass": spec.diagonal is not None,
        "distance": spec.distance,
        "null_mass": extras.sink_logits is not None,
        "offset_mass": len(spec.offsets) > 0,
        "tag_mass": extras.query_tags is not None,
        "feature_mass": extras.key_features is not None,
        "topk_prob": spec.topk > 0,
        "topk_index": spec.topk > 0,
        "received_mass": spec.received,
    }
    return tuple(name for name in STATISTIC_NAMES if asked[name])


def _shapes(spec: StatSpec, extras: Extras, rows: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of each statistic asked for: `rows` is (B, H, Q) and `keys` is (B, H, K)."""
    shapes = dict.fromkeys(_statistics(spec, extras), rows)
    if spec.offsets:
        shapes["offset_mass"] = (*rows, len(spec.offsets))
    if extras.query_tags is not None:
        shapes["tag_mass"] = (*rows, extras.query_tags.shape[0])
    if extras.key_features is not None:
        shapes["feature_mass"] = (*rows, extras.key_features.shape[-1])
    if spec.topk:
        shapes["topk_prob"] = shapes["topk_index"] = (*rows, spec.topk)
    if spec.received:
        shapes["received_mass"] = keys
    return shapes


def _new_stats(query: Tensor, shapes: dict[str, tuple[int, ...]]) -> HeadStats:
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    tensors = {}
    for name, shape in shapes.items():
        # The kernels write every row, but only the keys that some row may see.
        new = query.new_zeros if name == "received_mass" else query.new_empty
        tensors[name] = new(shape, dtype=torch.int32 if name == "topk_index" else compute)
    return HeadStats(**tensors)


def _pack(out: Tensor, stats: HeadStats) -> list[Tensor]:
    return [out, *(tensor for _, tensor in stats.items())]


def _unpack(outputs: Sequence[Tensor], spec: StatSpec, extras: Extras) -> tuple[Tensor, HeadStats]:
    # Where the loss depends on `out` alone a backward is given lse and no other statistic.
    return outputs[0], HeadStats(**dict(zip(_statistics(spec, extras), outputs[1:], strict=False)))


def _dense_outputs(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras
) -> tuple[Tensor, HeadStats]:
    rows = tuple(query.shape[:3])
    shapes = _shapes(spec, extras, rows, (*rows[:2], key.shape[2]))
    return _new_out(query, value.shape[3]), _new_stats(query, shapes)


def _new_out(query: Tensor, value_dim: int) -> Tensor:
    """(B, H, Q, E), in memory as the query is: models make it as (B, Q, H, D), and want the output so."""
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    return query.new_empty(batch, heads, rows, value_dim)


def _packed_outputs(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras
) -> tuple[Tensor, HeadStats]:
    heads = query.shape[1]
    shapes = _shapes(spec, extras, (heads, query.shape[0]), (heads, key.shape[0]))
    return query.new_empty(query.shape[0], heads, value.shape[2]), _new_stats(query, shapes)


def _launch(impl: str, call: Call, out: Tensor, stats: HeadStats) -> None:
    """Fill `out` and `stats` by the kernels of `impl`."""
    if impl == "triton":
        from attncap_kernels import launch

        launch.attention(call, out, stats)
    elif impl == "cuda":
        from attncap import cuda

        cuda.attention(call, out, stats)
    else:
        from attncap import cpu

        cpu.attention(call, out, stats)


def _launch_backward(
    impl: str, call: Call, out: Tensor, stats: HeadStats, upstream: Upstream, gradients: Gradients
) -> None:
    """Fill `gradients` for a call that `impl` computed."""
    if impl == "triton" or (impl == "cuda" and _triton_serves(call)):
        from attncap_kernels import launch_backward

        launch_backward.backward(call, out, stats, upstream, gradients)
    elif impl == "cpu":
        from attncap import cpu

        cpu.backward(call, out, stats, upstream, gradients)
    else:
        from attncap import gradients as in_torch

        in_torch.attention(call, out, stats, upstream, gradients)


def _triton_serves(call: Call) -> bool:
    return dispatch.lacks("triton", call.query, call.key, call.value, call.spec, call.extras) is None


def _dense_call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> tuple[Call, str]:
    spec, options, extras, impl = _arguments(attn_mask, rest)
    assert options.query_offset is not None
    rows, keys = query.shape[2], key.shape[2]
    if attn_mask is not None:
        extras = replace(extras, attn_mask=attn_mask.expand(*query.shape[:3], keys))
    sequences = [(batch, 0, rows, 0, keys, options.query_offset) for batch in range(query.shape[0])]
    return Call(query, key, value, spec, options, extras, sequences, packed=False), impl


def _packed_call(
    query: Tensor, key: Tensor, value: Tensor, bounds_q: list[int], bounds_k: list[int], *rest: Any
) -> tuple[Call, str]:
    spec, options, extras, impl = _arguments(None, rest)
    sequences = []
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        offset = (k1 - k0) - (q1 - q0) if options.query_offset is None else options.query_offset
        sequences.append((0, q0, q1 - q0, k0, k1 - k0, offset))
    query, key, value = _as_batch(query), _as_batch(key), _as_batch(value)
    return Call(query, key, value, spec, options, extras, sequences, packed=True), impl


def _as_batch(packed: Tensor) -> Tensor:
    """(rows, H, D) as kernels see it: one batch entry whose sequences start at different rows."""
    return packed.transpose(0, 1)[None]


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    call, impl = _dense_call(query, key, value, *rest)
    out, stats = _dense_outputs(query, key, value, call.spec, call.extras)
    _launch(impl, call, out, stats)
    return _pack(out, stats)


@torch.library.register_fake("attncap::attention")  # type: ignore[untyped-decorator]
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> list[Tensor]:
    spec, _, extras, _ = _arguments(attn_mask, rest)
    return _pack(*_dense_outputs(query, key, value, spec, extras))


def _attention_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    call, impl = _packed_call(query, key, value, *rest)
    out, stats = _packed_outputs(query, key, value, call.spec, call.extras)
    _launch(impl, call, _as_batch(out), HeadStats(**{name: tensor[None] for name, tensor in stats.items()}))
    return _pack(out, stats)


@torch.library.register_fake("attncap::attention_varlen")  # type: ignore[untyped-decorator]
def _attention_varlen_fake(
    query: Tensor, key: Tensor, value: Tensor, bounds_q: list[int], bounds_k: list[int], *rest: Any
) -> list[Tensor]:
    spec, _, extras, _ = _arguments(None, rest)
    return _pack(*_packed_outputs(query, key, value, spec, extras))


# The arguments that have gradients, at their places in the two schemas.
_DIFFERENTIABLE = {"query": 0, "key": 1, "value": 2, "attn_mask": 3, "sink_logits": 4, "key_features": 8}
_DIFFERENTIABLE_PACKED = {"query": 0, "key": 1, "value": 2, "sink_logits": 5, "key_features": 9}


def _attention_backward(*arguments: Any) -> list[Tensor]:
    *inputs, outputs, upstream, arrived, wanted = arguments
    call, impl = _dense_call(*inputs)
    out, stats = _unpack(outputs, call.spec, call.extras)
    found = _zeros(inputs, wanted, _DIFFERENTIABLE, call.query.shape[:3])
    _launch_backward(impl, call, out, stats, Upstream(**dict(zip(arrived, upstream, strict=True))), Gradients(**found))
    return list(found.values())


def _attention_varlen_backward(*arguments: Any) -> list[Tensor]:
    *inputs, outputs, upstream, arrived, wanted = arguments
    call, impl = _packed_call(*inputs)
    out, stats = _unpack(outputs, call.spec, call.extras)
    stats = HeadStats(**{name: tensor[None] for name, tensor in stats.items()})
    given = dict(zip(arrived, upstream, strict=True))
    seen = {name: _as_batch(tensor) if name == "out" else tensor[None] for name, tensor in given.items()}
    found = _zeros(inputs, wanted, _DIFFERENTIABLE_PACKED, call.query.shape[1:3])
    views = {name: _as_batch(tensor) if name in ("query", "key", "value") else tensor for name, tensor in found.items()}
    if "level" in views:
        views["level"] = views["level"][None]
    _launch_backward(impl, call, _as_batch(out), stats, Upstream(**seen), Gradients(**views))
    return list(found.values())


def _zeros(
    inputs: Sequence[Any], wanted: Sequence[str], places: dict[str, int], rows: Sequence[int]
) -> dict[str, Tensor]:
    """A tensor for each that is wanted; `rows` is the shape of a statistic of rows."""
    query = inputs[places["query"]]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    return {
        name: query.new_zeros(rows, dtype=compute) if name == "level" else torch.zeros_like(inputs[places[name]])
        for name in wanted
    }


@torch.library.register_fake("attncap::attention_backward")  # type: ignore[untyped-decorator]
def _attention_backward_fake(*arguments: Any) -> list[Tensor]:
    return list(_zeros(arguments, arguments[-1], _DIFFERENTIABLE, arguments[0].shape[:3]).values())


@torch.library.register_fake("attncap::attention_varlen_backward")  # type: ignore[untyped-decorator]
def _attention_varlen_backward_fake(*arguments: Any) -> list[Tensor]:
    rows = (arguments[0].shape[1], arguments[0].shape[0])
    return list(_zeros(arguments, arguments[-1], _DIFFERENTIABLE_PACKED, rows).values())


def _arguments(attn_mask: Tensor | None, rest: tuple[Any, ...]) -> tuple[StatSpec, Options, Extras, str]:
    """The schema's optional tensors, numbers, offset and name as the project's own records."""
    tensors, numbers, query_offset, impl = rest[:5], rest[5:-2], rest[-2], rest[-1]
    statistics, (causal, scale, window, softcap) = numbers[: len(_SPEC_FIELDS)], numbers[len(_SPEC_FIELDS) :]
    spec = _spec_of(tuple(tuple(entry) if isinstance(entry, list) else entry for entry in statistics))
    return (
        spec,
        Options(causal, scale, (window[0], window[1]), softcap, query_offset),
        Extras(attn_mask, *tensors),
        impl,
    )


def _output_names(first: int) -> Callable[[Sequence[Any]], Sequence[str]]:
    """Of the arguments of an operator whose optional tensors stand from `first` on."""

    def names(arguments: Sequence[Any]) -> Sequence[str]:
        spec, _, extras, _ = _arguments(None, tuple(arguments[first:]))
        return ("out", *_statistics(spec, extras))

    return names


torch.library.impl("attncap::attention", ("cpu", "cuda"), _attention)
torch.library.impl("attncap::attention_varlen", ("cpu", "cuda"), _attention_varlen)
torch.library.impl("attncap::attention_backward", "CompositeExplicitAutograd", _attention_backward)
torch.library.impl("attncap::attention_varlen_backward", "CompositeExplicitAutograd", _attention_varlen_backward)

_run_dense = autograd.register("attention", _DIFFERENTIABLE, _output_names(_DIFFERENTIABLE["sink_logits"]))
_run_packed = autograd.register(
    "attention_varlen", _DIFFERENTIABLE_PACKED, _output_names(_DIFFERENTIABLE_PACKED["sink_logits"])
)
