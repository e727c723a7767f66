"""dq_i = scale sum_j dproduct_ij k_j: a program owns rows of a query head and walks over their keys."""

import triton
import triton.language as tl

from attncap_kernels.derivatives import load_weights, signed, tile_derivatives
from attncap_kernels.records import LENGTHS
from attncap_kernels.rows import load_keys, load_rows, locate, store_block
from attncap_kernels.scores import load_key_tile
from attncap_kernels.walks import tile_at, walks_over_keys


@triton.jit
def from_keys(
    acc_MD, query_MD, derivative_ME, weights, inputs, given, numbers, rows, start, SPECIAL: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The sum after keys start .. start + N - 1."""
    key_DN = load_key_tile(inputs, rows, start, SPECIAL, P)
    value_EN = load_keys(inputs.value, rows, start, 0, P.BLOCK_N, P.E, P.PAD_E, True, SPECIAL, P.WIDE)
    _, _, dproduct_MN = tile_derivatives(
        query_MD, key_DN, derivative_ME, value_EN, weights, inputs, given, numbers, rows, start, SPECIAL, P
    )
    return tl.dot(dproduct_MN.to(key_DN.dtype), tl.trans(key_DN), acc_MD, input_precision=P.DOT)


@triton.jit(do_not_specialize=[*LENGTHS, "sink", "diagonal"])
def backward_rows(
    inputs, given, gradient, sign, scale, softcap, rows, keys, offset, total_rows, left, right, sink, diagonal,
    P: tl.constexpr,
):  # fmt: skip
    """One program for each tile of rows, query head and batch entry."""
    numbers = signed(sign, scale, softcap, left, right, sink, diagonal)
    here = locate(inputs, tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    query_MD = load_rows(inputs.query, here, 0, P.D, P.PAD_D, True, P)
    derivative_ME = query_MD
    if given.out is not None:
        derivative_ME = load_rows(given.out, here, 0, P.E, P.PAD_E, True, P)
    weights = load_weights(given, here, True, P)
    acc_MD = tl.zeros([P.BLOCK_M, P.PAD_D], tl.float32)
    special, plain = walks_over_keys(given, numbers, here, P)
    for place in tl.range(0, special.count):
        start = tile_at(special, place) * P.BLOCK_N
        acc_MD = from_keys(acc_MD, query_MD, derivative_ME, weights, inputs, given, numbers, here, start, True, P)
    if P.MASK == 0:
        for place in tl.range(0, plain.count):
            start = tile_at(plain, place) * P.BLOCK_N
            acc_MD = from_keys(acc_MD, query_MD, derivative_ME, weights, inputs, given, numbers, here, start, False, P)
    base = gradient.ptr + here.batch * gradient.s0 + here.head.to(tl.int64) * gradient.s1
    base += (here.row0 + here.first_row).to(tl.int64) * gradient.s2
    store_block(gradient, base, here.exists, acc_MD * numbers.scale, P.D, P.PAD_D, P.BLOCK_M)
