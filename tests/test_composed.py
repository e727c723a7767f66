"""A Transformers model with attention of torch's around it: `capture` leaves no trace of either way to reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

import attncap
from attncap.adapters.composed import ComposedAdapter
from tests import models
from tests.plain import HEADS, WIDTH, Attention, every_row, maps_in_float64, seeded
from tests.test_capture import FULL, assert_stats_match
from tests.traces import names_registered, traces

BATCH = models.tokens(3, 9, seed=2, padding="left")
ROWS = int(BATCH["attention_mask"].sum())
LLAMA = ("model.layers.0.self_attn", "model.layers.1.self_attn")
RECEIVED = attncap.StatSpec(received=True)
LAYERS = ("body.encoder.layer.0.attention.self", "body.encoder.layer.1.attention.self", "pool", "last")


class Pooled(nn.Module):
    """A registered model, a call of torch's function and torch's own module, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.down = models.text_model("bert"), nn.Linear(16, WIDTH)
        self.pool, self.last = Attention(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.down(self.body(input_ids, attention_mask=attention_mask).last_hidden_state)
        states = self.pool(states)
        return self.last(states, states, states, key_padding_mask=attention_mask == 0, need_weights=False)[0]


@pytest.fixture
def model() -> Pooled:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pooled().eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH)


def state(model: Pooled) -> tuple[Any, ...]:
    """Everything that either adapter changes while it is open."""
    return traces(model), names_registered(), model.body.config._attn_implementation_internal


@contextmanager
def failing(model: Pooled, place: str, error: type[BaseException]) -> Iterator[None]:
    """Have a module raise when it is called."""

    def fail(*_: Any) -> None:
        raise error("in the middle")

    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="in the middle"):
            yield
    finally:
        handle.remove()


PLACES = ["body.encoder.layer.1", "pool", "last"]
ERRORS = [ValueError, KeyboardInterrupt]


def test_nothing_is_left_behind(model: Pooled) -> None:
    before, clean = output(model), state(model)
    cap = attncap.capture(model)
    assert isinstance(cap._adapter, ComposedAdapter)
    with cap:
        assert state(model) != clean
        torch.testing.assert_close(output(model), before, atol=1e-5, rtol=1e-5)
    assert cap.layers == LAYERS
    assert state(model) == clean
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_left_behind_by_what_ends_the_block(model: Pooled, place: str, error: type[BaseException]) -> None:
    before, clean = output(model), state(model)
    cap = attncap.capture(model)
    with failing(model, place, error), cap:
        output(model)
    assert state(model) == clean
    assert torch.equal(output(model), before)
    done = len(cap.layers)
    assert done == {"body.encoder.layer.1": 1, "pool": 2, "last": 3}[place]  # what ran is still there
    with cap:  # and it can go on
        output(model)
    assert cap.layers == LAYERS
    assert cap.count("entropy")[:, 0].tolist() == [2 * ROWS] * done + [ROWS] * (4 - done)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_what_fails_inside_the_block_does_not_confuse_the_next_forward(
    model: Pooled, place: str, error: type[BaseException]
) -> None:
    batches: list[tuple[int, ...]] = []

    def same(batch: Any) -> tuple[Tensor, Tensor]:
        batches.append(tuple(batch["input_ids"].shape))
        return batch["input_ids"], batch["input_ids"]

    clean = state(model)
    with attncap.capture(model, tags={"same": same}, keep="all") as cap:
        with failing(model, place, error):
            output(model)
        first = len(batches)
        output(model)
    assert state(model) == clean
    assert cap.layers == LAYERS
    assert len(batches) == 2 * first
    for name in LAYERS:
        newest = cap.stats[name][-1]
        assert (newest.tag_mass is None) == (name in ("pool", "last"))  # the batch is that of the model inside
        assert int((newest.lse[:, 0] > -torch.inf).sum()) == ROWS


def test_a_capture_inside_a_capture_is_refused_and_the_outer_one_goes_on(model: Pooled) -> None:
    before, clean = output(model), state(model)
    with attncap.capture(model) as outer:
        for inner in (model, model.body, model.body.encoder, model.pool, nn.Sequential(model)):
            opened = state(model)
            with pytest.raises(RuntimeError, match="being captured already"), attncap.capture(inner):
                pass
            assert state(model) == opened
        output(model)
    with attncap.capture(model.body), pytest.raises(RuntimeError, match="captured already"), attncap.capture(model):
        pass
    assert outer.layers == LAYERS
    assert state(model) == clean
    assert torch.equal(output(model), before)


# Models whose own attention was replaced, as code beside a checkpoint or a library does it.


class Sharp(LlamaAttention):
    """Attention without rotary positions."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in projections
        )
        out = self.attend(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class ByHand(Sharp):
    """The same, and keeps its map."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        self.prob = (query @ key.mT * self.scaling).masked_fill(later, -torch.inf).softmax(-1)
        return self.prob @ value


class Around(nn.Module):
    """Not called an attention, and not one of Transformers' modules."""

    def __init__(self, attention: Sharp) -> None:
        super().__init__()
        self.attention, self.forward = attention, attention.forward


def llama_with(kind: type[Sharp], how: str) -> Any:
    """A llama of which the first layer has another attention than Transformers'."""
    model = models.text_model("llama")
    layer = model.model.layers[0]
    if how == "class":
        layer.self_attn.__class__ = kind
    elif how == "method":
        for name in ("forward", "attend"):
            setattr(layer.self_attn, name, MethodType(getattr(kind, name), layer.self_attn))
    else:
        layer.self_attn.__class__ = kind
        layer.self_attn = Around(layer.self_attn)
    return model


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(BATCH["input_ids"])[0]


REPLACED = pytest.mark.parametrize("how", ["class", "method", "around"])


@REPLACED
def test_attention_that_took_the_place_of_transformers_own_is_captured_too(how: str) -> None:
    model = llama_with(Sharp, how)
    before = run(model)
    with attncap.capture(model, RECEIVED, keep="last") as cap:
        inside = run(model)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert cap.layers == LLAMA
    projected = models.text_model("llama")
    projected.model.layers[0].self_attn.__class__ = ByHand
    run(projected)
    torch.testing.assert_close(
        cap.stats[LLAMA[0]].received_mass, projected.model.layers[0].self_attn.prob.sum(2), atol=1e-5, rtol=1e-4
    )


@REPLACED
def test_attention_by_hand_in_the_place_of_transformers_own_is_named(how: str) -> None:
    model = llama_with(ByHand, how)
    with pytest.warns(UserWarning, match=r"not captured: model\.layers\.0\.self_attn multiplies a softmax itself"):  # noqa: SIM117
        with attncap.capture(model) as cap:
            run(model)
    assert cap.layers == LLAMA[1:]


def test_attention_that_took_the_place_of_transformers_own_can_be_selected() -> None:
    model = llama_with(Sharp, "method")
    for layers in ([0], [LLAMA[0]], [-2]):
        with attncap.capture(model, layers=layers) as cap:
            run(model)
        assert cap.layers == LLAMA[:1]


def test_a_method_that_goes_on_to_the_one_it_overrides_is_still_transformers_own() -> None:
    class Noisy(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = models.text_model("llama")
    model.model.layers[0].self_attn.__class__ = Noisy
    cap = attncap.capture(model)
    assert cap._adapter.known_layers == LLAMA
    with cap:
        run(model)
    assert cap.layers == LLAMA


# Parts of a Transformers model, and what is written around it.


def test_the_parts_of_a_transformers_model_that_call_torch_are_captured_too() -> None:
    model, pixels = models.siglip(), seeded(27, 2, 3, 12, 12)
    with torch.no_grad():
        before = model(pixels).pooler_output
        with attncap.capture(model, FULL, keep="last") as cap:
            inside = model(pixels).pooler_output
        assert torch.equal(model(pixels).pooler_output, before)
        maps = maps_in_float64(model, pixels)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert len(cap.layers) == 3
    assert_stats_match(cap.stats["head.attention"], maps["head.attention"], every_row(2, 1))


def test_what_is_written_around_a_transformers_model_is_captured_too() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = models.text_model("bert"), Attention()
            self.down = nn.Linear(16, WIDTH)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.pool(self.down(self.body(**batch).last_hidden_state))

    model, batch = Pooled(), models.tokens(3, 9, seed=2, padding="left")
    tags = {"duplicate": attncap.tags.duplicate}
    with torch.no_grad(), attncap.capture(model, FULL, keep="last", tags=tags) as cap:
        model(batch)
        expected = model.pool.map(model.down(model.body(**batch).last_hidden_state))
    assert cap.layers == ("body.encoder.layer.0.attention.self", "body.encoder.layer.1.attention.self", "pool")
    assert_stats_match(cap.stats["pool"], expected, batch["attention_mask"].bool())
    assert cap.stats["body.encoder.layer.1.attention.self"].tag_mass is not None
    with torch.no_grad(), attncap.capture(model, layers=[-1]) as cap:
        model(batch)
    assert cap.layers == ("body.encoder.layer.1.attention.self",)
