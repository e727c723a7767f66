"""What a capture counts: layers and heads of them, the last query rows, every n-th forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attncap
from attncap import StatSpec
from attncap.adapters import served
from tests import maps, models
from tests.plain import WIDTH, Attention, seeded

RECEIVED = StatSpec(received=True)
SMALL = models.tokens(2, 7, seed=1, padding="right")
LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def run(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def counting_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of query rows of every call of attncap's attention that an adapter makes."""
    calls: list[int] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return own(query, *args, **kwargs)

    own = served.run
    monkeypatch.setattr(served, "run", counted)
    return calls


# Layers and heads.


def test_no_call_is_made_for_layers_that_are_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.text_model("llama"), models.tokens(2, 7, seed=1)
    calls = counting_calls(monkeypatch)
    with attncap.capture(model, layers=[1]):
        run(model, batch)
    assert calls == [7]


@pytest.mark.parametrize("histogram", [False, True])
def test_heads_that_are_not_selected_count_nothing(histogram: bool) -> None:
    model, batch = models.text_model("llama"), models.tokens(2, 7, seed=1, padding="left")
    whole, part = (
        attncap.Capture(model, RECEIVED, layers=layers, histogram=histogram)
        for layers in (None, {LAYERS[0]: [2, 0], 1: None})
    )
    for cap in (whole, part):
        with cap:
            run(model, batch)
    wanted = torch.tensor([[True, False, True, False], [True] * 4])
    for stat in whole.accumulator.stats:
        for field in ("count", "mean", "std", "min", "max", *(("p05", "p50") if histogram else ())):
            expected, found = (cap.accumulator.table(stat, field) for cap in (whole, part))
            blank = torch.zeros_like(expected) if field == "count" else torch.full_like(expected, torch.nan)
            assert torch.equal(torch.where(wanted, expected, blank).nan_to_num(-9.0), found.nan_to_num(-9.0)), stat
    assert part.layers == LAYERS


def test_heads_are_checked() -> None:
    model, batch = models.text_model("llama"), models.tokens(2, 7, seed=1)
    for wrong, error, message in (
        ({0: []}, ValueError, r"layers\[0\]: expected numbers of heads from 0, at least one, got \[\]"),
        ({0: [-1]}, ValueError, r"layers\[0\]: expected numbers of heads from 0"),
        ({LAYERS[1]: [True]}, TypeError, rf"layers\['{LAYERS[1]}'\]: expected a list of numbers of heads"),
        ({0: 3}, TypeError, r"layers\[0\]: expected a list of numbers of heads, or None for all, got 3"),
        ({2: [0]}, ValueError, "no attention module has the index 2"),
    ):
        with pytest.raises(error, match=message):
            attncap.capture(model, layers=wrong)
    with (
        attncap.capture(model, layers={0: [4]}),
        pytest.raises(ValueError, match=f"layers: '{LAYERS[0]}' has the heads 0 to 3, got 4"),
    ):
        run(model, batch)


# The last query rows.


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
def test_only_the_last_tokens_of_each_sequence_count_as_query_rows(kind: str, padding: str) -> None:
    model, batch = models.text_model(kind), models.tokens(3, 9, seed=2, padding=padding)
    twin = maps.eager(model)
    with maps.eager_calls(twin) as calls:
        run(twin, batch)
    with attncap.capture(model, maps.FULL, keep="all", queries=3) as cap:
        found = run(model, batch)
    with attncap.capture(model, maps.FULL) as whole:
        assert torch.equal(run(model, batch), found)  # all rows are computed all the same
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    last = torch.zeros_like(tokens)
    for sequence, mask in enumerate(tokens):
        last[sequence, mask.nonzero()[-3:, 0]] = True
    for layer, name in enumerate(cap.layers):
        maps.assert_stats_match(cap.stats[name][0], calls[name][0].prob, last, lse=calls[name][0].lse)
        assert cap.count("entropy")[layer].tolist() == [int(last.sum())] * 4
    assert torch.equal(cap.count("received_mass"), whole.count("received_mass"))  # keys are counted as ever


def test_the_last_rows_of_a_plain_module() -> None:
    model, states = nn.Sequential(Attention()), seeded(1, 2, 6, WIDTH)
    counts = {}
    for queries in (None, 2, 9):
        with torch.no_grad(), attncap.capture(model, queries=queries) as cap:
            model(states)
        counts[queries] = int(cap.count("entropy")[0, 0])
    assert counts == {None: 12, 2: 4, 9: 12}


# Every n-th forward.


def test_every_third_forward_is_captured_and_the_others_run_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.text_model("mistral")
    batches = [models.tokens(1, length, seed=length) for length in (3, 4, 5, 6, 7)]
    own, by_itself = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        by_itself.append(query.shape[2])
        return own(module, query, *args, **kwargs)

    expected = [run(model, batch) for batch in batches]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counting)
    calls = counting_calls(monkeypatch)
    seen = []

    def same(batch: Any) -> tuple[Tensor, Tensor]:
        seen.append(batch["input_ids"].shape[1])
        return batch["input_ids"], batch["input_ids"]

    with attncap.capture(model, every=3, tags={"same": same}) as cap:
        found = [run(model, batch) for batch in batches]
    assert calls == [3, 3, 6, 6]
    assert by_itself == [4, 4, 5, 5, 7, 7]
    assert seen == [3, 6]
    assert (cap.count("entropy") == 3 + 6).all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one in (1, 2, 4):
        assert torch.equal(found[one], expected[one])


def test_every_second_step_of_a_generation() -> None:
    model, batch = models.text_model("llama"), models.tokens(2, 5, seed=3, padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    with attncap.capture(model, every=2) as cap:
        assert torch.equal(model.generate(**batch, **options), expected)
    assert (cap.count("entropy", phase="prefill") == batch["attention_mask"].sum()).all()
    assert (cap.count("entropy", phase="decode") == 2 * 2).all()  # of the steps 0 to 5 those with 2 and 4


def test_every_second_forward_of_a_plain_module() -> None:
    model, states = nn.Sequential(Attention()), seeded(1, 2, 6, WIDTH)
    with torch.no_grad(), attncap.capture(model, every=2) as cap:
        for _ in range(3):
            model(states)
    assert int(cap.count("entropy")[0, 0]) == 2 * 12


def test_a_forward_that_fails_counts_as_one_and_what_comes_after_is_captured() -> None:
    model, batch = models.text_model("bert"), models.tokens(1, 5, seed=1)

    def fail(_module: nn.Module, _args: Any) -> None:
        raise RuntimeError("stop")

    with attncap.capture(model, every=2) as cap:
        run(model, batch)
        handle = model.encoder.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(model, batch)
        handle.remove()
        run(model, batch)
    assert (cap.count("entropy") == 10).all()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_numbers_are_checked() -> None:
    model = models.text_model("bert")
    for argument in ("queries", "every"):
        with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
            attncap.capture(model, **{argument: 0})
        with pytest.raises(TypeError, match=f"{argument}: expected an int, got 1.5"):
            attncap.capture(model, **{argument: 1.5})


# Layers that are not selected.


def test_unselected_layers_keep_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.text_model("mistral")
    calls = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return own(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counting)
    before = run(model, SMALL)
    calls.clear()
    with attncap.capture(model, layers=["model.layers.1.self_attn"]) as cap:
        inside = run(model, SMALL)
    assert cap.layers == ("model.layers.1.self_attn",)
    assert calls == [0]
    kept = SMALL["attention_mask"].bool()
    torch.testing.assert_close(inside[kept], before[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_unselected_layers_on_eager_attention_give_the_same_output(kind: str, padding: str) -> None:
    batch = models.tokens(2, 8, seed=4, padding=padding)
    model = maps.eager(models.text_model(kind))
    before = run(model, batch)
    with attncap.capture(model, layers=[1]) as cap:
        inside = run(model, batch)
    assert len(cap.layers) == 1
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(inside[kept], before[kept], atol=1e-5, rtol=1e-5)


def test_layers_are_named_by_name_or_index() -> None:
    model = models.text_model("bert")
    first, second = "encoder.layer.0.attention.self", "encoder.layer.1.attention.self"
    for layers, expected in (([0], (first,)), ([-1], (second,)), ([second, 0], (first, second))):
        with attncap.capture(model, layers=layers) as cap:
            run(model, SMALL)
        assert cap.layers == expected
    with pytest.raises(ValueError, match=f"index 2; there are: 0 '{first}', 1 '{second}'"):
        attncap.capture(model, layers=[2])
    with pytest.raises(ValueError, match=f"'encoder'; there are: 0 '{first}'"):
        attncap.capture(model, layers=["encoder"])
    with pytest.raises(TypeError, match="layers"):
        attncap.capture(model, layers=first)
    with pytest.raises(TypeError, match="layers"):
        attncap.capture(model, layers=[True])
