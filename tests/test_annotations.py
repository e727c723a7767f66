"""Tags and features of a capture: functions of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncap
from attncap import tags
from tests import maps, models
from tests.traces import hooks

SMALL = models.tokens(2, 7, seed=1, padding="right")


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**SMALL)[0]


def brute_force_tag(prob: Tensor, query_tags: Tensor, key_tags: Tensor) -> Tensor:
    match = (query_tags[:, :, None] == key_tags[:, None, :]) & (key_tags[:, None, :] >= 0)
    return (prob * match[:, None]).sum(-1)


@pytest.mark.parametrize("positional", [True, False])
def test_tags_and_features_are_functions_of_the_batch(positional: bool) -> None:
    model = models.text_model("llama")
    batch = models.tokens(2, 7, seed=6, padding="right")
    norms = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(7))
    seen: list[set[str]] = []

    def parity(given: Any) -> tuple[Tensor, Tensor]:
        seen.append({name for name, value in given.items() if value is not None})
        return given["input_ids"] % 2, given["input_ids"] % 2

    features = {"norm": lambda given: norms, "place": lambda given: torch.arange(7.0).expand(2, 7)}
    with attncap.capture(model, tags={"parity": parity}, features=features, keep="last") as cap, torch.no_grad():
        if positional:
            model(batch["input_ids"], batch["attention_mask"])
        else:
            model(**batch)
    assert seen == [{"input_ids", "attention_mask"}]
    with torch.no_grad():
        found = maps.eager(model)(**batch, output_attentions=True).attentions
    kept = batch["attention_mask"].bool()[:, None].expand(2, 4, 7)
    for layer, (name, prob) in enumerate(zip(cap.layers, found, strict=True)):
        tags = batch["input_ids"] % 2
        expected = {
            "parity": brute_force_tag(prob, tags, tags),
            "norm[0]": (prob @ norms[:, None])[..., 0],
            "norm[1]": (prob @ norms[:, None])[..., 1],
            "place": prob @ torch.arange(7.0),
        }
        for statistic, wanted in expected.items():
            for head in range(4):
                mean = wanted[:, head][kept[:, head]].double().mean()
                torch.testing.assert_close(cap.mean(statistic)[layer, head], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cap.stats[name].tag_mass[..., 0][kept], expected["parity"][kept])


WRONG_TAGS = {
    "pair": (lambda batch: batch["input_ids"], TypeError, "query_tags, key_tags"),
    "float": (lambda batch: (torch.zeros(2, 7), torch.zeros(2, 7)), TypeError, "integer query_tags"),
    "none": (lambda batch: (None, None), TypeError, "expected a tensor, got NoneType"),
    "rank": (lambda batch: (torch.zeros(7, dtype=torch.int64),) * 2, ValueError, "shape \\(batch, tokens\\)"),
    "length": (lambda batch: (torch.zeros(2, 5, dtype=torch.int64),) * 2, ValueError, "\\(2, 7\\)"),
}


@pytest.mark.parametrize("name", sorted(WRONG_TAGS))
def test_a_tag_function_that_gives_something_else_is_named(name: str) -> None:
    function, error, message = WRONG_TAGS[name]
    model = models.text_model("bert")
    with pytest.raises(error, match=message), attncap.capture(model, tags={name: function}):
        output(model)
    assert hooks(model) == 0


def test_names_of_tags_and_features_are_checked() -> None:
    model = models.text_model("bert")
    for name in ("entropy", "max_prob", "offset_mass[-1]", "", "relative_entropy", "topk_mass"):
        with pytest.raises(ValueError, match="cannot be a name"):
            attncap.capture(model, tags={name: lambda batch: None})
    with pytest.raises(ValueError, match="'mine' is the name of a tag already"):
        attncap.capture(model, tags={"mine": lambda batch: None}, features={"mine": lambda batch: None})
    with pytest.raises(TypeError, match="expected a function"):
        attncap.capture(model, features={"mine": torch.zeros(2, 7)})
    with pytest.raises(TypeError, match="floating"), attncap.capture(model, features={"f": lambda b: b["input_ids"]}):
        output(model)


def test_tags_while_decoding_say_that_they_cannot() -> None:
    model = models.text_model("llama")
    with attncap.capture(model, tags={"duplicate": tags.duplicate}), torch.no_grad():
        past = model(**models.tokens(1, 5, seed=8)).past_key_values
        with pytest.raises(ValueError, match="cannot follow a cache"):
            model(**models.tokens(1, 1, seed=8), past_key_values=past)
