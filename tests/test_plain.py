"""`capture` on plain torch modules, held against attention maps computed in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import attncap
from tests.plain import HEADS, WIDTH, Attention, capture_of, every_row, padding, seeded
from tests.test_capture import TOLERANCE, assert_stats_match

# Calls of the function.

FUNCTIONS = {
    "F": F.scaled_dot_product_attention,
    "imported by name": imported_by_name,
    "torch._C": torch._C._nn.scaled_dot_product_attention,
    "aten": torch.ops.aten.scaled_dot_product_attention,
    "attncap": attncap.scaled_dot_product_attention,
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_way_to_call_the_function_is_captured(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    model, tokens = nn.Sequential(nn.LayerNorm(WIDTH), Attention(function, **options)), seeded(0, 2, 6, WIDTH)
    cap, _ = capture_of(model, tokens)
    assert cap.layers == ("1",)
    assert_stats_match(cap.stats["1"], model[1].map(model[0](tokens)), every_row(2, 6))
    seen = torch.arange(1, 7) if options else torch.full((6,), 6)
    assert (cap.count("relative_entropy") == 2 * int((seen >= 2).sum())).all()


class Encoder(nn.Module):
    """Hands its padding on as a mask of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor, attention_mask: Tensor, causal: bool = False) -> Tensor:
        return self.attn(tokens, mask=self.mask(tokens, attention_mask, causal))

    def mask(self, tokens: Tensor, attention_mask: Tensor, causal: bool) -> Tensor:
        keys = attention_mask.bool()[:, None, None]
        return keys & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril() if causal else keys


@pytest.mark.parametrize("causal", [False, True])
def test_padding_told_by_an_attention_mask_does_not_count(causal: bool) -> None:
    model, tokens, mask = Encoder(), seeded(1, 3, 7, WIDTH), (~padding([7, 4, 1], 7)).long()
    cap, _ = capture_of(model, tokens, attention_mask=mask, causal=causal)
    assert_stats_match(cap.stats["attn"], model.attn.map(tokens, mask=model.mask(tokens, mask, causal)), mask.bool())
    assert (cap.count("entropy") == 12).all()


def test_padding_told_by_the_mask_of_the_scores_alone_does_not_count() -> None:
    model, tokens, keys = Attention(), seeded(1, 3, 7, WIDTH), ~padding([7, 4, 1], 7)
    mask = keys[:, None, None]
    cap, _ = capture_of(model, tokens, mask=mask)
    assert_stats_match(cap.stats["Attention"], model.map(tokens, mask=mask), keys)
    assert (cap.count("received_mass") == 12).all()
    cap, _ = capture_of(model, tokens, seeded(2, 3, 7, WIDTH), mask)  # of others' keys it says nothing about the rows
    assert (cap.count("entropy") == 21).all()
    assert (cap.count("received_mass") == 12).all()


class Twice(nn.Module):
    """Two calls in one forward, and one module for two kinds of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Attention()

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (tokens, context)]
        first = F.scaled_dot_product_attention(heads[0], heads[0], heads[0], is_causal=True)
        second = F.scaled_dot_product_attention(first, heads[1], heads[1])
        return second.transpose(1, 2).flatten(2) + self.shared(tokens) + self.shared(tokens, context)


def test_calls_of_one_module_are_kept_apart() -> None:
    model, tokens, context = Twice(), seeded(3, 2, 5, WIDTH), seeded(4, 2, 9, WIDTH)
    cap, _ = capture_of(model, tokens, context)
    assert set(cap.layers) == {"Twice", "Twice#1", "shared", "shared:cross"}
    assert_stats_match(cap.stats["shared"], model.shared.map(tokens), every_row(2, 5))
    assert_stats_match(cap.stats["shared:cross"], model.shared.map(tokens, context), every_row(2, 5))
    assert cap.stats["Twice"].received_mass.shape[-1] == 5
    assert cap.stats["Twice#1"].received_mass.shape[-1] == 9


def test_tags_and_features_are_functions_of_the_models_arguments() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attn = nn.Embedding(4, WIDTH), Attention()

        def forward(self, input_ids: Tensor, scale: float = 1.0) -> Tensor:
            return self.attn(self.table(input_ids) * scale)

    model, ids = Embedded(), torch.tensor([[0, 1, 0, 2, 1], [3, 3, 3, 0, 1]])
    weights = {"place": lambda batch: torch.arange(5.0).expand(batch["input_ids"].shape)}
    with torch.no_grad(), attncap.capture(model, tags={"duplicate": attncap.tags.duplicate}, features=weights) as cap:
        model(ids)
    prob = model.attn.map(model.table(ids))
    query_tags, key_tags = attncap.tags.duplicate({"input_ids": ids})
    same = (query_tags[:, :, None] == key_tags[:, None, :]) & (key_tags >= 0)[:, None]
    expected = (prob * same[:, None]).sum(-1).mean((0, 2))
    torch.testing.assert_close(cap.mean("duplicate")[0], expected, **TOLERANCE)
    torch.testing.assert_close(cap.mean("place")[0], (prob @ torch.arange(5.0).double()).mean((0, 2)), **TOLERANCE)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attn has query tags for \(2, 5\)"):  # noqa: SIM117
        with attncap.capture(model, tags={"wrong": lambda _: (ids[:, :3], ids[:, :3])}):
            model(ids)


def test_unselected_modules_keep_their_own_attention() -> None:
    seen: list[str] = []

    def spy(name: str) -> Callable[..., Tensor]:
        def function(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return F.scaled_dot_product_attention(*args, **kwargs)

        return function

    model, tokens = nn.Sequential(Attention(spy("first")), Attention(spy("second"))), seeded(5, 2, 5, WIDTH)
    with torch.no_grad():
        first = model[0](tokens)
        with attncap.capture(model, layers=["1"]) as cap:
            assert torch.equal(model[0](tokens), first)
            model(tokens)
    assert cap.layers == ("1",)
    assert seen == ["first"] * 3 + ["second"]


def test_autocast_rounds_as_torch_does() -> None:
    model, tokens = Attention(), seeded(6, 2, 5, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens)
        with attncap.capture(model) as cap:
            found = model(tokens)
        query = seeded(7, 1, 2, 5, 4)
        mixed = attncap.scaled_dot_product_attention(query, query.bfloat16(), query)
    assert found.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert (cap.count("entropy") == 10).all()


# Wrappers.


def test_modules_have_the_names_they_have_without_their_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    tokens = seeded(28, 2, 5, WIDTH)
    inner = nn.Sequential(checkpoint_wrapper(nn.Sequential(Attention())), torch.compile(Attention(), backend="eager"))
    model = nn.DataParallel(inner)
    with torch.no_grad(), attncap.capture(model) as cap:
        model(tokens)
    assert cap.layers == ("0.0", "1")
    with torch.no_grad(), attncap.capture(model, layers=["0.0"]) as cap:
        model(tokens)
    assert cap.layers == ("0.0",)
