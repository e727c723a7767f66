"""Shapes of attention: fixed offsets, five patterns by rule, retrieval; where the answer is known, and from maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import StatSpec, capture, tags
from attncap.analysis import Needle, find_patterns, find_roles, patterns, positional_heads, retrieval_scores
from tests import handmade

pytest.importorskip("transformers")

from tests import maps, models
from tests.runs import head_rows

pyarrow = pytest.importorskip("pyarrow")


def table(rows: Any) -> Any:
    return pyarrow.Table.from_pylist([row if isinstance(row, dict) else vars(row) for row in rows])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_offsets_are_those_of_the_maps_largest_entries(kind, padding):
    model, batch = models.text_model(kind), models.tokens(3, 9, 5, padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        attentions = maps.eager(model)(**batch, output_attentions=True).attentions
    found = positional_heads(model, [batch])
    assert len(found) == 8
    for place, head in enumerate(found):
        prob = attentions[place // 4][:, place % 4]
        offsets = (prob.argmax(-1) - torch.arange(9))[kept].tolist()
        assert head.head == place % 4
        assert head.rows == int(kept.sum())
        assert head.share == pytest.approx(max(offsets.count(offset) for offset in offsets) / len(offsets))
        assert offsets.count(head.offset) / len(offsets) == pytest.approx(head.share)
        assert head.holds == (head.share >= 0.9)


def test_heads_that_look_at_one_place_are_positional():
    found = positional_heads(handmade.InductionModel(), [handmade.repeated(2, 0), handmade.repeated(1, 1)])
    by_place = {(int(head.module[-1]), head.head): head for head in found}
    assert {place for place, head in by_place.items() if head.holds} == {handmade.PREVIOUS, handmade.ITSELF}
    assert (by_place[handmade.PREVIOUS].offset, by_place[handmade.ITSELF].offset) == (-1, 0)
    assert by_place[handmade.PREVIOUS].share == pytest.approx(30 / 31)  # the first token has none before it
    assert not any(
        head.holds for head in positional_heads(handmade.InductionModel(), [handmade.repeated(1, 0)], threshold=1.01)
    )
    with pytest.raises(ValueError, match="batches: expected at least one"):
        positional_heads(handmade.InductionModel(), [])


def captured(batches: list[Tensor]) -> Any:
    """heads.parquet's columns of the hand-made model, with the tags of roles."""
    model = handmade.InductionModel()
    known = {
        "induction": lambda batch: tags.induction({"input_ids": batch["input_ids"]}),
        "special_tokens": tags.token_set([0]),
    }
    spec = StatSpec(offsets=(-1, 1), sink=1)
    with torch.no_grad(), capture(model, spec, tags=known) as cap:
        for batch in batches:
            model(batch)
    return table(cap.accumulator.rows())


def test_roles_of_the_handmade_model_are_those_it_was_made_with():
    heads = captured([handmade.repeated(2, seed) for seed in range(3)])
    roles = {
        result.role.name: result for result in find_roles(heads, spec={"sink": 1, "diagonal": 0}, tags=("induction",))
    }
    holders = {name: [(head.layer, head.head) for head in result.holders] for name, result in roles.items()}
    assert holders["previous token"] == [handmade.PREVIOUS]
    assert holders["self"] == [handmade.ITSELF]
    assert holders["induction"] == [handmade.INDUCTION]
    assert holders["sink"] == [handmade.INDUCTION]  # where it finds nothing it rests on the first token
    assert holders["broadest"] == [handmade.ANTICOPY]


def test_patterns_of_the_handmade_model():
    found = {(head.layer, head.head): head for head in find_patterns(captured([handmade.repeated(2, 0)]))}
    assert found[handmade.PREVIOUS].pattern == "diagonal"
    assert found[handmade.ITSELF].pattern == "diagonal"
    assert found[handmade.INDUCTION].pattern == "vertical"
    assert found[handmade.ANTICOPY].pattern == "heterogeneous"
    assert found[handmade.INDUCTION].rule == "vertical 0.52 > 0.50"  # 16 of 31 rows


STATS = ("special_tokens", "offset_mass[-1]", "diagonal_mass", "offset_mass[1]", "segment")


@pytest.mark.parametrize(
    ("special", "before", "itself", "after", "segment", "pattern"),
    [
        (0.71, 0.05, 0.05, 0.05, 0.5, "vertical"),
        (0.1, 0.3, 0.1, 0.2, 0.7, "diagonal"),
        (0.3, 0.1, 0.1, 0.1, 0.7, "vertical + diagonal"),
        (0.1, 0.1, 0.1, 0.1, 0.95, "block"),
        (0.1, 0.1, 0.1, 0.1, 0.6, "heterogeneous"),
        (0.5, 0.05, 0.05, 0.05, 0.6, "heterogeneous"),  # half is not more than half
    ],
)
def test_each_pattern_has_its_rule(special, before, itself, after, segment, pattern):
    numbers = dict(zip(STATS, (special, before, itself, after, segment), strict=True))
    rows = head_rows([2], stats=STATS, means={(stat, 0, 1): value for stat, value in numbers.items()})
    found = find_patterns(table(rows))[1]
    assert found.pattern == pattern
    assert found.numbers == pytest.approx({"vertical": special, "diagonal": before + itself + after, "block": segment})
    assert f"{special:.2f}" in found.rule or pattern in ("diagonal", "block")


def test_texts_of_one_segment_have_no_block_pattern():
    means = {("segment", 0, head): 1.0 for head in range(2)}
    found = find_patterns(table(head_rows([2], stats=STATS, means=means)))
    assert {head.pattern for head in found} == {"heterogeneous"}
    assert "block" not in found[0].numbers


def test_a_run_without_the_neighbours_is_refused_by_name():
    with pytest.raises(ValueError, match=r"heads: expected the statistics offset_mass\[-1\], offset_mass\[1\]"):
        find_patterns(table(head_rows([2], stats=("sink_mass", "diagonal_mass"))))


def answered(model: handmade.InductionModel, start: int, stop: int, seed: int = 0) -> Needle:
    """The token before a needle, and what the model goes on with."""
    tokens = handmade.repeated(1, seed)[:, :16]
    tokens = torch.cat([tokens, tokens[:, start - 1 : start]], 1)
    answer = tokens.shape[1]
    with torch.no_grad():
        for _ in range(stop - start):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return Needle(tokens[0], start, stop, answer)


def test_the_induction_head_alone_retrieves_the_needle():
    model = handmade.InductionModel()
    needles = [answered(model, 3, 9), answered(model, 7, 11, seed=1)]
    for needle in needles:
        assert torch.equal(needle.tokens[needle.answer :], needle.tokens[needle.start : needle.stop])
    scores = retrieval_scores(model, needles)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    expected[handmade.INDUCTION] = 1
    assert torch.equal(scores, expected)
    assert (scores >= patterns.RETRIEVAL_THRESHOLD).nonzero().tolist() == [list(handmade.INDUCTION)]


def test_only_what_was_generated_from_the_needle_counts():
    model = handmade.InductionModel()
    whole = answered(model, 3, 9)
    wider = Needle(whole.tokens, 1, 9, whole.answer)  # of eight tokens six were copied
    later = Needle(whole.tokens, 9, 12, whole.answer)
    assert float(retrieval_scores(model, [wider])[handmade.INDUCTION]) == pytest.approx(6 / 8)
    assert float(retrieval_scores(model, [later]).max()) == 0
    assert float(retrieval_scores(model, [wider, later])[handmade.INDUCTION]) == pytest.approx(3 / 8)


def test_retrieval_scores_of_a_transformers_model_are_those_of_its_maps():
    model = models.text_model("llama")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 6, (24,), generator=generator)  # three different tokens, so that some are copied
    needle = Needle(tokens, 2, 9, 14)
    with torch.no_grad():
        attentions = maps.eager(model)(input_ids=tokens[None], output_attentions=True).attentions
    expected = torch.zeros(2, 4, dtype=torch.float64)
    wanted = set(tokens[2:9].tolist())
    for layer, head in ((layer, head) for layer in range(2) for head in range(4)):
        largest = attentions[layer][0, head].argmax(-1).tolist()
        rows = [row for row in range(13, 23) if 2 <= largest[row] < 9 and tokens[largest[row]] == tokens[row + 1]]
        expected[layer, head] = len({int(tokens[row + 1]) for row in rows} & wanted) / len(wanted)
    assert expected.max() > 0
    torch.testing.assert_close(retrieval_scores(model, [needle]), expected)


def test_wrong_needles_are_named():
    with pytest.raises(ValueError, match="start, stop, answer: expected 0 <= start < stop <= answer < 5, got 2, 2, 4"):
        Needle(torch.arange(5), 2, 2, 4)
    with pytest.raises(ValueError, match=r"tokens: expected a tensor \(N,\) of token ids, got \(1, 5\)"):
        Needle(torch.arange(5)[None], 1, 2, 4)
    with pytest.raises(ValueError, match="needles: expected at least one"):
        retrieval_scores(handmade.InductionModel(), [])
