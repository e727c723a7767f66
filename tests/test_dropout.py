"""Attention with dropout, which `capture` and `Monitor` leave to the model and watch beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attncap
import attncap.nn
from attncap import Monitor, UnsupportedError
from attncap.analysis import head_distances
from tests import models
from tests.trainable import HEADS, SPEC, WIDTH, batch


class Dropping(nn.Module):
    """Attention with dropout by torch's function, or by torch's module."""

    def __init__(self, kind: str, dropout: float = 0.3) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.kind != "function":
            return self.attention(hidden, hidden, hidden, need_weights=self.kind == "module with weights")[0]
        heads = self.inner(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            heads, heads, heads, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return hidden + out.transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    """A module under activation checkpointing."""

    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.inner, hidden, use_reentrant=self.reentrant)


def llama() -> Any:
    model: Any = models.text_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def bert() -> Any:
    """With dropout after the first layer's attention too."""
    model: Any = models.text_model("bert").train()
    model.embeddings.dropout.p = 0.0
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "function": lambda: Dropping("function"),
    "module": lambda: Dropping("module"),
    "module with weights": lambda: Dropping("module with weights"),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.2, batch_first=True),
    "llama": llama,
    "bert": bert,
}


def arguments(kind: str) -> dict[str, Any]:
    if kind in ("llama", "bert"):
        return models.tokens(2, 7, seed=1, padding="left")
    return {"src" if kind == "encoder layer" else "hidden": batch(0)}


def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """With the random numbers of a seed."""
    torch.manual_seed(3)
    out = model(**given)
    return out if isinstance(out, Tensor) else out[0]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def step(model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """(output, gradients, state of the random numbers afterwards) of a step of training."""
    out = output(model, given)
    return out, gradients(model, out.square().mean()), torch.get_rng_state()


@contextmanager
def means(model: nn.Module, watcher: str) -> Iterator[dict[str, Tensor]]:
    """Filled with the means (layers, heads) of what runs inside, by a capture or a monitor."""
    found: dict[str, Tensor] = {}
    if watcher == "capture":
        with attncap.capture(model, SPEC) as cap:
            yield found
        found |= {stat: cap.mean(stat) for stat in ("entropy", "sink_mass")}
    else:
        with Monitor(model, SPEC) as monitor:
            yield found
            monitor.step()
        found |= monitor.tensors()


@pytest.mark.parametrize("watcher", ["capture", "monitor"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_bit_for_bit_the_models_own_and_its_statistics_are_those_before_dropout(
    kind: str, watcher: str
) -> None:
    model, given = MODELS[kind](), arguments(kind)
    expected = step(model, given)
    with means(model, watcher) as watched:
        found = step(model, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model.eval()
    assert not torch.equal(output(model, given), expected[0])
    with torch.no_grad(), means(model, "capture") as undropped:
        output(model, given)
    for stat, wanted in undropped.items():  # what a second layer is given depends on the first one's dropout
        torch.testing.assert_close(watched[stat][0], wanted[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["function", "module", "llama"])
def test_differentiable_statistics_have_their_gradients_beside_the_models_own(kind: str, checkpointed: bool) -> None:
    given = models.tokens(2, 7, seed=1) if kind == "llama" else arguments(kind)

    def total(model: nn.Module, out_weight: float) -> list[Tensor]:
        with attncap.capture(model, SPEC, keep="last", differentiable=True) as cap:
            out = output(model, given)
            return gradients(model, out_weight * out.square().mean() + cap.stats[cap.layers[0]].entropy.mean())

    model = MODELS[kind]()
    _, of_out, _ = step(model, given)
    wanted = [one + other for one, other in zip(of_out, total(model.eval(), 0.0), strict=True)]
    model.train()
    if checkpointed and kind == "llama":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif checkpointed:
        model = Checkpointed(model, reentrant=False)
    torch.testing.assert_close(total(model, 1.0), wanted)


@pytest.mark.parametrize("kind", ["function", "llama"])
def test_importance_is_that_of_what_was_dropped(kind: str) -> None:
    model: Any = MODELS[kind]()
    given = models.tokens(2, 7, seed=1) if kind == "llama" else arguments(kind)
    gates: list[Tensor] = []
    own = F.scaled_dot_product_attention

    def gated(*args: Any, **kwargs: Any) -> Tensor:
        out = own(*args, **kwargs)
        gates.append(torch.ones(out.shape[:3], requires_grad=True))
        return out * gates[-1][..., None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", gated)
        loss = output(model, given).square().mean()
        wanted = torch.stack([one.abs().mean((0, 2)) for one in torch.autograd.grad(loss, gates)]).double()
    with attncap.capture(model, SPEC, importance=True) as cap:
        output(model, given).square().mean().backward()
    torch.testing.assert_close(cap.mean("importance"), wanted, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    model, given = llama(), arguments("llama")
    with Monitor(model, SPEC, importance=True) as plain:
        _, expected, _ = step(model, given)
        plain.step()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with Monitor(model, SPEC, importance=True) as monitor:
        output(model, given).square().mean().backward()
        monitor.step()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    torch.testing.assert_close(monitor.tensors(), plain.tensors(), atol=1e-9, rtol=1e-4)


# What is refused.


@pytest.mark.parametrize("kind", ["function", "module"])
def test_reentrant_checkpointing_that_would_lose_a_statistics_gradient_is_refused(kind: str) -> None:
    model = Checkpointed(MODELS[kind](), reentrant=True)
    with attncap.capture(model, SPEC, keep="last", differentiable=True):
        out = model(batch(0).requires_grad_())
        with pytest.raises(UnsupportedError, match=r"differentiable: under reentrant .* set use_reentrant=False"):
            out.square().mean().backward()


def test_importance_inside_torchs_module_is_refused() -> None:
    model = MODELS["module"]()
    for watch in (attncap.capture, Monitor):
        with (
            pytest.raises(UnsupportedError, match=r"importance: attention has dropout 0\.3 .* set it to 0"),
            watch(model, importance=True),
        ):
            model(batch(0))


def test_a_compiled_graph_is_refused() -> None:
    torch._dynamo.reset()
    graph = torch.compile(MODELS["function"](), backend="eager", fullgraph=True)
    message = r"dropout: .* 0\.3, which cannot be watched in a compiled graph; set it to 0"
    for watch in (attncap.capture, Monitor):
        with watch(graph, SPEC), pytest.raises(Exception, match=message):
            graph(batch(0))
    torch._dynamo.reset()


def test_analyses_that_look_at_what_heads_give_ask_for_evaluation_mode() -> None:
    with pytest.raises(UnsupportedError, match=r"dropout: .*attention\.self has dropout 0\.1 .* call model\.eval\(\)"):
        head_distances(bert(), [arguments("bert")])


def test_attncaps_own_module_and_function_have_none() -> None:
    module = attncap.nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, batch_first=True)
    with pytest.raises(UnsupportedError, match=r"dropout: .* call model\.eval\(\)"), attncap.capture(module):
        module(batch(0), batch(0), batch(0))
