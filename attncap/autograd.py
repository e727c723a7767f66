"""How torch's autograd comes from an operator to the one that computes its gradients.

An operator attncap::NAME has a backward attncap::NAME_backward, whose arguments are those of NAME, its outputs, the
derivatives of those outputs that the loss depends on, their names, and the names of the inputs whose gradients are
wanted. It gives these in their order, and cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncap.types import UnsupportedError

OutputNames = Callable[[Sequence[Any]], Sequence[str]]
"""Of the arguments of an operator: the names of its outputs, `topk_index` being the one without a derivative."""


# Inputs on which one output alone depends.
_ONLY_THROUGH = {"value": "out", "key_features": "feature_mass"}


def register(name: str, places: Mapping[str, int], output_names: OutputNames) -> Callable[..., Sequence[Tensor]]:
    """Make torch differentiate attncap::`name`; gives what is to be called in its place.

    Args:
        places: of the differentiable inputs among the arguments.
    """
    backward = _backward_of(name, places, output_names)

    def registered(ctx: Any, derivatives: Sequence[Tensor | None]) -> tuple[Any, ...]:
        # torch takes an empty list among the arguments for one of tensors, and wants one back.
        gradients = zip(backward(ctx, *derivatives), ctx.others, strict=True)
        return tuple([] if other == [] else gradient for gradient, other in gradients)

    torch.library.register_autograd(f"attncap::{name}", registered, setup_context=_save)
    torch.library.register_autograd(f"attncap::{name}_backward", refuse_second)

    class Transformed(torch.autograd.Function):
        """For the transforms of torch.func, which know nothing of what is registered."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return tuple(getattr(torch.ops.attncap, name)(*arguments))

        setup_context = staticmethod(_save)
        backward = staticmethod(_backward_of(name, places, output_names))

        vmap = staticmethod(_refuse_vmap)
        jvp = staticmethod(_refuse_forward_mode)

    def run(*arguments: Any) -> Any:
        if _in_transform():
            return Transformed.apply(*arguments)  # type: ignore[no-untyped-call]
        return getattr(torch.ops.attncap, name)(*arguments)

    return run


def refuse_second(ctx: Any, *grad_outputs: Any) -> Any:
    """The backward of a backward."""
    raise UnsupportedError("attncap's gradients cannot be differentiated again, but those of impl='reference' can")


def _refuse_vmap(*_: Any) -> Any:
    raise UnsupportedError("attncap's attention has a batch of its own, in the place of torch.func.vmap")


def _refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise UnsupportedError(
        "attncap's attention has no forward mode (torch.func.jvp), which impl='reference' alone knows"
    )


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """Keep what a backward computes the probabilities from once more; nothing of it is N x N."""
    ctx.set_materialize_grads(False)  # an output that the loss does not depend on has no derivative
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.are_tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *output)


def _backward_of(name: str, places: Mapping[str, int], output_names: OutputNames) -> Callable[..., Any]:
    def backward(ctx: Any, *derivatives: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if given else other for given, other in zip(ctx.are_tensors, ctx.others, strict=True)]
        outputs = list(saved)
        named = zip(output_names(inputs), derivatives, strict=True)
        arrived = {one: derivative for one, derivative in named if derivative is not None}
        wanted = [
            one
            for one, place in places.items()
            if ctx.needs_input_grad[place] and _ONLY_THROUGH.get(one, one) in (one, *arrived)
        ]
        result: list[Tensor | None] = [None] * len(inputs)
        if arrived and wanted:
            run = _run_transformed if _in_transform() else getattr(torch.ops.attncap, f"{name}_backward")
            found = run(*inputs, outputs, list(arrived.values()), list(arrived), wanted)
            for one, gradient in zip(wanted, found, strict=True):
                result[places[one]] = gradient
        return tuple(result)

    def _run_transformed(*arguments: Any) -> Any:
        *inputs, outputs, upstream, arrived, wanted = arguments
        sizes = (len(inputs), len(outputs))
        return Once.apply(name, sizes, arrived, wanted, *inputs, *outputs, *upstream)  # type: ignore[no-untyped-call]

    return backward


class Once(torch.autograd.Function):
    """An operator's backward for the transforms of torch.func, its lists of tensors laid out."""

    @staticmethod
    def forward(name: str, sizes: tuple[int, int], arrived: list[str], wanted: list[str], *values: Any) -> Any:
        inputs, outputs, upstream = values[: sizes[0]], values[sizes[0] : sum(sizes)], values[sum(sizes) :]
        operator = getattr(torch.ops.attncap, f"{name}_backward")
        return tuple(operator(*inputs, list(outputs), list(upstream), arrived, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    backward = staticmethod(refuse_second)
    vmap = staticmethod(_refuse_vmap)
    jvp = staticmethod(_refuse_forward_mode)
