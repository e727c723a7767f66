"""PyTorch's own OpInfo samples of scaled_dot_product_attention, given to attncap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncap
from attncap import UnsupportedError

BOTH = (attncap.scaled_dot_product_attention, F.scaled_dot_product_attention)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def operator() -> Any:
    """The OpInfo of the function, from torch's own test suite."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs the package expecttest")
    flag = "__allow_nonbracketed_mutation_flag"
    allowed = getattr(torch.backends, flag)
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        pytest.skip(f"torch's own test suite cannot be imported: {error}")
    finally:
        # Its import forbids this process to set torch's flags.
        setattr(torch.backends, flag, allowed)
    (found,) = (one for one in op_db if one.name == "nn.functional.scaled_dot_product_attention")
    return found


def samples(operator: Any, dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(tensors, options) of each sample."""
    torch.manual_seed(0)
    for sample in operator.sample_inputs("cpu", dtype, requires_grad=False):
        yield (sample.input, *sample.args), sample.kwargs


class Call(nn.Module):
    """A model that is one call of torch's function."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


def assert_as_exact_as_torch(found: Tensor, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """The error against float64 is at most twice that of torch's own function, and a few roundings.

    A score of size s is known to s roundings, by which its probability then errs.
    """
    expected = F.scaled_dot_product_attention(*tensors, **options)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.double()}
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors), **options)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    query, key, value = (tensor.double().norm(dim=-1).max() for tensor in tensors[:3])
    score = query * key * options.get("scale", tensors[0].shape[-1] ** -0.5)
    roundings = 16 * exact.abs().max() + 2 * score * value
    allowed = 2 * (expected - exact).abs().max() + torch.finfo(found.dtype).eps * roundings
    assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_without_dropout_give_what_torch_gives(operator: Any, dtype: torch.dtype) -> None:
    served = 0
    for tensors, options in samples(operator, dtype):
        if options.get("dropout_p"):
            continue
        assert_as_exact_as_torch(attncap.scaled_dot_product_attention(*tensors, **options), tensors, options)
        model = Call()
        with attncap.capture(model) as cap:
            assert_as_exact_as_torch(model(*tensors, **options), tensors, options)
        assert cap.layers == ("Call",)
        served += 1
    assert served >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_with_dropout_are_refused_by_name(operator: Any, dtype: torch.dtype) -> None:
    refused = 0
    for tensors, options in samples(operator, dtype):
        if options.get("dropout_p"):
            with pytest.raises(UnsupportedError, match=r"dropout_p: .* got 0\.5"):
                attncap.scaled_dot_product_attention(*tensors, **options)
            refused += 1
    assert refused >= 10


def test_samples_have_the_gradients_that_torch_finds(operator: Any) -> None:
    """Of the mask too, where it is a floating one."""
    masks = 0
    for tensors, options in samples(operator, torch.float64):
        if options.get("dropout_p"):
            continue
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            mask = mask.detach().clone().requires_grad_()
            options, masks = options | {"attn_mask": mask}, masks + 1
            leaves.append(mask)
        found, expected = (function(*leaves[:3], **options) for function in BOTH)
        weight = torch.randn_like(found)
        pairs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, expected))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)
    assert masks
