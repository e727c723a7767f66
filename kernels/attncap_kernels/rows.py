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
def locate_keys(inputs, program, heads, rows, keys, offset, P: tl.constexpr):
    """(batch, head of `heads`, first key, sequence) of a program that owns a tile of keys.

    Programs of one head are neighbours. For packed sequences `keys` is the number of tiles, which are tiles of keys.
    """
    if inputs.tiles is None:
        tiles = tl.cdiv(keys, P.BLOCK_N)
        tile = program % tiles
        head = program // tiles % heads
        batch = (program // tiles // heads).to(tl.int64)
        sequence = (program * 0, rows, program * 0, keys, offset)
    else:
        place = program % keys
        head = program // keys
        tile = tl.load(inputs.tiles + 2 * place + 1)
        batch = (program * 0).to(tl.int64)
        sequence = load_sequence(inputs, tl.load(inputs.tiles + 2 * place))
    return batch, head, tile * P.BLOCK_N, sequence


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
    first_row = block * P.BLOCK_M // P.GROUP
    last_row = tl.minimum((block * P.BLOCK_M + P.BLOCK_M - 1) // P.GROUP, rows - 1)
    return Rows(
        batch,
        head,
        first_head // (inputs.heads // inputs.key_heads),
        first_row,
        row,
        exists,
        row + offset,
        first_row + offset,
        last_row + offset,
        row0,
        key0,
        keys,
        statistic,
        counted,
    )


@triton.jit
def load_queries(array, sign, rows, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr):
    """[M, COLUMNS] of queries, times the sign of the scale, so that a larger product is a larger score; 0 past DIM."""
    column = first_column + tl.arange(0, COLUMNS)
    place = rows.batch * array.s0 + rows.head.to(tl.int64) * array.s1 + (rows.row0 + rows.row).to(tl.int64) * array.s2
    inside = rows.exists[:, None]
    if DIM % COLUMNS != 0:
        inside = inside & (column < DIM)[None, :]
    pointer = array.ptr + place[:, None] + column.to(tl.int64)[None, :] * array.s3
    loaded = tl.load(pointer, mask=inside, other=0.0)
    return (loaded * sign).to(loaded.dtype)


@triton.jit
def load_block(
    base, array, exists, first_column, BLOCK: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHECK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one head from `base` on as [BLOCK, COLUMNS], or [COLUMNS, BLOCK] if TRANSPOSED.

    Past the head dim DIM it is 0, and for rows that do not exist too if CHECK.
    """
    index, column = tl.arange(0, BLOCK), first_column + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        index, exists, column = index[None, :], exists[None, :], column[:, None]
    else:
        index, exists, column = index[:, None], exists[:, None], column[None, :]
    if WIDE:
        pointer = base + index.to(tl.int64) * array.s2 + column.to(tl.int64) * array.s3
    else:
        pointer = base + index * array.s2 + column * array.s3
    if CHECK and DIM % COLUMNS != 0:
        return tl.load(pointer, mask=exists & (column < DIM), other=0.0)
    if CHECK:
        return tl.load(pointer, mask=exists, other=0.0)
    if DIM % COLUMNS != 0:
        return tl.load(pointer, mask=column < DIM, other=0.0)
    return tl.load(pointer)


@triton.jit
def load_keys(
    array, rows, start, first_column, BLOCK_N: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr, CHECK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys (or values) start .. start + N - 1 as `load_block` gives them."""
    base = array.ptr + rows.batch * array.s0 + rows.key_head.to(tl.int64) * array.s1
    base += (rows.key0 + start).to(tl.int64) * array.s2
    exists = start + tl.arange(0, BLOCK_N) < rows.keys
    return load_block(base, array, exists, first_column, BLOCK_N, DIM, COLUMNS, TRANSPOSED, CHECK, WIDE)


@triton.jit
def load_rows(
    array, rows, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Rows of one head (GROUP is 1) of queries, or of what has their shape, as [M, COLUMNS]."""
    base = array.ptr + rows.batch * array.s0 + rows.head.to(tl.int64) * array.s1
    base += (rows.row0 + rows.first_row).to(tl.int64) * array.s2
    return load_block(base, array, rows.exists, first_column, P.BLOCK_M, DIM, COLUMNS, False, CHECK, P.WIDE)


@triton.jit
def store_block(array, base, exists, block, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, COLUMNS] to memory from `base` on, rounded to its dtype; what lies past DIM or does not exist is not."""
    index, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    pointer = base + index.to(tl.int64) * array.s2 + column.to(tl.int64) * array.s3
    tl.store(pointer, block.to(array.ptr.dtype.element_ty), mask=exists[:, None] & (column < DIM))
