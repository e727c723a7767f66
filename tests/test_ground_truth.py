"""What analyses say where the answer is known.

A model that learned to go on with sequences that repeat takes a head that looks at the token before and, in the layer
after it, heads that look at what followed their token (Olsson et al. 2022). Heads whose scores are written by hand have
the role they were written for.
"""

from __future__ import annotations

from typing import Any

import pyarrow
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap import StatSpec, capture, tags
from attncap.analysis import (
    ablate,
    circuits,
    composition,
    detect_head,
    find_patterns,
    find_roles,
    head_importance,
    output_weight,
    positional_heads,
    pruning_curve,
)
from attncap.analysis.roles import RoleResult
from tests import trained

UNSEEN = 10**6


@pytest.fixture(scope="module")
def previous(induction_model: Any) -> int:
    """The head of the first layer that looks at the token before most."""
    return int(detect_head(induction_model, tokens(), "previous_token_head")[0].argmax())


def tokens() -> Tensor:
    return trained.repeated(32, UNSEEN)[0]


def test_it_has_learned_what_it_was_trained_for(induction_model: Any) -> None:
    assert float(trained.continuation_loss(induction_model, trained.repeated(64, UNSEEN))) < 0.4  # of log 16 = 2.77


def test_the_detector_finds_both_kinds_of_heads_in_their_layers(induction_model: Any) -> None:
    before = detect_head(induction_model, tokens(), "previous_token_head")
    assert float(before[0].max()) > 0.6
    assert float(before[1].max()) < 0.2
    induction = detect_head(induction_model, tokens(), "induction_head")
    assert float(induction[1].max()) > 0.55  # the first 8 to 16 of 32 tokens have nothing to find
    assert float(induction[0].max()) < 0.25


def roles_of(model: Any) -> dict[str, RoleResult]:
    spec = StatSpec(offsets=(-1, 1))
    known = {"induction": tags.induction, "duplicate": tags.duplicate}
    with torch.no_grad(), capture(model, spec, tags=known) as cap:
        model(tokens())
    table = pyarrow.Table.from_pylist([vars(row) for row in cap.accumulator.rows()])
    return {result.role.name: result for result in find_roles(table, spec=vars(spec), tags=known)}


def test_roles_name_both_kinds_of_heads(induction_model: Any, previous: int) -> None:
    roles = roles_of(induction_model)
    before, induction = roles["previous token"], roles["induction"]
    assert (0, previous) in {(head.layer, head.head) for head in before.holders}
    assert {head.layer for head in before.holders} == {0}
    assert {head.layer for head in induction.holders} == {1}
    assert before.role.rule == "> 0.50"
    assert all(head.mean > 0.5 for head in before.holders)
    assert not roles["next token"].holders  # it cannot see ahead


def test_the_head_of_the_token_before_is_positional(induction_model: Any, previous: int) -> None:
    known = trained.repeated(64, UNSEEN)[0]
    found = {(int(head.module[-1]), head.head): head for head in positional_heads(induction_model, [known])}
    head = found[0, previous]
    assert head.offset == -1
    assert head.share > 0.7
    assert not any(found[1, head].holds for head in range(trained.HEADS))


def test_induction_heads_copy_and_read_what_the_head_before_wrote(induction_model: Any, previous: int) -> None:
    found = circuits(induction_model, embed=induction_model.token.weight, unembed=induction_model.unembed.weight)
    assert float(found.copying[1].min()) > 0.8
    keys = composition(induction_model, "k")[0, :, 1]
    assert int(keys.mean(1).argmax()) == previous


def test_without_the_head_before_nothing_is_found(induction_model: Any, previous: int) -> None:
    batch = trained.repeated(64, UNSEEN)
    whole = float(trained.continuation_loss(induction_model, batch))
    with ablate(induction_model, [(0, previous)]), torch.no_grad():
        assert float(trained.continuation_loss(induction_model, batch)) > whole + 1
        assert float(detect_head(induction_model, tokens(), "induction_head").max()) < 0.5
    with ablate(induction_model, [(1, head) for head in range(trained.HEADS)]), torch.no_grad():
        assert float(trained.continuation_loss(induction_model, batch)) > whole + 1


def test_the_curve_rises_with_every_head_that_matters(induction_model: Any) -> None:
    batches = [trained.repeated(32, UNSEEN + part) for part in range(2)]
    importance = head_importance(induction_model, batches, trained.continuation_loss)
    curve = pruning_curve(induction_model, batches, trained.continuation_loss, importance)
    assert curve[0].loss < 0.4
    assert curve[-1].loss > 2
    assert [point.removed for point in curve] == list(range(5))


def test_its_heads_share_the_output_of_their_layers(induction_model: Any) -> None:
    found = output_weight(induction_model, [tokens()])
    assert found.share.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert float(found.share.min()) > 0.1


PLACES, TOKENS, SEPARATOR = 20, 10, 9
WRITTEN = ("previous token", "next token", "self", "sink", "special tokens", "duplicate", "induction", "broadest")


class Written(nn.Module):
    """A head for each of `WRITTEN`, in a layer that sees ahead: a token shows its place, itself, the one before."""

    def __init__(self) -> None:
        super().__init__()
        place, token = slice(0, PLACES), slice(PLACES, PLACES + TOKENS)
        before = slice(token.stop, token.stop + TOKENS)
        scores = torch.zeros(len(WRITTEN), before.stop, before.stop)
        for name, shift in (("previous token", -1), ("next token", 1), ("self", 0)):
            scores[WRITTEN.index(name), place, place] = torch.diag(torch.ones(PLACES - abs(shift)), shift)
        scores[WRITTEN.index("sink"), place, 0] = 1
        scores[WRITTEN.index("special tokens"), place, PLACES + SEPARATOR] = 1
        scores[WRITTEN.index("duplicate"), token, token] = torch.eye(TOKENS)
        scores[WRITTEN.index("duplicate"), place, place] = -torch.eye(PLACES)
        scores[WRITTEN.index("induction"), token, before] = torch.eye(TOKENS)
        scores[WRITTEN.index("induction"), place, place] = -torch.diag(torch.ones(PLACES - 1), 1)
        self.scores = nn.Parameter(60 * scores, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        token = F.one_hot(input_ids, TOKENS)
        before = F.pad(token[:, :-1], (0, 0, 1, 0))
        place = torch.eye(PLACES).expand(len(input_ids), -1, -1)
        features = torch.cat([place, token, before], -1).float()[:, None]
        key = features.expand(-1, len(WRITTEN), -1, -1)
        return F.scaled_dot_product_attention(features @ self.scores, key, key, scale=1.0)


def written_texts() -> Tensor:
    """Eight words, the same again, the separator, and the beginning of them once more."""
    words = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)])
    return torch.cat([words, words, torch.full((6, 1), SEPARATOR), words[:, :3]], 1)


def written_table() -> Any:
    spec = StatSpec(offsets=(-1, 1), sink=1)
    known = {
        "induction": tags.induction,
        "duplicate": tags.duplicate,
        "special_tokens": tags.token_set([SEPARATOR]),
    }
    with torch.no_grad(), capture(Written(), spec, tags=known) as cap:
        cap.model(written_texts())
    return pyarrow.Table.from_pylist([vars(row) for row in cap.accumulator.rows()])


def test_every_role_is_found_in_the_head_that_was_written_for_it() -> None:
    found = find_roles(
        written_table(), spec={"sink": 1, "diagonal": 0}, tags=("induction", "duplicate", "special_tokens")
    )
    roles = {result.role.name: result for result in found}
    for number, name in enumerate(WRITTEN):
        assert [head.head for head in roles[name].holders] == [number], name
    for result in found:
        rule, threshold = result.role.rule, result.role.threshold
        assert threshold is not None
        assert rule == f"{'>' if result.role.highest else '<'} {threshold:.2f}"
        for head in result.ranked:
            assert head.holds == (head.mean > threshold if result.role.highest else head.mean < threshold)
    # All but the three that have a choice of several tokens, or of all, look at one.
    several = {WRITTEN.index(name) for name in ("duplicate", "induction", "broadest")}
    narrow = {head.head for head in roles["narrowest"].holders}
    assert narrow >= set(range(len(WRITTEN))) - several
    assert WRITTEN.index("broadest") not in narrow


def test_positions_and_patterns_of_the_written_heads() -> None:
    positional = {WRITTEN[head.head]: head for head in positional_heads(Written(), [written_texts()])}
    assert [name for name, head in positional.items() if head.holds] == ["previous token", "next token", "self"]
    assert [positional[name].offset for name in ("previous token", "next token", "self")] == [-1, 1, 0]
    assert all(head.threshold == 0.9 for head in positional.values())
    patterns = {WRITTEN[head.head]: head for head in find_patterns(written_table())}
    assert {name: patterns[name].pattern for name in WRITTEN[:5]} == {
        "previous token": "diagonal",
        "next token": "diagonal",
        "self": "diagonal",
        "sink": "heterogeneous",  # the separator is the only special token
        "special tokens": "vertical",
    }
    assert patterns["broadest"].pattern == "heterogeneous"
    assert patterns["special tokens"].rule.startswith("vertical 1.00 > 0.50")
