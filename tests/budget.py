"""One place for the question "how close is close enough?".

The budget of an implementation is the error that the plain float32 form makes itself against float64 on the same
inputs, a few times over, plus a floor of a few float32 roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attncap import HeadStats, attention
from tests.cases import Case

FACTOR = 4.0
FLOOR = {torch.float32: 4e-6, torch.float64: 1e-13}
OUT_ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

LARGEST_MAP = 1 << 26  # entries of one block of the reference's map
ROWS_AT = {"attn_mask": -2, "query_mask": -1, "query_tags": -1}  # the dimension of query rows


def worst(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def difference(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64, 0 where both are the same infinity."""
    got, want = got.double(), want.double()
    return torch.where(got == want, 0.0, (got - want).abs())


def assert_matches_float64(out: Tensor, stats: HeadStats, case: Case, *, roundings: int = 1) -> None:
    """`out` and `stats` are those of the reference in float64, within the budget of their own precision.

    `out` has one rounding to its dtype; kernels that multiply probabilities in that dtype have two.
    """
    exact_out, exact = _reference(case, torch.float64)
    compute = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    plain_out, plain = _reference(case, compute)

    scale = max(1.0, worst(exact_out.abs()))
    allowed = FACTOR * worst(difference(plain_out, exact_out)) + FLOOR[compute] * scale
    allowed += roundings * OUT_ROUNDING[out.dtype] * scale
    assert out.dtype == case.value.dtype, f"out: {out.dtype}"
    assert out.shape == exact_out.shape, f"out: {tuple(out.shape)}, not {tuple(exact_out.shape)}"
    assert_within("out", out, exact_out, allowed)

    plain_by_name, exact_by_name = dict(plain.items()), dict(exact.items())
    got_by_name = dict(stats.items())
    assert list(got_by_name) == list(exact_by_name), f"{list(got_by_name)}, not {list(exact_by_name)}"
    for name, got in got_by_name.items():
        want = exact_by_name[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
        assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} are NaN"
        if name == "topk_index":
            assert got.dtype == torch.int32, f"{name}: {got.dtype}"
            continue
        assert got.dtype == compute, f"{name}: {got.dtype}"
        finite = want[want.isfinite()]
        allowed = FACTOR * worst(difference(plain_by_name[name], want)) + FLOOR[compute] * max(1.0, worst(finite.abs()))
        assert_within(name, got, want, allowed)
    if case.spec.topk:
        _assert_topk_keys(stats, exact, case)


def assert_within(name: str, got: Tensor, want: Tensor, allowed: float) -> None:
    off = difference(got, want)
    if worst(off) <= allowed:
        return
    place = tuple(int(index) for index in torch.unravel_index(off.nan_to_num(torch.inf).argmax(), off.shape))
    raise AssertionError(f"{name}: {worst(off):.3e} > {allowed:.3e} at {place}: {got[place]}, not {want[place]}")


def _reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, HeadStats]:
    """The reference in `dtype`, over blocks of rows: all of a long call's map would fill the memory."""
    query, key, value = (tensor.to(dtype) for tensor in (case.query, case.key, case.value))
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    step = max(1, LARGEST_MAP // max(1, batch * heads * keys))
    if rows <= step:
        return attention(query, key, value, case.spec, impl="reference", **case.kwargs)
    offset = case.kwargs.get("query_offset")
    offset = keys - rows if offset is None else offset
    parts = []
    for first in range(0, rows, step):
        block = slice(first, first + step)
        kwargs = case.kwargs | {"query_offset": offset + first}
        for name, dim in ROWS_AT.items():
            given = kwargs.get(name)
            if given is not None and given.dim() >= -dim and given.shape[dim] == rows:
                kwargs[name] = given.narrow(dim, first, min(step, rows - first))
        parts.append(attention(query[:, :, block], key, value, case.spec, impl="reference", **kwargs))
    joined = {}
    for name in dict(parts[0][1].items()):
        each = [getattr(stats, name) for _, stats in parts]
        joined[name] = sum(each) if name == "received_mass" else torch.cat(each, 2)
    return torch.cat([out for out, _ in parts], 2), HeadStats(**joined)


def _assert_topk_keys(stats: HeadStats, exact: HeadStats, case: Case) -> None:
    """Keys are distinct, absent where the exact ones are, and hold the exact probabilities up to near ties."""
    assert stats.topk_index is not None
    assert exact.topk_index is not None
    got, want = stats.topk_index.long(), exact.topk_index.long()
    assert torch.equal(got < 0, want < 0), f"topk_index: {int(((got < 0) != (want < 0)).sum())} are -1, or should be"
    ordered = got.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    assert not twice.any(), f"topk_index: {int(twice.sum())} keys come twice"

    # Where the keys differ, their float64 scores must be a near tie.
    places = (got != want).nonzero(as_tuple=True)
    score_got, score_want = (_float64_scores(case, *places[:3], index[places]) for index in (got, want))
    near = 1e-5 if case.query.dtype != torch.float64 else 1e-13
    off, allowed = worst((score_got - score_want).abs()), near * max(1.0, worst(score_want.abs()))
    assert off <= allowed, f"topk_index: a key's score is {off:.3e} from the one it should be, > {allowed:.3e}"


def _float64_scores(case: Case, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Scores of (batch, head, row, key) quadruples."""
    group = case.query.shape[1] // case.key.shape[1]
    products = (case.query[batch, head, row].double() * case.key[batch, head // group, key].double()).sum(-1)
    scale = case.kwargs.get("scale")
    scores = (case.query.shape[-1] ** -0.5 if scale is None else scale) * products
    softcap, mask = case.kwargs.get("softcap"), case.kwargs.get("attn_mask")
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        rows, keys = case.query.shape[2], case.key.shape[2]
        scores = scores + mask.expand(*case.query.shape[:2], rows, keys)[batch, head, row, key].double()
    return scores
