"""Scores of one tile of rows and keys, and which of them are seen.

Scores stay in a unit of their own, so that most calls need no multiplication: exp(s - m) is exp2((x - m) * unit) for
the x given here. Without softcap and floating mask x is the plain product of query and key, and s = x * scale; with one
of them x is the score s itself.
"""

import triton
import triton.language as tl

from attncap_kernels.rows import load_keys


@triton.jit
def load_key_tile(inputs, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """[PAD_D, N]: keys start .. start + N - 1, as columns."""
    return load_keys(inputs.key, rows, start, P.BLOCK_N, P.D, P.PAD_D, True, MASKED, P.WIDE)


@triton.jit
def score_of_x(numbers, P: tl.constexpr):
    """s / x."""
    if P.SOFTCAP or P.MASK == 2:
        return numbers.scale * 0.0 + 1.0
    return numbers.scale


@triton.jit
def tanh(x):
    """Near 0 an odd polynomial, where 1 - exp(-2|x|) would lose digits."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """x [M, N] of keys start .. start + N - 1, -inf where hidden. MASKED False promises that nothing is hidden."""
    x_MN = tl.dot(query_MD, key_DN, input_precision=P.DOT)
    if P.SOFTCAP:
        x_MN = numbers.softcap * tanh(x_MN * (numbers.scale / numbers.softcap))
    elif P.MASK == 2:
        x_MN = x_MN * numbers.scale
    if MASKED:
        key = start + tl.arange(0, P.BLOCK_N)[None, :]
        hidden = key >= rows.keys
        if P.LEFT:
            hidden = hidden | (key < rows.position[:, None] - numbers.left)
        if P.RIGHT:
            hidden = hidden | (key > rows.position[:, None] + numbers.right)
        if P.MASK != 0:
            mask = inputs.attn_mask
            place = rows.batch * mask.s0 + rows.head.to(tl.int64) * mask.s1 + rows.row.to(tl.int64) * mask.s2
            pointer = mask.ptr + place[:, None] + key.to(tl.int64) * mask.s3
            entry = tl.load(pointer, mask=rows.exists[:, None] & (key < rows.keys), other=0)
            if P.MASK == 1:
                hidden = hidden | (entry == 0)
            else:
                bias = entry.to(tl.float32)
                hidden = hidden | (bias == float("-inf"))
                x_MN += bias
        x_MN = tl.where(hidden, float("-inf"), x_MN)
    return x_MN


@triton.jit
def seen_range(numbers, rows, P: tl.constexpr):
    """(begin, whole begin, whole end, end): the keys that some row sees, and tiles in between that all see whole."""
    begin, end = 0, rows.keys
    whole_begin, whole_end = 0, rows.keys
    if P.LEFT:
        begin = tl.maximum(rows.first_position - numbers.left, 0) // P.BLOCK_N * P.BLOCK_N
        whole_begin = tl.cdiv(tl.maximum(rows.last_position - numbers.left, 0), P.BLOCK_N) * P.BLOCK_N
    if P.RIGHT:
        end = tl.minimum(rows.keys, rows.last_position + numbers.right + 1)
        whole_end = tl.minimum(rows.keys, rows.first_position + numbers.right + 1)
    end = tl.maximum(end, begin)
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.minimum(tl.maximum(tl.maximum(whole_end, 0) // P.BLOCK_N * P.BLOCK_N, whole_begin), end)
    if P.MASK != 0:
        whole_begin = end
        whole_end = end
    return begin, whole_begin, whole_end, end


@triton.jit
def part_of_keys(part, keys, P: tl.constexpr):
    """(first key, end) of one of PARTS parts of whole tiles."""
    tiles = tl.cdiv(tl.cdiv(keys, P.BLOCK_N), P.PARTS)
    return part * tiles * P.BLOCK_N, tl.minimum((part + 1) * tiles * P.BLOCK_N, keys)
