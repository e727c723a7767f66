"""The Triton kernels' backward, interpreted on the CPU: every option and statistic against autograd in float64.

Masks are never in bfloat16 here, which the interpreter rounds towards zero where it stores gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import HeadStats, StatSpec, attention, attention_varlen
from tests.budget import assert_within, difference, worst
from tests.cases import SMALL, Case, random_case
from tests.derivatives import assert_gradients_match_float64, gradients_of, inputs_of, loss_of, outputs_of

# numpy warns of overflows and of NaN where a GPU computes on.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STATISTICS = tuple(name for name in (field.name for field in dataclasses.fields(HeadStats)) if name != "topk_index")
HALF = torch.float16
# Probabilities, their derivatives and the output are rounded to the dtype before they are multiplied on.
ROUNDINGS = 8
QUICK = dataclasses.replace(SMALL, dims=(1, 16, 33), value_dims=(1, 5, 16, 70), longest=40)


def check(case: Case, *, names: tuple[str, ...] | None = None, roundings: int = ROUNDINGS) -> None:
    mask = case.kwargs.get("attn_mask")
    if mask is not None and mask.dtype == torch.bfloat16:
        case = dataclasses.replace(case, kwargs=case.kwargs | {"attn_mask": mask.to(HALF)})
    assert_gradients_match_float64(case, "triton", names=names, roundings=roundings)


def small_case(rows: int = 35, keys: int = 70, *, heads: int = 2, spec: StatSpec | None = None, **kwargs: Any) -> Case:
    """Rows and keys that fill a tile and a bit of another, two query heads on one key head."""
    torch.manual_seed(rows + keys)
    query, key, value = torch.randn(1, heads, rows, 16), torch.randn(1, 1, keys, 16), torch.randn(1, 1, keys, 20)
    return Case(query, key, value, spec or StatSpec.none(), kwargs)


def full_case(**changes: Any) -> Case:
    """Every statistic of a call with sinks, tags, features and rows that do not count."""
    kwargs = {
        "causal": True,
        "sink_logits": torch.tensor([0.5, -torch.inf]),
        "query_mask": torch.arange(35)[None] % 5 != 1,
        "query_tags": torch.arange(70).view(2, 1, 35) % 3 - 1,
        "key_tags": torch.arange(140).view(2, 1, 70) % 4 - 1,
        "key_features": torch.randn(1, 70, 5, generator=torch.Generator().manual_seed(0)),
    }
    spec = dataclasses.replace(StatSpec.all(topk=3, offsets=(-1, 2)), sink=3, diagonal=1)
    return small_case(spec=spec, **kwargs | changes)


@functools.cache
def forward_of(impl: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, outputs) of `full_case`, for many backwards."""
    case = full_case()
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs_of(case).items()}
    out, stats = attention(**{**case.kwargs, **leaves, "spec": case.spec, "impl": impl})
    return leaves, outputs_of(out, stats)


def gradients_by(name: str, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves, outputs = forward_of(impl, dtype)
    found = torch.autograd.grad(
        loss_of(outputs, (name,)), list(leaves.values()), retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", ["out", *STATISTICS])
def test_each_output_alone(name: str) -> None:
    exact = gradients_by(name, "reference", torch.float64)
    plain = gradients_by(name, "reference", torch.float32)
    for of, found in gradients_by(name, "triton", torch.float32).items():
        allowed = 4 * worst(difference(plain[of], exact[of])) + 4e-6 * max(1.0, worst(exact[of].abs()))
        assert_within(f"gradient of {of}", found, exact[of], allowed)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_all_outputs_together(dtype: torch.dtype) -> None:
    check(full_case().as_dtype(dtype))


@pytest.mark.parametrize("seed", [1, 3, 4, 6, 9, 15, 19, 23, 25, 31])
def test_random_calls(seed: int) -> None:
    check(random_case(seed, dtype=HALF if seed % 2 else torch.float32, sizes=QUICK))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (10, 3)},
        {"window": (40, -1), "causal": True},
        {"window": (-1, 2), "query_offset": -5},
        {"softcap": 1.5, "causal": True},
        {"softcap": 1.5, "scale": -0.7, "window": (20, 20)},
        {"scale": 0.0},
        {"scale": -1.3, "causal": True, "sink_logits": torch.tensor([1.0, -2.0])},
        {"query_offset": 100, "causal": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(options: dict[str, Any]) -> None:
    spec = StatSpec(sink=2, topk=0, collision=True)
    check(small_case(spec=spec, **options))


@pytest.mark.parametrize(
    ("sink", "diagonal", "offsets"), [(40, None, ()), (0, 1, (3,)), (0, None, (-70, -45)), (2, 0, (500,))]
)
def test_keys_of_sinks_diagonals_and_offsets_anywhere(
    sink: int, diagonal: int | None, offsets: tuple[int, ...]
) -> None:
    """Tiles that hold them lie between others that do not, in part before the first key and behind the last."""
    spec = StatSpec(entropy=False, max=False, sink=sink, diagonal=diagonal, topk=0, offsets=offsets)
    names = ("sink_mass", "diagonal_mass", "offset_mass")
    check(small_case(130, 200, spec=spec, heads=1, query_offset=30), names=names)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 130), (100, 5), (65, 33)])
def test_head_dims_that_are_no_power_of_two(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    torch.manual_seed(dim)
    query, key, value = torch.randn(1, 1, 19, dim), torch.randn(1, 1, 45, dim), torch.randn(1, 1, 45, value_dim)
    check(Case(query, key, value, StatSpec.none(), {"causal": True}).as_dtype(dtype))


@pytest.mark.parametrize("shape", [(2, 3, 7, 40), (1, 3, 7, 1), (2, 1, 1, 40), (40,), (1, 1)])
def test_a_floating_mask_has_a_gradient_of_its_own_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    query, key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 40, 8), torch.randn(2, 1, 40, 8)
    bias = torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, -torch.inf)
    check(Case(query, key, value, StatSpec(topk=0), {"attn_mask": bias, "window": (30, 2)}))


def test_a_bool_mask_that_hides_whole_rows() -> None:
    mask = torch.rand(35, 70) < 0.5
    mask[3] = mask[20] = False
    check(small_case(spec=StatSpec.all(topk=2), attn_mask=mask))


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -1.0])])
def test_masks_of_the_smallest_float(sink: Tensor | None) -> None:
    """A row with nothing else sees all its keys alike, though its lse has no digits left for their number."""
    mask = torch.zeros(35, 70).masked_fill(torch.rand(35, 70) < 0.3, torch.finfo(torch.float32).min)
    mask[3] = mask[34] = mask[20, :40] = torch.finfo(torch.float32).min
    case = small_case(attn_mask=mask, sink_logits=sink, spec=StatSpec(topk=0))
    names = ("out", "entropy", "sink_mass")
    exact = gradients_of(case, "reference", names=names, dtype=torch.float64)
    found = gradients_of(case, "triton", names=names)
    for name in ("query", "key", "value", "attn_mask"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-5, atol=2e-5)


def test_strides_of_every_kind() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(20, 16, 1, 2), torch.randn(1, 50, 2, 16), torch.randn(2, 1, 16, 50)
    mask = torch.randn(50, 20).T
    tensors = (query.permute(2, 3, 0, 1), key.transpose(1, 2), value.permute(1, 0, 3, 2))
    check(Case(*tensors, StatSpec.none(), {"attn_mask": mask}))


def test_derivatives_that_arrive_expanded() -> None:
    """As those of a sum do: with strides of 0."""
    found = {}
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        leaves = [torch.randn(1, 1, 20, 8).requires_grad_() for _ in range(3)]
        out, stats = attention(*leaves, StatSpec(topk=0), impl=impl)
        assert stats.entropy is not None
        found[impl] = torch.autograd.grad(out.sum() + stats.entropy.mean(), leaves)
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-6)


def test_packed_sequences_match_the_reference() -> None:
    """Some have no rows, some no keys, some neither."""
    torch.manual_seed(0)
    bounds_q, bounds_k = [0, 20, 20, 25, 25, 60], [0, 33, 40, 40, 40, 110]
    shapes = {"query": (60, 2, 16), "key": (110, 1, 16), "value": (110, 1, 9)}
    shapes |= {"sink_logits": (2,), "key_features": (110, 3)}
    leaves = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    tags = {"query_tags": torch.randint(0, 3, (2, 60)), "key_tags": torch.randint(-1, 3, (2, 110))}
    given: dict[str, Any] = leaves | tags | {"query_mask": torch.rand(60) < 0.8, "causal": True, "window": (20, -1)}
    weights: dict[str, Tensor] = {}

    def gradients(impl: str) -> tuple[Tensor, ...]:
        spec = StatSpec.all(topk=2)
        out, stats = attention_varlen(**given, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, spec=spec, impl=impl)
        loss = torch.zeros(())
        for name, tensor in outputs_of(out, stats).items():
            loss = loss + (tensor * weights.setdefault(name, torch.randn_like(tensor))).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    for name, got, want in zip(leaves, gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_the_same_call_gives_the_same_bits() -> None:
    case = small_case(causal=True, spec=StatSpec(topk=0, offsets=(-1,)))
    first, second = gradients_of(case, "triton"), gradients_of(case, "triton")
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_one_gradient_at_a_time_is_what_all_together_are() -> None:
    case = small_case(20, 40, attn_mask=torch.randn(1, 1, 20, 40), spec=StatSpec(topk=0, max=False))
    inputs = inputs_of(case)
    whole = gradients_of(case, "triton")
    for name, tensor in inputs.items():
        leaf = tensor.clone().requires_grad_()
        out, stats = attention(**{**inputs, name: leaf, "spec": case.spec, "impl": "triton"})
        (found,) = torch.autograd.grad(loss_of(outputs_of(out, stats)), leaf)
        assert torch.equal(found, whole[name]), name


def test_empty_calls_have_gradients_of_zero() -> None:
    query, key = torch.randn(1, 1, 3, 4, requires_grad=True), torch.randn(1, 1, 0, 4, requires_grad=True)
    out, _ = attention(query, key, key, impl="triton")
    assert (torch.autograd.grad(out.sum(), query)[0] == 0).all()
