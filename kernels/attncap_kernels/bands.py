"""Masses of few keys: sink, diagonal and offsets, from the tiles that hold them, once the row's maximum is known."""

import triton
import triton.language as tl

from attncap_kernels.scores import load_key_tile, score_of_x, seen_part, tile_scores
from attncap_kernels.softmax import relative_bits, unit_of


@triton.jit
def mass_of_band(m, query_MD, inputs, numbers, rows, part, low, high, RELATIVE: tl.constexpr, P: tl.constexpr):
    """[M] sum of 2^t over the seen keys low <= j <= high, counted from each row's position if RELATIVE."""
    unit = unit_of(score_of_x(numbers, P))
    begin, _, _, end = seen_part(numbers, rows, part, P)
    first, last = low, high
    if RELATIVE:
        first, last = rows.first_position + low, rows.last_position + high
    begin = tl.maximum(begin, first // P.BLOCK_N * P.BLOCK_N)
    end = tl.minimum(end, last + 1)
    mass = tl.zeros([P.BLOCK_M], tl.float32)
    for start in tl.range(begin, end, P.BLOCK_N):
        key_DN = load_key_tile(inputs, rows, start, True, P)
        x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, True, P)
        p_MN = tl.exp2(relative_bits(x_MN, m, unit, True, P))
        key = start + tl.arange(0, P.BLOCK_N)[None, :]
        if RELATIVE:
            away = key - rows.position[:, None]
            inside = (away >= low) & (away <= high)
        else:
            inside = (key >= low) & (key <= high)
        mass += tl.sum(tl.where(inside, p_MN, 0.0), 1)
    return mass
