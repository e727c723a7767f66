"""Joins what programs wrote that saw parts of the keys of the same rows.

With M = max over parts of m, each part's sums are rescaled by a = 2^((m - M) unit), as between two tiles (softmax.py).
"""

import triton
import triton.language as tl

from attncap_kernels.finish import null_x, write_scalars
from attncap_kernels.records import Numbers, Rows
from attncap_kernels.scores import score_of_x
from attncap_kernels.softmax import join_null_outcome, rescale, sees_keys, unit_of
from attncap_kernels.topk import kth_largest


@triton.jit
def join(partial, place, held, factor):
    """[1] sum over parts of a number, rescaled."""
    return tl.sum(tl.load(partial + place, mask=held, other=0.0) * factor, 0, keep_dims=True)


@triton.jit(do_not_specialize=["total_rows"])
def merge_parts(inputs, parts, outputs, sign, scale, softcap, total_rows, PAD_PARTS: tl.constexpr, P: tl.constexpr):
    """One program for each row: the statistics of `parts` become those of `outputs`."""
    numbers = Numbers(sign, scale, softcap, 0, 0, 0, 0)
    unit = unit_of(score_of_x(numbers, P))
    at = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = at % total_rows
    head = at // total_rows % inputs.heads
    batch = at // total_rows // inputs.heads
    counted = row >= 0
    if inputs.query_mask is not None:
        place = batch * inputs.query_mask.s0 + row * inputs.query_mask.s1
        counted = tl.load(inputs.query_mask.ptr + place) != 0
    rows = Rows(batch, head, head, 0, row, row >= 0, row, 0, 0, 0, 0, 0, at, counted)

    part = tl.arange(0, PAD_PARTS)
    held = part < P.PARTS
    place = part.to(tl.int64) * inputs.part_rows + at
    part_m = tl.load(parts.peak + place, mask=held, other=float("-inf"))
    largest = tl.max(part_m, 0, keep_dims=True)
    shift, factor = rescale(part_m, largest, unit)
    factor = tl.where(part_m > float("-inf"), factor, 0.0)
    part_l = tl.load(parts.total + place, mask=held, other=0.0)
    l = tl.sum(part_l * factor, 0, keep_dims=True)
    sees = sees_keys(l)
    w, squares, m, p_null = l, l, largest, l
    if outputs.entropy is not None:
        part_w = tl.load(parts.entropy + place, mask=held, other=0.0)
        w = tl.sum(factor * (part_w + part_l * shift), 0, keep_dims=True)
    if outputs.collision is not None:
        squares = join(parts.collision, place, held, factor * factor)
    null_factor = tl.full([1], 1.0, tl.float32)
    if inputs.sink_logits is not None:
        m, l, w, null_factor, p_null = join_null_outcome(m, l, w, null_x(inputs, numbers, rows, P), unit)
    l = tl.where(sees, l, 1.0)
    write_scalars(sees, largest, m, l, w, squares, null_factor, p_null, numbers, outputs, rows, P)

    inverse = tl.where(sees, null_factor / l, 0.0)
    merge_out(parts, outputs, rows, place, held, factor, inverse, P)
    factor = tl.where(sees & counted, factor * inverse, 0.0)
    merge_masses(parts, outputs, at, place, held, factor, P)
    if outputs.peak is not None:
        tl.store(outputs.peak + at, tl.where(counted, m, float("-inf")))
        tl.store(outputs.total + at, tl.where(counted, l, 1.0))
    if P.TOPK > 0:
        column = tl.arange(0, P.CLASSES)[None, :]
        maxima = tl.load(parts.bound + (place * P.CLASSES)[:, None] + column, mask=held[:, None], other=float("-inf"))
        bound = kth_largest(tl.max(maxima, 0, keep_dims=True), P)
        tl.store(outputs.bound + at, tl.where(sees & counted, bound, float("inf")))


@triton.jit
def merge_masses(parts, outputs, at, place, held, factor, P: tl.constexpr):
    """Masses over keys: `factor` makes each part's sums probabilities."""
    if outputs.distance is not None:
        tl.store(outputs.distance + at, join(parts.distance, place, held, factor))
    if outputs.sink_mass is not None:
        tl.store(outputs.sink_mass + at, join(parts.sink_mass, place, held, factor))
    if outputs.diagonal_mass is not None:
        tl.store(outputs.diagonal_mass + at, join(parts.diagonal_mass, place, held, factor))
    if P.OFFSETS > 0:
        for index in range(P.OFFSETS):
            mass = join(parts.offset_mass, place * P.OFFSETS + index, held, factor)
            tl.store(outputs.offset_mass + at * P.OFFSETS + index, mass)
    if P.TAGS > 0:
        for tag in range(P.TAGS):
            tl.store(outputs.tag_mass + at * P.TAGS + tag, join(parts.tag_mass, place * P.TAGS + tag, held, factor))
    if P.FEATURES > 0:
        for feature in range(P.FEATURES):
            mass = join(parts.feature_mass, place * P.FEATURES + feature, held, factor)
            tl.store(outputs.feature_mass + at * P.FEATURES + feature, mass)


@triton.jit
def merge_out(parts, outputs, rows, place, held, factor, inverse, P: tl.constexpr):
    """The row's output."""
    column = tl.arange(0, P.PAD_E)[None, :]
    inside = held[:, None] & (column < P.E)
    acc = tl.load(parts.out + (place * P.E)[:, None] + column, mask=inside, other=0.0)
    total_E = tl.sum(acc * factor[:, None], 0, keep_dims=True) * inverse[:, None]
    out = outputs.out
    pointer = out.ptr + (rows.batch * out.s0 + rows.head * out.s1 + rows.row * out.s2)[:, None] + column * out.s3
    tl.store(pointer, total_E.to(out.ptr.dtype.element_ty), mask=column < P.E)
