"""Gradients through the output and every statistic: against differences and autograd, in every precision."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import HeadStats, StatSpec, UnsupportedError, attention, attention_varlen, ops, validation
from tests.cases import SMALL, Case, Sizes, random_case
from tests.derivatives import assert_gradients_match_float64, gradients_of, inputs_of, outputs_of

SHORT = Sizes(longest=20, rows=(0, 1, 2, 9, 17))
STATISTICS = tuple(name for name in (field.name for field in dataclasses.fields(HeadStats)) if name != "topk_index")
# Interpreted kernels of the forward; numpy warns of what a GPU computes without a word.
TRITON = pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def full_case(seed: int = 0, **changes: Any) -> Case:
    """Every statistic on every kind of option, small enough for differences; keys 0 is seen by no row."""
    torch.manual_seed(seed)
    batch, heads, groups, rows, keys = 2, 4, 2, 3, 5
    shapes = ((heads, rows, 3), (groups, keys, 3), (groups, keys, 2))
    query, key, value = (torch.randn(batch, *shape).double() for shape in shapes)
    bias = torch.randn(1, heads, rows, keys).double()
    bias[..., 0] = -torch.inf
    bias[:, 0, 1] = -torch.inf  # a row that sees nothing
    kwargs = {
        "attn_mask": bias,
        "window": (3, 2),
        "softcap": 2.0,
        "scale": 1.3,
        "query_offset": 1,
        "sink_logits": torch.randn(heads).double(),
        "query_mask": torch.tensor([[True, True, True], [True, False, True]]),
        "query_tags": torch.randint(0, 2, (2, batch, rows)),
        "key_tags": torch.randint(-1, 2, (2, batch, keys)),
        "key_features": torch.randn(batch, keys, 2).double(),
    }
    spec = StatSpec.all(topk=2, offsets=(-1, 0, 2))
    return Case(query, key, value, dataclasses.replace(spec, sink=3, diagonal=1), kwargs | changes)


def check_by_differences(case: Case, impl: str, output: str) -> None:
    names = list(inputs_of(case))

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        mask = given.get("attn_mask")
        if mask is not None:  # a difference by an infinite bias is no number
            given["attn_mask"] = torch.where(inputs_of(case)["attn_mask"].isinf(), -torch.inf, mask)
        out, stats = attention(**{**case.kwargs, **given, "spec": case.spec, "impl": impl})
        return outputs_of(out, stats)[output]

    leaves = [torch.where(tensor.isinf(), 0.0, tensor).requires_grad_() for tensor in inputs_of(case).values()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("output", ["out", *STATISTICS])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_every_output_is_differentiated_as_differences_do(impl: str, output: str) -> None:
    check_by_differences(full_case(), impl, output)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_causal_call_without_options_too(impl: str) -> None:
    case = full_case()
    plain = Case(case.query, case.key, case.value, case.spec, {"causal": True})
    for output in ("out", "entropy", "received_mass", "collision"):
        check_by_differences(plain, impl, output)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_have_the_gradients_that_autograd_finds(seed: int) -> None:
    assert_gradients_match_float64(random_case(seed, dtype=torch.float64, sizes=SHORT), "cpu")


@pytest.mark.parametrize("name", ["out", *STATISTICS])
def test_each_output_alone_has_the_gradients_that_autograd_finds(name: str) -> None:
    for seed in range(3):
        assert_gradients_match_float64(full_case(seed), "cpu", names=[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_lower_precision_is_as_exact_as_autograd_in_it(dtype: torch.dtype, seed: int) -> None:
    assert_gradients_match_float64(random_case(seed, sizes=SHORT).as_dtype(dtype), "cpu")


@pytest.mark.parametrize("impl", [TRITON])
@pytest.mark.parametrize("seed", [0, 3, 5, 8])
def test_other_forwards_have_the_same_gradients(impl: str, seed: int) -> None:
    assert_gradients_match_float64(random_case(seed, sizes=SMALL), impl)


def test_blocks_of_rows_add_up() -> None:
    """A call whose rows are taken in many blocks."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 700, 4).double(), torch.randn(1, 1, 4100, 4).double()
    kwargs = {"causal": True, "attn_mask": torch.randn(1, 4100).double()}
    assert_gradients_match_float64(Case(query, key, key, StatSpec.all(topk=2), kwargs), "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_packed_sequences_have_the_gradients_of_each_alone(impl: str) -> None:
    torch.manual_seed(1)
    ends_q, ends_k = [0, 4, 4, 9], [0, 4, 6, 11]
    shapes = {"query": (9, 4, 3), "key": (11, 2, 3), "value": (11, 2, 5), "sink_logits": (4,), "key_features": (11, 2)}
    leaves = {name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items()}
    tags = {"query_tags": torch.randint(0, 2, (1, 9)), "key_tags": torch.randint(0, 2, (1, 11))}
    given = leaves | tags | {"query_mask": torch.rand(9) < 0.8}
    options = {"spec": StatSpec.all(topk=2), "causal": True, "softcap": 3.0, "impl": impl}
    out, stats = attention_varlen(**given, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, **options)
    whole = outputs_of(out.transpose(0, 1), stats)
    weights = {name: torch.randn_like(tensor) for name, tensor in whole.items()}
    loss = sum((tensor * weights[name]).sum() for name, tensor in whole.items())

    apart = torch.zeros(()).double()
    for q0, q1, k0, k1 in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        rows, keys = slice(q0, q1), slice(k0, k1)
        one: dict[str, Tensor] = {"sink_logits": given["sink_logits"], "query_mask": given["query_mask"][None, rows]}
        one["query"] = given["query"][rows].transpose(0, 1)[None]
        one |= {name: given[name][keys].transpose(0, 1)[None] for name in ("key", "value")}
        one |= {"query_tags": tags["query_tags"][:, None, rows], "key_tags": tags["key_tags"][:, None, keys]}
        one_out, one_stats = attention(**one, key_features=given["key_features"][None, keys], **options)
        for name, tensor in outputs_of(one_out, one_stats).items():
            places = keys if name == "received_mass" else rows
            apart = apart + (tensor[0] * weights[name][:, places]).sum()
    found, expected = (torch.autograd.grad(total, list(leaves.values())) for total in (loss, apart))
    for name, gradient, wanted in zip(leaves, found, expected, strict=True):
        torch.testing.assert_close(
            gradient, wanted, atol=1e-12, rtol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


LEVELS = [("reference", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
LEVELS += [("cpu", dtype) for _, dtype in LEVELS]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("impl", "dtype"), [*LEVELS, ("triton", torch.float32)])
def test_a_backward_tells_the_product_of_each_rows_output_and_its_derivative(impl: str, dtype: torch.dtype) -> None:
    """Which is the derivative by a gate of 1 on what a head gives at a token; from the output before it was rounded."""
    torch.manual_seed(0)
    query, key, derivative = (torch.randn(2, heads, 70, 16).to(dtype) for heads in (4, 2, 4))
    sink_logits = torch.randn(4)
    options = validation.check_options(
        causal=True, scale=None, window=None, softcap=3.0, query_offset=0, head_dim=query.shape[-1]
    )
    extras = validation.check_extras(query, key, sink_logits=sink_logits)

    def forward(impl: str, *tensors: Tensor) -> tuple[Tensor, HeadStats]:
        given = {"causal": True, "softcap": 3.0, "sink_logits": sink_logits}
        return attention(*tensors, StatSpec.none(), impl=impl, **given)

    out, stats = forward(impl, query, key, key)
    exact, _ = forward("reference", *(tensor.double() for tensor in (query, key, key)))
    wanted = ["query", "level"]
    _, level = ops.backward_of_out(query, key, key, options, extras, impl, out, stats.lse, derivative, wanted)
    assert level.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    allowed = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(level.double(), (exact * derivative.double()).sum(-1), atol=allowed, rtol=allowed)


# What a gradient is at the edges.


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_and_heads_that_see_nothing_have_gradients_of_zero(impl: str) -> None:
    """Also where the derivatives that arrive are no numbers, as those by a lse of -inf."""
    query, key, value = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    mask = torch.zeros(1, 2, 4, 4)
    mask[0, :, 1] = -torch.inf
    mask[0, 1] = -torch.inf
    mask.requires_grad_()
    out, stats = attention(query, key, value, StatSpec.all(), attn_mask=mask, sink_logits=sinks, impl=impl)
    loss = sum((tensor.nan_to_num(neginf=0) ** 2).sum() for name, tensor in stats.items() if name != "topk_index")
    found = torch.autograd.grad(loss + (stats.lse * 0.1).exp().sum() + out.sum(), [query, key, value, mask, sinks])
    for gradient in found:
        assert gradient.isfinite().all()
    assert (found[0][0, 0, 1] == 0).all()
    assert all((gradient[0, 1] == 0).all() for gradient in found[:4])
    assert (found[4] == 0).all()


def test_a_derivative_that_is_no_number_stays_out_of_rows_that_see_nothing() -> None:
    query = torch.randn(1, 1, 2, 3, requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    _, stats = attention(query, query, query, attn_mask=mask, impl="cpu")
    (found,) = torch.autograd.grad(stats.lse.square().sum(), query)  # infinite by the second row's
    assert found.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_of_equal_largest_scores_the_first_has_the_derivative(impl: str) -> None:
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([1.0, 2.0, 2.0, 2.0]).view(1, 1, 4, 1).requires_grad_()
    _, stats = attention(query, key, key.detach(), StatSpec(topk=2), impl=impl)
    assert stats.max_logit is not None
    (found,) = torch.autograd.grad(stats.max_logit.sum(), key, retain_graph=True)
    assert found.flatten().tolist() == [0, 1, 0, 0]
    assert stats.topk_prob is not None
    assert stats.topk_index is not None
    assert not stats.topk_index.requires_grad
    (found,) = torch.autograd.grad(stats.topk_prob[..., 1].sum(), key)  # that of key 2
    assert found.flatten()[2] > 0
    assert (found.flatten()[[0, 1, 3]] < 0).all()


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (2, 1, 1, 5), (1, 4, 3, 5), (4, 1, 5), (2, 1, 3, 1), (1, 1, 1, 1)])
def test_a_broadcast_mask_has_a_gradient_of_its_own_shape(shape: tuple[int, ...]) -> None:
    case = full_case(attn_mask=torch.randn(shape).double())
    assert gradients_of(case, "cpu")["attn_mask"].shape == shape
    assert_gradients_match_float64(case, "cpu")


def test_derived_statistics_have_gradients() -> None:
    def derived(impl: str) -> tuple[Tensor, ...]:
        leaves = [torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(one)).double() for one in range(3)]
        query, key, value = (leaf.requires_grad_() for leaf in leaves)
        _, stats = attention(query, key, value, attn_mask=torch.ones(5, 5).tril(-1).bool(), impl=impl)
        assert stats.max_prob is not None
        assert stats.topk_mass is not None
        assert stats.entropy is not None
        relative = stats.entropy[..., 2:] / torch.arange(2, 5).log()
        loss = stats.max_prob.square().sum() + stats.topk_mass.sum() + relative.sum()
        return torch.autograd.grad(loss, [query, key])

    for one, other in zip(derived("cpu"), derived("reference"), strict=True):
        torch.testing.assert_close(one, other)


def test_masked_rows_keep_the_gradient_of_their_output() -> None:
    query, key, value = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True, False]])
    out, stats = attention(query, key, value, query_mask=mask, impl="cpu")
    found = torch.autograd.grad(out.square().sum(), [query, key, value], retain_graph=True)
    plain, _ = attention(query, key, value, impl="cpu")
    for one, other in zip(found, torch.autograd.grad(plain.square().sum(), [query, key, value]), strict=True):
        torch.testing.assert_close(one, other)
    assert stats.entropy is not None
    (found_query,) = torch.autograd.grad(stats.entropy.sum(), query)
    assert (found_query[:, :, 1::2] == 0).all()
    assert (found_query[:, :, ::2] != 0).all()


def test_an_input_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    query, key, value = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    features = torch.randn(1, 3, 2, requires_grad=True)
    _, stats = attention(query, key, value, key_features=features, impl="cpu")
    assert stats.entropy is not None
    stats.entropy.sum().backward()
    assert query.grad is not None
    assert key.grad is not None
    assert value.grad is None
    assert features.grad is None


# How it is done.


def test_a_backward_inside_autocast_is_as_exact_as_outside() -> None:
    case = random_case(2, sizes=Sizes(rows=(17,), longest=40), number_of_keys=30)
    expected = gradients_of(case, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for name, gradient in gradients_of(case, "cpu").items():
            assert torch.equal(gradient, expected[name]), name


def test_two_backwards_give_the_same_bits() -> None:
    case = random_case(1, sizes=Sizes(rows=(65,), longest=200), number_of_keys=180)
    first, second = gradients_of(case, "cpu"), gradients_of(case, "cpu")
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_nothing_is_saved_without_a_gradient() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    query = torch.randn(1, 1, 6, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(query, query, query, impl="cpu")
        assert not saved
        attention(query.clone().requires_grad_(), query, query, impl="cpu")
    assert saved
    assert max(tensor.numel() for tensor in saved) <= 6 * 8  # a list of the top 8 is the largest


def test_second_derivatives_are_refused_by_name_and_the_reference_has_them() -> None:
    query = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def gradient(impl: str) -> Tensor:
        out, stats = attention(query, query, query, impl=impl)
        assert stats.entropy is not None
        return torch.autograd.grad(out.square().sum() + stats.entropy.sum(), query, create_graph=True)[0]

    with pytest.raises(UnsupportedError, match="cannot be differentiated again"):
        gradient("cpu").sum().backward()
    assert torch.autograd.gradgradcheck(lambda query: attention(query, query, query, impl="reference")[0], query)
    (second,) = torch.autograd.grad(gradient("reference").sum(), query)
    assert second.isfinite().all()


# torch.func itself imports parts of torch.jit that warn of their age.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_torch_func_can_differentiate() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4)

    def loss(query: Tensor) -> Tensor:
        out, stats = attention(query, key, value, StatSpec.all(), impl="cpu")
        assert stats.entropy is not None
        return out.square().sum() + stats.entropy.sum()

    expected = torch.autograd.grad(loss(leaf := query.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(query), expected)
    _, back = torch.func.vjp(loss, query)
    torch.testing.assert_close(back(torch.ones(()))[0], expected)
    with pytest.raises(UnsupportedError, match="query: carries a forward-mode tangent"):
        torch.func.jvp(loss, (query,), (query,))
    with pytest.raises(UnsupportedError, match=r"torch\.func\.jvp"):
        torch.func.hessian(loss)(query)
    with pytest.raises(UnsupportedError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda query: attention(query, key, value, impl="cpu")[0])(query[None])
    with pytest.raises(UnsupportedError, match="cannot be differentiated again"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(query)


PROGRAM = """
import torch
from attncap import StatSpec, attention

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)

def step(length):
    query, key, value = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = peak()
    out, stats = attention(query, key, value, StatSpec.all(), causal=True)
    (out.sum() + stats.entropy.sum() + stats.received_mass.square().sum()).backward()
    return (peak() - before) / 2**20

step(512)
print(step(16384))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the process from /proc")
def test_a_backward_of_16384_rows_takes_at_most_160_mebibytes() -> None:
    """Where one map would take 1024."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 160


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_compile_keeps_forward_and_backward_whole(backend: str, dynamic: bool) -> None:
    def loss(query: Tensor, key: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        out, stats = attention(query * 2, key, key, StatSpec.all(), attn_mask=mask, sink_logits=sinks, softcap=5.0)
        assert stats.max_prob is not None
        assert stats.entropy is not None
        assert stats.received_mass is not None
        return out.sin().sum() + stats.max_prob.sum() + stats.entropy.square().sum() + stats.received_mass.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    torch._dynamo.reset()
    for rows in (12, 17):
        torch.manual_seed(rows)
        given = [torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(rows, rows), torch.randn(2)]
        for one, other in zip(differentiate(compiled, given), differentiate(loss, given), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def differentiate(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    return torch.autograd.grad(function(*leaves), leaves)
