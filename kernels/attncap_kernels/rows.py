"""Which rows of which head a program serves, and how it reads them.

    B batch  H query heads  G key/value heads  Q query rows  K keys  M rows of a tile  N keys of a tile

With GROUP > 1 a tile holds the rows of all the query heads that share a key head, one after another for each query
row: row r of the tile is query row r // GROUP of head `first head + r % GROUP`. A short query then fills a tile, and
its keys are read once for all those heads.

Packed sequences come with two tables: `tiles` (sequence, block) for each tile, and `sequences` (first row, rows, first
key, keys, offset).
"""

import triton
import triton.language as tl

from attncap_kernels.records import Rows


@triton.jit
def locate(inputs, program, part, rows, keys, offset, total_rows, P: tl.constexpr):
    """The rows of a program. Later blocks start first: under a causal mask they are the longest.

    Programs of one head are neighbours. For packed sequences `rows` is the number of tiles.
    """
    groups = inputs.heads // P.GROUP
    if inputs.tiles is None:
        blocks = tl.cdiv(rows * P.GROUP, P.BLOCK_M)
        block = blocks - 1 - program % blocks
        group = program // blocks % groups
        batch = (program // blocks // groups).to(tl.int64)
        sequence = (program * 0, rows, program * 0, keys, offset)
    else:
        tile = program % rows
        block = tl.load(inputs.tiles + 2 * tile + 1)
        group = program // rows
        batch = (program * 0).to(tl.int64)
        sequence = load_sequence(inputs, tl.load(inputs.tiles + 2 * tile))
    return block_of_rows(inputs, batch, group * P.GROUP, block, part, sequence, total_rows, P)


@triton.jit
def load_sequence(inputs, index):
    """(first row, rows, first key, keys, offset) of a packed sequence."""
    place = inputs.sequences + 5 * index
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3), tl.load(place + 4)


@triton.jit
def block_of_rows(inputs, batch, first_head, block, part, sequence, total_rows, P: tl.constexpr):
    """Rows block * M .. of a sequence."""
    row0, rows, key0, keys, offset = sequence
    packed = block * P.BLOCK_M + tl.arange(0, P.BLOCK_M)
    exists = packed < rows * P.GROUP
    if P.GROUP == 1:
        row, head = packed, first_head
    else:
        row, head = packed // P.GROUP, first_head + packed % P.GROUP
    counted = exists
    if inputs.query_mask is not None:
        place = batch * inputs.query_mask.s0 + (row0 + row).to(tl.int64) * inputs.query_mask.s1
        counted = exists & (tl.load(inputs.query_mask.ptr + place, mask=exists, other=0) != 0)
    statistic = (batch * inputs.heads + head) * total_rows + row0 + row
    if P.PARTS > 1:
        statistic += (batch * 0 + part) * inputs.part_rows  # in 64 bits, as the batch is
    last_row = tl.minimum((block * P.BLOCK_M + P.BLOCK_M - 1) // P.GROUP, rows - 1)
    return Rows(
        batch,
        head,
        first_head // (inputs.heads // inputs.key_heads),
        row,
        exists,
        row + offset,
        block * P.BLOCK_M // P.GROUP + offset,
        last_row + offset,
        row0,
        key0,
        keys,
        statistic,
        counted,
    )


@triton.jit
def load_queries(inputs, numbers, rows, first_column, COLUMNS: tl.constexpr, P: tl.constexpr):
    """[M, COLUMNS], with the sign of the scale, so that a larger product is a larger score; past D it is 0."""
    query = inputs.query
    column = first_column + tl.arange(0, COLUMNS)
    place = rows.batch * query.s0 + rows.head.to(tl.int64) * query.s1 + (rows.row0 + rows.row).to(tl.int64) * query.s2
    inside = rows.exists[:, None]
    if P.D % COLUMNS != 0:
        inside = inside & (column < P.D)[None, :]
    pointer = query.ptr + place[:, None] + column.to(tl.int64)[None, :] * query.s3
    loaded = tl.load(pointer, mask=inside, other=0.0)
    return (loaded * numbers.sign).to(loaded.dtype)


@triton.jit
def load_keys(
    array,
    rows,
    start,
    first_column,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHECK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Keys (or values) start .. start + N - 1 as [N, COLUMNS], or [COLUMNS, N] if TRANSPOSED.

    Past the head dim DIM it is 0, and past the end of the keys too if CHECK.
    """
    base = array.ptr + rows.batch * array.s0 + rows.key_head.to(tl.int64) * array.s1
    base += (rows.key0 + start).to(tl.int64) * array.s2
    key, column = tl.arange(0, BLOCK_N), first_column + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        key, column = key[None, :], column[:, None]
    else:
        key, column = key[:, None], column[None, :]
    if WIDE:
        pointer = base + key.to(tl.int64) * array.s2 + column.to(tl.int64) * array.s3
    else:
        pointer = base + key * array.s2 + column * array.s3
    if CHECK and DIM % COLUMNS != 0:
        return tl.load(pointer, mask=(start + key < rows.keys) & (column < DIM), other=0.0)
    if CHECK:
        return tl.load(pointer, mask=start + key < rows.keys, other=0.0)
    if DIM % COLUMNS != 0:
        return tl.load(pointer, mask=column < DIM, other=0.0)
    return tl.load(pointer)
