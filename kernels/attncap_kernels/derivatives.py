"""Derivatives of a loss by the scores of one tile, from the probabilities, computed once more, and what comes down.

With G_ij the loss's derivative by p_ij and t_ij = log2 p_ij,

    dscore_ij = p_ij (G_ij - level_i) + chosen_ij
    level_i = sum_j p_ij G_ij + p_i0 G_i0 - dlse_i                         (levels.py)

    G_ij = dout_i . v_j + dfeature_mass_i . f_j + dsink_mass_i [j < sink] + ddiagonal_mass_i [|j - pos_i| <= diagonal]
         + sum_o doffset_mass_io [j = pos_i + o] + sum_t dtag_mass_it [tags match] + ddistance_i |j - pos_i|
         + 2 dcollision_i p_ij + dreceived_mass_j - dentropy_i log p_ij

`chosen` holds what goes to a few keys alone: the largest, by dmax_logit_i, and the top k, each by p_ij dtopk_prob_ik.
The scale of `numbers` has its sign here (`signed`). Tiles are [M, N], or [N, M] where TRANSPOSED: their names have no
letters. In a tile that is not SPECIAL nothing is hidden, and no key of a sink, diagonal or offset (walks.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncap_kernels.records import Numbers
from attncap_kernels.scores import (
    over_keys,
    over_rows,
    product_in_steps,
    score_of_x,
    tile_dot,
    tile_product,
    with_mask,
    x_of_product,
)
from attncap_kernels.softmax import LEAST_BITS, LN_2, unit_of


class Weights(NamedTuple):
    """[M] of the rows of a tile, from Derivatives; 0 for what is off."""

    bits: Any  # t = x * unit - bits, or (x - peak) * unit - bits with a floating mask
    peak: Any
    level: Any
    entropy: Any
    collision: Any
    distance: Any


@triton.jit
def signed(sign, scale, softcap, left, right, sink, diagonal):
    """Numbers whose scale has its sign: nothing is asked here of which score is the larger."""
    return Numbers(1.0, sign * scale, softcap, left, right, sink, diagonal)


@triton.jit
def load_weights(given, rows, CHECK: tl.constexpr, P: tl.constexpr):
    """The numbers of a block of rows, all of which exist unless CHECK.

    Where one does not, all are 0, and so are its query and dout: it adds 0 to whatever is summed.
    """
    return Weights(
        load_weight(given.bits, rows, CHECK),
        load_weight(given.peak, rows, CHECK),
        load_weight(given.level, rows, CHECK),
        load_weight(given.entropy, rows, CHECK),
        load_weight(given.collision, rows, CHECK),
        load_weight(given.distance, rows, CHECK),
    )


@triton.jit
def load_weight(pointer, rows, CHECK: tl.constexpr):
    """[M], 0 for rows that do not exist or where there is no pointer."""
    if pointer is None:
        weight = rows.statistic * 0.0
    elif CHECK:
        weight = tl.load(pointer + rows.statistic, mask=rows.exists, other=0.0)
    else:
        weight = tl.load(pointer + rows.statistic)
    return weight


@triton.jit
def tile_bits(query, key, weights, inputs, numbers, rows, start, SPECIAL: tl.constexpr, P: tl.constexpr):
    """(capped x, t) of keys start .. start + N - 1; p is 2^t, 0 where hidden."""
    capped = x_of_product(tile_product(query, key, inputs, numbers, rows, start, SPECIAL, P), numbers, P)
    x = capped
    if SPECIAL:
        x, hidden = with_mask(capped, inputs, numbers, rows, start, P)
    unit = unit_of(score_of_x(numbers, P))
    if P.MASK == 2:
        t = (x - over_rows(weights.peak, P)) * unit - over_rows(weights.bits, P)
        # From a mask of the smallest float it is -inf.
        t = tl.maximum(t, LEAST_BITS, propagate_nan=tl.PropagateNan.ALL)
    else:
        t = x * unit - over_rows(weights.bits, P)
    if SPECIAL:
        t = tl.where(hidden, LEAST_BITS, t)
    return capped, t


@triton.jit
def by_output(derivative, value, inputs, given, rows, start, SPECIAL: tl.constexpr, P: tl.constexpr):
    """dout . v of dout [M, E] and values ([E, N], or [N, E] if TRANSPOSED)."""
    if P.STEP_D < P.PAD_E:
        product = product_in_steps(given.out, inputs.value, 1.0, rows, start, P.E, P.PAD_E, SPECIAL, P)
    else:
        product = tile_dot(derivative, value, P)
    return product


@triton.jit
def tile_derivatives(
    query, key, derivative, value, weights, inputs, given, numbers, rows, start, SPECIAL: tl.constexpr, P: tl.constexpr
):
    """(p, dscore, dproduct but for the scale) of keys start .. start + N - 1."""
    capped, t = tile_bits(query, key, weights, inputs, numbers, rows, start, SPECIAL, P)
    p = tl.exp2(t)
    if given.out is None:
        by_probability = tl.zeros_like(p) - over_rows(weights.level, P)
    else:
        by_probability = by_output(derivative, value, inputs, given, rows, start, SPECIAL, P)
        by_probability -= over_rows(weights.level, P)
    by_probability = with_statistics(by_probability, p, t, weights, numbers, given, rows, start, SPECIAL, P)
    by_probability = with_masses(by_probability, inputs, given, rows, start, P)
    dscore = p * by_probability
    dscore = with_chosen(dscore, given, rows, start, P)
    dproduct = dscore
    if P.SOFTCAP:
        share = capped / numbers.softcap
        dproduct = dscore * (1.0 - share * share)
    return p, dscore, dproduct


@triton.jit
def with_statistics(total, p, t, weights, numbers, given, rows, start, SPECIAL: tl.constexpr, P: tl.constexpr):
    """Add what comes down to statistics with one number for each row."""
    if given.entropy is not None:
        total -= over_rows(weights.entropy * LN_2, P) * t
    if given.collision is not None:
        total += over_rows(weights.collision * 2.0, P) * p
    column = over_keys(tl.arange(0, P.BLOCK_N), P)
    ahead = column - over_rows(rows.position - start, P)
    if given.distance is not None:
        total += over_rows(weights.distance, P) * tl.abs(ahead).to(tl.float32)
    if SPECIAL and given.sink_mass is not None:
        weight = load_weight(given.sink_mass, rows, True)
        total += tl.where(column < numbers.sink - start, over_rows(weight, P), 0.0)
    if SPECIAL and given.diagonal_mass is not None:
        weight = load_weight(given.diagonal_mass, rows, True)
        total += tl.where(tl.abs(ahead) <= numbers.diagonal, over_rows(weight, P), 0.0)
    if SPECIAL and given.offset_mass is not None:
        for index in range(P.OFFSETS):
            weight = tl.load(given.offset_mass + rows.statistic * P.OFFSETS + index, mask=rows.exists, other=0.0)
            total += tl.where(ahead == tl.load(given.offsets + index), over_rows(weight, P), 0.0)
    return total


@triton.jit
def with_masses(total, inputs, given, rows, start, P: tl.constexpr):
    """Add what comes down to tags, features and keys."""
    key = start + tl.arange(0, P.BLOCK_N)
    exists = key < rows.keys
    if given.tag_mass is not None:
        for tag in range(P.TAGS):
            weight = tl.load(given.tag_mass + rows.statistic * P.TAGS + tag, mask=rows.exists, other=0.0)
            total += tl.where(same_tag(inputs, rows, tag, key, exists, P), over_rows(weight, P), 0.0)
    if given.feature_mass is not None:
        for feature in range(P.FEATURES):
            weight = tl.load(given.feature_mass + rows.statistic * P.FEATURES + feature, mask=rows.exists, other=0.0)
            total += over_rows(weight, P) * over_keys(load_feature(inputs, rows, feature, key, exists), P)
    if given.received_mass is not None:
        weight = over_keys(load_received(given, inputs, rows, key, exists), P)
        total += tl.where(over_rows(rows.counted, P), weight, 0.0)
    return total


@triton.jit
def same_tag(inputs, rows, tag, key, exists, P: tl.constexpr):
    """Tile of which keys have the row's tag; a negative key tag matches nothing."""
    of_rows, of_keys = inputs.query_tags, inputs.key_tags
    place = tag * of_rows.s0 + rows.batch * of_rows.s1 + (rows.row0 + rows.row).to(tl.int64) * of_rows.s2
    row_tag = tl.load(of_rows.ptr + place, mask=rows.exists, other=-1)
    place = tag * of_keys.s0 + rows.batch * of_keys.s1 + (rows.key0 + key).to(tl.int64) * of_keys.s2
    key_tag = tl.load(of_keys.ptr + place, mask=exists, other=-1)
    row_tag = tl.where(row_tag < 0, -2, row_tag)
    return over_rows(row_tag, P) == over_keys(tl.maximum(key_tag, -1), P)


@triton.jit
def load_feature(inputs, rows, feature, key, exists):
    """[N] in float32."""
    features = inputs.key_features
    place = rows.batch * features.s0 + (rows.key0 + key).to(tl.int64) * features.s1 + feature * features.s2
    return tl.load(features.ptr + place, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_received(given, inputs, rows, key, exists):
    """[N] dreceived_mass of the rows' head."""
    place = (rows.batch * inputs.heads + rows.head) * given.total_keys + rows.key0 + key
    return tl.load(given.received_mass + place, mask=exists, other=0.0)


@triton.jit
def with_chosen(dscore, given, rows, start, P: tl.constexpr):
    """Add what goes to chosen keys alone."""
    if P.CHOSEN == 1:
        dscore = with_one_chosen(dscore, given, rows, start, 0, P)
    elif P.CHOSEN > 1:
        for place in range(P.CHOSEN):
            dscore = with_one_chosen(dscore, given, rows, start, place, P)
    return dscore


@triton.jit
def with_one_chosen(dscore, given, rows, start, place, P: tl.constexpr):
    at = rows.statistic * P.CHOSEN + place
    key = tl.load(given.chosen_key + at, mask=rows.exists, other=-1)
    weight = tl.load(given.chosen + at, mask=rows.exists, other=0.0)
    column = over_keys(tl.arange(0, P.BLOCK_N), P)
    return dscore + tl.where(column == over_rows(key - start, P), over_rows(weight, P), 0.0)
