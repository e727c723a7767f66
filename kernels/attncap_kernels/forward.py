"""The forward kernel: attention of a block of rows over their keys, and the statistics of its softmax.

    B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
    M rows of a tile  N keys of a tile  C classes of keys (topk.py)

Keys are walked in three loops: tiles that some rows see in part, tiles that every row sees whole, tiles in part again.
Masses of few keys (sink, diagonal, offsets) are taken after the walk from the tiles that hold them.
"""

import triton
import triton.language as tl

from attncap_kernels.finish import finish_rows
from attncap_kernels.records import LENGTHS, Numbers
from attncap_kernels.rows import load_keys, load_queries, locate
from attncap_kernels.scores import load_key_tile, score_of_x, seen_part, tile_scores
from attncap_kernels.softmax import State, relative_bits, rescale, unit_of


@triton.jit
def first_state(P: tl.constexpr):
    """Before the first key."""
    zero = tl.zeros([P.BLOCK_M], tl.float32)
    return State(
        tl.full([P.BLOCK_M], float("-inf"), tl.float32),
        zero,
        zero,
        zero,
        zero,
        tl.zeros([P.BLOCK_M, P.PAD_E], tl.float32),
        (zero,) * P.FEATURES,
        (zero,) * P.TAGS,
        tl.full([P.BLOCK_M, P.CLASSES], float("-inf"), tl.float32),
    )


@triton.jit
def tag_masses(state, p_MN, factor, query_tags, inputs, rows, start, P: tl.constexpr):
    """Sums of p over keys whose tag is that of the row; a negative key tag matches nothing."""
    key_tags = inputs.key_tags
    key = start + tl.arange(0, P.BLOCK_N)
    place = rows.batch * key_tags.s1 + (rows.key0 + key).to(tl.int64) * key_tags.s2
    masses = ()
    for tag in tl.static_range(P.TAGS):
        key_tag = tl.maximum(tl.load(key_tags.ptr + tag * key_tags.s0 + place, mask=key < rows.keys, other=-1), -1)
        match_MN = query_tags[tag][:, None] == key_tag[None, :]
        masses = masses + (state.tags[tag] * factor + tl.sum(tl.where(match_MN, p_MN, 0.0), 1),)
    return masses


@triton.jit
def load_query_tags(inputs, rows, P: tl.constexpr):
    """One [M] for each tag, -2 where negative: it matches no key, whose negative tags are read as -1."""
    tags = ()
    for tag in tl.static_range(P.TAGS):
        query_tags = inputs.query_tags
        place = rows.batch * query_tags.s1 + (rows.row0 + rows.row).to(tl.int64) * query_tags.s2
        loaded = tl.load(query_tags.ptr + tag * query_tags.s0 + place, mask=rows.exists, other=0)
        tags = tags + (tl.where(loaded < 0, -2, loaded),)
    return tags


@triton.jit
def feature_masses(state, p_MN, factor, inputs, rows, start, P: tl.constexpr):
    """Sums of p times each feature, in float32: a product of half-precision matrices would round both."""
    features = inputs.key_features
    key = start + tl.arange(0, P.BLOCK_N)
    place = rows.batch * features.s0 + (rows.key0 + key).to(tl.int64) * features.s1
    masses = ()
    for index in tl.static_range(P.FEATURES):
        feature = tl.load(features.ptr + index * features.s2 + place, mask=key < rows.keys, other=0.0).to(tl.float32)
        masses = masses + (state.features[index] * factor + tl.sum(p_MN * feature[None, :], 1),)
    return masses


@triton.jit
def attend(state, query_MD, query_tags, inputs, numbers, outputs, rows, start, MASKED: tl.constexpr, P: tl.constexpr):
    """The state after keys start .. start + N - 1."""
    unit = unit_of(score_of_x(numbers, P))
    key_DN = load_key_tile(inputs, rows, start, MASKED, P)
    x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED, P)
    classes = state.classes
    if P.TOPK > 0:
        best_MC = tl.max(tl.reshape(x_MN, [P.BLOCK_M, P.BLOCK_N // P.CLASSES, P.CLASSES]), 1)
        classes = tl.maximum(classes, best_MC)
        m = tl.maximum(state.m, tl.max(best_MC, 1))
    else:
        m = tl.maximum(state.m, tl.max(x_MN, 1))
    shift, factor = rescale(state.m, m, unit)
    t_MN = relative_bits(x_MN, m, unit, MASKED, P)
    p_MN = tl.exp2(t_MN)
    l = state.l * factor + tl.sum(p_MN, 1)

    w, squares, distance, features, tags = state.w, state.squares, state.distance, state.features, state.tags
    if outputs.entropy is not None:
        w = factor * (w + state.l * shift) + tl.sum(p_MN * t_MN, 1)
    if outputs.collision is not None:
        squares = squares * (factor * factor) + tl.sum(p_MN * p_MN, 1)
    if outputs.distance is not None:
        # Relative to the tile, so that float32 holds both exactly.
        ahead = (rows.position - start).to(tl.float32)
        away_MN = tl.abs(ahead[:, None] - tl.arange(0, P.BLOCK_N).to(tl.float32)[None, :])
        distance = distance * factor + tl.sum(p_MN * away_MN, 1)
    if P.TAGS > 0:
        tags = tag_masses(state, p_MN, factor, query_tags, inputs, rows, start, P)
    if P.FEATURES > 0:
        features = feature_masses(state, p_MN, factor, inputs, rows, start, P)

    value_NE = load_keys(inputs.value, rows, start, 0, P.BLOCK_N, P.E, P.PAD_E, False, MASKED, P.WIDE)
    acc = tl.dot(p_MN.to(value_NE.dtype), value_NE, state.acc * factor[:, None], input_precision=P.DOT)
    return State(m, l, w, squares, distance, acc, features, tags, classes)


@triton.jit
def attend_all(query_MD, inputs, numbers, outputs, rows, part, P: tl.constexpr):
    """The state after the keys that the rows see, of one part of them."""
    begin, whole_begin, whole_end, end = seen_part(numbers, rows, part, P)
    query_tags = load_query_tags(inputs, rows, P)
    state = first_state(P)
    if P.LEFT or P.MASK != 0:
        for start in tl.range(begin, whole_begin, P.BLOCK_N):
            state = attend(state, query_MD, query_tags, inputs, numbers, outputs, rows, start, True, P)
    if P.MASK == 0:
        for start in tl.range(whole_begin, whole_end, P.BLOCK_N):
            state = attend(state, query_MD, query_tags, inputs, numbers, outputs, rows, start, False, P)
        for start in tl.range(whole_end, end, P.BLOCK_N):
            state = attend(state, query_MD, query_tags, inputs, numbers, outputs, rows, start, True, P)
    return state


@triton.jit(do_not_specialize=[*LENGTHS, "sink", "diagonal"])
def attention_forward(
    inputs, outputs, sign, scale, softcap, rows, keys, offset, total_rows, left, right, sink, diagonal, P: tl.constexpr
):
    """One program for each tile of rows, head (or group of heads) and batch entry, and for each part of the keys."""
    numbers = Numbers(sign, scale, softcap, left, right, sink, diagonal)
    part = tl.program_id(1)
    here = locate(inputs, tl.program_id(0), part, rows, keys, offset, total_rows, P)
    query_MD = load_queries(inputs.query, numbers.sign, here, 0, P.D, P.PAD_D, P)
    state = attend_all(query_MD, inputs, numbers, outputs, here, part, P)
    finish_rows(state, query_MD, inputs, numbers, outputs, here, part, P)
