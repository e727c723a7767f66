"""The operators under torch's own checks: schema, fake kernel, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import HeadStats, StatSpec, attention, attention_varlen, ops, validation
from tests.cases import Sizes, random_case


def record_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The operator's arguments, as the public functions pass them."""
    calls: list[tuple[Any, ...]] = []
    operator = getattr(torch.ops.attncap, name)

    def recorder(*arguments: Any) -> Any:
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.attncap, name, recorder, raising=False)
    return calls


@pytest.mark.parametrize("seed", [3, 8, 11, 14, 20, 21])
def test_opcheck_passes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(seed, sizes=Sizes(longest=40))
    with monkeypatch.context() as patch:
        calls = record_calls(patch, "attention")
        attention(case.query, case.key, case.value, case.spec, impl="cpu", **case.kwargs)
    torch.library.opcheck(torch.ops.attncap.attention.default, calls[0])
    differentiable = tuple(
        one.detach().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in calls[0]
    )
    torch.library.opcheck(torch.ops.attncap.attention.default, differentiable)


def test_opcheck_passes_on_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(9, 4, 8), torch.randn(12, 2, 8)
    with monkeypatch.context() as patch:
        calls = record_calls(patch, "attention_varlen")
        attention_varlen(query, key, key, [0, 4, 9], [0, 5, 12], StatSpec.all(), impl="cpu")  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.attncap.attention_varlen.default, calls[0])
    differentiable = (*(one.requires_grad_() for one in calls[0][:3]), *calls[0][3:])
    torch.library.opcheck(torch.ops.attncap.attention_varlen.default, differentiable)


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_opcheck_passes_on_backwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(9, 4, 8, requires_grad=True), torch.randn(12, 2, 8, requires_grad=True)
    with monkeypatch.context() as patch:
        calls = record_calls(patch, f"{name}_backward")
        if name == "attention":
            batched = (one.transpose(0, 1)[None] for one in (query, key, key))
            out, stats = attention(*batched, StatSpec.all(), impl="cpu")
        else:
            out, stats = attention_varlen(query, key, key, [0, 4, 9], [0, 5, 12], StatSpec.all(), impl="cpu")
        assert stats.entropy is not None
        torch.autograd.grad(out.sum() + stats.entropy.sum(), [query, key])
    operator = getattr(torch.ops.attncap, f"{name}_backward").default
    torch.library.opcheck(operator, tuple(_detached(one) for one in calls[0]))


def _detached(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_detached(one) for one in argument]
    return argument.detach() if isinstance(argument, Tensor) else argument


def test_the_fake_kernel_gives_the_real_shapes() -> None:
    query, key = torch.randn(2, 4, 9, 8, dtype=torch.bfloat16), torch.randn(2, 2, 11, 8, dtype=torch.bfloat16)
    options = validation.check_options(
        causal=True, scale=None, window=None, softcap=None, query_offset=None, head_dim=8
    )
    real_out, real = ops.attention(query, key, key, StatSpec.all(), options, validation.Extras(), "cpu")
    query, key = query.to("meta"), key.to("meta")
    out, fake = ops.attention(query, key, key, StatSpec.all(), options, validation.Extras(), "cpu")
    assert (out.shape, out.dtype) == (real_out.shape, real_out.dtype)
    for (name, got), (_, want) in zip(fake.items(), real.items(), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_keeps_out_and_statistics(dynamic: bool) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, HeadStats, Tensor]:
        out, stats = attention(query * 2, key, value, StatSpec.all(), causal=True)
        assert stats.entropy is not None
        return out + 1, stats, stats.entropy.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (20, 33):
        tensors = torch.randn(3, 1, 2, rows, 8)
        out, stats, entropy = compiled(*tensors)
        plain_out, plain, plain_entropy = step(*tensors)
        torch.testing.assert_close(out, plain_out)
        torch.testing.assert_close(entropy, plain_entropy)
        for (name, got), (_, want) in zip(stats.items(), plain.items(), strict=True):
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


# Inductor itself imports parts of torch.jit that warn of their age.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_inductor_compiles_it() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = attention(query.sin(), key, value)
        assert stats.topk_prob is not None
        return out.relu(), stats.topk_prob.sum(-1)

    tensors = torch.randn(3, 1, 2, 20, 8)
    for got, want in zip(torch.compile(step, fullgraph=True)(*tensors), step(*tensors), strict=True):
        torch.testing.assert_close(got, want)


def test_inputs_that_require_grad_are_served_under_no_grad() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    with torch.no_grad():
        out, _ = attention(query, query, query)
    assert not out.requires_grad


def test_torch_compile_takes_changing_numbers_and_packed_sequences() -> None:
    query = torch.randn(9, 2, 8)

    def step(query: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        out, stats = attention_varlen(
            query, query, query, [0, 4, 9], [0, 4, 9], StatSpec(), causal=True, scale=scale, softcap=softcap
        )
        return out, stats.lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for numbers in ((0.1, 1.0), (0.2, 3.0), (0.5, 7.0)):
        for got, want in zip(compiled(query, *numbers), step(query, *numbers), strict=True):
            torch.testing.assert_close(got, want)


# torch.func itself imports parts of torch.jit that warn of their age.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_mode_is_refused_by_name() -> None:
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="query: carries a forward-mode tangent"):
        torch.func.jvp(lambda x: attention(x, x, x, impl="cpu")[0], (query,), (query,))


def test_second_derivatives_are_refused_by_name() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    out, _ = attention(query, query, query, impl="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_statistics_are_a_tree_of_tensors() -> None:
    _, stats = attention(*torch.randn(3, 1, 2, 5, 8))
    halved = torch.utils._pytree.tree_map(lambda tensor: tensor / 2, stats)
    assert isinstance(halved, HeadStats)
    torch.testing.assert_close(halved.lse, stats.lse / 2)
    assert stats != halved
