"""Online softmax of a block of rows, with the statistics that ride along.

Invariant, after the keys seen so far: m is the largest x of the row (-inf before the first), and with
t = (x - m) * unit, in bits,

    l = sum 2^t    w = sum 2^t t    squares = sum 4^t    distance, tags, features, acc = sums of 2^t times something

A new maximum rescales them by a = 2^((m_old - m) unit): w first shifted by l (m_old - m) unit, squares by a^2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_BITS = tl.constexpr(-1.0e4)  # 2^t is 0 there, and 2^t t is 0 and not NaN


class State(NamedTuple):
    """Sums over the keys seen so far, for the M rows of a tile; what is off stays 0."""

    m: Any
    l: Any
    w: Any
    squares: Any
    distance: Any
    acc: Any  # [M, PAD_E]
    features: Any  # one [M] for each feature
    tags: Any  # one [M] for each tag
    classes: Any  # [M, C] largest x of each class of keys: key j is of class j % C


@triton.jit
def unit_of(score_of_x):
    """Bits in a step of 1 in x."""
    return score_of_x * LOG2_E


@triton.jit
def finite(m):
    """m, or 0 for rows that have seen nothing, so that differences from it are no NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def sees_keys(l):
    """Which rows see a key, given the sum over keys: the largest adds 1, and what is no number makes the sum none."""
    return l != 0.0


@triton.jit
def rescale(m, new_m, unit):
    """(shift in bits, factor) of sums relative to m that become relative to new_m."""
    shift = tl.where(m == float("-inf"), 0.0, (m - finite(new_m)) * unit)
    # From a mask of the smallest float the step is -inf.
    shift = tl.maximum(shift, LEAST_BITS, propagate_nan=tl.PropagateNan.ALL)
    return shift, tl.exp2(shift)


@triton.jit
def relative_bits(x_MN, m, unit, MASKED: tl.constexpr, P: tl.constexpr):
    """t = (x - m) * unit, LEAST_BITS where hidden; a score that is no number stays one."""
    base = finite(m)
    if P.MASK == 2:
        # Masks of the smallest float: x * unit would leave float32's range.
        t_MN = (x_MN - base[:, None]) * unit
    else:
        t_MN = x_MN * unit - (base * unit)[:, None]
    if MASKED:
        t_MN = tl.maximum(t_MN, LEAST_BITS, propagate_nan=tl.PropagateNan.ALL)
    return t_MN


@triton.jit
def join_null_outcome(m, l, w, null_x, unit):
    """(m, l, w, factor of the other sums, 2^t of the null outcome): one more outcome, without a key."""
    new_m = tl.maximum(m, null_x)
    shift, factor = rescale(m, new_m, unit)
    t_null = tl.maximum((null_x - finite(new_m)) * unit, LEAST_BITS)
    p_null = tl.where(null_x == float("-inf"), 0.0, tl.exp2(t_null))
    return new_m, l * factor + p_null, factor * (w + l * shift) + p_null * t_null, factor, p_null
