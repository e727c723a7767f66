"""From sums to statistics: what a program writes for its rows.

A program that saw a part of the keys writes the sums themselves, with the maximum they are relative to; merge.py joins
the parts.
"""

import triton
import triton.language as tl

from attncap_kernels.bands import mass_of_band
from attncap_kernels.scores import score_of_x
from attncap_kernels.softmax import LN_2, join_null_outcome, sees_keys, unit_of
from attncap_kernels.topk import kth_largest


@triton.jit
def finish_rows(state, query_MD, inputs, numbers, outputs, rows, part, P: tl.constexpr):
    """Write the output and statistics of a tile of rows."""
    if P.PARTS > 1:
        write_part(state, query_MD, inputs, numbers, outputs, rows, part, P)
    else:
        write_rows(state, query_MD, inputs, numbers, outputs, rows, P)


@triton.jit
def null_x(inputs, numbers, rows, P: tl.constexpr):
    """x of the null outcome, as a scalar or one for each row."""
    sink = inputs.sink_logits
    return tl.load(sink.ptr + rows.head * sink.s0).to(tl.float32) / score_of_x(numbers, P)


@triton.jit
def write_rows(state, query_MD, inputs, numbers, outputs, rows, P: tl.constexpr):
    """All keys were seen: sums become probabilities."""
    unit = unit_of(score_of_x(numbers, P))
    sees = sees_keys(state.l)
    m, l, w, p_null = state.m, state.l, state.w, state.l
    factor = tl.full([P.BLOCK_M], 1.0, tl.float32)
    if inputs.sink_logits is not None:
        m, l, w, factor, p_null = join_null_outcome(m, l, w, null_x(inputs, numbers, rows, P), unit)
    l = tl.where(sees, l, 1.0)
    inverse = tl.where(sees, 1.0 / l, 0.0)
    # Rows without a key share tiles with others, whose values may be no numbers.
    write_out(tl.where(sees[:, None], state.acc * (factor * inverse)[:, None], 0.0), outputs, rows, P)
    write_scalars(sees, state.m, m, l, w, state.squares, factor, p_null, numbers, outputs, rows, P)
    if outputs.peak is not None:
        counted = sees & rows.counted
        tl.store(outputs.peak + rows.statistic, tl.where(counted, m, float("-inf")), mask=rows.exists)
        tl.store(outputs.total + rows.statistic, tl.where(counted, l, 1.0), mask=rows.exists)
    if P.TOPK > 0:
        bound = tl.where(sees & rows.counted, kth_largest(state.classes, P), float("inf"))
        tl.store(outputs.bound + rows.statistic, bound, mask=rows.exists)
    write_masses(state, m, factor, inverse, query_MD, inputs, numbers, outputs, rows, 0, P)


@triton.jit
def write_scalars(sees, largest, m, l, w, squares, factor, p_null, numbers, outputs, rows, P: tl.constexpr):
    """lse, max_logit, entropy, collision and null_mass. `largest` is over keys, m and l with the null outcome too."""
    scale = score_of_x(numbers, P)
    counted = sees & rows.counted
    at, exists = rows.statistic, rows.exists
    bits = tl.log2(l)
    # A backward needs the lse of rows that do not count too.
    tl.store(outputs.lse + at, tl.where(sees, m * scale + bits * LN_2, float("-inf")), mask=exists)
    if outputs.max_logit is not None:
        tl.store(outputs.max_logit + at, tl.where(counted, largest * scale, float("-inf")), mask=exists)
    if outputs.entropy is not None:
        tl.store(outputs.entropy + at, tl.where(counted, (bits - w / l) * LN_2, 0.0), mask=exists)
    if outputs.collision is not None:
        share = factor / l
        tl.store(outputs.collision + at, tl.where(counted, squares * (share * share), 0.0), mask=exists)
    if outputs.null_mass is not None:
        tl.store(outputs.null_mass + at, tl.where(counted, p_null / l, 0.0), mask=exists)


@triton.jit
def write_part(state, query_MD, inputs, numbers, outputs, rows, part, P: tl.constexpr):
    """A part of the keys was seen: the sums, and the maximum that they are relative to."""
    at, exists = rows.statistic, rows.exists
    column = tl.arange(0, P.PAD_E)[None, :]
    inside = exists[:, None] & (column < P.E)
    sees = sees_keys(state.l)
    tl.store(outputs.out + (at * P.E)[:, None] + column, tl.where(sees[:, None], state.acc, 0.0), mask=inside)
    tl.store(outputs.peak + at, state.m, mask=exists)
    tl.store(outputs.total + at, state.l, mask=exists)
    if outputs.entropy is not None:
        tl.store(outputs.entropy + at, state.w, mask=exists)
    if outputs.collision is not None:
        tl.store(outputs.collision + at, state.squares, mask=exists)
    if P.TOPK > 0:
        column = tl.arange(0, P.CLASSES)[None, :]
        tl.store(outputs.bound + (at * P.CLASSES)[:, None] + column, state.classes, mask=exists[:, None])
    one = tl.full([P.BLOCK_M], 1.0, tl.float32)
    write_masses(state, state.m, one, one, query_MD, inputs, numbers, outputs, rows, part, P)


@triton.jit
def write_masses(state, m, factor, share, query_MD, inputs, numbers, outputs, rows, part, P: tl.constexpr):
    """Sums over keys times `share`, 0 for rows that do not count or see no key.

    The walk's sums, relative to state.m, become relative to m by `factor`; the bands' are relative to m already.
    """
    at, exists, counted = rows.statistic, rows.exists, rows.counted & sees_keys(state.l)
    walked = factor * share
    if outputs.distance is not None:
        tl.store(outputs.distance + at, tl.where(counted, state.distance * walked, 0.0), mask=exists)
    for tag in tl.static_range(P.TAGS):
        mass = tl.where(counted, state.tags[tag] * walked, 0.0)
        tl.store(outputs.tag_mass + at * P.TAGS + tag, mass, mask=exists)
    for feature in tl.static_range(P.FEATURES):
        mass = tl.where(counted, state.features[feature] * walked, 0.0)
        tl.store(outputs.feature_mass + at * P.FEATURES + feature, mass, mask=exists)
    if outputs.sink_mass is not None:
        mass = mass_of_band(m, query_MD, inputs, numbers, rows, part, 0, numbers.sink - 1, False, P)
        tl.store(outputs.sink_mass + at, tl.where(counted, mass * share, 0.0), mask=exists)
    if outputs.diagonal_mass is not None:
        mass = mass_of_band(m, query_MD, inputs, numbers, rows, part, -numbers.diagonal, numbers.diagonal, True, P)
        tl.store(outputs.diagonal_mass + at, tl.where(counted, mass * share, 0.0), mask=exists)
    if P.OFFSETS > 0:
        for index in range(P.OFFSETS):
            offset = tl.load(outputs.offsets + index)
            mass = mass_of_band(m, query_MD, inputs, numbers, rows, part, offset, offset, True, P)
            tl.store(outputs.offset_mass + at * P.OFFSETS + index, tl.where(counted, mass * share, 0.0), mask=exists)


@triton.jit
def write_out(out_ME, outputs, rows, P: tl.constexpr):
    """Rows of `out`, rounded to its dtype."""
    out = outputs.out
    column = tl.arange(0, P.PAD_E)
    place = rows.batch * out.s0 + rows.head.to(tl.int64) * out.s1 + (rows.row0 + rows.row).to(tl.int64) * out.s2
    inside = rows.exists[:, None] & (column < P.E)[None, :]
    pointer = out.ptr + place[:, None] + column.to(tl.int64)[None, :] * out.s3
    tl.store(pointer, out_ME.to(out.ptr.dtype.element_ty), mask=inside)
