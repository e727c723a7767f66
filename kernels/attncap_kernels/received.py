"""received_mass: what each key receives, summed over the rows that count.

A second pass over the scores in which a program owns keys and walks over rows: no two programs add to one number, so
the sums are the same in every run.
"""

import triton
import triton.language as tl

from attncap_kernels.records import LENGTHS, Numbers
from attncap_kernels.rows import block_of_rows, load_queries, locate_keys
from attncap_kernels.scores import load_key_tile, score_of_x, tile_scores
from attncap_kernels.softmax import relative_bits, unit_of


@triton.jit
def rows_of_keys(numbers, start, rows, keys, offset, P: tl.constexpr):
    """(begin, whole begin, whole end, end): blocks of rows that see keys start .. start + N - 1, and see them whole."""
    begin, end = 0, rows
    whole_begin, whole_end = 0, rows
    last = start + P.BLOCK_N - 1
    if P.RIGHT:
        begin = tl.maximum(start - numbers.right - offset, 0)
        whole_begin = tl.maximum(last - numbers.right - offset, 0)
    if P.LEFT:
        end = tl.minimum(rows, last + numbers.left - offset + 1)
        whole_end = tl.minimum(rows, start + numbers.left - offset + 1)
    begin = begin // P.BLOCK_M
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), P.BLOCK_M), begin)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_begin, P.BLOCK_M), begin), end)
    whole_end = tl.minimum(tl.maximum(tl.maximum(whole_end, 0) // P.BLOCK_M, whole_begin), end)
    if P.MASK != 0 or last >= keys:
        whole_begin = end
        whole_end = end
    return begin, whole_begin, whole_end, end


@triton.jit
def received_from(
    mass, key_DN, inputs, numbers, peaks, totals, batch, head, block, sequence, total_rows, start, MASKED: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """`mass` and what the keys receive from one block of rows."""
    rows = block_of_rows(inputs, batch, head, block, 0, sequence, total_rows, P)
    query_MD = load_queries(inputs.query, numbers.sign, rows, 0, P.D, P.PAD_D, P)
    x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED, P)
    peak = tl.load(peaks + rows.statistic, mask=rows.exists, other=float("-inf"))
    total = tl.load(totals + rows.statistic, mask=rows.exists, other=1.0)
    p_MN = tl.exp2(relative_bits(x_MN, peak, unit_of(score_of_x(numbers, P)), MASKED, P))
    # Rows that do not count have a peak of -inf, and may hold anything.
    given = (peak > float("-inf"))[:, None]
    if MASKED:
        # A row whose total is no number gives nothing to keys that it does not see.
        given = given & (x_MN != float("-inf"))
    return mass + tl.sum(tl.where(given, p_MN * (1.0 / total)[:, None], 0.0), 0)


@triton.jit(do_not_specialize=[*LENGTHS, "total_keys"])
def received_mass(
    inputs, received, peaks, totals, sign, scale, softcap, rows, keys, offset, total_rows, total_keys, left, right,
    P: tl.constexpr,
):  # fmt: skip
    """One program for each tile of keys, query head and batch entry."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    batch, head, start, sequence = locate_keys(inputs, tl.program_id(0), inputs.heads, rows, keys, offset, P)
    _, rows, key0, keys, offset = sequence
    begin, whole_begin, whole_end, end = rows_of_keys(numbers, start, rows, keys, offset, P)
    first = block_of_rows(inputs, batch, head, 0, 0, sequence, total_rows, P)
    key_DN = load_key_tile(inputs, first, start, True, P)
    mass = tl.zeros([P.BLOCK_N], tl.float32)
    for block in tl.range(begin, whole_begin):
        mass = received_from(
            mass, key_DN, inputs, numbers, peaks, totals, batch, head, block, sequence, total_rows, start, True, P
        )
    for block in tl.range(whole_begin, whole_end):
        mass = received_from(
            mass, key_DN, inputs, numbers, peaks, totals, batch, head, block, sequence, total_rows, start, False, P
        )
    for block in tl.range(whole_end, end):
        mass = received_from(
            mass, key_DN, inputs, numbers, peaks, totals, batch, head, block, sequence, total_rows, start, True, P
        )
    key = start + tl.arange(0, P.BLOCK_N)
    place = (batch * inputs.heads + head) * total_keys + key0 + key
    tl.store(received + place, mass, mask=key < keys)
