"""The torch operators attncap::attention and attncap::attention_varlen.

Statistics are outputs, never side effects, so that torch.compile keeps them: each operator gives [out, *statistics
that were asked for, in the order of HeadStats]. Launchers are imported when an operator first runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from attncap.types import STATISTIC_NAMES, HeadStats, StatSpec, UnsupportedError
from attncap.validation import Call, Extras, Options

# The numbers of StatSpec (diagonal None as -1) and of Options, in the order of their fields.
_NUMBERS = (
    "bool entropy, bool max, int sink, int diagonal, int topk, int[] offsets, bool distance, bool collision, "
    "bool received, bool causal, float scale, int[] window, float softcap"
)
_EXTRAS = "Tensor? sink_logits, Tensor? query_mask, Tensor? query_tags, Tensor? key_tags, Tensor? key_features"

torch.library.define(
    "attncap::attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, {_EXTRAS}, {_NUMBERS}, "
    f"SymInt query_offset, str impl) -> Tensor[]",
)
torch.library.define(
    "attncap::attention_varlen",
    f"(Tensor query, Tensor key, Tensor value, int[] bounds_q, int[] bounds_k, {_EXTRAS}, {_NUMBERS}, "
    f"int? query_offset, str impl) -> Tensor[]",
)

_SPEC_FIELDS = tuple(field.name for field in fields(StatSpec))


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, options: Options, extras: Extras, impl: str
) -> tuple[Tensor, HeadStats]:
    """Run attncap::attention on checked arguments, served by `impl`."""
    offset = key.shape[2] - query.shape[2] if options.query_offset is None else options.query_offset
    outputs = torch.ops.attncap.attention(
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
    outputs = torch.ops.attncap.attention_varlen(
        query, key, value, bounds_q, bounds_k, *_optional(extras), *_numbers(spec, options), options.query_offset, impl
    )
    return _unpack(outputs, spec, extras)


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


def _shapes(spec: StatSpec, extras: Extras, rows: tuple[int, ...], keys: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of each statistic asked for: `rows` is (B, H, Q) and `keys` is (B, H, K)."""
    shapes = {"lse": rows}
    switches = {
        "max_logit": spec.max,
        "entropy": spec.entropy,
        "collision": spec.collision,
        "sink_mass": spec.sink > 0,
        "diagonal_mass": spec.diagonal is not None,
        "distance": spec.distance,
        "null_mass": extras.sink_logits is not None,
    }
    shapes |= {name: rows for name, on in switches.items() if on}
    if spec.offsets:
        shapes["offset_mass"] = (*rows, len(spec.offsets))
    if extras.query_tags is not None:
        shapes["tag_mass"] = (*rows, extras.query_tags.shape[0])
    if extras.key_features is not None:
        shapes["feature_mass"] = (*rows, extras.key_features.shape[-1])
    if spec.topk:
        shapes |= {"topk_prob": (*rows, spec.topk), "topk_index": (*rows, spec.topk)}
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
    asked = _shapes(spec, extras, (), ())
    names = (name for name in STATISTIC_NAMES if name in asked)
    return outputs[0], HeadStats(**dict(zip(names, outputs[1:], strict=True)))


def _dense_outputs(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras
) -> tuple[Tensor, HeadStats]:
    rows = tuple(query.shape[:3])
    shapes = _shapes(spec, extras, rows, (*rows[:2], key.shape[2]))
    return query.new_empty(*rows, value.shape[3]), _new_stats(query, shapes)


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
    else:
        from attncap import cpu

        cpu.attention(call, out, stats)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> list[Tensor]:
    spec, options, extras, impl = _arguments(attn_mask, rest)
    out, stats = _dense_outputs(query, key, value, spec, extras)
    assert options.query_offset is not None
    shape = (query.shape[2], 0, key.shape[2], options.query_offset)
    sequences = [(batch, 0, *shape) for batch in range(query.shape[0])]
    _launch(impl, Call(query, key, value, spec, options, extras, sequences, packed=False), out, stats)
    return _pack(out, stats)


@torch.library.register_fake("attncap::attention")  # type: ignore[untyped-decorator]
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any) -> list[Tensor]:
    spec, _, extras, _ = _arguments(attn_mask, rest)
    return _pack(*_dense_outputs(query, key, value, spec, extras))


def _attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds_q: list[int], bounds_k: list[int], *rest: Any
) -> list[Tensor]:
    spec, options, extras, impl = _arguments(None, rest)
    out, stats = _packed_outputs(query, key, value, spec, extras)
    sequences = []
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        offset = (k1 - k0) - (q1 - q0) if options.query_offset is None else options.query_offset
        sequences.append((0, q0, q1 - q0, k0, k1 - k0, offset))
    # The kernel sees packed tensors as one batch whose sequences start at different rows.
    batched = HeadStats(**{name: tensor[None] for name, tensor in stats.items()})
    query, key, value, out4 = (tensor.transpose(0, 1)[None] for tensor in (query, key, value, out))
    _launch(impl, Call(query, key, value, spec, options, extras, sequences, packed=True), out4, batched)
    return _pack(out, stats)


@torch.library.register_fake("attncap::attention_varlen")  # type: ignore[untyped-decorator]
def _attention_varlen_fake(
    query: Tensor, key: Tensor, value: Tensor, bounds_q: list[int], bounds_k: list[int], *rest: Any
) -> list[Tensor]:
    spec, _, extras, _ = _arguments(None, rest)
    return _pack(*_packed_outputs(query, key, value, spec, extras))


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


def _no_gradient(_context: Any, *_gradients: Any) -> None:
    raise UnsupportedError("attncap's operators have no gradients yet; call them under torch.no_grad()")


for _name, _kernel in (("attncap::attention", _attention), ("attncap::attention_varlen", _attention_varlen)):
    torch.library.impl(_name, ("cpu", "cuda"), _kernel)
    torch.library.register_autograd(_name, _no_gradient)
