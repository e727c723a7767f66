"""`capture` under torch.compile: whole graphs, and the statistics of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import attncap
from tests import maps, models
from tests.plain import HEADS, WIDTH, Attention, every_row, padding, seeded
from tests.test_capture import FULL, TOLERANCE, assert_stats_match

BATCH = models.tokens(2, 7, seed=1, padding="left")
TOKENS = BATCH["attention_mask"].bool()
DUPLICATE = {"duplicate": attncap.tags.duplicate}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def assert_same_summary(found: attncap.Capture, expected: attncap.Capture, phases: tuple[str | None, ...]) -> None:
    assert found.layers == expected.layers
    assert found.layers
    for stat in expected.accumulator.stats:
        for phase in phases:
            assert torch.equal(found.count(stat, phase), expected.count(stat, phase)), stat
            one, other = found.mean(stat, phase), expected.mean(stat, phase)
            torch.testing.assert_close(one, other, equal_nan=True, **maps.TOLERANCE)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tags": DUPLICATE}),
    ("bert", {"layers": {0: [1, 3], 1: None}, "queries": 2}),
    ("gpt_oss", {"layers": [1]}),  # learned sinks; the other layer keeps its own attention
    ("gemma2", {"every": 2}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[kind for kind, _ in CASES])
def test_a_compiled_model_keeps_its_whole_graph_and_its_statistics(kind: str, options: dict[str, Any]) -> None:
    model = models.text_model(kind)
    graph = compiled(model, "aot_eager" if kind == "bert" else "eager")
    with torch.no_grad():
        before = graph(**BATCH)[0]
        with attncap.capture(model, maps.FULL, **options) as plain:
            expected = [model(**BATCH)[0] for _ in range(3)]
        with attncap.capture(graph, maps.FULL, **options) as cap:
            found = [graph(**BATCH)[0] for _ in range(3)]
        assert torch.equal(graph(**BATCH)[0], before)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[TOKENS], other[TOKENS], atol=1e-5, rtol=1e-5)
    assert_same_summary(cap, plain, (None,))


def test_a_model_that_is_compiled_in_place() -> None:
    model = models.text_model("bert")
    with torch.no_grad():
        with attncap.capture(model, maps.FULL) as plain:
            model(**BATCH)
        model.compile(fullgraph=True, backend="eager")
        with attncap.capture(model, maps.FULL) as cap:
            model(**BATCH)
    assert_same_summary(cap, plain, (None,))


def test_parts_that_call_torch_are_captured_in_the_graph_too() -> None:
    model, pixels = models.siglip(), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    graph = compiled(model)
    with torch.no_grad():
        with attncap.capture(model, maps.FULL) as plain:
            model(pixels)
        with attncap.capture(graph, maps.FULL) as cap:
            graph(pixels)
    assert len(cap.layers) == 3
    assert_same_summary(cap, plain, (None,))


def test_decoding_with_a_static_cache() -> None:
    model, ids = models.text_model("llama"), models.tokens(2, 8, seed=1)["input_ids"]
    graph = compiled(model)

    def decode(called: Callable[..., Any]) -> torch.Tensor:
        past = StaticCache(config=model.config, max_cache_len=16)
        parts = [called(one, past_key_values=past).logits for one in ids.split([6, 1, 1], dim=1)]
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        with attncap.capture(model, maps.FULL) as plain:
            expected = decode(model)
        with attncap.capture(graph, maps.FULL) as cap:
            found = decode(graph)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (cap.count("entropy", "decode") == 4).all()
    assert_same_summary(cap, plain, ("prefill", "decode"))


def test_there_is_room_for_more_captures_than_torch_compile_makes_graphs() -> None:
    model, limit = models.text_model("bert"), torch._dynamo.config.recompile_limit
    for number in range(3):
        with attncap.capture(compiled(model)):
            assert torch._dynamo.config.recompile_limit > limit + number
    assert torch._dynamo.config.recompile_limit == limit


def test_statistics_with_gradients_are_refused_in_a_graph() -> None:
    graph = compiled(models.text_model("bert"))
    cap = attncap.capture(graph, keep="last", differentiable=True)
    with cap, pytest.raises(Exception, match="differentiable: statistics do not leave a compiled graph"):
        graph(**BATCH)


def test_forwards_inside_a_graph_cannot_be_counted() -> None:
    model = models.text_model("bert")
    message = "every: the forwards of a model inside a compiled graph cannot be counted"
    with torch.no_grad(), attncap.capture(model, every=2), pytest.raises(Exception, match=message):
        compiled(model)(**BATCH)


# Plain torch modules.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(is_causal=True)
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)

    def forward(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = tokens + self.attn(tokens)
        return self.layer(tokens + self.heads(tokens, tokens, tokens, key_padding_mask=attention_mask == 0)[0])


@pytest.mark.parametrize(
    ("warm", "backend"), [(False, "aot_eager"), (True, "eager")], ids=["compiled inside", "compiled before"]
)
def test_a_compiled_network_keeps_its_whole_graph_and_its_statistics(warm: bool, backend: str) -> None:
    model, tokens = Network().eval(), seeded(26, 2, 5, WIDTH)
    batch = {
        "input_ids": torch.tensor([[0, 1, 0, 2, 1], [1, 1, 2, 0, 0]]),
        "attention_mask": (~padding([5, 3], 5)).long(),
    }
    graph = compiled(model, backend)
    with torch.no_grad():
        expected = graph(tokens, **batch) if warm else model(tokens, **batch)
        with attncap.capture(model, FULL, tags=DUPLICATE) as plain:
            model(tokens, **batch)
        for captured in (model, graph):
            with attncap.capture(captured, FULL, tags=DUPLICATE) as cap:
                found = [graph(tokens, **batch) for _ in range(3)]
            assert cap.layers == plain.layers == ("attn", "heads", "layer.self_attn")
            for one in found:
                torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
            for name in plain.accumulator.stats:
                assert torch.equal(cap.count(name), 3 * plain.count(name)), name
                torch.testing.assert_close(cap.mean(name), plain.mean(name), equal_nan=True, **TOLERANCE)
        torch.testing.assert_close(graph(tokens, **batch), expected, atol=1e-5, rtol=1e-5)
    assert torch._C._len_torch_function_stack() == 0


def test_more_captures_than_torch_compile_makes_graphs() -> None:
    model, tokens = nn.Sequential(Attention()), seeded(26, 2, 5, WIDTH)
    graph, limit = compiled(model), 2
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=limit):
        for _ in range(limit + 2):
            with attncap.capture(model) as cap:
                graph(tokens)
            assert (cap.count("entropy") == 10).all()
        assert torch._dynamo.config.recompile_limit == limit


def test_parts_that_are_compiled_by_themselves() -> None:
    model, tokens = nn.Sequential(torch.compile(Attention(), backend="eager"), Attention()), seeded(26, 2, 5, WIDTH)
    model[1].compile(backend="eager")
    with torch.no_grad(), attncap.capture(model, keep="last", spec=FULL) as cap:
        model(tokens)
    assert cap.layers == ("0", "1")
    assert_stats_match(cap.stats["0"], model[0]._orig_mod.map(tokens), every_row(2, 5))
