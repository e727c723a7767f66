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
    exact_out, exact = attention(*_inputs(case, torch.float64), case.spec, impl="reference", **case.kwargs)
    compute = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    plain_out, plain = attention(*_inputs(case, compute), case.spec, impl="reference", **case.kwargs)

    scale = max(1.0, worst(exact_out.abs()))
    allowed = FACTOR * worst(difference(plain_out, exact_out)) + FLOOR[compute] * scale
    allowed += roundings * OUT_ROUNDING[out.dtype] * scale
    assert out.dtype == case.value.dtype
    assert out.shape == exact_out.shape
    assert worst(difference(out, exact_out)) <= allowed, "out"

    plain_by_name, exact_by_name = dict(plain.items()), dict(exact.items())
    got_by_name = dict(stats.items())
    assert list(got_by_name) == list(exact_by_name)
    for name, got in got_by_name.items():
        want = exact_by_name[name]
        assert got.shape == want.shape, name
        assert not got.isnan().any(), name
        if name == "topk_index":
            assert got.dtype == torch.int32
            continue
        assert got.dtype == compute, name
        finite = want[want.isfinite()]
        allowed = FACTOR * worst(difference(plain_by_name[name], want)) + FLOOR[compute] * max(1.0, worst(finite.abs()))
        assert worst(difference(got, want)) <= allowed, f"{name}: {worst(difference(got, want))} > {allowed}"
    if case.spec.topk:
        _assert_topk_keys(stats, exact, case)


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return case.query.to(dtype), case.key.to(dtype), case.value.to(dtype)


def _assert_topk_keys(stats: HeadStats, exact: HeadStats, case: Case) -> None:
    """Keys are distinct, absent where the exact ones are, and hold the exact probabilities up to near ties."""
    assert stats.topk_index is not None
    assert exact.topk_index is not None
    got, want = stats.topk_index.long(), exact.topk_index.long()
    assert torch.equal(got < 0, want < 0)
    ordered = got.sort(-1).values
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()

    # Where the keys differ, their float64 scores must be a near tie.
    differ = got != want
    if not differ.any():
        return
    scores = _float64_scores(case)
    score_got = scores.gather(-1, got.clamp_min(0))[differ]
    score_want = scores.gather(-1, want.clamp_min(0))[differ]
    near = 1e-5 if case.query.dtype != torch.float64 else 1e-13
    assert worst((score_got - score_want).abs()) <= near * max(1.0, worst(score_want.abs()))


def _float64_scores(case: Case) -> Tensor:
    query, key, _ = _inputs(case, torch.float64)
    scale = case.kwargs.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2))
    softcap, mask = case.kwargs.get("softcap"), case.kwargs.get("attn_mask")
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    return scores
