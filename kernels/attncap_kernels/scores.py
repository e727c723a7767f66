"""Scores of one tile of rows and keys, and which of them are seen.

Scores stay in a unit of their own, so that most calls need no multiplication: exp(s - m) is exp2((x - m) * unit) for
the x given here. Without softcap and floating mask x is the plain product of query and key, and s = x * scale; with one
of them x is the score s itself.
"""

import triton
import triton.language as tl

from attncap_kernels.rows import load_keys, load_queries


@triton.jit
def load_key_tile(inputs, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """[PAD_D, N]: keys start .. start + N - 1, as columns."""
    return load_keys(inputs.key, rows, start, 0, P.BLOCK_N, P.D, P.PAD_D, True, MASKED, P.WIDE)


@triton.jit
def score_of_x(numbers, P: tl.constexpr):
    """s / x."""
    if P.SOFTCAP or P.MASK == 2:
        return tl.full([], 1.0, tl.float32)
    return numbers.scale


@triton.jit
def tanh(x):
    """Near 0 an odd polynomial, where the difference from 1 would lose digits."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * decay / (1.0 + decay)
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def x_of_product(product, numbers, P: tl.constexpr):
    """x, but for a floating mask, of the product of query and key."""
    if P.SOFTCAP:
        return numbers.softcap * tanh(product * (numbers.scale / numbers.softcap))
    if P.MASK == 2:
        return product * numbers.scale
    return product


@triton.jit
def mask_rows(inputs, rows):
    """Pointers [M] to the mask's entries of the rows and key 0."""
    mask = inputs.attn_mask
    place = rows.batch * mask.s0 + rows.head.to(tl.int64) * mask.s1 + rows.row.to(tl.int64) * mask.s2
    return mask.ptr + place


@triton.jit
def over_rows(value, P: tl.constexpr):
    """A number for each row, to be spread over a tile of scores."""
    if P.TRANSPOSED:
        spread = value[None, :]
    else:
        spread = value[:, None]
    return spread


@triton.jit
def over_keys(value, P: tl.constexpr):
    """A number for each key, to be spread over a tile of scores."""
    if P.TRANSPOSED:
        spread = value[:, None]
    else:
        spread = value[None, :]
    return spread


@triton.jit
def tile_dot(of_rows, of_keys, P: tl.constexpr):
    """Tile of products of what rows [M, .] and keys ([., N], or [N, .] if TRANSPOSED) have."""
    if P.TRANSPOSED:
        product = tl.dot(of_keys, tl.trans(of_rows), input_precision=P.DOT)
    else:
        product = tl.dot(of_rows, of_keys, input_precision=P.DOT)
    return product


@triton.jit
def product_in_steps(
    of_rows, of_keys, sign, rows, start, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Tile of products of two arrays' rows, times `sign`, STEP_D columns at a time.

    Products of float32 without tensor cores hold both factors in registers, which whole rows would not fit in.
    """
    STEP: tl.constexpr = min(P.STEP_D, PAD)
    if P.TRANSPOSED:
        product = tl.zeros([P.BLOCK_N, P.BLOCK_M], tl.float32)
    else:
        product = tl.zeros([P.BLOCK_M, P.BLOCK_N], tl.float32)
    for column in tl.range(0, PAD, STEP):
        row_MS = load_queries(of_rows, sign, rows, column, DIM, STEP, P)
        key_SN = load_keys(of_keys, rows, start, column, P.BLOCK_N, DIM, STEP, not P.TRANSPOSED, MASKED, P.WIDE)
        product += tile_dot(row_MS, key_SN, P)
    return product


@triton.jit
def tile_product(query, key, inputs, numbers, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """Products of queries [M, D], as `load_queries` gives them, and keys ([D, N], or [N, D] if TRANSPOSED)."""
    if P.STEP_D < P.PAD_D:
        product = product_in_steps(inputs.query, inputs.key, numbers.sign, rows, start, P.D, P.PAD_D, MASKED, P)
    else:
        product = tile_dot(query, key, P)
    return product


@triton.jit
def hidden_from_rows(numbers, rows, start, P: tl.constexpr):
    """[M, N] what lies past the keys or outside of the window, each row having one bound to compare with."""
    column = tl.arange(0, P.BLOCK_N)[None, :]
    if P.RIGHT:
        hidden = column > (tl.minimum(rows.position + numbers.right, rows.keys - 1) - start)[:, None]
    else:
        hidden = column >= rows.keys - start
    if P.LEFT:
        hidden = hidden | (column < (rows.position - numbers.left - start)[:, None])
    return hidden


@triton.jit
def hidden_from_keys(numbers, rows, start, P: tl.constexpr):
    """[N, M] of the same, each key having one bound: a thread has many rows here and few keys."""
    row, key = tl.arange(0, P.BLOCK_M)[None, :], start + tl.arange(0, P.BLOCK_N)
    ahead = key - rows.first_position
    if P.RIGHT:
        hidden = row < tl.where(key < rows.keys, ahead - numbers.right, P.BLOCK_M)[:, None]
    else:
        hidden = (key >= rows.keys)[:, None]
    if P.LEFT:
        hidden = hidden | (row > (ahead + numbers.left)[:, None])
    return hidden


@triton.jit
def with_mask(x, inputs, numbers, rows, start, P: tl.constexpr):
    """(x with the bias of a floating mask, which of the tile is hidden)."""
    column = over_keys(tl.arange(0, P.BLOCK_N), P)
    if P.TRANSPOSED:
        hidden = hidden_from_keys(numbers, rows, start, P)
    else:
        hidden = hidden_from_rows(numbers, rows, start, P)
    if P.MASK != 0:
        key = start + column
        pointer = over_rows(mask_rows(inputs, rows), P) + key.to(tl.int64) * inputs.attn_mask.s3
        entry = tl.load(pointer, mask=over_rows(rows.exists, P) & (key < rows.keys), other=0)
        if P.MASK == 1:
            hidden = hidden | (entry == 0)
        else:
            bias = entry.to(tl.float32)
            hidden = hidden | (bias == float("-inf"))
            x += bias
    return x, hidden


@triton.jit
def tile_scores(query, key, inputs, numbers, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """x of keys start .. start + N - 1, -inf where hidden. MASKED False promises that nothing is hidden."""
    x = x_of_product(tile_product(query, key, inputs, numbers, rows, start, MASKED, P), numbers, P)
    if MASKED:
        x, hidden = with_mask(x, inputs, numbers, rows, start, P)
        x = tl.where(hidden, float("-inf"), x)
    return x


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
def seen_part(numbers, rows, part, P: tl.constexpr):
    """`seen_range` within one of PARTS parts of the keys, each of whole tiles."""
    begin, whole_begin, whole_end, end = seen_range(numbers, rows, P)
    if P.PARTS > 1:
        size = tl.cdiv(tl.cdiv(rows.keys, P.BLOCK_N), P.PARTS) * P.BLOCK_N
        begin, end = tl.maximum(begin, part * size), tl.minimum(end, (part + 1) * size)
        whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
        whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), end)
    return begin, whole_begin, whole_end, end


@triton.jit
def pair_scores(query_MD, inputs, numbers, rows, key, exists, P: tl.constexpr):
    """x [M] of one key for each row, which it sees; 0 where `exists` is False."""
    array, column = inputs.key, tl.arange(0, P.PAD_D)
    base = array.ptr + rows.batch * array.s0 + rows.key_head.to(tl.int64) * array.s1
    pointer = base + ((rows.key0 + key).to(tl.int64) * array.s2)[:, None] + column.to(tl.int64)[None, :] * array.s3
    key_MD = tl.load(pointer, mask=exists[:, None] & (column < P.D)[None, :], other=0.0)
    x = x_of_product(tl.sum(query_MD.to(tl.float32) * key_MD.to(tl.float32), 1), numbers, P)
    if P.MASK == 2:
        pointer = mask_rows(inputs, rows) + key.to(tl.int64) * inputs.attn_mask.s3
        x += tl.load(pointer, mask=exists, other=0).to(tl.float32)
    return x
