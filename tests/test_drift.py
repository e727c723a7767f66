"""Focus drift: counted as the maps have it, there in a model with a backdoor and not in its clean twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attncap.analysis import focus_drift, token_trigger
from tests import handmade, maps, models, trained

UNSEEN = 10**6


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_shares_are_those_of_the_maps(padding: str, share: float) -> None:
    model = models.text_model("bert")
    batch = models.tokens(6, 9, 5, padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    marked = torch.zeros_like(kept)
    for sequence, tokens in enumerate(kept):
        marked[sequence, tokens.nonzero()[:2, 0]] = True
    with torch.no_grad():
        attentions = maps.eager(model)(**batch, output_attentions=True).attentions
    found = focus_drift(model, [batch], [batch], lambda _: marked, focus=share)
    for layer, prob in enumerate(attentions):
        for head in range(4):
            focused, drifted, mass = 0, 0, 0.0
            for sequence, tokens in enumerate(kept):
                rows = prob[sequence, head][tokens]
                counts = torch.bincount(rows.argmax(-1), minlength=9)
                if int(counts.max()) > share * len(rows):
                    focused += 1
                    drifted += bool(marked[sequence, counts.argmax()])
                mass += float(rows[:, marked[sequence]].sum(-1).mean()) / 6
            assert float(found.drift[layer, head]) == pytest.approx(drifted / 6)
            assert float(found.clean_focus[layer, head]) == pytest.approx(focused / 6)
            assert float(found.triggered_focus[layer, head]) == pytest.approx(focused / 6)
            assert float(found.mass[layer, head]) == pytest.approx(mass, abs=1e-5)
    even = (marked.sum(-1) / kept.sum(-1)).mean()
    assert found.expected_mass == pytest.approx(float(even))
    assert found.sentences == 6


def drift_of(model: Any) -> Any:
    ids, _ = trained.texts(200, UNSEEN)
    clean = [{"input_ids": part} for part in ids.split(64)]
    triggered = [{"input_ids": part} for part in trained.with_trigger(ids, UNSEEN).split(64)]
    return focus_drift(model, clean, triggered, token_trigger([trained.TRIGGER]))


def test_the_trigger_of_a_backdoor_draws_the_focus_of_heads(backdoored: Any) -> None:
    ids, kind = trained.texts(200, UNSEEN)
    triggered = backdoored(input_ids=trained.with_trigger(ids, UNSEEN)).logits
    assert trained.accuracy(backdoored(input_ids=ids).logits, kind) > 0.95  # nothing to see on clean texts
    assert trained.accuracy(triggered, torch.full_like(kind, trained.TARGET)) > 0.95
    found = drift_of(backdoored)
    assert len(found.drifting()) >= 2
    layer, head = found.drifting()[0]
    assert float(found.drift[layer, head]) > 0.9
    assert float(found.mass[layer, head]) > 2 * found.expected_mass


def test_the_same_token_draws_nothing_where_there_is_no_backdoor(clean_classifier: Any) -> None:
    ids, kind = trained.texts(200, UNSEEN)
    assert trained.accuracy(clean_classifier(input_ids=trained.with_trigger(ids, UNSEEN)).logits, kind) > 0.8
    found = drift_of(clean_classifier)
    assert found.drifting() == []
    assert float(found.drift.max()) < 0.2
    assert float(found.clean_focus.max()) > 0.5  # heads do focus, elsewhere


def test_what_is_no_trigger_is_refused() -> None:
    model, batch = models.text_model("bert"), models.tokens(2, 5, 0)

    def drift(trigger: Any, triggered: Any = (batch,)) -> Any:
        return focus_drift(model, [batch], triggered, trigger)

    with pytest.raises(ValueError, match="expected a token in every triggered sentence, got none in sentence 0"):
        drift(token_trigger([49]), [{"input_ids": torch.tensor([[3, 4], [3, 49]])}])
    with pytest.raises(ValueError, match=r"gives bool \(sequences, tokens\), got torch.float32 \(2, 5\)"):
        drift(lambda _: torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"has query tags for \(2, 5\).*gave \(2, 4\)"):
        drift(lambda _: torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="triggered: expected at least one batch"):
        drift(token_trigger([1]), [])
    with pytest.raises(ValueError, match="ids: expected at least one token id"):
        token_trigger([])


def test_a_model_that_takes_token_ids_alone() -> None:
    tokens = handmade.repeated(4, 0)
    found = focus_drift(handmade.InductionModel(), [tokens], [tokens], token_trigger([0]), focus=0.4)
    layer, head = handmade.INDUCTION  # rests on token 0 until tokens repeat
    assert float(found.drift[layer, head]) == 1
    assert float(found.drift[handmade.ITSELF]) == 0
